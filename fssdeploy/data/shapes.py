"""shapes-5i: a procedural few-shot benchmark that needs no download.

Twenty classes, each a silhouette with a texture: five shapes by four textures, so that a class is told by neither
alone. Fold f tests the five classes on the f-th diagonal of that table: every fold holds every shape. Colours are drawn
anew for every picture and mean nothing. A picture holds its target, an object with exactly the target's two colours,
one with its texture and sometimes a fourth, over a textured background of the same palette with small clutter; objects
differ in size and rotation, hide each other (at least 60 % of each stays visible), and lie under a gradient of light
and noise.

Training pictures of a fold hold base classes only. Picture i of a split is a function of (seed, split, fold, i) alone.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fssdeploy.data.dataset import Dataset, Finding, Listing, Regions, Split, blocks
from fssdeploy.data.episodes import Episode, draw_episode
from fssdeploy.errors import InputError
from fssdeploy.files import made_folder, write_atomic

# Raise it when a picture comes out differently: caches and recorded figures belong to one version.
VERSION = 1
SIDE = 256
SHAPES = ("disc", "ring", "flower", "cross", "bar")
TEXTURES = ("plain", "striped", "checked", "dotted")
FOLDS = 4
PICTURES = {"train": 8_000, "test": 1_000}

# Share of an object that others may hide, and the least that an object shows of the whole picture.
MOST_HIDDEN = 0.4
LEAST_AREA = 0.03
_ITEM = re.compile(r"(train|test)-seed(\d+)-fold([0-3])-(\d+)")


def class_of(shape: int, texture: int) -> int:
    """Class index of a shape with a texture; blocks of five are the diagonals of the table."""
    return (texture - shape) % len(TEXTURES) * len(SHAPES) + shape


def parts_of(class_index: int) -> tuple[int, int]:
    """Shape and texture of a class."""
    diagonal, shape = divmod(class_index, len(SHAPES))
    return shape, (shape + diagonal) % len(TEXTURES)


@dataclass(frozen=True)
class Scene:
    """A rendered picture, uint8 (S, S, 3), and the object seen at every pixel, uint8 (S, S).

    Object values are 0 where there is none, else 1 + 8 * class + number of the object in the picture.
    """

    picture: np.ndarray
    objects: np.ndarray

    def classes(self) -> np.ndarray:
        """Class index at every pixel, int64 (S, S); -1 where there is no object."""
        return np.where(self.objects > 0, (self.objects.astype(np.int64) - 1) // 8, -1)


class ShapesDataset(Dataset):
    """With a `cache` directory, every picture is rendered once and kept there (262 kB each)."""

    name = "shapes-5i"
    folds = FOLDS
    class_names = tuple(f"{TEXTURES[texture]} {SHAPES[shape]}" for shape, texture in map(parts_of, range(20)))

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache

    def classes(self, fold: int, split: Split) -> Sequence[int]:
        self.check_fold(fold)
        return blocks(len(self.class_names), FOLDS, fold, split)

    def listing(self, fold: int, split: Split, seed: int = 0) -> Listing:
        """Items by their target; what else a picture shows does not list it elsewhere."""
        classes, count = self.classes(fold, split), PICTURES[split]
        return {
            each: [f"{split}-seed{seed}-fold{fold}-{i}" for i in range(rank, count, len(classes))]
            for rank, each in enumerate(classes)
        }

    def episode(self, fold: int, split: Split, shot: int, seed: int, index: int) -> Episode:
        """As for any data set, except that another seed means other pictures, too."""
        listing = _listing(self, fold, split, seed)
        return draw_episode(listing, self.uniform_over, shot, (seed, index), self.class_names)

    def scene(self, item: str) -> Scene:
        """The picture with what is known about it. InputError for a name that is none."""
        found = _ITEM.fullmatch(item)
        if not found:
            raise InputError("item_unknown", f"shapes-5i has no picture '{item}'", "", "Names: test-seed0-fold0-17.")
        split, seed, fold, index = found.groups()
        if self.cache is None:
            return _render(split, int(seed), int(fold), int(index))
        # Another version of the drawing code must not find the pictures of this one.
        file = self.cache / f"v{VERSION}" / f"{item}.npy"
        if not file.exists():
            scene = _render(split, int(seed), int(fold), int(index))
            stored = io.BytesIO()
            np.save(stored, np.concatenate([scene.picture, scene.objects[..., None]], 2))
            with made_folder(file.parent):
                write_atomic(file, stored.getvalue())
            return scene
        try:
            layers = np.load(file)
        except (ValueError, EOFError, OSError) as error:
            raise InputError("picture_unreadable", f"'{file}' is damaged", str(error), "Delete it.") from error
        return Scene(layers[..., :3], layers[..., 3])

    def picture(self, item: str) -> np.ndarray:
        return self.scene(item).picture

    def mask(self, item: str, class_index: int) -> np.ndarray:
        return (self.scene(item).classes() == class_index).astype(np.uint8)

    def regions(self, item: str, classes: Sequence[int]) -> Regions:
        """All objects of the picture, listed or not: those of a training picture are of base classes."""
        scene = self.scene(item)
        present = np.flatnonzero(np.bincount(scene.objects.ravel(), minlength=2)[1:]) + 1
        objects = [scene.objects == value for value in present]
        return Regions(scene.picture, scene.classes(), objects)

    def check(self) -> list[Finding]:
        return [Finding("pictures", "ok", "made as they are asked for; nothing is stored")]


def open_dataset(root: Path | None) -> ShapesDataset:
    """shapes-5i; in `root`, if given, rendered pictures are kept."""
    return ShapesDataset(root)


@lru_cache(maxsize=8)
def _listing(dataset: ShapesDataset, fold: int, split: Split, seed: int) -> Listing:
    return dataset.listing(fold, split, seed)


@lru_cache(maxsize=64)
def _render(split: str, seed: int, fold: int, index: int) -> Scene:
    """Draw one picture; see the module for what it holds."""
    rng = np.random.default_rng([seed, split == "test", fold, index])
    targets = blocks(20, FOLDS, fold, "test" if split == "test" else "train")
    others = range(20) if split == "test" else targets
    target = targets[index % len(targets)]
    palette = _palette(rng)
    canvas = numbers = np.empty(0)
    classes: list[int] = []
    areas: list[int] = []

    def add(chosen: int, colours: np.ndarray, share: float, shrink: float) -> bool:
        """Draw an object where it hides none too much; False if no place was found."""
        shape, texture = parts_of(chosen)
        hidden = MOST_HIDDEN if rng.random() < 0.3 else 0.08
        for _ in range(20):
            silhouette = _Silhouette.draw(rng, shape, max(1.2 * LEAST_AREA, share * shrink))
            covered = np.bincount(numbers[silhouette.window][silhouette.inside], minlength=len(areas) + 1)[1:]
            seen = np.bincount(numbers.ravel(), minlength=len(areas) + 1)[1:] - covered
            least = np.maximum((1 - hidden) * np.array(areas), LEAST_AREA * SIDE * SIDE)
            if (seen >= least).all() and silhouette.inside.sum() >= LEAST_AREA * SIDE * SIDE:
                break
        else:
            return False
        paint = _texture(rng, texture, silhouette, colours)
        alpha = silhouette.alpha[..., None]
        canvas[silhouette.window] = canvas[silhouette.window] * (1 - alpha) + paint * alpha
        classes.append(chosen)
        areas.append(int(silhouette.inside.sum()))
        numbers[silhouette.window][silhouette.inside] = len(classes)
        return True

    share = _log_uniform(rng, 0.05, 0.2)
    colours = _two(rng, palette)
    shape, texture = parts_of(target)
    same_texture = [each for each in others if parts_of(each)[1] == texture and each != target]
    anything = [each for each in others if each != target]
    same_shape = [each for each in anything if parts_of(each)[0] == shape]
    plan = [
        (target, colours, share),
        # Usually larger than the target: nor does "the largest" tell it.
        (_pick(rng, [*anything, *same_shape * 3]), colours, min(0.28, share * rng.uniform(1.0, 1.7))),
        (_pick(rng, same_texture), _two(rng, palette), _log_uniform(rng, 0.05, 0.2)),
    ]
    for _ in range(rng.integers(0, 2)):
        plan.append((_pick(rng, anything), _two(rng, palette), _log_uniform(rng, 0.035, 0.12)))
    for attempt in itertools.count():  # smaller objects are tried until all that matter fit
        canvas, classes, areas = _background(rng, palette), [], []
        numbers = np.zeros((SIDE, SIDE), np.uint8)
        placed = set()
        for each in rng.permutation(len(plan)):  # being on top tells nothing
            chosen, colours, share = plan[each]
            if add(chosen, colours, share, shrink=0.9**attempt):
                placed.add(int(each))
        if placed >= {0, 1, 2}:
            break
    codes = np.array([0, *(1 + 8 * each + number for number, each in enumerate(classes))], np.uint8)
    return Scene(_light(rng, canvas), codes[numbers])


@dataclass(frozen=True)
class _Silhouette:
    """An object's outline: where on the canvas, its own coordinates in pixels, and how much of each pixel it covers."""

    window: tuple[slice, slice]
    u: np.ndarray
    v: np.ndarray
    radius: float
    alpha: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        inside: np.ndarray = self.alpha > 0.5
        return inside

    @staticmethod
    def draw(rng: np.random.Generator, shape: int, share: float) -> _Silhouette:
        """A shape that fills `share` of the picture before anything is cut off, at a random place and rotation."""
        unit, reach = _UNIT[shape]
        radius = float(np.sqrt(share * SIDE * SIDE / unit))
        margin = 0.85 * radius
        x, y = rng.uniform(margin, SIDE - margin, 2)
        angle, squeeze = rng.uniform(-np.pi / 6, np.pi / 6), rng.uniform(0.85, 1.15)
        extent = radius * reach * 1.2 + 2
        left, right = max(0, int(x - extent)), min(SIDE, int(x + extent) + 1)
        top, bottom = max(0, int(y - extent)), min(SIDE, int(y + extent) + 1)
        columns = np.arange(left, right, dtype=np.float32) + 0.5 - x
        rows = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y)[:, None]
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u = (cosine * columns + sine * rows) * np.float32(squeeze)
        v = (cosine * rows - sine * columns) / np.float32(squeeze)
        distance = _OUTLINES[shape](u / np.float32(radius), v / np.float32(radius)) * radius
        return _Silhouette((slice(top, bottom), slice(left, right)), u, v, radius, np.clip(0.5 - distance, 0, 1))


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 1


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.75) - 0.25


