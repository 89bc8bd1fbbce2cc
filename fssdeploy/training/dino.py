"""Pre-training a small DINOv2-style encoder on the base classes of a fold.

The published encoders are self-distilled on 142 million pictures; nothing of that kind is at hand for ours. It learns
from what a fold gives: dense labels of its base classes. Every patch predicts the words in the name of the class it
shows ("striped disc": two words), so that classes which share a word share evidence and a new combination of known
words lies between its parts. Where every class name is one word this is plain classification. Besides, every patch
predicts where its object lies and how it is spread: outlines are hard to learn from words alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoVisionTransformer, ViTConfig
from fssdeploy.training.augment import Crop, crop
from fssdeploy.training.initialise import initialise, mimetic
from fssdeploy.training.pictures import BasePictures, RandomPictures
from fssdeploy.training.recipe import Batch, Objective, Recipe, RunSettings, muon_and_adamw
from fssdeploy.training.schedule import Phase, check_sizes

NOTHING, IGNORED = 254, 255
# Object numbers that a patch can tell apart; what is beyond counts as no object.
MOST_OBJECTS = 16
GEOMETRY = 6
# Cosines times this are the logits of the words: small enough that being near a word is worth something to the end.
SHARPNESS = 8.0


@dataclass(frozen=True, kw_only=True)
class DinoSettings(RunSettings):
    """`matrix_rate` is Muon's, for the matrices of the blocks."""

    encoder: ViTConfig
    phases: tuple[Phase, ...] = (Phase(9000, 16, 182),)
    matrix_rate: float = 0.02
    decay: float = 0.05
    precision: str = "bf16"
    ema: float = 0.998
    crop: Crop = Crop()


class LabelledPictures(RandomPictures):
    """Examples: `picture` uint8 (3, S, S); `labels` uint8 (S, S), class index, 254 none, 255 ignored; `objects` uint8
    (S, S), numbers from 1, 0 for none.
    """

    def __init__(self, pictures: BasePictures, how: Crop, seed: int) -> None:
        super().__init__(pictures, seed)
        self.how = how

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        rng, item = self.start(position, attempt)
        regions = self.pictures.regions(item)
        labels = regions.classes.copy()
        labels[labels == -1], labels[labels == -2] = NOTHING, IGNORED
        numbers = np.zeros(labels.shape, np.uint8)
        for number, inside in enumerate(regions.objects[: MOST_OBJECTS - 1], 1):
            numbers[inside] = number
        picture, maps = crop(regions.picture, np.stack([labels.astype(np.uint8), numbers], -1), self.how, size, rng)
        return {
            "picture": torch.from_numpy(picture.transpose(2, 0, 1).copy()),
            "labels": torch.from_numpy(maps[..., 0].copy()),
            "objects": torch.from_numpy(maps[..., 1].copy()),
        }


class WordObjective(Objective):
    table: torch.Tensor

    def __init__(self, config: ViTConfig, table: np.ndarray) -> None:
        """`table` bool (classes, words)."""
        super().__init__()
        self.encoder = DinoVisionTransformer(config)
        initialise(self.encoder)
        mimetic(self.encoder)
        self.words = nn.Parameter(torch.randn(table.shape[1] + 1, config.dim))
        # Leaves the last third of the blocks to turn outlines into words.
        self.tap = 2 * config.depth // 3 - 1
        self.geometry = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, GEOMETRY))
        # From a label to what is to be predicted: its words in equal parts, or (last column) that there is nothing.
        # Rows for all values of a label map, so that counts of labels multiply with it; 255 has no part in anything.
        rows = np.zeros((256, table.shape[1] + 1), np.float32)
        rows[: len(table), :-1] = table / np.maximum(table.sum(1, keepdims=True), 1)
        rows[NOTHING, -1] = 1
        self.register_buffer("table", torch.from_numpy(rows), persistent=False)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        picture, labels = batch["picture"], batch["labels"].long()
        mean = torch.tensor(IMAGENET_MEAN, device=picture.device).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=picture.device).view(1, 3, 1, 1)
        early, tokens = self.encoder((picture.float() / 255 - mean) / std, self.tap, tap_norm=False)
        with torch.autocast(picture.device.type, enabled=False):
            logits = SHARPNESS * F.normalize(tokens.float(), dim=-1) @ F.normalize(self.words, dim=-1).T
            spread = self.geometry(early.float())
        truth = label_counts(labels, self.encoder.config.patch) @ self.table
        known = truth.sum(-1)
        loss = -(truth * logits.log_softmax(-1)).sum(-1)
        target, sure = object_geometry(batch["objects"].long(), self.encoder.config.patch)
        off = F.smooth_l1_loss(spread, target, reduction="none").sum(-1)
        placed = ((off * sure).sum(1) / sure.sum(1).clamp_min(1)).mean()
        inside = truth[..., :-1].sum(-1) > 0.5
        named = truth[..., :-1] > 0.25 * known.unsqueeze(-1)
        # Of the words that are to be named, how many are among as many of the likeliest.
        order = logits[..., :-1].argsort(-1, descending=True).argsort(-1)
        hits = ((order < named.sum(-1, keepdim=True)) & named).sum(-1) / named.sum(-1).clamp_min(1)
        return {
            "loss": (loss.sum(1) / known.sum(1).clamp_min(1)).mean() + placed,
            "geometry": placed,
            "words": (hits * inside).sum() / inside.sum().clamp_min(1),
            "objects": ((logits.argmax(-1) < logits.shape[-1] - 1) == inside).float().mean(),
        }


