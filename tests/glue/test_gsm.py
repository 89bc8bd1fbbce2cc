"""The booster on made-up features: identities of the ablation rows, every option, and input that goes wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.sparse.linalg import ArpackNoConvergence

from fssdeploy.errors import InputError
from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.glue.gsm import graph as gsm_graph
from fssdeploy.glue.gsm import qsm as gsm_qsm
from fssdeploy.glue.gsm.boost import Affinity, boost, reference_weights
from fssdeploy.glue.gsm.graph import leading_eigenvectors, normalise
from fssdeploy.glue.gsm.options import ABLATION, ALLOWED, GsmOptions
from fssdeploy.glue.gsm.regions import (
    adaptive_average,
    edge_regions,
    edge_strength,
    edge_threshold,
    numbered,
    region_similarity,
)

GRID = (9, 12)
CELL = 8


def scene(shots: int = 1, seed: int = 0, noise: float = 0.4) -> tuple[Affinity, np.ndarray]:
    """A disc on two stuffs, at the grid and as a picture; `shots` noisy references. Returns it with the true mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: GRID[0], : GRID[1]]
    disc = (y - 4) ** 2 + (x - 4) ** 2 <= 6
    kind = np.where(disc, 2, x > 7)
    concepts = rng.standard_normal((3, 16)) + 0.5 * rng.standard_normal(16)
    query = concepts[kind.ravel()] + noise * rng.standard_normal((kind.size, 16))
    prototypes = [concepts[index] + 0.3 * noise * rng.standard_normal((shots, 16)) for index in (2, 0)]
    units = unit(query.astype(np.float32))
    fg, bg = (each.astype(np.float32) for each in prototypes)
    positive, negative = unit(fg) @ units.T, unit(bg) @ units.T
    colours = np.array([[40, 90, 60], [200, 190, 180], [180, 40, 30]], np.uint8)[kind]
    picture = colours.repeat(CELL, 0).repeat(CELL, 1)
    mask = disc.repeat(CELL, 0).repeat(CELL, 1)
    affinity = Affinity(picture, GRID, query.astype(np.float32), positive, positive, negative, fg, bg)
    return affinity, mask


def row(name: str, **changes: Any) -> GsmOptions:
    return GsmOptions(**{**ABLATION[name], **changes})


def assert_host_maps(affinity: Affinity, boosted: Any) -> None:
    assert not boosted.changed
    np.testing.assert_array_equal(boosted.positive, affinity.positive.mean(0))
    np.testing.assert_array_equal(boosted.peak, affinity.peak.mean(0))
    np.testing.assert_array_equal(boosted.negative, affinity.negative.mean(0))


def test_the_full_booster_finds_the_object_and_weighs_all_references() -> None:
    affinity, mask = scene(shots=3)
    trace: dict[str, Any] = {}
    boosted = boost(affinity, mask, GsmOptions(), trace)
    truth = adaptive_average(mask, GRID).ravel() > 0.5
    assert boosted.changed and not boosted.skipped
    assert (trace["m_qsm"] == truth).mean() > 0.95
    assert (trace["m_pos"] <= truth).all() and not (trace["m_pos"] & trace["m_neg"]).any()
    assert boosted.weight_fg.shape == (4,) and boosted.weight_fg.sum() == pytest.approx(1)
    margin = boosted.positive - boosted.negative
    assert margin[truth].min() > margin[~truth].max()


@pytest.mark.parametrize("name", ["A", "D"])
def test_rows_a_and_one_shot_d_are_the_host(name: str) -> None:
    affinity, mask = scene()
    assert_host_maps(affinity, boost(affinity, mask, row(name)))


def test_reweighting_does_nothing_at_one_shot_with_or_without_a_proxy() -> None:
    affinity, mask = scene()
    for without, with_rr in (("B", "E"), ("C", "F")):
        one, two = (boost(affinity, mask, row(name)) for name in (without, with_rr))
        np.testing.assert_array_equal(one.weight_fg, [0.5, 0.5])
        for maps in ("positive", "peak", "negative"):
            np.testing.assert_array_equal(getattr(one, maps), getattr(two, maps))


