"""Candidate masks: prompts decoded a few at a time, measured on the canvas, filtered, and thinned by their boxes.

Source: Kirillov et al., "Segment Anything" (2023), appendix B (automatic mask generation), as the release of Matcher
changed it. A mask stays at the decoder's resolution; what later steps ask of it is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from fssdeploy.glue.sam import decode
from fssdeploy.glue.sam_frame import to_picture
from fssdeploy.images.geometry import Placement
from fssdeploy.protocol import Engine

# Prompts decoded, and masks measured, at a time: bounds the memory.
DECODED, MEASURED = 64, 16
STABILITY_OFFSET = 1.0


@dataclass(frozen=True)
class Candidates:
    """n masks. `number` says where each stands among all that the prompts gave, masks of one prompt adjacent.

    logits float32 (n, 4g, 4g); predicted `iou`, `stability` float32 (n,), NaN where the mask is empty; `boxes` int64
    (n, 4), x0, y0, x1, y1 of the outermost canvas pixels, zeros where empty; of N patches, row by row, bool (n, N):
    `touched` by the mask (all of them where it is empty) and `centred`, their centre pixel lies in it.
    """

    number: np.ndarray
    logits: np.ndarray
    iou: np.ndarray
    stability: np.ndarray
    boxes: np.ndarray
    touched: np.ndarray
    centred: np.ndarray

    def __len__(self) -> int:
        return len(self.number)

    def take(self, rows: np.ndarray) -> Candidates:
        """Some of them, in the order of `rows`, or those where a bool array is true."""
        return Candidates(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


@dataclass(frozen=True)
class Prompts:
    """n prompts of one kind, and what their masks must reach.

    points float32 (n, p, 2) in pixels of SAM's square, labels int64 (n, p) as in `fssdeploy.glue.sam`; `stage` decodes
    them, `layers` are the masks of each prompt that count. Predicted IoU must exceed `min_iou`, stability must reach
    `min_stability`; 0 filters nothing.
    """

    points: np.ndarray
    labels: np.ndarray
    stage: str
    layers: slice
    min_iou: float
    min_stability: float


@dataclass(frozen=True)
class Tried:
    """Predicted IoU and stability (n, masks) of all masks of n prompts, and those that passed; NaN: not measured."""

    iou: np.ndarray
    stability: np.ndarray
    passed: Candidates


def join(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of several parts, in their order."""
    return Candidates(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Candidates)))


def join_tried(parts: Sequence[Tried]) -> Candidates:
    """What passed of several kinds of prompts, numbered through."""
    first = np.cumsum([0, *(part.iou.size for part in parts)])
    return join(
        [replace(part.passed, number=part.passed.number + offset) for part, offset in zip(parts, first, strict=False)]
    )


def any_pixel(masks: np.ndarray, patch: int) -> np.ndarray:
    """Which patches have at least one pixel of a mask: bool (n, H, W) -> (n, N)."""
    count, height, width = masks.shape
    rows, columns = height // patch, width // patch
    bands = masks.view(np.uint8).reshape(count, rows, patch, width).max(2)
    return bands.reshape(count, rows, columns, patch).max(3).reshape(count, rows * columns).astype(bool)


def touched_patches(masks: np.ndarray, patch: int) -> np.ndarray:
    """`any_pixel`, but an empty mask touches every patch: it is compared with the whole picture, as in the release."""
    bits = any_pixel(masks, patch)
    return bits | ~bits.any(1, keepdims=True)


