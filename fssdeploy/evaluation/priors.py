"""What an encoder can do without any training: soft maps from its tokens alone, cut at the best threshold.

The least that a trained system must beat. Thresholds are chosen on base classes, so that a baseline is as good as it
can be without having seen the classes it is tested on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.data.dataset import IGNORE, Dataset
from fssdeploy.errors import FssError, InputError
from fssdeploy.evaluation.evaluate import Canvas, load_case
from fssdeploy.evaluation.predictors import CachedEncoder, Support
from fssdeploy.images.geometry import Placement, fit_mask, unfit

CALIBRATION_EPISODES = 100
# A token shows the object if at least this part of its cell is object, or if no cell shows more.
FOREGROUND_SHARE = 0.5


@dataclass(frozen=True)
class Cells:
    """A support at token resolution: tokens (n, C), the share of object and of picture in every cell (n,)."""

    tokens: np.ndarray
    object: np.ndarray
    picture: np.ndarray

    @property
    def foreground(self) -> np.ndarray:
        """Unit tokens (m, C) of the object, m >= 1."""
        return _unit(self.tokens[self.object >= min(FOREGROUND_SHARE, self.object.max())])


# From a support and the unit tokens (n, C) of a query to a map (n,).
PriorRule = Callable[[Cells, np.ndarray], np.ndarray]


def prototype_cosine(support: Cells, query: np.ndarray) -> np.ndarray:
    """Cosine with the masked mean of the object's tokens (PANet, section 3; FS-DINO, eq. 2)."""
    return query @ _prototype(support.tokens, support.object)


def best_match(support: Cells, query: np.ndarray) -> np.ndarray:
    """The largest cosine with any token of the object (PFENet, section 3.2)."""
    return (query @ support.foreground.T).max(1)


def mean_match(support: Cells, query: np.ndarray) -> np.ndarray:
    """The mean cosine with the tokens of the object: the correlation, averaged over its support side."""
    return (query @ support.foreground.T).mean(1)


def nearest_prototype(support: Cells, query: np.ndarray) -> np.ndarray:
    """How much nearer the object's prototype is than that of the background: above 0 is object."""
    return prototype_cosine(support, query) - query @ _prototype(support.tokens, support.picture - support.object)


@dataclass(frozen=True)
class Prior:
    """A rule; whether its map is stretched to 0..1 in every query; which thresholds may be chosen, if any."""

    rule: PriorRule
    stretched: bool
    thresholds: np.ndarray


PRIORS = {
    "prototype cosine": Prior(prototype_cosine, False, np.linspace(-1, 1, 401).round(3)),
    "best match (PFENet)": Prior(best_match, True, np.linspace(0, 1, 201).round(3)),
    "mean match": Prior(mean_match, True, np.linspace(0, 1, 201).round(3)),
    "nearest of two prototypes": Prior(nearest_prototype, False, np.zeros(1)),
}


