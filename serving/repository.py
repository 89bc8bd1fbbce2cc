"""A model repository on disk: written complete or not at all, sealed by a manifest, read again.

    <repository>/manifest.json                    what wrote it, from which artifacts, the sha256 of every file
    <repository>/<model>/config.pbtxt
    <repository>/<model>/warmup/<input>           the sample by which the server warms the model up
    <repository>/<model>/<version>/model.onnx, encoder.onnx.data | model.py | artifact/

The server looks at folders only and ignores the manifest. Files of an artifact are hard links where the file system
allows it: the three models that hold the encoder's weights share them.
"""

from __future__ import annotations

import io
import json
import os
import py_compile
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fssdeploy import __version__
from fssdeploy.artifact import MANIFEST, Artifact, digest, file_sha256, has_glue, load
from fssdeploy.deployment import REHEARSAL
from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.files import staged_folder, storage_error, sync_folder
from fssdeploy.protocol import Engine
from fssdeploy.report import Report, Table
from fssdeploy.serving.configs import Options, configs, protobuf, row_by_row, text
from fssdeploy.serving.models.prepare import pack
from fssdeploy.serving.names import ARTIFACT, CONFIG, GRAPH, MODEL_CODE, PLAN, SAMPLES, STAGES, Names
from fssdeploy.serving.rules import DTYPES

# Rows of a stage with shared inputs: what glue asks at a time for a decoder, and what graphs are exported for at most.
PROMPTS_AT_A_TIME, MOST_ROWS = 16, 1024
FORMAT = 1
FIRST_VERSION = 1
COMPILED = "__pycache__"  # the server adds to it, so that no manifest lists it

ORDINARY = (640, 480)  # width and height of the picture that warms up the enrolled path
# An input of a sample: an array with its batch dimension, or the files of a text input.
Sample = Mapping[str, np.ndarray | Sequence[bytes]]


@dataclass(frozen=True)
class Repository:
    """A repository with an intact manifest; what it says of the files is checked by `fssdeploy.serving.check`."""

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Repository:
        """Read the manifest. InputError if there is none; IntegrityError if it is damaged, altered or too new."""
        folder = Path(path)
        file = folder / MANIFEST
        try:
            manifest = json.loads(file.read_text("utf-8"))
            if manifest["format"] != FORMAT:
                raise IntegrityError(
                    "repository_format",
                    f"'{folder}' has repository format {manifest['format']}",
                    f"this version reads format {FORMAT}",
                    "Write it again with this version.",
                )
            entries = [manifest["files"], manifest["options"], manifest["fssdeploy"]]
            entries += [entry["versions"][str(entry["current"])] for entry in manifest["systems"].values()]
            whole = all(entries) and manifest["digest"] == digest(manifest)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                "repository_missing",
                f"'{folder}' is not a repository that fssdeploy wrote",
                f"it holds no {MANIFEST}",
                "Name a directory that fssdeploy repo wrote.",
            ) from error
        except OSError as error:
            raise storage_error(error, file) from error
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, "it is not what fssdeploy repo writes") from error
        if not whole:
            raise _damaged(file, "its digest does not match its content")
        return Repository(folder, manifest)

    @property
    def systems(self) -> list[Names]:
        """The systems served, each by its names."""
        return [
            Names(name, tuple(entry["stages"]), entry["chained"]) for name, entry in self.manifest["systems"].items()
        ]

    @property
    def options(self) -> Options:
        return Options(**self.manifest["options"])

    @property
    def models(self) -> list[str]:
        """Every model of every system."""
        return [model for names in self.systems for model in names.all]

    def version(self, model: str) -> int:
        """The version of a model that is to be served: the artifact's for those that carry weights."""
        for names in self.systems:
            if model in names.versioned:
                return int(self.manifest["systems"][names.system]["current"])
        return FIRST_VERSION


