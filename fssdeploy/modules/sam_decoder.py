"""SAM's mask decoder, mask down-scaling and Fourier position code, written to be exported.

Source: Kirillov et al., "Segment Anything" (2023). Parameters carry the official names. `MaskDecoder.forward` computes
one mask (token 0) per prompt set and nothing else, which is all that FS-DINO supervises and exports;
`MaskDecoder.predict` computes every mask and its predicted quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.attention import join_heads, multihead_attention, split_heads
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


def mask_downscaling(dim: int, channels: int = 16) -> nn.Sequential:
    """A mask's logits (B, 1, 4g, 4g) -> dense prompt (B, dim, g, g), as in SAM's prompt encoder.

    `channels` is the width of the last hidden layer, four times that of the first.
    """
    return nn.Sequential(
        nn.Conv2d(1, channels // 4, 2, stride=2),
        LayerNorm2d(channels // 4),
        nn.GELU(),
        nn.Conv2d(channels // 4, channels, 2, stride=2),
        LayerNorm2d(channels),
        nn.GELU(),
        nn.Conv2d(channels, dim, 1),
    )


class Guidance(NamedTuple):
    """What PerSAM adds to the decoder (Zhang et al., "Personalize Segment Anything Model with One Shot", section 3.3).

    `attention_bias` (B, 1, 1, g*g) is added to the attention of the tokens to the picture, `token_offset` (B, 1, dim)
    to every token.
    """

    attention_bias: torch.Tensor
    token_offset: torch.Tensor


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
        queries, picture = self._exchange(embedding, position, sparse, dense)
        weights = self.output_hypernetworks_mlps[0](queries[:, 1])
        return self._masks(picture, weights.unsqueeze(1), embedding.shape[-2:])

    def predict(
        self,
        embedding: torch.Tensor,
        position: torch.Tensor,
        sparse: torch.Tensor,
        dense: torch.Tensor,
        *,
        absent: torch.Tensor | None = None,
        guidance: Guidance | None = None,
        wanted: slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, M, 4g, 4g) of the `wanted` mask tokens and predicted IoU (B, M) of each with the truth.

        Token 0 is for prompts that leave no doubt, the others for parts, wholes and what lies between.
        The shapes of the arguments are those of `forward`; embedding and dense may have batch 1 and then serve every
        prompt set. Prompts where `absent` (B, prompts) is true take no part, as if they had not been given.
        """
        queries, picture = self._exchange(embedding, position, sparse, dense, absent, guidance)
        heads = list(enumerate(self.output_hypernetworks_mlps, 1))[wanted]
        weights = torch.stack([mlp(queries[:, token]) for token, mlp in heads], 1)
        logits = self._masks(picture, weights, embedding.shape[-2:])
        return logits, self.iou_prediction_head(queries[:, 0])[:, wanted]

    def _exchange(
        self,
        embedding: torch.Tensor,
        position: torch.Tensor,
        sparse: torch.Tensor,
        dense: torch.Tensor,
        absent: torch.Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, 1 + masks + prompts, dim) and picture (B, g*g, dim) after the transformer."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.unsqueeze(0).expand(sparse.shape[0], -1, -1), sparse], 1)
        if embedding.shape[0] == dense.shape[0]:
            picture = (embedding + dense).flatten(2).transpose(1, 2).contiguous()  # else every sum copies it
        else:  # OpenVINO would make the sum a part of the convolution before it, which takes no row for several
            picture = (embedding.flatten(2).transpose(1, 2) + dense.flatten(2).transpose(1, 2)).contiguous()
        key_bias = None
        if absent is not None:
            # Of finite size, so that no score can become NaN; its exponential is zero all the same.
            left_out = torch.finfo(tokens.dtype).min * absent.to(tokens.dtype)
            key_bias = F.pad(left_out, (own.shape[0], 0))[:, None, None]
        return self.transformer(picture, position, tokens, key_bias, guidance)

    def _masks(self, picture: torch.Tensor, weights: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Logits (B, M, 4 rows, 4 columns): `output_upscaling` of a picture (B, rows * columns, dim), times `weights`
        (B, M, dim / 8).

        Transposed convolutions whose stride is their size see one cell each, so they are products with the channels
        last; only the finished masks are laid out as pictures.
        """
        first, norm, activation, second, _ = cast(
            tuple[nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU], tuple(self.output_upscaling)
        )
        quarters = activation(
            F.layer_norm(_spread(picture, first), norm.weight.shape, norm.weight, norm.bias, norm.eps)
        )
        sixteenths = activation(_spread(quarters, second))  # (B, cells, 2, 2, 2, 2, dim / 8)
        masks = (sixteenths.flatten(1, 5) @ weights.transpose(1, 2)).unflatten(1, (*grid, 2, 2, 2, 2))
        # From row, column, then by twos down, across, down, across, to rows and columns.
        return masks.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)


def _spread(x: torch.Tensor, convolution: nn.ConvTranspose2d) -> torch.Tensor:
    """A transposed convolution of size and stride 2 on channels-last x (..., c): (..., 2, 2, out), down and across."""
    weight, bias = convolution.weight.permute(2, 3, 1, 0), cast(torch.Tensor, convolution.bias)
    return F.linear(x, weight.flatten(0, 2), bias.repeat(4)).unflatten(-1, weight.shape[:3])


class TwoWayTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: int, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp, first=index == 0) for index in range(depth))
        self.final_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self,
        picture: torch.Tensor,
        position: torch.Tensor,
        tokens: torch.Tensor,
        key_bias: torch.Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """picture (B, N, dim), position (1, N, dim), tokens (B, T, dim) -> tokens and picture after the exchange.

        `key_bias` (B, 1, 1, T) is added to the scores of the tokens wherever they are attended to.
        """
        attention_bias, offset = guidance or (None, 0)
        tokens = tokens + offset  # PerSAM's offset reaches the codes of the tokens as well
        queries, keys = tokens, picture
        for layer in self.layers:
            if not layer.first:
                queries = queries + offset
            queries, keys = layer(queries, keys, tokens, position, key_bias, attention_bias)
        attended = self.final_attn_token_to_image.of_picture(queries + tokens + offset, keys + position, keys)
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
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        query_code: torch.Tensor,
        key_code: torch.Tensor,
        key_bias: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.first:
            # SAM's first block has neither position codes nor a residual here.
            queries = self.self_attn(queries, queries, queries, key_bias)
        else:
            coded = queries + query_code
            queries = queries + self.self_attn(coded, coded, queries, key_bias)
        queries = self.norm1(queries)
        coded_keys = keys + key_code
        attend = self.cross_attn_token_to_image
        if attention_bias is None:
            attended = attend.of_picture(queries + query_code, coded_keys, keys)
        else:
            attended = attend.guided(queries + query_code, coded_keys, keys, attention_bias)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))
        attended = self.cross_attn_image_to_token.of_tokens(coded_keys, queries + query_code, queries, key_bias)
        return queries, self.norm4(keys + attended)


class Attention(nn.Module):
    """Attention whose inner width may be smaller than its outer one."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.out_proj(multihead_attention(self.q_proj(q), self.k_proj(k), self.v_proj(v), self.heads, bias))

    def of_picture(self, tokens: torch.Tensor, coded: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, dim) attend to a picture (B, N, dim), `coded` with positions: `self(tokens, coded, picture)`.

        Projections of the picture are moved to the tokens, of which there are few: with T heads < inner / 2 that saves
        arithmetic. It is exact: linear maps re-associate, a score that all cells share has no effect under the softmax,
        and the weights of a token sum to 1. A picture that serves every prompt (batch 1) is projected once instead; so
        is any in training, where no parameter may drop out (data parallelism waits for the gradients of all).
        """
        if picture.shape[0] == 1 or self.training:
            return self(tokens, coded, picture)
        queries = split_heads(self.q_proj(tokens), self.heads)
        queries = queries * queries.shape[-1] ** -0.5 @ self._by_head(self.k_proj.weight)
        weights = (queries.flatten(1, 2) @ coded.transpose(1, 2)).softmax(-1)
        mixed = (weights @ picture).unflatten(1, (self.heads, -1))
        values = mixed @ self._by_head(self.v_proj.weight).transpose(1, 2)
        return self.out_proj(join_heads(values + self.v_proj.bias.view(self.heads, 1, -1)))

    def of_tokens(
        self, coded: torch.Tensor, token_keys: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The picture (B, N, dim) attends to tokens (B, T, dim): `self(coded, token_keys, tokens, bias)`.

        As in `of_picture`, the tokens take over the projection of the result and, where every prompt has a picture of
        its own, that of the picture.
        """
        keys = split_heads(self.k_proj(token_keys), self.heads)
        keys = keys * keys.shape[-1] ** -0.5
        if coded.shape[0] == 1:
            scores = keys @ split_heads(self.q_proj(coded), self.heads).transpose(2, 3)
        else:
            folded = (keys @ self._by_head(self.q_proj.weight)).flatten(1, 2) @ coded.transpose(1, 2)
            scores = folded.unflatten(1, (self.heads, -1)) + keys @ self.q_proj.bias.view(self.heads, -1, 1)
        if bias is not None:
            scores = scores + bias.transpose(2, 3)
        weights = scores.softmax(2).flatten(1, 2)
        values = split_heads(self.v_proj(tokens), self.heads) @ self._by_head(self.out_proj.weight.T)
        # The weights of every head sum to 1: each brings its share of the bias along.
        values = values + self.out_proj.bias / self.heads
        return weights.transpose(1, 2) @ values.flatten(1, 2)

    def _by_head(self, weight: torch.Tensor) -> torch.Tensor:
        """A matrix (inner, dim) as (heads, inner / heads, dim)."""
        return weight.unflatten(0, (self.heads, -1))

    def guided(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """PerSAM's attention: `bias` joins the weights, not the scores, and a second softmax follows."""
        q, k, v = (
            split_heads(project(x), self.heads) for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)
        return self.out_proj(join_heads((weights + bias).softmax(-1) @ v))


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
