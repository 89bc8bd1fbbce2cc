"""What a server would refuse, hang on or silently do wrong with a repository, found without a server.

Configs are parsed with Triton's own protobuf. What that does not know is checked here: the rules that the server and
its ONNX Runtime backend apply at load time, and the mistakes that they accept without a word.
"""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fssdeploy import __version__
from fssdeploy.artifact import MANIFEST, Artifact
from fssdeploy.engines.onnxruntime import OnnxRuntimeEngine
from fssdeploy.errors import FssError, InputError
from fssdeploy.protocol import BATCH
from fssdeploy.serving.configs import protobuf
from fssdeploy.serving.models.answers import VERSION
from fssdeploy.serving.names import ARTIFACT, CONFIG, GRAPH, MODEL_CODE, PLAN, SAMPLES
from fssdeploy.serving.repository import Repository, seals, unpack_strings
from fssdeploy.serving.rules import DTYPES, Declared, dims_problem, graph_problems

# Folders beside the versions that the server knows, and those it skips because we say so.
_KNOWN_FOLDERS = (SAMPLES, "configs", "initial_state")
_ACCELERATORS = {"gpu": ("tensorrt", "cuda"), "cpu": ("openvino",)}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. An error keeps the server from starting or makes answers wrong; a warning does not."""

    where: str
    what: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Model:
    """A model's folder and its parsed config."""

    folder: Path
    config: Any

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def backend(self) -> str:
        """The backend's name; "ensemble" for ensembles."""
        if self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling"):
            return "ensemble"
        platforms = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}
        return self.config.backend or platforms.get(self.config.platform, self.config.platform)

    @property
    def inputs(self) -> list[Declared]:
        return [_declared(each, each.optional) for each in self.config.input]

    @property
    def outputs(self) -> list[Declared]:
        return [_declared(each, False) for each in self.config.output]

    @property
    def versions(self) -> dict[int, Path]:
        """Version folders by their numbers, as the server counts them."""
        folders = [each for each in self.folder.iterdir() if each.is_dir() and each.name.isdecimal()]
        return {int(each.name): each for each in sorted(folders) if not each.name.startswith("0")}


def check(path: Path) -> list[Problem]:
    """Everything that is wrong with the repository at `path`; empty if nothing is. InputError if there is none."""
    if not path.is_dir():
        raise InputError("repository_missing", f"'{path}' is not a directory", "", "Name a model repository.")
    problems = list(_manifest(path))
    models: dict[str, Model] = {}
    folders = sorted(each for each in path.iterdir() if each.is_dir())
    if not folders:
        problems.append(Problem(path.name, "it holds no models"))
    for folder in folders:
        parsed = _parse(folder)
        if isinstance(parsed, Problem):
            problems.append(parsed)
        else:
            models[folder.name] = parsed
    for model in models.values():
        problems += (_placed(model.name, each) for each in _model(model))
    for model in models.values():
        if model.backend == "ensemble":
            problems += (_placed(model.name, each) for each in _ensemble(model, models))
    return problems


def _placed(model: str, found: str | Problem) -> Problem:
    return Problem(model, found) if isinstance(found, str) else found


def _warning(model: Model, what: str) -> Problem:
    return Problem(model.name, what, "warning")


def _manifest(path: Path) -> Iterator[Problem]:
    """What the manifest promises and the files do not hold."""
    try:
        repository = Repository.open(path)
    except FssError as error:
        yield Problem(MANIFEST, error.line())
        return
    promised: Mapping[str, Mapping[str, Any]] = repository.manifest["files"]
    found = seals(path)
    for name, entry in promised.items():
        if name not in found:
            yield Problem(name, "the file is missing")
        elif found[name]["bytes"] != entry["bytes"]:
            yield Problem(name, f"it has {found[name]['bytes']} bytes instead of {entry['bytes']}")
        elif found[name]["sha256"] != entry["sha256"]:
            yield Problem(name, "it does not match its sha256")
    for name in sorted(set(found) - set(promised)):
        yield Problem(name, "no manifest knows this file: was a promotion interrupted, or something added by hand?")
    for model in repository.models:
        if not (path / model / CONFIG).is_file():
            yield Problem(model, "the model is missing")
        served = [int(each.name) for each in (path / model).glob("[1-9]*") if each.name.isdecimal()]
        if served and max(served) != repository.version(model):
            yield Problem(model, f"the server would take version {max(served)}, not {repository.version(model)}")