def write_repository(
    artifacts: Sequence[str],
    out: str | os.PathLike[str],
    options: Options,
    plans: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Write a repository that serves these artifacts, each ``DIR`` or ``NAME=DIR``, at `out`, which must be new.

    `plans` holds ``<stage>.plan`` for the backend tensorrt. Raises InputError, IntegrityError (an artifact is damaged)
    or MachineError; in all cases nothing stays behind.
    """
    target = Path(os.path.realpath(out))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(
            "out_occupied",
            f"'{target}' exists",
            "a server may be using it",
            "Choose another --out; to serve new weights from it, run fssdeploy repo promote.",
        )
    systems = _named(artifacts)
    seal: dict[str, Any] = {"format": FORMAT, "fssdeploy": __version__, "options": asdict(options), "systems": {}}
    table = Table("models", ["model", "backend", "inputs", "outputs"], [])
    with staged_folder(target) as folder:
        try:
            for name, artifact in systems.items():
                progress(f"writing {name}")
                artifact.verify()
                names = names_of(name, artifact)
                written = _write_system(folder, names, artifact, options, plans)
                parts = {"stages": list(names.parts), "chained": names.chained}
                seal["systems"][name] = {**parts, "current": FIRST_VERSION, "last": FIRST_VERSION, "versions": {}}
                seal["systems"][name]["versions"][str(FIRST_VERSION)] = origin(artifact)
                table.rows += [_row(config) for config in written.values()]
            progress("sealing")
            seal["files"] = seals(folder)
            (folder / MANIFEST).write_text(sealed_text(seal), "utf-8")
            sync_tree(folder)
            if target.exists():
                target.rmdir()
            os.rename(folder, target)
            sync_folder(target.parent)
        except OSError as error:
            raise storage_error(error, target) from error
    notes = [f"{name}: {artifact.weights_note}" for name, artifact in systems.items() if artifact.weights_note]
    facts = {"repository": str(out), "systems": ", ".join(systems), **asdict(options)}
    data = {"repository": str(out), "systems": list(systems), "models": [row[0] for row in table.rows]}
    if options.backend != "python":
        notes += [
            f"{name}: its graphs take one row, so that '{name}' takes one picture and one shot. For more, export with "
            "--dynamic-batch or use --backend python."
            for name, artifact in systems.items()
            if names_of(name, artifact).chained and any(map(row_by_row, artifact.specs.values()))
        ]
    notes.append(f"Run it: fssdeploy serve {out}")
    return Report("repository", facts, [table], notes, {**data, "options": asdict(options)})


def write_version(
    folder: Path, model: str, names: Names, artifact: Artifact, options: Options, plans: Path | None
) -> None:
    """Write one version of a model, complete and compiled, into the new folder `folder`."""
    folder.mkdir(parents=True)
    stage = next((stage for stage in names.parts if names.stage(stage) == model), None)
    code = {
        names.enroll: "from fssdeploy.serving.models.enroll import",
        names.segment: "from fssdeploy.serving.models.segment import",
        names.prepare_query: "from fssdeploy.serving.models.prepare import PrepareQuery as",
        names.prepare_support: "from fssdeploy.serving.models.prepare import PrepareSupport as",
        names.merge_shots: "from fssdeploy.serving.models.merge import MergeShots as",
        names.finish: "from fssdeploy.serving.models.finish import Finish as",
        **({} if names.chained else {names.stateless: "from fssdeploy.serving.models.once import"}),
    }.get(model)
    if stage is not None:
        _write_graph(folder, stage, artifact, options, plans)
        if options.backend == "python":
            code = "from fssdeploy.serving.models.graph import PythonGraph as"
    if model in names.holders:
        (folder / ARTIFACT).mkdir()
        for name in (MANIFEST, *artifact.manifest["files"]):
            link(artifact.path / name, folder / ARTIFACT / name)
    if model == names.stateless and names.chained:  # the server wants a version folder; copying tools drop empty ones
        (folder / ".keep").touch()
    if code:
        file = folder / MODEL_CODE
        file.write_text(f"{code} TritonPythonModel  # noqa: F401\n")
        # The server would compile it on first use and thereby change the folder's time, for which it would load the
        # model once more. By content, so that a copied repository needs no new compilation.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        py_compile.compile(str(file), dfile=MODEL_CODE, doraise=True, invalidation_mode=mode)


def link(source: Path, target: Path) -> None:
    """`target` as a second name of the file `source`, or as a copy where the file system knows no such thing."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def origin(artifact: Artifact) -> dict[str, str]:
    """What a manifest says of the artifact behind a version."""
    manifest = artifact.manifest
    entries = {"name": artifact.name, "precision": manifest["precision"], "weights": manifest["weights"]["status"]}
    return {**entries, "digest": manifest["digest"], "fingerprint": artifact.fingerprint}


def seals(folder: Path, under: Path | None = None) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a repository (or of the part `under` it), by its path in it."""
    known: dict[tuple[int, int], str] = {}  # files with several names are read once
    found = {}
    for path in sorted((under or folder).rglob("*")):
        if not path.is_file() or COMPILED in path.parts or path == folder / MANIFEST:
            continue
        status = path.stat()
        key = (status.st_dev, status.st_ino)
        if key not in known:
            known[key] = file_sha256(path)
        found[path.relative_to(folder).as_posix()] = {"bytes": status.st_size, "sha256": known[key]}
    return found


def sealed_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON, with its digest."""
    content = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "digest"}))
    return json.dumps({**content, "digest": digest(content)}, indent=1)


