"""What is evaluated: anything that, shown k pictures with masks, marks the same thing in another picture."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import Features

if TYPE_CHECKING:
    from fssdeploy.glue.gsm.options import GsmOptions
    from fssdeploy.glue.gsm.system import Gsm

# A picture uint8 (H, W, 3) and its mask bool (H, W).
Support = tuple[np.ndarray, np.ndarray]

# A query and its supports are encoded once for all predictors on the same encoder, and the first picture of a video
# for all that follow. Features of the largest presets take 8 to 13 MB.
KEPT_PICTURES = 16


class Predictor(Protocol):
    """`fingerprint` changes with whatever can change a prediction; `describe` goes into reports."""

    name: str
    fingerprint: str

    def describe(self) -> dict[str, Any]: ...

    def predict(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        """Where the class called `key` is in a picture: bool (height, width) of the query.

        InputError `object_vanishes` or `mask_empty` if it cannot see the object of a support.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """A predictor whose maps of several classes can be compared; `predict` is where the score is above 0."""

    def scores(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        """float32 (height, width). Errors as `Predictor.predict`."""
        ...


class CachedEncoder:
    """`StagedSystem.encode` that remembers the pictures it saw last, and what `segment` adds to their features."""

    def __init__(self, system: StagedSystem, kept: int = KEPT_PICTURES) -> None:
        self.system = system
        self._kept = kept
        self._features: OrderedDict[bytes, Features] = OrderedDict()

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """As of the system, but always one by one: what is remembered must not depend on what it came with.

        Of one picture these are the very features that are remembered: what a system adds to them (SAM's embedding of a
        query) is there the next time.
        """
        rows = [self._encode(picture) for picture in pictures]
        if len(rows) == 1:
            return rows[0]
        # Supports that were a query before have more than the others.
        names = [name for name in rows[0].tensors if all(name in row.tensors for row in rows)]
        tensors = {name: np.concatenate([row.tensors[name] for row in rows]) for name in names}
        return Features(tensors, [row.placements[0] for row in rows], rows[0].fingerprint)

    def _encode(self, picture: np.ndarray) -> Features:
        key = hashlib.sha256(picture.tobytes()).digest() + repr(picture.shape).encode()
        if key not in self._features:
            self._features[key] = self.system.encode([picture])
            if len(self._features) > self._kept:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]


def k_shot(system: StagedSystem) -> str:
    """How several shots become one state: systems with steps of their own document it themselves."""
    if isinstance(system, StagedSystem):
        return "one class state, the mean over shots"
    return "one class state of all shots, by the rule of the system"


class StagedPredictor:
    """A system as it is deployed, or boosted: enrol the supports, segment the query, cut at logit 0.

    `fingerprint` must cover all weights; that of the system itself leaves out the segmenter's. It must cover the boost
    as well.
    """

    def __init__(self, encoder: CachedEncoder, name: str, fingerprint: str, boost: GsmOptions | None = None) -> None:
        """InputError if the system cannot be boosted."""
        self.name = name
        self.fingerprint = fingerprint
        self._encoder = encoder
        self._boost = boost
        self._system: StagedSystem | Gsm[Any] = encoder.system
        if boost:
            from fssdeploy.glue.gsm.hosts import gsm  # brings SciPy, which others do without

            self._system = gsm(encoder.system, boost)

    def describe(self) -> dict[str, Any]:
        system = self._encoder.system
        boost = {"boost": {"name": "gsm", **self._boost.to_dict()}} if self._boost else {}
        return {"k_shot": k_shot(system), **system.engine.describe(), **boost}

    def scores(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        """Mask logits."""
        state = self._system.enroll(
            self._encoder.encode([picture for picture, _ in supports]), [mask for _, mask in supports]
        )
        return self._system.segment(self._encoder.encode([query]), {key: state}).logits[0][key]

    def predict(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        return self.scores(supports, query, key) > 0
