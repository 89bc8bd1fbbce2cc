"""GSM around a host: its first answer improves its own maps, and it answers again.

Source: Xiao et al., "Training-free Boosting for Few-shot Segmentation via Generalizing Semantic Mining" (2026).

    QSM  the query's own structure says which of its cells are foreground        fssdeploy.glue.gsm.qsm
    TSR  where that agrees with the host's mask, the query is one more reference  fssdeploy.glue.gsm.boost
    RR   references weigh by how alike they are to the others                     fssdeploy.glue.gsm.boost

No code was published; every choice the text leaves open is an option, see docs/gsm.md. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from fssdeploy.glue.gsm.boost import Affinity, Boosted, boost
from fssdeploy.glue.gsm.options import GsmOptions
from fssdeploy.images.geometry import unfit
from fssdeploy.images.masks import Mask
from fssdeploy.pipeline import check_query
from fssdeploy.protocol import ClassState, Features, Masks

Trace = dict[str, Any]
Query = TypeVar("Query")


@dataclass
class Answer:
    """What a host says of one picture and class: logits float32 (S, S) on its canvas, and its prior (h, w)."""

    logits: np.ndarray
    prior: np.ndarray


class Host(Protocol[Query]):
    """An affinity host cut where GSM steps in. `Query` is its own: all that both passes share about one picture.

    Whatever `first` computes and `second` needs again (embeddings, masks of points) the host keeps in it.
    """

    name: str
    fingerprint: str

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """As the host's own."""

    def enroll(self, features: Features, masks: Sequence[Mask | np.ndarray], trace: Trace | None = None) -> ClassState:
        """As the host's own."""

    def queries(self, features: Features, trace: Trace | None) -> Sequence[Query]:
        """One for each picture."""

    def affinity(self, query: Query, state: ClassState, trace: Trace | None) -> Affinity:
        """The maps of every reference of the class."""

    def first(self, query: Query, state: ClassState, affinity: Affinity, trace: Trace | None) -> Answer:
        """The host's own answer."""

    def second(self, query: Query, state: ClassState, boosted: Boosted, trace: Trace | None) -> Answer:
        """The answer from boosted maps on."""


class Gsm(Generic[Query]):
    """The three verbs of a host with GSM inside `segment`; states and features are the host's own.

    Where nothing changes the maps (no part switched on, one reference and no proxy) the masks are the host's, bit for
    bit. The encoders run as often as without GSM.
    """

    def __init__(self, host: Host[Query], options: GsmOptions | None = None) -> None:
        self.host = host
        self.options = options or GsmOptions()
        self.name = f"{host.name}+gsm"
        self.fingerprint = host.fingerprint

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """As the host's."""
        return self.host.encode(pictures)

    def enroll(self, features: Features, masks: Sequence[Mask | np.ndarray], trace: Trace | None = None) -> ClassState:
        """As the host's."""
        return self.host.enroll(features, masks, trace)

    def segment(self, features: Features, states: Mapping[str, ClassState], trace: Trace | None = None) -> Masks:
        """Masks of every class in every picture.

        `trace` is filled with the steps of the last class and picture: those of the host's first pass by its own names,
        those of GSM, `host_mask` and `final_mask` bool (S, S) on the canvas, the host's second pass with ``second_``
        before its names, and `skipped`, a list of what GSM could not do and why.
        """
        check_query(features, states, self.fingerprint)
        masks = Masks(list(states), [], [])
        for query, where in zip(self.host.queries(features, trace), features.placements, strict=True):
            answers = {name: self._answer(query, state, trace) for name, state in states.items()}
            masks.logits.append({name: unfit(answer.logits, where) for name, answer in answers.items()})
            masks.prior.append({name: answer.prior for name, answer in answers.items()})
        return masks

    def _answer(self, query: Query, state: ClassState, trace: Trace | None) -> Answer:
        affinity = self.host.affinity(query, state, trace)
        answer = self.host.first(query, state, affinity, trace)
        boosted = boost(affinity, answer.logits > 0, self.options, trace)
        steps: Trace | None = None if trace is None else {}
        final = self.host.second(query, state, boosted, steps) if boosted.changed else answer
        if trace is not None:
            trace |= {f"second_{name}": value for name, value in (steps or {}).items()}
            trace |= {"host_mask": answer.logits > 0, "final_mask": final.logits > 0, "skipped": boosted.skipped}
        return final