def _parse(folder: Path) -> Model | Problem:
    from google.protobuf import text_format

    config = protobuf().ModelConfig()
    if folder.name.startswith("."):
        return Problem(folder.name, "a hidden folder is a model without a name to the server: remove it", "warning")
    try:
        text = (folder / CONFIG).read_text("utf-8")
        text_format.Parse(text, config)
    except (OSError, UnicodeDecodeError) as error:
        return Problem(folder.name, f"{CONFIG} cannot be read: {error.__class__.__name__}")
    except text_format.ParseError as error:
        return Problem(folder.name, f"{CONFIG} line {error}")
    if not config.ListFields():
        return Problem(folder.name, f"{CONFIG} is empty, which the server would accept")
    return Model(folder, config)


def _model(model: Model) -> Iterator[str | Problem]:
    """What is wrong with a model by itself."""
    config = model.config
    if config.name and config.name != model.name:
        yield f"the config is of a model '{config.name}'; the server wants the folder's name"
    if not model.backend:
        yield "the config names neither a backend nor a platform"
    unknown = [field.name for field, _ in config.ListFields() if field.name == "model_metrics"]
    if unknown:
        yield f"server 2.51 does not know the field '{unknown[0]}'"
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}"
    for kind, tensors in (("input", model.inputs), ("output", model.outputs)):
        if not tensors:
            yield f"it declares no {kind}"
        names = [tensor.name for tensor in tensors]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"it declares the {kind} '{name}' twice"
        for tensor in tensors:
            if tensor.data_type == "TYPE_INVALID":
                yield f"'{tensor.name}' has no data_type"
            if problem := dims_problem(tensor.name, tensor.dims):
                yield problem
    if config.response_cache.enable:
        yield "its response cache is on: answers would outlive the weights and the bank they came from"
    yield from _scheduling(model)
    yield from _parameters(model)
    yield from _accelerators(model)
    yield from _versions(model)
    yield from _warmup(model)


def _scheduling(model: Model) -> Iterator[str | Problem]:
    config, most = model.config, model.config.max_batch_size
    if model.backend == "ensemble":
        if config.instance_group:
            yield "an ensemble has no instance_group"
        if not config.ensemble_scheduling.step:
            yield "an ensemble needs steps"
        if config.model_warmup:
            yield "an ensemble cannot be warmed up: warm up its members"
        return
    for size in config.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= most:
            yield f"its preferred batch of {size} is not within max_batch_size {most}"
    if not config.instance_group:
        default = "two instances on a CPU" if model.backend == "onnxruntime" else "as many as it has GPUs"
        yield _warning(model, f"it has no instance_group: the server would choose, {default}")
    for group in config.instance_group:
        kind = type(group).Kind.Name(group.kind)
        if group.count < 1 and model.backend == "onnxruntime" and kind == "KIND_CPU":
            yield _warning(model, "its instance_group has no count: ONNX Runtime would take two")
        if model.backend == "tensorrt" and kind != "KIND_GPU":
            yield f"TensorRT runs on GPUs only, its instance_group is {kind}"


def _parameters(model: Model) -> Iterator[str | Problem]:
    written = model.config.parameters[VERSION].string_value if VERSION in model.config.parameters else None
    if written is None:
        yield _warning(model, "it does not say which fssdeploy wrote it")
    elif written != __version__:
        yield f"fssdeploy {written} wrote it, this is {__version__}: its code would refuse to run"


def _accelerators(model: Model) -> Iterator[str]:
    for device, known in _ACCELERATORS.items():
        chosen = getattr(model.config.optimization.execution_accelerators, f"{device}_execution_accelerator")
        for each in chosen:
            if each.name not in known:
                yield f"there is no accelerator '{each.name}' for {device.upper()}s, only {' and '.join(known)}"


def _versions(model: Model) -> Iterator[str | Problem]:
    """The version folders, whole or not: a server hangs for ever on a Python model without its file."""
    for folder in (each for each in sorted(model.folder.iterdir()) if each.is_dir()):
        if folder.name in _KNOWN_FOLDERS or folder in model.versions.values():
            continue
        if folder.name[:1].isdecimal() and not folder.name.startswith("0"):
            yield f"the server would read the folder '{folder.name}' as version {int(_leading(folder.name))}"
        else:
            yield _warning(model, f"the server ignores the folder '{folder.name}'")
    versions = model.versions
    if not versions:
        yield "it has no version folder"
    for version in model.config.version_policy.specific.versions:
        if version not in versions:
            yield f"its version policy names version {version}, which is not there"
    for version, folder in versions.items():
        for problem in _version(model, folder):
            yield Problem(f"{model.name}/{version}", problem)


def _leading(text: str) -> str:
    return text[: next((index for index, each in enumerate(text) if not each.isdecimal()), len(text))]


