"""One stage to ONNX files: trace, strip what the exporting machine leaves behind, write the two forms of attention."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxscript.optimizer
import torch

from fssdeploy.export.attention import count_attention, expand_attention, fuse_attention
from fssdeploy.export.operations import inlined, with_functions
from fssdeploy.protocol import BATCH, StageSpec

OPSET = 18  # LayerNormalization and Resize are single nodes; every consumer reads it (docs/export.md)
OPSET_BF16 = 22  # the first whose Conv accepts bfloat16
FOLD_LIMIT = 1 << 30  # elements
TRACED_BATCH = 2  # torch.export specialises dimensions of size 0 and 1


@dataclass(frozen=True)
class StageFiles:
    """The files of one exported stage, relative to the artifact."""

    portable: str
    weights: str
    onnxruntime: str | None  # the same graph with ONNX Runtime's fused attention


def example_inputs(spec: StageSpec, batch: int) -> tuple[torch.Tensor, ...]:
    """Random inputs of the declared shapes and dtypes."""
    generator = np.random.default_rng(0)
    inputs = []
    for tensor in spec.inputs:
        shape = [batch if dim == BATCH else int(dim) for dim in tensor.shape]
        whole = {"uint8": 256, "int32": 2}.get(tensor.dtype)
        array = generator.integers(0, whole, shape) if whole else generator.standard_normal(shape)
        inputs.append(torch.from_numpy(array.astype(tensor.dtype)))
    return tuple(inputs)


def export_stage(
    module: torch.nn.Module, spec: StageSpec, folder: Path, *, precision: str, fuse: bool, operation_nodes: bool = False
) -> StageFiles:
    """Write ``<stage>.onnx``, its weights ``<stage>.onnx.data`` and, with `fuse`, ``<stage>.ort.onnx``.

    The weights always stand outside the graph: one layout for every size of network, and both graphs share them.
    Operations of fssdeploy.kernels are written out in standard operators; with `operation_nodes` each stays a node that
    carries its body (fssdeploy.export.operations), for engines that have a kernel for it.
    """
    files = StageFiles(f"{spec.name}.onnx", f"{spec.name}.onnx.data", f"{spec.name}.ort.onnx" if fuse else None)
    batch = torch.export.Dim(BATCH, min=1, max=1024)
    with _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            example_inputs(spec, TRACED_BATCH if spec.free_batch else 1),
            dynamo=True,
            opset_version=OPSET_BF16 if precision == "bf16" else OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(module, spec, batch) if spec.free_batch else None,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter returned no program")
    # The exporter itself folds only small constants; weights reshaped or sliced in forward would stay as nodes.
    onnxscript.optimizer.fold_constants(program.model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    path = folder / files.portable
    program.save(str(path), external_data=True)
    traced = onnx.load(str(path), load_external_data=False)
    strip_provenance(traced)
    spell = with_functions if operation_nodes else inlined
    if files.onnxruntime and count_attention(traced):
        _save_graph(spell(fuse_attention(traced)), folder / files.onnxruntime)
    else:
        files = StageFiles(files.portable, files.weights, None)
    _save_graph(spell(expand_attention(traced)), path)
    return files


def strip_provenance(model: onnx.ModelProto) -> None:
    """Remove source paths, stack traces and docstrings of the exporting machine; module names stay, for profiling."""
    model.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        kept = [entry for entry in node.metadata_props if entry.key == "namespace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    del model.metadata_props[:]
    del model.graph.metadata_props[:]


def _save_graph(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=False)


def _dynamic_shapes(module: torch.nn.Module, spec: StageSpec, batch: object) -> tuple[object, ...]:
    """One entry per argument of forward; arguments gathered by *state form one nested tuple."""
    import inspect

    dynamic = [{} if tensor.name in spec.shared else {0: batch} for tensor in spec.inputs]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*dynamic[:named], tuple(dynamic[named:]))
    return tuple(dynamic)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns about its own internals and about torchvision, which nothing here uses."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
