"""Matcher, stage by stage, against recorded stages of the released code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.glue.matcher.candidates import centre_pixels, touched_patches
from fssdeploy.glue.matcher.options import MatcherOptions
from fssdeploy.glue.matcher.prompts import FEW_CANDIDATES, Draws, all_subsets
from fssdeploy.glue.matcher.scores import purity_and_coverage, transport_scores
from fssdeploy.glue.matcher.system import Matcher
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.systems import matcher
from fssdeploy.weights.checkpoint import Checkpoint
from fssdeploy.weights.dinov2 import load_dinov2
from fssdeploy.weights.sam import load_sam
from tests.conftest import golden_cases, read_case

pytestmark = pytest.mark.golden

Arrays = dict[str, Any]


class RecordedDraws(Draws):
    """What the recorded run drew, in place of a generator."""

    def __init__(self, inputs: Arrays) -> None:
        super().__init__(0)
        self.inputs = inputs

    def first_centres(self, points: np.ndarray, count: int) -> np.ndarray:
        recorded = self.inputs["points_ordered"][self.inputs["kmeans_initial_indices"]]
        assert len(recorded) == count
        return places_of(recorded, points)

    def subsets(self, candidates: np.ndarray, size: int, draws: int) -> np.ndarray:
        recorded = self.inputs[f"prompt_points_n{size}"]
        places_of(recorded.reshape(-1, 2), candidates)
        if len(candidates) <= FEW_CANDIDATES:  # nothing is drawn then
            assert sets_of(super().subsets(candidates, size, draws)) == sets_of(recorded)
        else:
            assert recorded.shape == (draws, size, 2)
        return recorded


def places_of(wanted: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where each of `wanted` (m, 2) stands among `points` (n, 2); each must be there once."""
    found = (wanted[:, None] == points[None]).all(-1)
    assert (found.sum(1) == 1).all()
    return found.argmax(1)


def sets_of(prompts: np.ndarray) -> set[frozenset[tuple[int, ...]]]:
    return {frozenset(map(tuple, points.tolist())) for points in prompts}


def matcher_config(config: dict[str, Any], options: MatcherOptions) -> matcher.MatcherConfig:
    sam, dino = config["sam"], config["dinov2"]
    return matcher.MatcherConfig(
        ViTConfig(
            dino["embed_dim"],
            dino["depth"],
            dino["num_heads"],
            dino["patch_size"],
            table=dino["img_size"] // dino["patch_size"],
            mlp_ratio=dino["mlp_ratio"],
            ffn="swiglu" if dino["ffn_layer"].startswith("swiglu") else "mlp",
        ),
        SamConfig(
            sam["enc_dim"],
            sam["enc_depth"],
            sam["enc_heads"],
            tuple(sam["enc_global"]),
            sam["img_size"],
            sam["patch_size"],
            sam["enc_mlp_ratio"],
            sam["enc_window"],
            sam["dim"],
            sam["dec_heads"],
            sam["dec_mlp"],
            sam["iou_hidden"],
            sam["mask_in_chans"],
        ),
        image_size=config["input_size"],
        capacity=options.sample_range[1] + 2,
        options=options,
        compat="original",
    )


def weights(file: Path) -> Checkpoint:
    return Checkpoint(file, "", {name: tensor.float() for name, tensor in load_tensors(file).items()}, {})