def sync_tree(folder: Path) -> None:
    """Force a folder and all below it to disk, so that a rename cannot overtake it."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """The inputs of a model's first warm-up request, as a client sends them; text as an array of objects.

    Empty for a model without one. Raises IntegrityError if config or files cannot be read.
    """
    from google.protobuf import text_format

    try:
        config = text_format.Parse((folder / CONFIG).read_text("utf-8"), protobuf().ModelConfig())
        if not config.model_warmup:
            return {}
        inputs = {}
        for name, tensor in config.model_warmup[0].inputs.items():
            data = (folder / SAMPLES / tensor.input_data_file).read_bytes()
            shape = ([1] if config.max_batch_size else []) + list(tensor.dims)
            kind = protobuf().DataType.Name(tensor.data_type)
            text_ = kind == "TYPE_STRING"
            array = object_array(unpack_strings(data)) if text_ else np.frombuffer(data, DTYPES[kind])
            inputs[name] = array.reshape(shape)
        return inputs
    except (OSError, ValueError, KeyError, text_format.ParseError) as error:
        raise IntegrityError(
            "sample_damaged", f"the sample of '{folder.name}' cannot be read", str(error), "Write the repository again."
        ) from error


def pack_strings(elements: Sequence[bytes]) -> bytes:
    """Elements of a text tensor as the server stores them: each behind its length, 4 bytes, little-endian."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpack_strings(data: bytes) -> list[bytes]:
    """The elements in such data. Raises ValueError where a length does not fit."""
    elements, start = [], 0
    while start < len(data):
        if start + 4 > len(data):
            raise ValueError("the length of an element is cut off")
        (length,) = struct.unpack_from("<I", data, start)
        start += 4 + length
        if start > len(data):
            raise ValueError(f"an element of {length} bytes is promised and cut off")
        elements.append(data[start - length : start])
    return elements


def object_array(elements: Sequence[bytes]) -> np.ndarray:
    """Elements as the array of objects that clients and models use for text: others cut off zeros at the end."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def sample_shot(number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A rendered picture uint8 (256, 256, 3) with an object, and its mask, bool: shapes-5i has any number of them."""
    from fssdeploy.data.shapes import ShapesDataset

    dataset = ShapesDataset()
    picture, mask = dataset.load(dataset.listing(0, "test", 0)[0][number], 0)
    return picture, mask == 1


