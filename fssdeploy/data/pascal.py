"""PASCAL-5i: pictures of VOC 2012 with the masks of VOC and SBD, 20 classes in four folds of five.

Layout; ROOT holds ``VOC2012`` or is that folder itself:

- ``VOC2012/JPEGImages/ID.jpg``
- ``VOC2012/SegmentationClassAug/ID.png``: one channel, class numbers 1 to 20 in VOC's order, 255 to be ignored
- ``splits/trn/fold{0..3}.txt`` and ``splits/val/fold{0..3}.txt``, in ROOT or in ``VOC2012``: the published lists (of
  HSNet and those after it), one ``ID__CC`` a line, CC the class number; a picture stands there once per class it shows

Fold f tests the classes 5f+1 to 5f+5 on its val list, and trains on the trn lists of the other three folds, where the
novel classes are background. A split without its four lists is derived: a picture stands under every class its mask
holds; tested is on ``VOC2012/ImageSets/Segmentation/val.txt``, trained on ``trainaug.txt`` beside it or, without that
file, on all pictures that have a mask and are not in ``val.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fssdeploy.data.dataset import IGNORE, Dataset, Finding, Listing, Split, blocks
from fssdeploy.data.layout import files_finding, inside, label_mask, read_labels, read_lines, stems_in
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture

_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"] + [
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv/monitor",
]
_FOLDS = 4
_LIST_FOLDERS: dict[Split, str] = {"train": "trn", "test": "val"}
_PUBLISHED_ENTRIES: dict[Split, Sequence[int]] = {"train": (2286, 3425, 5883, 2086), "test": (346, 451, 725, 346)}
_SOURCES = {
    "pictures": "PASCAL VOC 2012 trainval",
    "masks": "SegmentationClassAug: the masks of VOC 2012 and SBD in one folder",
    "lists": "the PASCAL-5i split lists that come with the code of HSNet",
}


class Pascal5i(Dataset):
    """See the module. Items are VOC's picture ids, such as ``2007_000033``."""

    name = "pascal-5i"
    folds = _FOLDS
    class_names = _CLASSES
    uniform_over = "pictures"
    test_episodes = 1000

    def __init__(self, root: Path) -> None:
        self._base = root / "VOC2012" if (root / "VOC2012").is_dir() else root
        self._picture_folder = self._base / "JPEGImages"
        self._mask_folder = self._base / "SegmentationClassAug"
        self._lists = {split: _find_lists([root, self._base], folder) for split, folder in _LIST_FOLDERS.items()}
        if not (any(self._lists.values()) or self._picture_folder.is_dir() or self._mask_folder.is_dir()):
            raise InputError(
                "data_missing",
                f"'{root}' does not hold PASCAL-5i",
                "it has none of VOC2012/JPEGImages, VOC2012/SegmentationClassAug and splits/{trn,val}/fold{0..3}.txt",
                "Name the folder that holds VOC2012.",
            )
        self.notes = [
            f"the {split} list was derived from the masks, not read: counts and episodes differ from published ones"
            for split, lists in self._lists.items()
            if not lists
        ]
        self._derived: dict[Split, list[tuple[str, int]]] = {}
        self._listings: dict[tuple[int, Split], Listing] = {}

    def classes(self, fold: int, split: Split) -> Sequence[int]:
        """Novel classes of a fold (``"test"``) or the other 15 (``"train"``). InputError if there is no such fold."""
        self.check_fold(fold)
        return blocks(len(_CLASSES), _FOLDS, fold, split)

    def listing(self, fold: int, split: Split) -> Listing:
        """Ids by class, in the order of the lists. InputError if a list, or a mask it is derived from, is broken."""
        classes = self.classes(fold, split)
        if (fold, split) not in self._listings:
            entries = [
                entry
                for each in range(_FOLDS)
                if (each == fold) == (split == "test")
                for entry in self._entries(split, each)
            ]
            # A picture listed twice for a class would be drawn as its own support.
            self._listings[fold, split] = {
                index: tuple(dict.fromkeys(item for item, shown in entries if shown == index)) for index in classes
            }
        return self._listings[fold, split]

    def picture(self, item: str) -> np.ndarray:
        """The picture, uint8 RGB (height, width, 3). InputError if it is missing or damaged."""
        return load_picture(self._picture_folder / f"{inside(item)}.jpg")

    def mask(self, item: str, class_index: int) -> np.ndarray:
        """uint8 (height, width): 1 the class, 255 VOC's unlabelled borders, 0 elsewhere. InputError if it is broken."""
        return label_mask(self._labels(item), class_index + 1)

    def check(self) -> list[Finding]:
        """Counts of the lists against the published ones; pictures and masks that are listed and not there."""
        findings, items = [], dict[str, None]()
        for split, folder in _LIST_FOLDERS.items():
            for fold, published in enumerate(_PUBLISHED_ENTRIES[split]):
                what = f"list {folder}/fold{fold}"
                try:
                    entries = self._entries(split, fold)
                except InputError as error:
                    findings.append(Finding(what, "missing", error.line(), _SOURCES["lists"]))
                    continue
                items |= dict.fromkeys(item for item, _ in entries)
                made = "read" if self._lists[split] else "derived from the masks"
                detail = f"{len(entries):,} entries, {made}; published are {published:,}"
                exact = self._lists[split] and len(entries) == published
                findings.append(Finding(what, "ok" if exact else "note", detail, "" if exact else _SOURCES["lists"]))
        pictures, masks = [f"{item}.jpg" for item in items], [f"{item}.png" for item in items]
        findings.append(files_finding("pictures", self._picture_folder, pictures, _SOURCES["pictures"]))
        findings.append(files_finding("masks", self._mask_folder, masks, _SOURCES["masks"]))
        return findings

    def _entries(self, split: Split, fold: int) -> list[tuple[str, int]]:
        """(id, class index) pairs of one list."""
        lists = self._lists[split]
        if lists:
            return _read_list(lists[fold])
        if split not in self._derived:
            self._derived[split] = [
                (item, int(label) - 1)
                for item in self._annotated(split)
                for label in np.unique(self._labels(item))
                if label not in (0, IGNORE)
            ]
        novel = self.classes(fold, "test")
        return [entry for entry in self._derived[split] if entry[1] in novel]

    def _annotated(self, split: Split) -> list[str]:
        """Ids of the pictures of a split that has no lists."""
        folder = self._base / "ImageSets" / "Segmentation"
        tested = _read_ids(folder / "val.txt")
        if split == "test":
            return tested
        if (folder / "trainaug.txt").exists():
            return _read_ids(folder / "trainaug.txt")
        return sorted(set(stems_in(self._mask_folder, ".png")) - set(tested))

    def _labels(self, item: str) -> np.ndarray:
        """Class numbers (height, width). InputError unless they are 0 to 20 and 255."""
        path = self._mask_folder / f"{inside(item)}.png"
        labels = read_labels(path)
        if not ((labels <= len(_CLASSES)) | (labels == IGNORE)).all():
            why = f"it has other values than 0 to {len(_CLASSES)} and {IGNORE}"
            raise InputError("mask_labels", f"'{path}' does not hold class numbers", why, "Use SegmentationClassAug.")
        return labels


