"""FS-DINO's 4D correlation mining, with its first convolution re-associated (paper, section 3.4.1, eqs. 3 to 5).

The paper's 1x1 convolution W runs over the flattened support axis of the correlation F_q F_s^T. Since it is linear,
W (F_s F_q^T) = (W F_s) F_q^T: the bracket, a matrix of `hidden` x C, depends on the support alone and is computed at
enrolment. The correlation volume itself is never formed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.modules.pooling import unit_rows


class Correlation4D(nn.Module):
    """From the folded support kernel and the query's tokens to prior logits at four times the token grid."""

    def __init__(
        self,
        grid: int,
        hidden: int,
        head: tuple[int, int, int],
        *,
        measure: str = "dot",
        upsample: str = "exact",
    ) -> None:
        super().__init__()
        self.grid, self.coarse = grid, (grid + 1) // 2
        self.measure, self.upsample = measure, upsample
        cells = self.coarse**2
        # Both position counts are channel counts here: these weights belong to one grid, for support and query.
        self.project = nn.Conv2d(grid**2, hidden, 1)
        self.reduce = nn.Conv2d(hidden, cells, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(cells, cells, 3, padding=1, groups=cells)
        self.pointwise = nn.Conv2d(cells, cells, 1)
        widths = (cells, *head, 1)
        self.head = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )

    def scale(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each side's share of the correlation's normalisation: C^-1/2, or unit rows for the cosine."""
        return unit_rows(tokens) if self.measure == "cosine" else tokens * tokens.shape[-1] ** -0.5

    def fold(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Support tokens (B, N, C) and mask weights (B, 1, N) -> kernel W diag(m) F_s, (B, hidden, C)."""
        return (self.project.weight.flatten(1) * weight) @ self.scale(tokens)

    def respond(self, kernel: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The projected correlation (B, hidden, N) of query tokens (B, N, C) with a folded kernel (B, hidden, C)."""
        return kernel @ self.scale(tokens).transpose(1, 2) + self.bias()

    def bias(self) -> torch.Tensor:
        """Bias of the projection, (hidden, 1)."""
        return self.project.bias.unsqueeze(1)  # type: ignore[union-attr]

    def mine(self, response: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
        """Prior logits (B, 1, 4g, 4g) from the projected correlation (B, hidden, N) and the cosine prior (B, N)."""
        grid, half = self.grid, self.coarse
        x = self.reduce(F.gelu(response).unflatten(2, (grid, grid)))
        spatial = self.depthwise(x)
        # Eq. 5 mixes query positions for every support cell: on (B, support, query) that is a product over the last
        # axis, so the two transpositions of the paper cancel.
        mixed = F.linear(x.flatten(2), self.pointwise.weight.flatten(1), self.pointwise.bias)
        # Sampled where the stride-2 convolution is centred; cells outside do not count.
        prior = similarity.view(-1, 1, grid, grid)
        coarse = F.avg_pool2d(prior, 3, stride=2, padding=1, count_include_pad=False)
        return self.upsample_prior(spatial + mixed.unflatten(2, (half, half)) + coarse)

    def upsample_prior(self, x: torch.Tensor) -> torch.Tensor:
        """Mined correlation (B, cells, h, h) -> one channel (B, 1, 4g, 4g)."""
        grid = self.grid
        first, second, third, last = self.head
        if self.upsample == "exact":
            # align_corners puts the half-resolution cells back where the strided convolution was centred (odd grids).
            x = F.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=True)
        x = _twice(F.gelu(first(x)))
        x = _twice(F.gelu(second(x)))
        x = last(F.gelu(third(x)))
        if self.upsample == "literal":
            x = F.interpolate(x, size=(4 * grid, 4 * grid), mode="bilinear", align_corners=False)
        return x


def _twice(x: torch.Tensor) -> torch.Tensor:
    size = (2 * x.shape[-2], 2 * x.shape[-1])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
