"""Cross-domain sets as PATNet (Lei et al., ECCV 2022) arranges them: classes that are all tested, a folder each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fssdeploy.data.dataset import Dataset, Listing, Split
from fssdeploy.data.episodes import Episode, draw_episode
from fssdeploy.data.layout import grey_mask, inside, require_any, stems_in
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture


class ClassFolders(Dataset):
    """One fold of classes that are all tested; their folders are numbered from 1, an item is ``NUMBER/STEM``.

    Pictures are JPEGs; masks are grey pictures, the class from 128 up. The class of test episode i is i modulo the
    number of classes; there are 600 in PATNet's protocol. InputError ``data_missing`` if no `expected` folder is there.
    """

    test_episodes = 600
    source: str

    def __init__(self, root: Path, expected: Sequence[str]) -> None:
        require_any(root, self.name, expected, self.source)
        self.root = root
        self._listing: Mapping[int, Sequence[str]] = {
            index: [f"{index + 1}/{stem}" for stem in stems_in(self.folder(index + 1), ".jpg")]
            for index in range(len(self.class_names))
        }

    @abstractmethod
    def folder(self, number: int) -> Path:
        """Where the pictures of a class are."""

    @abstractmethod
    def mask_path(self, item: str) -> Path:
        """The mask of an item."""

    def classes(self, fold: int, split: Split) -> range:
        self.check_fold(fold)
        if split == "train":
            raise InputError("split_missing", f"{self.name} has no classes to train on", "it is only tested on")
        return range(len(self.class_names))

    def listing(self, fold: int, split: Split) -> Listing:
        self.classes(fold, split)
        return self._listing

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        listing = self.listing(fold, split)
        chosen = index % len(listing)
        return draw_episode({chosen: listing[chosen]}, self.uniform_over, shot, (seed, index), self.class_names)

    def picture(self, item: str) -> np.ndarray:
        number, _, stem = inside(item).partition("/")
        if not number.isdecimal():
            raise InputError("item_unknown", f"'{item}' is not a picture of {self.name}", "it names no class folder")
        return load_picture(self.folder(int(number)) / f"{stem}.jpg")

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return grey_mask(self.mask_path(inside(item)))
