"""Whether one predictor is better than another on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fssdeploy.evaluation.evaluate import Record
from fssdeploy.evaluation.metrics import interval
from fssdeploy.evaluation.summary import summarise


@dataclass(frozen=True)
class Paired:
    """mIoU of one predictor less that of another, in points of percent, over the same episodes.

    `interval` holds 95 % of the differences on bootstrap lists that are drawn alike for both, `p_value` is two-sided:
    twice the share of those lists on which the difference has not the sign of `difference`, at least 1 / (lists + 1).
    `better`, `worse` and `equal` count episodes by the IoU of the episode.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    better: int
    worse: int
    equal: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interval": list(self.interval)}


def compare(records: Sequence[Record], one: str, other: str, seed: int) -> Paired:
    """The predictor called `one` against the one called `other`; `seed` is that of the bootstrap."""
    first, second = (summarise(records, name, seed) for name in (one, other))
    gains = first.resampled - second.resampled
    difference = first.miou - second.miou
    against = np.mean(gains <= 0 if difference > 0 else gains >= 0)
    ious = np.array([[record.outcomes[name].areas.iou for name in (one, other)] for record in records])
    signs = np.sign(ious[:, 0] - ious[:, 1])
    counts = (int(np.count_nonzero(signs == sign)) for sign in (1, -1, 0))
    return Paired(difference, interval(gains), min(1.0, 2 * max(float(against), 1 / (len(gains) + 1))), *counts)
