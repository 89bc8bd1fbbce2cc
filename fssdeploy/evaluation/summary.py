"""The numbers of a list, from what came of its episodes; and their mean over folds. All in percent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.evaluation.evaluate import Outcome, Record
from fssdeploy.evaluation.metrics import (
    class_ious,
    foreground_background_iou,
    interval,
    mean_iou,
    resampled_mean_ious,
)


@dataclass(frozen=True)
class VideoScore:
    """Region `j`, boundary `f` and their mean, as means over objects."""

    j: float
    f: float

    @property
    def both(self) -> float:
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class Summary:
    """One predictor on one list, or the mean over the lists of several folds.

    `per_class` holds IoU and number of episodes of every class that has some; `resampled` the mIoUs of bootstrap lists;
    `blind` counts episodes in which the predictor could not see the object of a support.
    """

    miou: float
    fb_iou: float
    per_class: dict[int, tuple[float, int]]
    resampled: np.ndarray
    episodes: int
    blind: int
    video: VideoScore | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mIoUs of lists like this one."""
        return interval(self.resampled)

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        per_class = {
            class_names[index]: {"iou": iou, "episodes": count} for index, (iou, count) in self.per_class.items()
        }
        video = {"j": self.video.j, "f": self.video.f, "j_and_f": self.video.both} if self.video else {}
        return {
            "miou": self.miou,
            "fb_iou": self.fb_iou,
            "interval": list(self.interval),
            **video,
            "per_class": per_class,
            "episodes": self.episodes,
            "blind": self.blind,
        }


def summarise(records: Sequence[Record], predictor: str, seed: int) -> Summary:
    """The numbers of one predictor; `seed` is that of the bootstrap."""
    by_class: dict[int, list[Outcome]] = defaultdict(list)
    for record in sorted(records, key=lambda each: (each.class_index, each.index)):
        by_class[record.class_index].append(record.outcomes[predictor])
    areas = {index: np.array([each.areas.as_row() for each in found], np.int64) for index, found in by_class.items()}
    ious = class_ious(areas)
    return Summary(
        100 * mean_iou(areas),
        100 * foreground_background_iou(areas),
        {index: (100 * ious[index], len(rows)) for index, rows in areas.items()},
        100 * resampled_mean_ious(areas, seed),
        len(records),
        sum(each.blind for found in by_class.values() for each in found),
        _video(list(by_class.values())),
    )


def mean_over_folds(folds: Sequence[Summary]) -> Summary:
    """The mean that papers give: every fold weighs the same."""
    return Summary(
        float(np.mean([fold.miou for fold in folds])),
        float(np.mean([fold.fb_iou for fold in folds])),
        {index: entry for fold in folds for index, entry in fold.per_class.items()},
        np.mean([fold.resampled for fold in folds], 0),
        sum(fold.episodes for fold in folds),
        sum(fold.blind for fold in folds),
        folds[0].video if len(folds) == 1 else None,
    )


def _video(objects: Sequence[Sequence[Outcome]]) -> VideoScore | None:
    """Means over the frames of every object, then over objects; an object without frames that count is left out."""
    regions, boundaries = [], []
    for outcomes in objects:
        scored = [(each.areas, each.boundary_f) for each in outcomes if each.boundary_f is not None]
        if scored:
            # Nothing to be found and nothing found is right here, other than in few-shot segmentation.
            regions.append(np.mean([areas.iou if areas.union else 1.0 for areas, _ in scored]))
            boundaries.append(np.mean([contour for _, contour in scored]))
    if not regions:
        return None
    return VideoScore(100 * float(np.mean(regions)), 100 * float(np.mean(boundaries)))
