"""FS-DINO's bottleneck adapter: early DINOv2 tokens to an image embedding in SAM's space (paper, section 3.3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.attention import multihead_attention
from fssdeploy.modules.layer_norm2d import LayerNorm2d


class BottleneckAdapter(nn.Module):
    """1x1, 3x3 and 1x1 convolutions down to the bottleneck, two self-attention blocks, one 1x1 convolution up.

    Norms and activations are not in the paper: docs/fsdino.md, choices 9 and 10.
    """

    def __init__(
        self,
        in_dim: int,
        middle: int,
        bottleneck: int,
        ffn: int,
        out_dim: int,
        *,
        heads: int = 1,
        order: str = "pre",
        norm: str = "layer",
        activation: str = "gelu",
    ) -> None:
        super().__init__()

        def normalise(channels: int) -> nn.Module:
            return LayerNorm2d(channels) if norm == "layer" else nn.Identity()

        def activate() -> nn.Module:
            return nn.GELU() if activation == "gelu" else nn.ReLU()

        self.down = nn.Sequential(
            nn.Conv2d(in_dim, middle, 1),
            normalise(middle),
            activate(),
            nn.Conv2d(middle, middle, 3, padding=1),
            normalise(middle),
            activate(),
            nn.Conv2d(middle, bottleneck, 1),
            normalise(bottleneck),
        )
        self.blocks = nn.Sequential(*(AdapterBlock(bottleneck, ffn, heads, order) for _ in range(2)))
        self.up = nn.Conv2d(bottleneck, out_dim, 1)

    def forward(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """tokens (B, rows*columns, in_dim) -> embedding (B, out_dim, rows, columns)."""
        x = self.down(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        x = self.blocks(x.flatten(2).transpose(1, 2))
        return self.up(x.transpose(1, 2).unflatten(2, (rows, columns)))


class AdapterBlock(nn.Module):
    """Self-attention and a ReLU feed-forward network after Vaswani et al. (2017); norm before or after each branch."""

    def __init__(self, dim: int, ffn: int, heads: int, order: str) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.lin1 = nn.Linear(dim, ffn)
        self.lin2 = nn.Linear(ffn, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order == "pre":
            x = x + self._attend(self.norm1(x))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        return self.norm2(x + self._feed(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(multihead_attention(self.q(x), self.k(x), self.v(x), self.heads))

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.relu(self.lin1(x)))
