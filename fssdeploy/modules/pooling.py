"""Masks at token resolution, masked means and the prototype's cosine prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mask_to_tokens(mask: torch.Tensor, patch: int) -> torch.Tensor:
    """Soft mask (B, 1, H, W) -> its area share in every patch, (B, 1, H/patch * W/patch)."""
    return F.avg_pool2d(mask, patch).flatten(2)


def masked_mean(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of tokens (B, N, C) under weights (B, 1, N): (B, C) in float32; a zero mask gives zeros."""
    weight = weight.float()
    return (weight @ tokens.float()).squeeze(1) / weight.sum(-1).clamp_min(1e-6)


def cosine_prior(tokens: torch.Tensor, prototype: torch.Tensor) -> torch.Tensor:
    """Cosine of tokens (B, N, C) with prototypes (B, C): (B, N) in [-1, 1], float32 (FS-DINO, eq. 2)."""
    return (_unit(tokens.float()) @ _unit(prototype.float()).unsqueeze(2)).squeeze(2)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, in the dtype of x; computed in float32."""
    return _unit(x.float()).to(x.dtype)


def _unit(x: torch.Tensor) -> torch.Tensor:
    # A floor, not "+ 1e-12": the exporter's optimiser takes so small a summand for zero and drops it, and a zero vector
    # would become NaN.
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True).clamp_min(1e-12))
