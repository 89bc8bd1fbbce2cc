"""One's own data: pictures and masks in folders by class, or a COCO JSON file.

Layouts, the first that fits:

- ``annotations.json`` (COCO instances) with the pictures in ``images/`` or beside it;
- ``images/CLASS/NAME.jpg`` with ``masks/CLASS/NAME.png``;
- ``CLASS/images/NAME.jpg`` with ``CLASS/masks/NAME.png``.

Pictures are any common format; a mask has its picture's name before the suffix. A mask holds 0 and one other value, or
0, 1 and 255 (ignored), as `fssdeploy.images.masks.mask_from_array` reads them. A picture without a mask is left out,
which `OwnData.notes` says.

Folds: ``folds.json``, a list of lists of class names, ``[[classes that fold 0 tests], [those of fold 1], ...]``; a
class in none of them is trained on in every fold. Without it there is one fold, in which every class is tested *and*
trained on: good for trying out, no measure of new classes.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from fssdeploy.data.coco_json import CocoAnnotations
from fssdeploy.data.dataset import IGNORE, Dataset, Finding, Listing, Split
from fssdeploy.data.layout import require_any
from fssdeploy.errors import InputError
from fssdeploy.files import open_file, storage_error
from fssdeploy.images.masks import mask_from_array
from fssdeploy.images.pictures import find_pictures, load_picture, open_picture

LAYOUT = "Arrange it as CLASS/images and CLASS/masks, as images/CLASS and masks/CLASS, or as annotations.json (COCO)."
_JSON, _FOLDS = "annotations.json", "folds.json"

# How `check` names what a picture or mask is refused for, by the codes of the errors; other codes: it cannot be read.
_PROBLEMS = {
    "masks of another size than their picture": ("mask_size",),
    "empty masks": ("mask_empty",),
    "masks with unknown values": ("mask_values", "mask_labels", "mask_grey", "mask_shape"),
}
_UNREADABLE = "files that cannot be read"


class OwnData(Dataset):
    """What the layouts share: folds, and the check of every picture and mask. Subclasses give items and masks."""

    name = "folder"

    def __init__(self, root: Path, class_names: Sequence[str], items: Sequence[Sequence[str]]) -> None:
        self.root = root
        self.class_names = class_names
        self._items = items
        self._novel = _read_folds(root / _FOLDS, class_names) if (root / _FOLDS).exists() else None
        self.folds = len(self._novel) if self._novel else 1
        self.notes = []
        if self._novel is None:
            self.notes = [f"no {_FOLDS}: one fold, and every class is both tested and trained on"]

    def classes(self, fold: int, split: Split) -> list[int]:
        self.check_fold(fold)
        if self._novel is None:
            return list(range(len(self.class_names)))
        return [index for index in range(len(self.class_names)) if (index in self._novel[fold]) == (split == "test")]

    def listing(self, fold: int, split: Split) -> Listing:
        return {index: self._items[index] for index in self.classes(fold, split)}

    @abstractmethod
    def picture_path(self, item: str) -> Path:
        """Where the picture of an item is. InputError if there is no such item."""

    def picture(self, item: str) -> np.ndarray:
        return load_picture(self.picture_path(item))

    def check(self) -> list[Finding]:
        return [*self._check_sizes(), *self._check_files(), *self._check_duplicates(), *self._check_folds()]

    def _check_sizes(self) -> list[Finding]:
        sizes = dict(zip(self.class_names, map(len, self._items), strict=True))
        unusable = [name for name, size in sizes.items() if size < 2]
        few = [name for name, size in sizes.items() if 2 <= size < 6]
        findings = [Finding("classes", "ok" if sizes else "missing", f"{len(sizes):,}, {sum(sizes.values()):,} masks")]
        if unusable:
            findings.append(Finding("classes with fewer than 2 pictures", "missing", _some(unusable)))
        if few:
            findings.append(
                Finding("classes with fewer than 6 pictures", "note", f"not enough for 5 shots: {_some(few)}")
            )
        return findings

    def _check_files(self) -> list[Finding]:
        """Load every picture with every mask."""
        refused: dict[str, list[str]] = {what: [] for what in (*_PROBLEMS, _UNREADABLE)}
        for index, items in enumerate(self._items):
            for item in items:
                try:
                    self.load(item, index)
                except InputError as error:
                    what = next((what for what, codes in _PROBLEMS.items() if error.code in codes), _UNREADABLE)
                    refused[what].append(f"{item} ({self.class_names[index]})")
        return [Finding(what, "missing" if found else "ok", _some(found)) for what, found in refused.items()]

    def _check_duplicates(self) -> list[Finding]:
        """Pictures with the same bytes: within a class, one could be the support of the other."""
        same: dict[bytes, list[tuple[int, str]]] = defaultdict(list)
        digests: dict[Path, bytes] = {}
        for index, items in enumerate(self._items):
            for item in items:
                path = self.picture_path(item)
                with suppress(InputError):  # one that cannot be read is another finding
                    if path not in digests:
                        with open_file(path) as stream:
                            digests[path] = hashlib.file_digest(stream, "sha256").digest()
                    same[digests[path]].append((index, item))
        # One item under several classes (COCO) is one picture that shows them all.
        copies = [found for found in same.values() if len({item for _, item in found}) > 1]
        groups = [(", ".join(item for _, item in found), [index for index, _ in found]) for found in copies]
        within = [items for items, classes in groups if len(set(classes)) < len(classes)]
        across = [items for items, classes in groups if len(set(classes)) > 1]
        return [
            Finding("the same picture twice in a class", "note" if within else "ok", _some(within)),
            Finding("the same picture in several classes", "note" if across else "ok", _some(across)),
        ]

    def _check_folds(self) -> list[Finding]:
        if self._novel is None:
            return [Finding("folds", "note", self.notes[0])]
        sizes = ", ".join(str(len(each)) for each in self._novel)
        return [Finding("folds", "ok", f"{self.folds}, which test {sizes} classes")]


class PictureFolders(OwnData):
    """Pictures and masks in folders by class. An item is ``CLASS/NAME.jpg``; `places` gives a class's two folders."""

    def __init__(self, root: Path, class_names: Sequence[str], places: Callable[[str], tuple[Path, Path]]) -> None:
        self._places = places
        self._masks: dict[str, Path] = {}
        self._without: list[str] = []
        self._several: list[str] = []
        super().__init__(root, class_names, [self._find(name) for name in class_names])
        if self._without or self._several:
            count = len(self._without) + len(self._several)
            self.notes = [*self.notes, f"{count} picture(s) without exactly one mask are left out"]

    def _find(self, name: str) -> list[str]:
        """The items of a class that have exactly one mask."""
        pictures, masks = self._places(name)
        by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in _files_in(masks):
            by_stem[path.stem].append(path)
        found = []
        for path in _pictures_in(pictures):
            item = f"{name}/{path.name}"
            mine = by_stem[path.stem]
            if len(mine) == 1:
                self._masks[item] = mine[0]
                found.append(item)
            else:
                (self._several if mine else self._without).append(item)
        return found

    def picture_path(self, item: str) -> Path:
        self._mask_path(item)
        name, _, file = item.rpartition("/")
        return self._places(name)[0] / file

    def _mask_path(self, item: str) -> Path:
        if item not in self._masks:
            raise InputError("item_unknown", f"'{item}' is not a picture with a mask under '{self.root}'")
        return self._masks[item]

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return _read_mask(self._mask_path(item))

    def check(self) -> list[Finding]:
        findings = [
            Finding("pictures without a mask", "missing" if self._without else "ok", _some(self._without), LAYOUT),
            Finding("pictures with several masks", "missing" if self._several else "ok", _some(self._several)),
        ]
        return findings + super().check()


