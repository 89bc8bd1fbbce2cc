"""The plain form of SAM's decoder computes what ours does."""

from __future__ import annotations

import torch

from fssdeploy.benchmarks.baselines.sam_decoder import decode
from fssdeploy.modules.sam import Sam, SamConfig

SMALL = SamConfig(
    32, 2, 2, (1,), image_size=64, patch=8, window=3, out=32, decoder_heads=2, decoder_mlp=48, iou_hidden=24,
    mask_channels=4,
)  # fmt: skip


@torch.no_grad()
def test_plain_and_folded_decoder_agree() -> None:
    torch.manual_seed(0)
    sam = Sam(SMALL).eval()
    for parameter in sam.mask_decoder.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    embedding, points = torch.randn(1, 32, 8, 8), torch.rand(5, 2, 2) * 64
    labels = torch.tensor([[1, 0]]).expand(5, -1)
    expected, _ = sam.decode(embedding, points[None], labels[None], multimask=None)
    torch.testing.assert_close(decode(sam, embedding, points, labels), expected[0], rtol=1e-4, atol=1e-4)
