"""A scene made of numbers: features and mask logits of blobs, to time what follows the encoders without weights.

The number of points and the shapes of masks decide what graph, gates and union cost, and seeded weights give no
realistic ones: here several objects, each found by many points whose masks differ a little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.glue.affinity import AFFINITY
from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.protocol import StageSpec
from fssdeploy.systems.gfsam import GFSamConfig

OBJECTS, DISTRACTORS = 6, 3
# Radius of a blob as a share of the side, and by how much of it the masks of its points differ.
RADIUS, WOBBLE = (0.09, 0.15), 0.1
# How far features stray from the direction of what they show, and how alike a distractor is to the object.
NOISE, ALIKE = 0.5, 0.5


@dataclass
class Scene:
    """`query`, `support` (N, c) features; `mask` bool (S, S) of the support's object; `picture` uint8 (S, S, 3) as the
    query's encoder would have seen it; `centres` (b, 2), x and y, and `radii` (b,) of the blobs in it, in pixels.
    """

    query: np.ndarray
    support: np.ndarray
    mask: np.ndarray
    picture: np.ndarray
    centres: np.ndarray
    radii: np.ndarray
    mask_side: int

    def logits(self, points: np.ndarray) -> np.ndarray:
        """What SAM would say of points (n, 2): float32 (n, 1, 4g, 4g), the blob nearest to each, larger or smaller."""
        step = self.picture.shape[0] / self.mask_side
        middle = ((np.arange(self.mask_side) + 0.5) * step).astype(np.float32)
        nearest = (np.linalg.norm(points[:, None] - self.centres, axis=2) - self.radii).argmin(1)
        radii = self.radii[nearest] * (1 + WOBBLE * np.sin(points.sum(1)))
        x, y = self.centres[nearest].T
        apart = np.hypot(middle - x[:, None, None], middle[:, None] - y[:, None, None])
        return (10 * (radii[:, None, None] - apart) / radii[:, None, None])[:, None].astype(np.float32)


def blob_scene(config: GFSamConfig, seed: int) -> Scene:
    """A scene of the sizes of a configuration."""
    rng = np.random.default_rng(seed)
    side, cells = config.sam.image_size, config.grid
    count = OBJECTS + DISTRACTORS
    places = rng.permutation(16)[:count]  # on a grid of 4 x 4, so that blobs touch but rarely cover each other
    centres = ((np.stack([places % 4, places // 4], 1) + rng.uniform(0.3, 0.7, (count, 2))) * side / 4).astype(
        np.float32
    )
    radii = (rng.uniform(*RADIUS, count) * side).astype(np.float32)
    surroundings, thing, other = rng.standard_normal((3, config.encoder.dim)).astype(np.float32)
    distractor = ALIKE * thing + (1 - ALIKE) * other
    shown = [thing] * OBJECTS + [distractor] * DISTRACTORS

    middle = (np.arange(cells) + 0.5) * side / cells
    query = np.tile(surroundings, (cells, cells, 1))
    pixels = np.arange(side)
    picture = np.full((side, side, 3), 90, np.uint8)
    for (x, y), radius, direction in zip(centres, radii, shown, strict=True):
        query[np.hypot(middle - x, middle[:, None] - y) < radius] = direction
        picture[np.hypot(pixels - x, pixels[:, None] - y) < radius] = rng.integers(120, 250, 3)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
    inside = (np.abs(middle - side / 2) < side / 4)[:, None] & (np.abs(middle - side / 2) < side / 4)
    support = np.where(inside[..., None], thing, surroundings)

    def noisy(features: np.ndarray) -> np.ndarray:
        strayed = features + NOISE * rng.standard_normal(features.shape)
        return strayed.reshape(cells * cells, -1).astype(np.float32)

    return Scene(noisy(query), noisy(support), mask, picture, centres, radii, 4 * config.sam.grid)


class BlobEngine:
    """Stands for SAM's decoder, which answers every point with its blob of a scene; affinities are NumPy's."""

    name = "blobs"

    def __init__(self, scene: Scene, specs: Mapping[str, StageSpec]) -> None:
        self.scene = scene
        self.specs = dict(specs)

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if stage == AFFINITY:
            return {"cosine": inputs["rows"] @ unit(inputs["features"][0]).T}
        logits = self.scene.logits(inputs["points"][:, 0])
        return {"mask_logits": logits, "iou": np.ones((len(logits), 1), np.float32)}

    def describe(self) -> dict[str, Any]:
        return {"runtime": self.name}