def _version(model: Model, folder: Path) -> Iterator[str]:
    """What one version lacks."""
    if model.backend == "python":
        yield from _code(folder / MODEL_CODE)
    if model.backend == "tensorrt":
        plan = folder / (model.config.default_model_filename or PLAN)
        if not plan.is_file() or not plan.stat().st_size:
            yield f"the plan '{plan.name}' is missing"
    if model.backend == "onnxruntime" or (model.backend == "python" and (folder / GRAPH).exists()):
        yield from _graph(model, folder / (model.config.default_model_filename or GRAPH))
    if ARTIFACT in model.config.parameters:
        try:
            Artifact.open(folder / model.config.parameters[ARTIFACT].string_value).verify()
        except FssError as error:
            yield error.line()


def _code(file: Path) -> Iterator[str]:
    """A Python model's file, which must hold or import TritonPythonModel. Nothing but our own package is run."""
    if not file.is_file():
        yield f"{file.name} is missing: the server would wait for it for ever"
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        yield f"{file.name} is not Python: {error}"
        return
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
            yield from _import(node)
    if "TritonPythonModel" not in names:
        yield f"{file.name} has no TritonPythonModel"


def _import(node: ast.ImportFrom) -> Iterator[str]:
    if not (node.module or "").startswith("fssdeploy."):
        return
    try:
        module = importlib.import_module(str(node.module))
        missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
    except ImportError as error:
        yield f"{MODEL_CODE} cannot import: {error}"
        return
    for name in missing:
        yield f"{MODEL_CODE} imports '{name}', which {node.module} has not"


def _graph(model: Model, file: Path) -> Iterator[str]:
    """A graph, held to the rules of the ONNX Runtime backend, or of our own code where the backend is python."""
    if not file.is_file():
        yield f"the graph '{file.name}' is missing"
        return
    try:
        graph = OnnxRuntimeEngine({file.name: file}, {}, threads=1).declared(file.name)
    except FssError as error:
        yield error.line()
        return
    most = model.config.max_batch_size
    fixed = [tensor.name for tensor in graph.inputs if tensor.shape[:1] != (BATCH,)]
    inputs, outputs = model.inputs, model.outputs
    if model.backend == "python" and fixed and most:  # its code runs such a graph row by row
        most, (inputs, outputs) = 0, (_with_row(side) for side in (inputs, outputs))
    yield from graph_problems(most, inputs, outputs, graph)
    if model.backend == "onnxruntime" and not most and not fixed:
        yield "its graph takes any batch and max_batch_size is 0: a server that completes configs would set it to 4"


def _with_row(tensors: Sequence[Declared]) -> list[Declared]:
    return [Declared(each.name, each.data_type, (1, *each.dims), each.optional) for each in tensors]


def _warmup(model: Model) -> Iterator[str]:
    declared = {tensor.name: tensor for tensor in model.inputs}
    most = max(1, model.config.max_batch_size)
    for request in model.config.model_warmup:
        if not 1 <= request.batch_size <= most:
            yield f"warm-up '{request.name}' has a batch of {request.batch_size}, allowed is 1 to {most}"
        for name in sorted(set(request.inputs) - set(declared)):
            yield f"warm-up '{request.name}' has an input '{name}', the model has not"
        for name, tensor in declared.items():
            if name in request.inputs:
                for problem in _sample(model, tensor, request.inputs[name]):
                    yield f"warm-up '{request.name}', input '{name}': {problem}"
            elif not tensor.optional:
                yield f"warm-up '{request.name}' lacks the input '{name}'"


def _sample(model: Model, tensor: Declared, sample: Any) -> Iterator[str]:
    kind = protobuf().DataType.Name(sample.data_type)
    if kind != tensor.data_type:
        yield f"it is {kind}, the model wants {tensor.data_type}"
        return
    if not _agree(sample.dims, tensor.dims) or any(dim < 1 for dim in sample.dims):
        yield f"it has the dims {list(sample.dims)}, the model wants {list(tensor.dims)}"
        return
    count = math.prod(sample.dims)
    if not sample.input_data_file:
        if kind == "TYPE_STRING":
            yield "made-up text is empty, which no decoder takes: give a file"
        return
    file = model.folder / SAMPLES / sample.input_data_file
    try:
        data = file.read_bytes()
    except OSError:
        yield f"its file {SAMPLES}/{file.name} is missing"
        return
    if kind == "TYPE_STRING":
        try:
            found = len(unpack_strings(data))
        except ValueError as error:
            yield f"its file {SAMPLES}/{file.name} is not elements behind their lengths: {error}"
            return
        if found != count:
            yield f"its file {SAMPLES}/{file.name} has {found} elements instead of {count}"
        return
    wanted = count * _bytes_each(kind)
    if len(data) != wanted:
        yield f"its file {SAMPLES}/{file.name} has {len(data)} bytes instead of {wanted}"


