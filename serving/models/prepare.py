"""Pictures and masks from bytes to an encoder's canvas: the first step of the stateless path.

A picture is a picture file of any common kind, or the bytes of a ``.npy`` with an array uint8 (height, width, 3); a
mask is anything that `load_mask` takes as bytes. Nothing is computed here that the local path does not compute: both
call `Preprocessing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.images.geometry import Placement
from fssdeploy.images.masks import load_mask
from fssdeploy.images.pictures import load_picture
from fssdeploy.pipeline import Preprocessing
from fssdeploy.serving.models.answers import Settings, answer_each, files_of


class _Prepare:
    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the settings: where pictures lie on the canvas, and how large they may be."""
        settings = Settings.read(args)
        self._preprocessing = Preprocessing(
            settings.number("canvas"), settings.number("patch"), settings.parameters["geometry"]
        )
        self._max_bytes = settings.number("max_picture_bytes")
        self._max_pixels = settings.number("max_pixels")

    def _pictures(self, request: Any, name: str) -> list[np.ndarray]:
        files = files_of(request, name, self._max_bytes)
        return [
            load_picture(file, f"picture {number}", max_pixels=self._max_pixels) for number, file in enumerate(files, 1)
        ]


class PrepareQuery(_Prepare):
    """`pictures` -> `picture` uint8 (n, 3, S, S), `placements` int32 (n, 7): `Placement`, field by field.

    The optional input `after` is not read: in an ensemble it makes this step wait for another.
    """

    @answer_each
    def execute(self, request: Any) -> dict[str, np.ndarray]:
        """The canvases of one request's pictures."""
        canvases, placements = self._preprocessing.fit_pictures(self._pictures(request, "pictures"))
        return {"picture": canvases, "placements": pack(placements)}


class PrepareSupport(_Prepare):
    """`pictures`, `masks`, one for each -> `picture` uint8 (k, 3, S, S), `mask` float32 (k, 1, S, S)."""

    @answer_each
    def execute(self, request: Any) -> dict[str, np.ndarray]:
        """The canvases of one request's shots."""
        pictures = self._pictures(request, "pictures")
        files = files_of(request, "masks", self._max_bytes)
        if len(files) != len(pictures):
            raise InputError(
                "masks_count",
                f"{len(pictures)} support pictures came with {len(files)} masks",
                "",
                "Send one mask for each support picture.",
            )
        masks = [
            load_mask(file, picture.shape[:2], max_pixels=self._max_pixels)
            for file, picture in zip(files, pictures, strict=True)
        ]
        canvases, placements = self._preprocessing.fit_pictures(pictures)
        return {"picture": canvases, "mask": self._preprocessing.fit_masks(masks, placements)}


def pack(placements: Sequence[Placement]) -> np.ndarray:
    """Placements as int32 (n, 7)."""
    return np.array([astuple(where) for where in placements], np.int32)


def unpack(placements: np.ndarray) -> list[Placement]:
    """The placements in an array (n, 7). Raises InputError for another shape or sides below 1."""
    whole = placements.ndim == 2 and placements.shape[1] == len(Placement.__dataclass_fields__)
    if not whole or (placements < 0).any() or (placements[:, [0, 1, 2, 5, 6]] < 1).any():
        raise InputError(
            "placements",
            f"placements of the shape {placements.shape} cannot be used",
            "each row holds the height and width of a picture and where it lies on the canvas",
            "Pass on what the model that prepares queries returned.",
        )
    return [Placement(*map(int, row)) for row in placements]
