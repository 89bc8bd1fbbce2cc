"""Resampling in NumPy against torch.nn.functional.interpolate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fssdeploy.glue.resample import bilinear, bilinear_weights, nearest, nearest_index

SIZES = [(1024, 37), (96, 14), (48, 96), (256, 1024), (37, 640), (5, 5), (8, 1), (1, 4), (777, 64), (2, 3)]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "count"), SIZES)
def test_bilinear_is_that_of_torch(size: int, count: int, align_corners: bool) -> None:
    array = random(2, size, 11)
    expected = F.interpolate(
        torch.from_numpy(array)[None], size=(count, 7), mode="bilinear", align_corners=align_corners
    )
    got = bilinear(array, count, 7, align_corners)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected[0].numpy(), atol=5e-6)


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_nearest_is_that_of_torch(size: int, count: int) -> None:
    array = random(2, size, 11)
    expected = F.interpolate(torch.from_numpy(array)[None], size=(count, 7), mode="nearest")[0].numpy()
    np.testing.assert_array_equal(nearest(array, count, 7), expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_equal_neighbours_keep_their_exact_value(align_corners: bool) -> None:
    value = np.float32(0.1)
    assert (bilinear(np.full((9, 13), value), 37, 41, align_corners) == value).all()


@pytest.mark.parametrize("align_corners", [False, True])
def test_weights_stay_inside(align_corners: bool) -> None:
    for size, count in SIZES:
        low, high, share = bilinear_weights(size, count, align_corners)
        assert low.min() >= 0
        assert high.max() < size
        assert ((high == low + 1) | (high == size - 1)).all()
        assert ((share >= 0) & (share <= 1)).all()


@pytest.mark.parametrize(("size", "count"), [(1024, 37), (208, 13), (96, 14)])
def test_a_cell_reads_the_pixel_where_its_prompt_stands(size: int, count: int) -> None:
    np.testing.assert_array_equal(nearest_index(size, count), np.arange(count) * size // count)
