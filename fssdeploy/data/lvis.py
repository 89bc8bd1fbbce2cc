"""LVIS-92i: the many classes of LVIS v1 on the pictures of COCO 2017, in ten folds (made for Matcher).

Layout; ROOT holds ``LVIS`` or is that folder itself:

- ``LVIS/lvis_v1_val.json`` and, to train, ``LVIS/lvis_v1_train.json``
- ``LVIS/coco/{train2017,val2017}/NUMBER.jpg``; LVIS's own validation pictures lie in both

Kept for k shots are the classes with more than k pictures in the validation file, ascending by category id; n of them
make folds of n // 10 classes, fold f the kept classes f, f + 10, f + 20, ... (the remainder is in no fold). So which
classes a fold tests depends on k, and 1-shot and 5-shot results are not of the same classes. `classes` and `listing`
do not know k and answer for one shot; `episode` and `test_list` follow k. Classes that a fold does not test are its
base classes, if they have more than k pictures in the training file; who trains and tests must do both with one k, or
base classes of the one are novel in the other. A class's mask is the union of its instances.

Matcher's own lists are pickles, which can run code and are never opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fssdeploy.data.coco_json import CocoAnnotations
from fssdeploy.data.dataset import Dataset, Finding, Listing, Split
from fssdeploy.data.episodes import Episode, draw_episode
from fssdeploy.data.layout import files_finding, inside
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture

_FOLDS = 10
_PUBLISHED_PER_FOLD = 92  # one shot; it names the data set
_FILES: dict[Split, str] = {"train": "lvis_v1_train.json", "test": "lvis_v1_val.json"}
_PICTURE_SOURCE = "COCO 2017, train2017 and val2017 pictures"


class Lvis92i(Dataset):
    """See the module. Items are file names below ``LVIS/coco``, such as ``val2017/000000000042.jpg``."""

    name = "lvis-92i"
    folds = _FOLDS
    test_episodes = 2300

    def __init__(self, root: Path) -> None:
        self._base = root / "LVIS" if (root / "LVIS").is_dir() else root
        path = self._base / _FILES["test"]
        if not path.exists():
            pickled = list(self._base.glob("lvis_*.pkl"))
            raise InputError(
                "data_missing",
                f"'{root}' does not hold LVIS-92i",
                f"there is no LVIS/{path.name}" + (" and pickles are never opened" if pickled else ""),
                f"Download LVIS v1's {path.name}, and COCO 2017's pictures into LVIS/coco/{{train2017,val2017}}.",
            )
        self._annotations: dict[Split, CocoAnnotations] = {"test": CocoAnnotations(path)}
        self.class_names = list(self._annotations["test"].categories.values())
        self._per_class: dict[Split, Listing] = {}

    def classes(self, fold: int, split: Split) -> Sequence[int]:
        """Classes that a fold tests with one shot, or its base classes. InputError if there is no such fold."""
        return list(self.listing(fold, split))

    def listing(self, fold: int, split: Split) -> Listing:
        """Items by class, for one shot. InputError if annotations are missing or broken."""
        return self._listing(fold, split, shot=1)

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        """Test: class number `index` mod their count, of the fold for this shot. Train: any class with pictures enough.

        InputError as `draw_episode`, and if no class has pictures enough.
        """
        listing = self._listing(fold, split, shot)
        if split == "test" and listing:
            chosen = list(listing)[index % len(listing)]
            listing = {chosen: listing[chosen]}
        return draw_episode(listing, self.uniform_over, shot, (seed, index), self.class_names)

    def picture(self, item: str) -> np.ndarray:
        """The picture, uint8 RGB (height, width, 3). InputError if it is missing or damaged."""
        return load_picture(self._base / "coco" / inside(item))

    def mask(self, item: str, class_index: int) -> np.ndarray:
        """uint8 (height, width): 1 the class, 0 elsewhere. InputError if the annotations are broken."""
        # A validation picture can lie in the same folder as the training pictures, but only one file annotates it.
        split: Split = "test" if self._read("test").has(item) else "train"
        annotations = self._read(split)
        return annotations.mask(annotations.find(item), list(annotations.categories)[class_index])

    def check(self) -> list[Finding]:
        """Classes per fold against the published number; files and pictures that are not there."""
        findings = []
        for split, file_name in _FILES.items():
            try:
                per_class = self._items(split)
            except InputError as error:
                untrained = split == "train" and error.code == "file_missing"
                detail = error.line() + (" It is needed only to train." if untrained else "")
                state: Literal["note", "missing"] = "note" if untrained else "missing"
                findings.append(Finding(f"annotations {split}", state, detail, f"LVIS v1, {file_name}"))
                continue
            items = dict.fromkeys(item for listed in per_class.values() for item in listed)
            findings.append(Finding(f"annotations {split}", "ok", f"{len(items):,} pictures with classes"))
            findings.append(files_finding(f"pictures {split}", self._base / "coco", items, _PICTURE_SOURCE))
            if split == "test":
                kept = sum(len(listed) > 1 for listed in per_class.values())
                detail = f"{kept:,} classes have more than one validation picture: {kept // _FOLDS} a fold"
                detail += f"; published are {_PUBLISHED_PER_FOLD}"
                findings.append(Finding("classes", "ok" if kept // _FOLDS == _PUBLISHED_PER_FOLD else "note", detail))
        return findings

    def _listing(self, fold: int, split: Split, shot: int) -> Listing:
        """Items of the classes of a fold that have more than `shot` of them."""
        self.check_fold(fold)
        kept = [index for index, items in self._items("test").items() if len(items) > shot]
        novel = kept[fold::_FOLDS][: len(kept) // _FOLDS]
        if split == "train":
            per_class = self._items("train")
            base = set(range(len(self.class_names))).difference(novel)
            return {index: per_class[index] for index in sorted(base) if len(per_class[index]) > shot}
        return {index: self._items("test")[index] for index in novel}

    def _items(self, split: Split) -> Listing:
        """Items of every class, also of those that have none."""
        if split not in self._per_class:
            annotations = self._read(split)
            self._per_class[split] = {
                index: tuple(annotations.file_name(picture) for picture in annotations.pictures(category))
                for index, category in enumerate(annotations.categories)
            }
        return self._per_class[split]

    def _read(self, split: Split) -> CocoAnnotations:
        if split not in self._annotations:
            annotations = CocoAnnotations(self._base / _FILES[split])
            if list(annotations.categories.values()) != self.class_names:
                why = f"its categories are not those of {_FILES['test']}"
                raise InputError("annotations_malformed", f"'{annotations.path}' does not fit", why, "Use LVIS v1.")
            self._annotations[split] = annotations
        return self._annotations[split]


def open_dataset(root: Path) -> Lvis92i:
    """Open LVIS-92i under `root`. InputError `data_missing` if its validation file is not there."""
    return Lvis92i(root)
