"""Pre-training a small DINOv2-style encoder on the base classes of a fold.

The published encoders are self-distilled on 142 million pictures; nothing of that kind is at hand for ours. It learns
from what a fold gives: dense labels of its base classes. Every patch tells the words in the name of the class it shows
("striped disc": two words), so that classes which share a word share evidence and a new combination of known words lies
between its parts. Where every class name is one word this is plain classification.

Words are told by the cosine of a token with a vector for each, because few-shot matching compares tokens by cosine:
what no word explains must leave them. That some words never go together among the base classes is no evidence
(`rivals`); it would teach the network that a novel combination cannot be. Besides, tokens of an earlier block tell
where their object lies and draw its outline, whatever its class: words alone teach outlines slowly.
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
# Every token draws its object on so many cells along a side, in a window of so many times the root of its area.
CELLS, WINDOW = 12, 2.0
OUTLINE_WEIGHT = 4.0
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


def rivals(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every word of every class, from which words it is to be told.

    Words that take each other's place in names ("plain" and "striped", of which each goes with "ring") are told from
    each other, not from words for other properties. And only where both combinations are known: with a "striped disc"
    but no "plain disc", a patch of striped disc says nothing against "plain", since a class that nobody has shown may
    have that name. From words that have to do with neither it is told, too.

    table bool (classes, words) -> class (P,), word (P,), and told from which words, bool (P, words).
    """
    names = {frozenset(np.flatnonzero(row).tolist()) for row in table} - {frozenset()}
    contexts: dict[int, set[frozenset[int]]] = {word: set() for word in range(table.shape[1])}
    for name in names:
        for word in name:
            contexts[word].add(name - {word})
    exchangeable = {word: {other for other in contexts if contexts[word] & contexts[other]} for word in contexts}
    classes, words = np.nonzero(table)
    told = np.ones((len(words), table.shape[1]), bool)
    for row, (index, word) in enumerate(zip(classes.tolist(), words.tolist(), strict=True)):
        name = frozenset(np.flatnonzero(table[index]).tolist())
        rest = name - {word}
        unknown = {other for other in exchangeable[word] if rest | {other} not in names}
        told[row, list(name.union(unknown, *(exchangeable[each] for each in rest)))] = False
    return classes, words, told


class WordObjective(Objective):
    candidates: torch.Tensor
    meant: torch.Tensor
    shares: torch.Tensor
    named: torch.Tensor

    def __init__(self, config: ViTConfig, table: np.ndarray) -> None:
        """`table` bool (classes, words)."""
        super().__init__()
        self.encoder = DinoVisionTransformer(config)
        initialise(self.encoder)
        mimetic(self.encoder)
        self.words = nn.Parameter(torch.randn(table.shape[1] + 1, config.dim))
        # Leaves the last third of the blocks to turn outlines into words.
        self.tap = 2 * config.depth // 3 - 1
        self.geometry = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, 3 + CELLS**2))
        classes, words, told = rivals(table)
        rows = np.arange(len(words))
        # One row for every word of every class: the candidates are the word and its rivals.
        told[rows, words] = True
        self.register_buffer("candidates", torch.from_numpy(told), persistent=False)
        self.register_buffer("meant", torch.from_numpy(words), persistent=False)
        # From labels to rows; 255 and 254 have no part in them.
        shares = np.zeros((256, len(words)), np.float32)
        shares[classes, rows] = 1
        self.register_buffer("shares", torch.from_numpy(shares), persistent=False)
        named = np.zeros((256, table.shape[1]), np.float32)
        named[: len(table)] = table
        self.register_buffer("named", torch.from_numpy(named), persistent=False)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        picture, labels = batch["picture"], batch["labels"].long()
        mean = torch.tensor(IMAGENET_MEAN, device=picture.device).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=picture.device).view(1, 3, 1, 1)
        early, tokens = self.encoder((picture.float() / 255 - mean) / std, self.tap, tap_norm=False)
        with torch.autocast(picture.device.type, enabled=False):
            cosines = F.normalize(tokens.float(), dim=-1) @ F.normalize(self.words, dim=-1).T
            place, outline = self.geometry(early.float()).split([3, CELLS**2], -1)
        logits = SHARPNESS * cosines[..., :-1]
        # Whether there is nothing is a question of its own: in one softmax with the words, what takes a patch away from
        # "nothing" would be shared by the words that go with its other word, and by no others.
        nothing = SHARPNESS * (2 * cosines[..., -1] - 1)
        counts = label_counts(labels, self.encoder.config.patch)
        empty, known = counts[..., NOTHING], 1 - counts[..., IGNORED]
        surprise = (
            logits.unsqueeze(-2).masked_fill(~self.candidates, -torch.inf).logsumexp(-1) - logits[..., self.meant]
        )
        loss = (counts @ self.shares * surprise).sum(-1)
        loss = loss + empty * F.softplus(-nothing) + (known - empty) * F.softplus(nothing)
        true_place, true_outline, sure = object_geometry(batch["objects"].long(), self.encoder.config.patch)
        off = F.smooth_l1_loss(place, true_place, reduction="none").sum(-1)
        drawn = F.binary_cross_entropy_with_logits(outline, true_outline, reduction="none").mean(-1)
        shown = sure.sum(1).clamp_min(1)
        placed, outlined = (((each * sure).sum(1) / shown).mean() for each in (off, drawn))
        inside = known - empty > 0.5
        named = counts @ self.named > 0.25
        # Of the words that are to be named, how many are among as many of the likeliest.
        order = logits.argsort(-1, descending=True).argsort(-1)
        hits = ((order < named.sum(-1, keepdim=True)) & named).sum(-1) / named.sum(-1).clamp_min(1)
        return {
            "loss": (loss.sum(1) / known.sum(1).clamp_min(1)).mean() + placed + OUTLINE_WEIGHT * outlined,
            "place": placed,
            "outline": outlined,
            "words": (hits * inside).sum() / inside.sum().clamp_min(1),
            "objects": ((nothing < 0) == inside).float().mean(),
        }


