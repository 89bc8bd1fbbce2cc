"""Start values for transformers that train from scratch on little data."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from fssdeploy.modules.dinov2 import DinoVisionTransformer


def initialise(network: nn.Module) -> None:
    """Truncated normal by fan-in; small embeddings; LayerScale 1 (DINOv2's 1e-5 needs far longer runs)."""
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
        elif "rel_pos" in name:
            nn.init.zeros_(parameter)
        elif "embed" in name or "token" in name:
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=parameter[0].numel() ** -0.5)


@torch.no_grad()
def mimetic(encoder: DinoVisionTransformer) -> None:
    """Attention that begins near the identity, over sinusoidal positions: every patch looks at its neighbourhood.

    Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023): W_q W_k^T is near
    0.7 Z + 0.7 I and W_v W_proj near 0.4 Z - 0.4 I, with Z random.
    """
    dim, heads, table = encoder.config.dim, encoder.config.heads, encoder.config.table
    encoder.pos_embed[0, -table * table :] = 0.5 * _sinusoids(table, dim)
    width = dim // heads
    for block in encoder.blocks:
        qkv, proj = (cast(torch.Tensor, each.weight) for each in (block.attn.qkv, block.attn.proj))  # type: ignore[union-attr]
        for head in range(heads):
            left, right = _factors(0.7, 0.7, dim)
            qkv[head * width : (head + 1) * width] = left[:, :width].T
            qkv[dim + head * width : dim + (head + 1) * width] = right[:, :width].T
        left, right = _factors(0.4, -0.4, dim)
        qkv[2 * dim :] = right.T
        proj.copy_(left)


def _factors(noise: float, identity: float, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R (dim, dim) with L R^T = noise * Z + identity * I, the largest directions first."""
    product = noise * torch.randn(dim, dim) / dim**0.5 + identity * torch.eye(dim)
    u, s, v = torch.linalg.svd(product)
    return u * s.sqrt(), v.T * s.sqrt()


def _sinusoids(side: int, dim: int) -> torch.Tensor:
    """Sine and cosine of both coordinates at dim / 4 frequencies, (side * side, dim)."""
    frequencies = 100 ** -(torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    x, y = columns.flatten()[:, None] * frequencies, rows.flatten()[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
