"""SAM's mask decoder in its plain form: what `fssdeploy.modules.sam_decoder` computes with fewer operations.

Step by step as in Kirillov et al., "Segment Anything" (2023), appendix A: the picture is repeated for every prompt,
every attention projects both of its sides, transposed convolutions enlarge the picture, and all four masks are made.
"""

from __future__ import annotations

import torch

from fssdeploy.modules.sam import Sam
from fssdeploy.modules.sam_decoder import Attention, MaskDecoder, TwoWayBlock


def decode(sam: Sam, embedding: torch.Tensor, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, 4, 4g, 4g) of B prompts, points (B, P, 2) with labels (B, P), on one embedding (1, out, g, g)."""
    decoder: MaskDecoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder(points, labels, None, None)
    count = len(points)
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.unsqueeze(0).expand(count, -1, -1), sparse], 1)
    picture = (embedding.repeat_interleave(count, 0) + dense).flatten(2).transpose(1, 2)
    position = sam.prompt_encoder.position().repeat_interleave(count, 0)
    queries, keys = tokens, picture
    for layer in decoder.transformer.layers:
        queries, keys = _block(layer, queries, keys, tokens, position)  # type: ignore[arg-type]
    last = decoder.transformer.final_attn_token_to_image
    attended = _attend(last, queries + tokens, keys + position, keys)
    queries = decoder.transformer.norm_final_attn(queries + attended)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, tuple(embedding.shape[-2:])))
    weights = torch.stack([mlp(queries[:, 1 + n]) for n, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    return (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])


def _block(
    layer: TwoWayBlock, queries: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if layer.first:
        queries = _attend(layer.self_attn, queries, queries, queries)
    else:
        coded = queries + tokens
        queries = queries + _attend(layer.self_attn, coded, coded, queries)
    queries = layer.norm1(queries)
    attended = _attend(layer.cross_attn_token_to_image, queries + tokens, keys + position, keys)
    queries = layer.norm2(queries + attended)
    queries = layer.norm3(queries + layer.mlp(queries))
    attended = _attend(layer.cross_attn_image_to_token, keys + position, queries + tokens, queries)
    return queries, layer.norm4(keys + attended)


def _attend(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads = attention.heads
    q, k, v = (
        project(x).unflatten(2, (heads, -1)).transpose(1, 2)
        for project, x in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    )
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
