"""Our ViT against recorded stages of the original DINOv2 code and of Hugging Face's port."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fssdeploy.modules.dinov2 import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DinoVisionTransformer,
    ViTConfig,
    resample_position_table,
)
from fssdeploy.weights.checkpoint import Checkpoint
from fssdeploy.weights.dinov2 import load_dinov2
from tests.conftest import golden_cases, read_case

pytestmark = pytest.mark.golden

# Hugging Face's port resamples every table by its output size; antialiasing it shares with the original.
HUGGING_FACE_RULE = {"interpolate_offset": 0.0}
TABLE_RULES = {
    "plain": {"antialias": False, "offset": 0.1},
    "registers": {"antialias": True, "offset": 0.0},
    "huggingface_plain": {"antialias": False, "offset": 0.0},
}


def vit_config(config: dict[str, Any], **changes: Any) -> ViTConfig:
    return ViTConfig(
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        table=config["img_size"] // config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
        ffn="swiglu" if config["ffn_layer"].startswith("swiglu") else "mlp",
        registers=config["num_register_tokens"],
        **{
            "interpolate_antialias": config["interpolate_antialias"],
            "interpolate_offset": config["interpolate_offset"],
            **changes,
        },
    )


def filled(config: ViTConfig, file: Path) -> DinoVisionTransformer:
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    encoder = DinoVisionTransformer(config).eval()
    load_dinov2(encoder, Checkpoint(file, "", tensors, {}))
    return encoder


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pictures.float() / 255 - mean) / std


def stages_of(encoder: DinoVisionTransformer, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every stage that a golden case may hold, by its name there."""
    patch, prefix = encoder.config.patch, encoder.prefix
    x = normalise(pictures)
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    tokens = encoder.embed(x)
    streams = encoder.streams(tokens)
    final = encoder.norm(streams[-1])
    found = {
        "picture_normalised": x[:, :, :patch, :patch],
        "patch_embedding": encoder.patch_embed(x),
        "position_table": encoder.position_table(rows, columns),
        "tokens_in": tokens,
        "x_norm_clstoken": final[:, 0],
        "x_norm_regtokens": final[:, 1:prefix],
        "x_norm_patchtokens": final[:, prefix:],
        "x_prenorm": streams[-1],
        "last_hidden_state": final,
        "hidden_state_0": tokens,
    }
    for index, stream in enumerate(streams):
        found[f"block_{index}"] = stream
        found[f"hidden_state_{index + 1}"] = stream
        for kind, value in (("normed", encoder.norm(stream)), ("raw", stream)):
            picture = value[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))
            found[f"intermediate_{index}_{kind}"] = picture
    return found


def assert_matches(name: str, got: torch.Tensor, expected: torch.Tensor, compare: dict[str, Any]) -> None:
    assert compare["kind"] == "close", f"stage {name}: a comparison '{compare['kind']}' is not known for tensors"
    assert got.shape == expected.shape, name
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=compare["rtol"], atol=compare["atol"], err_msg=name)


@pytest.mark.parametrize("folder", golden_cases("dinov2"), ids=lambda folder: f"dinov2-{folder.name}")
@torch.no_grad()
def test_every_stage_equals_the_original(folder: Path) -> None:
    case = read_case(folder)
    files = {name: folder / path for name, path in case["files"].items()}
    inputs, expected = load_file(files["inputs"]), load_file(files["stages"])
    config = case["config"]

    if "grids" in config:  # a table alone, resampled under every rule
        found = {
            f"{rule}_{rows}x{columns}": resample_position_table(inputs["pos_embed"], rows, columns, **arguments)
            for rule, arguments in TABLE_RULES.items()
            for rows, columns in config["grids"]
        }
    else:
        rule = HUGGING_FACE_RULE if config.get("position_rule") == "huggingface" else {}
        encoder = filled(vit_config(config, **rule), files["weights"])
        found = stages_of(encoder, inputs["pictures_uint8"])
        if "weights_official" in files:
            official = filled(vit_config(config), files["weights_official"])
            other = stages_of(official, inputs["pictures_uint8"])
            found |= {f"official_{name}": tensor for name, tensor in other.items()}
            same = torch.allclose(found["x_norm_patchtokens"], other["x_norm_patchtokens"], rtol=1e-4, atol=1e-5)
            assert same == config["equals_official"]

    assert case["stages"], "the case records no stage"
    for stage in case["stages"]:
        name = stage["name"]
        assert name in found, f"stage {name} of the case is not computed here"
        assert list(found[name].shape) == stage["shape"], name
        assert_matches(name, found[name], expected[name], stage["compare"])
