"""Pre-training a small DINOv2-style encoder on the base classes of a fold.

The published encoders are self-distilled on 142 million pictures; nothing of that kind is at hand for ours. It learns
from what a fold gives: dense labels of its base classes. Every patch predicts the words in the name of the class it
shows ("striped disc": two words), so that classes which share a word share evidence and a new combination of known
words lies between its parts. Where every class name is one word this is plain classification.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoVisionTransformer, ViTConfig
from fssdeploy.training.augment import Crop, crop
from fssdeploy.training.initialise import initialise, mimetic
from fssdeploy.training.pictures import BasePictures
from fssdeploy.training.recipe import Batch, Objective, muon_and_adamw
from fssdeploy.training.schedule import Phase, check_sizes

NOTHING, IGNORED = 254, 255


@dataclass(frozen=True)
class DinoSettings:
    encoder: ViTConfig
    phases: tuple[Phase, ...] = (Phase(4000, 16, 182),)
    rate: float = 1e-3
    matrix_rate: float = 0.02
    decay: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "bf16"
    ema: float = 0.998
    seed: int = 0
    crop: Crop = Crop()


class LabelledPictures:
    """Examples: `picture` uint8 (3, S, S) and `labels` uint8 (S, S), class index, 254 none, 255 ignored."""

    def __init__(self, pictures: BasePictures, how: Crop, seed: int) -> None:
        self.pictures, self.how, self.seed = pictures, how, seed

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed, position, attempt])
        regions = self.pictures.regions(self.pictures.draw(rng))
        labels = regions.classes.copy()
        labels[labels == -1], labels[labels == -2] = NOTHING, IGNORED
        picture, labels = crop(regions.picture, labels.astype(np.uint8), self.how, size, rng)
        return {
            "picture": torch.from_numpy(picture.transpose(2, 0, 1).copy()),
            "labels": torch.from_numpy(labels.copy()),
        }

    def describe(self, position: int, attempt: int) -> str:
        return self.pictures.draw(np.random.default_rng([self.seed, position, attempt]))


class WordObjective(Objective):
    table: torch.Tensor

    def __init__(self, config: ViTConfig, table: np.ndarray) -> None:
        """`table` bool (classes, words)."""
        super().__init__()
        self.encoder = DinoVisionTransformer(config)
        initialise(self.encoder)
        mimetic(self.encoder)
        self.head = nn.Linear(config.dim, table.shape[1] + 1)
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
        _, tokens = self.encoder((picture.float() / 255 - mean) / std, 0)
        with torch.autocast(picture.device.type, enabled=False):
            logits = self.head(tokens.float())
        truth = label_counts(labels, self.encoder.config.patch) @ self.table
        known = truth.sum(-1)
        loss = -(truth * logits.log_softmax(-1)).sum(-1)
        inside = truth[..., :-1].sum(-1) > 0.5
        named = truth[..., :-1] > 0.25 * known.unsqueeze(-1)
        # Of the words that are to be named, how many are among as many of the likeliest.
        order = logits[..., :-1].argsort(-1, descending=True).argsort(-1)
        hits = ((order < named.sum(-1, keepdim=True)) & named).sum(-1) / named.sum(-1).clamp_min(1)
        return {
            "loss": (loss.sum(1) / known.sum(1).clamp_min(1)).mean(),
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


class DinoRecipe:
    name = "pretrain dino"
    schedule = "warmup_cosine"
    schedule_per_phase = False

    def __init__(self, pictures: BasePictures, settings: DinoSettings, origin: dict[str, Any]) -> None:
        """`origin`: what the pictures are (data set, fold, ...), for the record of the run."""
        torch.manual_seed(settings.seed)
        self._settings, self._origin = settings, origin
        self.phases = settings.phases
        check_sizes(settings.phases, settings.encoder.patch)
        self.clip, self.accumulate, self.precision = settings.clip, settings.accumulate, settings.precision
        self.ema, self.seed = settings.ema, settings.seed
        self.examples = LabelledPictures(pictures, settings.crop, settings.seed)
        words, table = pictures.words()
        self.words = words
        self.objective = WordObjective(settings.encoder, table)

    def settings(self) -> dict[str, Any]:
        return {"recipe": self.name, **self._origin, **asdict(self._settings)}

    def optimisers(self) -> list[torch.optim.Optimizer]:
        settings = self._settings
        return muon_and_adamw(self.objective, settings.rate, settings.matrix_rate, settings.decay)

    def enter(self, phase: int) -> None:
        """Nothing changes between phases but the size of the pictures."""