def label_counts(labels: torch.Tensor, patch: int) -> torch.Tensor:
    """Share of every label in every patch: int64 (B, S, S) of 0..255 -> float32 (B, (S / patch)^2, 256)."""
    batch, side, _ = labels.shape
    grid = side // patch
    rows = torch.arange(side, device=labels.device) // patch
    cells = rows[:, None] * grid + rows + torch.arange(batch, device=labels.device)[:, None, None] * grid * grid
    counts = torch.bincount((cells * 256 + labels).flatten(), minlength=batch * grid * grid * 256)
    return counts.view(batch, grid * grid, 256).float() / patch**2


def object_geometry(objects: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the object of every patch lies and how it looks, and whether one object fills most of the patch.

    objects int64 (B, S, S), 0 for none -> place float32 (B, N, 3): from the patch to the object's centre (x, y), in
    units of the root of its area, and four times that root as a share of S; outline float32 (B, N, CELLS^2), the share
    of the object in every cell of a window of WINDOW roots around its centre; bool (B, N).
    """
    batch, side, _ = objects.shape
    grid = side // patch
    shares = label_counts(objects.clamp_max(MOST_OBJECTS - 1), patch)[..., :MOST_OBJECTS]
    # Every other pixel of every other row is enough, at a quarter of the cost.
    few = objects[:, ::2, ::2].clamp_max(MOST_OBJECTS - 1)
    masks = (few.unsqueeze(1) == torch.arange(MOST_OBJECTS, device=objects.device).view(1, -1, 1, 1)).float()
    at = (torch.arange(few.shape[-1], device=objects.device) * 2 + 1) / side
    area = masks.mean((2, 3)).clamp_min(1e-6)
    root = area.sqrt()
    x, y = ((masks.mean(axis) * at).mean(-1) / area for axis in (2, 3))
    # Two samples for a cell each way, then their mean.
    steps = ((torch.arange(2 * CELLS, device=objects.device) + 0.5) / (2 * CELLS) - 0.5) * WINDOW
    reach = root.flatten().view(-1, 1, 1) * steps
    samples = torch.stack(
        [
            (x.flatten().view(-1, 1, 1) + reach).expand(-1, 2 * CELLS, -1),
            (y.flatten().view(-1, 1, 1) + reach).transpose(1, 2).expand(-1, -1, 2 * CELLS),
        ],
        -1,
    )
    seen = F.grid_sample(masks.flatten(0, 1).unsqueeze(1), samples * 2 - 1, align_corners=False)
    outlines = F.avg_pool2d(seen, 2).view(batch, MOST_OBJECTS, CELLS**2)
    most, number = shares.max(-1)
    centres = (torch.arange(grid, device=objects.device) + 0.5) / grid
    here_y, here_x = (axis.flatten() for axis in torch.meshgrid(centres, centres, indexing="ij"))
    own_x, own_y, own_root = (each.gather(1, number) for each in (x, y, root))
    place = torch.stack([(own_x - here_x) / own_root, (own_y - here_y) / own_root, 4 * own_root], -1)
    own_outline = outlines.gather(1, number.unsqueeze(-1).expand(-1, -1, CELLS**2))
    return place.clamp(-4, 4), own_outline, (most > 0.5) & (number > 0)


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
