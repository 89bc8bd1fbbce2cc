"""The paired comparison against numbers worked out by hand and against chance."""

from __future__ import annotations

import numpy as np
import pytest

from fssdeploy.evaluation.evaluate import Outcome, Record
from fssdeploy.evaluation.metrics import Areas
from fssdeploy.evaluation.paired import compare


def records(first: np.ndarray, second: np.ndarray) -> list[Record]:
    """Episodes of two classes by turns whose unions are 100 pixels and whose intersections are given."""

    def outcome(intersection: int) -> Outcome:
        return Outcome(Areas(int(intersection), 100, 900, 1000), blind=False)

    return [
        Record(index, index % 2, {"one": outcome(a), "other": outcome(b)})
        for index, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def test_the_difference_is_that_of_the_mious() -> None:
    found = compare(records(np.array([50, 60, 40, 80]), np.array([50, 50, 50, 50])), "one", "other", seed=0)
    # Classes: (50 + 40) / 200 and (60 + 80) / 200 against 0.5 and 0.5.
    assert found.difference == pytest.approx(100 * ((0.45 + 0.7) / 2 - 0.5))
    assert (found.better, found.worse, found.equal) == (2, 1, 1)
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_a_small_gain_in_every_episode_is_seen_through_large_differences_between_episodes() -> None:
    base = np.random.default_rng(0).integers(0, 90, 200)
    found = compare(records(base + 2, base), "one", "other", seed=0)
    assert found.p_value < 0.01 and found.interval[0] > 0
    assert compare(records(base, base + 2), "one", "other", seed=0).difference == pytest.approx(-found.difference)


def test_noise_is_no_gain() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(20, 80, 400)
    found = compare(records(base + rng.integers(-10, 11, 400), base), "one", "other", seed=0)
    assert found.p_value > 0.05 and found.interval[0] < 0 < found.interval[1]


def test_equal_predictors_differ_in_nothing() -> None:
    base = np.arange(10, 50)
    found = compare(records(base, base), "one", "other", seed=0)
    assert found.difference == 0 and found.p_value == 1 and found.equal == 40
