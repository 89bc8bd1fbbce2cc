"""config.pbtxt of every model, derived from the StageSpecs of an artifact: nobody writes a shape twice.

**Batches and bits.** A graph may round differently for another batch size: of FS-DINO's stages, `enroll` does (its
masked mean, by one unit in the last place), `encoder` and `segment` were bit-equal for batches of 1 to 6 and for 1 and
2 threads. The local path runs the shots of a class as one batch and so does the server. Therefore requests are never
joined into a batch unless a delay is asked for, and those of `enroll` never: masks stay bit-equal to the local ones. On
CPUs joining gains nothing; for GPUs give a delay.

**One step at a time.** Server 2.51 crashes when a step of an ensemble fails while another step of the same request is
under way (a picture that cannot be decoded was enough). So the steps of the stateless path form a chain: the query is
prepared after the class, which the input `after` says, and its canvas goes through `merge_shots`.

**Queues.** A limit needs the server's dynamic batcher, which then looks for an idle instance the moment a request
arrives, and else at its next event or after half a second: a request that arrives while an instance is just finishing
waits that long for nothing (docs/serving.md, Limits). So there is no limit unless one is asked for, and no batcher
where requests are not joined. Where there is a limit and requests must not be joined, a preferred batch of 1 with a
delay that no request reaches makes the batcher hand over one request at a time, however many rows that has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fssdeploy import __version__
from fssdeploy.errors import InputError, MachineError
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from fssdeploy.serving.models import enroll, once, segment
from fssdeploy.serving.models.answers import VERSION
from fssdeploy.serving.names import ARTIFACT, GRAPH, PLAN, Names
from fssdeploy.serving.rules import TYPES

BACKENDS = ("onnxruntime", "tensorrt", "python")
DEVICES = ("cpu", "gpu")
NEVER_US = 3_600_000_000  # the delay of a batcher that is to join nothing: longer than any request waits

MAX_PICTURE_BYTES = 32 * 2**20
MAX_PIXELS = 40_000_000
CACHE_BYTES = 256 * 2**20
PLACEMENT_FIELDS = 7

Config = dict[str, Any]  # the fields of the server's ModelConfig, as in JSON
Shape = Sequence[int | str]


@dataclass(frozen=True)
class Options:
    """How models are served.

    `max_batch`: most rows of one call of a stage; `delay_us`: how long a request may wait to be joined with others,
    None to join none; `queue`: most requests that wait for a model, more are refused, None for no limit; `threads`: of
    each instance of a stage. InputError for what cannot be.
    """

    backend: str = "onnxruntime"
    max_batch: int = 8
    instances: int = 1
    delay_us: int | None = None
    device: str = "cpu"
    threads: int = 1
    queue: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("backend", BACKENDS), ("device", DEVICES)):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(
                    f"{name}_unknown", f"there is no {name} '{value}'", "", f"Choose {', '.join(allowed)}."
                )
        for name, most in (("max_batch", 1024), ("instances", 64), ("threads", 1024), ("queue", 2**20)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise InputError("option_range", f"{name} cannot be {value}", "", f"Give 1 to {most}.")
        if self.delay_us is not None and not 0 <= self.delay_us <= 10_000_000:
            raise InputError("option_range", f"a delay of {self.delay_us} us cannot be used", "", "Give 0 to 10000000.")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise InputError("backend_device", "TensorRT does not run on a CPU", "", "Add --device gpu.")
        if self.backend == "python" and self.device == "gpu":
            raise InputError(
                "backend_device",
                "the python backend of this repository runs on the CPU",
                "it holds ONNX Runtime inside",
                "Use --backend onnxruntime or tensorrt for a GPU.",
            )


def configs(
    names: Names,
    specs: Mapping[str, StageSpec],
    preprocessing: Mapping[str, Any],
    options: Options,
    samples: Mapping[str, Mapping[str, Shape]],
) -> dict[str, Config]:
    """The config of every model of a system, by the model's name.

    `samples` names the warm-up files that a model has: shapes by input, one row each. Raises InputError
    `system_not_staged` where the names say that the stages form a chain, and they do not.
    """
    served = {names.stage(stage): stage_config(spec, options) for stage, spec in specs.items()}
    if names.chained:
        _check_chain(specs)
        served |= _helpers(names, specs, preprocessing, options)
    served[names.enroll] = _enrolled(names, specs, enroll.INPUTS, enroll.OUTPUTS, options, instances=1)
    served[names.segment] = _enrolled(names, specs, segment.INPUTS, segment.OUTPUTS, options, options.instances)
    if names.chained:
        served[names.stateless] = _ensemble(names, specs, options)
    else:
        served[names.stateless] = _enrolled(names, specs, once.INPUTS, once.OUTPUTS, options, options.instances)
    result = {}
    for model, config in served.items():
        warmup = {"model_warmup": _warmup(config, samples[model])} if model in samples else {}
        result[model] = {"name": model, **config, **warmup}
    return result


def text(config: Config) -> str:
    """A config as the server reads it. Raises MachineError when the server's own description of configs is missing."""
    from google.protobuf import json_format, text_format

    return text_format.MessageToString(json_format.ParseDict(config, protobuf().ModelConfig()))


