"""PerSAM and PerSAM-F: SAM segments what looks like the object of one picture, without training or with two numbers.

Source: Zhang et al., "Personalize Segment Anything Model with One Shot" (2023), and the released code. Runs on PyTorch
stages and on exported graphs alike; never imports torch.

    enroll   mean feature of the object's cells (PerSAM-F: also how to mix SAM's three scales)
    segment  similarity map -> points; three decoder calls, each with the mask of the one before
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.glue.persam.fit import fit_mask_weights
from fssdeploy.glue.persam.options import PerSamOptions
from fssdeploy.glue.persam.target import (
    at_least_one,
    cells_of_picture,
    cover,
    mask_as_picture,
    target_of_mean,
    target_of_mean_and_peak,
    unit,
)
from fssdeploy.glue.resample import bilinear
from fssdeploy.glue.sam import ABSENT, BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from fssdeploy.glue.sam_frame import tight_box, to_canvas, to_picture
from fssdeploy.images.geometry import Placement
from fssdeploy.images.masks import Mask, mask_from_array
from fssdeploy.pipeline import Preprocessing, check_origin, check_query, mean_of_shots, run_in_chunks
from fssdeploy.protocol import ClassState, Engine, Features, Masks, StageSpec

ENCODER, GUIDED, DECODER, REFINE = "sam_encoder", "guided", "decoder", "refine"
# Prompts that one decoder call answers together, each for another class.
CHUNK = 8
# Of a cell, where masks are read by cover.
HALF = 0.5

Trace = dict[str, Any]


@dataclass
class Located:
    """Where a picture looks like n objects: cosine similarities float32, (n, g, g) and (n, height, width)."""

    cells: np.ndarray
    picture: np.ndarray

    def best(self, count: int) -> np.ndarray:
        """The `count` most similar pixels of each object, int64 (n, count, 2), (x, y); of equals the first."""
        return _largest(self.picture, count)

    def worst(self, count: int) -> np.ndarray:
        """The `count` least similar pixels of each object, as `best`."""
        return _largest(-self.picture, count)

    def at(self, points: np.ndarray) -> np.ndarray:
        """Similarities (n, p) at points (n, p, 2)."""
        return self.picture[np.arange(len(points))[:, None], points[..., 1], points[..., 0]]


class PerSam:
    """The three verbs over the stages of `fssdeploy.systems.persam`, and the steps that videos share.

    The state of a class is `target_feat` (C,) and, of PerSAM, `target_embedding` (C,), of PerSAM-F `mask_weights` (3,).
    The release knows one shot only. Of k shots each tensor is the mean over shots: the map of a mean of normalised
    features is the mean of the shots' maps, so a query costs the same for any k, and states of a class can be merged.
    """

    def __init__(
        self,
        name: str,
        specs: Mapping[str, StageSpec],
        engine: Engine,
        preprocessing: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        """`preprocessing` has canvas, patch and geometry of the pictures, and the fields of `PerSamOptions`."""
        self.name = name
        self.specs = dict(specs)
        self.engine = engine
        self.fingerprint = fingerprint
        self.options = PerSamOptions(**preprocessing["options"])
        self.preprocessing = Preprocessing(*(preprocessing[key] for key in ("canvas", "patch", "geometry")))
        self.grid = self.preprocessing.canvas // self.preprocessing.patch

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """Features of pictures, each uint8 RGB (height, width, 3) of any size: `embedding` (n, C, g, g).

        InputError for anything else.
        """
        batch, placements = self.preprocessing.fit_pictures(pictures)
        extent = np.array([(where.rows, where.cols) for where in placements], np.int32)
        outputs = run_in_chunks(self.engine, self.specs[ENCODER], {"picture": batch, "extent": extent})
        return Features(outputs, placements, self.fingerprint)

    def enroll(
        self, features: Features, masks: Sequence[Mask | np.ndarray], trace: dict[str, Any] | None = None
    ) -> ClassState:
        """The state of one class from the features of its k pictures and one mask for each, at the picture's size.

        `trace`, where given, receives `shots`, for each shot a dict of what is computed on the way. InputError for no
        shot, and for masks that are empty, of another size, or so small that no feature cell sees the object.
        """
        check_origin(features.fingerprint, self.fingerprint, "features")
        shots: list[Trace] = []
        states = []
        for index, (mask, shares) in enumerate(self.fit_masks(features, masks)):
            shots.append({})
            states.append(self._enroll_shot(features[index], mask, shares, shots[-1]))
        if trace is not None:
            trace["shots"] = shots
        tensors = mean_of_shots({name: np.stack([state[name] for state in states]) for name in states[0]})
        return ClassState(tensors, len(states), self.fingerprint)

    def segment(
        self, features: Features, states: Mapping[str, ClassState], trace: dict[str, Any] | None = None
    ) -> Masks:
        """Masks of every class in every picture; its cost does not depend on the number of shots behind a state.

        All classes of a picture share its decoder calls. A mask is returned also where the object is absent, as in the
        release; `trace["point_values"]` then holds a low similarity. `trace`, only with one picture, receives what
        `mask_logits` computes on the way, each array with a leading axis of classes.
        """
        check_query(features, states, self.fingerprint)
        if trace is not None and len(features) != 1:
            raise ValueError("a trace is of one picture")
        rows = {key: np.stack([state.tensors[key] for state in states.values()]) for key in self._state_names()}
        masks = Masks(list(states), [], [])
        for index in range(len(features)):
            picture = features[index]
            located = self.locate(picture, rows["target_feat"])
            points, labels = self.points(located)
            logits = self.mask_logits(picture, rows, located, points, labels, {} if trace is None else trace)
            masks.logits.append(dict(zip(states, logits, strict=True)))
            masks.prior.append(dict(zip(states, located.cells, strict=True)))
        return masks

    def fit_masks(self, features: Features, masks: Sequence[Mask | np.ndarray]) -> list[tuple[Mask, np.ndarray]]:
        """The masks of k > 0 pictures, and the object's share of every canvas pixel (S, S); InputErrors of `enroll`."""
        if not len(features):
            raise InputError("no_pictures", "a class needs at least one picture", "", "Give one with its mask.")
        chosen = [mask if isinstance(mask, Mask) else mask_from_array(mask) for mask in masks]
        return list(zip(chosen, self.preprocessing.fit_masks(chosen, features.placements)[:, 0], strict=True))

    def object_features(
        self, features: Features, mask: Mask, shares: np.ndarray, value: int, trace: Trace
    ) -> np.ndarray:
        """Features (n, C), n > 0, of the cells of one picture that are the object's, by the rule of `compat`.

        `shares` are those of `fit_masks`, `value` is the grey value of the mask for the original rule. The trace
        receives `ref_mask_cells` and `ref_mask_selected` (g, g), and `ref_mask_input` (S, S) of the original rule.
        """
        where = features.placements[0]
        covered = cover(shares, self.grid)
        if self.options.compat == "original":
            trace["ref_mask_input"] = mask_as_picture(mask.object, value, where)
            cells = cells_of_picture(trace["ref_mask_input"], self.grid)
            selected = cells > 0
        else:
            cells = covered
            selected = cells >= HALF
        trace["ref_mask_cells"] = cells
        trace["ref_mask_selected"] = at_least_one(selected, covered)
        return features.tensors["embedding"][0][:, trace["ref_mask_selected"]].T

    def _enroll_shot(self, features: Features, mask: Mask, shares: np.ndarray, trace: Trace) -> dict[str, np.ndarray]:
        vectors = self.object_features(features, mask, shares, self.options.mask_value, trace)
        if self.options.variant == "persam":
            target = target_of_mean(vectors)
            return {"target_feat": unit(target, 0), "target_embedding": target}
        target = unit(target_of_mean_and_peak(vectors), 0)
        located = self.locate(features, target[None])
        points, labels = self.points(located)
        where, embedding = features.placements[0], features.tensors["embedding"]
        low, _ = self.decode(DECODER, embedding, *self.prompts(DECODER, where, points, labels, [None]))
        counted = ~mask.ignore
        trace |= {"ref_sim_cells": located.cells[0], "ref_point": points[0]}
        trace["logits_high"] = to_picture(low[0], where).reshape(low.shape[1], -1)
        weights = fit_mask_weights(
            trace["logits_high"][:, counted.ravel()],
            mask.object[counted],
            self.options.steps,
            self.options.learning_rate,
            trace,
        )
        return {"target_feat": target, "mask_weights": weights}

    def locate(self, features: Features, targets: np.ndarray) -> Located:
        """Cosine similarity of one picture with normalised target features (n, C)."""
        embedding = features.tensors["embedding"][0]
        cells = np.tensordot(targets, unit(embedding, 0), 1)
        # The release enlarges the map fourfold before SAM's own post-processing.
        picture = to_picture(cells.astype(np.float64), features.placements[0], (4 * self.grid,))
        return Located(cells, picture.astype(np.float32))

    def points(self, located: Located) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, p, 2) of each object and their labels (n, p): the likest pixel and, of PerSAM, the unlikest."""
        points, labels = [located.best(1)], [FOREGROUND]
        if self.options.variant == "persam":
            points.append(located.worst(1))
            labels.append(BACKGROUND)
        return np.concatenate(points, 1), np.tile(np.array(labels, np.int64), (len(located.cells), 1))

    def attention_bias(self, located: Located, where: Placement) -> np.ndarray:
        """What guides the first decoder call to each object: float32 (n, g*g), 0..1.

        The map, standardised over the picture, through a sigmoid; how it comes to lie on the grid depends on `compat`.
        """
        maps = located.picture
        mean = maps.mean((1, 2), dtype=np.float64, keepdims=True)
        deviation = maps.std((1, 2), dtype=np.float64, keepdims=True, ddof=min(1, maps[0].size - 1))
        deviation[np.ptp(maps, axis=(1, 2)) == 0] = np.inf  # rounding gives a constant map a deviation above 0
        if self.options.compat == "original":
            return _sigmoid(bilinear((maps - mean) / deviation, self.grid, self.grid)).reshape(len(maps), -1)
        bias = _sigmoid((located.cells - mean) / deviation)
        patch = self.preprocessing.patch
        bias[:, -(-where.rows // patch) :] = 0
        bias[:, :, -(-where.cols // patch) :] = 0
        return bias.reshape(len(maps), -1)

    def mask_logits(
        self,
        features: Features,
        rows: Mapping[str, np.ndarray],
        located: Located,
        points: np.ndarray,
        labels: np.ndarray,
        trace: Trace,
    ) -> np.ndarray:
        """Logits float32 (n, height, width) of n objects in one picture from points (n, p, 2) and labels (n, p).

        `rows` are the states' tensors, each (n, ...). The trace receives what the three calls return by name:
        `step1_low_logits` (n, M, 4g, 4g) and so on.
        """
        where, embedding = features.placements[0], features.tensors["embedding"]
        nothing: list[np.ndarray | None] = [None] * len(points)
        trace |= {"query_features": embedding, "sim_cells": located.cells, "sim_picture": located.picture}
        trace |= {"points": points, "point_values": located.at(points)}
        if self.options.variant == "persam":
            trace["attention_bias"] = self.attention_bias(located, where)
            low, scores = self.decode(
                GUIDED,
                embedding,
                *self.prompts(GUIDED, where, points, labels, nothing),
                attention_bias=trace["attention_bias"],
                target_embedding=rows["target_embedding"],
            )
            trace |= {"step1_low_logits": low, "step1_scores": scores}
            mask, boxes = low[:, 0], nothing
        else:
            low, scores = self.decode(DECODER, embedding, *self.prompts(DECODER, where, points, labels, nothing))
            trace |= {"step1_low_logits": low, "step1_scores": scores}
            mask = np.einsum("nm,nmhw->nhw", rows["mask_weights"], low)
            trace["mixed_low_logits"] = mask
            boxes = self.boxes(mask, where)
        mask = self.refine(features, points, labels, boxes, mask, trace, "step2")
        mask = self.refine(features, points, labels, self.boxes(mask, where), mask, trace, "step3")
        return to_picture(mask, where)

    def boxes(self, low: np.ndarray, where: Placement) -> list[np.ndarray | None]:
        """The box of each mask with logits (n, 4g, 4g) at the size of the picture; None of an empty mask."""
        return [tight_box(logits > 0) for logits in to_picture(low, where)]

    def refine(
        self,
        features: Features,
        points: np.ndarray,
        labels: np.ndarray,
        boxes: Sequence[np.ndarray | None],
        low: np.ndarray,
        trace: Trace,
        step: str,
    ) -> np.ndarray:
        """The best by predicted IoU of three masks from points, boxes and masks before: logits (n, 4g, 4g) to the same.

        The trace receives `<step>_box` (n, 4), -1 where there is none, `_low_logits`, `_scores` and `_best` (n,).
        """
        prompts = self.prompts(REFINE, features.placements[0], points, labels, boxes)
        logits, scores = self.decode(REFINE, features.tensors["embedding"], *prompts, mask_prompt=low[:, None])
        best = scores.argmax(1)
        trace[f"{step}_box"] = np.array([np.full(4, -1) if box is None else box for box in boxes])
        trace |= {f"{step}_low_logits": logits, f"{step}_scores": scores, f"{step}_best": best}
        return logits[np.arange(len(best)), best]

    def prompts(
        self,
        stage: str,
        where: Placement,
        points: np.ndarray,
        labels: np.ndarray,
        boxes: Sequence[np.ndarray | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, P, 2) on SAM's square and labels (n, P) that fill the stage, from those in the picture and boxes.

        InputError if the stage has no room for them.
        """
        count = points.shape[1]
        spec = next(tensor for tensor in self.specs[stage].inputs if tensor.name == "labels")
        capacity = int(spec.shape[1])
        if count + 2 > capacity:
            raise InputError(
                "too_many_points",
                f"a prompt of {count} points and a box does not fit stage '{stage}'",
                f"it takes {capacity}, of which a box takes 2",
                "Export with a larger capacity.",
            )
        placed = np.zeros((len(points), capacity, 2), np.float32)
        kinds = np.full((len(points), capacity), ABSENT, spec.dtype)
        placed[:, :count], kinds[:, :count] = to_canvas(points, where), labels
        kinds[:, count] = PADDING
        for row, box in enumerate(boxes):
            if box is not None:
                placed[row, count : count + 2] = to_canvas(box.reshape(2, 2), where)
                kinds[row, count : count + 2] = TOP_LEFT, BOTTOM_RIGHT
        return placed, kinds

    def decode(
        self, stage: str, embedding: np.ndarray, points: np.ndarray, labels: np.ndarray, **others: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask logits (n, M, 4g, 4g) and predicted IoU (n, M) of n prompts; `others` are the stage's further inputs."""
        inputs = {"points": points, "labels": labels, **others}
        parts = []
        for start in range(0, len(points), CHUNK):
            rows = {name: array[start : start + CHUNK] for name, array in inputs.items()}
            parts.append(self.engine.run(stage, {**rows, "embedding": embedding}))
        logits, scores = (np.concatenate([part[name] for part in parts]) for name in ("mask_logits", "iou"))
        return logits, scores

    def _state_names(self) -> tuple[str, str]:
        return "target_feat", "target_embedding" if self.options.variant == "persam" else "mask_weights"


def _largest(maps: np.ndarray, count: int) -> np.ndarray:
    """Places int64 (n, count, 2), (x, y), of the largest values of maps (n, h, w), falling; of equals the first."""
    values = maps.reshape(len(maps), -1)
    order = [values.argmax(1)]
    if count > 1:
        values = values.copy()
    for _ in range(count - 1):
        values[np.arange(len(maps)), order[-1]] = -np.inf
        order.append(values.argmax(1))
    index = np.stack(order, 1)
    return np.stack([index % maps.shape[2], index // maps.shape[2]], -1)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-values))).astype(np.float32)
