"""Episodic training of FS-DINO's segmenter (paper, sections 3.2 and 3.4.3, and 4.1).

An example is a class with k supports and a query. Encoder and adapter are frozen (the adapter trains with
`train_adapter`, the paper's other version); Dice + BCE on the prior mask and on the final mask (eqs. 6 to 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fssdeploy.data.dataset import IGNORE, Dataset
from fssdeploy.errors import InputError
from fssdeploy.images.geometry import PADDING_COLOUR
from fssdeploy.systems.fsdino import FSDino
from fssdeploy.training.augment import Augmentation, augment, resized
from fssdeploy.training.losses import dice_bce, overlap
from fssdeploy.training.recipe import Batch, Objective, Recipe, RunSettings, adamw
from fssdeploy.training.schedule import check_sizes


@dataclass(frozen=True, kw_only=True)
class EpisodicSettings(RunSettings):
    """Defaults are the paper's where it says something: AdamW, rate 1e-3, batch 8; docs/fsdino.md, choices 35, 36."""

    shot: int = 1
    augmentation: Augmentation = Augmentation()


class Episodes:
    """Examples: `support` uint8 (k, 3, S, S), `support_mask` (k, S, S), `query` (3, S, S), `query_mask` (S, S).

    Masks are uint8: 0, 1, and 255 for what is ignored in the query; in supports that is background.
    """

    def __init__(
        self, dataset: Dataset, fold: int, shot: int, augmentation: Augmentation, geometry: str, seed: int
    ) -> None:
        dataset.check_fold(fold)
        self.dataset, self.fold, self.shot = dataset, fold, shot
        self.augmentation, self.geometry, self.seed = augmentation, geometry, seed

    def _episode_number(self, position: int, attempt: int) -> int:
        # Episodes in place of unreadable ones come from a part of the stream that no run reaches otherwise.
        return position + attempt * 1_000_000_000

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        number = self._episode_number(position, attempt)
        episode = self.dataset.episode(self.fold, "train", self.shot, self.seed, number)
        rng = np.random.default_rng([self.seed, number, 1])
        shown = [self._prepare(item, episode.class_index, size, rng) for item in (episode.query, *episode.support)]
        pictures = torch.stack([torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture, _ in shown])
        masks = torch.stack([torch.from_numpy(mask.copy()) for _, mask in shown])
        return {"query": pictures[0], "query_mask": masks[0], "support": pictures[1:], "support_mask": masks[1:]}

    def describe(self, position: int, attempt: int) -> str:
        number = self._episode_number(position, attempt)
        episode = self.dataset.episode(self.fold, "train", self.shot, self.seed, number)
        return f"{self.dataset.class_names[episode.class_index]}: {episode.query} from {', '.join(episode.support)}"

    def _prepare(
        self, item: str, class_index: int, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        picture, mask = self.dataset.load(item, class_index)
        if not (mask == 1).any():
            raise InputError("mask_empty", f"'{item}' shows nothing of its class")
        turned, changed = augment(picture, mask, self.augmentation, rng, IGNORE)
        if not (changed == 1).any():  # the object was moved out of the picture
            turned, changed = picture, mask
        if self.geometry == "letterbox":
            turned, changed = _square(turned, changed)
        return resized(turned, changed, size)


def _square(picture: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Padded at the right or the bottom, as `geometry: letterbox` does at deployment."""
    height, width = mask.shape
    side = max(height, width)
    padded = np.full((side, side, 3), PADDING_COLOUR, np.uint8)
    padded[:height, :width] = picture
    labels = np.full((side, side), IGNORE, np.uint8)
    labels[:height, :width] = mask
    return padded, labels


class EpisodicObjective(Objective):
    def __init__(self, model: FSDino) -> None:
        super().__init__()
        self.model = model
        model.freeze()
        # Parts that no loss reaches: other mask tokens and the quality head of SAM's decoder.
        model.decoder.iou_prediction_head.requires_grad_(False)
        for unused in list(model.decoder.output_hypernetworks_mlps)[1:]:
            unused.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        model, masks = self.model, batch["support_mask"]
        count, shots, size = masks.shape[0], masks.shape[1], masks.shape[-1]
        pictures = torch.cat([batch["query"], batch["support"].flatten(0, 1)])
        with torch.set_grad_enabled(model.config.train_adapter and torch.is_grad_enabled()):
            tokens, embedding = model.encode(pictures)
        state = model.enroll(tokens[count:], (masks.flatten(0, 1) == 1).float().unsqueeze(1))
        state = {name: each.unflatten(0, (count, shots)).mean(1) for name, each in state.items()}
        logits, prior = model.segment(tokens[:count], embedding[:count], state)
        full = [F.interpolate(each.float(), size=(size, size), mode="bilinear") for each in (logits, prior)]
        truth = batch["query_mask"]
        final, first = (dice_bce(each.squeeze(1), truth).mean() for each in full)
        return {
            "loss": final + first,
            "final": final,
            "prior": first,
            "miou": overlap(full[0].squeeze(1) > 0, truth),
        }


class EpisodicRecipe(Recipe):
    name = "train fsdino"
    schedule = "poly"

    def __init__(
        self, dataset: Dataset, fold: int, model: FSDino, settings: EpisodicSettings, origin: Mapping[str, Any]
    ) -> None:
        check_sizes(settings.phases, model.config.encoder.patch, model.config.image_size)
        examples = Episodes(dataset, fold, settings.shot, settings.augmentation, model.config.geometry, settings.seed)
        super().__init__(settings, {**origin, "config": model.config.to_dict()}, examples, EpisodicObjective(model))
        self._learn = partial(adamw, list(model.parameters()), settings.rate, settings.decay)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self._learn()]