def label_counts(labels: torch.Tensor, patch: int) -> torch.Tensor:
    """Share of every label in every patch: int64 (B, S, S) of 0..255 -> float32 (B, (S / patch)^2, 256)."""
    batch, side, _ = labels.shape
    grid = side // patch
    rows = torch.arange(side, device=labels.device) // patch
    cells = rows[:, None] * grid + rows + torch.arange(batch, device=labels.device)[:, None, None] * grid * grid
    counts = torch.bincount((cells * 256 + labels).flatten(), minlength=batch * grid * grid * 256)
    return counts.view(batch, grid * grid, 256).float() / patch**2


def object_geometry(objects: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the object of every patch lies and how it is spread, and whether one object fills most of the patch.

    objects int64 (B, S, S), 0 for none -> float32 (B, N, 6), bool (B, N). In units of the object's own size, the root
    of its area: offset of its centre from the patch (x, y); the root itself as a share of S; second moments xx, yy, xy.
    """
    batch, side, _ = objects.shape
    grid = side // patch
    shares = label_counts(objects.clamp_max(MOST_OBJECTS - 1), patch)[..., :MOST_OBJECTS]
    # Every other pixel of every other row is enough for moments, at a quarter of the cost.
    few = objects[:, ::2, ::2]
    at = (torch.arange(few.shape[1], device=objects.device) * 2 + 1) / side
    hot = F.one_hot(few.clamp_max(MOST_OBJECTS - 1), MOST_OBJECTS).flatten(1, 2).float()
    y, x = (axis.flatten() for axis in torch.meshgrid(at, at, indexing="ij"))
    powers = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y])
    sums = powers @ hot / few[0].numel()  # (B, 6, objects)
    area = sums[:, 0].clamp_min(1e-6)
    mean_x, mean_y, xx, yy, xy = (sums[:, row] / area for row in range(1, 6))
    # A disc's are 1 / (4 pi) and 0: brought to the size of the other targets.
    disc = 4 * torch.pi
    moments = [disc * (xx - mean_x**2) / area - 1, disc * (yy - mean_y**2) / area - 1]
    moments.append(disc * (xy - mean_x * mean_y) / area)
    most, number = shares.max(-1)

    def own(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, number)

    root = own(area).sqrt()
    centres = (torch.arange(grid, device=objects.device) + 0.5) / grid
    here_y, here_x = (axis.flatten() for axis in torch.meshgrid(centres, centres, indexing="ij"))
    offsets = [(own(mean_x) - here_x) / root, (own(mean_y) - here_y) / root]
    target = torch.stack([*offsets, 4 * root, *(own(each) for each in moments)], -1)
    return target.clamp(-4, 4), (most > 0.5) & (number > 0)


class DinoRecipe(Recipe):
    name = "pretrain dino"

    def __init__(self, pictures: BasePictures, settings: DinoSettings, origin: Mapping[str, Any]) -> None:
        check_sizes(settings.phases, settings.encoder.patch)
        torch.manual_seed(settings.seed)
        examples = LabelledPictures(pictures, settings.crop, settings.seed)
        self.words, table = pictures.words()
        super().__init__(settings, origin, examples, WordObjective(settings.encoder, table))
        self._rates = settings.rate, settings.matrix_rate, settings.decay

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return muon_and_adamw(self.objective, *self._rates)
