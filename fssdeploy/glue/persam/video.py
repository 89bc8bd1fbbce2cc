"""PerSAM in videos: objects marked in the first frame, found in every later one by what they look like and where they
were.

Source: Zhang et al., "Personalize Segment Anything Model with One Shot" (2023), section 4.3, and the released video
script, which is training-free but not PerSAM's picture script: it has neither guidance nor negative points. Its three
masks of the first call are PerSAM-F's, and so are the stages: a system of variant "persam_f".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.glue.persam.system import DECODER, PerSam, Trace
from fssdeploy.glue.persam.target import target_of_mean_and_peak, unit
from fssdeploy.glue.sam import FOREGROUND
from fssdeploy.glue.sam_frame import tight_box, to_picture
from fssdeploy.images.masks import Mask
from fssdeploy.protocol import Features


@dataclass(frozen=True)
class VideoOptions:
    """`topk` most similar pixels are points; the box of the frame before grows by `margin` pixels on every side.

    `mask_value` is the grey value of the masks of the first frame, as `PerSamOptions.mask_value` for pictures.
    """

    topk: int = 2
    margin: int = 10
    mask_value: int = 215

    def __post_init__(self) -> None:
        if self.topk < 1 or self.margin < 0 or not 124 <= self.mask_value <= 255:
            raise InputError(
                "option_unknown",
                f"a video cannot be tracked with {self}",
                "",
                "Use a topk of at least 1, a margin of at least 0 and a mask_value of 124 to 255.",
            )


class VideoTracker:
    """Follows the objects of a first frame through the frames that come after it, one at a time.

    `compat` of the system decides two things (table in `fssdeploy.glue.persam.options.PerSamOptions`): by which area
    the first mask is chosen, and what becomes of an object that vanishes.
    """

    def __init__(
        self,
        system: PerSam,
        frame: np.ndarray,
        masks: Sequence[Mask | np.ndarray],
        options: VideoOptions | None = None,
        trace: dict[str, Any] | None = None,
    ) -> None:
        """First frame uint8 RGB (height, width, 3) and the mask of each object in it, at its size.

        `trace`, where given, receives `objects`, for each a dict of what is computed on the way. InputErrors of
        `PerSam.encode` and `PerSam.enroll`; `objects` for none or more than 255, `variant` for one that is not
        "persam_f".
        """
        if system.options.variant != "persam_f":
            raise InputError(
                "variant", "videos need PerSAM-F's stages", "this system is PerSAM", "Export variant persam_f."
            )
        if not 1 <= len(masks) <= 255:
            raise InputError("objects", f"{len(masks)} objects cannot be followed", "", "Mark 1 to 255.")
        self._system = system
        self._options = options or VideoOptions()
        self._original = system.options.compat == "original"
        features = system.encode([frame])
        self._size = features.placements[0].height, features.placements[0].width
        targets, self._boxes = [], []
        steps: list[Trace] = []
        for each in masks:
            mask, shares = system.fit_masks(features, [each])[0]
            steps.append({})
            vectors = system.object_features(features, mask, shares, self._options.mask_value, steps[-1])
            targets.append(unit(target_of_mean_and_peak(vectors), 0))
            steps[-1]["feature"] = targets[-1]
            self._boxes.append(_box_of(mask.object))
        self._targets = np.stack(targets)
        if trace is not None:
            trace["objects"] = steps

    def track(self, frame: np.ndarray, trace: dict[str, Any] | None = None) -> np.ndarray:
        """The next frame, uint8 RGB of the first one's size, to labels uint8 (height, width).

        0 is nothing, i + 1 object i; of several objects the larger logit wins, of equal ones the first. `trace`, where
        given, receives what is computed on the way, each array with a leading axis of objects. InputError for a frame
        of another size.
        """
        features = self._system.encode([frame])
        where = features.placements[0]
        if (where.height, where.width) != self._size:
            raise InputError(
                "frame_size",
                f"a frame is {where.height} x {where.width} pixels (height x width)",
                f"the first was {self._size[0]} x {self._size[1]}",
                "Give frames of one video.",
            )
        if not self._boxes:
            return np.zeros(self._size, np.uint8)
        # In the release an object that vanished takes the box of the last one with it, so fewer are looked for.
        targets = self._targets = self._targets[: len(self._boxes)]
        logits = self._logits(features, targets, np.stack(self._boxes), {} if trace is None else trace)
        best = logits.argmax(0)
        labels = np.where(logits.max(0) > 0, best + 1, 0).astype(np.uint8)
        self._remember(labels)
        return labels

    def _logits(self, features: Features, targets: np.ndarray, boxes: np.ndarray, trace: Trace) -> np.ndarray:
        """Logits (n, height, width) of the objects with these targets (n, C) and boxes (n, 4) of the frame before."""
        system, options = self._system, self._options
        where, embedding = features.placements[0], features.tensors["embedding"]
        wide = widened(boxes, options.margin, self._size)
        centres = (wide[:, None, :2] + wide[:, None, 2:]) // 2
        points = np.concatenate([system.locate(features, targets).best(options.topk), centres], 1)
        labels = np.full(points.shape[:2], FOREGROUND, np.int64)
        low, scores = system.decode(DECODER, embedding, *system.prompts(DECODER, where, points, labels, list(wide)))
        areas = np.stack([(to_picture(masks, where) > 0).sum((1, 2)) for masks in low])
        choice = (areas % 256 if self._original else areas).argmax(1)
        trace |= {"wide_box": wide, "points": points, "step1_scores": scores}
        trace |= {"step1_areas": areas, "step1_choice": choice}
        mask = low[np.arange(len(low)), choice]
        nothing: list[np.ndarray | None] = [None] * len(mask)
        mask = system.refine(features, points, labels, nothing, mask, trace, "step2")
        mask = system.refine(features, points, labels, system.boxes(mask, where), mask, trace, "step3")
        trace["logits"] = to_picture(mask, where)
        return trace["logits"]

    def _remember(self, labels: np.ndarray) -> None:
        """Boxes for the next frame from what was found in this one."""
        found = [tight_box(labels == number) for number in range(1, len(self._boxes) + 1)]
        if self._original:
            self._boxes = [box for box in found if box is not None]
        else:
            self._boxes = [old if new is None else new for old, new in zip(self._boxes, found, strict=True)]


def widened(boxes: np.ndarray, margin: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes int64 (n, 4) with `margin` pixels more on every side, within 0 to width and 0 to height, both included."""
    height, width = size
    grown = boxes + np.array([-margin, -margin, margin, margin])
    return grown.clip(0, np.array([width, height, width, height]))


def _box_of(mask: np.ndarray) -> np.ndarray:
    box = tight_box(mask)
    assert box is not None, "masks were checked to mark something"
    return box
