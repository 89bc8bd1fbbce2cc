"""What every few-shot data set offers: classes in folds, pictures by class, a picture and the mask of a class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fssdeploy.data.episodes import Episode, draw_episode
from fssdeploy.errors import InputError

Split = Literal["train", "test"]
IGNORE = 255

# Pictures of each class, by class index; a picture that shows several classes stands under each of them.
Listing = Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """One line of ``fssdeploy data check``: what was looked at, how it is, and where to get what is missing.

    `state`: ``"ok"``, ``"note"`` (usable, but worth knowing) or ``"missing"`` (cannot be used like this).
    """

    what: str
    state: Literal["ok", "note", "missing"]
    detail: str = ""
    source: str = ""


@dataclass(frozen=True)
class Regions:
    """A picture with the classes that a split knows in it: what encoders are pre-trained on.

    `picture` uint8 (H, W, 3); `classes` int64 (H, W), class index, -1 for none of them, -2 to be ignored; `objects`
    bool (H, W) each, what a promptable network learns to cut out.
    """

    picture: np.ndarray
    classes: np.ndarray
    objects: Sequence[np.ndarray]


class Dataset(ABC):
    """A data set on disk (or made up: shapes-5i). Opening one reads lists and annotations, not pictures.

    `items` are names the data set gives its pictures; they mean nothing elsewhere. A class is an index into
    `class_names`. In fold f, the *novel* classes are tested (split ``"test"``) and the others, the *base* classes, are
    trained on (split ``"train"``).
    """

    name: str
    folds: int = 1
    class_names: Sequence[str]
    # How the field draws a test episode here: a class first, or one of all (picture, class) pairs.
    uniform_over: Literal["classes", "pictures"] = "classes"
    # Test episodes of the published protocol.
    test_episodes: int = 1000
    # Facts of this copy that a report must state: lists derived instead of read, an unusual split, ...
    notes: Sequence[str] = ()

    @abstractmethod
    def classes(self, fold: int, split: Split) -> Sequence[int]:
        """Novel classes of a fold (``"test"``) or its base classes (``"train"``), ascending."""

    @abstractmethod
    def listing(self, fold: int, split: Split) -> Listing:
        """Items of every class of ``classes(fold, split)``, in a fixed order."""

    @abstractmethod
    def picture(self, item: str) -> np.ndarray:
        """The picture, uint8 RGB (height, width, 3). InputError if it is missing or damaged."""

    @abstractmethod
    def mask(self, item: str, class_index: int) -> np.ndarray:
        """Where the class is: uint8 (height, width), 0 elsewhere, 1 the class, 255 to be ignored."""

    @abstractmethod
    def check(self) -> list[Finding]:
        """What is there, what is missing and where it comes from; counts against the published lists."""

    def load(self, item: str, class_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture and mask. InputError if they differ in size or the mask holds other values than 0, 1, 255."""
        picture, mask = self.picture(item), self.mask(item, class_index)
        what = f"the mask of '{self.class_names[class_index]}' in '{item}'"
        if picture.shape[:2] != mask.shape:
            sizes = f"{mask.shape[0]} x {mask.shape[1]}, its picture {picture.shape[0]} x {picture.shape[1]}"
            raise InputError("mask_size", f"{what} does not fit its picture", f"it is {sizes} (height x width)")
        values = np.unique(mask)
        if not np.isin(values, (0, 1, IGNORE)).all():
            raise InputError("mask_values", f"{what} holds {values.tolist()}", "a mask holds 0, 1 and 255 (ignored)")
        return picture, mask

    def regions(self, item: str, classes: Sequence[int]) -> Regions:
        """Some classes in one picture. Where two meet, the later one counts; their masks are the objects."""
        picture = self.picture(item)
        found = np.full(picture.shape[:2], -1, np.int64)
        objects = []
        for index in classes:
            _, mask = self.load(item, index)
            found[mask == IGNORE] = -2
            found[mask == 1] = index
            if (mask == 1).any():
                objects.append(mask == 1)
        return Regions(picture, found, objects)

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        """Episode `index` of the stream of a seed; it depends on nothing else. InputError as `draw_episode`."""
        return draw_episode(self.listing(fold, split), self.uniform_over, shot, (seed, index), self.class_names)

    def test_list(self, fold: int, shot: int, count: int | None, seed: int) -> list[Episode]:
        """The test episodes of a fold; `count` defaults to that of the published protocol."""
        total = self.test_episodes if count is None else count
        return [self.episode(fold, "test", shot, seed, index) for index in range(total)]

    def check_fold(self, fold: int) -> None:
        """InputError unless the fold exists."""
        if not 0 <= fold < self.folds:
            raise InputError(
                "fold_unknown",
                f"{self.name} has no fold {fold}",
                "",
                f"Choose 0{f' to {self.folds - 1}' if self.folds > 1 else ''}.",
            )


def blocks(count: int, folds: int, fold: int, split: Split) -> list[int]:
    """Classes in consecutive blocks, fold f tests block f: PASCAL-5i, iSAID-5i, shapes-5i."""
    size = count // folds
    novel = range(fold * size, (fold + 1) * size)
    return [index for index in range(count) if (index in novel) == (split == "test")]


def interleaved(count: int, folds: int, fold: int, split: Split) -> list[int]:
    """Every `folds`-th class, starting with `fold`, is tested: COCO-20i, LVIS-92i."""
    return [index for index in range(count) if (index % folds == fold) == (split == "test")]
