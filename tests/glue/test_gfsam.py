"""GF-SAM's glue: its short forms against plain ones, ties, bad input, and both readings of its quirks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components

from fssdeploy.bank.states import decode_state, encode_state
from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.glue.affinity import AFFINITY
from fssdeploy.glue.gfsam.gates import Clusters, Grid, cluster, cluster_similarity, overshoot_gate, positive_gate
from fssdeploy.glue.gfsam.maps import PriorMaps, chosen_cells, prior_maps, prompt_map, reference, unit
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.modules.sam import SamConfig
from fssdeploy.protocol import StageSpec, TensorSpec
from fssdeploy.systems.affinity_stage import affinity_spec
from fssdeploy.systems.sam_stages import decoder_spec, encoder_spec

CANVAS, CELLS, CHANNELS = 80, 10, 12


def random_features(seed: int, cells: int = CELLS**2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(cells, CHANNELS)).astype(np.float32) + 0.5


def cosines_to(features: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The affinity stage without an engine."""
    return lambda rows: rows @ unit(features).T


def random_logits(count: int, side: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth masks of very different sizes, some of them empty."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    centre = generator.uniform(0, side, (count, 2, 1, 1))
    radius = generator.uniform(-1, side / 3, (count, 1, 1))
    return (radius - np.hypot(y - centre[:, 0], x - centre[:, 1])).astype(np.float32)


def masks_of(logits: np.ndarray) -> torch.Tensor:
    """Masks (P, S, S) at full resolution, 0 or 1."""
    enlarged = F.interpolate(torch.from_numpy(logits)[:, None], size=(CANVAS, CANVAS), mode="bilinear")
    return (enlarged[:, 0] > 0).float()


def on_cells(masks: torch.Tensor) -> np.ndarray:
    small = F.interpolate(masks[:, None], size=(CELLS, CELLS), mode="bilinear", align_corners=False)
    return small.flatten(1).numpy()


def random_maps(seed: int) -> PriorMaps:
    positive, peak, negative = np.random.default_rng(seed).uniform(0.1, 0.9, (3, CELLS**2)).astype(np.float32)
    return PriorMaps(positive, peak, negative)


def some_cells(count: int, seed: int) -> np.ndarray:
    cells = np.random.default_rng(seed).choice(CELLS**2, count, replace=False)
    return cells[np.lexsort((cells // CELLS, cells % CELLS))]


def clusters_of(logits: np.ndarray, cells: np.ndarray) -> tuple[Clusters, np.ndarray, np.ndarray]:
    """Clusters, shares of masks and of unions, by the short way."""
    grid = Grid.of(CANVAS, CELLS)
    bits = grid.binarise(logits, CANVAS)
    clusters = cluster(grid.covered(bits, cells))
    return clusters, grid.soften(bits), grid.soften(clusters.reduce(np.logical_or, bits))


@pytest.mark.parametrize("full", [False, True])
def test_maps_equal_the_form_with_all_pairs_of_cells(full: bool) -> None:
    query, supports = random_features(0), [random_features(seed) for seed in (1, 2)]
    weights = np.random.default_rng(3).uniform(0, 1, (2, CELLS**2)).astype(np.float32)
    if not full:
        weights[:, 30:] = 0
    shots = [reference(s, w, 1 - w) for s, w in zip(supports, weights, strict=True)]
    maps = prior_maps(cosines_to(query), {name: np.concatenate([shot[name] for shot in shots]) for name in shots[0]})
    for row, (support, weight) in enumerate(zip(supports, weights, strict=True)):
        cosine = support @ query.T / (np.linalg.norm(support, axis=1)[:, None] * np.linalg.norm(query, axis=1) + 1e-7)
        count = len(support)
        for got, each in ((maps.positive, weight), (maps.negative, 1 - weight)):
            mean = (each[:, None] * cosine).sum(0) / count / (each.sum() / count + 1e-7)
            np.testing.assert_allclose(got[row], mean, rtol=1e-4, atol=1e-5)
        # Without a cell outside, the largest product may be negative; with one, it is zero at least.
        np.testing.assert_allclose(maps.peak[row], (weight[:, None] * cosine).max(0), rtol=1e-4, atol=1e-5)
    assert len(shots[0]["object"]) == (100 if full else 31)


def test_no_cell_inside_gives_maps_of_zeros() -> None:
    weights = np.zeros(CELLS**2, np.float32)
    maps = prior_maps(cosines_to(random_features(0)), reference(random_features(1), weights, 1 - weights))
    assert not maps.positive.any()
    assert not maps.peak.any()
    assert not prompt_map(maps.mean()).any()


def test_ties_between_cells_go_to_the_first_and_points_go_by_column() -> None:
    values = np.zeros(16, np.float32)
    values[[2, 5, 9, 12]] = 0.8  # sum 3.2: three points
    assert chosen_cells(values, 4, 128).tolist() == [5, 9, 2]
    assert chosen_cells(values, 4, 2).tolist() == [5, 2]
    assert chosen_cells(values * 0.1, 4, 128).tolist() == [2]
    assert chosen_cells(values * 0, 4, 128).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_reduced_masks_equal_full_ones(seed: int) -> None:
    logits, cells = random_logits(40, seed=seed), some_cells(40, seed)
    masks = masks_of(logits)
    clusters, shares, union = clusters_of(logits, cells)
    np.testing.assert_allclose(shares, on_cells(masks), atol=1e-6)
    nearest = F.interpolate(masks[:, None], size=(CELLS, CELLS), mode="nearest").flatten(1).numpy()
    covered = nearest[:, cells] > 0
    assert (Grid.of(CANVAS, CELLS).covered(Grid.of(CANVAS, CELLS).binarise(logits, CANVAS), cells) == covered).all()
    labels = connected_components(covered, directed=True, connection="weak")[1]
    assert len(set(labels.tolist())) == len(clusters)
    assert ((labels[:, None] == labels) == (clusters.label[:, None] == clusters.label)).all()
    first = [clusters.label.tolist().index(group) for group in range(len(clusters))]
    assert first == sorted(first)
    unions = torch.stack([masks[clusters.label == group].amax(0) for group in range(len(clusters))])
    np.testing.assert_allclose(union, on_cells(unions), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("last_score", [True, False])
def test_positive_gate_equals_growth_mask_by_mask(seed: int, last_score: bool) -> None:
    logits, cells, maps = random_logits(40, seed=seed), some_cells(40, seed), random_maps(seed)
    clusters, shares, union = clusters_of(logits, cells)
    kept, score = positive_gate(shares, clusters, union, maps, last_score=last_score)
    half = (maps.positive.max() + maps.positive.min()) / 2
    difference = maps.positive**2 - maps.negative * half
    positive = difference > 0
    for group in range(len(clusters)):
        members = np.flatnonzero(clusters.label == group)
        ranks = [(shares[i] * difference).sum() / (shares[i].sum() + 1e-6) for i in members]
        taken = np.zeros(CELLS**2, np.float32)
        for i in members[np.argsort(-np.array(ranks), kind="stable")]:
            added = shares[i] * (1 - taken)
            gain = float(added[positive].sum() - added[~positive].sum())
            assert kept[i] == (gain > 0)
            taken += added * kept[i]
        expected = gain if last_score else union[group][positive].sum() - union[group][~positive].sum()
        np.testing.assert_allclose(score[members], expected, atol=1e-4)


def test_of_equal_masks_only_the_first_is_kept() -> None:
    logits = np.repeat(random_logits(1, seed=5) * 0 + np.float32(1), 3, 0)  # three times everything
    clusters, shares, union = clusters_of(logits, np.array([11, 45, 78]))
    maps = PriorMaps(*(np.full(CELLS**2, value, np.float32) for value in (0.8, 0.8, 0.1)))
    kept, score = positive_gate(shares, clusters, union, maps, last_score=True)
    assert kept.tolist() == [True, False, False]
    assert score.tolist() == [0, 0, 0]  # what the last mask added
    assert positive_gate(shares, clusters, union, maps, last_score=False)[1].tolist() == [100, 100, 100]


@pytest.mark.parametrize("seed", range(4))
def test_overshoot_gate_equals_the_form_point_by_point(seed: int) -> None:
    logits, cells, units = random_logits(40, seed=seed), some_cells(40, seed), unit(random_features(seed))
    clusters, _, union = clusters_of(logits, cells)
    similarity = cluster_similarity(units, units, union)
    places = np.stack([cells % CELLS, cells // CELLS], 1)
    own = np.zeros(40, bool)
    for j in range(40):
        ratios = []
        for group in range(len(clusters)):
            members = places[clusters.label == group]
            distance = np.sqrt(((members - places[j]) ** 2).sum(1)).min()
            ratios.append(similarity[group, cells[j]] / (distance or 1))
        own[j] = int(np.argmax(ratios)) == clusters.label[j]
    for group in range(len(clusters)):
        members = clusters.label == group
        if own[members].sum() < (~own[members]).sum():
            own[members] = False
    assert (overshoot_gate(units, cells, CELLS, clusters, union) == own).all()


def test_similarity_is_the_mean_map_of_the_query_with_itself() -> None:
    features, weights = random_features(1), np.random.default_rng(2).uniform(0, 1, (3, CELLS**2)).astype(np.float32)
    similarity = cluster_similarity(unit(features), unit(features), weights)
    for row, weight in zip(similarity, weights, strict=True):
        as_support = prior_maps(cosines_to(features), reference(features, weight, 1 - weight)).positive[0]
        np.testing.assert_allclose(row, as_support, rtol=1e-5)


class ColourEngine:
    """Stages without networks: a cell's features are its colour, a point's mask is the disc around it."""

    name = "colours"
    RADIUS = 3.0

    def __init__(self) -> None:
        sam = SamConfig(8, 1, 1, image_size=CANVAS, patch=16, out=4)
        picture = encoder_spec(sam).inputs
        features = TensorSpec("features", "float32", ("batch", CELLS**2, 6))
        self.specs = {
            "encoder": StageSpec("encoder", picture, (features,)),
            AFFINITY: affinity_spec(features),
            "sam_encoder": encoder_spec(sam),
            "decoder": decoder_spec(sam, multimask=False, capacity=2),
        }
        self.calls: list[tuple[str, int]] = []

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.specs[stage].check(inputs)
        rows = len(next(iter(inputs.values())))
        self.calls.append((stage, rows))
        if stage == "encoder":
            cells = inputs["picture"].reshape(rows, 3, CELLS, 8, CELLS, 8).mean((3, 5)).reshape(rows, 3, -1)
            colours = cells.transpose(0, 2, 1).astype(np.float32) / 255
            return {"features": np.concatenate([colours, 1 - colours], -1)}
        if stage == AFFINITY:
            return {"cosine": inputs["rows"] @ unit(inputs["features"][0]).T}
        if stage == "sam_encoder":
            return {"embedding": np.zeros((rows, 4, 5, 5), np.float32)}
        y, x = np.mgrid[:20, :20]
        points = inputs["points"][:, 0, :, None, None] / (CANVAS / 20)
        logits = self.RADIUS - np.hypot(x - points[:, 0], y - points[:, 1])
        return {"mask_logits": logits[:, None].astype(np.float32), "iou": np.ones((rows, 1), np.float32)}

    def describe(self) -> dict[str, Any]:
        return {"runtime": self.name}


def colours(compat: str = "corrected", max_points: int = 64) -> GFSam:
    engine = ColourEngine()
    preprocessing = {"canvas": CANVAS, "patch": 8, "geometry": "squash", "compat": compat, "max_points": max_points}
    return GFSam("colours", engine.specs, engine, preprocessing, "colours")


def new_trace() -> dict[str, np.ndarray]:
    return {}


def scene(top: int, left: int, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """A red square on green, 80 x 80, and its mask."""
    mask = np.zeros((80, 80), bool)
    mask[top : top + side, left : left + side] = True
    return np.where(mask[..., None], (220, 30, 40), (20, 200, 60)).astype(np.uint8), mask


@pytest.mark.parametrize("compat", ["original", "corrected"])
def test_the_object_is_found_elsewhere(compat: str) -> None:
    system = colours(compat)
    support, mask = scene(8, 8)
    query, truth = scene(40, 48)
    trace = new_trace()
    state = system.enroll(system.encode([support]), [mask])
    masks = system.segment(system.encode([query]), {"square": state}, trace)
    found = masks.logits[0]["square"] > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.5
    assert masks.logits[0]["square"].dtype == np.float32
    assert masks.prior[0]["square"].shape == (CELLS, CELLS)
    np.testing.assert_array_equal(trace["chosen"], np.flatnonzero(trace["point_labels"] == 1))
    inside = np.asarray(truth.reshape(CELLS, 8, CELLS, 8).all((1, 3)))
    assert inside[trace["points_cell"][:, 1], trace["points_cell"][:, 0]].all()


def test_a_picture_serves_as_its_own_support() -> None:
    system = colours()
    picture, mask = scene(24, 24)
    features = system.encode([picture])
    found = system.segment(features, {"a": system.enroll(features, [mask])}).logits[0]["a"] > 0
    assert (found & mask).sum() / (found | mask).sum() > 0.5


def test_classes_and_calls_share_what_depends_on_the_picture_alone() -> None:
    system = colours()
    picture, mask = scene(24, 24)
    features = system.encode([picture])
    state = system.enroll(features, [mask])
    both = system.segment(features, {"a": state, "b": state})
    system.segment(features, {"a": state})
    calls = system.engine.calls  # type: ignore[attr-defined]
    assert [stage for stage, _ in calls].count("sam_encoder") == 1
    assert (both.logits[0]["a"] == both.logits[0]["b"]).all()
    compared = sum(len(state.tensors[name]) for name in ("positive", "negative", "object"))
    assert [rows for stage, rows in calls if stage == AFFINITY] == [compared] * 3  # all rows of a class at once
    decoded = [rows for stage, rows in calls if stage == "decoder"]
    assert len(decoded) == 2  # once for both classes, once for the second call


def test_pictures_of_different_sizes_are_answered_at_their_own() -> None:
    system = colours()
    first, mask = scene(24, 24)
    second = np.ascontiguousarray(scene(40, 8)[0][:60, :70])
    state = system.enroll(system.encode([first]), [mask])
    masks = system.segment(system.encode([first, second]), {"a": state})
    assert [each["a"].shape for each in masks.logits] == [(80, 80), (60, 70)]
    alone = system.segment(system.encode([second]), {"a": state})
    assert (alone.logits[0]["a"] == masks.logits[1]["a"]).all()


def test_shots_join_one_by_one_or_together() -> None:
    system = colours()
    pictures, masks = zip(*(scene(top, 16) for top in (0, 16, 40)), strict=True)
    features = system.encode(pictures)
    together = system.enroll(features, masks)
    states = [system.enroll(features[i], [masks[i]]) for i in range(3)]
    joined = decode_state(encode_state(states[0].merge(states[1]))).merge(states[2])
    assert joined.shots == together.shots == 3
    assert all((joined.tensors[name] == array).all() for name, array in together.tensors.items())
    query = system.encode([scene(50, 50)[0]])
    expected = system.segment(query, {"a": together}).logits[0]["a"]
    assert (system.segment(query, {"a": joined}).logits[0]["a"] == expected).all()


def test_the_number_of_points_is_an_option() -> None:
    support, mask = scene(8, 8, side=48)
    for most in (1, 5):
        system, trace = colours(max_points=most), new_trace()
        state = system.enroll(system.encode([support]), [mask])
        system.segment(system.encode([support]), {"a": state}, trace)
        assert len(trace["points_cell"]) == most


@pytest.mark.parametrize("compat", ["original", "corrected"])
def test_a_picture_of_one_colour_holds_nothing(compat: str) -> None:
    system = colours(compat)
    support, mask = scene(8, 8)
    grey = np.full((50, 60, 3), 128, np.uint8)
    masks = system.segment(system.encode([grey]), {"a": system.enroll(system.encode([support]), [mask])})
    assert not masks.binary(0, "a").any()
    assert masks.score(0, "a") == 0
    assert np.isfinite(masks.logits[0]["a"]).all()
    assert [stage for stage, _ in system.engine.calls].count("sam_encoder") == 0  # type: ignore[attr-defined]


def test_masks_that_cover_nothing_give_an_empty_answer() -> None:
    for compat in ("original", "corrected"):
        system, trace = colours(compat), new_trace()
        system.engine.RADIUS = -1.0  # type: ignore[attr-defined]
        picture, mask = scene(8, 8)
        features = system.encode([picture])
        masks = system.segment(features, {"a": system.enroll(features, [mask])}, trace)
        assert len(trace["points_cell"])
        assert not masks.binary(0, "a").any()
        assert np.isfinite(masks.logits[0]["a"]).all()


@pytest.mark.parametrize("compat", ["original", "corrected"])
@pytest.mark.parametrize(
    ("pictures", "masks", "code"),
    [
        (0, 0, "no_pictures"),
        (2, 1, "masks_count"),
        (1, 2, "masks_count"),
        (1, -1, "mask_size"),
    ],
)
def test_wrong_supports_are_refused(compat: str, pictures: int, masks: int, code: str) -> None:
    system = colours(compat)
    picture, mask = scene(8, 8)
    given = [mask[:40]] if masks < 0 else [mask] * masks
    with pytest.raises(InputError) as error:
        system.enroll(system.encode([picture] * pictures), given)
    assert error.value.code == code


def test_an_object_that_vanishes_is_refused_or_gives_nothing() -> None:
    picture, mask = scene(41, 41, side=2)  # between the rows that the released code reads
    with pytest.raises(InputError) as error:
        colours().enroll(colours().encode([picture]), [mask])
    assert error.value.code == "object_vanishes"
    system, trace = colours("original"), new_trace()
    state = system.enroll(system.encode([picture]), [mask], trace)
    assert not trace["grid_mask_support"].any()
    answer = system.segment(system.encode([picture]), {"a": state}, trace)
    assert not answer.binary(0, "a").any()
    assert not len(trace["points_cell"])


def test_empty_masks_are_refused_or_read_as_the_released_code_does() -> None:
    picture, mask = scene(8, 8)
    empty = np.zeros_like(mask)
    system = colours()
    with pytest.raises(InputError) as error:
        system.enroll(system.encode([picture, picture]), [mask, empty])
    assert error.value.code == "mask_empty"

    system, trace = colours("original"), new_trace()
    system.enroll(system.encode([picture]), [empty], trace)
    assert trace["support_masks"].sum() == 14**2
    assert trace["support_masks"][0, 33:47, 33:47].all()
    assert not empty.any()  # the caller's mask stays as it is
    state = system.enroll(system.encode([picture, picture]), [mask, empty], trace)
    assert not trace["support_masks"][1].any()
    assert not state.tensors["positive"][1].any()


def test_fallback_takes_the_best_waiting_mask() -> None:
    labels, score = np.array([0, 2, 2, 0]), np.array([9.0, -3.0, -1.0, 4.0])
    corrected, original = colours(), colours("original")
    assert corrected._fallback(labels, score).tolist() == [2]
    assert original._fallback(labels, score).tolist() == [0]  # a score of 0 stands for those that do not wait
    assert original._fallback(labels, -score).tolist() == [1]
    assert corrected._fallback(labels * 0, score).tolist() == []
    assert original._fallback(labels * 0, score).tolist() == [0]


def test_states_and_features_of_another_artifact_are_refused() -> None:
    system, other = colours(), colours()
    other.fingerprint = "other"
    picture, mask = scene(8, 8)
    features = system.encode([picture])
    state = system.enroll(features, [mask])
    with pytest.raises(IntegrityError):
        other.enroll(features, [mask])
    with pytest.raises(IntegrityError):
        other.segment(other.encode([picture]), {"a": state})
    with pytest.raises(InputError, match="no class"):
        system.segment(features, {})
