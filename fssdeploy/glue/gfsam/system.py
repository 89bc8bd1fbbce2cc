"""GF-SAM: points where the object may be, a SAM mask for each, and a graph that says which masks to keep.

Source: Zhang et al., "Bridge the Points: Graph-based Few-shot Segment Anything Semantically" (2024). No training and no
threshold that depends on the data. The steps between the stages, in NumPy; the stages are in
``fssdeploy/systems/gfsam.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fssdeploy.glue.affinity import cosines
from fssdeploy.glue.gfsam.gates import (
    REJECTED,
    SELECTED,
    WAITING,
    Grid,
    cluster,
    gate_maps,
    overshoot_gate,
    positive_gate,
)
from fssdeploy.glue.gfsam.maps import PriorMaps, chosen_cells, prior_maps, prompt_map, reference, unit
from fssdeploy.glue.resample import bilinear, nearest
from fssdeploy.glue.sam import EMPTY_LOGIT, FOREGROUND, decode, with_padding_point
from fssdeploy.glue.sam_frame import to_picture
from fssdeploy.images.geometry import fit_mask, place, unfit
from fssdeploy.images.masks import Mask
from fssdeploy.pipeline import Preprocessing, check_coverage, check_origin, check_query, objects_of, run_in_chunks
from fssdeploy.protocol import CONCATENATE, MERGE, ClassState, Engine, Features, Masks, StageSpec

# Half the side of the square that the released code puts in place of empty masks, in pixels of the canvas.
CENTRE = 7
# Prompts for the decoder at a time: what it makes of one is large.
CHUNK = 16


@dataclass
class Query:
    """One picture as all classes and passes see it: nothing in it is computed twice.

    `features` (N, c) and the same as unit vectors; `masks` holds SAM's logits (4g, 4g) for every cell asked about.
    """

    features: np.ndarray
    picture: Features
    masks: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.units = unit(self.features)


class GFSam:
    """The three verbs, and the two halves of `segment`, `maps` and `finish`, for a booster to step in between.

    `preprocessing` has the canvas (SAM's picture), `compat`, and `max_points`. With ``compat="original"`` everything
    is as in the released code, which published numbers depend on; "corrected" differs in this:

    ====================================  ==========================================  ================================
    where                                 original                                    corrected
    ====================================  ==========================================  ================================
    mask to cells                         bilinear over few rows and columns: can     share of the object in each cell
                                          miss objects under 28 of 1024 pixels
    object too small for any cell         empty result                                InputError ``object_vanishes``
    all masks empty                       a square of 14 pixels in the middle         InputError ``mask_empty``
    one mask of several empty             its zero maps count                         InputError ``mask_empty``
    score of a component                  what its last mask added                    what its union has
    no point selected                     best waiting one if its score is above 0,   best waiting one, else an empty
                                          else the first point not waiting            mask
    ====================================  ==========================================  ================================

    Without any point (the prompt map is zero) both give an empty mask. A picture and its mask may serve as their own
    support. States list their shots, so they grow with k: one row of features for each cell of the object.
    """

    def __init__(
        self,
        name: str,
        specs: Mapping[str, StageSpec],
        engine: Engine,
        preprocessing: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.name = name
        self.specs = dict(specs)
        self.engine = engine
        self.fingerprint = fingerprint
        self.preprocessing = Preprocessing(*(preprocessing[key] for key in ("canvas", "patch", "geometry")))
        self.original = preprocessing["compat"] == "original"
        self.max_points = int(preprocessing["max_points"])
        self.cells = math.isqrt(int(self.specs["encoder"].outputs[0].shape[1]))
        self.grid = Grid.of(self.preprocessing.canvas, self.cells)

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """Features of pictures, each uint8 RGB (height, width, 3) of any size. InputError for anything else.

        The pictures themselves stay in it: SAM encodes a query when `segment` first needs it.
        """
        canvas, placements = self.preprocessing.fit_pictures(pictures)
        found = run_in_chunks(self.engine, self.specs["encoder"], {"picture": canvas})
        return Features({**found, "canvas": canvas}, placements, self.fingerprint)

    def enroll(
        self, features: Features, masks: Sequence[Mask | np.ndarray], trace: dict[str, np.ndarray] | None = None
    ) -> ClassState:
        """The state of one class from the features of its k pictures and one mask for each, at the picture's size.

        Its tensors are those of `fssdeploy.glue.gfsam.maps.reference`, shot after shot. InputError if a mask is of
        another size, empty or too small (the last two not in the original).
        """
        check_origin(features.fingerprint, self.fingerprint, "features")
        objects = objects_of(masks, features.placements, allow_empty=self.original)
        weights = self._weights(objects, {} if trace is None else trace)
        if trace is not None:
            trace["grid_mask_support"] = weights
        shots = [
            reference(row, weight, 1 - weight)
            for row, weight in zip(features.tensors["features"], weights.reshape(len(weights), -1), strict=True)
        ]
        tensors = {name: np.concatenate([shot[name] for shot in shots]) for name in shots[0]}
        return ClassState(tensors, len(shots), self.fingerprint, {MERGE: CONCATENATE})

    def segment(
        self, features: Features, states: Mapping[str, ClassState], trace: dict[str, np.ndarray] | None = None
    ) -> Masks:
        """Masks of every class in every picture. `trace` is filled with the steps of the last class and picture."""
        check_query(features, states, self.fingerprint)
        masks = Masks(list(states), [], [])
        for query, where in zip(self.queries(features), features.placements, strict=True):
            logits, priors = {}, {}
            for name, state in states.items():
                maps = self.maps(query, state, trace)
                logits[name] = unfit(self.finish(query, maps.mean(), trace), where)
                priors[name] = prompt_map(maps.mean()).reshape(self.cells, self.cells)
            masks.logits.append(logits)
            masks.prior.append(priors)
        return masks

    def queries(self, features: Features) -> list[Query]:
        """What `maps` and `finish` need of each picture. One picture alone is embedded only if it gets any point."""
        if len(features) > 1:
            self._embed(features)
            return [self.query(features[index]) for index in range(len(features))]
        return [self.query(features)]

    def query(self, picture: Features) -> Query:
        """What `maps` and `finish` need of one picture."""
        return Query(picture.tensors["features"][0], picture)

    def maps(self, query: Query, state: ClassState, trace: dict[str, np.ndarray] | None = None) -> PriorMaps:
        """The maps of each reference of a class; `PriorMaps.mean` of them, or of more, is what `finish` takes."""
        maps = prior_maps(lambda rows: cosines(self.engine, rows, query.features), state.tensors)
        if trace is not None:
            trace["features_query"] = query.features
            names = {"pos_mean": maps.positive, "pos_max": maps.peak, "neg_mean": maps.negative}
            trace.update({f"{name}_per_shot": values for name, values in names.items()})
        return maps

    def finish(self, query: Query, maps: PriorMaps, trace: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Logits float32 (S, S) on the canvas from merged maps (N,): the largest of those of all masks kept.

        `trace` is filled with every step by name; it ends where the result was decided.
        """
        trace = {} if trace is None else trace
        prompts = prompt_map(maps)
        cells = chosen_cells(prompts, self.cells, self.max_points)
        places = np.stack([cells % self.cells, cells // self.cells], 1)
        points = places * self.preprocessing.canvas // self.cells
        trace |= {"pos_mean": maps.positive, "pos_max": maps.peak, "neg_mean": maps.negative, "prompt_map": prompts}
        trace |= {"points_cell": places, "points_xy": points}
        if not cells.size:
            return self._union(np.zeros((0, 1, 1), np.float32))
        logits = self._decode(query, cells, points)
        trace["sam_image_embedding"] = query.picture.tensors["embedding"]
        labels, score = self._judge(query, maps, cells, logits, trace)
        chosen = np.flatnonzero(labels == SELECTED)
        found = self._union(logits[chosen])
        if not (found > 0).any():
            chosen = self._fallback(labels, score)
            found = self._union(logits[chosen])
        trace["chosen"] = chosen
        return found

    def _judge(
        self, query: Query, maps: PriorMaps, cells: np.ndarray, logits: np.ndarray, trace: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Label of each of P points and the score of its component, (P,) each: clusters and both gates."""
        bits = self.grid.binarise(logits, self.preprocessing.canvas)
        covered = self.grid.covered(bits, cells)
        clusters = cluster(covered)
        shares = self.grid.soften(bits)
        union = self.grid.soften(clusters.reduce(np.logical_or, bits))
        kept, score = positive_gate(shares, clusters, union, maps, last_score=self.original)
        consistent = overshoot_gate(query.units, cells, self.cells, clusters, union)
        labels = np.where(kept & consistent, SELECTED, np.where(kept ^ consistent, WAITING, REJECTED))
        trace |= {"low_res_logits": logits, "coverage": covered, "weak_labels": clusters.label}
        trace |= dict(zip(("gate_pos", "gate_neg"), gate_maps(maps), strict=True))
        trace |= {"positive_labels": kept, "cluster_scores": score, "cluster_masks": union, "point_labels": labels}
        return labels, score

    def _fallback(self, labels: np.ndarray, score: np.ndarray) -> np.ndarray:
        """The one mask, if any, that stands in where the selected ones cover nothing: indices, (0,) or (1,)."""
        waiting = labels == WAITING
        if not self.original:
            return np.flatnonzero(waiting)[[score[waiting].argmax()]] if waiting.any() else np.zeros(0, np.int64)
        return np.array([np.where(waiting, score, 0).argmax()])

    def _union(self, logits: np.ndarray) -> np.ndarray:
        """Logits (m, 4g, 4g) of masks, m may be 0, to those of their union on the canvas, (S, S)."""
        side = self.preprocessing.canvas
        canvas = place(side, side, side, "squash")
        union = np.full((side, side), EMPTY_LOGIT, np.float32)
        for mask in logits:  # one at a time: each is large
            np.maximum(union, to_picture(mask, canvas), out=union)
        return union

    def _decode(self, query: Query, cells: np.ndarray, points: np.ndarray) -> np.ndarray:
        """SAM's masks (P, 4g, 4g) of points (P, 2), one in each of the cells; only new cells are asked about."""
        new = [row for row, cell in enumerate(cells) if int(cell) not in query.masks]
        if new:
            self._embed(query.picture)
            prompts = with_padding_point(points[new][:, None], np.full((len(new), 1), FOREGROUND))
            logits, _ = decode(self.engine, query.picture.tensors["embedding"], *prompts, chunk=CHUNK)
            query.masks.update(zip(cells[new].tolist(), logits[:, 0], strict=True))
        return np.stack([query.masks[int(cell)] for cell in cells])

    def _embed(self, features: Features) -> None:
        """SAM's embedding of every picture, into the features, so that other classes and calls find it there."""
        if "embedding" not in features.tensors:
            found = run_in_chunks(self.engine, self.specs["sam_encoder"], {"picture": features.tensors["canvas"]}, 1)
            features.tensors["embedding"] = found["embedding"]

    def _weights(self, objects: Sequence[np.ndarray], trace: dict[str, np.ndarray]) -> np.ndarray:
        """Weight of every cell of every shot, float32 (k, cells, cells), 0 to 1."""
        if not self.original:
            places = [place(found.shape[0], found.shape[1], self.cells, "squash") for found in objects]
            weights = np.stack([fit_mask(found, where) for found, where in zip(objects, places, strict=True)])
            for number, weight in enumerate(weights, 1):
                check_coverage(float(weight.max()), number)
            return weights
        side = self.preprocessing.canvas
        masks = np.stack([nearest(found, side, side) for found in objects])
        if not masks.any():
            masks[:, side // 2 - CENTRE : side // 2 + CENTRE, side // 2 - CENTRE : side // 2 + CENTRE] = True
        trace["support_masks"] = masks
        return bilinear(masks, self.cells, self.cells, align_corners=True)