def _flower(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Seven pointed petals; the slope of their flanks brings the difference in radius close to a distance."""
    petals = np.abs((np.arctan2(v, u) * np.float32(7 / (2 * np.pi))) % 1 - 0.5) * 2
    return (np.hypot(u, v) - (0.5 + 0.5 * petals)) * np.float32(0.6)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1, v - 0.3), np.maximum(v - 1, u - 0.3))


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u) - 1, np.abs(v) - 0.28)


# By shape: distance to the outline in units of the radius (negative inside); its area and farthest point for radius 1.
_OUTLINES = (_disc, _ring, _flower, _cross, _bar)
_UNIT = ((np.pi, 1.0), (np.pi * 0.75, 1.0), (1.83, 1.0), (2.04, 1.05), (1.12, 1.04))


def _texture(rng: np.random.Generator, texture: int, silhouette: _Silhouette, colours: np.ndarray) -> np.ndarray:
    """The object's paint, float32 (h, w, 3)."""
    period = float(np.clip(0.2 * silhouette.radius, 6, 10) * rng.uniform(0.85, 1.2))
    ink = _pattern(rng, texture, silhouette.u, silhouette.v, period)
    shade = 1 + rng.uniform(-0.2, 0.2) * silhouette.u / (2 * silhouette.radius)
    paint: np.ndarray = (colours[0] * (1 - ink[..., None]) + colours[1] * ink[..., None]) * shade[..., None]
    return paint


def _pattern(rng: np.random.Generator, texture: int, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """How much ink lies on every point, 0..1, for coordinates and a period in pixels."""
    u, v = u + np.float32(rng.uniform(0, period)), v + np.float32(rng.uniform(0, period))
    wave = np.float32(2 * np.pi / period)
    if texture == 0:  # plain
        return np.zeros(np.broadcast(u, v).shape, np.float32)
    if texture == 1:  # stripes
        value = np.sin(wave * u)
    elif texture == 2:  # checks
        value = np.sin(wave / 2 * u) * np.sin(wave / 2 * v) * 2
    else:  # dots
        value = (np.cos(wave * u) + np.cos(wave * v) - 1) * 1.2
    ink: np.ndarray = np.clip(0.5 + value * np.float32(period / 6), 0, 1)
    return ink


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Six colours, float32 (6, 3) in 0..255, no two alike."""
    colours: list[np.ndarray] = []
    while len(colours) < 6:
        colour = rng.uniform(20, 235, 3)
        if all(np.abs(colour - other).sum() > 150 for other in colours):
            colours.append(colour)
    return np.array(colours, np.float32)


def _two(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    first, second = rng.choice(len(palette), 2, replace=False)
    return palette[[first, second]]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _pick(rng: np.random.Generator, choices: Sequence[int]) -> int:
    return choices[int(rng.integers(len(choices)))]


def _background(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """Two textures of dull contrast that meet along a wavy line, strewn with small blots; float32 (S, S, 3)."""
    x = np.arange(SIDE, dtype=np.float32)
    rows = np.arange(SIDE, dtype=np.float32)[:, None]
    bend = np.sin(x * np.float32(rng.uniform(0.01, 0.04)) + np.float32(rng.uniform(0, 6))) * np.float32(30)
    border = np.float32(rng.uniform(0.2, 0.8) * SIDE) + bend
    lowest, highest = int(max(0, border.min())), int(min(SIDE, border.max() + 1))
    fields = []
    for y in (rows[:highest], rows[lowest:]):  # each field only where it can be seen
        angle = rng.uniform(0, np.pi)
        u = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
        v = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x
        ink = _pattern(rng, int(rng.integers(len(TEXTURES))), u, v, float(rng.uniform(5, 30)))
        first, second = _two(rng, palette)
        second = first + (second - first) * np.float32(rng.uniform(0.1, 0.4))
        fields.append(first + (second - first) * ink[..., None])
    above, below = fields
    canvas = np.concatenate([above, below[highest - lowest :]])
    meeting = np.s_[lowest:highest]
    canvas[meeting] = np.where((rows[meeting] < border)[..., None], above[meeting], below[: highest - lowest])
    for _ in range(rng.integers(8, 20)):
        half_height, half_width = rng.integers(2, 12, 2)
        row, column = rng.integers(0, SIDE, 2)
        window = np.s_[max(0, row - half_height) : row + half_height, max(0, column - half_width) : column + half_width]
        canvas[window] = palette[rng.integers(len(palette))] * np.float32(rng.uniform(0.7, 1.2))
    return canvas


def _light(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """A gradient of light over everything, then noise."""
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    across, down = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    light = np.float32(rng.uniform(0.75, 1.15)) * (1 + across * ramp[None] + down * ramp[:, None])
    noise = rng.standard_normal((SIDE, SIDE), np.float32) * np.float32(rng.uniform(2, 8))
    picture: np.ndarray = np.clip(canvas * light[..., None] + noise[..., None], 0, 255).astype(np.uint8)
    return picture
