"""GF-SAM, stages and glue, against recorded stages of the released code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.glue.gfsam.gates import cluster_similarity
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.glue.resample import bilinear
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.systems import gfsam
from fssdeploy.weights.checkpoint import load_strict
from tests.conftest import golden_cases, read_case

pytestmark = pytest.mark.golden


def configuration(config: dict[str, Any]) -> gfsam.GFSamConfig:
    """The small networks that a case was recorded with."""
    dino, sam = config["dinov2"], config["sam"]
    encoder = ViTConfig(
        dino["embed_dim"],
        dino["depth"],
        dino["num_heads"],
        patch=dino["patch_size"],
        table=dino["image_size"] // dino["patch_size"],
        mlp_ratio=dino["mlp_ratio"],
    )
    return gfsam.GFSamConfig(
        encoder=encoder,
        sam=SamConfig(
            sam["embed_dim"],
            sam["depth"],
            sam["num_heads"],
            tuple(sam["global_attn_indexes"]),
            image_size=sam["image_size"],
            patch=sam["patch_size"],
            mlp_ratio=sam["mlp_ratio"],
            window=sam["window_size"],
            out=sam["prompt_dim"],
            decoder_heads=sam["decoder_heads"],
            decoder_mlp=sam["decoder_mlp_dim"],
            iou_hidden=sam["iou_hidden"],
            mask_channels=sam["mask_in_chans"],
        ),
        image_size=dino["image_size"],
        antialias=dino["antialias"],
        max_points=min(config["max_points"], (dino["image_size"] // dino["patch_size"]) ** 2),
        compat="original",
    )


def recorded_system(case: dict[str, Any], folder: Path) -> tuple[GFSam, dict[str, torch.nn.Module]]:
    """The real glue over the recorded weights."""
    assert case["config"]["mask_threshold"] == 0
    config = configuration(case["config"])
    model = gfsam.build(config)
    weights = folder / case["files"]["weights"]
    load_strict(model, load_file(weights), "the recorded networks", weights)
    stages, specs = gfsam.reference_stages(model), gfsam.specs(config)
    return GFSam("gfsam", specs, TorchEngine(stages, specs), gfsam.preprocessing(config), "recorded"), stages


def compute(case: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Every stage that a case may hold, by its name there."""
    system, stages = recorded_system(case, folder)
    inputs = {name: tensor.numpy() for name, tensor in load_file(folder / case["files"]["inputs"]).items()}
    query = system.encode([inputs["query_picture"]])
    supports = system.encode([inputs[f"support_picture_{shot}"] for shot in range(case["shots"])])
    masks = [inputs[f"support_mask_{shot}"] > 0 for shot in range(case["shots"])]
    found: dict[str, np.ndarray] = {}
    state = system.enroll(supports, masks, found)
    answer = system.segment(query, {"object": state}, found)

    canvas = query.tensors["canvas"]
    with torch.no_grad():
        encoder = stages["encoder"]
        assert isinstance(encoder, gfsam.EncoderStage)
        resized = encoder.resized(torch.from_numpy(canvas))
        found["tokens_query"] = encoder.tokens(resized).numpy()
    found["encoder_input_query"] = resized.numpy()
    found["query_resized"] = canvas[0].transpose(1, 2, 0)
    (again,) = system.queries(query)
    logits = system.finish(again, system.maps(again, state).mean())
    found["mask"] = logits > 0
    # The same at the size of the picture: resampled, so not for an exact comparison.
    assert answer.logits[0]["object"].shape == inputs["query_picture"].shape[:2]
    if "coverage" in found:
        side = canvas.shape[-1]
        masks_at_canvas = bilinear(found["low_res_logits"], side, side) > 0
        found["masks"] = masks_at_canvas
        found["mask_areas"] = masks_at_canvas.sum((1, 2)).astype(np.float32)
        found["cluster_similarity"] = cluster_similarity(again.units, again.units, found["cluster_masks"])
        found["strong_labels"] = by_first_occurrence(
            connected_components(csr_array(found["coverage"]), connection="strong")[1]
        )
    return found


def by_first_occurrence(labels: np.ndarray) -> np.ndarray:
    order = list(dict.fromkeys(labels.tolist()))
    return np.array([order.index(label) for label in labels.tolist()])


def assert_agrees(stage: dict[str, Any], got: np.ndarray, expected: np.ndarray) -> None:
    name, compare = stage["name"], stage["compare"]
    if name in ("low_res_logits", "masks"):  # recorded of the first points only
        got = got[: len(expected)]
    assert got.size == expected.size, f"{name}: {got.shape} instead of {expected.shape}"
    got = got.reshape(expected.shape)
    if compare["kind"] == "close":
        np.testing.assert_allclose(got, expected, rtol=compare["rtol"], atol=compare["atol"], err_msg=name)
    elif compare["kind"] == "equal":
        np.testing.assert_array_equal(got.astype(expected.dtype), expected, err_msg=name)
    elif compare["kind"] == "set":
        assert {tuple(row) for row in got.tolist()} == {tuple(row) for row in expected.tolist()}, name
    elif compare["kind"] == "iou":
        inside, wanted = got.astype(bool), expected.astype(bool)
        union = (inside | wanted).sum()
        iou = (inside & wanted).sum() / union if union else 1.0
        assert iou >= compare["min"], f"{name}: IoU {iou}"
    else:
        raise AssertionError(f"{name}: a comparison '{compare['kind']}' is not known")


@pytest.mark.parametrize("folder", golden_cases("gfsam"), ids=lambda folder: f"gfsam-{folder.name}")
def test_every_stage_equals_the_released_code(folder: Path) -> None:
    case = read_case(folder)
    expected = {name: tensor.numpy() for name, tensor in load_file(folder / case["files"]["stages"]).items()}
    found = compute(case, folder)
    assert case["stages"], "the case records no stage"
    for stage in case["stages"]:
        assert stage["name"] in found, f"stage {stage['name']} of the case is not computed here"
        assert list(expected[stage["name"]].shape) == stage["shape"], stage["name"]
        assert_agrees(stage, found[stage["name"]], expected[stage["name"]])
    if "raises_in_original" in case:
        assert not found["mask"].any()
