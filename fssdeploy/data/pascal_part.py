"""PASCAL-Part: parts of objects ("dog+LEGS") on the pictures of VOC 2010, in four folds; the conversion Matcher uses.

Layout; ROOT is any folder from the one that holds ``Pascal-Part`` down to ``VOC2010``:

- ``Pascal-Part/VOCdevkit/VOC2010/JPEGImages/ID.jpg``
- ``.../VOC2010/all_obj_part_to_image.json``: pictures by class,
  ``{GROUP: {"object": {OBJECT: {"part": {PART: {"train": [ID, ...], "val": [ID, ...]}}}}}}``
- ``.../VOC2010/Annotations_Part_json_merged_part_classes/ID.json``: what is in a picture,
  ``{"object": [{"name": OBJECT, "bndbox": {"xmin", "ymin", "xmax", "ymax"}, "parts": [{"name": PART, "mask": [RLE,
  ...]}]}]}``, an RLE being COCO's ``{"size": [height, width], "counts": text}``; the fine parts of PASCAL-Part are
  merged there (beak, eyes, ears and so on into FACE)

The original annotations are .mat files, which are not read; other conversions (VLPart's single COCO-style file) name
and merge parts differently, and are not this data set.

A fold is a group of objects: animals, indoor, person, vehicles. A class is kept if it has pictures in both lists;
aeroplane+TAIL is left out. A fold tests its group's classes on their "val" pictures, and trains on the other groups'
classes and "train" pictures. Test episode i is of class i mod their number; a fold has as many test episodes as its
group has val entries (those of classes left out included), at most 2,500.

An episode shows one object of a picture, drawn from those with a pixel of the part: its parts alone are the mask, and
with `box_crop` picture and mask are cut to its box (the row ymax and the column xmax are outside, as in Matcher). An
item ``ID#3`` is object 3 of a picture, counted from 0; ``ID`` is the whole picture with all objects. Listings hold the
latter, episodes the former.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fssdeploy.data.coco_json import read_json
from fssdeploy.data.dataset import Dataset, Finding, Listing, Split
from fssdeploy.data.episodes import Episode, draw_episode
from fssdeploy.data.layout import files_finding, inside
from fssdeploy.errors import InputError
from fssdeploy.images.pictures import load_picture
from fssdeploy.images.rle import decode_rle

_GROUPS = ("animals", "indoor", "person", "vehicles")
_LEFT_OUT = "aeroplane+TAIL"
_LIST_KEYS: dict[Split, str] = {"train": "train", "test": "val"}
_LISTS = "all_obj_part_to_image.json"
_ANNOTATIONS = "Annotations_Part_json_merged_part_classes"
# (test episodes, classes) where they are published: the log of one fold that comes with Matcher's code
_PUBLISHED = {"indoor": (959, 4)}
_SOURCE = "the PASCAL-Part archive that Matcher's data set instructions name"
_ATTEMPTS = 100


class PascalPart(Dataset):
    """See the module. Class names are OBJECT+PART, group after group in the order of the lists."""

    name = "pascal-part"
    folds = len(_GROUPS)
    test_episodes = 2500

    def __init__(self, root: Path, box_crop: bool = True) -> None:
        self._base = _find_base(root)
        self.box_crop = box_crop
        self.notes = [] if box_crop else ["pictures are whole; published results crop them to the object"]
        self._entries: list[int] = []  # of the val lists, by fold
        self._groups: list[range] = []  # class indices, by fold
        self._items: dict[Split, list[tuple[str, ...]]] = {"train": [], "test": []}  # by class
        names: list[str] = []
        lists = read_json(self._base / _LISTS)
        for group in _GROUPS:
            first, entries = len(names), 0
            for name, items in _read_group(lists, group, self._base / _LISTS):
                entries += len(items["test"])
                if name != _LEFT_OUT and all(items.values()):
                    names.append(name)
                    for split, listed in items.items():
                        self._items[split].append(tuple(dict.fromkeys(listed)))
            self._entries.append(entries)
            self._groups.append(range(first, len(names)))
        self.class_names = names

    def classes(self, fold: int, split: Split) -> Sequence[int]:
        """Classes of a fold's group (``"test"``) or of the other groups. InputError if there is no such fold."""
        self.check_fold(fold)
        novel = self._groups[fold]
        return [index for index in range(len(self.class_names)) if (index in novel) == (split == "test")]

    def listing(self, fold: int, split: Split) -> Listing:
        """Pictures (ids, not objects in them) by class. InputError if there is no such fold."""
        return {index: self._items[split][index] for index in self.classes(fold, split)}

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        """Test: class number `index` mod their count. Train: any class with pictures enough. Items are objects.

        InputError as `draw_episode`, if an annotation is broken, or if pictures do not show the part they are listed
        for.
        """
        listing = self.listing(fold, split)
        if split == "test" and listing:
            chosen = list(listing)[index % len(listing)]
            listing = {chosen: listing[chosen]}
        else:
            listing = {each: items for each, items in listing.items() if len(items) > shot}
        for attempt in range(_ATTEMPTS):
            key = (seed, index, attempt)
            drawn = draw_episode(listing, self.uniform_over, shot, key, self.class_names)
            generator = np.random.default_rng((*key, 1))
            shown = [self._objects_with(item, drawn.class_index) for item in (drawn.query, *drawn.support)]
            if all(shown):
                query, *support = [str(generator.choice(objects)) for objects in shown]
                return Episode(drawn.class_index, query, tuple(support))
        raise InputError(
            "part_missing",
            f"pictures listed for '{self.class_names[drawn.class_index]}' do not show it",
            f"{_ATTEMPTS} draws found no {shot + 1} pictures with the part",
            "Check that lists and annotations belong together.",
        )

    def picture(self, item: str) -> np.ndarray:
        """uint8 RGB (height, width, 3), of the object's box if the item is one. InputError if missing or damaged."""
        name, _, _ = inside(item).partition("#")
        picture = load_picture(self._base / "JPEGImages" / f"{name}.jpg")
        return picture[self._read(item).crop()] if name != item else picture

    def mask(self, item: str, class_index: int) -> np.ndarray:
        """uint8 (height, width): 1 the part, of this object if the item is one; 0 elsewhere. InputError if broken."""
        annotation = self._read(item)
        mask = annotation.part(self.class_names[class_index])
        if mask is None:
            return np.zeros(self.picture(item).shape[:2], np.uint8)
        return mask[annotation.crop()].astype(np.uint8)

    def check(self) -> list[Finding]:
        """Classes and test episodes of the groups; pictures and annotations that are listed and not there."""
        findings = []
        for group, classes, entries in zip(_GROUPS, self._groups, self._entries, strict=True):
            counts = min(entries, self.test_episodes), len(classes)
            detail = "{:,} test episodes of {} class(es)".format(*counts)
            published = _PUBLISHED.get(group, counts)
            if counts != published:
                detail += "; published are {:,} of {}".format(*published)
            findings.append(Finding(f"list {group}", "ok" if counts == published else "note", detail))
        items = dict.fromkeys(item for listed in self._items.values() for each in listed for item in each)
        pictures, annotations = [f"{item}.jpg" for item in items], [f"{item}.json" for item in items]
        source = "PASCAL VOC 2010 trainval"
        findings.append(files_finding("pictures", self._base / "JPEGImages", pictures, source))
        findings.append(files_finding("annotations", self._base / _ANNOTATIONS, annotations, _SOURCE))
        return findings

    def test_list(self, fold: int, shot: int, count: int | None, seed: int) -> list[Episode]:
        """The test episodes of a fold; `count` defaults to its val entries, at most 2,500."""
        self.check_fold(fold)
        total = min(self._entries[fold], self.test_episodes) if count is None else count
        return super().test_list(fold, shot, total, seed)

    def _objects_with(self, item: str, class_index: int) -> list[str]:
        """Items of the objects in a picture that show a pixel of the part, after cropping."""
        found = []
        for number, each in enumerate(self._read(item).each_object(self.box_crop)):
            mask = each.part(self.class_names[class_index])
            if mask is not None and mask[each.crop()].any():
                found.append(f"{item}#{number}")
        return found

    def _read(self, item: str) -> _Annotation:
        name, _, number = inside(item).partition("#")
        path = self._base / _ANNOTATIONS / f"{name}.json"
        try:
            whole = _Annotation(path, list(read_json(path)["object"]), cropped=False)
            return whole.each_object(self.box_crop)[int(number)] if number else whole
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise _malformed(path, error) from error