def whole_run(case: dict[str, Any], files: dict[str, Path], inputs: Arrays) -> Arrays:
    """Enrol and segment with everything traced."""
    config = matcher_config(case["config"], MatcherOptions.from_dict(case["config"]["options"]))
    model = matcher.build(config)
    load_dinov2(model.encoder, weights(files["weights_dinov2"]))
    load_sam(model.sam, weights(files["weights"]))
    specs = matcher.specs(config)
    system = Matcher(
        matcher.NAME,
        specs,
        TorchEngine(matcher.reference_stages(model), specs),
        matcher.preprocessing(config),
        "recorded",
        draws=lambda seed: RecordedDraws(inputs),
    )
    found: Arrays = {}
    if "original_support_pictures" in inputs:
        original = system.encode(list(inputs["original_support_pictures"]))
        resized: Arrays = {}
        system.enroll(original, list(inputs["original_support_masks"]), resized)
        found["support_resized"] = original.tensors["canvas"].transpose(0, 2, 3, 1)
        query = system.encode([inputs["original_query_picture"]]).tensors["canvas"][0].transpose(1, 2, 0)
        found["query_resized"] = query
        np.testing.assert_allclose(query, inputs["query_picture"], atol=1)
    state = system.enroll(system.encode(list(inputs["support_pictures"])), list(inputs["support_masks"]), found)
    if "original_support_pictures" in inputs:
        np.testing.assert_array_equal(resized["support_mask_resized"], found["support_mask_resized"])
        found["support_mask_resized"] = resized["support_mask_resized"]
    assert state.shots == case["shots"]
    masks = system.segment(system.encode([inputs["query_picture"]]), {"object": state}, found)
    np.testing.assert_array_equal(masks.binary(0, "object"), found["final_mask"])
    if "kmeans_assignment" in found:  # recorded in another order of the points
        found["kmeans_assignment"] = found["kmeans_assignment"][places_of(inputs["points_ordered"], found["points"])]
    return found


def scores_alone(case: dict[str, Any], inputs: Arrays) -> Arrays:
    """Scores of given masks, without networks."""
    patch, side = (case["config"][name] for name in ("patch_size", "input_size"))
    masks, points = inputs["masks"].astype(bool), inputs["points"] // patch
    touched, centred = touched_patches(masks, patch), centre_pixels(masks, patch)
    purity, coverage = purity_and_coverage(touched, centred, points[:, 1] * (side // patch) + points[:, 0])
    foreground = inputs["ref_patch_foreground"].astype(bool).ravel()
    similarity = inputs["ref_features"][foreground] @ inputs["target_features"].T
    found: Arrays = {
        "patch_masks": touched,
        "purity": purity,
        "coverage": coverage,
        "emd": transport_scores(similarity, touched),
    }
    for stage in case["stages"]:
        if sizes := re.fullmatch(r"combinations_(\d+)_(\d+)", stage["name"]):
            found[stage["name"]] = all_subsets(*map(int, sizes.groups()))
    return found


def assert_matches(name: str, got: np.ndarray, expected: np.ndarray, compare: dict[str, Any]) -> None:
    kind = compare["kind"]
    assert got.shape == expected.shape, name
    if kind == "close":
        np.testing.assert_allclose(
            got.astype(np.float64), expected, rtol=compare["rtol"], atol=compare["atol"], err_msg=name
        )
    elif kind == "equal":
        np.testing.assert_array_equal(got, expected, err_msg=name)
    elif kind == "set":
        assert sorted(got.tolist()) == sorted(expected.tolist()), name
    elif kind == "iou":
        both, either = (operator(got > 0, expected > 0).sum() for operator in (np.logical_and, np.logical_or))
        assert both >= compare["min"] * either, f"{name}: IoU {both / either:.4f}"
    else:
        raise AssertionError(f"stage {name}: a comparison '{kind}' is not known")


@pytest.mark.parametrize("folder", golden_cases("matcher"), ids=lambda folder: f"matcher-{folder.name}")
def test_every_stage_equals_the_release(folder: Path) -> None:
    case = read_case(folder)
    files = {name: folder / path for name, path in case["files"].items()}
    inputs, expected = load_file(files["inputs"]), load_file(files["stages"])
    alone = case["config"]["pipeline"] == "mask_scores"
    found = scores_alone(case, inputs) if alone else whole_run(case, files, inputs)
    if "selected_masks" in found and "selected" in expected:  # equal scores may be merged in another order
        order = [found["selected"].tolist().index(number) for number in expected["selected"].tolist()]
        found["selected_masks"] = found["selected_masks"][order]
    assert case["stages"], "the case records no stage"
    for stage in case["stages"]:
        name = stage["name"]
        assert name in found, f"stage {name} of the case is not computed here"
        assert list(found[name].shape) == stage["shape"], name
        assert_matches(name, found[name], expected[name], stage["compare"])