def protobuf() -> ModuleType:
    """Triton's own description of configs. Raises MachineError `package_missing`."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MachineError(
            "package_missing",
            "repositories need the server's client package",
            str(error),
            "Run: pip install 'fssdeploy[serve]'",
        ) from error
    return model_config_pb2


def row_by_row(spec: StageSpec) -> bool:
    """Whether a stage was exported with a fixed batch of one row."""
    return not spec.free_batch


def stage_config(spec: StageSpec, options: Options) -> Config:
    """The config of one stage. A graph with a fixed batch is served as such, except by the python backend.

    NVIDIA's backends want a free first dimension for max_batch_size above 0, and dims with the 1 otherwise. Where an
    input serves all rows there is no batch to the server: requests cannot be joined, and the rows are in the dims.
    """
    batching = not spec.shared and (options.backend == "python" or not row_by_row(spec))
    config = {
        **_backend(options),
        "max_batch_size": options.max_batch if batching else 0,
        "input": [_tensor(tensor, rows=None if batching else _rows(tensor)) for tensor in spec.inputs],
        "output": [_tensor(tensor, rows=None if batching else _rows(tensor)) for tensor in spec.outputs],
        "instance_group": [{"kind": f"KIND_{options.device.upper()}", "count": options.instances}],
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": _parameters({} if options.backend == "tensorrt" else {"intra_op_thread_count": options.threads}),
    }
    join = batching and spec.name != "enroll" and options.delay_us is not None
    return {**config, **_queue(options, config["max_batch_size"], options.delay_us if join else None)}


def _rows(tensor: TensorSpec) -> int:
    """The first dimension of a tensor in a config without a batch."""
    return -1 if tensor.shape[0] == BATCH else int(tensor.shape[0])


def _single(specs: Mapping[str, StageSpec], options: Options) -> bool:
    """Whether the models of the stages take one row only."""
    return options.backend != "python" and any(map(row_by_row, specs.values()))


def _backend(options: Options) -> Config:
    if options.backend == "python":
        return {"backend": "python"}
    platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[options.backend]
    file = {"onnxruntime": GRAPH, "tensorrt": PLAN}[options.backend]
    return {"platform": platform, "backend": options.backend, "default_model_filename": file}


def _helpers(
    names: Names, specs: Mapping[str, StageSpec], preprocessing: Mapping[str, Any], options: Options
) -> dict[str, Config]:
    picture = _tensor(specs["encoder"].inputs[0], rows=-1, name="picture")
    mask = _tensor(_named(specs["enroll"].inputs, "mask"), rows=-1)
    state = [_tensor(tensor, rows=-1) for tensor in specs["enroll"].outputs]
    logits = _tensor(_named(specs["segment"].outputs, "mask_logits"), rows=-1)
    limits = {"max_picture_bytes": MAX_PICTURE_BYTES, "max_pixels": MAX_PIXELS}
    prepare = {**{key: preprocessing[key] for key in ("canvas", "patch", "geometry")}, **limits}
    placements = _plain("placements", "TYPE_INT32", (-1, PLACEMENT_FIELDS))
    after = {**_smallest(state), "name": "after", "optional": True}
    pictures = _plain("pictures", "TYPE_STRING", (-1,))
    return {
        names.prepare_query: _python(options, [pictures, after], [picture, placements], prepare),
        names.prepare_support: _python(
            options, [pictures, _plain("masks", "TYPE_STRING", (-1,))], [picture, mask], prepare
        ),
        names.merge_shots: _python(options, [*state, placements, picture], [*state, picture]),
        names.finish: _python(
            options,
            [logits, placements],
            [_plain("masks", "TYPE_UINT8", (-1, -1, -1)), _plain("scores", "TYPE_FP32", (-1,))],
        ),
    }


def _enrolled(
    names: Names,
    specs: Mapping[str, StageSpec],
    inputs: Sequence[tuple[str, str, tuple[int, ...], bool]],
    outputs: Sequence[tuple[str, str, tuple[int, ...], bool]],
    options: Options,
    instances: int,
) -> Config:
    """A model of the enrolled path, which holds the whole artifact."""
    parameters = {
        "artifact": ARTIFACT,
        "bank": f"../../bank/{names.system}",
        "threads": 0,
        "instances": instances,
        "cache_bytes": CACHE_BYTES,
        "max_picture_bytes": MAX_PICTURE_BYTES,
        "max_pixels": MAX_PIXELS,
        "engine": "session" if options.device == "cpu" else "models",
        "max_batch": 1 if _single(specs, options) else options.max_batch,
    }
    config = _python(
        options,
        [_plain(name, kind, dims, optional) for name, kind, dims, optional in inputs],
        [_plain(name, kind, dims) for name, kind, dims, _ in outputs],
        parameters,
    )
    config["instance_group"][0]["count"] = instances
    return config


def _python(
    options: Options, inputs: list[Config], outputs: list[Config], parameters: Mapping[str, object] | None = None
) -> Config:
    """A model of our own code, on the CPU, without a batch dimension."""
    return {
        "backend": "python",
        "max_batch_size": 0,
        "input": inputs,
        "output": outputs,
        "instance_group": [{"kind": "KIND_CPU", "count": options.instances}],
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": _parameters(parameters or {}),
        **_queue(options, 0, None),
    }


def _ensemble(names: Names, specs: Mapping[str, StageSpec], options: Options) -> Config:
    """The stateless path: support and query pictures in, masks out.

    Graphs of one row behind NVIDIA's backends take one picture and one shot; the inputs say so.
    """
    dims = (1,) if _single(specs, options) else (-1,)
    encoder, state = specs["encoder"], [tensor.name for tensor in specs["enroll"].outputs]
    picture = encoder.inputs[0].name
    first = _smallest([_tensor(tensor, rows=-1) for tensor in specs["enroll"].outputs])["name"]
    queries = {tensor.name: f"query_{tensor.name}" for tensor in encoder.outputs}
    supports = {tensor.name: f"support_{tensor.name}" for tensor in encoder.outputs}
    needed = {tensor.name for tensor in specs["enroll"].inputs}
    steps = [
        _step(
            names.prepare_support,
            {"pictures": "support_pictures", "masks": "support_masks"},
            {"picture": "support_canvas", "mask": "support_mask"},
        ),
        _step(
            names.stage("encoder"),
            {picture: "support_canvas"},
            {name: tensor for name, tensor in supports.items() if name in needed},
        ),
        _step(
            names.stage("enroll"),
            {name: supports.get(name, "support_mask") for name in sorted(needed)},
            {name: f"shot_{name}" for name in state},
        ),
        _step(
            names.prepare_query,
            {"pictures": "pictures", "after": f"shot_{first}"},
            {"picture": "placed_canvas", "placements": "placements"},
        ),
        _step(
            names.merge_shots,
            {**{name: f"shot_{name}" for name in state}, "placements": "placements", "picture": "placed_canvas"},
            {**{name: f"class_{name}" for name in state}, "picture": "query_canvas"},
        ),
        _step(names.stage("encoder"), {picture: "query_canvas"}, queries),
        _step(
            names.stage("segment"),
            {
                tensor.name: f"class_{tensor.name}" if tensor.name in state else queries[tensor.name]
                for tensor in specs["segment"].inputs
            },
            {"mask_logits": "mask_logits"},
        ),
        _step(
            names.finish,
            {"mask_logits": "mask_logits", "placements": "placements"},
            {"masks": "masks", "scores": "scores"},
        ),
    ]
    return {
        "platform": "ensemble",
        "max_batch_size": 0,
        "input": [_plain(name, "TYPE_STRING", dims) for name in ("pictures", "support_pictures", "support_masks")],
        "output": [_plain("masks", "TYPE_UINT8", (-1, -1, -1)), _plain("scores", "TYPE_FP32", (-1,))],
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": _parameters({}),
        "ensemble_scheduling": {"step": steps},
    }


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Config:
    return {"model_name": model, "model_version": -1, "input_map": dict(inputs), "output_map": dict(outputs)}


def _queue(options: Options, max_batch: int, delay_us: int | None) -> Config:
    """How requests wait: the field `dynamic_batching`, or nothing where each is simply taken in turn."""
    batcher: Config = {}
    if options.queue is not None:
        batcher["default_queue_policy"] = {"timeout_action": "REJECT", "max_queue_size": options.queue}
        if max_batch and delay_us is None:
            batcher |= {"preferred_batch_size": [1], "max_queue_delay_microseconds": NEVER_US}
    if max_batch and delay_us is not None:
        batcher["max_queue_delay_microseconds"] = delay_us
    return {"dynamic_batching": batcher} if batcher else {}


def _warmup(config: Config, shapes: Mapping[str, Shape]) -> list[Config]:
    """One real sample; where requests are joined, also a full batch of it, which a GPU prepares for.

    `shapes` are those of one row with its batch dimension, which a config leaves out where there is a batch.
    """
    first = 1 if config["max_batch_size"] else 0
    kinds = {tensor["name"]: tensor["data_type"] for tensor in config["input"]}
    inputs = {
        name: {"data_type": kinds[name], "dims": [int(dim) for dim in shape[first:]], "input_data_file": name}
        for name, shape in shapes.items()
    }
    sizes = [1]
    batcher = config.get("dynamic_batching", {})
    joins = "max_queue_delay_microseconds" in batcher and "preferred_batch_size" not in batcher
    if config["max_batch_size"] > 1 and joins:
        sizes.append(config["max_batch_size"])
    return [{"name": f"sample_{size}", "batch_size": size, "count": 2, "inputs": inputs} for size in sizes]


def _tensor(tensor: TensorSpec, rows: int | None, name: str = "") -> Config:
    """A stage's tensor; `rows` is its first dimension where the config names that."""
    dims = [int(dim) for dim in tensor.shape[1:]]
    return _plain(name or tensor.name, TYPES[tensor.dtype], dims if rows is None else [rows, *dims])


