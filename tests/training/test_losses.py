"""Losses against their definitions, written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fssdeploy.training.losses import dice, dice_bce, focal, overlap


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (3, 6, 7) and targets of 0, 1 and 255, the last one ignored altogether."""
    rng = np.random.default_rng(seed)
    target = rng.choice([0, 1, 255], (3, 6, 7)).astype(np.uint8)
    target[2] = 255
    return rng.normal(0, 3, (3, 6, 7)), target


def dice_bce_by_definition(logits: np.ndarray, target: np.ndarray) -> list[float]:
    values = []
    for each, truth in zip(logits, target, strict=True):
        counted = truth != 255
        p, t = 1 / (1 + np.exp(-each[counted])), truth[counted].astype(float)
        entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
        values.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) + entropy.sum() / max(1, counted.sum()))
    return values


@pytest.mark.parametrize("seed", range(3))
def test_dice_and_entropy(seed: int) -> None:
    logits, target = random_case(seed)
    found = dice_bce(torch.tensor(logits), torch.tensor(target))
    np.testing.assert_allclose(found.numpy(), dice_bce_by_definition(logits, target), rtol=1e-6)
    assert found[2] == 0  # nothing counts, nothing is lost


def test_ignored_pixels_have_no_gradient() -> None:
    logits, target = random_case(0)
    variable = torch.tensor(logits, requires_grad=True)
    dice_bce(variable, torch.tensor(target)).sum().backward()
    assert variable.grad is not None
    assert np.array_equal(variable.grad.numpy() != 0, target != 255)


def test_extremes() -> None:
    truth = torch.zeros(1, 4, 4, dtype=torch.uint8)
    truth[0, :2] = 1
    sure = torch.where(truth == 1, 100.0, -100.0)
    assert float(dice_bce(sure, truth)) == pytest.approx(0, abs=1e-6)
    wrong = float(dice_bce(-sure, truth))
    assert wrong == pytest.approx(100 + 1 - 1 / 17)
    assert torch.isfinite(dice_bce(1e4 * sure, truth)).all()


def test_dice_by_hand() -> None:
    truth = torch.tensor([[1.0, 1, 0, 0]])
    assert float(dice(torch.zeros(1, 4), truth)) == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


def test_focal_by_definition() -> None:
    logits, _ = random_case(1)
    truth = np.random.default_rng(2).integers(0, 2, logits.shape).astype(float)
    p = 1 / (1 + np.exp(-logits))
    right = np.where(truth == 1, p, 1 - p)
    wanted = (-np.where(truth == 1, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)).mean((1, 2))
    found = focal(torch.tensor(logits), torch.tensor(truth))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


def test_overlap_by_hand() -> None:
    prediction = torch.tensor([[[1, 1, 0, 1]], [[0, 0, 0, 0]]]).bool()
    target = torch.tensor([[[1, 0, 1, 255]], [[0, 0, 0, 255]]])
    assert float(overlap(prediction, target)) == pytest.approx((1 / 3 + 0) / 2)