def centre_pixels(masks: np.ndarray, patch: int) -> np.ndarray:
    """Whether the centre pixel of each patch lies in a mask: bool (n, H, W) -> (n, N)."""
    centres = masks[:, patch // 2 :: patch, patch // 2 :: patch]
    return centres.reshape(len(masks), centres.shape[1] * centres.shape[2])


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """int64 (n, 4), x0, y0, x1, y1 of the outermost pixels of masks bool (n, H, W); zeros where a mask is empty."""
    corners = np.zeros((2, len(masks), 2), np.int64)
    for axis in (0, 1):  # x, y
        filled = np.asarray(masks.any(1 + axis))
        corners[0, :, axis] = filled.argmax(1)
        corners[1, :, axis] = (filled.shape[1] - 1 - filled[:, ::-1].argmax(1)) * filled.max(1)
    return np.concatenate(list(corners), 1)


def stability_of(frames: np.ndarray) -> np.ndarray:
    """Pixels above +1 per pixel above -1 of logits (n, H, W), float32 (n,); NaN where there are none."""
    above = np.count_nonzero(frames > STABILITY_OFFSET, axis=(1, 2)).astype(np.float32)
    reach = np.count_nonzero(frames > -STABILITY_OFFSET, axis=(1, 2)).astype(np.float32)
    return np.divide(above, reach, out=np.full_like(above, np.nan), where=reach > 0)


def find_candidates(
    engine: Engine,
    embedding: np.ndarray,
    prompts: Prompts,
    frame: Placement,
    patch: int,
    *,
    measure_all: bool = False,
) -> Tried:
    """Decode prompts on the embedding (1, out, g, g) of one picture; keep the masks that pass both their filters.

    `frame` lays the canvas on SAM's square, `patch` is the side of a patch in pixels of the canvas. Masks are enlarged
    to the canvas only once they have passed the filter on predicted IoU; `measure_all` enlarges the others as well, for
    a trace.
    """
    low, stable, found = [], [], []
    for start in range(0, len(prompts.labels), DECODED):
        rows = slice(start, start + DECODED)
        logits, iou = decode(
            engine, embedding, prompts.points[rows], prompts.labels[rows], stage=prompts.stage, chunk=DECODED
        )
        logits, iou = logits[:, prompts.layers], iou[:, prompts.layers]
        number = start * iou.shape[1] + np.arange(iou.size)
        passes = (iou > prompts.min_iou if prompts.min_iou > 0 else np.ones_like(iou, bool)).ravel()
        measured = np.ones_like(passes) if measure_all else passes
        masks = _measure(
            logits.reshape(-1, *logits.shape[2:])[measured], iou.ravel()[measured], number[measured], frame, patch
        )
        stability = np.full(iou.size, np.nan, np.float32)
        stability[measured] = masks.stability
        keep = passes[measured]
        if prompts.min_stability > 0:
            keep = keep & (masks.stability >= prompts.min_stability)
        low.append(iou)
        stable.append(stability.reshape(iou.shape))
        found.append(masks.take(keep))
    return Tried(np.concatenate(low), np.concatenate(stable), join(found))


def thin_by_boxes(boxes: np.ndarray, iou: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression: the rows that stay, by descending predicted IoU, equal ones in their order.

    boxes (n, 4), iou (n,). A box falls if its overlap with a better one that stays exceeds `threshold`; boxes without
    an area overlap with nothing. Sides are the differences of pixel numbers, as in the release.
    """
    order = np.argsort(-iou, kind="stable")
    if threshold >= 1:  # no overlap exceeds 1
        return order
    x0, y0, x1, y1 = boxes[order].astype(np.float32).T
    area = (x1 - x0) * (y1 - y0)
    across = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
    down = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    shared = across.clip(0) * down.clip(0)
    union = area[:, None] + area - shared
    overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    rivals = np.tril(overlap > threshold, -1)  # row i: the better ones that could fell i
    stays = np.ones(len(order), bool)
    while True:  # settles the boxes from the best one down, at least one more in each round, mostly far more
        settled = ~(rivals & stays).any(1)
        if np.array_equal(settled, stays):
            return order[stays]
        stays = settled


def _measure(logits: np.ndarray, iou: np.ndarray, number: np.ndarray, frame: Placement, patch: int) -> Candidates:
    """Enlarge masks (n, 4g, 4g) to the canvas a few at a time and keep what is measured there."""
    parts = []
    for start in range(0, max(len(iou), 1), MEASURED):
        rows = slice(start, start + MEASURED)
        on_canvas = to_picture(logits[rows], frame)
        masks = on_canvas > 0
        parts.append(
            Candidates(
                number[rows],
                logits[rows],
                iou[rows],
                stability_of(on_canvas),
                boxes_of(masks),
                touched_patches(masks, patch),
                centre_pixels(masks, patch),
            )
        )
    return join(parts)