def test_reweighting_prefers_the_reference_that_is_like_the_others() -> None:
    affinity, mask = scene(shots=4)
    affinity.prototype_fg[1] *= -1
    weights = boost(affinity, mask, row("D")).weight_fg
    assert weights.argmin() == 1 and weights[1] < weights[0] / 2
    sharper = boost(affinity, mask, row("D", temperature=0.1)).weight_fg
    assert sharper[1] < weights[1]
    assert boost(affinity, mask, row("A")).weight_fg == pytest.approx(0.25)


def test_the_result_does_not_depend_on_the_run() -> None:
    affinity, mask = scene(shots=2, noise=0.8)
    first, again = (boost(affinity, mask, GsmOptions()) for _ in range(2))
    np.testing.assert_array_equal(first.positive, again.positive)


@pytest.mark.parametrize("name", ["B", "C", "E", "F"])
def test_an_empty_host_mask_leaves_no_proxy(name: str) -> None:
    affinity, mask = scene()
    boosted = boost(affinity, np.zeros_like(mask), row(name))
    assert_host_maps(affinity, boosted)
    assert any("no foreground cell" in reason for reason in boosted.skipped)


def test_an_object_under_half_a_cell_leaves_no_proxy_by_area_but_does_by_touch() -> None:
    affinity, mask = scene()
    small = np.zeros_like(mask)
    small[36:39, 36:39] = True
    assert not boost(affinity, small, row("B")).changed
    assert boost(affinity, small, row("B", mask_to_grid="any")).changed


@pytest.mark.parametrize("name", ["B", "C", "E", "F"])
def test_a_full_host_mask_adds_a_positive_reference_only(name: str) -> None:
    affinity, mask = scene(shots=2)
    boosted = boost(affinity, np.ones_like(mask), row(name))
    assert (len(boosted.weight_fg), len(boosted.weight_bg)) == (3, 2)
    np.testing.assert_allclose(boosted.negative, affinity.negative.mean(0), atol=1e-6)
    assert any("foreground only" in reason for reason in boosted.skipped)


def test_a_shot_whose_mask_vanished_weighs_nothing() -> None:
    affinity, mask = scene(shots=3)
    for array in (affinity.prototype_fg, affinity.positive, affinity.peak):
        array[1] = 0
    for name in ("B", "D", "F"):
        boosted = boost(affinity, mask, row(name))
        assert boosted.weight_fg[1] == 0 and boosted.weight_fg.sum() == pytest.approx(1)
        assert boosted.weight_bg.min() > 0
    assert_host_maps(affinity, boost(affinity, mask, row("A")))


def test_no_shot_with_a_cell_is_defined() -> None:
    trace: dict[str, Any] = {}
    np.testing.assert_array_equal(reference_weights(np.zeros((2, 4)), GsmOptions(), trace, "fg"), [0.5, 0.5])


@pytest.mark.parametrize("query", ["equal", "zero"])
def test_a_picture_of_one_colour_is_defined(query: str) -> None:
    affinity, mask = scene()
    affinity.picture[:] = 77
    affinity.query[:] = affinity.query[0] if query == "equal" else 0
    for maps in (affinity.positive, affinity.peak, affinity.negative):
        maps[:] = maps[:, :1]
    trace: dict[str, Any] = {}
    boosted = boost(affinity, mask, GsmOptions(), trace)
    assert trace["region_labels"].max() == 0 and trace["gain"] == 0
    for maps in (boosted.positive, boosted.peak, boosted.negative):
        assert np.isfinite(maps).all()