def _bytes_each(kind: str) -> int:
    return {"TYPE_BOOL": 1, "TYPE_BF16": 2}.get(kind) or int("".join(filter(str.isdecimal, DTYPES[kind]))) // 8


def _ensemble(model: Model, models: Mapping[str, Model]) -> Iterator[str | Problem]:
    """Whether the tensors of an ensemble chain: the rules by which the server validates it."""
    most = model.config.max_batch_size
    tensors: dict[str, tuple[str, bool, Declared]] = {}  # by ensemble tensor: who declared it first, with a batch?, how
    for tensor in (*model.inputs, *model.outputs):
        tensors[tensor.name] = (model.name, most > 0, tensor)
    produced = {tensor.name: "the request" for tensor in model.inputs}
    used: set[str] = set()
    for step in model.config.ensemble_scheduling.step:
        member = models.get(step.model_name)
        if member is None:
            yield f"its member '{step.model_name}' is not in the repository"
            produced |= dict.fromkeys(step.output_map.values(), step.model_name)
            used |= set(step.input_map.values())
            continue
        batch = member.config.max_batch_size
        if 0 < batch < most:
            yield f"it allows a batch of {most}, its member '{member.name}' only {batch}"
        if step.model_version > 0 and step.model_version not in member.versions:
            yield f"its member '{member.name}' has no version {step.model_version}"
        sides = (("input", step.input_map, member.inputs), ("output", step.output_map, member.outputs))
        for kind, mapping, declared in sides:
            own = {tensor.name: tensor for tensor in declared}
            for name in sorted(set(mapping) - set(own)):
                yield f"its member '{member.name}' has no {kind} '{name}'"
            for name in (each for each in own if each in mapping):
                first, batched, other = tensors.setdefault(mapping[name], (member.name, batch > 0, own[name]))
                if problem := _inconsistent(other, batched, own[name], batch > 0):
                    yield f"tensor '{mapping[name]}' is {problem} in '{first}' and '{member.name}'"
        for tensor in member.inputs:
            if tensor.name not in step.input_map and not tensor.optional:
                yield f"input '{tensor.name}' of its member '{member.name}' is fed by nothing"
        for name in step.output_map.values():
            if name in produced:
                yield f"tensor '{name}' comes from {produced[name]} and from '{member.name}'"
            produced[name] = f"'{member.name}'"
        used |= set(step.input_map.values())
    for name in sorted(used - set(produced)):
        yield f"tensor '{name}' is used and comes from nowhere"
    for tensor in model.inputs:
        if tensor.name not in used:
            yield f"its input '{tensor.name}' is not used"
    for tensor in model.outputs:
        if tensor.name not in produced:
            yield f"its output '{tensor.name}' comes from no member"
    yield from _order(model)


def _order(model: Model) -> Iterator[str | Problem]:
    """Steps that wait for each other, and steps that run beside each other."""
    ready = {tensor.name for tensor in model.inputs}
    steps = list(model.config.ensemble_scheduling.step)
    anywhere = ready | {name for step in steps for name in step.output_map.values()}
    while steps:
        able = [step for step in steps if (set(step.input_map.values()) & anywhere) <= ready]
        if not able:
            yield f"its members {', '.join(repr(step.model_name) for step in steps)} wait for each other"
            return
        if len(able) > 1:
            together = " and ".join(repr(step.model_name) for step in able)
            yield _warning(model, f"its members {together} run together: server 2.51 crashes when one of them fails")
        ready |= {name for step in able for name in step.output_map.values()}
        steps = [step for step in steps if step not in able]


def _inconsistent(one: Declared, one_batched: bool, other: Declared, other_batched: bool) -> str:
    """How two declarations of a tensor contradict each other; empty if they do not."""
    if one.data_type != other.data_type:
        return f"{one.data_type} and {other.data_type}"
    full = [
        [-1, *dims] if batched else list(dims)
        for dims, batched in ((one.dims, one_batched), (other.dims, other_batched))
    ]
    if _agree(one.dims, other.dims) or _agree(*full):
        return ""
    return f"{full[0]} and {full[1]}"


def _agree(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether dims are equal where neither is free."""
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _declared(tensor: Any, optional: bool) -> Declared:
    return Declared(tensor.name, protobuf().DataType.Name(tensor.data_type), tuple(tensor.dims), optional)
