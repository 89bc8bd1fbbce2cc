"""FSS-1000 (Li et al., CVPR 2020): 1,000 everyday classes of ten pictures each, split by class.

Layout: ``data/CLASS/N.jpg`` with its mask ``data/CLASS/N.png`` (object from 128 up), N = 1 .. 10, and the class names
of each split in ``splits/trn.txt``, ``splits/val.txt``, ``splits/test.txt`` (520, 240 and 240 lines). The split is
random, so it is read and never derived. One fold: split ``"test"`` has the test classes, ``"train"`` those of
``trn.txt``; the validation classes are in neither.

Protocol of HSNet's data package and those that follow it: every test picture is the query once, 2,400 episodes.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from fssdeploy.data.dataset import Dataset, Finding, Listing, Split
from fssdeploy.data.episodes import Episode
from fssdeploy.data.layout import counted, files_finding, grey_mask, inside, read_lines, require_any, stems_in
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture

SOURCE = "Pictures: github.com/HKUSTCV/FSS-1000. Lists: the data package of HSNet (splits/fss)."
CLASSES = {"trn": 520, "val": 240, "test": 240}
PICTURES = 10


class Fss1000(Dataset):
    """FSS-1000 in a directory. An item is ``CLASS/N``. InputError as `open_dataset`."""

    name = "fss-1000"
    test_episodes = CLASSES["test"] * PICTURES

    def __init__(self, root: Path) -> None:
        require_any(root, "FSS-1000", ("data", *(f"splits/{part}.txt" for part in CLASSES)), SOURCE)
        self.root = root
        self._parts: dict[str, range] = {}
        names: list[str] = []
        for part in CLASSES:
            path = root / "splits" / f"{part}.txt"
            lines = sorted(inside(line) for line in read_lines(path)) if path.exists() else []
            self._parts[part] = range(len(names), len(names) + len(lines))
            names += lines
        self.class_names = names
        self._listed: dict[Split, Listing] = {}

    def classes(self, fold: int, split: Split) -> range:
        self.check_fold(fold)
        part = "trn" if split == "train" else "test"
        if not self._parts[part]:
            path = self.root / "splits" / f"{part}.txt"
            raise InputError("split_missing", f"'{path}' is missing or empty", "the split cannot be derived", SOURCE)
        return self._parts[part]

    def listing(self, fold: int, split: Split) -> Listing:
        classes = self.classes(fold, split)
        if split not in self._listed:
            self._listed[split] = {index: self._items(self.class_names[index]) for index in classes}
        return self._listed[split]

    def _items(self, name: str) -> list[str]:
        return [f"{name}/{stem}" for stem in stems_in(self.root / "data" / name, ".jpg")]

    @cached_property
    def _queries(self) -> list[tuple[int, str]]:
        """(class, item) of every test picture: the first of each class, then the second of each, and so on."""
        ranked = [
            (rank, index, item) for index, items in self.listing(0, "test").items() for rank, item in enumerate(items)
        ]
        return [(index, item) for _, index, item in sorted(ranked)]

    def picture(self, item: str) -> np.ndarray:
        return load_picture(self._path(item, ".jpg"))

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return grey_mask(self._path(item, ".png"))

    def _path(self, item: str, suffix: str) -> Path:
        return self.root / "data" / f"{inside(item)}{suffix}"

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        """In ``"test"`` the query is test picture `index`, going round the classes, and only the supports are drawn."""
        if split == "train":
            return super().episode(fold, split, shot, seed, index)
        self.check_fold(fold)
        if not 0 <= index < len(self._queries):
            raise InputError(
                "episodes_too_many",
                f"{self.name} has no test episode {index}",
                f"each of the {len(self._queries):,} test pictures is the query once",
                "Ask for fewer episodes.",
            )
        class_index, query = self._queries[index]
        others = [item for item in self.listing(fold, split)[class_index] if item != query]
        if not 1 <= shot <= len(others):
            why = f"class '{self.class_names[class_index]}' has {len(others)} pictures beside the query"
            raise InputError("class_too_small", f"{shot} shots cannot be drawn", why)
        drawn = np.random.default_rng((seed, index)).choice(len(others), shot, replace=False)
        return Episode(class_index, query, tuple(others[each] for each in drawn))

    def test_list(self, fold: int, shot: int, count: int | None, seed: int) -> list[Episode]:
        """Every test picture once as the query; with `count`, so many of them, spread evenly over the classes."""
        return super().test_list(fold, shot, len(self._queries) if count is None else count, seed)

    def check(self) -> list[Finding]:
        findings = [
            counted(f"classes in splits/{part}.txt", len(self._parts[part]), published, SOURCE)
            for part, published in CLASSES.items()
        ]
        twice = len(self.class_names) - len(set(self.class_names))
        if twice:
            findings.append(
                Finding("splits", "missing", f"{twice} class(es) are listed twice; splits must not overlap")
            )
        for part, published in CLASSES.items():
            items = [item for index in self._parts[part] for item in self._items(self.class_names[index])]
            findings.append(counted(f"pictures of {part}", len(items), published * PICTURES, SOURCE))
            masks = [f"{item}.png" for item in items]
            findings.append(files_finding(f"masks of {part}", self.root / "data", masks, SOURCE))
        return findings


def open_dataset(root: Path) -> Dataset:
    """FSS-1000 under `root`. InputError ``data_missing`` if nothing of it is there."""
    return Fss1000(root)