def test_one_cluster_falls_back_to_the_host_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm_qsm, "cluster", lambda vectors, *_, **__: np.zeros(len(vectors), np.int32))
    affinity, mask = scene()
    boosted = boost(affinity, mask, row("C"))
    np.testing.assert_array_equal(boosted.positive, boost(affinity, mask, row("B")).positive)
    assert any("one cluster" in reason for reason in boosted.skipped)


def never(*_: Any, **__: Any) -> Any:
    raise ArpackNoConvergence("no convergence", np.zeros(0), np.zeros((0, 0)))


def test_a_solver_that_does_not_converge_is_replaced_by_a_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    affinity, mask = scene()
    expected = boost(affinity, mask, GsmOptions())
    monkeypatch.setattr(gsm_graph, "eigsh", never)
    boosted = boost(affinity, mask, GsmOptions())
    np.testing.assert_allclose(boosted.positive, expected.positive, atol=1e-6)
    assert not boosted.skipped


def test_without_any_eigenvectors_the_host_mask_is_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm_graph, "eigsh", never)
    monkeypatch.setattr(gsm_graph, "DENSE_LIMIT", 50)
    affinity, mask = scene()
    boosted = boost(affinity, mask, row("C"))
    np.testing.assert_array_equal(boosted.positive, boost(affinity, mask, row("B")).positive)
    assert any("did not converge" in reason for reason in boosted.skipped)


def test_features_that_are_no_numbers_skip_the_clustering() -> None:
    affinity, mask = scene()
    affinity.query[3] = np.nan
    assert any("no finite numbers" in reason for reason in boost(affinity, mask, row("C")).skipped)


def test_strong_evidence_does_not_overflow() -> None:
    affinity, mask = scene()
    affinity.positive += 1e-4 * np.arange(affinity.positive.size, dtype=np.float32)
    for gain in (300.0, "auto"):
        trace: dict[str, Any] = {}
        assert not boost(affinity, mask, GsmOptions(gain=gain), trace).skipped
        assert np.isfinite(trace["eigenvectors_1"]).all() and trace["eigenvalues_1"][0] == pytest.approx(1, abs=1e-4)


OTHERS = [(name, value) for name, values in ALLOWED.items() for value in values[1:]] + [
    ("gain", 1.0),
    ("sigma", 1.0),
    ("edge_threshold", "otsu"),
    ("edge_threshold", 0.6),
    ("regions", 3),
    ("regions", 256),
    ("keep_diagonal", False),
    ("own_cell", False),
    ("literal_mean", True),
]


@pytest.mark.parametrize(("name", "value"), OTHERS, ids=str)
def test_every_option_gives_finite_maps_and_an_object(name: str, value: Any) -> None:
    affinity, mask = scene(shots=2)
    boosted = boost(affinity, mask, GsmOptions(**{name: value}))
    assert boosted.changed
    for maps in (boosted.positive, boosted.peak, boosted.negative):
        assert maps.shape == (GRID[0] * GRID[1],) and np.isfinite(maps).all()


def test_leaving_out_the_own_cell_lowers_the_peak_inside_only() -> None:
    affinity, mask = scene()
    with_own, without = (boost(affinity, mask, GsmOptions(own_cell=own)).peak for own in (True, False))
    truth = adaptive_average(mask, GRID).ravel() > 0.5
    assert (without[truth] < with_own[truth]).all()
    np.testing.assert_array_equal(without[~truth], with_own[~truth])


def test_the_literal_mean_divides_by_the_number_of_references() -> None:
    affinity, mask = scene(shots=2)
    plain, literal = (boost(affinity, mask, GsmOptions(literal_mean=on)) for on in (False, True))
    np.testing.assert_allclose(literal.positive * 3, plain.positive, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"qsm": True, "tsr": False},
        {"gain": -1},
        {"gain": "strong"},
        {"sigma": 0},
        {"edge_threshold": 1.5},
        {"temperature": 0},
        {"regions": 1},
        {"broadcast": "diagonal"},
        {"connectivity": 6},
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="gsm"):
        GsmOptions(**changes)
    with pytest.raises(InputError):
        GsmOptions.from_dict({"strength": 1})


