"""Our ViT against timm's, and its own promises."""

from __future__ import annotations

import copy

import pytest
import torch

from fssdeploy.modules.dinov2 import DinoVisionTransformer, ViTConfig
from tests.third_party import import_timm


def lively(config: ViTConfig, seed: int) -> DinoVisionTransformer:
    torch.manual_seed(seed)
    encoder = DinoVisionTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("pos_embed", "cls_token", "register_tokens")):
                parameter.normal_(0, 0.5)
            elif name.endswith("gamma"):
                parameter.uniform_(0.2, 0.8)
    return encoder


@pytest.mark.parametrize("seed", [0, 7])
@torch.no_grad()
def test_equals_timm_at_518(seed: int) -> None:
    timm = import_timm()
    # Width and depth are cut, so that the test is quick; picture, patches and table are those of ViT-B/14 at 518.
    config = ViTConfig(96, 3, 3)
    ours = lively(config, seed)
    theirs = timm.create_model(
        "vit_base_patch14_dinov2", pretrained=False, embed_dim=96, depth=3, num_heads=3, img_size=518
    ).eval()
    state = {name: tensor for name, tensor in ours.state_dict().items() if name != "mask_token"}
    theirs.load_state_dict(state, strict=True)
    picture = torch.randn(1, 3, 518, 518)
    expected = theirs.forward_features(picture)
    got = ours.norm(ours.streams(ours.embed(picture))[-1])
    assert (got - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_folded_layer_scale_is_the_same_function() -> None:
    encoder = lively(ViTConfig(64, 3, 2, table=5), 1)
    picture = torch.randn(2, 3, 70, 70)
    expected = encoder(picture, 1)
    folded = copy.deepcopy(encoder)
    folded.fold_layer_scale()
    for got, want in zip(folded(picture, 1), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not any("gamma" in name for name in folded.state_dict())


@torch.no_grad()
def test_a_table_computed_beforehand_changes_nothing() -> None:
    encoder = lively(ViTConfig(64, 2, 2, table=5), 2)
    picture = torch.randn(1, 3, 56, 84)
    table = encoder.position_table(4, 6)
    for got, want in zip(encoder(picture, 0, table=table), encoder(picture, 0), strict=True):
        assert torch.equal(got, want)
