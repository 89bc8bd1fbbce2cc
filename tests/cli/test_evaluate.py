"""`fssdeploy evaluate`: the same numbers from PyTorch and from an artifact, and refusals that leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fssdeploy import data, shipped
from fssdeploy.cli.app import app
from fssdeploy.cli.evaluate import evaluate
from fssdeploy.evaluation.run import journal_file, list_file
from fssdeploy.export.artifact import ExportRequest, export_artifact
from fssdeploy.systems import fsdino, get_system
from fssdeploy.weights.fsdino import fill, save_checkpoint
from tests.cli.command import Answer, fssdeploy
from tests.evaluation.squares import Squares
from tests.networks import SMALL


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small network with seeded weights as an artifact, and its checkpoint, which passes for trained."""
    folder = tmp_path_factory.mktemp("network")
    model = fsdino.build(SMALL)
    fill(model, [], untrained_seed=3)
    save_checkpoint(model, folder / "small.safetensors", {})
    model = fsdino.build(SMALL)
    provenance = fill(model, [folder / "small.safetensors"], untrained_seed=None)
    export_artifact(model, provenance, ExportRequest(get_system("fsdino"), "tiny", SMALL), folder / "artifact")
    return folder / "artifact", folder / "small.safetensors"


@pytest.fixture(autouse=True)
def small_and_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny preset made smaller still, and squares behind the name of any data set but shapes-5i."""
    monkeypatch.setitem(fsdino.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(shipped, "checkpoint", lambda name: None)  # it would not fit
    original = data.open_dataset
    monkeypatch.setattr(
        data, "open_dataset", lambda name, root: Squares() if name == "squares" else original(name, root)
    )
    if evaluate not in [each.callback for each in app.registered_commands]:
        monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])
        app.command()(evaluate)


def on_squares(*arguments: object) -> Answer:
    return fssdeploy("evaluate", "fsdino", "--dataset", "squares", "--threads", 1, *arguments)


def test_all_runtimes_give_the_same_numbers(network: tuple[Path, Path]) -> None:
    artifact, checkpoint = network
    arguments = ["--fold", "all", "--shot", 2, "--episodes", 6, "--json"]
    ways: dict[str, list[object]] = {
        "torch": ["--weights", checkpoint],
        "onnxruntime": ["--runtime", "onnx", "--artifact", artifact],
    }
    if find_spec("openvino"):
        ways["openvino"] = ["--runtime", "openvino", "--artifact", artifact]
    found: dict[str, dict[str, Any]] = {}
    for runtime, way in ways.items():
        answer = on_squares(*arguments, *way)
        assert answer.code == 0 and answer.err == "", answer.err
        found[runtime] = answer.json
        assert {"miou", "fb_iou", "interval", "per_class", "episodes", "protocol"} <= set(answer.json)
        assert answer.json["protocol"]["runtime"] == answer.json["system"]["runtime"] == runtime
        assert answer.json["episodes"] == 12 and set(answer.json["folds"]) == {"0", "1"}
    one, *others = found.values()
    assert 0 < one["miou"] < 100
    for other in others:
        assert other["protocol"]["list"] == one["protocol"]["list"]
        for key in ("miou", "fb_iou"):
            assert one[key] == pytest.approx(other[key], abs=0.1)
        for name, entry in one["per_class"].items():
            assert other["per_class"][name]["iou"] == pytest.approx(entry["iou"], abs=0.1)


def test_the_text_says_what_was_measured(network: tuple[Path, Path]) -> None:
    answer = on_squares("--fold", 1, "--episodes", 4, "--artifact", network[0], "--space", "canvas")
    assert answer.code == 0, answer.err
    for part in ("mIoU", "FB-IoU", "95 %", "blue", "canvas", "squash", "uniform over classes", "squares are drawn"):
        assert part in answer.out
    assert "UNTRAINED" not in answer.out


def test_untrained_weights_are_said_to_be_untrained() -> None:
    answer = on_squares("--fold", 0, "--episodes", 2, "--json")
    assert answer.code == 0 and "UNTRAINED" in answer.json["notes"][0]


def test_a_list_is_given_back(network: tuple[Path, Path], tmp_path: Path) -> None:
    use = ["--artifact", network[0], "--json"]
    first = on_squares(*use, "--fold", 1, "--shot", 2, "--seed", 5, "--episodes", 4, "--out", tmp_path / "a").json
    kept = tmp_path / "a" / list_file(1)
    again = on_squares(*use, "--list", kept, "--out", tmp_path / "b").json
    assert again["protocol"] == first["protocol"] and again["miou"] == first["miou"]
    assert (tmp_path / "a" / journal_file(1)).read_bytes() == (tmp_path / "b" / journal_file(1)).read_bytes()
    for option, value in (("--fold", 0), ("--shot", 1), ("--seed", 4), ("--episodes", 3), ("--fold", "all")):
        on_squares(*use, "--list", kept, option, value).check_refused("list_differs", 3)
    text = kept.read_text()
    kept.write_text(text.replace('"class_index": 2', '"class_index": 0'))
    on_squares(*use, "--list", kept).check_refused("list_differs", 3)
    kept.write_text(text[:-40])
    on_squares(*use, "--list", kept).check_refused("episodes_format", 3)


def test_the_same_command_continues_and_another_is_refused(network: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, checkpoint = network
    command = ["--fold", 0, "--episodes", 4, "--out", tmp_path / "out", "--json"]
    first = on_squares(*command, "--artifact", artifact)
    journal = tmp_path / "out" / journal_file(0)
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    assert on_squares(*command, "--artifact", artifact).json == first.json
    assert journal.read_bytes() == whole
    line = on_squares(*command, "--weights", checkpoint).check_refused("evaluation_of_other", 3)
    assert "runtime is onnxruntime there and torch here" in line
    on_squares(*command, "--artifact", artifact, "--seed", 1).check_refused("evaluation_of_other", 3)
    on_squares(*command, "--artifact", artifact, "--priors").check_refused("evaluation_of_other", 3)


def test_other_weights_are_another_run(network: tuple[Path, Path], tmp_path: Path) -> None:
    """The segmenter's too, which banks are not bound to."""
    command = ["--fold", 0, "--episodes", 2, "--out", tmp_path / "out", "--json"]
    assert on_squares(*command, "--weights", network[1]).code == 0
    model = fsdino.build(SMALL)
    fill(model, [network[1]], untrained_seed=None)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    save_checkpoint(model, tmp_path / "other.safetensors", {})
    line = on_squares(*command, "--weights", tmp_path / "other.safetensors").check_refused("evaluation_of_other", 3)
    assert "system is " in line


