"""Our decoder side of SAM against the segment-anything package, on the same random weights."""

from __future__ import annotations

import pytest
import torch

from fssdeploy.modules.sam_decoder import FourierPosition, MaskDecoder, mask_downscaling
from tests.third_party import import_segment_anything


@pytest.fixture
def reference() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Mask decoder and prompt encoder of SAM ViT-H, randomly filled."""
    modeling = import_segment_anything()
    torch.manual_seed(3)
    decoder = modeling.MaskDecoder(
        transformer_dim=256,
        transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    prompts = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(9, 9), input_image_size=(126, 126), mask_in_chans=16
    )
    return decoder.eval(), prompts.eval()


@torch.no_grad()
def test_decoder_equals_the_original(reference: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    theirs, prompts = reference
    ours = MaskDecoder().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    embedding, dense, sparse = torch.randn(1, 256, 9, 9), torch.randn(1, 256, 9, 9), torch.randn(1, 1, 256)
    expected, _ = theirs.predict_masks(
        image_embeddings=embedding,
        image_pe=prompts.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    position = prompts.get_dense_pe().flatten(2).transpose(1, 2)
    got = ours(embedding, position, sparse, dense)
    torch.testing.assert_close(got, expected[:, :1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_position_code_and_mask_downscaling_equal_the_original(
    reference: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    _, prompts = reference
    position = FourierPosition(256)
    position.load_state_dict(prompts.pe_layer.state_dict(), strict=True)
    torch.testing.assert_close(position(9, 9), prompts.get_dense_pe().flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    down = mask_downscaling(256)
    down.load_state_dict(prompts.mask_downscaling.state_dict(), strict=True)
    logits = torch.randn(2, 1, 36, 36) * 5
    torch.testing.assert_close(down(logits), prompts._embed_masks(logits), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_rows_do_not_mix() -> None:
    torch.manual_seed(0)
    decoder = MaskDecoder(32, 4, 64, iou_hidden=32).eval()
    embedding, dense, sparse = torch.randn(3, 32, 4, 4), torch.randn(3, 32, 4, 4), torch.randn(3, 1, 32)
    position = torch.randn(1, 16, 32)
    together = decoder(embedding, position, sparse, dense)
    apart = torch.cat([decoder(embedding[i : i + 1], position, sparse[i : i + 1], dense[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
