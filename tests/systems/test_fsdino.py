"""FS-DINO: sizes as in the paper, and the properties that make enrolment exact."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fssdeploy.benchmarks.baselines.fsdino_research import joint_forward
from fssdeploy.errors import InputError
from fssdeploy.modules.pooling import mask_to_tokens
from fssdeploy.systems.fsdino import (
    OPTIONS,
    PRESETS,
    FSDino,
    FSDinoConfig,
    build,
    initialise_untrained,
    specs,
    stages,
)
from tests.networks import SMALL


def small(seed: int = 0, **changes: object) -> FSDino:
    model = build(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    initialise_untrained(model, seed)
    return model


def supports(count: int, size: int = 70, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, 1, size, size)
    for index in range(count):
        masks[index, :, 10 + 3 * index : 40 + 2 * index, 15 : 50 - 2 * index] = 1
    return pictures, masks


def enrol(model: FSDino, pictures: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens, _ = model.encode(pictures)
    return {name: value.mean(0, keepdim=True) for name, value in model.enroll(tokens, masks).items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = FSDino(PRESETS["base"])
        compact = FSDino(dataclasses.replace(PRESETS["base"], variant="compact"))
    assert count(model.encoder) == 86_580_480
    assert count(model.adapter) == 1_250_688  # the paper: "1M"
    assert count(model.correlation) == 3_663_806  # "4M"
    assert count(model.decoder) == 4_058_340
    assert count(model.svp) == 196_864
    assert count(model.dense_prompt) == 4_684
    assert count(model.position) == 256
    assert count(compact) - count(compact.encoder) == 5_510_832  # "5M" upon DINOv2


@pytest.mark.parametrize(("preset", "parameters"), [("small", 22_056_576), ("large", 304_368_640)])
def test_other_sizes_build(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(FSDino(PRESETS[preset]).encoder) == parameters


@pytest.mark.parametrize("measure", OPTIONS["correlation"])
@torch.no_grad()
def test_folded_projection_equals_the_direct_form(measure: str) -> None:
    model = small(correlation=measure).double()
    branch = model.correlation
    query, support = torch.randn(1, 25, 48, dtype=torch.double), torch.randn(1, 25, 48, dtype=torch.double)
    weight = torch.rand(1, 1, 25, dtype=torch.double)
    volume = torch.einsum("bqc,bsc->bsq", branch.scale(query), branch.scale(support) * weight.transpose(1, 2))
    direct = branch.project(volume.unflatten(2, (5, 5))).flatten(2)
    folded = branch.respond(branch.fold(support, weight), query)
    torch.testing.assert_close(folded, direct, rtol=1e-4 if measure == "cosine" else 1e-9, atol=1e-6)


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "compact"},
        {"svp": "mlp"},
        {"svp": "none"},
        {"correlation": "cosine"},
        {"upsample": "literal"},
        {"tap_norm": "none", "adapter_order": "post", "adapter_heads": 4},
        {"adapter_norm": "none", "adapter_activation": "relu"},
        {"image_size": 84},  # an even grid
    ],
    ids=str,
)
@torch.no_grad()
def test_enrolling_first_equals_the_joint_forward_pass(changes: dict[str, object], shots: int) -> None:
    model = small(**changes)
    size = model.config.image_size
    pictures, masks = supports(shots, size)
    query = supports(1, size, seed=9)[0]
    expected_mask, expected_prior = joint_forward(model, query, pictures, masks)
    tokens, embedding = model.encode(query)
    mask, prior = model.segment(tokens, embedding, enrol(model, pictures, masks))
    side = 4 * model.config.grid
    assert mask.shape == prior.shape == (1, 1, side, side)
    torch.testing.assert_close(prior, expected_prior, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mask, expected_mask, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_equal_shots_are_one_shot_and_their_order_does_not_matter() -> None:
    model = small()
    pictures, masks = supports(3)
    one = enrol(model, pictures[:1], masks[:1])
    same = enrol(model, pictures[:1].expand(4, -1, -1, -1), masks[:1].expand(4, -1, -1, -1))
    forward, backward = enrol(model, pictures, masks), enrol(model, pictures.flip(0), masks.flip(0))
    for name in one:
        torch.testing.assert_close(same[name], one[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_mask_decides_what_is_enrolled() -> None:
    model = small()
    pictures, masks = supports(1)
    first, other = enrol(model, pictures, masks), enrol(model, pictures, 1 - masks)
    assert all((first[name] - other[name]).abs().max() > 1e-3 for name in first)


@torch.no_grad()
def test_soft_mask_at_tokens_is_the_area_share() -> None:
    mask = torch.zeros(1, 1, 28, 28)
    mask[..., :7, :] = 1
    assert torch.equal(mask_to_tokens(mask, 14), torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]))


@torch.no_grad()
def test_stages_equal_the_network_and_a_query_ignores_the_number_of_shots() -> None:
    model = small()
    modules = stages(model)
    pictures, masks = supports(5)
    tokens, embedding = modules["encoder"](pictures)
    want_tokens, want_embedding = model.encode(pictures)
    torch.testing.assert_close(tokens, want_tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedding, want_embedding, rtol=1e-4, atol=1e-4)
    state = [tensor.mean(0, keepdim=True) for tensor in modules["enroll"](tokens, masks)]
    declared = specs(model.config)["segment"]
    assert [list(tensor.shape[1:]) for tensor in state] == [list(spec.shape[1:]) for spec in declared.inputs[2:]]
    mask, prior = modules["segment"](tokens[:1], embedding[:1], *state)
    want_mask, want_prior = model.segment(want_tokens[:1], want_embedding[:1], enrol(model, pictures, masks))
    torch.testing.assert_close(mask, want_mask, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prior, want_prior, rtol=1e-4, atol=1e-4)


def loss_of(model: FSDino, truth: torch.Tensor) -> torch.Tensor:
    pictures, masks = supports(1)
    tokens, embedding = model.encode(pictures)
    mask, prior = model.segment(tokens, embedding, enrol(model, pictures, masks))
    target = F.interpolate(truth, size=mask.shape[-2:], mode="area")
    return sum(F.binary_cross_entropy_with_logits(logits, target) for logits in (mask, prior))  # type: ignore[return-value]


@pytest.mark.parametrize("train_adapter", [False, True])
def test_gradients_stay_where_the_paper_puts_them(train_adapter: bool) -> None:
    model = small(train_adapter=train_adapter)
    model.freeze()
    loss_of(model, supports(1)[1]).backward()
    touched = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {"svp", "correlation", "dense_prompt", "position", "decoder"}
    assert touched == expected | ({"adapter"} if train_adapter else set())


def test_the_segmenter_learns_one_episode() -> None:
    model = small()
    model.freeze()
    model.train()
    truth = supports(1)[1]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        loss = loss_of(model, truth)
        loss.backward()
        optimiser.step()
    pictures, masks = supports(1)
    with torch.no_grad():
        tokens, embedding = model.encode(pictures)
        found = model.segment(tokens, embedding, enrol(model, pictures, masks))[0] > 0
    target = F.interpolate(truth, size=found.shape[-2:], mode="area") > 0.5
    assert (found & target).sum() / (found | target).sum() > 0.9


def test_half_precision_stages_keep_float32_borders() -> None:
    model = small()
    half = stages(model, torch.float16)
    pictures, masks = supports(1)
    with torch.no_grad():
        tokens, embedding = half["encoder"](pictures)
        state = half["enroll"](tokens, masks)
        outputs = half["segment"](tokens, embedding, *state)
    assert {tensor.dtype for tensor in (tokens, embedding, *state, *outputs)} == {torch.float32}
    assert next(half["encoder"].parameters()).dtype == torch.float16
    assert next(model.parameters()).dtype == torch.float32  # the network itself is untouched


def test_configuration_round_trip_and_bad_values() -> None:
    config = dataclasses.replace(SMALL, svp="mlp", geometry="letterbox")
    assert FSDinoConfig.from_dict(copy.deepcopy(config.to_dict())) == config
    with pytest.raises(InputError, match="image size 100"):
        dataclasses.replace(SMALL, image_size=100)
    with pytest.raises(InputError, match="svp"):
        dataclasses.replace(SMALL, svp="other")
    with pytest.raises(InputError, match="tap_block"):
        dataclasses.replace(SMALL, tap_block=9)
