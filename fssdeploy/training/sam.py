"""Pre-training a small promptable SAM on the objects of a fold's base classes, regardless of their class.

Source: Kirillov et al., "Segment Anything" (2023), appendix A, shortened to two rounds: a first prompt (a point inside
the object or its box, by turns), then a point from the region of error together with the mask so far. Loss: focal and
Dice 20:1, squared error of the predicted IoU; of three masks for a lone point only the best one learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fssdeploy.errors import InputError
from fssdeploy.modules.sam import Sam, SamConfig
from fssdeploy.training.augment import Crop, crop
from fssdeploy.training.initialise import initialise
from fssdeploy.training.losses import dice, focal
from fssdeploy.training.pictures import BasePictures, RandomPictures
from fssdeploy.training.recipe import Batch, Objective, Recipe, RunSettings, muon_and_adamw
from fssdeploy.training.schedule import Phase, check_sizes

# Smallest share of the picture that an object must still cover after cropping.
LEAST_OBJECT = 0.01


@dataclass(frozen=True, kw_only=True)
class SamSettings(RunSettings):
    """`objects`: prompts for each picture; `matrix_rate` is Muon's, for the matrices of the encoder's blocks.

    `every_mask` teaches the single mask and the three in both rounds, whatever the prompt: training-free systems ask
    a lone point for the single mask, and points with a box and a mask for three.
    """

    network: SamConfig
    phases: tuple[Phase, ...] = (Phase(1500, 8, 208),)
    objects: int = 3
    every_mask: bool = False
    matrix_rate: float = 0.02
    decay: float = 0.05
    precision: str = "bf16"
    ema: float = 0.998
    crop: Crop = Crop()


class Objects(RandomPictures):
    """Examples: `picture` uint8 (3, S, S), `truth` bool (N, S, S), a `point` in each (N, 2) and its `box` (N, 4)."""

    def __init__(self, pictures: BasePictures, how: Crop, objects: int, seed: int) -> None:
        super().__init__(pictures, seed)
        self.how, self.objects = how, objects

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        rng, item = self.start(position, attempt)
        regions = self.pictures.regions(item)
        numbers = np.zeros(regions.picture.shape[:2], np.uint8)
        for number, inside in enumerate(regions.objects, 1):
            numbers[inside] = number
        picture, numbers = crop(regions.picture, numbers, self.how, size, rng)
        areas = np.bincount(numbers.ravel(), minlength=2)[1:]
        seen = np.flatnonzero(areas >= LEAST_OBJECT * size * size) + 1
        if not len(seen):
            raise InputError("no_object", f"the window of '{item}' shows no object")
        truth = np.stack([numbers == rng.choice(seen) for _ in range(self.objects)])
        points, boxes = zip(*(_prompt(each, rng) for each in truth), strict=True)
        return {
            "picture": torch.from_numpy(picture.transpose(2, 0, 1).copy()),
            "truth": torch.from_numpy(truth),
            "point": torch.tensor(np.array(points), dtype=torch.float32),
            "box": torch.tensor(np.array(boxes), dtype=torch.float32),
        }


def _prompt(inside: np.ndarray, rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """A point (x, y) in the object, and its box (x0, y0, x1, y1) jittered by up to a tenth of its side."""
    rows, columns = np.nonzero(inside)
    chosen = rng.integers(len(rows))
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    box += rng.uniform(-0.1, 0.1, 4) * sides
    return [columns[chosen] + 0.5, rows[chosen] + 0.5], box.clip(0, inside.shape[0]).tolist()


class PromptObjective(Objective):
    def __init__(self, config: SamConfig, every_mask: bool = False) -> None:
        super().__init__()
        self.sam = Sam(config)
        self.every_mask = every_mask
        initialise(self.sam.image_encoder)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        truth = batch["truth"].float()
        cell = self.sam.config.patch // 4
        target = torch.nn.functional.avg_pool2d(truth, cell)
        embedding = self.sam.encode(batch["picture"])
        points, labels = batch["point"].unsqueeze(2), torch.ones_like(batch["point"][..., :1], dtype=torch.int64)
        if int(batch["step"]) % 2:
            first, iou = self.sam.decode(embedding, boxes=batch["box"], multimask=self._wanted(False))
        else:
            first, iou = self.sam.decode(embedding, points, labels, multimask=self._wanted(True))
        loss_first, best, _ = self._judge(first, iou, target)
        extra, kind = _correction(best, target, cell)
        points, labels = torch.cat([points, extra], 2), torch.cat([labels, kind], 2)
        before = best.detach().unsqueeze(2)
        second, iou = self.sam.decode(embedding, points, labels, masks=before, multimask=self._wanted(False))
        loss_second, _, overlap = self._judge(second, iou, target)
        return {"loss": loss_first + loss_second, "iou": overlap}

    def _wanted(self, multimask: bool) -> bool | None:
        return None if self.every_mask else multimask

    def _judge(
        self, logits: torch.Tensor, predicted: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the function `_judge`; where every mask learns, of the single mask and the three."""
        if not self.every_mask:
            return _judge(logits, predicted, target)
        loss, _, overlap = _judge(logits[:, :, :1], predicted[:, :, :1], target)
        loss_of_three, best, _ = _judge(logits[:, :, 1:], predicted[:, :, 1:], target)
        return loss + loss_of_three, best, overlap


def _judge(
    logits: torch.Tensor, predicted: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, best logits (B, N, h, w) and mean IoU of logits (B, N, M, h, w) against soft targets (B, N, h, w)."""
    logits, predicted = logits.float(), predicted.float()
    truth = target.unsqueeze(2).expand_as(logits)
    each = 20 * focal(logits, truth) + dice(logits, truth)
    mask, hard = logits > 0, truth > 0.5
    overlap = (mask & hard).sum((-2, -1)) / (mask | hard).sum((-2, -1)).clamp_min(1)
    best = each.argmin(2, keepdim=True)
    chosen = logits.gather(2, best[..., None, None].expand(-1, -1, 1, *logits.shape[-2:])).squeeze(2)
    quality = (predicted - overlap).square().mean(2)
    return (each.gather(2, best).squeeze(2) + quality).mean(), chosen, overlap.gather(2, best).mean()


def _correction(logits: torch.Tensor, target: torch.Tensor, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle of the worst region of error as a point (B, N, 1, 2) in pixels and its label (B, N, 1).

    The worst pixel of the error averaged over 5 x 5 cells stands in for the centre of the largest error region.
    """
    error = target - logits.detach().sigmoid()
    smooth = torch.nn.functional.avg_pool2d(error, 5, 1, 2, count_include_pad=False)
    worst = smooth.abs().flatten(2).argmax(2)
    width = logits.shape[-1]
    point = torch.stack([worst % width, worst // width], -1).float().add(0.5).mul(cell)
    sign = smooth.flatten(2).gather(2, worst.unsqueeze(2)) > 0
    return point.unsqueeze(2), sign.long()


class SamRecipe(Recipe):
    name = "pretrain sam"

    def __init__(self, pictures: BasePictures, settings: SamSettings, origin: Mapping[str, Any]) -> None:
        check_sizes(settings.phases, settings.network.patch, settings.network.image_size)
        torch.manual_seed(settings.seed)
        examples = Objects(pictures, settings.crop, settings.objects, settings.seed)
        super().__init__(settings, origin, examples, PromptObjective(settings.network, settings.every_mask))
        self._rates = settings.rate, settings.matrix_rate, settings.decay

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return muon_and_adamw(self.objective, *self._rates)
