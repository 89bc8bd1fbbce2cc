"""DINOv2's vision transformer, written to be exported.

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023), and its released networks.
Parameters carry the official names, so that an official checkpoint loads with ``strict=True``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.attention import multihead_attention

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a DINOv2 network.

    `table` is the side of the stored position table in patches: (rows, columns). How it is resampled to other grids
    differs between the released networks: those without registers use `interpolate_offset` 0.1 and no antialiasing,
    those with registers antialiasing and no offset, Hugging Face's port of the former neither.
    """

    dim: int
    depth: int
    heads: int
    patch: int = 14
    table: int = 37
    mlp_ratio: float = 4.0
    ffn: str = "mlp"  # or "swiglu", as in ViT-g
    registers: int = 0
    interpolate_antialias: bool = False
    interpolate_offset: float = 0.1

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward network."""
        hidden = int(self.dim * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.ffn == "swiglu" else hidden


RELEASED = {
    "vits14": ViTConfig(384, 12, 6),
    "vitb14": ViTConfig(768, 12, 12),
    "vitl14": ViTConfig(1024, 24, 16),
    "vitg14": ViTConfig(1536, 40, 24, ffn="swiglu"),
}


def resample_position_table(
    table: torch.Tensor, rows: int, columns: int, *, antialias: bool, offset: float
) -> torch.Tensor:
    """Position table (1, 1 + M*M, C) for a grid of `rows` x `columns`: (1, 1 + rows*columns, C).

    Row 0 belongs to the class token and stays. With an offset, the official code gives the resampler scale factors
    (rows + offset) / M instead of a size, and these also set the sampling positions.
    """
    count = table.shape[1] - 1
    if count == rows * columns and rows == columns:
        return table
    side = round(count**0.5)
    grid = table[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = ((rows + offset) / side, (columns + offset) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=antialias)
    if grid.shape[-2:] != (rows, columns):
        raise ValueError(f"resampling the position table gave {tuple(grid.shape[-2:])}, not {(rows, columns)}")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)


class DinoVisionTransformer(nn.Module):
    """The encoder: normalised pictures in, tokens of any block out."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # in every checkpoint, unused at inference
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.table**2, dim))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.patch_embed = PatchEmbed(dim, config.patch)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches: the class token and the registers."""
        return 1 + self.config.registers

    def position_table(self, rows: int, columns: int) -> torch.Tensor:
        """Position codes (1, 1 + rows*columns, C) under this network's own resampling rule."""
        config = self.config
        return resample_position_table(
            self.pos_embed, rows, columns, antialias=config.interpolate_antialias, offset=config.interpolate_offset
        )

    def embed(self, pictures: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens entering block 0, (B, prefix + patches, C), from normalised pictures (B, 3, H, W).

        `table` is a position table computed beforehand for this grid; without it, it is resampled here.
        Registers are inserted after the position codes are added and get none.
        """
        patches = self.patch_embed(pictures)
        if table is None:
            table = self.position_table(
                pictures.shape[-2] // self.config.patch, pictures.shape[-1] // self.config.patch
            )
        batch = patches.shape[0]
        tokens = [(self.cls_token + table[:, :1]).expand(batch, -1, -1)]
        if self.config.registers:
            tokens.append(self.register_tokens.expand(batch, -1, -1))
        return torch.cat([*tokens, patches + table[:, 1:]], 1)

    def streams(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """The residual stream after each block, without the final norm: depth x (B, prefix + patches, C)."""
        streams = []
        for block in self.blocks:
            tokens = block(tokens)
            streams.append(tokens)
        return streams

    def forward(
        self, pictures: torch.Tensor, tap: int, *, tap_norm: bool = True, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens of block index `tap` and of the last block, each (B, patches, C).

        The last ones carry the final norm (the official ``x_norm_patchtokens``), those of `tap` if `tap_norm`.
        """
        streams = self.streams(self.embed(pictures, table))
        middle, last = streams[tap][:, self.prefix :], streams[-1][:, self.prefix :]
        return self.norm(middle) if tap_norm else middle, self.norm(last)

    @torch.no_grad()
    def fold_layer_scale(self) -> None:
        """Multiply every LayerScale into the linear layer before it (equal to 1e-6, one node less each).

        For exported copies only: the network no longer has the official parameters afterwards.
        """
        for block in self.blocks:
            block.fold_layer_scale()  # type: ignore[operator]


class PatchEmbed(nn.Module):
    """Non-overlapping patches, row by row: (B, 3, H, W) -> (B, H*W/patch^2, C)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.proj(pictures).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale on both branches."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = SelfAttention(config.dim, config.heads)
        self.ls1: nn.Module = LayerScale(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp: Mlp | SwiGLU = (SwiGLU if config.ffn == "swiglu" else Mlp)(config.dim, config.hidden)
        self.ls2: nn.Module = LayerScale(config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def fold_layer_scale(self) -> None:
        for scale, linear in ((self.ls1, self.attn.proj), (self.ls2, self.mlp.out)):
            if isinstance(scale, LayerScale):
                linear.weight.mul_(scale.gamma[:, None])
                linear.bias.mul_(scale.gamma)
        self.ls1 = self.ls2 = nn.Identity()


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(multihead_attention(q, k, v, self.heads))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    @property
    def out(self) -> nn.Linear:
        return self.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward network; the first half of `w12` gates."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    @property
    def out(self) -> nn.Linear:
        return self.w3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma
