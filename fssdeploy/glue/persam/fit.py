"""PerSAM-F's training: two numbers that mix SAM's three output scales, fitted on one reference picture.

Source: Zhang et al., "Personalize Segment Anything Model with One Shot" (2023), section 3.4, and the released code. The
decoder is frozen and its prompts do not change, so its logits are constants: one decoder call serves all steps, and the
gradient of two numbers has a closed form.
"""

from __future__ import annotations

import math

import numpy as np

from fssdeploy.errors import InputError

STEPS = 1000
LEARNING_RATE = 1e-3
# AdamW as in the released code; the decay is PyTorch's default and pulls the two weights towards 0.
BETAS = (0.9, 0.999)
EPSILON = 1e-4
WEIGHT_DECAY = 0.01
# Weights of object and background pixels in the focal loss.
ALPHA = (0.25, 0.75)

# Pixels per block: what one block needs stays in the processor's cache.
_BLOCK = 32768
# Beyond this margin a pixel is right beyond doubt; its exponential would leave float32.
_SURE = 80.0


class _Pixels:
    """Pixels of one kind, object or background, with signs such that a positive margin is a right answer.

    The margin of a pixel is `base` + w1 * `slopes[0]` + w2 * `slopes[1]`.
    """

    def __init__(self, logits: np.ndarray, sign: int) -> None:
        self.base = np.float32(sign) * logits[0]
        self.slopes = np.float32(sign) * (logits[1:] - logits[:1])

    def sums(self, weights: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Sums over pixels: probability of the wrong answer, its focal loss, and both gradients (2, 2).

        The first row of the gradients is that of minus the wrong probability, the second that of the focal loss.
        """
        wrong_sum = focal_sum = 0.0
        gradients = np.zeros((2, 2))
        w1, w2 = weights.astype(np.float32)
        for start in range(0, self.base.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            slopes = self.slopes[:, part]
            margin = self.base[part] + w1 * slopes[0]
            margin += w2 * slopes[1]
            np.minimum(margin, _SURE, out=margin)
            odds = np.exp(margin)
            odds += 1
            wrong = 1 / odds
            surprise = np.log(odds, out=odds)  # -log of the right answer's probability
            surprise -= margin
            squared = wrong * wrong
            focal_sum += float(np.dot(surprise, squared))
            wrong_sum += float(wrong.sum())
            slope_of_wrong = wrong - squared
            surprise *= 2 * (1 - wrong)
            surprise += wrong
            surprise *= squared
            gradients[0] += slopes @ slope_of_wrong
            gradients[1] -= slopes @ surprise
        return wrong_sum, focal_sum, gradients


class MixingLoss:
    """Dice plus focal loss of a mixture of three masks, and its gradient by the last two mixing weights."""

    def __init__(self, logits: np.ndarray, target: np.ndarray) -> None:
        """logits (3, N) and target bool (N,). InputError unless both kinds of shape agree and the target marks any."""
        if logits.shape != (3, target.size):
            raise InputError("wrong_shape", f"logits are {logits.shape}", f"the target has {target.size} pixels")
        if not target.any():
            raise InputError("mask_empty", "the mask to fit marks nothing", "", "Mark the object.")
        logits = np.asarray(logits, np.float32)
        self._object, self._background = _Pixels(logits[:, target], 1), _Pixels(logits[:, ~target], -1)
        self._area, self._pixels = int(np.count_nonzero(target)), target.size

    def at(self, weights: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Dice loss, focal loss and the gradient (2,) of their sum at `weights` (w1, w2); w0 is 1 - w1 - w2."""
        missed, focal_object, slopes_object = self._object.sums(weights)
        added, focal_background, slopes_background = self._background.sums(weights)
        hit = self._area - missed
        above, below = 2 * hit + 1, hit + added + self._area + 1
        dice = 1 - above / below
        hit_slope, added_slope = slopes_object[0], -slopes_background[0]
        dice_slope = (above * (hit_slope + added_slope) / below - 2 * hit_slope) / below
        focal = (ALPHA[0] * focal_object + ALPHA[1] * focal_background) / self._pixels
        focal_slope = (ALPHA[0] * slopes_object[1] + ALPHA[1] * slopes_background[1]) / self._pixels
        return dice, focal, dice_slope + focal_slope


def fit_mask_weights(
    logits: np.ndarray,
    target: np.ndarray,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    trace: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Weights float32 (3,) whose mixture of the logits comes closest to the target; they sum to 1, and may be negative.

    logits float32 (3, N) are the decoder's three masks at the picture's size, target bool (N,). AdamW with cosine
    annealing to 0, from one third each. `trace` receives `dice_loss`, `focal_loss`, `loss` (before each update),
    `learning_rate` and `weights_after_step` (steps, 2). InputError for other shapes and an empty target.
    """
    loss = MixingLoss(logits, target.astype(bool))
    weights = np.full(2, 1 / 3)
    mean, square = np.zeros(2), np.zeros(2)
    rows = []
    for step in range(1, steps + 1):
        dice, focal, gradient = loss.at(weights)
        rate = _annealed(learning_rate, step - 1, steps)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        root = np.sqrt(square / (1 - BETAS[1] ** step))
        weights = weights * (1 - rate * WEIGHT_DECAY) - rate * mean / (1 - BETAS[0] ** step) / (root + EPSILON)
        rows.append((dice, focal, dice + focal, _annealed(learning_rate, step, steps), *weights))
    if trace is not None:
        names = ("dice_loss", "focal_loss", "loss", "learning_rate")
        table = np.array(rows, np.float64).reshape(steps, 6)
        trace |= {name: table[:, index] for index, name in enumerate(names)}
        trace["weights_after_step"] = table[:, 4:]
    return np.array([1 - weights.sum(), *weights], np.float32)


def _annealed(rate: float, step: int, steps: int) -> float:
    return rate * (1 + math.cos(math.pi * step / steps)) / 2
