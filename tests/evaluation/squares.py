"""A data set of coloured squares, and things that find them: enough to know every number beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fssdeploy.data.dataset import IGNORE, Dataset, Finding, Listing, Split, blocks
from fssdeploy.data.episodes import Episode, EpisodeList
from fssdeploy.errors import InputError
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
PICTURES = 6
CANVAS, PATCH = 32, 4
GRID = CANVAS // PATCH


class Squares(Dataset):
    """Item ``CLASS-N``: a square of the class, one of the next class, a grey ground; the border of the first is 255."""

    name = "squares"
    folds = 2
    class_names = tuple(COLOURS)
    test_episodes = 8
    notes = ("squares are drawn, not read",)

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.read: list[str] = []

    def classes(self, fold: int, split: Split) -> Sequence[int]:
        self.check_fold(fold)
        return blocks(len(COLOURS), self.folds, fold, split)

    def listing(self, fold: int, split: Split) -> Listing:
        return {each: [f"{each}-{number}" for number in range(PICTURES)] for each in self.classes(fold, split)}

    def picture(self, item: str) -> np.ndarray:
        self.read.append(item)
        if item in self.broken:
            raise InputError("picture_damaged", f"'{item}' cannot be decoded", "it is truncated", "Copy it again.")
        labels = self._labels(item)
        colours = np.array([(90, 90, 90), *COLOURS.values()], np.uint8)
        return colours[labels]

    def mask(self, item: str, class_index: int) -> np.ndarray:
        found = (self._labels(item) == class_index + 1).astype(np.uint8)
        rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        if rows.size:
            found[rows[0], columns[0] : columns[-1] + 1] = IGNORE
        return found

    def check(self) -> list[Finding]:
        return []

    def _labels(self, item: str) -> np.ndarray:
        index, number = map(int, item.split("-"))
        labels = np.zeros((40, 48), np.uint8)
        side = 8 + 2 * number
        labels[2 + number : 2 + number + side, 3 : 3 + side] = index + 1
        labels[20:30, 34:44] = (index + 1) % len(COLOURS) + 1
        return labels


class Clip(Squares):
    """The squares as two videos of two objects each: red and green in one, blue and yellow in the other."""

    folds = 1

    def target(self, class_index: int) -> tuple[str, int]:
        return ("first", "second")[class_index // 2], class_index % 2 + 1

    def scored(self, episode: Episode) -> bool:
        return episode.query not in ("0-0", "0-5")


class ColourPredictor:
    """Finds what is nearer than `reach` to the mean colour of the object; counts its calls, may be made to stop."""

    name = "colour"

    def __init__(self, reach: float = 60, stop_at: int | None = None) -> None:
        self.reach = reach
        self.fingerprint = f"colour {reach}"
        self.calls = 0
        self._stop_at = stop_at

    def describe(self) -> dict[str, Any]:
        return {}

    def scores(self, supports: Sequence[tuple[np.ndarray, np.ndarray]], query: np.ndarray, key: str) -> np.ndarray:
        if self.calls == self._stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        if not all(mask.any() for _, mask in supports):
            raise InputError("mask_empty", "a mask marks nothing")
        colour = np.mean([picture[mask].mean(0) for picture, mask in supports], 0)
        return self.reach - np.linalg.norm(query - colour, axis=-1)

    def predict(self, supports: Sequence[tuple[np.ndarray, np.ndarray]], query: np.ndarray, key: str) -> np.ndarray:
        return self.scores(supports, query, key) > 0


class ColourEngine:
    """Tokens are mean colours of cells, centred; a class is its mean token."""

    name = "colours"

    def __init__(self) -> None:
        tokens = TensorSpec("tokens", "float32", (BATCH, GRID * GRID, 3))
        prototype = TensorSpec("prototype", "float32", (BATCH, 3))
        maps = (BATCH, 1, GRID, GRID)
        self.specs = {
            "encoder": StageSpec("encoder", (TensorSpec("picture", "uint8", (BATCH, 3, CANVAS, CANVAS)),), (tokens,)),
            "enroll": StageSpec(
                "enroll", (tokens, TensorSpec("mask", "float32", (BATCH, 1, CANVAS, CANVAS))), (prototype,)
            ),
            "segment": StageSpec(
                "segment",
                (tokens, prototype),
                (TensorSpec("mask_logits", "float32", maps), TensorSpec("prior_logits", "float32", maps)),
            ),
        }
        self.encoded = 0

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.specs[stage].check(inputs)
        if stage == "encoder":
            self.encoded += len(inputs["picture"])
            cells = inputs["picture"].reshape(-1, 3, GRID, PATCH, GRID, PATCH).mean((3, 5), dtype=np.float32) - 90
            return {"tokens": np.ascontiguousarray(cells.reshape(-1, 3, GRID * GRID).swapaxes(1, 2))}
        if stage == "enroll":
            weight = inputs["mask"].reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(-1, 1, GRID * GRID)
            return {"prototype": (weight @ inputs["tokens"])[:, 0] / weight.sum(2)}
        distance = np.linalg.norm(inputs["tokens"] - inputs["prototype"][:, None], axis=2)
        logits = (70 - distance).reshape(-1, 1, GRID, GRID)
        return {"mask_logits": logits, "prior_logits": logits}

    def describe(self) -> dict[str, Any]:
        return {"runtime": self.name, "threads": 1}


def colour_system(geometry: str = "squash") -> StagedSystem:
    engine = ColourEngine()
    preprocessing = {"canvas": CANVAS, "patch": PATCH, "geometry": geometry}
    return StagedSystem("colours", engine.specs, engine, preprocessing, "f" * 64)


def episode_list(dataset: Squares, fold: int = 0, shot: int = 1, seed: int = 0, count: int = 8) -> EpisodeList:
    return EpisodeList(dataset.name, fold, shot, seed, tuple(dataset.test_list(fold, shot, count, seed)))