class CocoFolder(OwnData):
    """A COCO JSON file. An item is the file name in it; a mask is the union of the class's instances.

    Labelling tools export categories that nothing belongs to: they are left out, which `notes` says.
    """

    def __init__(self, root: Path) -> None:
        self._annotations = annotations = CocoAnnotations(root / _JSON)
        self._categories = [category for category in annotations.categories if annotations.pictures(category)]
        self._ids: dict[str, int] = {}
        items = []
        for category in self._categories:
            pictures = {annotations.file_name(picture): picture for picture in annotations.pictures(category)}
            items.append(list(pictures))
            self._ids |= pictures
        if len(self._ids) < len({picture for each in self._categories for picture in annotations.pictures(each)}):
            raise InputError(
                "annotations_malformed",
                f"'{root / _JSON}' names a file twice",
                "two annotated pictures have the same file_name",
                "Export it again with file names that differ.",
            )
        super().__init__(root, [annotations.categories[category] for category in self._categories], items)
        empty = [name for category, name in annotations.categories.items() if category not in self._categories]
        if empty:
            self.notes = [*self.notes, f"categories without a pixel are left out: {_some(empty)}"]

    def picture_path(self, item: str) -> Path:
        self._id(item)
        path = self.root / "images" / item
        return path if path.exists() else self.root / item

    def _id(self, item: str) -> int:
        if item not in self._ids:
            raise InputError("item_unknown", f"'{item}' is not an annotated picture of '{self.root / _JSON}'")
        return self._ids[item]

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return self._annotations.mask(self._id(item), self._categories[class_index])


