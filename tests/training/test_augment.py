"""Augmentation: picture and labels stay together, draws come from the generator, the ends of every range hold."""

from __future__ import annotations

import numpy as np
import pytest

from fssdeploy.images.geometry import PADDING_COLOUR
from fssdeploy.training.augment import NONE, Augmentation, Crop, augment, crop, resized

OUTSIDE = 255


def case(height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A picture that is white where its labels are 1 and black elsewhere: a bar left of the middle."""
    labels = np.zeros((height, width), np.uint8)
    labels[10:40, 12:24] = 1
    return np.repeat(labels[..., None] * 255, 3, 2), labels


def disagreement(picture: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labelled pixels whose colour is not that of their label."""
    known = labels != OUTSIDE
    return float(((picture[..., 0] > 127) != (labels == 1))[known].mean())


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    picture, labels = case()
    found = augment(picture, labels, NONE, np.random.default_rng(0), OUTSIDE)
    assert np.array_equal(found[0], picture) and np.array_equal(found[1], labels)


@pytest.mark.parametrize("seed", range(8))
def test_picture_and_labels_move_together(seed: int) -> None:
    picture, labels = case()
    how = Augmentation((0.6, 1.5), 30.0, 0.5, 0.5)
    turned, changed = augment(picture, labels, how, np.random.default_rng(seed), OUTSIDE)
    assert turned.shape == picture.shape and changed.shape == labels.shape
    assert not np.array_equal(changed, labels)
    assert set(np.unique(changed)) <= {0, 1, OUTSIDE} and (changed == 1).any()
    assert disagreement(turned, changed) < 0.03  # along the edges
    again = augment(picture, labels, how, np.random.default_rng(seed), OUTSIDE)
    assert np.array_equal(again[0], turned) and np.array_equal(again[1], changed)


@pytest.mark.parametrize(("factor", "seed"), [(0.5, 0), (0.5, 1), (2.0, 0), (2.0, 1)])
def test_scale(factor: float, seed: int) -> None:
    picture = np.full((60, 80, 3), 200, np.uint8)
    labels = np.ones((60, 80), np.uint8)
    how = Augmentation((factor, factor), 0.0, 0.0, 0.0)
    turned, changed = augment(picture, labels, how, np.random.default_rng(seed), OUTSIDE)
    if factor < 1:  # a whole small picture at a random place, surrounded by what is ignored
        rows, columns = np.flatnonzero((changed == 1).any(1)), np.flatnonzero((changed == 1).any(0))
        assert (len(rows), len(columns)) == (pytest.approx(30, abs=1), pytest.approx(40, abs=1))
        assert (changed == 1).sum() == len(rows) * len(columns)
        assert np.array_equal(np.unique(turned[changed == OUTSIDE], axis=0)[0], np.minimum(PADDING_COLOUR, 200))
    else:
        assert (changed == 1).all() and (turned == 200).all()
    noise = np.random.default_rng(9).integers(0, 2, (60, 80)).astype(np.uint8)
    windows = {augment(picture, noise, how, np.random.default_rng(each), OUTSIDE)[1].tobytes() for each in range(4)}
    assert len(windows) == 4


def test_mirror_blur_and_rotation() -> None:
    picture, labels = case()
    rng = np.random.default_rng(0)
    mirrored = augment(picture, labels, Augmentation((1, 1), 0.0, 0.0, 1.0), rng, OUTSIDE)
    assert np.array_equal(mirrored[0], picture[:, ::-1]) and np.array_equal(mirrored[1], labels[:, ::-1])
    blurred = augment(picture, labels, Augmentation((1, 1), 0.0, 1.0, 0.0), rng, OUTSIDE)
    assert not np.array_equal(blurred[0], picture) and np.array_equal(blurred[1], labels)
    turned = augment(picture, labels, Augmentation((1, 1), 20.0, 0.0, 0.0), rng, OUTSIDE)
    assert (turned[1] == OUTSIDE).any() and disagreement(*turned) < 0.03


@pytest.mark.parametrize("seed", range(8))
def test_crop_keeps_labels_on_their_pixels(seed: int) -> None:
    picture, labels = case(64, 64)
    how = Crop(window=(0.6, 1.0), gain=0.2)
    small, changed = crop(picture, labels, how, 40, np.random.default_rng(seed))
    assert small.shape == (40, 40, 3) and changed.shape == (40, 40) and small.dtype == changed.dtype == np.uint8
    assert disagreement(small, changed) < 0.05
    again = crop(picture, labels, how, 40, np.random.default_rng(seed))
    assert np.array_equal(again[0], small) and np.array_equal(again[1], changed)


def test_crop_permutes_and_scales_channels() -> None:
    picture = np.empty((20, 20, 3), np.uint8)
    picture[:] = (40, 100, 240)
    labels = np.zeros((20, 20), np.uint8)
    orders = set()
    for seed in range(12):
        found, _ = crop(picture, labels, Crop(gain=0.1), 10, np.random.default_rng(seed))
        colour = found[0, 0].astype(float)
        order = np.argsort(colour)
        orders.add(tuple(order))
        assert (np.abs(colour[order] / (40, 100, 240) - 1) <= 0.13).all()
    assert len(orders) > 2
    plain, _ = crop(picture, labels, Crop(gain=0.0, swaps=False), 10, np.random.default_rng(0))
    assert (plain == (40, 100, 240)).all()


def test_a_window_is_what_it_says() -> None:
    """A quarter of the picture, exactly: every pixel of the window becomes four."""
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    picture = np.repeat(labels[..., None], 3, 2)
    _, changed = resized(picture, labels, 8, (4, 2, 8, 6))
    assert np.array_equal(changed, labels[2:6, 4:8].repeat(2, 0).repeat(2, 1))