def png(array: np.ndarray) -> bytes:
    """A picture uint8 or a mask bool as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _named(artifacts: Sequence[str]) -> dict[str, Artifact]:
    """Artifacts by the name of their system. InputError for two equal names, also where two models would share one."""
    found: dict[str, Artifact] = {}
    taken: dict[str, str] = {}
    for text_ in artifacts:
        name, separator, path = text_.partition("=")
        artifact = Artifact.open(path if separator else text_)
        names = names_of(name if separator else artifact.manifest["system"], artifact)
        clash = next((model for model in names.all if model in taken), None)
        if clash:
            raise InputError(
                "system_twice",
                f"two systems would have a model '{clash}'",
                f"their names are '{taken[clash]}' and '{names.system}'",
                "Choose another name for one: NAME=ARTIFACT.",
            )
        taken |= dict.fromkeys(names.all, names.system)
        found[names.system] = artifact
    if not found:
        raise InputError("no_artifacts", "there is nothing to serve", "", "Name at least one artifact.")
    return found


def _write_system(
    folder: Path, names: Names, artifact: Artifact, options: Options, plans: Path | None
) -> dict[str, dict[str, Any]]:
    """All models of a system; their configs by name."""
    samples = (_samples_of_chain if names.chained else _samples)(names, artifact)
    if options.device != "cpu":  # the server, while it loads a model, takes none of the calls that this one makes then
        samples = {model: sample for model, sample in samples.items() if model not in names.holders}
    shapes = {model: {name: np.shape(value) for name, value in sample.items()} for model, sample in samples.items()}
    served = configs(names, artifact.specs, artifact.manifest["preprocessing"], options, shapes)
    for model, config in served.items():
        write_version(folder / model / str(FIRST_VERSION), model, names, artifact, options, plans)
        (folder / model / CONFIG).write_text(text(config), "utf-8")
        if model in samples:
            (folder / model / SAMPLES).mkdir()
        for name, value in samples.get(model, {}).items():
            data = value.tobytes() if isinstance(value, np.ndarray) else pack_strings(value)
            (folder / model / SAMPLES / name).write_bytes(data)
    return served


def names_of(name: str, artifact: Artifact) -> Names:
    """The models by which a system is served under a name. InputError for a name that cannot be."""
    return Names(name, tuple(artifact.specs), not has_glue(artifact.manifest["system"]))


class _Recorder:
    """An engine that keeps what each stage was first given."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.specs, self.describe = engine.name, engine.specs, engine.describe
        self.given: dict[str, dict[str, np.ndarray]] = {}
        self._engine = engine

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.given.setdefault(stage, {name: np.ascontiguousarray(array) for name, array in inputs.items()})
        return self._engine.run(stage, inputs)


def _samples(names: Names, artifact: Artifact) -> dict[str, Sample]:
    """A real request for every model that the server can warm up: what its stages are given for a rendered picture."""
    system = load(artifact.path, threads=1, verify=False)
    system.engine = recorder = _Recorder(system.engine)
    picture, mask = sample_shot()
    features = system.encode([picture])
    system.segment(system.encode([picture]), {"sample": system.enroll(features, [mask])})
    ordinary = png(np.asarray(Image.fromarray(picture).resize(ORDINARY)))
    return {
        **{names.stage(stage): dict(inputs) for stage, inputs in recorder.given.items()},
        names.segment: {"picture": [ordinary], "names": [REHEARSAL.encode()]},
        names.stateless: {"pictures": [ordinary], "support_pictures": [png(picture)], "support_masks": [png(mask)]},
    }


