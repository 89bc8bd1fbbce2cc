"""The pictures of a data set's base classes, for pre-training and distillation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fssdeploy.data.dataset import Dataset, Regions
from fssdeploy.errors import InputError


class BasePictures:
    """Every training picture of a fold once, with the base classes it is listed under."""

    def __init__(self, dataset: Dataset, fold: int, limit: int | None = None) -> None:
        """`limit`: use only so many pictures, chosen evenly over the list. InputError if none are left."""
        dataset.check_fold(fold)
        self.dataset = dataset
        self.classes = list(dataset.classes(fold, "train"))
        shown: dict[str, list[int]] = {}
        for index, items in dataset.listing(fold, "train").items():
            for item in items:
                shown.setdefault(item, []).append(index)
        self.items = sorted(shown)
        if not self.items or (limit is not None and limit < 1):
            why = f"{len(self.items)} pictures show base classes of fold {fold}, {limit or 'all'} were asked for"
            raise InputError("no_pictures", "there is no picture to train on", why)
        if limit is not None and limit < len(self.items):
            self.items = [self.items[each] for each in np.linspace(0, len(self.items) - 1, limit).astype(int)]
        self.shown = {item: shown[item] for item in self.items}

    def draw(self, rng: np.random.Generator) -> str:
        """One item, all equally likely."""
        return self.items[int(rng.integers(len(self.items)))]

    def regions(self, item: str) -> Regions:
        return self.dataset.regions(item, self.shown[item])

    def words(self) -> tuple[list[str], np.ndarray]:
        """The words in the names of the base classes, and which class has which: bool (all classes, words)."""
        names: Sequence[str] = self.dataset.class_names
        words = sorted({word for each in self.classes for word in names[each].split()})
        table = np.zeros((len(names), len(words)), bool)
        for each in self.classes:
            for word in names[each].split():
                table[each, words.index(word)] = True
        return words, table


class RandomPictures:
    """Examples that show one picture each, drawn anew every time; a subclass says what is made of it."""

    def __init__(self, pictures: BasePictures, seed: int) -> None:
        self.pictures, self.seed = pictures, seed

    def start(self, position: int, attempt: int) -> tuple[np.random.Generator, str]:
        """The generator of an example, and the item that it drew first."""
        rng = np.random.default_rng([self.seed, position, attempt])
        return rng, self.pictures.draw(rng)

    def describe(self, position: int, attempt: int) -> str:
        return self.start(position, attempt)[1]
