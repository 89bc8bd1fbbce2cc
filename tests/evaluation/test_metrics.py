"""Metrics against numbers worked out by hand and against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fssdeploy.evaluation.metrics import (
    Areas,
    boundary,
    boundary_f,
    class_ious,
    dilate,
    foreground_background_iou,
    interval,
    mean_iou,
    measure_areas,
    resampled_mean_ious,
)


def test_areas_of_a_picture_counted_by_hand() -> None:
    truth = np.array([[1, 1, 0, 0], [1, 1, 0, 255]], np.uint8)
    prediction = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], bool)
    # Found and true: 2. Found or true: 4 + 1. Neither: 2 of the 7 that count; background somewhere: 5.
    assert measure_areas(prediction, truth) == Areas(2, 5, 2, 5)


def test_ignored_pixels_count_nowhere() -> None:
    truth = np.array([[1, 0, 255, 255]], np.uint8)
    found = [measure_areas(np.array([[True, False, *border]]), truth) for border in ([True, True], [False, False])]
    assert found[0] == found[1] == Areas(1, 1, 1, 1)
    everything_ignored = measure_areas(np.ones((2, 2), bool), np.full((2, 2), 255, np.uint8))
    assert everything_ignored == Areas(0, 0, 0, 0) and everything_ignored.iou == 0


def rows(*areas: tuple[int, int]) -> np.ndarray:
    """Areas of episodes of 100 pixels by intersection and union."""
    return np.array([(i, u, 100 - u, 100 - i) for i, u in areas])


def test_areas_are_summed_by_class_before_dividing() -> None:
    areas = {3: rows((1, 2), (10, 50)), 7: rows((30, 40))}
    ious = class_ious(areas)
    assert ious == {3: pytest.approx(11 / 52), 7: pytest.approx(0.75)}
    assert mean_iou(areas) == pytest.approx((11 / 52 + 0.75) / 2)
    mean_of_episodes = np.mean([1 / 2, 10 / 50, 30 / 40])
    assert abs(mean_iou(areas) - mean_of_episodes) > 0.001


def test_fb_iou_sums_over_everything() -> None:
    areas = {3: rows((1, 2), (10, 50)), 7: rows((30, 40))}
    foreground, background = 41 / 92, (98 + 50 + 60) / (99 + 90 + 70)
    assert foreground_background_iou(areas) == pytest.approx((foreground + background) / 2)


def test_the_interval_of_equal_episodes_is_a_point() -> None:
    low, high = interval(resampled_mean_ious({0: rows(*[(1, 2)] * 9), 1: rows(*[(3, 4)] * 5)}, seed=0))
    assert low == pytest.approx(high) == pytest.approx(0.625)


def test_the_interval_is_that_of_the_binomial() -> None:
    """Episodes that are all right or all wrong: their mean over n resampled is a binomial share."""
    areas = {0: np.array([(1, 1, 0, 0)] * 60 + [(0, 1, 0, 0)] * 40)}
    samples = resampled_mean_ious(areas, seed=1, resamples=20_000)
    assert samples.mean() == pytest.approx(0.6, abs=0.002)
    assert samples.std() == pytest.approx(math.sqrt(0.6 * 0.4 / 100), rel=0.02)
    low, high = interval(samples)
    assert (low, high) == (pytest.approx(0.50, abs=0.011), pytest.approx(0.69, abs=0.011))
    np.testing.assert_array_equal(samples, resampled_mean_ious(areas, seed=1, resamples=20_000))
    assert (samples != resampled_mean_ious(areas, seed=2, resamples=20_000)).any()


def test_resampling_stays_within_classes() -> None:
    """One class always right, one always wrong: whatever is drawn, the mean is one half."""
    samples = resampled_mean_ious({0: rows((4, 4), (2, 2)), 1: rows((0, 4), (0, 9))}, seed=0)
    np.testing.assert_allclose(samples, 0.5)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5, 8])
def test_dilation_is_a_disk(radius: int) -> None:
    mask = np.zeros((23, 31), bool)
    mask[[0, 11, 22, 3], [0, 15, 30, 28]] = True
    y, x = np.mgrid[:23, :31]
    nearest = np.min([(y - row) ** 2 + (x - column) ** 2 for row, column in np.argwhere(mask)], 0)
    np.testing.assert_array_equal(dilate(mask, radius), nearest <= radius**2)


def test_the_boundary_lies_on_the_upper_left_side_of_every_edge() -> None:
    mask = np.zeros((5, 5), bool)
    mask[2:4, 2:4] = True
    expected = np.zeros((5, 5), bool)
    expected[1, 1:4] = expected[1:4, 1] = True  # from outside, right and below differ
    expected[2:4, 3] = expected[3, 2:4] = True  # from inside, out to the right and downwards
    np.testing.assert_array_equal(boundary(mask), expected)
    assert not boundary(np.ones((4, 4), bool)).any()


def f_by_distances(prediction: np.ndarray, truth: np.ndarray, radius: int) -> float:
    """The definition: every boundary pixel looks for one of the other mask within the radius."""
    found, wanted = np.argwhere(boundary(prediction)), np.argwhere(boundary(truth))
    distances = np.sqrt(((found[:, None] - wanted[None]) ** 2).sum(2))
    precision, recall = (distances.min(1) <= radius).mean(), (distances.min(0) <= radius).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


@pytest.mark.parametrize("shift", [(0, 0), (0, 1), (1, 1), (2, 1), (3, 3), (0, 6), (20, 30)])
@pytest.mark.parametrize("grow", [0, 5])
def test_f_of_shifted_squares(shift: tuple[int, int], grow: int) -> None:
    truth, prediction = np.zeros((90, 120), bool), np.zeros((90, 120), bool)
    truth[20:40, 30:60] = True
    prediction[20 + shift[0] : 40 + shift[0] + grow, 30 + shift[1] : 60 + shift[1]] = True
    # The diagonal is 150 pixels, of which 0.8 % are 1.2: two pixels.
    expected = f_by_distances(prediction, truth, 2)
    assert boundary_f(prediction, truth) == pytest.approx(expected)
    assert (expected == 1) == (math.hypot(*shift) <= 2 and not grow)


def test_f_without_a_boundary() -> None:
    nothing, square = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    square[5:9, 5:9] = True
    assert boundary_f(nothing, nothing) == 1
    assert boundary_f(square, nothing) == boundary_f(nothing, square) == 0
