"""Every mistake that a server refuses, hangs on or accepts without a word is found without a server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fssdeploy.artifact import MANIFEST
from fssdeploy.errors import InputError
from fssdeploy.serving.check import check
from fssdeploy.serving.configs import Options
from fssdeploy.serving.names import Names
from fssdeploy.serving.repository import write_repository
from tests.cli.command import fssdeploy
from tests.serving.grey import write_artifact

NAMES = Names("grey")
ENCODER, ENSEMBLE, QUERY, FINISH = NAMES.stage("encoder"), NAMES.stateless, NAMES.prepare_query, NAMES.finish

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    write_repository([str(write_artifact(folder / "artifact"))], folder / "repository", Options())
    return folder / "repository"


@pytest.fixture
def repository(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "repository"))


def edit(model: str, pattern: str, replacement: str, count: int = 1) -> Change:
    """Change the text of a config; the pattern must be there."""

    def change(folder: Path) -> None:
        file = folder / model / "config.pbtxt"
        text, found = re.subn(pattern, replacement, file.read_text(), count=count, flags=re.DOTALL)
        assert found, pattern
        file.write_text(text)

    return change


def add(model: str, text: str) -> Change:
    def change(folder: Path) -> None:
        with (folder / model / "config.pbtxt").open("a") as stream:
            stream.write(text)

    return change


def write(path: str, data: bytes) -> Change:
    return lambda folder: (folder / path).write_bytes(data)


def remove(path: str) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


def make(path: str) -> Change:
    return lambda folder: (folder / path).mkdir(parents=True)


CODE = b"from fssdeploy.serving.models.finish import Finish as TritonPythonModel\n"
MISTAKES: dict[str, tuple[Change, str, str]] = {
    # name: what is done, where it is found, a part of what is said
    "unknown field": (add(ENCODER, "max_batchsize: 3\n"), ENCODER, r"line \d+:\d+.*max_batchsize"),
    "unknown enum": (edit(ENCODER, "TYPE_UINT8", "UINT8"), ENCODER, "UINT8"),
    "no text": (write(f"{ENCODER}/config.pbtxt", b"\xff\xfe"), ENCODER, "cannot be read"),
    "no config": (remove(f"{ENCODER}/config.pbtxt"), ENCODER, "cannot be read"),
    "empty config": (write(f"{QUERY}/config.pbtxt", b""), QUERY, "empty"),
    "field of newer servers": (add(FINISH, "model_metrics { }\n"), FINISH, "model_metrics"),
    "other name": (edit(ENCODER, 'name: "grey_stage_encoder"', 'name: "other"'), ENCODER, "a model 'other'"),
    "no backend": (edit(QUERY, 'backend: "python"', ""), QUERY, "neither a backend nor a platform"),
    "no outputs": (edit(FINISH, r"output \{.*?\n\}\noutput \{.*?\n\}", ""), FINISH, "declares no output"),
    "no dims": (edit(QUERY, r"dims: -1\n", ""), QUERY, "'pictures' has no dims"),
    "a dim of 0": (edit(FINISH, "dims: 7", "dims: 0"), FINISH, "'placements' has the dims"),
    "twice": (edit(FINISH, 'name: "scores"', 'name: "masks"'), FINISH, "the output 'masks' twice"),
    "negative batch": (edit(ENCODER, "max_batch_size: 8", "max_batch_size: -1"), ENCODER, "max_batch_size is -1"),
    "preferred batch": (
        add(ENCODER, "dynamic_batching { preferred_batch_size: 9 }\n"),
        ENCODER,
        "preferred batch of 9 is not within",
    ),
    "preferred batch without a batch": (
        add(FINISH, "dynamic_batching { preferred_batch_size: 1 }\n"),
        FINISH,
        "preferred batch of 1",
    ),
    "response cache": (add(ENSEMBLE, "response_cache { enable: true }\n"), ENSEMBLE, "response cache"),
    "instances of an ensemble": (add(ENSEMBLE, "instance_group { count: 1 }\n"), ENSEMBLE, "no instance_group"),
    "warm-up of an ensemble": (
        add(ENSEMBLE, 'model_warmup { name: "x" batch_size: 1 }\n'),
        ENSEMBLE,
        "cannot be warmed up",
    ),
    "accelerator": (
        add(
            ENCODER,
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorflow" } } }\n',
        ),
        ENCODER,
        "no accelerator 'tensorflow'",
    ),
    "tensorrt on a CPU": (
        edit(ENCODER, 'backend: "onnxruntime"', 'backend: "tensorrt"'),
        ENCODER,
        "GPUs only",
    ),
    # versions
    "no version": (remove(f"{FINISH}/1"), FINISH, "no version folder"),
    "no model.py": (remove(f"{FINISH}/1/model.py"), f"{FINISH}/1", "for ever"),
    "an incomplete version": (make(f"{FINISH}/2"), f"{FINISH}/2", "for ever"),
    "no Python": (write(f"{FINISH}/1/model.py", b"def:"), f"{FINISH}/1", "is not Python"),
    "no class": (write(f"{FINISH}/1/model.py", b"x = 1"), f"{FINISH}/1", "no TritonPythonModel"),
    "no such module": (
        write(f"{FINISH}/1/model.py", CODE.replace(b"finish", b"finnish")),
        f"{FINISH}/1",
        "cannot import",
    ),
    "no such class": (
        write(f"{FINISH}/1/model.py", CODE.replace(b"Finish", b"Finnish")),
        f"{FINISH}/1",
        "imports 'Finnish'",
    ),
    "no graph": (remove(f"{ENCODER}/1/model.onnx"), f"{ENCODER}/1", "'model.onnx' is missing"),
    "no weights": (remove(f"{ENCODER}/1/encoder.onnx.data"), f"{ENCODER}/1", "cannot be loaded"),
    "no ONNX": (write(f"{ENCODER}/1/model.onnx", b"\0" * 99), f"{ENCODER}/1", "cannot be loaded"),
    "damaged artifact": (
        write(f"{NAMES.segment}/1/artifact/encoder.onnx", b""),
        f"{NAMES.segment}/1",
        "is damaged",
    ),
    "a name that begins with a number": (make(f"{FINISH}/2.old"), FINISH, "as version 2"),
    "a policy for a version that is not there": (
        edit(FINISH, r"latest \{.*?\}", "specific { versions: 4 }"),
        FINISH,
        "names version 4",
    ),
    "another fssdeploy": (edit(FINISH, '"0.1.0"', '"0.0.9"'), FINISH, "fssdeploy 0.0.9 wrote it"),
    # graphs
    "unknown input of a graph": (
        edit(ENCODER, r'(input \{\n  name: )"picture"', r'\1"image"'),
        f"{ENCODER}/1",
        "no input 'image'",
    ),
    "missing input of a graph": (
        edit(NAMES.stage("enroll"), r'input \{\n  name: "mask".*?\n\}', ""),
        f"{NAMES.stage('enroll')}/1",
        "1 inputs, the graph has 2",
    ),
    "type of a graph": (edit(ENCODER, "TYPE_UINT8", "TYPE_FP32"), f"{ENCODER}/1", "TYPE_UINT8 in the graph"),
    "dims of a graph": (edit(ENCODER, "dims: 28", "dims: 27"), f"{ENCODER}/1", r"\[-1, 3, 28, 28\] in the graph"),
    "a free dim for a fixed one": (edit(ENCODER, "dims: 28", "dims: -1"), f"{ENCODER}/1", "in the graph"),
    "rank of a graph": (edit(ENCODER, "dims: 3\n", ""), f"{ENCODER}/1", "in the graph"),
    "batch without max_batch_size": (
        edit(ENCODER, "max_batch_size: 8", "max_batch_size: 0"),
        f"{ENCODER}/1",
        "in the graph",
    ),
    "optional input of a batch": (
        edit(ENCODER, "data_type: TYPE_UINT8", "data_type: TYPE_UINT8\n  optional: true"),
        f"{ENCODER}/1",
        "cannot be optional",
    ),
    # warm-up
    "batch of a warm-up": (edit(ENCODER, "batch_size: 1\n  inputs", "batch_size: 9\n  inputs"), ENCODER, "1 to 8"),
    "input of a warm-up": (edit(ENCODER, 'key: "picture"', 'key: "image"'), ENCODER, "has an input 'image'"),
    "missing input of a warm-up": (edit(ENCODER, 'key: "picture"', 'key: "image"'), ENCODER, "lacks the input"),
    "type of a warm-up": (
        edit(ENCODER, r'(key: "picture".*?)TYPE_UINT8', r"\1TYPE_FP32"),
        ENCODER,
        "the model wants TYPE_UINT8",
    ),
    "dims of a warm-up": (edit(ENCODER, r'(key: "picture".*?)dims: 3', r"\1dims: 4"), ENCODER, "has the dims"),
    "no file of a warm-up": (remove(f"{ENCODER}/warmup/picture"), ENCODER, "warmup/picture is missing"),
    "bytes of a warm-up": (write(f"{ENCODER}/warmup/picture", b"x" * 8), ENCODER, "8 bytes instead of 2352"),
    "a picture without its length": (write(f"{QUERY}/warmup/pictures", b"\x89PNG" * 9), QUERY, "behind their lengths"),
    "two pictures for one": (write(f"{QUERY}/warmup/pictures", b"\1\0\0\0a" * 2), QUERY, "2 elements instead of 1"),
    "made-up pictures": (
        edit(QUERY, 'input_data_file: "pictures"', "zero_data: true"),
        QUERY,
        "made-up text is empty",
    ),
    # ensembles
    "no member": (remove(FINISH), ENSEMBLE, "'grey_finish' is not in the repository"),
    "unused input": (
        add(ENSEMBLE, 'input { name: "more" data_type: TYPE_STRING dims: -1 }\n'),
        ENSEMBLE,
        "input 'more' is not used",
    ),
    "unmade output": (
        add(ENSEMBLE, 'output { name: "more" data_type: TYPE_FP32 dims: -1 }\n'),
        ENSEMBLE,
        "output 'more' comes from no member",
    ),
    "tensor from nowhere": (
        edit(ENSEMBLE, 'value: "mask_logits"(.*)value: "mask_logits"', r'value: "mask_logits"\1value: "logits"'),
        ENSEMBLE,
        "'logits' is used and comes from nowhere",
    ),
    "unfed input of a member": (
        edit(ENSEMBLE, r'input_map \{\n      key: "mask_logits".*?\}', ""),
        ENSEMBLE,
        "'mask_logits' of its member 'grey_finish' is fed by nothing",
    ),
    "unknown input of a member": (
        edit(
            ENSEMBLE,
            'key: "placements"\n      value: "placements"\n    }\n    output_map {\n      key: "masks"',
            'key: "places"\n      value: "placements"\n    }\n    output_map {\n      key: "masks"',
        ),
        ENSEMBLE,
        "'grey_finish' has no input 'places'",
    ),
    "unknown output of a member": (edit(ENSEMBLE, 'key: "scores"', 'key: "score"'), ENSEMBLE, "no output 'score'"),
    "types of a link": (
        edit(FINISH, r'(name: "placements"\n  data_type: )TYPE_INT32', r"\1TYPE_INT64"),
        ENSEMBLE,
        "TYPE_INT32 and TYPE_INT64",
    ),
    "shapes of a link": (edit(FINISH, "dims: 7", "dims: 6"), ENSEMBLE, r"\[-1, 7\] and \[-1, 6\]"),
    "batch of a member": (
        lambda folder: [edit(ENSEMBLE, 'platform: "ensemble"', 'platform: "ensemble"\nmax_batch_size: 16')(folder)],
        ENSEMBLE,
        "allows a batch of 16, its member 'grey_stage_encoder' only 8",
    ),
    "version of a member": (edit(ENSEMBLE, "model_version: -1", "model_version: 3"), ENSEMBLE, "has no version 3"),
    "one tensor from two members": (
        edit(ENSEMBLE, 'value: "support_canvas"', 'value: "query_canvas"'),
        ENSEMBLE,
        "'query_canvas' comes from",
    ),
    "a circle": (
        edit(
            ENSEMBLE, 'value: "query_canvas"(.*?)value: "query_canvas"', r'value: "query_canvas"\1value: "query_grey"'
        ),
        ENSEMBLE,
        "wait for each other",
    ),
    # files
    "a changed file": (write(f"{QUERY}/warmup/pictures", b"\1\0\0\0a"), f"{QUERY}/warmup/pictures", "bytes instead of"),
    "a file that is gone": (remove(f"{ENCODER}/warmup/picture"), f"{ENCODER}/warmup/picture", "missing"),
    "a file by hand": (write(f"{ENCODER}/notes.txt", b"x"), f"{ENCODER}/notes.txt", "no manifest knows"),
    "a model that is gone": (remove(QUERY), QUERY, "the model is missing"),
    "a newer version": (make(f"{FINISH}/2"), FINISH, "would take version 2, not 1"),
    "no manifest": (remove(MANIFEST), MANIFEST, "not a repository"),
    "altered manifest": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"cpu"', '"gpu"')),
        MANIFEST,
        "digest",
    ),
}


def test_a_sound_repository_has_no_problems(sound: Path) -> None:
    assert check(sound) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str, repository: Path) -> None:
    change, where, what = MISTAKES[mistake]
    change(repository)
    problems = check(repository)
    found = [each for each in problems if each.where == where and re.search(what, each.what)]
    assert found and found[0].severity == "error", problems


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (edit(ENCODER, r"instance_group \{.*?\n\}", ""), ENCODER, "two instances"),
        (edit(ENCODER, r"count: 1\n  kind: KIND_CPU", "kind: KIND_CPU"), ENCODER, "would take two"),
        (edit(ENSEMBLE, r'input_map \{\n      key: "after".*?\}', ""), ENSEMBLE, "run together: server 2.51 crashes"),
        (make(f"{FINISH}/drafts"), FINISH, "ignores the folder"),
        (make(".drafts"), ".drafts", "hidden folder"),
    ],
)
def test_what_is_only_odd_is_a_warning(change: Change, where: str, what: str, repository: Path) -> None:
    change(repository)
    problems = [each for each in check(repository) if each.where == where]
    assert [each.severity for each in problems if what in each.what] == ["warning"]


@pytest.mark.parametrize(("batch", "backend"), [(1, "onnxruntime"), (1, "python"), ("batch", "python")])
def test_other_kinds_of_repositories_are_sound(batch: int | str, backend: str, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", batch)
    write_repository([str(artifact), f"other={artifact}"], tmp_path / "r", Options(backend=backend))
    assert check(tmp_path / "r") == []


def test_code_of_strangers_is_not_run(repository: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    code = f"open({str(proof)!r}, 'w')\nclass TritonPythonModel: pass\n"
    (repository / FINISH / "1" / "model.py").write_text(code)
    assert check(repository) and not proof.exists()


def test_the_command_reports_and_fails(repository: Path, tmp_path: Path) -> None:
    assert fssdeploy("repo", "check", repository, "--json").json["problems"] == []
    remove(f"{FINISH}/1/model.py")(repository)
    answer = fssdeploy("repo", "check", repository, "--json")
    assert answer.code == 2 and answer.json["error"]["code"] == "repository_faulty"
    assert {each["where"] for each in answer.json["problems"]} == {f"{FINISH}/1", f"{FINISH}/1/model.py"}
    with pytest.raises(InputError):
        check(tmp_path / "nowhere")