def _samples_of_chain(names: Names, artifact: Artifact) -> dict[str, Sample]:
    """A real request for every model that the server can warm up: one shot, and the same picture as the query."""
    system = load(artifact.path, threads=1, verify=False)
    picture, mask = sample_shot()
    canvases, placements = system.preprocessing.fit_pictures([picture])
    canvases = np.ascontiguousarray(canvases)
    masks = system.preprocessing.fit_masks([mask], placements)
    specs = artifact.specs
    missing = [stage for stage in STAGES if stage not in specs]
    if missing:
        raise InputError(
            "stage_missing",
            f"artifact '{artifact.path}' has no stage '{missing[0]}'",
            f"it holds {', '.join(specs)}",
            "Export it with --components all.",
        )
    known: dict[str, np.ndarray] = {specs["encoder"].inputs[0].name: canvases, "mask": masks}
    samples: dict[str, Sample] = {}
    state: dict[str, np.ndarray] = {}
    for stage in STAGES:
        inputs = {tensor.name: np.ascontiguousarray(known[tensor.name]) for tensor in specs[stage].inputs}
        samples[names.stage(stage)] = inputs
        outputs = system.engine.run(stage, inputs)
        state = outputs if stage == "enroll" else state
        known |= outputs
    packed = pack(placements)
    ordinary = np.asarray(Image.fromarray(picture).resize(ORDINARY))
    return {
        **samples,
        names.prepare_query: {"pictures": [png(picture)]},
        names.prepare_support: {"pictures": [png(picture)], "masks": [png(mask)]},
        names.segment: {"picture": [png(ordinary)], "names": [REHEARSAL.encode()]},
        names.merge_shots: {**state, "placements": packed, "picture": canvases},
        names.finish: {"mask_logits": known["mask_logits"], "placements": packed},
    }


def _write_graph(folder: Path, stage: str, artifact: Artifact, options: Options, plans: Path | None) -> None:
    if options.backend == "tensorrt":
        plan = plans / f"{stage}.plan" if plans else None
        if plan is None or not plan.is_file():
            raise InputError(
                "plan_missing",
                f"there is no TensorRT plan for stage '{stage}'",
                f"'{plan}' does not exist"
                if plan
                else "a plan is built on the GPU and in the image that will serve it",
                f"Build it there: {plan_command(stage, artifact, options)}; then name its folder with --plans.",
            )
        link(plan, folder / PLAN)
        return
    link(artifact.graph(stage, "onnxruntime"), folder / GRAPH)
    weights = artifact.manifest["stages"][stage]["files"]["weights"]
    link(artifact.path / weights, folder / weights)  # the graph names this file


def plan_command(stage: str, artifact: Artifact, options: Options) -> str:
    """The command that builds a TensorRT plan of a stage for the batches that the options allow."""
    spec = artifact.specs[stage]
    command = f"trtexec --onnx={artifact.graph(stage, 'portable').name} --saveEngine={stage}.plan"
    if row_by_row(spec):
        return command
    # Of a stage with shared inputs the rows are prompts or references of one picture, whatever the batch of requests.
    usual, most = (PROMPTS_AT_A_TIME, MOST_ROWS) if spec.shared else (options.max_batch, options.max_batch)
    free = [each for each in spec.inputs if each.name not in spec.shared]
    for bound, rows in (("min", 1), ("opt", usual), ("max", most)):
        shapes = (f"{each.name}:{'x'.join(map(str, (rows, *each.shape[1:])))}" for each in free)
        command += f" --{bound}Shapes={','.join(shapes)}"
    return command


def _row(config: Mapping[str, Any]) -> list[Any]:
    def listed(side: str) -> str:
        batch = "batch x " if config["max_batch_size"] else ""
        return "\n".join(
            f"{each['name']} {each['data_type'].removeprefix('TYPE_')} {batch}{' x '.join(map(str, each['dims']))}"
            for each in config[side]
        )

    return [config["name"], config.get("backend", config.get("platform")), listed("input"), listed("output")]


def _damaged(file: Path, why: str) -> IntegrityError:
    return IntegrityError("repository_damaged", f"'{file}' cannot be trusted", why, "Write the repository again.")
