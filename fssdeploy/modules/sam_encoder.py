"""SAM's image encoder: a plain vision transformer with windows, relative positions and a convolutional neck.

Source: Kirillov et al., "Segment Anything" (2023), appendix A; the backbone is ViTDet (Li et al., 2022), the relative
positions are those of MViTv2 (Li et al., 2022). Parameters carry the official names, so that the part of an official
checkpoint under ``image_encoder.`` loads with ``strict=True``.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.layer_norm2d import LayerNorm2d
from fssdeploy.modules.sam_decoder import MlpBlock


class ImageEncoder(nn.Module):
    """Normalised pictures (B, 3, S, S) -> embedding (B, out, g, g) with g = S / patch.

    Blocks attend within windows of `window` x `window` patches, except those in `global_blocks`, which attend to the
    whole picture; with window 0 every block does.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        window: int,
        global_blocks: Collection[int],
        out: int,
    ) -> None:
        super().__init__()
        grid = image_size // patch
        self.patch_embed = PatchEmbed(dim, patch)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid, grid, dim), std=0.02))
        self.blocks = nn.ModuleList(
            Block(dim, heads, int(dim * mlp_ratio), grid, 0 if index in global_blocks else window)
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pictures) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, channels last: (B, 3, H, W) -> (B, H/patch, W/patch, C)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.proj(pictures).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block on (B, H, W, C); `window` 0 means attention over the whole grid."""

    def __init__(self, dim: int, heads: int, hidden: int, grid: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MlpBlock(dim, hidden, F.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape[1:3]
        attended = self.norm1(x)
        if self.window:
            attended = self.attn(cut_windows(attended, self.window))
            attended = join_windows(attended, rows, columns)
        else:
            attended = self.attn(attended)
        x = x + attended
        return x + self.mlp(self.norm2(x))


def cut_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """(B, H, W, C) -> (B * windows, window, window, C), windows row by row.

    Windows that reach beyond the grid are filled with zeros, and these take part in attention, as in the original.
    """
    rows, columns = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -columns % window, 0, -rows % window))
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.transpose(2, 3).flatten(0, 2)


def join_windows(windows: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `cut_windows` for a grid of `rows` x `columns`: what was filled in is dropped."""
    window = windows.shape[1]
    down, across = -(-rows // window), -(-columns // window)
    x = windows.unflatten(0, (-1, down, across)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


class SelfAttention(nn.Module):
    """Attention over a grid, with a bias that depends on the query and on its distance to the key in rows and columns.

    `side` is the side of the grid that the tables of relative positions are made for.
    """

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._position_bias(q.unflatten(2, x.shape[1:3]))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))

    def _position_bias(self, q: torch.Tensor) -> torch.Tensor:
        """Queries (B, heads, H, W, d) -> what is added to their scaled scores, (B, heads, H*W, H*W)."""
        rows, columns = q.shape[2:4]
        by_row = q @ relative_codes(self.rel_pos_h, rows).transpose(1, 2)
        by_column = (q.transpose(2, 3) @ relative_codes(self.rel_pos_w, columns).transpose(1, 2)).transpose(2, 3)
        return (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(4).flatten(2, 3)


def relative_codes(table: torch.Tensor, size: int) -> torch.Tensor:
    """Code of the distance from every query to every key along one axis: (size, size, d).

    Row i of `table` (2 * side - 1, d) stands for the distance i - (side - 1). A table made for another side is
    resampled linearly.
    """
    count = 2 * size - 1
    if table.shape[0] != count:
        table = F.interpolate(table.t().unsqueeze(0), size=count, mode="linear")[0].t()
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index + size - 1]
