"""GF-SAM as research code runs it: supports are encoded for every query, and every step works on all there is.

Similarities are N x N matrices, masks stay at full size from the decoder on, and loops go through masks, components and
points, step by step as in Zhang et al., "Bridge the Points" (2024), sections 3.2 to 3.4, and its released code. Same
weights, same masks as `fssdeploy.glue.gfsam.system` with ``compat="original"``; only slower. Masks must not be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components

from fssdeploy.benchmarks.baselines.sam_decoder import decode as decode_prompts
from fssdeploy.benchmarks.stopwatch import Stopwatch
from fssdeploy.images.geometry import fit_picture, place
from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from fssdeploy.systems.gfsam import GFSamConfig, GFSamNetworks

# Prompts for SAM at a time.
PROMPTS = 64
MEAN_EPSILON, RANGE_EPSILON = 1e-7, 1e-6
# Shares above this are 1 but for rounding.
WHOLE = 1 - 1e-6
REJECTED, SELECTED, WAITING = 0, 1, 2

# From points (B, 2), x and y on the canvas, to mask logits (B, 1, 4g, 4g).
Decoder = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Answer:
    """`mask` bool (S, S) on the canvas, the `points` (P, 2) that were asked about and what became of each, (P,)."""

    mask: np.ndarray
    points: np.ndarray
    labels: np.ndarray


@torch.inference_mode()
def segment_pictures(
    model: GFSamNetworks,
    picture: np.ndarray,
    supports: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    watch: Stopwatch,
) -> Answer:
    """Find in a picture uint8 (height, width, 3) what bool masks show in k support pictures, all of any size."""
    config = model.config
    with watch.section("picture to canvas"):
        query, *shots = (_canvas(each, config.sam.image_size) for each in (picture, *supports))
        objects = torch.stack([_mask_on_canvas(mask, config.sam.image_size) for mask in masks])
    with watch.section("matching encoder"):
        support_features = torch.stack([encode(model, shot) for shot in shots])
        query_features = encode(model, query)
    with watch.section("SAM encoder"):
        embedding = model.sam.encode(query.mul(255).byte()[None])

    def decode(points: torch.Tensor) -> torch.Tensor:
        prompts = points[:, None].float()
        return decode_prompts(model.sam, embedding, prompts, torch.ones(prompts.shape[:2], dtype=torch.int64))[:, :1]

    return segment_features(config, query_features, support_features, objects, decode, watch)


@torch.inference_mode()
def segment_features(
    config: GFSamConfig,
    query: torch.Tensor,
    supports: torch.Tensor,
    masks: torch.Tensor,
    decode: Decoder,
    watch: Stopwatch,
) -> Answer:
    """All that follows the encoders: features (N, c) and (k, N, c), float masks (k, S, S)."""
    side, cells = config.sam.image_size, config.grid
    with watch.section("maps and points"):
        weights = F.interpolate(masks[:, None], (cells, cells), mode="bilinear", align_corners=True).flatten(1)
        mean, peak = prior_maps(query, supports, weights)
        negative, _ = prior_maps(query, supports, 1 - weights)
        points, places = choose_points(mean * peak, negative, side, cells, config.max_points)
    if not len(points):
        return Answer(np.zeros((side, side), bool), points.numpy(), np.zeros(0, np.int64))

    batches = []
    for start in range(0, len(points), PROMPTS):
        with watch.section("decoder"):
            logits = decode(points[start : start + PROMPTS])
        with watch.section("masks at full size"):
            enlarged = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
            batches.append(F.interpolate(enlarged, (side, side), mode="bilinear", align_corners=False)[:, 0] > 0)
    candidates = torch.cat(batches)

    with watch.section("graph and gates"):
        components = cluster(candidates, places, cells)
        kept, score = positive_gate(candidates, components, mean, negative, cells)
        consistent = overshoot_gate(candidates, components, query, places, cells)
        labels = torch.where(kept & consistent, SELECTED, torch.where(kept ^ consistent, WAITING, REJECTED))
    with watch.section("union"):
        result = torch.zeros(side, side, dtype=torch.bool)
        for mask, label in zip(candidates, labels, strict=True):
            if label == SELECTED:
                result = result | mask
        if not result.any():
            result = candidates[torch.where(labels == WAITING, score, 0).argmax()]
    return Answer(result.numpy(), points.numpy(), labels.numpy())


def encode(model: GFSamNetworks, canvas: torch.Tensor) -> torch.Tensor:
    """Canvas (3, S, S), 0 to 1, to features (N, c) of its cells: each channel of length one over the picture."""
    config = model.config
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    size = (config.image_size, config.image_size)
    resized = F.interpolate(canvas[None], size, mode="bilinear", antialias=config.antialias)
    tokens = model.encoder.streams(model.encoder.embed((resized - mean) / std))[-1]
    return F.normalize(tokens[:, model.encoder.prefix :], dim=1)[0]


def prior_maps(query: torch.Tensor, supports: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and largest cosine (N,) of every query cell to the weighted cells (k, N) of supports, averaged over k."""
    means, peaks = [], []
    for support, weight in zip(supports, weights, strict=True):
        lengths = support.norm(dim=1)[:, None] * query.norm(dim=1)
        weighted = weight[:, None] * (support @ query.T / (lengths + MEAN_EPSILON))
        means.append(weighted.mean(0) / (weight.mean() + MEAN_EPSILON))
        peaks.append(weighted.max(0).values)
    return torch.stack(means).mean(0), torch.stack(peaks).mean(0)


