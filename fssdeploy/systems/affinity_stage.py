"""The affinity of reference rows to the cells of a query, as a stage that training-free systems share.

Its place in the glue is `fssdeploy.glue.affinity`; what the rows are is each system's own.
"""

from __future__ import annotations

import torch
from torch import nn

from fssdeploy.glue.affinity import AFFINITY
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec

# Below this length a vector counts as zero. The guard is a clamp: the exporter's optimiser drops tiny additions.
SHORTEST = 1e-12


class AffinityStage(nn.Module):
    """Rows float32 (B, C), features float32 (1, N, C) -> inner products (B, N) of rows with unit vectors of features.

    Features that an encoder returns with length one are taken as they are where `unit` says so: dividing them once more
    changes their last bits, which is enough to turn the ties of an assignment. There are no parameters, and all stays
    in float32 at every precision: points and assignments hang on small differences.
    """

    def __init__(self, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, rows: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cells = features.squeeze(0)
        if not self.unit:
            cells = cells / torch.linalg.vector_norm(cells, dim=-1, keepdim=True).clamp_min(SHORTEST)
        # The cells first: MKL takes half as long again for the other order on AMD.
        return ((cells @ rows.T).T,)


def affinity_spec(features: TensorSpec) -> StageSpec:
    """The contract of `AffinityStage` over the features (batch, N, C) that a system's encoder returns."""
    _, cells, channels = features.shape
    return StageSpec(
        AFFINITY,
        (
            TensorSpec("rows", "float32", (BATCH, channels), "of references: unit vectors, scaled as they weigh"),
            TensorSpec("features", "float32", (1, cells, channels), "of the cells of one query"),
        ),
        (TensorSpec("cosine", "float32", (BATCH, cells), "of every row to every cell, times the row's length"),),
    )
