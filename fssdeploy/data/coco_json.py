"""COCO-style instance annotations (COCO, LVIS, labelling tools): which classes a picture shows, and their masks.

Beside them what the loaders of listed pictures share: reading JSON, and whether the files are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pycocotools import mask as coco

from fssdeploy.data.layout import inside
from fssdeploy.errors import InputError
from fssdeploy.files import open_file
from fssdeploy.images.pictures import MAX_PIXELS
from fssdeploy.images.rle import decode_rle

# An outline of this area (in pixels) is taken to cover one; smaller ones, and those without, are drawn to find out.
_SURE_AREA = 16


class CocoAnnotations:
    """The instances of one JSON file, without its crowd regions and without boxes that have no outline.

    Read are `images` (id, height, width, file_name or coco_url), `categories` (id, name) and `annotations` (image_id,
    category_id, segmentation as polygons or run lengths, area, iscrowd); crowd regions mark groups, not single objects,
    and are left out everywhere. Ids are whole numbers. `categories` maps ids to names, ascending by id.

    Raises InputError `annotations_malformed` for anything else, and those of `fssdeploy.files.open_file`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        data = read_json(path, _pack_polygons)
        try:
            self.categories = {_whole(each["id"]): str(each["name"]) for each in data["categories"]}
            self.categories = dict(sorted(self.categories.items()))
            self._pictures = {_whole(each["id"]): _Picture(each) for each in data["images"]}
            if len(self.categories) < len(data["categories"]) or len(self._pictures) < len(data["images"]):
                raise ValueError("an id occurs twice")
            self._outlines: dict[int, dict[int, list[Any]]] = {category: {} for category in self.categories}
            self._areas: dict[tuple[int, int], float] = {}
            for each in data["annotations"]:
                self._add(each)
        except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise self._malformed(why) from error
        self._by_file_name = {entry.file_name: picture for picture, entry in self._pictures.items()}
        self._shown: dict[int, tuple[int, ...]] = {}

    def _add(self, annotation: dict[str, Any]) -> None:
        category, picture = annotation["category_id"], annotation["image_id"]
        if category not in self.categories or picture not in self._pictures:
            raise ValueError(f"an annotation names category {category} in picture {picture}, which are not both listed")
        outline = annotation.get("segmentation")
        if outline and not annotation.get("iscrowd"):
            self._outlines[category].setdefault(picture, []).append(outline)
            area = float(annotation.get("area") or 0)
            self._areas[category, picture] = max(area, self._areas.get((category, picture), 0))

    def pictures(self, category: int) -> tuple[int, ...]:
        """Ids of the pictures with at least one pixel of a category, ascending. InputError if an outline is broken."""
        if category not in self._shown:
            self._shown[category] = tuple(
                picture
                for picture in sorted(self._outlines[category])
                if self._areas[category, picture] >= _SURE_AREA or self.mask(picture, category).any()
            )
        return self._shown[category]

    def has(self, file_name: str) -> bool:
        """Whether there is a picture with this file name."""
        return file_name in self._by_file_name

    def find(self, file_name: str) -> int:
        """The id of the picture with this file name. InputError if there is none."""
        if not self.has(file_name):
            raise InputError("picture_unknown", f"'{self.path}' has no picture '{file_name}'", "", "Check the lists.")
        return self._by_file_name[file_name]

    def size(self, picture: int) -> tuple[int, int]:
        """(height, width) that the file states for a picture."""
        return self._pictures[picture].height, self._pictures[picture].width

    def file_name(self, picture: int) -> str:
        """The picture's file, relative with forward slashes: its `file_name`, else the end of its `coco_url`.

        LVIS v1 has only the latter, which ends in ``train2017/NAME.jpg`` or ``val2017/NAME.jpg``.
        """
        return self._pictures[picture].file_name

    def mask(self, picture: int, category: int) -> np.ndarray:
        """The union of a category's instances in a picture, uint8 (height, width), 0 or 1.

        Polygons are drawn by pycocotools, run lengths are checked before they are decoded. Raises InputError if an
        outline is malformed or does not fit the picture.
        """
        height, width = self.size(picture)
        union = np.zeros((height, width), bool)
        for outline in self._outlines[category].get(picture, ()):
            try:
                union |= _decode(outline, height, width)
            except (ValueError, InputError) as error:
                why = error.why if isinstance(error, InputError) else str(error)
                name = self.categories[category]
                raise self._malformed(f"an outline of '{name}' in '{self.file_name(picture)}': {why}") from error
        return union.astype(np.uint8)

    def _malformed(self, why: str) -> InputError:
        return InputError(
            "annotations_malformed", f"'{self.path}' is not a COCO annotation file", why, "Download or export it again."
        )


class _Picture:
    """What the annotations need to know of a picture. ValueError or InputError if it could not be used safely."""

    __slots__ = ("file_name", "height", "width")

    def __init__(self, entry: dict[str, Any]) -> None:
        self.height, self.width = _whole(entry["height"]), _whole(entry["width"])
        if min(self.height, self.width) < 1 or self.height * self.width > MAX_PIXELS:
            raise ValueError(f"a picture measures {self.height} x {self.width}")
        self.file_name = _file_name(entry)


def _file_name(entry: dict[str, Any]) -> str:
    if "file_name" in entry:
        return inside(str(entry["file_name"]).replace("\\", "/"))
    return inside("/".join(PurePosixPath(urlsplit(entry["coco_url"]).path).parts[-2:]))


def read_json(path: str | os.PathLike[str], object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """What a JSON file holds. InputError `json_malformed`, and those of `fssdeploy.files.open_file`."""
    with open_file(path) as stream:
        text = stream.read()
    try:
        return json.loads(text, object_hook=object_hook)
    except (ValueError, TypeError, RecursionError) as error:
        name = os.fspath(path)
        raise InputError(
            "json_malformed", f"'{name}' cannot be read as JSON", str(error), "Download it again."
        ) from error


def _pack_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Polygons as arrays while the file is being read: COCO's and LVIS's millions of floats would take gigabytes."""
    outline = entry.get("segmentation")
    if isinstance(outline, list):
        entry["segmentation"] = [np.array(polygon, np.float64) for polygon in outline]
    return entry


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _decode(outline: Any, height: int, width: int) -> np.ndarray:
    """Bool (height, width) of run lengths or of packed polygons. ValueError or InputError if malformed."""
    if isinstance(outline, dict):
        mask = decode_rle(outline)
        if mask.shape != (height, width):
            raise ValueError(f"it measures {mask.shape[0]} x {mask.shape[1]}, the picture {height} x {width}")
        return mask
    if not isinstance(outline, list):
        raise ValueError("it is neither polygons nor run lengths")
    for polygon in outline:
        _check_polygon(polygon, height, width)
    # Fewer than three points enclose nothing, and pycocotools would take two for a box.
    polygons = [polygon.tolist() for polygon in outline if len(polygon) >= 6]
    if not polygons:
        return np.zeros((height, width), bool)
    return decode_rle(coco.merge(coco.frPyObjects(polygons, height, width)))


def _check_polygon(polygon: np.ndarray, height: int, width: int) -> None:
    if polygon.ndim != 1 or len(polygon) % 2:
        raise ValueError("a polygon is not a list of x, y, x, y, ...")
    # pycocotools' memory grows with the length of the edges; real outlines leave the picture by a few pixels at most.
    x, y = polygon[::2], polygon[1::2]
    if not ((x >= -width) & (x <= 2 * width) & (y >= -height) & (y <= 2 * height)).all():
        raise ValueError(f"a polygon lies far outside its picture of {height} x {width}")