def test_shapes_with_priors(network: tuple[Path, Path]) -> None:
    command = ["evaluate", "fsdino", "--dataset", "shapes-5i", "--fold", 0, "--episodes", 3, "--threads", 1]
    answer = fssdeploy(*command, "--artifact", network[0], "--priors", "--json")
    assert answer.code == 0, answer.err
    assert len(answer.json["priors"]) == 4 and answer.json["protocol"]["calibration_episodes"] > 0


def test_what_is_refused(network: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, checkpoint = network
    with_artifact = ["--artifact", artifact]
    cases: dict[tuple[object, ...], str] = {
        ("--fold", "5", *with_artifact): "fold_unknown",
        ("--fold", "-1", *with_artifact): "fold_unknown",
        ("--fold", "first", *with_artifact): "fold_unknown",
        ("--shot", "0", *with_artifact): "shots",
        ("--shot", "6", *with_artifact): "class_too_small",
        ("--episodes", "0", *with_artifact): "usage",
        ("--seed", "-1", *with_artifact): "usage",
        ("--space", "paper", *with_artifact): "usage",
        ("--runtime", "tensorflow"): "runtime_unknown",
        ("--runtime", "onnx"): "usage",
        ("--runtime", "openvino", "--weights", checkpoint): "usage",
        ("--runtime", "torch", *with_artifact): "usage",
        ("--weights", checkpoint, *with_artifact): "usage",
        ("--preset", "tiny", *with_artifact): "usage",
        ("--untrained", *with_artifact): "usage",
        ("--set", "svp=mlp", *with_artifact): "usage",
        ("--preset", "huge"): "preset_unknown",
        ("--preset", "base"): "weights_missing",
        ("--set", "nothing=1"): "option_unknown",
        ("--weights", tmp_path / "none.pt"): "file_missing",
        ("--artifact", tmp_path / "none"): "artifact_missing",
        ("--list", tmp_path / "none.jsonl", *with_artifact): "file_missing",
    }
    for arguments, code in cases.items():
        if "base" in arguments:  # a small stand-in: the refusal does not depend on the size
            fsdino.PRESETS["base"], kept = SMALL, fsdino.PRESETS["base"]
        answer = on_squares(*arguments, "--out", tmp_path / "out", "--json")
        if "base" in arguments:
            fsdino.PRESETS["base"] = kept
        answer.check_refused(code, 3)
        assert answer.json["error"]["code"] == code
        assert os.listdir(tmp_path) == [], arguments
    other = [
        ("evaluate", "nothing", "--dataset", "squares", *with_artifact),
        ("evaluate", "nothing", "--dataset", "squares"),
    ]
    for command, code in zip(other, ("artifact_system", "system_unknown"), strict=True):
        fssdeploy(*command).check_refused(code, 3)
    for number in (0, 2000):
        for way in ([], with_artifact):
            answer = fssdeploy("evaluate", "fsdino", "--dataset", "squares", "--threads", number, *way)
            answer.check_refused("threads", 3)
    fssdeploy("evaluate", "fsdino", "--dataset", "squared").check_refused("dataset_unknown", 3)
    fssdeploy("evaluate", "fsdino", "--dataset", "pascal-5i").check_refused("data_missing", 3)


def test_damaged_pictures(network: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Squares()
    monkeypatch.setattr(data, "open_dataset", lambda name, root: broken)
    use = ["--artifact", network[0], "--fold", 0, "--episodes", 6]
    broken.broken = {broken.episode(0, "test", 1, 0, 2).query}
    answer = on_squares(*use, "--json")
    assert answer.code == 0 and 0 < answer.json["skipped"] == 6 - answer.json["episodes"] < 6
    assert "SKIPPED" in on_squares(*use).out
    broken.broken = {f"{index}-{number}" for index in range(4) for number in range(6)}
    on_squares(*use).check_refused("all_skipped", 2)


def test_an_artifact_is_evaluated_without_torch(network: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process that cannot import it."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import fssdeploy.data\n"
        "from tests.evaluation.squares import Squares\n"
        "fssdeploy.data.open_dataset = lambda name, root: Squares()\n"
        "from fssdeploy.cli.evaluate import evaluate\n"
        "import typer\n"
        "app = typer.Typer()\n"
        "app.command()(evaluate)\n"
        "app()\n"
    )
    command = [sys.executable, str(script), "fsdino", "--dataset", "squares", "--episodes", "2", "--priors"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--artifact", str(network[0]), "--out", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout and (tmp_path / "out" / "report.json").exists()


def test_a_full_disk(network: tuple[Path, Path], small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 399_000)
    answer = on_squares("--artifact", network[0], "--fold", 0, "--episodes", 40, "--out", small_disk / "out")
    answer.check_refused("no_space", 4)
