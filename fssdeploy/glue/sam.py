"""Asking SAM's mask decoder, a stage with room for a fixed number of points, about any number of prompts.

A prompt is a set of points in pixels of SAM's square picture, each with a label. A box is two points, its corners.
"""

from __future__ import annotations

import numpy as np

from fssdeploy.protocol import Engine

# Labels of points. TOP_LEFT and BOTTOM_RIGHT are the corners of a box. PADDING is a token of its own that SAM learned:
# every prompt without a box ends with one. ABSENT fills the room of the stage; such a point takes no part at all.
LABELS = ABSENT, PADDING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -2, -1, 0, 1, 2, 3

# Stands everywhere in the logits of a picture in which nothing was found.
EMPTY_LOGIT = -32.0


def with_padding_point(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, p, 2) and labels (n, p) with the point that SAM expects at the end of prompts without a box."""
    return (
        np.pad(np.asarray(points, np.float32), ((0, 0), (0, 1), (0, 0))),
        np.pad(np.asarray(labels, np.int32), ((0, 0), (0, 1)), constant_values=PADDING),
    )


def decode(
    engine: Engine,
    embedding: np.ndarray,
    points: np.ndarray,
    labels: np.ndarray,
    stage: str = "decoder",
    chunk: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits float32 (n, M, 4g, 4g) and predicted IoU (n, M) of n prompts on one picture, `chunk` at a time.

    embedding (1, out, g, g); points (n, p, 2), (x, y) in pixels; labels (n, p). The decoder does not depend on `chunk`
    but for rounding. ValueError for more points in a prompt than the stage has room for.
    """
    spec = engine.specs[stage]
    capacity = next(int(tensor.shape[1]) for tensor in spec.inputs if tensor.name == "points")
    room = capacity - labels.shape[1]
    if room < 0:
        raise ValueError(f"a prompt of {labels.shape[1]} points does not fit stage '{stage}', which takes {capacity}")
    points = np.pad(np.asarray(points, np.float32), ((0, 0), (0, room), (0, 0)))
    labels = np.pad(np.asarray(labels, np.int32), ((0, 0), (0, room)), constant_values=ABSENT)
    logits, iou = (np.empty((len(labels), *map(int, tensor.shape[1:])), np.float32) for tensor in spec.outputs)
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        found = engine.run(stage, {"points": points[rows], "labels": labels[rows], "embedding": embedding})
        logits[rows], iou[rows] = found["mask_logits"], found["iou"]
    return logits, iou
