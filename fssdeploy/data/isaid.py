"""iSAID-5i (Yao et al., TGRS 2021; pictures of iSAID, Waqas Zamir et al., CVPRW 2019): 15 aerial classes, three folds.

Fold f tests classes 5f .. 5f + 4 and trains on the other ten, on patches of 256 x 256 in the common protocol. Masks are
single-channel PNGs whose values are the class number (1 .. 15; 0 background, 255 ignored). Two layouts are read:

- that of the few-shot loaders after HSNet: ``{train,val}/images/ID.png`` and
  ``{train,val}/semantic_png/ID_instance_color_RGB.png``;
- that of MMSegmentation's converter, which R2Net and others use: ``img_dir/{train,val}/ID.png`` and
  ``ann_dir/{train,val}/ID_instance_color_RGB.png``.

Lists are those of the first family: ``splits/{trn,val}/fold{f}.txt`` of lines ``ID__CC`` (CC class number); fold f is
tested on its list of val and trained on the lists of trn of the other folds. A part without its three lists has them
derived once per run, which reads every mask: a picture is listed for each class of which its mask has a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fssdeploy.data.dataset import IGNORE, Dataset, Finding, Listing, Split, blocks
from fssdeploy.data.layout import files_finding, inside, label_mask, read_labels, read_lines, require_any, stems_in
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture

SOURCE = (
    "Pictures: captain-whu.github.io/iSAID and DOTA v1.0, cut into patches. Lists: the few-shot code you compare with."
)
PATCH = 256
_CLASSES = (
    "ship",
    "storage tank",
    "baseball diamond",
    "tennis court",
    "basketball court",
    "ground track field",
    "bridge",
    "large vehicle",
    "small vehicle",
    "helicopter",
    "swimming pool",
    "roundabout",
    "soccer field",
    "plane",
    "harbor",
)
# Folders of pictures and masks below the root, in the two layouts.
_LAYOUTS = (("{part}/images", "{part}/semantic_png"), ("img_dir/{part}", "ann_dir/{part}"))
_PARTS: dict[Split, str] = {"train": "train", "test": "val"}
_LISTS = {"train": "trn", "val": "val"}
_MASK = "_instance_color_RGB.png"


class Isaid(Dataset):
    """iSAID-5i in a directory. An item is ``train/ID`` or ``val/ID``. InputError as `open_dataset`."""

    name = "isaid-5i"
    folds = 3
    class_names = _CLASSES
    uniform_over = "pictures"

    def __init__(self, root: Path) -> None:
        expected = [layout[0].format(part=part) for layout in _LAYOUTS for part in _LISTS]
        require_any(root, "iSAID-5i", expected, SOURCE)
        self.root = root
        self._layout = next(
            layout for layout in _LAYOUTS if any((root / layout[0].format(part=part)).exists() for part in _LISTS)
        )
        self._lists = {
            part: [root / "splits" / _LISTS[part] / f"fold{fold}.txt" for fold in range(3)] for part in _LISTS
        }
        self._read = {part: all(path.is_file() for path in paths) for part, paths in self._lists.items()}
        self._shown: dict[str, dict[int, list[str]]] = {}
        self.notes = [
            f"the lists of {part} were derived from the masks, not read: counts and episodes differ from published ones"
            for part, read in self._read.items()
            if not read
        ]

    def classes(self, fold: int, split: Split) -> list[int]:
        self.check_fold(fold)
        return blocks(len(self.class_names), self.folds, fold, split)

    def listing(self, fold: int, split: Split) -> Listing:
        classes, part = self.classes(fold, split), _PARTS[split]
        if part not in self._shown:
            pairs = self._listed(part) if self._read[part] else self._derived(part)
            # A picture listed twice for a class would be drawn as its own support.
            unique = dict.fromkeys(pairs)
            self._shown[part] = {
                index: [item for each, item in unique if each == index] for index in range(len(self.class_names))
            }
        return {index: self._shown[part][index] for index in classes}

    def _listed(self, part: str) -> Iterator[tuple[int, str]]:
        """(class, item) of every line of the lists of a part."""
        for fold, path in enumerate(self._lists[part]):
            for line in read_lines(path):
                stem, _, number = line.rpartition("__")
                if not stem or not number.isdecimal() or int(number) - 1 not in self.classes(fold, "test"):
                    why = f"'{line}' is not ID__CC with a class of fold {fold}"
                    raise InputError("list_malformed", f"'{path}' is not a list of iSAID-5i", why)
                yield int(number) - 1, f"{part}/{inside(stem)}"

    def _derived(self, part: str) -> Iterator[tuple[int, str]]:
        """(class, item) of every class in every mask of a part."""
        for stem in stems_in(self._folder(part, 1), _MASK):
            for value in np.unique(self._labels(f"{part}/{stem}")):
                if value not in (0, IGNORE):
                    yield int(value) - 1, f"{part}/{stem}"

    def _labels(self, item: str) -> np.ndarray:
        """Class numbers (H, W). InputError unless they are 0 to 15 and 255."""
        part, stem = _split(item)
        path = self._folder(part, 1) / f"{stem}{_MASK}"
        labels = read_labels(path)
        if not ((labels <= len(self.class_names)) | (labels == IGNORE)).all():
            why = f"its values go up to {labels.max()}, class numbers to {len(self.class_names)}"
            raise InputError("mask_labels", f"'{path}' does not hold class numbers", why, "Convert the masks first.")
        return labels

    def _folder(self, part: str, kind: int) -> Path:
        """Where pictures (kind 0) or masks (kind 1) of a part are."""
        return self.root / self._layout[kind].format(part=part)

    def picture(self, item: str) -> np.ndarray:
        part, stem = _split(item)
        return load_picture(self._folder(part, 0) / f"{stem}.png")

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return label_mask(self._labels(item), class_index + 1)

    def check(self) -> list[Finding]:
        findings = []
        for part in _LISTS:
            stems = stems_in(self._folder(part, 0), ".png")
            masks = [f"{stem}{_MASK}" for stem in stems]
            findings.append(Finding(f"patches of {part}", "ok" if stems else "missing", f"{len(stems):,}", SOURCE))
            findings.append(files_finding(f"masks of {part}", self._folder(part, 1), masks, SOURCE))
            findings += self._check_size(part, stems[:1]) + self._check_lists(part)
        return findings

    def _check_size(self, part: str, stems: list[str]) -> list[Finding]:
        try:
            sizes = [self.picture(f"{part}/{stem}").shape[:2] for stem in stems]
        except InputError as error:
            return [Finding(f"size of {part}", "missing", error.line())]
        detail = f"the common protocol has {PATCH} x {PATCH}"
        return [
            Finding(f"size of {part}", "ok" if size == (PATCH, PATCH) else "note", f"{size[0]} x {size[1]}; {detail}")
            for size in sizes
        ]

    def _check_lists(self, part: str) -> list[Finding]:
        what = f"lists splits/{_LISTS[part]}/fold0..2.txt"
        if not self._read[part]:
            return [Finding(what, "note", "not all there: derived from the masks", SOURCE)]
        try:
            pictures = dict.fromkeys(f"{_split(item)[1]}.png" for _, item in self._listed(part))
        except InputError as error:
            return [Finding(what, "missing", error.line(), SOURCE)]
        there = files_finding(f"listed pictures of {part}", self._folder(part, 0), pictures, SOURCE)
        return [Finding(what, "ok", f"{len(pictures):,} pictures"), there]


def _split(item: str) -> tuple[str, str]:
    """Part and stem of an item."""
    part, _, stem = inside(item).partition("/")
    return part, stem


def open_dataset(root: Path) -> Dataset:
    """iSAID-5i under `root`. InputError ``data_missing`` if nothing of it is there."""
    return Isaid(root)
