"""Logits on the canvas to masks at the size of the pictures: the last step of the stateless path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.images.geometry import unfit
from fssdeploy.protocol import Masks
from fssdeploy.serving.models.answers import Settings, answer_each, required
from fssdeploy.serving.models.prepare import unpack


class Finish:
    """`mask_logits` (n, 1, h, w), `placements` (n, 7) -> `masks` uint8 (n, H, W) of 0 and 1, `scores` float32 (n,).

    Masks are those of the local path to the bit; a score may differ in its last place where the NumPy here is another.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Check that the environment fits."""
        Settings.read(args)

    @answer_each
    def execute(self, request: Any) -> dict[str, np.ndarray]:
        """The masks of one request."""
        placements = unpack(required(request, "placements"))
        check_sizes([(where.height, where.width) for where in placements])
        rows = zip(required(request, "mask_logits"), placements, strict=True)
        masks = Masks(["object"], [{"object": unfit(logits[0], where)} for logits, where in rows], [])
        found = range(len(placements))
        return {
            "masks": np.stack([masks.binary(index, "object") for index in found]).astype(np.uint8),
            "scores": np.array([masks.score(index, "object") for index in found], np.float32),
        }


def check_sizes(sizes: Sequence[tuple[int, ...]]) -> None:
    """InputError ``picture_sizes`` unless all pictures, (height, width), are of one size: their masks are one array."""
    if len(set(sizes)) > 1:
        raise InputError(
            "picture_sizes",
            "the pictures of one request have different sizes",
            f"they are {', '.join(f'{height} x {width}' for height, width in sorted(set(sizes)))}",
            "Send pictures of different sizes in requests of their own.",
        )