def open_dataset(root: Path) -> Dataset:
    """One's own data under `root`.

    InputError ``data_missing`` if no layout fits, ``folds_unreadable`` for a wrong folds.json, and those of
    `CocoAnnotations`.
    """
    if (root / _JSON).exists():
        return CocoFolder(root)
    names = _folders_in(root / "images")
    if names:
        return PictureFolders(root, names, lambda name: (root / "images" / name, root / "masks" / name))
    names = [name for name in _folders_in(root) if (root / name / "images").is_dir()]
    require_any(root, "pictures by class", [f"{name}/images" for name in names] or ["CLASS/images"], LAYOUT)
    return PictureFolders(root, names, lambda name: (root / name / "images", root / name / "masks"))


def _read_folds(path: Path, class_names: Sequence[str]) -> list[set[int]]:
    """The novel classes of every fold."""
    with open_file(path) as stream:
        data = stream.read()
    try:
        folds = json.loads(data)
        if not isinstance(folds, list) or not folds or not all(isinstance(fold, list) and fold for fold in folds):
            raise ValueError("it is not a list of lists of class names")
        for name in sum(folds, []):
            if name not in class_names:
                raise ValueError(f"there is no class {name!r}")
            if sum(folds, []).count(name) > 1:
                raise ValueError(f"class {name!r} stands in it twice")
    except (ValueError, RecursionError) as error:
        fix = 'Write [["a class that fold 0 tests", ...], ["one that fold 1 tests", ...]].'
        raise InputError("folds_unreadable", f"'{path}' does not give folds", str(error), fix) from error
    return [{list(class_names).index(name) for name in fold} for fold in folds]


def _read_mask(path: Path) -> np.ndarray:
    """Mask uint8 (H, W) of 0, 1 and 255 (ignored). InputError if it is empty or its values leave a choice."""
    image = open_picture(path)
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert(image.mode[:-1])
    array, indexed = np.asarray(image), image.mode == "P"
    values = [int(value) for value in np.unique(array) if value != 0]
    # One value beside 0 is the object, whichever it is; but 255 of an indexed mask means "ignore".
    label = values[0] if len(values) == 1 and not (indexed and values[0] == IGNORE) else None
    mask = mask_from_array(array, str(path), label, indexed=indexed)
    if mask.area == 0:
        raise InputError("mask_empty", f"'{path}' marks no pixel", "", "Mark the object, or remove the picture.")
    return np.where(mask.ignore, IGNORE, mask.object).astype(np.uint8)


def _pictures_in(folder: Path) -> list[Path]:
    try:
        return find_pictures([folder])
    except InputError:  # no such folder, or nothing in it
        return []


def _files_in(folder: Path) -> list[Path]:
    """Files that are not hidden, sorted; none if there is no such folder. MachineError if it cannot be read."""
    return [path for path in _entries(folder) if path.is_file()]


def _folders_in(folder: Path) -> list[str]:
    """Names of folders that are not hidden, sorted; none if there is no such folder. MachineError as `_files_in`."""
    return [path.name for path in _entries(folder) if path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise storage_error(error, folder) from error
    return [path for path in found if not path.name.startswith(".")]


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    if not names:
        return "none"
    return f"{len(names):,}: {'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''}"
