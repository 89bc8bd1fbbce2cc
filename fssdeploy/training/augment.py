"""Augmentation of a picture together with its label map; every draw comes from the generator given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from fssdeploy.images.geometry import PADDING_COLOUR


@dataclass(frozen=True)
class Augmentation:
    """HDMNet's order (FS-DINO trains with the same): scale, rotation, blur, mirror; then the caller resizes.

    `scale`: least and largest factor; `rotation`: degrees to either side; `blur` and `mirror`: probabilities.
    """

    scale: tuple[float, float] = (0.8, 1.25)
    rotation: float = 10.0
    blur: float = 0.5
    mirror: float = 0.5


NONE = Augmentation((1.0, 1.0), 0.0, 0.0, 0.0)


def augment(
    picture: np.ndarray,
    labels: np.ndarray,
    how: Augmentation,
    rng: np.random.Generator,
    outside: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 (H, W, 3) and labels uint8 (H, W) of the same size as before.

    What comes from outside the picture is the ImageNet mean, labelled `outside`.
    """
    height, width = labels.shape
    factor = rng.uniform(*how.scale)
    angle = np.deg2rad(rng.uniform(-how.rotation, how.rotation)) if how.rotation else 0.0
    if factor != 1 or angle:
        # A random window where the picture grows, a random place where it shrinks.
        slack_x, slack_y = width * (factor - 1) / 2, height * (factor - 1) / 2
        shift_x, shift_y = rng.uniform(-abs(slack_x), abs(slack_x)), rng.uniform(-abs(slack_y), abs(slack_y))
        cosine, sine = np.cos(angle) / factor, np.sin(angle) / factor
        x, y = width / 2 + shift_x, height / 2 + shift_y
        affine = (cosine, sine, width / 2 - cosine * x - sine * y, -sine, cosine, height / 2 + sine * x - cosine * y)
        mode = Image.Transform.AFFINE
        picture = np.asarray(
            Image.fromarray(picture).transform(
                (width, height), mode, affine, Image.Resampling.BILINEAR, fillcolor=PADDING_COLOUR
            )
        )
        labels = np.asarray(
            Image.fromarray(labels).transform(
                (width, height), mode, affine, Image.Resampling.NEAREST, fillcolor=outside
            )
        )
    if rng.random() < how.blur:
        blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 1.0)))
        picture = np.asarray(blurred)
    if rng.random() < how.mirror:
        picture, labels = picture[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(picture), np.ascontiguousarray(labels)


@dataclass(frozen=True)
class Crop:
    """Pre-training: a random window, mirrored at random, its colours changed.

    `window`: least and largest side, as a share of the picture's; `gain`: how far every channel is scaled at most;
    `swaps`: channels are permuted, for classes that colour says nothing about.
    """

    window: tuple[float, float] = (0.7, 1.0)
    gain: float = 0.3
    swaps: bool = True


def crop(
    picture: np.ndarray, labels: np.ndarray, how: Crop, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 (S, S, 3) and labels uint8 (S, S), or several (S, S, L), of a random window, S = `size`."""
    height, width = labels.shape[:2]
    share = rng.uniform(*how.window)
    left, top = rng.uniform(0, width * (1 - share)), rng.uniform(0, height * (1 - share))
    box = (left, top, left + width * share, top + height * share)
    picture, labels = resized(picture, labels, size, box)
    if rng.random() < 0.5:
        picture, labels = picture[:, ::-1], labels[:, ::-1]
    if how.swaps:
        picture = picture[..., rng.permutation(3)]
    gain = rng.uniform(1 - how.gain, 1 + how.gain, 3).astype(np.float32)
    return np.minimum(picture * gain, 255).astype(np.uint8), np.ascontiguousarray(labels)


def resized(
    picture: np.ndarray, labels: np.ndarray, size: int, box: tuple[float, float, float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Both, or the part in `box`, squashed to a square: the picture antialiased, labels by the nearest."""
    shape = (size, size)
    small = Image.fromarray(picture).resize(shape, Image.Resampling.BILINEAR, box)
    if labels.ndim == 2:
        return np.asarray(small), _nearest(labels, shape, box)
    return np.asarray(small), np.stack([_nearest(each, shape, box) for each in np.moveaxis(labels, -1, 0)], -1)


def _nearest(labels: np.ndarray, shape: tuple[int, int], box: tuple[float, float, float, float] | None) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(labels)).resize(shape, Image.Resampling.NEAREST, box))
