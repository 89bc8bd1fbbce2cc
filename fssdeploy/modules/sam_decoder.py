"""SAM's mask decoder, mask down-scaling and Fourier position code, written to be exported.

Source: Kirillov et al., "Segment Anything" (2023). Parameters carry the official names. `MaskDecoder.forward` computes
one mask (token 0) per prompt set and nothing else, which is all that FS-DINO supervises and exports;
`MaskDecoder.predict` computes every mask and its predicted quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.attention import multihead_attention
from fssdeploy.modules.layer_norm2d import LayerNorm2d


class FourierPosition(nn.Module):
    """Random Fourier features of positions in the unit square; FS-DINO trains the matrix (section 3.4.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.positional_encoding_gaussian_matrix = nn.Parameter(torch.randn(2, dim // 2))

    def forward(self, rows: int, columns: int) -> torch.Tensor:
        """Codes of the cell centres, (1, rows*columns, dim), row by row."""
        matrix = self.positional_encoding_gaussian_matrix
        y = (torch.arange(rows, device=matrix.device, dtype=matrix.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=matrix.device, dtype=matrix.dtype) + 0.5) / columns
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        return self.at(points).unsqueeze(0)

    def at(self, points: torch.Tensor) -> torch.Tensor:
        """Codes of points (..., 2), each (x, y) in the unit square: (..., dim)."""
        angles = 2 * math.pi * ((2 * points - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], -1)


def mask_downscaling(dim: int) -> nn.Sequential:
    """A mask's logits (B, 1, 4g, 4g) -> dense prompt (B, dim, g, g), as in SAM's prompt encoder."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, stride=2),
        LayerNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 16, 2, stride=2),
        LayerNorm2d(16),
        nn.GELU(),
        nn.Conv2d(16, dim, 1),
    )


class MaskDecoder(nn.Module):
    """Two-way transformer between prompt tokens and the picture, then up-scaling and a per-mask dot product."""

    def __init__(self, dim: int = 256, heads: int = 8, mlp: int = 2048, masks: int = 4, iou_hidden: int = 256) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(dim, heads, mlp)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Perceptron(dim, dim, dim // 8) for _ in range(masks))
        self.iou_prediction_head = Perceptron(dim, iou_hidden, masks)

    def forward(
        self, embedding: torch.Tensor, position: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, 1, 4g, 4g) of mask token 0.

        embedding and dense (B, dim, g, g); position (1, g*g, dim); sparse (B, prompts, dim).
        """
        queries, upscaled = self._exchange(embedding, position, sparse, dense)
        weights = self.output_hypernetworks_mlps[0](queries[:, 1])
        return (weights.unsqueeze(1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])

    def predict(
        self, embedding: torch.Tensor, position: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, masks, 4g, 4g) of every mask token and predicted IoU (B, masks) of each with the truth.

        Token 0 is for prompts that leave no doubt, the others for parts, wholes and what lies between.
        The shapes of the arguments are those of `forward`.
        """
        queries, upscaled = self._exchange(embedding, position, sparse, dense)
        weights = torch.stack([mlp(queries[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return logits, self.iou_prediction_head(queries[:, 0])

    def _exchange(
        self, embedding: torch.Tensor, position: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, 1 + masks + prompts, dim) and up-scaled picture (B, dim/8, 4g, 4g) after the transformer."""
        batch, _, rows, columns = embedding.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).unsqueeze(0).expand(batch, -1, -1)
        picture = (embedding + dense).flatten(2).transpose(1, 2)
        queries, picture = self.transformer(picture, position, torch.cat([tokens, sparse], 1))
        return queries, self.output_upscaling(picture.transpose(1, 2).unflatten(2, (rows, columns)))


class TwoWayTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: int, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp, first=index == 0) for index in range(depth))
        self.final_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self, picture: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """picture (B, N, dim), position (1, N, dim), tokens (B, T, dim) -> tokens and picture after the exchange."""
        queries, keys = tokens, picture
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, position)
        attended = self.final_attn_token_to_image(queries + tokens, keys + position, keys)
        return self.norm_final_attn(queries + attended), keys


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to picture, feed-forward, picture to tokens; each with residual and norm."""

    def __init__(self, dim: int, heads: int, mlp: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, heads, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MlpBlock(dim, mlp)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, heads, dim // 2)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, query_code: torch.Tensor, key_code: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.first:
            # SAM's first block has neither position codes nor a residual here.
            queries = self.self_attn(queries, queries, queries)
        else:
            coded = queries + query_code
            queries = queries + self.self_attn(coded, coded, queries)
        queries = self.norm1(queries)
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_code, keys + key_code, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(keys + key_code, queries + query_code, queries))
        return queries, keys


class Attention(nn.Module):
    """Attention whose inner width may be smaller than its outer one."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.out_proj(multihead_attention(self.q_proj(q), self.k_proj(k), self.v_proj(v), self.heads))


class MlpBlock(nn.Module):
    """Two linear layers: with ReLU between them in the decoder, with GELU in the image encoder."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[torch.Tensor], torch.Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(self.activation(self.lin1(x)))


class Perceptron(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))
