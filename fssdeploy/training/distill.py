"""Coarse-to-fine distillation of SAM's image encoder into FS-DINO's bottleneck adapter (paper, section 3.3.2).

Only the adapter learns; DINOv2 stays as it is. The adapter's output, resized to the teacher's grid, is compared with
the teacher's embedding by the mean squared error (docs/fsdino.md, choices 11 to 13), over phases of growing picture
size: 126, 252, 518 in the paper. The teacher sees every picture at its own full size, so its features are computed once
and kept on disk.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fssdeploy.files import made_folder, write_atomic
from fssdeploy.modules.sam import Sam
from fssdeploy.systems.fsdino import FSDino
from fssdeploy.training.augment import resized
from fssdeploy.training.pictures import BasePictures
from fssdeploy.training.recipe import Batch, Objective, Recipe, RunSettings, adamw
from fssdeploy.training.schedule import check_sizes
from fssdeploy.weights.provenance import fingerprint


class TeacherCache:
    """Embeddings of the teacher, float16, by picture content and teacher weights; in memory the last ones used."""

    def __init__(self, folder: Path, teacher: str, kept: int = 2000) -> None:
        """`teacher` is the fingerprint of its weights and configuration."""
        self.folder = folder / teacher[:16]
        self.kept = kept
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()

    @staticmethod
    def key(picture: np.ndarray) -> str:
        """Of the picture's content: another file with the same pixels has the same features."""
        return hashlib.sha256(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()

    def get(self, key: str) -> np.ndarray | None:
        """The embedding (out, g, g), or None if it is not there or damaged."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        try:
            return self._keep(key, np.load(self.folder / f"{key}.npy"))
        except (OSError, ValueError, EOFError):
            return None

    def put(self, key: str, embedding: np.ndarray) -> np.ndarray:
        """Store and return it. MachineError if the disk is full."""
        # In the order that reading it back gives, so that sums over it come out the same.
        kept = np.ascontiguousarray(embedding, dtype=np.float16)
        stream = io.BytesIO()
        np.save(stream, kept)
        with made_folder(self.folder):
            write_atomic(self.folder / f"{key}.npy", stream.getvalue())
        return self._keep(key, kept)

    def _keep(self, key: str, embedding: np.ndarray) -> np.ndarray:
        self._recent[key] = embedding
        if len(self._recent) > self.kept:
            self._recent.popitem(last=False)
        return embedding


class TeacherPictures:
    """Examples: `picture` uint8 (3, S, S) for the student, `full` uint8 (3, T, T) for the teacher, `item`, its number.

    Epochs: every picture is seen once before any is seen again, in an order that the seed and the epoch give.
    """

    def __init__(self, pictures: BasePictures, teacher_size: int, seed: int) -> None:
        self.pictures, self.teacher_size, self.seed = pictures, teacher_size, seed

    def _number(self, position: int, attempt: int) -> int:
        count = len(self.pictures.items)
        if attempt:  # in place of a picture that cannot be read
            return int(np.random.default_rng([self.seed, position, attempt]).integers(count))
        epoch, rank = divmod(position, count)
        return int(np.random.default_rng([self.seed, epoch]).permutation(count)[rank])

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        number = self._number(position, attempt)
        picture = self.pictures.dataset.picture(self.pictures.items[number])
        blank = np.zeros(picture.shape[:2], np.uint8)
        small, _ = resized(picture, blank, size)
        full, _ = resized(picture, blank, self.teacher_size)
        return {
            "picture": torch.from_numpy(small.transpose(2, 0, 1).copy()),
            "full": torch.from_numpy(full.transpose(2, 0, 1).copy()),
        }

    def describe(self, position: int, attempt: int) -> str:
        return self.pictures.items[self._number(position, attempt)]


class DistillObjective(Objective):
    """The student is part of it, the teacher is not: a checkpoint of the run holds no teacher."""

    def __init__(self, student: FSDino, teacher: Sam, cache: TeacherCache) -> None:
        super().__init__()
        self.student = student.requires_grad_(False)
        self.student.adapter.requires_grad_(True)
        self._teacher = [teacher.eval().requires_grad_(False)]
        self._cache = cache

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        target = self._targets(batch["full"])
        _, embedding = self.student.encode(batch["picture"])
        fitted = F.interpolate(embedding.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.mse_loss(fitted, target)
        # How much of the teacher's variance is still missing: 1 is as good as its mean.
        spread = (target - target.mean((0, 2, 3), keepdim=True)).square().mean()
        return {"loss": loss, "unexplained": loss / spread.clamp_min(1e-12)}

    @torch.no_grad()
    def _targets(self, pictures: torch.Tensor) -> torch.Tensor:
        teacher = self._teacher[0].to(pictures.device)
        keys = [TeacherCache.key(each) for each in pictures.cpu().numpy()]
        found = [self._cache.get(key) for key in keys]
        missing = [index for index, each in enumerate(found) if each is None]
        if missing:
            with torch.autocast(pictures.device.type, enabled=False):
                computed = teacher.encode(pictures[missing]).float().cpu().numpy()
            for index, embedding in zip(missing, computed, strict=True):
                found[index] = self._cache.put(keys[index], embedding)
        stacked = np.stack([each for each in found if each is not None]).astype(np.float32)
        return torch.from_numpy(stacked).to(pictures.device)


class DistillRecipe(Recipe):
    """The weights are carried over from size to size; the rate falls within each (docs/fsdino.md, choice 13)."""

    name = "distill fsdino"
    schedule = "cosine"
    schedule_per_phase = True

    def __init__(
        self,
        pictures: BasePictures,
        student: FSDino,
        teacher: Sam,
        cache: Path,
        settings: RunSettings,
        origin: Mapping[str, Any],
    ) -> None:
        check_sizes(settings.phases, student.config.encoder.patch)
        identity = fingerprint(teacher, asdict(teacher.config), ("image_encoder.",))
        examples = TeacherPictures(pictures, teacher.config.image_size, settings.seed)
        objective = DistillObjective(student, teacher, TeacherCache(cache, identity))
        origin = {**origin, "teacher": identity, "config": student.config.to_dict()}
        super().__init__(settings, origin, examples, objective)
        self._learn = partial(adamw, list(student.adapter.parameters()), settings.rate, settings.decay)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self._learn()]