def test_options_survive_a_dictionary() -> None:
    options = GsmOptions(gain=2.0, rr=False)
    assert GsmOptions.from_dict(options.to_dict()) == options


def test_maps_that_do_not_belong_together_are_refused() -> None:
    affinity, mask = scene()
    with pytest.raises(InputError, match="belong together"):
        boost(dataclasses.replace(affinity, grid=(9, 11)), mask, GsmOptions())
    with pytest.raises(InputError, match="belong together"):
        boost(dataclasses.replace(affinity, prototype_bg=affinity.prototype_bg[:0]), mask, GsmOptions())
    with pytest.raises(InputError, match="height, width"):
        boost(affinity, mask[0], GsmOptions())


def test_region_similarity_is_the_mean_of_all_pairs() -> None:
    affinity, _ = scene()
    units = unit(affinity.query)
    labels = numbered(np.random.default_rng(0).integers(0, 5, len(units)))
    cosines = units @ units.T
    expected = np.array([[cosines[np.ix_(labels == p, labels == q)].mean() for q in range(5)] for p in range(5)])
    np.testing.assert_allclose(region_similarity(units, labels), expected, atol=1e-5)


def test_edge_cells_join_regions_as_asked() -> None:
    strength = np.zeros((5, 7), np.float32)
    strength[:, 2:5] = [1, 3, 2]
    regions = {rule: edge_regions(strength, 0.5, rule, 4) for rule in ALLOWED["edge_cells"]}
    np.testing.assert_array_equal(regions["nearest"][0], [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(regions["watershed"][0], [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(regions["single"][0], [0, 0, 1, 1, 1, 2, 2])
    assert regions["own"].max() + 1 == 2 + 15
    # The ridge lies on the right: flooding reaches it from the left, the distance alone stops half-way.
    ridge = np.array([[0, 0, 1, 1, 1, 1, 3, 0, 0]], np.float32)
    np.testing.assert_array_equal(edge_regions(ridge, 0.5, "watershed", 4)[0], [0, 0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(edge_regions(ridge, 0.5, "nearest", 4)[0], [0, 0, 0, 0, 0, 1, 1, 1, 1])


def test_connectivity_decides_over_corners() -> None:
    strength = np.eye(4, dtype=np.float32)[:, ::-1]
    assert edge_regions(1 - strength, 0.5, "single", 4).max() == 4
    assert edge_regions(1 - strength, 0.5, "single", 8).max() == 1


def test_edges_of_a_picture_lie_where_it_changes() -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = 255
    strength = edge_strength(picture, (4, 6), "area")
    assert strength[:, 2:4] == pytest.approx(0.5 / 10) and not strength[:, [0, 1, 4, 5]].any()
    assert 0 < edge_threshold(strength, "otsu") < 0.05
    assert edge_threshold(strength, 0.5) == 0


def test_adaptive_average_shares_pixels_that_a_border_cuts() -> None:
    np.testing.assert_allclose(adaptive_average(np.arange(5.0)[None], (1, 2)), [[1, 3]])
    np.testing.assert_allclose(adaptive_average(np.arange(2.0)[None], (1, 3)), [[0, 0.5, 1]])


def test_eigenvectors_of_very_small_graphs() -> None:
    matrix = np.array([[2, 1, 0], [1, 2, 0], [0, 0, 1]], np.float32)
    values, vectors = leading_eigenvectors(matrix.copy(), 2)
    np.testing.assert_allclose(values, [3, 1], atol=1e-6)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-6)


def test_a_cell_without_edges_stays_alone() -> None:
    edges = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    degree = normalise(edges, keep_diagonal=True)
    np.testing.assert_array_equal(degree, [2, 2, 0])
    np.testing.assert_allclose(edges, np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]))
