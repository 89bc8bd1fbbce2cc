"""Matcher as a host of GSM: the second pass begins at the assignment of patches. No torch.

Matcher has no maps of its own; those that GSM needs are mean cosines to the patches of each shot's object and
surroundings. Where the query is a reference, patches in neither part of the proxy mask take no part at all: they would
count as background on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fssdeploy.glue.affinity import cosines
from fssdeploy.glue.gfsam.maps import mean_vectors
from fssdeploy.glue.gsm.boost import Affinity, Boosted
from fssdeploy.glue.gsm.system import Answer, Trace
from fssdeploy.glue.matcher.assign import Matches, match
from fssdeploy.glue.matcher.candidates import Tried, join_tried, thin_by_boxes
from fssdeploy.glue.matcher.system import Matcher
from fssdeploy.glue.sam import EMPTY_LOGIT
from fssdeploy.glue.sam_frame import to_picture
from fssdeploy.images.masks import Mask
from fssdeploy.protocol import ClassState, Features

# Lowers the cosine of a patch with itself below any other.
OWN_PATCH = np.float32(-3)


@dataclass
class MatcherQuery:
    """One picture for both passes and all classes: with its embedding, and the masks of the dense grid."""

    picture: Features
    grid: list[Tried]

    @property
    def features(self) -> np.ndarray:
        """(N, C), rows of unit length."""
        rows: np.ndarray = self.picture.tensors["features"][0]
        return rows


class MatcherHost:
    """Shots and proxy are matched apart and their points joined; masks are compared with the shots' patches alone.

    With weights of RR the rows of a shot are multiplied by (number of references) x (its weight), whose mean is 1. A
    state of the flat k-shot rule is one reference: its rows no longer say which shot they came from.
    """

    def __init__(self, system: Matcher) -> None:
        self.system = system
        self.name = system.name
        self.fingerprint = system.fingerprint

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        return self.system.encode(pictures)

    def enroll(self, features: Features, masks: Sequence[Mask | np.ndarray], trace: Trace | None = None) -> ClassState:
        return self.system.enroll(features, masks, trace)

    def queries(self, features: Features, trace: Trace | None) -> list[MatcherQuery]:
        self.system._check_capacity()
        self.system._embed(features)
        pictures = [features[index] for index in range(len(features))]
        return [MatcherQuery(picture, self.system._grid(picture, trace)) for picture in pictures]

    def affinity(self, query: MatcherQuery, state: ClassState, trace: Trace | None) -> Affinity:
        target = query.features
        shots = state.tensors["features"].reshape(-1, *target.shape)
        inside = state.tensors["foreground"].reshape(len(shots), -1).astype(np.float32)
        prototypes = [
            mean_vectors(rows, np.stack([weight, 1 - weight])) for rows, weight in zip(shots, inside, strict=True)
        ]
        foreground, background = np.stack(prototypes, 1)
        positive, negative = np.split(cosines(self.system.engine, np.concatenate([foreground, background]), target), 2)
        return Affinity(
            picture=query.picture.tensors["canvas"][0].transpose(1, 2, 0),
            grid=(self.system.side, self.system.side),
            query=target,
            positive=positive,
            peak=positive,  # nothing here reads a largest cosine
            negative=negative,
            prototype_fg=foreground,
            prototype_bg=background,
        )

    def first(self, query: MatcherQuery, state: ClassState, affinity: Affinity, trace: Trace | None) -> Answer:
        matches = self.system.match(state, query.picture)
        return self._finish(query, matches, affinity.positive.mean(0) - affinity.negative.mean(0), trace)

    def second(self, query: MatcherQuery, state: ClassState, boosted: Boosted, trace: Trace | None) -> Answer:
        matches = self.system.match(state, query.picture, _row_weights(state, len(query.features), boosted))
        if boosted.foreground.any():
            own = match_itself(query.features, boosted.foreground, boosted.background)
            matches = replace(matches, patches=np.union1d(matches.patches, own.patches))
        return self._finish(query, matches, boosted.positive - boosted.negative, trace)

    def _finish(self, query: MatcherQuery, matches: Matches, prior: np.ndarray, trace: Trace | None) -> Answer:
        system = self.system
        tried = [system._find(query.picture, prompts, trace) for prompts in system._prompts(matches, trace)]
        found = join_tried([*query.grid, *tried])
        kept = found.take(thin_by_boxes(found.boxes, found.iou, system.options.box_nms_thresh))
        chosen = system._choose(kept, matches, trace)
        side = system.preprocessing.canvas
        empty = np.full((1, side, side), EMPTY_LOGIT, np.float32)
        logits = to_picture(kept.logits[chosen], system.frame) if len(chosen) else empty
        return Answer(logits.max(0), prior.reshape(system.side, system.side))


def match_itself(target: np.ndarray, foreground: np.ndarray, background: np.ndarray) -> Matches:
    """Match a picture (N, C) with itself: foreground patches bool (N,) as object, background ones as surroundings.

    No patch is matched with itself: with a similarity of 1, the better half of the pairs would repeat the mask that the
    foreground came from. One more channel for every patch, in which only equal ones meet, takes that away.
    """
    cells = np.flatnonzero(foreground | background)
    place = np.eye(len(target), dtype=np.float32)
    return match(np.hstack([target[cells], OWN_PATCH * place[cells]]), foreground[cells], np.hstack([target, place]))


def _row_weights(state: ClassState, cells: int, boosted: Boosted) -> np.ndarray:
    """What RR multiplies the rows of a state by, `cells` of them a shot: float32, one for each."""
    inside = state.tensors["foreground"].reshape(-1, cells)
    factor_fg, factor_bg = (
        (len(weights) * weights[: len(inside), None]).astype(np.float32)
        for weights in (boosted.weight_fg, boosted.weight_bg)
    )
    return np.where(inside, factor_fg, factor_bg).ravel()