def choose_points(
    similar: torch.Tensor, negative: torch.Tensor, side: int, cells: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (P, 2) on the canvas and their cells (P, 2), x and y, ordered by x, then y."""
    similar, against = (
        (values - values.min()) / (values.max() - values.min() + RANGE_EPSILON) for values in (similar, negative)
    )
    prompts = torch.where(against > similar, 0, similar)
    total = prompts.sum()
    count = min(int(total), most) or int(total > 0)
    chosen = torch.zeros(cells * cells, dtype=torch.bool)
    chosen[prompts.sort(descending=True, stable=True).indices[:count]] = True
    places = chosen.view(cells, cells).T.nonzero()
    return (places * (side / cells)).int(), places


def cluster(candidates: torch.Tensor, places: torch.Tensor, cells: int) -> list[torch.Tensor]:
    """Indices of the masks of each component, masks (P, S, S) being linked by the points that they cover."""
    covered = torch.zeros(len(candidates), len(candidates))
    for i, mask in enumerate(candidates):
        reduced = F.interpolate(mask[None, None].float(), (cells, cells), mode="nearest")[0, 0]
        for j, (x, y) in enumerate(places.tolist()):
            covered[i, j] = reduced[y, x]
    count, label = connected_components(covered.numpy(), directed=True, connection="weak")
    groups = [torch.from_numpy(np.flatnonzero(label == number)) for number in range(count)]
    return sorted(groups, key=lambda group: int(group[0]))


def positive_gate(
    candidates: torch.Tensor,
    components: list[torch.Tensor],
    mean: torch.Tensor,
    negative: torch.Tensor,
    cells: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (P,) that add more of the object than of its surroundings, and what the last of their component added."""
    towards, against = mean**2, negative * (mean.max() + mean.min()) / 2
    positive = (towards > against).float()
    shares = [_on_cells(mask, cells) for mask in candidates]
    advantage = torch.stack([(s * (towards - against)).sum() / (s.sum() + RANGE_EPSILON) for s in shares])
    kept = torch.zeros(len(shares), dtype=torch.bool)
    score = torch.zeros(len(shares))
    for group in components:
        taken = torch.zeros(cells * cells)
        for index in group[advantage[group].sort(descending=True, stable=True).indices].tolist():
            added = shares[index] * (1 - taken)
            gain, loss = (positive * added).sum(), ((1 - positive) * added).sum()
            if gain > loss:
                taken += added
                kept[index] = True
        score[group] = gain - loss
    return kept, score


def overshoot_gate(
    candidates: torch.Tensor, components: list[torch.Tensor], query: torch.Tensor, places: torch.Tensor, cells: int
) -> torch.Tensor:
    """Points (P,) that are more alike, per distance, to their own component than to any other."""
    similarity = []
    for group in components:
        union = torch.zeros_like(candidates[0])
        for index in group.tolist():
            union = union | candidates[index]
        similarity.append(prior_maps(query, query[None], _on_cells(union, cells)[None])[0])
    chosen = torch.zeros(len(places), dtype=torch.bool)
    for own, group in enumerate(components):
        for point in group.tolist():
            x, y = places[point].tolist()
            per_distance = []
            for other, alike in zip(components, similarity, strict=True):
                distance = (places[other] - places[point]).float().norm(dim=1).min()
                per_distance.append(alike[y * cells + x] / (distance if distance > 0 else 1))
            chosen[point] = torch.stack(per_distance).argmax() == own
        if chosen[group].sum() < (~chosen[group]).sum():
            chosen[group] = False
    return chosen


def _canvas(picture: np.ndarray, side: int) -> torch.Tensor:
    """Picture uint8 (height, width, 3) to (3, S, S), 0 to 1."""
    fitted = fit_picture(picture, place(picture.shape[0], picture.shape[1], side, "squash"))
    return torch.from_numpy(fitted).permute(2, 0, 1).float() / 255


def _mask_on_canvas(mask: np.ndarray, side: int) -> torch.Tensor:
    return F.interpolate(torch.from_numpy(mask)[None, None].float(), (side, side), mode="nearest")[0, 0]


def _on_cells(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """Mask bool (S, S) to its share of every cell, (N,)."""
    shares = F.interpolate(mask[None, None].float(), (cells, cells), mode="bilinear", align_corners=False).flatten()
    # The two weights of a cell may add up to 1 - 2^-24. The positive gate would then accept masks for that remainder.
    return torch.where(shares > WHOLE, 1, shares)
