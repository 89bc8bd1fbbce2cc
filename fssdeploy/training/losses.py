"""Losses on mask logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fssdeploy.data.dataset import IGNORE


def dice_bce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice + binary cross-entropy (FS-DINO, eqs. 6 and 7), one value for each example, shape (B,).

    logits float (B, H, W); target uint8 (B, H, W): 0, 1, or 255 for pixels that count in neither.
    """
    valid = (target != IGNORE).float()
    truth = (target == 1).float()
    pixels = valid.sum((1, 2)).clamp_min(1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weight=valid, reduction="none").sum((1, 2)) / pixels
    return dice(logits, truth, valid) + entropy


def dice(logits: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor | float = 1.0) -> torch.Tensor:
    """1 - Dice coefficient of the sigmoid, smoothed by one pixel; reduces the last two dimensions."""
    probability = logits.sigmoid() * valid
    overlap = (probability * truth).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + (truth * valid).sum((-2, -1)) + 1)


def focal(logits: torch.Tensor, truth: torch.Tensor, gamma: float = 2.0, alpha: float = 0.25) -> torch.Tensor:
    """Focal loss (Lin et al., 2017) as SAM uses it, the mean over the last two dimensions."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    missed = torch.where(truth > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(truth > 0.5, alpha, 1 - alpha)
    return (weight * missed**gamma * entropy).mean((-2, -1))


def overlap(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean IoU of boolean masks (B, H, W) against targets as in `dice_bce`; a progress figure, not the metric."""
    valid = target != IGNORE
    truth = target == 1
    union = ((prediction | truth) & valid).sum((-2, -1)).clamp_min(1)
    return ((prediction & truth).sum((-2, -1)) / union).mean()
