"""Multi-head attention as one operation, so that every target can have the form it runs best."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Name of the node that stands for attention in a freshly traced graph; export/attention.py rewrites every one of them.
ONNX_OPERATOR = "fssdeploy::Attention"


def multihead_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention with scale head_dim^-0.5.

    q (B, N, C), k and v (B, M, C), C divisible by `heads`; returns (B, N, C). Either side may have batch 1 and then
    serves every row of the other. `bias`, which broadcasts to (B, heads, N, M), is added to the scaled scores.
    While tracing for ONNX it is a single opaque node: what torch would decompose it into scales q and k separately and
    defeats the fusion of ONNX Runtime. With a bias it is plain MatMul and Softmax.
    """
    exporting = torch.onnx.is_in_onnx_export()
    if exporting and bias is None:
        batch = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        return torch.onnx.ops.symbolic(
            ONNX_OPERATOR,
            (q, k, v),
            attrs={"num_heads": heads, "scale": (q.shape[-1] // heads) ** -0.5},
            dtype=q.dtype,
            shape=(batch, *q.shape[1:]),
            version=1,
        )
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    if exporting and bias is not None:
        out = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3) + bias).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    return join_heads(out)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    batch, count, width = x.shape
    return x.view(batch, count, heads, width // heads).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, C / heads) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)
