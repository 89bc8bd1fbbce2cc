"""SAM as a whole against the segment-anything package, and our small SAM as a source of weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fssdeploy.modules.sam import PRESETS, Sam, SamConfig
from fssdeploy.systems import fsdino
from fssdeploy.weights.fsdino import fill
from tests.third_party import import_segment_anything

# A grid of 9 that windows of 4 do not divide.
SMALL = SamConfig(
    24, 3, 3, (1,), image_size=72, patch=8, window=4, out=32, decoder_heads=4, decoder_mlp=48, iou_hidden=40
)
BATCH, SETS = 2, 3


def original(config: SamConfig) -> Any:
    """The package's own network of these sizes."""
    modeling = import_segment_anything()
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=config.image_size,
            patch_size=config.patch,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=config.out,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window,
            global_attn_indexes=config.global_blocks,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=config.out,
            image_embedding_size=(config.grid, config.grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=config.out, mlp_dim=config.decoder_mlp, num_heads=config.decoder_heads
            ),
            transformer_dim=config.out,
            iou_head_depth=3,
            iou_head_hidden_dim=config.iou_hidden,
        ),
    ).eval()


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Sam]:
    """The original and ours with the same random weights, position tables included."""
    torch.manual_seed(13)
    theirs = original(SMALL)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(0, 0.5)
    ours = Sam(SMALL).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    size, side = SMALL.image_size, 4 * SMALL.grid
    corners = torch.rand(BATCH, SETS, 2, 2, generator=generator) * size
    return {
        "points": torch.rand(BATCH, SETS, 4, 2, generator=generator) * size,
        "labels": torch.randint(-1, 2, (BATCH, SETS, 4), generator=generator),
        "boxes": torch.cat([corners.amin(2), corners.amax(2)], 2),
        "masks": torch.randn(BATCH, SETS, 1, side, side, generator=generator) * 5,
    }


@torch.no_grad()
def test_encode_equals_the_original_with_its_normalisation(networks: tuple[Any, Sam]) -> None:
    theirs, ours = networks
    pictures = torch.randint(0, 256, (BATCH, 3, SMALL.image_size, SMALL.image_size), dtype=torch.uint8)
    expected = theirs.image_encoder(theirs.preprocess(pictures))
    torch.testing.assert_close(ours.encode(pictures), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.encode(pictures.float()), expected, rtol=1e-4, atol=1e-5)


def test_encode_refuses_pictures_of_another_size(networks: tuple[Any, Sam]) -> None:
    for shape in ((1, 3, 64, 64), (1, 3, SMALL.patch, SMALL.patch), (1, 1, SMALL.image_size, SMALL.image_size)):
        with pytest.raises(ValueError, match="this network takes"):
            networks[1].encode(torch.zeros(shape))


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        ("points", "labels"),
        ("points", "labels", "boxes"),
        ("boxes",),
        ("masks",),
        ("points", "labels", "masks"),
        ("points", "labels", "boxes", "masks"),
        (),
    ],
    ids="+".join,
)
@torch.no_grad()
def test_decode_equals_the_original_picture_by_picture(
    networks: tuple[Any, Sam], prompts: dict[str, torch.Tensor], given: tuple[str, ...], multimask: bool
) -> None:
    theirs, ours = networks
    torch.manual_seed(8)
    embedding = torch.randn(BATCH, SMALL.out, SMALL.grid, SMALL.grid)
    logits, iou = ours.decode(embedding, **{name: prompts[name] for name in given}, multimask=multimask)
    side = 4 * SMALL.grid
    assert logits.shape == (BATCH, SETS if given else 1, 3 if multimask else 1, side, side)
    assert iou.shape == logits.shape[:3]
    for index in range(BATCH):
        chosen = {name: prompts[name][index] for name in given}
        points = (chosen["points"], chosen["labels"]) if "points" in given else None
        sparse, dense = theirs.prompt_encoder(points, chosen.get("boxes"), chosen.get("masks"))
        expected_logits, expected_iou = theirs.mask_decoder(
            image_embeddings=embedding[index : index + 1],
            image_pe=theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        torch.testing.assert_close(logits[index], expected_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(iou[index], expected_iou, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_exported_form_of_the_decoder_is_the_first_of_all_masks(networks: tuple[Any, Sam]) -> None:
    decoder, grid, dim = networks[1].mask_decoder, SMALL.grid, SMALL.out
    torch.manual_seed(9)
    embedding, dense = torch.randn(2, dim, grid, grid), torch.randn(2, dim, grid, grid)
    position, sparse = torch.randn(1, grid * grid, dim), torch.randn(2, 3, dim)
    logits, _ = decoder.predict(embedding, position, sparse, dense)
    torch.testing.assert_close(decoder(embedding, position, sparse, dense), logits[:, :1], rtol=1e-4, atol=1e-5)


def test_a_step_of_training_reaches_every_parameter(prompts: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    sam = Sam(SMALL).train()
    embedding = sam.encode(torch.randint(0, 256, (BATCH, 3, SMALL.image_size, SMALL.image_size)))
    labels = torch.tensor([0, 1, -1, 1]).expand(BATCH, SETS, -1)
    loss = torch.zeros(())
    for multimask, given in ((False, {"boxes": prompts["boxes"]}), (True, {"masks": prompts["masks"]})):
        logits, iou = sam.decode(embedding, prompts["points"], labels, **given, multimask=multimask)
        truth = torch.zeros_like(logits)
        truth[..., :18, :9] = 1
        loss = loss + F.binary_cross_entropy_with_logits(logits, truth) + F.mse_loss(iou, torch.ones_like(iou))
    loss.backward()
    trained = {name: parameter for name, parameter in sam.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(list(sam.parameters())) - 1  # the random matrix of the position code
    unreached = [name for name, p in trained.items() if p.grad is None or p.grad.abs().max() == 0]
    assert unreached == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values() if parameter.grad is not None)


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_released_sizes_have_the_names_and_shapes_of_the_original(name: str) -> None:
    import_segment_anything()
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        theirs, ours = sam_model_registry[name]().state_dict(), Sam(PRESETS[name]).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


def test_tiny_loads_into_the_original_and_fills_the_tiny_preset_of_fsdino(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sam = Sam(PRESETS["tiny"])
    original(PRESETS["tiny"]).load_state_dict(sam.state_dict(), strict=True)
    path = tmp_path / "sam_tiny.safetensors"
    save_file(sam.state_dict(), path)
    model = fsdino.build(fsdino.PRESETS["tiny"])
    provenance = fill(model, [path], untrained_seed=0)
    assert [(source["family"], source["groups"]) for source in provenance.sources] == [
        ("sam tiny", ["decoder", "dense_prompt", "position"])
    ]
    assert provenance.untrained_groups == ["encoder", "adapter", "svp", "correlation"]
    for group, source in (
        (model.decoder, sam.mask_decoder),
        (model.dense_prompt, sam.prompt_encoder.mask_downscaling),
        (model.position, sam.prompt_encoder.pe_layer),
    ):
        expected = source.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in group.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.position.parameters())
