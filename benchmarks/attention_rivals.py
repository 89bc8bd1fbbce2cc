"""Calibrated attention without our kernels, and attention without calibration, as one would write them with PyTorch.

All take query (B, N, D), keys (B, S, D), values (B, S, V), calibration (B, Cn) and calibrate the keys from `start` on
by the range of every row, as fssdeploy.kernels.scma.calibrated_attention with span="row" does.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

EPSILON = 1e-7


def row_range(
    query: torch.Tensor, keys: torch.Tensor, start: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the calibrated keys (B, N, Cn), their minimum by row (B, N, 1) and 1 / (maximum - minimum)."""
    logits = query @ keys[:, start : start + count].transpose(1, 2) * query.shape[-1] ** -0.5
    low, high = logits.amin(2, keepdim=True), logits.amax(2, keepdim=True)
    return logits, low, 1 / (high - low + EPSILON)


def with_flex_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    *,
    start: int,
    strength: float,
) -> torch.Tensor:
    """flex_attention with the range of every row captured by `score_mod`; worth timing only when compiled."""
    count = calibration.shape[1]
    _, low, inverse = row_range(query, keys, start, count)
    low, inverse = low.squeeze(2), inverse.squeeze(2)

    def calibrate(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        column = torch.clamp(key - start, 0, count - 1)
        relative = (score - low[batch, row]) * inverse[batch, row]
        bias = strength * torch.clamp(relative + calibration[batch, column] - 1, max=0)
        return torch.where((key >= start) & (key < start + count), score + bias, score)

    attended = flex_attention(query[:, None], keys[:, None], values[:, None], score_mod=calibrate)
    assert isinstance(attended, torch.Tensor)
    return attended[:, 0]


def with_materialised_bias(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    *,
    start: int,
    strength: float,
) -> torch.Tensor:
    """scaled_dot_product_attention with the bias (B, N, S) as its mask."""
    logits, low, inverse = row_range(query, keys, start, calibration.shape[1])
    bias = strength * torch.clamp((logits - low) * inverse + calibration[:, None] - 1, max=0)
    after = keys.shape[1] - start - calibration.shape[1]
    mask = F.pad(bias, (start, after)).to(query.dtype)
    return F.scaled_dot_product_attention(query[:, None], keys[:, None], values[:, None], attn_mask=mask[:, None])[:, 0]


def plain_attention(
    backend: SDPBackend,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
) -> torch.Tensor:
    """Attention without any bias by one backend: what the calibration is compared with, not a rival."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query[:, None], keys[:, None], values[:, None])[:, 0]


def wide_values(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, calibration: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The inputs with zero channels appended to the values: flash attention wants as many as queries have."""
    return query, keys, F.pad(values, (0, query.shape[-1] - values.shape[-1])), calibration


flash_attention = partial(plain_attention, SDPBackend.FLASH_ATTENTION)
efficient_attention = partial(plain_attention, SDPBackend.EFFICIENT_ATTENTION)
