"""Trivial answers on shapes-5i: computed as said, and far from solving it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.benchmarks.shapes5i import LIMIT, colour_histogram, largest_object, mean_colour, trivial_mious
from fssdeploy.data.shapes import VERSION

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "shapes-5i-trivial.json"


def test_on_a_picture_that_they_solve() -> None:
    picture = np.full((20, 20, 3), 30, np.uint8)
    picture[5:15, 5:15] = (220, 40, 40)
    inside = np.zeros((20, 20), bool)
    inside[5:15, 5:15] = True
    other = picture[:, ::-1].copy()
    assert (colour_histogram(picture, inside, other) == inside[:, ::-1]).all()
    assert (mean_colour(picture, inside, other) == inside[:, ::-1]).all()
    objects = np.zeros((20, 20), np.uint8)
    objects[:2], objects[5:15] = 9, 17
    assert (largest_object(objects) == (objects == 17)).all()


@pytest.mark.parametrize("fold", range(4))
def test_a_few_episodes(fold: int) -> None:
    found = trivial_mious(fold, 20, seed=3)
    assert len(found) == 4 and all(0 <= miou < LIMIT for miou in found.values())


def test_the_committed_figures() -> None:
    result = json.loads(RESULT.read_text())
    assert result["version"] == VERSION and result["limit"] == LIMIT and set(result["folds"]) == {"0", "1", "2", "3"}
    for answers in result["folds"].values():
        assert len(answers) == 4 and max(answers.values()) < LIMIT
