"""An operation as one node of the domain `fssdeploy` while a network is traced for ONNX.

The exporter then gives the node a function body, or puts the body in its place (fssdeploy.export.operations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

DOMAIN = "fssdeploy"


def tracing() -> bool:
    """Whether the call belongs to an export to ONNX."""
    return torch.onnx.is_in_onnx_export()


def node(
    operator: str,
    inputs: Sequence[torch.Tensor],
    attributes: Mapping[str, int | float | str],
    outputs: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]],
) -> tuple[torch.Tensor, ...]:
    """The node `fssdeploy::operator` with these inputs and attributes; `outputs` are dtype and shape of each result."""
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{operator}",
            inputs,
            attrs=dict(attributes),
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[tuple(shape) for _, shape in outputs],
            version=1,
        )
    )
