"""COCO-20i: the pictures of COCO 2014, 80 classes in four interleaved folds of twenty.

Layout; ROOT holds ``COCO2014`` or is that folder itself:

- ``COCO2014/{train2014,val2014}/COCO_..._NUMBER.jpg``
- ``COCO2014/annotations/instances_{train2014,val2014}.json``
- ``COCO2014/annotations/{train2014,val2014}/COCO_..._NUMBER.png``, optional: masks, value = class index + 1. Without
  them a mask is drawn from the annotations, where a pixel can belong to objects of two classes.
- ``COCO2014/splits/{trn,val}/fold{0..3}.json``, optional: the published lists turned into JSON, a dictionary from class
  index to names such as ``val2014/COCO_val2014_000000000042.jpg``. (They are published as pickles, which can run code
  and are never opened.) Without them they are derived: a picture stands under every class of which it has a pixel
  outside crowd regions, in the order of COCO's picture ids.

A class index counts the category ids in ascending order. Fold f tests the classes f, f + 4, f + 8, ... on val2014 and
trains on the others on train2014. (An older split, seldom used today, tests blocks of twenty.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fssdeploy.data.coco_json import CocoAnnotations, read_json
from fssdeploy.data.dataset import Dataset, Finding, Listing, Split, interleaved
from fssdeploy.data.layout import files_finding, inside, read_labels
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture

_CLASSES = (
    ["person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"]
    + ["fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"]
    + ["elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"]
    + ["skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"]
    + ["tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"]
    + ["sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"]
    + ["potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"]
    + ["microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"]
    + ["hair drier", "toothbrush"]
)
_FOLDS = 4
_PARTS: dict[Split, str] = {"train": "train2014", "test": "val2014"}
_LIST_FOLDERS: dict[Split, str] = {"train": "trn", "test": "val"}
# (entries, pictures) of the published lists of folds 0 to 3
_PUBLISHED: dict[Split, Sequence[tuple[int, int]]] = {
    "train": ((95476, 62040), (133927, 74381), (141054, 73035), (141016, 73808)),
    "test": ((35783, 26052), (17912, 15305), (14563, 13138), (14315, 12640)),
}


class Coco20i(Dataset):
    """See the module. Items are file names below ``COCO2014``. Annotation files are read when first needed."""

    name = "coco-20i"
    folds = _FOLDS
    class_names = _CLASSES
    test_episodes = 1000

    def __init__(self, root: Path) -> None:
        self._base = root / "COCO2014" if (root / "COCO2014").is_dir() else root
        places = [self._base / part for part in _PARTS.values()] + [self._annotation_file(p) for p in _PARTS.values()]
        if not any(place.exists() for place in places):
            raise InputError(
                "data_missing",
                f"'{root}' does not hold COCO-20i",
                "it has none of COCO2014/{train2014,val2014}, COCO2014/annotations/instances_{train2014,val2014}.json",
                "Name the folder that holds COCO2014.",
            )
        self._lists = {split: self._list_files(split) for split in _PARTS}
        self._drawn = {part: not self._mask_folder(part).is_dir() for part in _PARTS.values()}
        self.notes = [
            f"the {split} list was derived from COCO's annotations, not read"
            for split, lists in self._lists.items()
            if not lists
        ] + [f"masks of {part} are drawn from COCO's annotations" for part, drawn in self._drawn.items() if drawn]
        self._annotations: dict[str, CocoAnnotations] = {}
        self._listings: dict[tuple[int, Split], Listing] = {}

    def classes(self, fold: int, split: Split) -> Sequence[int]:
        """Novel classes of a fold (``"test"``) or the other 60 (``"train"``). InputError if there is no such fold."""
        self.check_fold(fold)
        return interleaved(len(_CLASSES), _FOLDS, fold, split)

    def listing(self, fold: int, split: Split) -> Listing:
        """Items by class. InputError if the list, or the annotations it is derived from, cannot be read."""
        classes = self.classes(fold, split)
        if (fold, split) not in self._listings:
            lists = self._lists[split]
            listed = _read_list(lists[fold]) if lists else self._derive(_PARTS[split], classes)
            self._listings[fold, split] = {index: listed.get(index, ()) for index in classes}
        return self._listings[fold, split]

    def picture(self, item: str) -> np.ndarray:
        """The picture, uint8 RGB (height, width, 3). InputError if it is missing or damaged."""
        return load_picture(self._base / inside(item))

    def mask(self, item: str, class_index: int) -> np.ndarray:
        """uint8 (height, width): 1 the class, 0 elsewhere. InputError if the mask or the annotations are broken."""
        part, _, file_name = inside(item).partition("/")
        if self._drawn.get(part):
            annotations = self._read_annotations(part)
            return annotations.mask(annotations.find(file_name), list(annotations.categories)[class_index])
        labels = read_labels(self._mask_folder(part) / Path(file_name).with_suffix(".png"))
        return (labels == class_index + 1).astype(np.uint8)

    def check(self) -> list[Finding]:
        """Counts of the lists against the published ones; pictures and masks that are listed and not there."""
        findings = []
        for split, part in _PARTS.items():
            items = dict[str, None]()
            for fold, published in enumerate(_PUBLISHED[split]):
                finding, listed = self._check_list(split, fold, published)
                findings.append(finding)
                items |= listed
            source = f"COCO 2014, {part} pictures"
            names = [item.partition("/")[2] for item in items]
            findings.append(files_finding(f"pictures {part}", self._base / part, names, source))
            if self._drawn[part]:
                detail = "drawn from the annotations; published results use the PNG masks that come with HSNet"
                findings.append(Finding(f"masks {part}", "note", detail))
            else:
                names = [Path(name).with_suffix(".png").name for name in names]
                source = "the COCO-20i masks that come with HSNet"
                findings.append(files_finding(f"masks {part}", self._mask_folder(part), names, source))
        return findings

    def _check_list(self, split: Split, fold: int, published: tuple[int, int]) -> tuple[Finding, dict[str, None]]:
        """What to say of one list, and the items in it."""
        what = f"list {_LIST_FOLDERS[split]}/fold{fold}"
        try:
            listing = self.listing(fold, split)
        except InputError as error:
            source = f"COCO 2014 annotations, instances_{_PARTS[split]}.json"
            return Finding(what, "missing", error.line(), source), {}
        items = dict.fromkeys(item for listed in listing.values() for item in listed)
        counts = sum(map(len, listing.values())), len(items)
        made = "read" if self._lists[split] else "derived from the annotations"
        detail = "{:,} entries over {:,} pictures, {}; published are {:,} over {:,}".format(*counts, made, *published)
        if not self._lists[split] and (self._base / "splits" / _LIST_FOLDERS[split] / f"fold{fold}.pkl").exists():
            detail += "; the .pkl list is a pickle and is never opened, a JSON conversion would be"
        return Finding(what, "ok" if self._lists[split] and counts == published else "note", detail), items

    def _derive(self, part: str, classes: Sequence[int]) -> dict[int, tuple[str, ...]]:
        annotations = self._read_annotations(part)
        categories = list(annotations.categories)
        return {
            index: tuple(f"{part}/{annotations.file_name(each)}" for each in annotations.pictures(categories[index]))
            for index in classes
        }

    def _read_annotations(self, part: str) -> CocoAnnotations:
        if part not in self._annotations:
            annotations = CocoAnnotations(self._annotation_file(part))
            if len(annotations.categories) != len(_CLASSES):
                raise InputError(
                    "annotations_malformed",
                    f"'{annotations.path}' has {len(annotations.categories)} categories",
                    f"COCO has {len(_CLASSES)}",
                    "Use COCO's own file.",
                )
            self._annotations[part] = annotations
        return self._annotations[part]

    def _annotation_file(self, part: str) -> Path:
        return self._base / "annotations" / f"instances_{part}.json"

    def _mask_folder(self, part: str) -> Path:
        return self._base / "annotations" / part

    def _list_files(self, split: Split) -> list[Path]:
        """The four lists of a split, empty if one of them is not there."""
        paths = [self._base / "splits" / _LIST_FOLDERS[split] / f"fold{fold}.json" for fold in range(_FOLDS)]
        return paths if all(path.is_file() for path in paths) else []


def open_dataset(root: Path) -> Coco20i:
    """Open COCO-20i under `root`. InputError `data_missing` if nothing of it is there."""
    return Coco20i(root)


def _read_list(path: Path) -> dict[int, tuple[str, ...]]:
    """Items by class index, each once."""
    try:
        return {
            int(index): tuple(dict.fromkeys(inside(item) for item in items)) for index, items in read_json(path).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        why = f"it is not a dictionary from class index to file names ({error})"
        raise InputError("list_malformed", f"'{path}' is not a list of COCO-20i", why, "Convert it again.") from error