def open_dataset(root: Path) -> Pascal5i:
    """Open PASCAL-5i under `root`. InputError `data_missing` if nothing of it is there."""
    return Pascal5i(root)


def _find_lists(places: Sequence[Path], folder: str) -> list[Path]:
    """The four lists of a split, from the first place that has them all; empty if none has."""
    for place in places:
        lists = [place / "splits" / folder / f"fold{fold}.txt" for fold in range(_FOLDS)]
        if all(path.is_file() for path in lists):
            return lists
    return []


def _read_ids(path: Path) -> list[str]:
    """Lines that can be parts of paths."""
    lines = read_lines(path)
    for line in lines:
        if not re.fullmatch(r"\w+", line, re.ASCII):
            raise InputError("list_malformed", f"'{path}' has a line '{line}'", "it is not a picture's id")
    return lines


def _read_list(path: Path) -> list[tuple[str, int]]:
    """(id, class index) of every line ``ID__CC``."""
    entries = []
    for line in _read_ids(path):
        item, _, number = line.rpartition("__")
        if not (item and number.isdigit() and 1 <= int(number) <= len(_CLASSES)):
            raise InputError("list_malformed", f"'{path}' has a line '{line}'", "it is not ID__CC, CC from 01 to 20")
        entries.append((item, int(number) - 1))
    return entries