@dataclass(frozen=True)
class _Annotation:
    """Objects of a picture as its file has them: all of them, or one, which `cropped` reduces to its box."""

    path: Path
    objects: list[dict[str, Any]]
    cropped: bool

    def each_object(self, cropped: bool) -> list[_Annotation]:
        return [_Annotation(self.path, [each], cropped) for each in self.objects]

    def part(self, class_name: str) -> np.ndarray | None:
        """The mask of a part, bool (height, width) of the whole picture; None if no object has it."""
        class_object, _, class_part = class_name.partition("+")
        try:
            masks = [
                decode_rle(run_lengths)
                for each in self.objects
                if each["name"] == class_object
                for part in each["parts"]
                if part["name"] == class_part
                for run_lengths in part["mask"]
            ]
            return np.logical_or.reduce(masks) if masks else None
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
            raise _malformed(self.path, error) from error

    def crop(self) -> tuple[slice, slice]:
        """Rows and columns of the object's box; all of them if not cropped."""
        if not self.cropped:
            return slice(None), slice(None)
        try:
            box = self.objects[0]["bndbox"]
            left, top, right, bottom = (int(box[side]) for side in ("xmin", "ymin", "xmax", "ymax"))
            if not (0 <= left < right and 0 <= top < bottom):
                raise ValueError(f"a box reaches from {left}, {top} to {right}, {bottom}")
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(self.path, error) from error
        return slice(top, bottom), slice(left, right)