class PriorPredictor:
    """One prior at one threshold. Maps of k shots are averaged, each stretched for itself as PFENet does."""

    def __init__(self, encoder: CachedEncoder, name: str, threshold: float, encoder_fingerprint: str) -> None:
        self.name = name
        self.threshold = threshold
        self.fingerprint = hashlib.sha256(f"{encoder_fingerprint} {name} {threshold!r}".encode()).hexdigest()
        self._encoder = encoder

    def describe(self) -> dict[str, Any]:
        return {"k_shot": "mean of the maps", "threshold": self.threshold}

    def scores(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        """How far the map lies above the threshold."""
        return prior_map(PRIORS[self.name], self._encoder, supports, query) - np.float32(self.threshold)

    def predict(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        return self.scores(supports, query, key) > 0


def prior_map(prior: Prior, encoder: CachedEncoder, supports: Sequence[Support], query: np.ndarray) -> np.ndarray:
    """The map float32 (height, width) of a query. InputError `mask_empty` for a support without an object."""
    features = encoder.encode([query])
    placement = features.placements[0]
    tokens = _unit(features.tensors["tokens"][0])
    side = round(len(tokens) ** 0.5)
    seen = cell_shares(np.ones((placement.height, placement.width), bool), placement, side) > 0
    maps = []
    for picture, mask in supports:
        values = prior.rule(_cells(encoder, picture, mask), tokens)
        if prior.stretched:
            low, high = values[seen].min(), values[seen].max()
            values = (values - low) / (high - low + 1e-7)
        maps.append(values)
    return unfit(np.mean(maps, 0).reshape(side, side), placement)


def cell_shares(mask: np.ndarray, placement: Placement, side: int) -> np.ndarray:
    """Share of a mask bool (H, W) in every one of side * side cells of its canvas, float32 (side * side,)."""
    patch = placement.canvas // side
    return fit_mask(mask, placement).reshape(side, patch, side, patch).mean((1, 3)).ravel()


def calibrate(
    encoder: CachedEncoder,
    dataset: Dataset,
    fold: int,
    shot: int,
    seed: int,
    *,
    canvas: Canvas | None = None,
    episodes: int = CALIBRATION_EPISODES,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """The threshold of every prior with the highest mIoU on episodes of the base classes of a fold.

    Episodes with an unreadable picture or an empty support mask are left out. InputError if the fold has no base
    classes, or none of their episodes can be used.
    """
    if not dataset.classes(fold, "train"):
        raise InputError(
            "split_missing",
            f"{dataset.name} has no base classes",
            "the thresholds of the training-free priors are chosen on classes that are not tested",
            "Leave out --priors.",
        )
    sums: dict[str, dict[int, np.ndarray]] = {name: {} for name in PRIORS}
    for index in range(episodes):
        progress(f"choosing thresholds on base classes, episode {index + 1} of {episodes}")
        episode = dataset.episode(fold, "train", shot, seed, index)
        try:
            case = load_case(dataset, episode, canvas)
        except FssError:
            continue
        if not all(mask.any() for _, mask in case.supports):
            continue
        for name, prior in PRIORS.items():
            values = prior_map(prior, encoder, case.supports, case.query)
            areas = areas_by_threshold(values, case.truth, prior.thresholds)
            sums[name][episode.class_index] = sums[name].get(episode.class_index, 0) + areas
    if not all(sums.values()):
        raise InputError("no_base_episode", f"no episode of the base classes of {dataset.name} can be used")
    return {name: float(PRIORS[name].thresholds[_best(by_class)]) for name, by_class in sums.items()}


def areas_by_threshold(values: np.ndarray, truth: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Intersection and union with truth uint8 (H, W) of what lies above each threshold (ascending): int64 (n, 2)."""
    valid = truth != IGNORE
    # How many thresholds a pixel lies above: it is found by these and by no other.
    ranks = np.searchsorted(thresholds, values[valid])
    inside = truth[valid] == 1
    found = _at_least(ranks, len(thresholds))
    intersection = _at_least(ranks[inside], len(thresholds))
    return np.stack([intersection, found + np.count_nonzero(inside) - intersection], 1)


def _at_least(ranks: np.ndarray, count: int) -> np.ndarray:
    """How many ranks are above i, for i below `count`."""
    return np.bincount(ranks, minlength=count + 1)[::-1].cumsum()[::-1][1:]


def _best(by_class: Mapping[int, np.ndarray]) -> int:
    areas = np.stack(list(by_class.values()))
    return int((areas[..., 0] / np.maximum(areas[..., 1], 1)).mean(0).argmax())


def _cells(encoder: CachedEncoder, picture: np.ndarray, mask: np.ndarray) -> Cells:
    features = encoder.encode([picture])
    placement, tokens = features.placements[0], features.tensors["tokens"][0]
    side = round(len(tokens) ** 0.5)
    shares = cell_shares(mask, placement, side)
    if not shares.any():
        raise InputError("mask_empty", "a support mask marks nothing", "", "Mark the object in every picture.")
    return Cells(tokens, shares, cell_shares(np.ones_like(mask), placement, side))


def _prototype(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return _unit(weight @ tokens)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
