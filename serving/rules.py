"""What NVIDIA's ONNX Runtime backend demands of a config before it takes a graph.

Restated from the backend's own checks at load time (triton-inference-server/onnxruntime_backend, src/onnxruntime.cc and
onnxruntime_utils.cc, release 24.10), because the server that runs without a container has no such backend: our stand-in
and `fssdeploy repo check` refuse what the real one would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fssdeploy.protocol import StageSpec, TensorSpec

# NumPy's name of a dtype -> the server's. Text is the one type whose names do not follow from each other.
TYPES = {
    "bool": "TYPE_BOOL",
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
    "object": "TYPE_STRING",
}
DTYPES = {triton: dtype for dtype, triton in TYPES.items()}


@dataclass(frozen=True)
class Declared:
    """An input or output as a config declares it: without the batch dimension where the model has one."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


def graph_problems(
    max_batch: int, inputs: Sequence[Declared], outputs: Sequence[Declared], graph: StageSpec
) -> list[str]:
    """Why the ONNX Runtime backend would refuse this config for a graph that declares itself as `graph`; empty if not.

    The rules for outputs are stricter than those for inputs: a free dimension of an output must be -1 in the config.
    """
    problems = []
    if len(inputs) != len(graph.inputs):
        problems.append(f"the config has {len(inputs)} inputs, the graph has {len(graph.inputs)}")
    for kind, declared, own in (("input", inputs, graph.inputs), ("output", outputs, graph.outputs)):
        for tensor in declared:
            found = next((each for each in own if each.name == tensor.name), None)
            if found is None:
                names = ", ".join(each.name for each in own)
                problems.append(f"the graph has no {kind} '{tensor.name}'; it has {names}")
            else:
                problems += _tensor_problems(max_batch, kind, tensor, found)
    return problems


def dims_problem(name: str, dims: Sequence[int]) -> str:
    """What is wrong with the dims of a config by themselves, for any backend; empty if nothing."""
    if not dims:
        return f"'{name}' has no dims"
    if any(dim == 0 or dim < -1 for dim in dims):
        return f"'{name}' has the dims {list(dims)}: each is a number from 1 up, or -1"
    return ""


def _tensor_problems(max_batch: int, kind: str, tensor: Declared, graph: TensorSpec) -> list[str]:
    problems = []
    wanted = TYPES.get(graph.dtype, graph.dtype)
    if tensor.data_type != wanted:
        problems.append(f"{kind} '{tensor.name}' is {tensor.data_type} in the config and {wanted} in the graph")
    if kind == "input" and tensor.optional and max_batch:
        problems.append(f"input '{tensor.name}' cannot be optional where max_batch_size is not 0")
    own = [-1 if isinstance(dim, str) else dim for dim in graph.shape]
    if max_batch and own[:1] != [-1]:
        problems.append(
            f"{kind} '{tensor.name}' has the shape {own} in the graph: for max_batch_size {max_batch} its first "
            "dimension must be free"
        )
        return problems
    full = [-1, *tensor.dims] if max_batch else list(tensor.dims)
    exact = kind == "output"
    fits = len(full) == len(own) and all(
        have == want or (want == -1 and not exact) for have, want in zip(full, own, strict=True)
    )
    if not fits:
        batch = " (the batch dimension first)" if max_batch else ""
        problems.append(f"{kind} '{tensor.name}' is {full}{batch} in the config and {own} in the graph")
    return problems