def open_dataset(root: Path, box_crop: bool = True) -> PascalPart:
    """Open PASCAL-Part under `root`. InputError `data_missing` if its lists are not there, and if they are broken."""
    return PascalPart(root, box_crop)


def _find_base(root: Path) -> Path:
    """The folder VOC2010."""
    steps = ("Pascal-Part", "VOCdevkit", "VOC2010")
    for start in range(len(steps) + 1):
        base = root.joinpath(*steps[start:])
        if (base / _LISTS).exists():
            return base
    raise InputError(
        "data_missing",
        f"'{root}' does not hold PASCAL-Part",
        f"there is no Pascal-Part/VOCdevkit/VOC2010/{_LISTS}",
        f"Take VOC 2010 trainval, and {_LISTS} and {_ANNOTATIONS} from {_SOURCE}.",
    )


def _read_group(lists: Any, group: str, path: Path) -> list[tuple[str, dict[Split, list[str]]]]:
    """Class name and its picture ids by split, for every part of every object of a group."""
    try:
        classes = [
            (f"{name}+{part}", {split: [_identifier(item) for item in items[key]] for split, key in _LIST_KEYS.items()})
            for name, entry in lists[group]["object"].items()
            for part, items in entry["part"].items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, error) from error
    return classes


def _identifier(item: Any) -> str:
    if not re.fullmatch(r"\w+", str(item), re.ASCII):  # it becomes a part of paths
        raise ValueError(f"'{item}' is not a picture's id")
    return str(item)


def _malformed(path: Path, error: Exception) -> InputError:
    why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return InputError(
        "annotations_malformed", f"'{path}' is not as PASCAL-Part has it", why, f"Take it from {_SOURCE}."
    )
