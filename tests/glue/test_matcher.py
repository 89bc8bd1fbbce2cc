"""Matcher's steps against plain formulations of the same, and the whole on stages simple enough to foresee."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.glue.affinity import AFFINITY
from fssdeploy.glue.matcher import candidates as matcher_candidates
from fssdeploy.glue.matcher import transport as matcher_transport
from fssdeploy.glue.matcher.assign import box_around, match, patch_centres
from fssdeploy.glue.matcher.candidates import boxes_of, stability_of, thin_by_boxes, touched_patches
from fssdeploy.glue.matcher.merge import best_masks
from fssdeploy.glue.matcher.options import OPTIONS, MatcherOptions
from fssdeploy.glue.matcher.prompts import Draws, all_subsets, cluster_centres, prompt_sets
from fssdeploy.glue.matcher.scores import passing, purity_and_coverage, transport_scores
from fssdeploy.glue.matcher.system import (
    ENCODER,
    ENLARGED,
    MULTIPLE,
    SAM_ENCODER,
    SINGLE,
    Matcher,
    evenly_from_shots,
    layers_of,
)
from fssdeploy.glue.matcher.transport import linear_program, transport_value
from fssdeploy.glue.sam import FOREGROUND
from fssdeploy.glue.sam_frame import to_picture
from fssdeploy.images.geometry import Placement
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from fssdeploy.systems.affinity_stage import affinity_spec

RNG = np.random.default_rng(5)


def unit_rows(*shape: int) -> np.ndarray:
    rows = RNG.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


# Assignment


def test_both_assignments_are_the_best_of_all() -> None:
    reference, target = unit_rows(6, 4), unit_rows(5, 4)
    foreground = np.array([1, 0, 1, 0, 0, 1], bool)
    found = match(reference, foreground, target)
    forward, backward = reference[foreground] @ target.T, target[found.columns] @ reference.T
    for total, matrix in (
        (forward[found.rows, found.columns].sum(), forward),
        (found.back_similarity.sum(), backward),
    ):
        rows = np.arange(len(matrix))
        best = max(matrix[rows, list(order)].sum() for order in permutations(range(matrix.shape[1]), len(matrix)))
        assert total == pytest.approx(best, abs=1e-6)
    assert found.returned.tolist() == foreground[found.back].tolist()


def test_a_patch_that_returns_to_the_background_is_no_point() -> None:
    # The second foreground row has nothing of its own kind in the picture: its patch belongs to the background.
    reference = np.eye(4, dtype=np.float32)
    target = np.eye(4, dtype=np.float32)[[0, 2, 3]]
    found = match(reference, np.array([True, True, False, False]), target)
    assert found.patches.tolist() == [0]
    assert (found.kept, len(found.rows)) == (1, 2)


def test_if_nothing_returns_every_pair_is_kept() -> None:
    reference = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.float32)
    found = match(reference, np.array([True, False, False]), np.array([[1, 0, 0]], np.float32))
    assert not found.returned.any()
    assert found.patches.tolist() == [0]


def test_of_many_pairs_the_better_half_is_used() -> None:
    rows = unit_rows(60, 64)
    target = rows + 0.05 * np.linspace(0, 1, 60)[:, None].astype(np.float32) * RNG.normal(size=(60, 64))
    target = (target / np.linalg.norm(target, axis=1, keepdims=True)).astype(np.float32)
    found = match(rows, np.ones(60, bool), target)
    assert found.kept == 60
    assert found.patches.tolist() == sorted(np.argsort(-(rows * target).sum(1))[:30].tolist())


def test_more_rows_than_patches_leave_rows_over() -> None:
    found = match(unit_rows(9, 8), np.ones(9, bool), unit_rows(4, 8))
    assert sorted(found.columns.tolist()) == [0, 1, 2, 3]
    assert len(found.rows) == len(found.back) == 4


def test_weights_scale_the_rows_of_the_reference() -> None:
    reference, target, foreground = unit_rows(12, 8), unit_rows(9, 8), np.arange(12) < 5
    weights = RNG.uniform(0, 3, 12).astype(np.float32)
    found = match(reference, foreground, target, weights=weights)
    expected = match(weights[:, None] * reference, foreground, target)
    for name, values in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.allclose(found.similarity, match(reference, foreground, target).similarity)


def test_points_are_centres_of_patches() -> None:
    points = patch_centres(np.array([0, 7, 38]), 37, 14)
    assert points.tolist() == [[7, 7], [105, 7], [21, 21]]
    assert box_around(points).tolist() == [7, 7, 105, 21]


# Prompts


def test_few_candidates_are_not_drawn_from() -> None:
    assert all_subsets(4, 2).tolist() == [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]]
    candidates = RNG.integers(0, 99, (8, 2))
    sets = prompt_sets(candidates, (4, 6), 30, Draws(0))
    assert [each.shape for each in sets] == [(70, 4, 2), (56, 5, 2), (28, 6, 2)]


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (3, [3]), (5, [4, 5])])
def test_the_range_shrinks_to_the_candidates_there_are(count: int, sizes: list[int]) -> None:
    sets = prompt_sets(RNG.integers(0, 99, (count, 2)), (4, 6), 30, Draws(0))
    assert [each.shape[1] for each in sets] == sizes


def test_draws_depend_on_the_seed_alone_and_repeat_no_point() -> None:
    candidates = np.stack([np.arange(30), np.arange(30)], -1)
    first, again, other = (Draws(seed).subsets(candidates, 6, 200)[..., 0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert all(len(set(row)) == 6 for row in first.tolist())
    assert set(first.ravel()) == set(range(30))


def test_k_means_finds_the_groups_there_are() -> None:
    points = np.concatenate([RNG.integers(0, 4, (20, 2)) + corner for corner in ([0, 0], [90, 0], [0, 90])])
    points = np.unique(points, axis=0)
    centres, clusters = cluster_centres(points, 3, Draws(0))
    for number, centre in enumerate(centres):
        np.testing.assert_array_equal(centre, points[clusters == number].mean(0).astype(int))
    assert sorted((centres // 45).tolist()) == [[0, 0], [0, 2], [2, 0]] or sorted((centres // 45).tolist()) == [
        [0, 0],
        [0, 1],
        [1, 0],
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_k_means_of_fewer_points_than_centres_is_the_points(count: int) -> None:
    points = np.stack([np.arange(count) * 14 + 7, np.full(count, 7)], -1)
    centres, clusters = cluster_centres(points, 8, Draws(3))
    np.testing.assert_array_equal(centres[clusters], points)


def test_k_means_of_equal_points_ends() -> None:
    centres, clusters = cluster_centres(np.full((4, 2), 7), 3, Draws(0))
    assert centres.tolist() == [[7, 7]]
    assert clusters.tolist() == [0, 0, 0, 0]


# Transport


def whole_program(similarity: np.ndarray) -> float:
    rows, columns = similarity.shape
    incidence = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.tile(np.eye(columns), rows)])
    mass = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    return -linprog(-similarity.ravel().astype(float), A_eq=incidence, b_eq=mass).fun


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (6, 6), (6, 12), (4, 6), (7, 11), (23, 40), (31, 12), (60, 2)]
)
def test_transport_is_that_of_the_whole_program(shape: tuple[int, int]) -> None:
    similarity = unit_rows(shape[0], 5) @ unit_rows(shape[1], 5).T
    expected = whole_program(similarity)
    assert transport_value(similarity) == pytest.approx(expected, abs=1e-6)
    assert linear_program(similarity.astype(float)) == pytest.approx(expected, abs=1e-6)


def test_first_pairs_that_miss_the_plan_are_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_transport, "_NEIGHBOURS", 1)
    monkeypatch.setattr(matcher_transport, "_SINKHORN_ROUNDS", 1)
    similarity = unit_rows(29, 3) @ unit_rows(40, 3).T
    assert linear_program(similarity.astype(float)) == pytest.approx(whole_program(similarity), abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_opposite_and_equal_features_transport() -> None:
    row = unit_rows(1, 8)
    for similarity, expected in ((np.repeat(row, 7, 0) @ np.repeat(row, 9, 0).T, 1.0), (-np.ones((7, 90)), -1.0)):
        assert linear_program(similarity.astype(float)) == pytest.approx(expected, abs=1e-6)


# Masks and scores


def test_masks_are_measured_as_pixels_and_patches() -> None:
    masks = np.zeros((3, 12, 12), bool)
    masks[1, 3, 4:9] = masks[1, 5, 2] = True
    masks[2] = True
    assert boxes_of(masks).tolist() == [[0, 0, 0, 0], [2, 3, 8, 5], [0, 0, 11, 11]]
    assert touched_patches(masks, 4).astype(int).tolist() == [[1] * 9, [0, 1, 1, 1, 0, 0, 0, 0, 0], [1] * 9]
    frames = np.where(masks, np.float32(2), np.float32(-2))
    frames[1, 0, 0] = 0.5
    np.testing.assert_allclose(stability_of(frames), [np.nan, 6 / 7, 1])


def plain_suppression(boxes: np.ndarray, iou: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for row in np.argsort(-iou, kind="stable"):
        x0, y0, x1, y1 = boxes[row].astype(float)
        falls = False
        for other in kept:
            a0, b0, a1, b1 = boxes[other].astype(float)
            shared = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
            union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared
            falls |= union > 0 and shared / union > threshold
        if not falls:
            kept.append(int(row))
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.65, 1.0])
def test_boxes_are_thinned_as_one_by_one(threshold: float) -> None:
    corners = np.sort(RNG.integers(0, 30, (120, 2, 2)), 1)
    boxes = corners.reshape(120, 4)
    boxes[::17] = 0
    iou = RNG.integers(0, 40, 120).astype(np.float32) / 40
    assert thin_by_boxes(boxes, iou, threshold).tolist() == plain_suppression(boxes, iou, threshold)
    assert thin_by_boxes(boxes[:0], iou[:0], threshold).tolist() == []


def test_scores_of_an_empty_mask() -> None:
    similarity = unit_rows(3, 6) @ unit_rows(9, 6).T
    masks = np.zeros((2, 12, 12), bool)
    masks[1, 0, 0] = True
    touched = touched_patches(masks, 4)
    purity, coverage = purity_and_coverage(touched, matcher_candidates.centre_pixels(masks, 4), np.array([0, 5]))
    np.testing.assert_allclose(np.stack([purity, coverage]), 1e-6)
    emd = transport_scores(similarity, touched)
    np.testing.assert_allclose(emd, [(1 + whole_program(similarity)) / 2, (1 + similarity[:, 0].mean()) / 2], atol=1e-6)


def test_masks_of_the_same_patches_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []

    def mean(similarity: np.ndarray) -> float:
        solved.append(similarity.shape)
        return float(similarity.mean())

    monkeypatch.setattr("fssdeploy.glue.matcher.scores.transport_value", mean)
    touched = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 0], [1, 1, 0]], bool)
    scores = transport_scores(np.arange(6).reshape(2, 3) / 10, touched)
    assert len(solved) == 2
    np.testing.assert_allclose(scores, [0.6, 0.65, 0.6, 0.6])


def test_a_filter_that_nothing_passes_leaves_the_best() -> None:
    values, rows = np.array([0.1, 0.3, 0.2, 0.9], np.float32), np.array([0, 1, 2])
    assert passing(values, 0.5, rows).tolist() == [1]
    assert passing(values, 0.15, rows).tolist() == [1, 2]
    assert passing(values, 0.0, rows).tolist() == [0, 1, 2]
    assert passing(values, 0.5, rows[:0]).tolist() == []


def test_merging_rules() -> None:
    scores = np.array([0.8, 0.9, 0.62, 0.9, 0.85], np.float32)
    share = MatcherOptions(topk_scores_threshold=0.9, num_merging_mask=4)
    assert best_masks(scores, share).tolist() == [1, 3, 4]  # equal ones in their order, 0.8 / 0.9 falls
    assert best_masks(scores, dataclasses.replace(share, num_merging_mask=1)).tolist() == [1]
    filtered = MatcherOptions(use_score_filter=True, deep_score_filter=0.33, deep_score_norm_filter=0.15)
    assert best_masks(scores, filtered).tolist() == [1, 3, 4]  # 0.05 / 0.38 is near, 0.1 / 0.38 is not
    far = np.array([0.1, 0.3], np.float32)
    assert best_masks(far, filtered).tolist() == [1]  # the best stays, however far


def test_layers() -> None:
    masks = np.arange(3)
    assert [masks[layers_of(layer)].tolist() for layer in range(6)] == [[0], [1], [2], [0, 1, 2], [1, 2], [2]]


def test_option_tables() -> None:
    for name, options in OPTIONS.items():
        stored = {**dataclasses.asdict(options), "sample_range": list(options.sample_range)}
        assert MatcherOptions.from_dict(stored) == options, name
    for wrong in ({"sample_range": [3, 2]}, {"sample_range": [0, 2]}, {"num_centers": 0}, {"colour": 1}):
        with pytest.raises(InputError) as caught:
            MatcherOptions.from_dict(wrong)
        assert caught.value.code == "option_unknown"


def test_flat_states_take_evenly_from_all_shots() -> None:
    foreground = np.zeros((3, 10), bool)
    foreground[0, :6] = foreground[1, 4] = foreground[2, 8:] = True
    kept = evenly_from_shots(foreground)
    assert len(kept) == len(set(kept.tolist())) == 10
    assert foreground.ravel()[kept].sum() == 3
    assert set(kept // 10) == {0, 1, 2}
    for one in (foreground[:1], np.ones((1, 10), bool)):
        assert evenly_from_shots(one).tolist() == list(range(10))
    tiny = np.zeros((4, 10), bool)
    tiny[2, 3] = True
    assert tiny.ravel()[evenly_from_shots(tiny)].sum() == 1


# The whole, on stages that segment by colour

CANVAS, PATCH, SQUARE = 48, 8, 64
LOW = 32


class ColourEngine:
    """Features are mean colours; a prompt's mask is what has the colour under its first foreground point."""

    name = "colour"

    def __init__(self, iou: float = 0.95) -> None:
        def tensor(name: str, dtype: str, *shape: int) -> TensorSpec:
            return TensorSpec(name, dtype, (BATCH, *shape))

        def decoder(name: str, masks: int) -> StageSpec:
            inputs = (
                tensor("points", "float32", 8, 2),
                tensor("labels", "int32", 8),
                TensorSpec("embedding", "float32", (1, 3, LOW, LOW)),
            )
            outputs = (tensor("mask_logits", "float32", masks, LOW, LOW), tensor("iou", "float32", masks))
            return StageSpec(name, inputs, outputs)

        def encoder(name: str, picture: str, side: int, output: TensorSpec) -> StageSpec:
            return StageSpec(name, (tensor(picture, "uint8", 3, side, side),), (output,))

        self.specs = {
            ENCODER: encoder(ENCODER, "picture", CANVAS, tensor("features", "float32", 36, 4)),
            AFFINITY: affinity_spec(tensor("features", "float32", 36, 4)),
            SAM_ENCODER: encoder(SAM_ENCODER, ENLARGED, SQUARE, tensor("embedding", "float32", 3, LOW, LOW)),
            SINGLE: decoder(SINGLE, 1),
            MULTIPLE: decoder(MULTIPLE, 3),
        }
        self.iou = iou
        self.calls: list[str] = []
        self.prompts: list[np.ndarray] = []

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += [stage]
        if stage == ENCODER:
            means = cells(inputs["picture"], PATCH).reshape(-1, 3, 36).transpose(0, 2, 1)
            features = np.concatenate([means / 255 - 0.5, np.full((*means.shape[:2], 1), 0.3)], 2)
            features /= np.linalg.norm(features, axis=2, keepdims=True)
            return {"features": features.astype(np.float32)}
        if stage == AFFINITY:
            return {"cosine": inputs["rows"] @ inputs["features"][0].T}
        if stage == SAM_ENCODER:
            return {"embedding": cells(inputs[ENLARGED], SQUARE // LOW).astype(np.float32)}
        points, labels, picture = inputs["points"], inputs["labels"], inputs["embedding"][0]
        self.prompts += list(np.concatenate([points, labels[..., None]], 2))
        assert (labels[:, 0] == FOREGROUND).all()
        x, y = (points[:, 0] * LOW / SQUARE).astype(int).T
        apart = np.abs(picture[None] - picture[:, y, x].T[:, :, None, None]).max(1)
        masks = int(self.specs[stage].outputs[0].shape[1])
        logits = np.stack([90 + 5 * number - apart for number in range(masks)], 1)
        return {
            "mask_logits": logits.clip(-40, 40).astype(np.float32),
            "iou": np.full(logits.shape[:2], self.iou, np.float32),
        }

    def describe(self) -> dict[str, Any]:
        return {}


def cells(pictures: np.ndarray, side: int) -> np.ndarray:
    """Mean colours of square cells, (n, 3, H, W) -> (n, 3, H / side, W / side)."""
    count, channels, height, width = pictures.shape
    return pictures.reshape(count, channels, height // side, side, width // side, side).mean((3, 5))


def system(engine: ColourEngine, options: MatcherOptions = OPTIONS["fss"], **settings: Any) -> Matcher:
    preprocessing = {"canvas": CANVAS, "patch": PATCH, "geometry": "squash", "options": dataclasses.asdict(options)}
    defaults = {"compat": "corrected", "kshot": "official", "seed": 0}
    return Matcher("matcher", engine.specs, engine, {**preprocessing, **defaults, **settings}, "print")


def scene(top: int, left: int, size: int = 16, height: int = 48, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A red square on green, and its mask."""
    picture = np.full((height, width, 3), (20, 160, 30), np.uint8)
    mask = np.zeros((height, width), bool)
    mask[top : top + size, left : left + size] = True
    picture[mask] = (220, 30, 40)
    return picture, mask


GRID = dataclasses.replace(OPTIONS["coco"], points_per_side=4, max_sample_iterations=8)


@pytest.mark.parametrize("options", [OPTIONS["fss"], GRID, OPTIONS["part"]], ids=["fss", "coco", "part"])
@pytest.mark.parametrize("compat", ["corrected", "original"])
def test_the_object_is_found_elsewhere(options: MatcherOptions, compat: str) -> None:
    matcher = system(ColourEngine(), options, compat=compat)
    picture, mask = scene(0, 8)
    state = matcher.enroll(matcher.encode([picture]), [mask])
    query, truth = scene(40, 16, 40, 96, 72)
    found = matcher.segment(matcher.encode([query]), {"red": state})
    logits = found.logits[0]["red"]
    assert (logits.shape, logits.dtype) == ((96, 72), np.float32)
    top, left = np.unravel_index(found.prior[0]["red"].argmax(), (6, 6))
    assert truth[top * 16 + 8, left * 12 + 6]
    overlap = (found.binary(0, "red") & truth).sum() / (found.binary(0, "red") | truth).sum()
    assert overlap > 0.85


def test_support_may_be_the_query() -> None:
    matcher = system(ColourEngine())
    picture, mask = scene(8, 8)
    features = matcher.encode([picture])
    found = matcher.segment(features, {"red": matcher.enroll(features, [mask])})
    overlap = (found.binary(0, "red") & mask).sum() / (found.binary(0, "red") | mask).sum()
    assert overlap > 0.85


def test_prompts_with_a_box_have_no_padding_point() -> None:
    for options, last in ((OPTIONS["part"], [2, 3]), (GRID, [-1])):
        engine = ColourEngine()
        matcher = system(engine, options)
        picture, mask = scene(8, 8, 24)
        features = matcher.encode([picture])
        matcher.segment(features, {"red": matcher.enroll(features, [mask])})
        for prompt in engine.prompts:
            labels = prompt[:, 2]
            given = labels[labels > -2]
            assert given[-len(last) :].tolist() == last
            assert (given[: -len(last)] == FOREGROUND).all()


def test_one_colour_pictures_give_a_mask() -> None:
    matcher = system(ColourEngine())
    grey = np.full((30, 40, 3), 127, np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[5:20, 5:20] = True
    features = matcher.encode([grey])
    found = matcher.segment(features, {"grey": matcher.enroll(features, [mask])})
    assert found.binary(0, "grey").all()


def test_where_no_mask_survives_the_answer_is_empty() -> None:
    for compat in ("corrected", "original"):
        matcher = system(ColourEngine(iou=0.5), GRID, compat=compat)
        picture, mask = scene(8, 8)
        features = matcher.encode([picture])
        trace: dict[str, Any] = {}
        found = matcher.segment(features, {"red": matcher.enroll(features, [mask])}, trace)
        assert not found.binary(0, "red").any()
        assert len(trace["kept_candidates"]) == len(trace["selected"]) == 0
        assert not trace["final_mask"].any()


def test_masks_that_fail_on_iou_are_never_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarged = []

    def counted(maps: np.ndarray, frame: Placement) -> np.ndarray:
        enlarged.append(len(maps))
        return to_picture(maps, frame)

    monkeypatch.setattr(matcher_candidates, "to_picture", counted)
    picture, mask = scene(8, 8)
    for iou, expected in ((0.5, False), (0.95, True)):
        matcher = system(ColourEngine(iou), GRID)
        features = matcher.encode([picture])
        matcher.segment(features, {"red": matcher.enroll(features, [mask])})
        assert (sum(enlarged) > 0) == expected


def test_an_answer_depends_on_nothing_asked_before() -> None:
    options = dataclasses.replace(GRID, max_sample_iterations=3)
    (first, mask), (second, _) = scene(0, 0, 30), scene(16, 16, 30)

    def drawn(matcher: Matcher, warm_up: bool) -> list[Any]:
        features = matcher.encode([first, second])
        state = matcher.enroll(features[0], [mask])
        if warm_up:
            matcher.segment(features, {"a": state, "b": state})
        trace: dict[str, Any] = {}
        matcher.segment(features[1], {"a": state}, trace)
        return [trace[f"prompt_points_n{size}"].tolist() for size in range(1, 7)]

    cold = drawn(system(ColourEngine(), options), False)
    assert cold == drawn(system(ColourEngine(), options), True)
    assert cold != drawn(system(ColourEngine(), options, seed=1), False)


def test_grid_and_embedding_are_shared_by_classes_and_calls() -> None:
    engine = ColourEngine()
    matcher = system(engine, GRID)
    picture, mask = scene(8, 8)
    features = matcher.encode([picture])
    state = matcher.enroll(features, [mask])
    matcher.segment(features, {"a": state})
    once = engine.calls.count(SINGLE)
    matcher.segment(features, {"a": state, "b": state, "c": state})
    assert engine.calls.count(SINGLE) == 2 * once
    assert engine.calls.count(SAM_ENCODER) == 1
    assert engine.calls.count(ENCODER) == 1


def test_states_merge_to_that_of_all_shots() -> None:
    matcher = system(ColourEngine())
    scenes = [scene(0, 0), scene(8, 24), scene(30, 10)]
    features = matcher.encode([picture for picture, _ in scenes])
    masks = [mask for _, mask in scenes]
    whole = matcher.enroll(features, masks)
    parts = [matcher.enroll(features[index], [masks[index]]) for index in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.shots == whole.shots == 3
    for name, array in whole.tensors.items():
        np.testing.assert_array_equal(merged.tensors[name], array)
    assert len(whole.tensors["features"]) == 3 * 36


def test_a_flat_state_is_of_one_size_and_with_one_shot_the_official_one() -> None:
    official, flat = (system(ColourEngine(), kshot=rule) for rule in ("official", "flat"))
    scenes = [scene(0, 0), scene(8, 24), scene(30, 10), scene(20, 20)]
    features = flat.encode([picture for picture, _ in scenes])
    masks = [mask for _, mask in scenes]
    for name, array in official.enroll(features[0], masks[:1]).tensors.items():
        np.testing.assert_array_equal(flat.enroll(features[0], masks[:1]).tensors[name], array)
    state = flat.enroll(features, masks)
    assert {name: len(array) for name, array in state.tensors.items()} == {"features": 36, "foreground": 36}
    query, truth = scene(24, 24)
    found = flat.segment(flat.encode([query]), {"red": state}).binary(0, "red")
    assert (found & truth).sum() / (found | truth).sum() > 0.85


def enrolled_code(matcher: Matcher, masks: list[Any], pictures: int = 1, size: tuple[int, int] = (48, 48)) -> str:
    features = matcher.encode([np.full((*size, 3), 90, np.uint8)] * pictures)
    with pytest.raises(InputError) as caught:
        matcher.enroll(features, masks)
    return caught.value.code


def test_bad_masks_are_refused() -> None:
    matcher = system(ColourEngine())
    good = np.ones((48, 48), bool)
    assert enrolled_code(matcher, []) == "masks_count"
    assert enrolled_code(matcher, [np.ones((48, 47), bool)]) == "mask_size"
    assert enrolled_code(matcher, [np.zeros((48, 48), bool)]) == "mask_empty"
    assert enrolled_code(matcher, [good, np.zeros((48, 48), bool)], 2) == "mask_empty"
    pixel = np.zeros((480, 480), bool)
    pixel[1, 1] = True
    assert enrolled_code(matcher, [pixel], size=(480, 480)) == "object_vanishes"
    none = dataclasses.replace(matcher.encode([np.zeros((8, 8, 3), np.uint8)]), placements=[])
    with pytest.raises(InputError, match="at least one picture"):
        matcher.enroll(none, [])


def test_the_release_invents_an_object_where_none_is_marked() -> None:
    matcher = system(ColourEngine(), compat="original")
    features = matcher.encode([np.full((48, 48, 3), 90, np.uint8)] * 2)
    nothing, good = np.zeros((48, 48), bool), scene(8, 8)[1]
    invented = matcher.enroll(features, [nothing, nothing]).tensors["foreground"].reshape(2, 6, 6)
    assert invented[:, 2:4, 2:4].all()
    assert invented.sum() == 8  # 14 pixels about the middle
    one = matcher.enroll(features, [nothing, good]).tensors["foreground"].reshape(2, 36)
    assert one.sum(1).tolist() == [0, 4]


def test_bad_queries_are_refused() -> None:
    matcher = system(ColourEngine())
    picture, mask = scene(8, 8)
    features = matcher.encode([picture])
    state = matcher.enroll(features, [mask])
    with pytest.raises(InputError) as caught:
        matcher.segment(features, {})
    assert caught.value.code == "no_classes"
    with pytest.raises(IntegrityError):
        matcher.segment(features, {"a": dataclasses.replace(state, fingerprint="other")})
    with pytest.raises(ValueError, match="one picture and one class"):
        matcher.segment(features, {"a": state, "b": state}, {})
    matcher.options = dataclasses.replace(matcher.options, sample_range=(4, 8))
    with pytest.raises(InputError, match="sample_range cannot reach 8"):
        matcher.segment(features, {"a": state})
