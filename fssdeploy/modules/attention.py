"""Multi-head attention as one operation, so that every target can have the form it runs best."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Name of the node that stands for attention in a freshly traced graph; export/attention.py rewrites every one of them.
ONNX_OPERATOR = "fssdeploy::Attention"


def multihead_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention with scale head_dim^-0.5.

    q (B, N, C), k and v (B, M, C), C divisible by `heads`; returns (B, N, C).
    While tracing for ONNX it is a single opaque node: what torch would decompose it into scales q and k separately and
    defeats the fusion of ONNX Runtime.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            ONNX_OPERATOR,
            (q, k, v),
            attrs={"num_heads": heads, "scale": (q.shape[-1] // heads) ** -0.5},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
    out = F.scaled_dot_product_attention(_split(q, heads), _split(k, heads), _split(v, heads))
    return out.transpose(1, 2).flatten(2)


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    batch, count, width = x.shape
    return x.view(batch, count, heads, width // heads).transpose(1, 2)
