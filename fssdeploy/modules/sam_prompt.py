"""SAM's prompt encoder: points, boxes and masks to what the mask decoder takes.

Source: Kirillov et al., "Segment Anything" (2023), appendix A. Parameters carry the official names, so that the part of
an official checkpoint under ``prompt_encoder.`` loads with ``strict=True``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.glue.sam import BOTTOM_RIGHT, PADDING, TOP_LEFT
from fssdeploy.modules.sam_decoder import FourierPosition, mask_downscaling


class PromptEncoder(nn.Module):
    """Prompts in the pixel coordinates of a picture of side `image_size`, whose embedding has `grid` cells a side.

    The random matrix of the position code is no subject of training in SAM, so it asks for no gradient here.
    """

    def __init__(self, dim: int, image_size: int, grid: int, mask_channels: int = 16) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid = grid
        self.pe_layer = FourierPosition(dim).requires_grad_(False)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = mask_downscaling(dim, mask_channels)
        self.no_mask_embed = nn.Embedding(1, dim)

    def forward(
        self,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse tokens (B, T, dim) and dense prompt (B, dim, g, g) of B prompt sets.

        points (B, P, 2) are (x, y) in pixels with integer labels (B, P): 1 foreground, 0 background, -1 padding;
        boxes (B, 4) are x0, y0, x1, y1 in pixels; masks (B, 1, 4g, 4g) are logits. Whatever is absent is None; without
        masks the dense prompt is the same everywhere and comes as (1, dim, 1, 1). T is P + 2 with a box and P + 1
        without: SAM was trained with a padding point in place of the box. Without points and boxes T is 0, and B is 1
        unless masks say otherwise.
        """
        if (points is None) != (labels is None):
            raise ValueError("points and labels come together")
        dense = self.no_mask_embed.weight[:, :, None, None] if masks is None else self.mask_downscaling(masks)
        coordinates, kinds = [], []
        if points is not None and labels is not None:
            coordinates, kinds = [points], [labels]
            if boxes is None:
                coordinates.append(torch.zeros_like(points[:, :1]))
                kinds.append(torch.full_like(labels[:, :1], PADDING))
        if boxes is not None:
            corners = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
            coordinates.append(boxes.unflatten(1, (2, 2)))
            kinds.append(corners.expand(boxes.shape[0], -1))
        if not coordinates:
            return dense.new_zeros(dense.shape[0], 0, dense.shape[1]), dense
        return self.embed_points(torch.cat(coordinates, 1), torch.cat(kinds, 1)), dense

    def position(self) -> torch.Tensor:
        """Codes of the cells of the embedding, (1, g*g, dim), row by row."""
        return self.pe_layer(self.grid, self.grid)

    def embed_points(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, P, 2) in pixels, labels (B, P) -1 to 3 -> (B, P, dim): position code plus what the label stands for."""
        kinds = torch.cat([self.not_a_point_embed.weight, *self.point_embeddings.parameters()])
        # Half a pixel leads from a pixel's corner to its centre.
        codes = self.pe_layer.at(((points + 0.5) / self.image_size).to(kinds.dtype))
        return codes.masked_fill((labels == PADDING).unsqueeze(-1), 0) + F.embedding(labels + 1, kinds)
