"""The booster against recorded stages of a float64 computation of the paper's equations, alone and around GF-SAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.glue.gsm.boost import Affinity, boost
from fssdeploy.glue.gsm.gfsam import GFSamHost
from fssdeploy.glue.gsm.graph import (
    cosine_matrix,
    edge_weights,
    gaussian,
    leading_eigenvectors,
    normalise,
    undirected,
)
from fssdeploy.glue.gsm.options import ABLATION, GsmOptions
from fssdeploy.glue.gsm.regions import region_similarity
from fssdeploy.glue.gsm.system import Gsm
from tests.conftest import golden_cases, read_case
from tests.systems.test_gfsam_golden import recorded_system

pytestmark = pytest.mark.golden

# The recorded options by their names there.
BROADCAST = {"prod": "product", "geo": "geometric", "mean": "mean", "row": "row", "col": "column", "none": "none"}
ASSIGN = {"cluster_qr": "pivoted_qr", "kmeans_fp": "kmeans", "sign": "sign"}
LAPLACIAN = {"sym": "symmetric", "rw": "random_walk"}


def options_of(config: dict[str, Any]) -> GsmOptions:
    assert (config["norm"], config["edge_op"]) == ("cosine", "sobel"), "the only ones there are"
    threshold, gain = config["edge_thr"], config["gain"]
    return GsmOptions(
        gain=gain if gain == "auto" else float(gain),
        broadcast=BROADCAST[config["broadcast"]],
        negative=config["neg"],
        sigma=float(config["sigma"]),
        edge_threshold=threshold if threshold in ("mean", "otsu") else float(threshold),
        edge_resize=config["edge_resize"],
        edge_cells=config["fill"],
        connectivity=config["connectivity"],
        regions=config["m"],
        laplacian=LAPLACIAN[config["laplacian"]],
        normalise_rows=config["rownorm"],
        assign=ASSIGN[config["assign"]],
        assign_binary=ASSIGN[config["assign2"]],
        keep_diagonal=config["diag"] == "keep",
        temperature=config["temperature"],
    )


def affinity_of(inputs: dict[str, np.ndarray], grid: tuple[int, int]) -> Affinity:
    """Maps and prototypes of shots given as features and soft masks, in the form of GF-SAM."""
    units = unit(inputs["query_features"])
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("mean", "peak", "negative", "fg", "bg")}
    for features, mask in zip(inputs["support_features"], inputs["support_grid_masks"], strict=True):
        cosines = unit(features) @ units.T
        rows["mean"].append(mask @ cosines / mask.sum())
        rows["peak"].append((mask[:, None] * cosines).max(0))
        rows["negative"].append((1 - mask) @ cosines / (1 - mask).sum())
        rows["fg"].append(mask @ features / mask.sum())
        rows["bg"].append((1 - mask) @ features / (1 - mask).sum())
    stacked = [np.stack(each).astype(np.float32) for each in rows.values()]
    return Affinity(inputs["query_picture"], grid, inputs["query_features"], *stacked)


def graph_stages(
    affinity: Affinity, trace: dict[str, Any], options: GsmOptions, stages: dict[str, Any]
) -> dict[str, Any]:
    """The stages that are N x N, or need more eigenvalues than are used: rebuilt from what the run left behind."""
    units = unit(affinity.query)
    cosines = cosine_matrix(units)
    rows, columns = affinity.grid
    reference = np.exp(trace["gain"] * trace["evidence"].astype(np.float64)).astype(np.float32)
    # The run divides the term by its largest value, which changes no label.
    np.testing.assert_allclose(reference / reference.max(), trace["reference_term"], rtol=1e-4)

    def edges(step: str, broadcast: str) -> np.ndarray:
        labels = trace["region_labels" if step == "1" else "labels_1"]
        return edge_weights(
            cosines,
            affinity.grid,
            labels,
            region_similarity(units, labels),
            reference,
            sigma=float(options.sigma),
            negative=options.negative,
            broadcast=broadcast,
        )

    coarse = trace["region_labels"]
    found = {
        "c_self": cosines,
        "k_gauss": np.kron(gaussian(rows, float(options.sigma)), gaussian(columns, float(options.sigma))),
        "region_similarity": trace["region_similarity_1"],
        "region_affinity": trace["region_similarity_1"][coarse][:, coarse],
        "edge_2": edges("2", options.broadcast),
        "reference_term": reference,
    }
    found |= {f"edge_{short}": edges("1", name) for short, name in BROADCAST.items()}
    for step in ("1", "2"):
        graph = edges(step, undirected(options.broadcast))
        found[f"degree_{step}"] = normalise(graph, keep_diagonal=options.keep_diagonal)
        wanted = stages[f"eigenvalues_{step}"]["shape"][0]
        found[f"eigenvalues_{step}"] = leading_eigenvectors(graph, wanted)[0]
        used = trace[f"eigenvalues_{step}"]
        np.testing.assert_allclose(used, found[f"eigenvalues_{step}"][: len(used)], rtol=1e-3, atol=1e-4)
        vectors = trace[f"eigenvectors_{step}"]
        found[f"projector_{step}"] = vectors @ vectors.T
    return found


def boost_stages(
    affinity: Affinity, host_mask: np.ndarray, options: GsmOptions, stages: dict[str, Any]
) -> dict[str, Any]:
    """Every stage of the booster itself, by its recorded name."""
    trace: dict[str, Any] = {}
    found: dict[str, Any] = {
        "pos_mean_per_shot": affinity.positive,
        "pos_max_per_shot": affinity.peak,
        "neg_mean_per_shot": affinity.negative,
        "s_plus": affinity.positive.mean(0),
        "s_minus": affinity.negative.mean(0),
    }
    for name, parts in ABLATION.items():
        kept = trace if name == "F" else {}
        boosted = boost(affinity, host_mask, GsmOptions(**{**options.to_dict(), **parts}), kept)
        found |= {
            f"row_{name}_s_plus": boosted.positive,
            f"row_{name}_s_max": boosted.peak,
            f"row_{name}_s_minus": boosted.negative,
        }
    literal = GsmOptions(**{**options.to_dict(), "literal_mean": True})
    found["s_plus_literal"] = boost(affinity, host_mask, literal).positive
    return found | trace | graph_stages(affinity, trace, options, stages)


def assert_matches(name: str, got: Any, expected: np.ndarray, compare: dict[str, Any]) -> None:
    got = np.asarray(got)
    assert got.size == expected.size, f"{name}: {got.shape} instead of {expected.shape}"
    got = got.reshape(expected.shape)
    if compare["kind"] == "close":
        np.testing.assert_allclose(got, expected, rtol=compare["rtol"], atol=compare["atol"], err_msg=name)
    elif compare["kind"] == "equal":
        np.testing.assert_array_equal(got.astype(expected.dtype), expected, err_msg=name)
    elif compare["kind"] == "set":
        assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, expected.tolist())), name
    else:
        assert compare["kind"] == "iou", f"stage {name}: a comparison '{compare['kind']}' is not known"
        inside, truth = got > 0, expected > 0
        union = (inside | truth).sum()
        assert union == 0 or (inside & truth).sum() / union >= compare["min"], name


def assert_stages(case: dict[str, Any], found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert case["stages"], "the case records no stage"
    for stage in case["stages"]:
        name = stage["name"]
        assert name in found, f"stage {name} of the case is not computed here"
        assert list(expected[name].shape) == stage["shape"], name
        assert_matches(name, found[name], expected[name], stage["compare"])


def stages_of(case: dict[str, Any]) -> dict[str, Any]:
    return {stage["name"]: stage for stage in case["stages"]}


CASES = golden_cases("gsm")
AROUND_GFSAM = [folder for folder in CASES if "host" in read_case(folder)["config"]]
ALONE = [folder for folder in CASES if folder not in AROUND_GFSAM]


@pytest.mark.parametrize("folder", ALONE, ids=lambda folder: f"gsm-{folder.name}")
def test_every_stage_of_the_booster(folder: Path) -> None:
    case = read_case(folder)
    files = {name: folder / path for name, path in case["files"].items()}
    inputs, expected = load_file(files["inputs"]), load_file(files["stages"])
    affinity = affinity_of(inputs, tuple(case["config"]["grid"]))
    found = boost_stages(affinity, inputs["host_mask"], options_of(case["config"]), stages_of(case))
    assert_stages(case, found, expected)


@pytest.mark.parametrize("folder", AROUND_GFSAM, ids=lambda folder: f"gsm-{folder.name}")
def test_every_stage_around_gfsam(folder: Path) -> None:
    case = read_case(folder)
    assert case["config"]["host"] == "gfsam"
    host, _ = recorded_system({**case, "config": case["config"]["host_config"]}, folder)
    files = {name: folder / path for name, path in case["files"].items()}
    inputs, expected = load_file(files["inputs"]), load_file(files["stages"])
    query = host.encode([inputs["query_picture"]])
    supports = host.encode([inputs[f"support_picture_{shot}"] for shot in range(case["shots"])])
    state = host.enroll(supports, [inputs[f"support_mask_{shot}"] > 0 for shot in range(case["shots"])])
    options = options_of(case["config"])

    found: dict[str, Any] = {}
    for row, parts in ABLATION.items():
        trace: dict[str, Any] = {}
        chosen = GsmOptions(**{**options.to_dict(), **parts})
        masks = Gsm(GFSamHost(host), chosen).segment(query, {"object": state}, trace)
        found[f"final_mask_row_{row}"] = trace["final_mask"]
        assert trace["final_mask"].any() == masks.binary(0, "object").any()
        if row == "A":
            own = host.segment(query, {"object": state})
            np.testing.assert_array_equal(masks.logits[0]["object"], own.logits[0]["object"])
    boosted = boost_stages(
        GFSamHost(host).affinity(host.query(query), state, None), trace["host_mask"], options, stages_of(case)
    )
    # Where nothing changed there is no second pass: it would repeat the first.
    second = {f"second_{name}": value for name, value in trace.items()}
    assert_stages(case, second | found | trace | boosted, expected)