def _plain(name: str, kind: str, dims: Sequence[int], optional: bool = False) -> Config:
    return {"name": name, "data_type": kind, "dims": list(dims), **({"optional": True} if optional else {})}


def _parameters(values: Mapping[str, object]) -> Config:
    return {key: {"string_value": str(value)} for key, value in {VERSION: __version__, **values}.items()}


def _smallest(tensors: Sequence[Config]) -> Config:
    """The tensor with the fewest elements in a row."""
    return min(tensors, key=lambda tensor: math.prod(tensor["dims"][1:]))


def _named(tensors: Sequence[TensorSpec], name: str) -> TensorSpec:
    return next(tensor for tensor in tensors if tensor.name == name)


def _check_chain(specs: Mapping[str, StageSpec]) -> None:
    """InputError unless the stages are those of `StagedSystem` and every input comes from a stage before."""
    problem = ""
    missing = [stage for stage in ("encoder", "enroll", "segment") if stage not in specs]
    if missing:
        problem = f"it has no stage {' and no '.join(missing)}"
    else:
        features, state = ({tensor.name for tensor in specs[stage].outputs} for stage in ("encoder", "enroll"))
        taken = {stage: {tensor.name for tensor in spec.inputs} for stage, spec in specs.items()}
        if len(taken["encoder"]) != 1 or taken["enroll"] - features != {"mask"} or taken["segment"] - features - state:
            problem = "its stages do not chain as picture, features, class state, mask"
        elif "mask_logits" not in {tensor.name for tensor in specs["segment"].outputs}:
            problem = "its last stage returns no mask_logits"
    if problem:
        raise InputError(
            "system_not_staged", "this artifact cannot be served", problem, "Export it with --components all."
        )
