"""Matcher's configuration and stages; its steps are tested under tests/glue, the whole against recorded runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import InputError
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.modules.sam import SamConfig
from fssdeploy.systems import matcher
from fssdeploy.systems.matcher import ENCODER, ENLARGED, MULTIPLE, SAM_ENCODER, SINGLE, MatcherConfig
from fssdeploy.weights.matcher import fill

SMALL = MatcherConfig(
    ViTConfig(32, 2, 2, patch=8, table=5),
    SamConfig(
        32, 2, 2, (1,), image_size=64, patch=8, window=3, out=32, decoder_heads=2, decoder_mlp=48, iou_hidden=24,
        mask_channels=4,
    ),
    image_size=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> matcher.MatcherNetworks:
    built = matcher.build(SMALL)
    assert fill(built, [], 0).status == "untrained"
    return built


def test_presets_survive_json() -> None:
    for name, config in matcher.PRESETS.items():
        assert MatcherConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name


@pytest.mark.parametrize("wrong", [{"compat": "exact"}, {"kshot": "mean"}, {"image_size": 50}])
def test_wrong_choices_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        MatcherConfig(SMALL.encoder, SMALL.sam, **{"image_size": 48, **wrong})  # type: ignore[arg-type]


def test_features_are_those_before_the_final_norm(model: matcher.MatcherNetworks) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 3, 48, 48), np.uint8)
    engine = TorchEngine(matcher.reference_stages(model), matcher.specs(SMALL))
    features = engine.run(ENCODER, {"picture": picture})["features"]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        stream = model.encoder.streams(model.encoder.embed(torch.from_numpy((picture / 255 - mean) / std).float()))[-1]
    expected = stream[:, 1:] / stream[:, 1:].norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-3, atol=1e-5)


def test_exported_copies_compute_the_same(model: matcher.MatcherNetworks) -> None:
    specs = matcher.specs(SMALL)
    reference, exported = (
        TorchEngine(found, specs) for found in (matcher.reference_stages(model), matcher.stages(model))
    )
    rng = np.random.default_rng(1)
    inputs = {
        ENCODER: {"picture": rng.integers(0, 256, (1, 3, 48, 48), np.uint8)},
        SAM_ENCODER: {ENLARGED: rng.integers(0, 256, (1, 3, 64, 64), np.uint8)},
    }
    embedding = reference.run(SAM_ENCODER, inputs[SAM_ENCODER])["embedding"]
    prompts = {
        "points": rng.uniform(0, 64, (3, 8, 2)).astype(np.float32),
        "labels": np.array([[1, 1, -1, -2, -2, -2, -2, -2]] * 3, specs[SINGLE].inputs[1].dtype),
        "embedding": embedding,
    }
    for stage, given in {**inputs, SINGLE: prompts, MULTIPLE: prompts}.items():
        for name, expected in reference.run(stage, given).items():
            np.testing.assert_allclose(exported.run(stage, given)[name], expected, rtol=1e-3, atol=1e-4, err_msg=stage)


def test_parameters_of_the_stages(model: matcher.MatcherNetworks) -> None:
    counts = {stage: matcher.stage_parameters(model, stage) for stage in matcher.specs(SMALL)}
    assert counts[MULTIPLE] - counts[SINGLE] == 2 * sum(
        parameter.numel() for parameter in model.sam.mask_decoder.output_hypernetworks_mlps[0].parameters()
    )
    assert counts[ENCODER] + 3 * SMALL.encoder.dim == sum(each.numel() for each in model.encoder.parameters())
    assert counts[SAM_ENCODER] == sum(each.numel() for each in model.sam.image_encoder.parameters())
