"""Pre-training a small DINOv2-style encoder on the base classes of a fold.

The published encoders are self-distilled on 142 million pictures; nothing of that kind is at hand for ours. It learns
from what a fold gives: dense labels of its base classes. Every patch predicts the words in the name of the class it
shows ("striped disc": two words), so that classes which share a word share evidence and a new combination of known
words lies between its parts. Where every class name is one word this is plain multi-label classification.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoVisionTransformer, ViTConfig
from fssdeploy.training.augment import Crop, crop
from fssdeploy.training.pictures import BasePictures
from fssdeploy.training.recipe import Batch, Objective, muon_and_adamw
from fssdeploy.training.schedule import Phase

NOTHING, IGNORED = 254, 255


@dataclass(frozen=True)
class DinoSettings:
    encoder: ViTConfig
    phases: tuple[Phase, ...] = (Phase(6000, 16, 182),)
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
        self.head = nn.Linear(config.dim, table.shape[1] + 1)
        # Rows 254 and 255 exist so that label maps index it directly; the last column says "any class".
        rows = np.zeros((256, table.shape[1] + 1), np.float32)
        rows[: len(table), :-1] = table
        rows[: len(table), -1] = table.any(1)
        self.register_buffer("table", torch.from_numpy(rows), persistent=False)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        picture, labels = batch["picture"], batch["labels"].long()
        mean = torch.tensor(IMAGENET_MEAN, device=picture.device).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=picture.device).view(1, 3, 1, 1)
        _, tokens = self.encoder((picture.float() / 255 - mean) / std, 0)
        with torch.autocast(picture.device.type, enabled=False):
            logits = self.head(tokens.float())
        counts = label_counts(labels, self.encoder.config.patch)
        truth = counts @ self.table
        known = 1 - counts[..., IGNORED]
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(-1)
        inside = (truth[..., -1] > 0.5) & (known > 0.5)
        right = ((logits[..., :-1] > 0) == (truth[..., :-1] > 0.5)).all(-1)
        return {
            "loss": (loss * known).sum(1).div(known.sum(1).clamp_min(1)).mean(),
            "right": (right & inside).sum() / inside.sum().clamp_min(1),
            "objects": ((logits[..., -1] > 0) == (truth[..., -1] > 0.5)).float().mean(),
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


def initialise(encoder: nn.Module) -> None:
    """Start values that train from scratch: DINOv2's LayerScale of 1e-5 needs far longer runs than ours."""
    for name, parameter in encoder.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
        elif "rel_pos" in name:
            nn.init.zeros_(parameter)
        elif "embed" in name or "token" in name:
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=parameter[0].numel() ** -0.5)
