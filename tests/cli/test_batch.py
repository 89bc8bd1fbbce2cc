"""`fssdeploy batch`: what segment and evaluate write and say, whatever happens to the processes that did it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fssdeploy import data
from fssdeploy.batch import run as batch_run
from fssdeploy.batch.journal import Journal
from fssdeploy.batch.local import _Crew
from fssdeploy.batch.worker import Setup, failure
from fssdeploy.cli.app import app
from fssdeploy.cli.batch import batch_app
from fssdeploy.errors import MachineError
from tests.batch.jobs import in_process
from tests.cli.command import Answer, fssdeploy
from tests.evaluation.squares import Clip, Squares

if TYPE_CHECKING:
    from tests.cli.conftest import Workplace


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    if batch_app not in [group.typer_instance for group in app.registered_groups]:
        monkeypatch.setattr(app, "registered_groups", [*app.registered_groups])
        app.add_typer(batch_app, name="batch")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The local backend without processes: quicker, and what a test replaces is replaced for the worker, too."""
    dealt: list[int] = []

    def process(setup: Setup, items: Any, workers: int, finished: Any) -> None:
        dealt.append(len(items))
        in_process(setup, items, workers, finished)

    monkeypatch.setitem(batch_run.BACKENDS, "local", process)
    return dealt


@pytest.fixture
def pictures(workplace: Workplace, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        shutil.copy((workplace.first, workplace.second)[number % 2], folder / f"{number}.png")
    return folder


def batch(workplace: Workplace, out: Path, *arguments: object) -> Answer:
    where = ["--artifact", workplace.artifact, "--bank", workplace.bank, "--out", out, "--threads", 1, "--workers", 2]
    return fssdeploy("batch", "segment", *where, *arguments)


def written(folder: Path) -> dict[str, bytes]:
    """The results in a folder: without the manifest and what a batch keeps for itself."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"
    }


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def test_a_killed_worker_leaves_the_files_of_segment(
    workplace: Workplace, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    started: list[int] = []
    hire = _Crew._hire

    def hire_and_tell(crew: _Crew) -> None:
        hire(crew)
        started.append(crew._started[-1].pid or 0)

    def kill_one() -> None:
        until = time.monotonic() + 30
        while not any(out.glob("?.disc.png")) and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(started[0], signal.SIGKILL)

    monkeypatch.setattr(_Crew, "_hire", hire_and_tell)
    killer = threading.Thread(target=kill_one)
    killer.start()
    answer = batch(workplace, out, pictures, "--json")
    killer.join()
    assert answer.code == 0 and answer.err == "", answer.err
    assert len(started) == 3
    plain = fssdeploy(
        "segment", workplace.artifact, "--bank", workplace.bank, pictures, "-o", tmp_path / "plain", "--threads", 1
    )
    assert plain.code == 0
    expected, found = written(tmp_path / "plain"), written(out)
    assert json.loads(found.pop("masks.json")) == json.loads(expected.pop("masks.json"))
    assert found == expected and len(found) == 6 * 4
    assert (answer.json["total"], answer.json["done"], answer.json["missing"]) == (6, 6, 0)
    assert "UNTRAINED" in answer.json["notes"][0]
    entries = manifest(out)["items"]
    assert [entry["input"] for entry in entries] == [str(pictures / f"{number}.png") for number in range(6)]
    coco = json.loads((out / "masks.json").read_text())
    for number, entry in enumerate(entries):
        assert entry["sha256"] == hashlib.sha256((pictures / f"{number}.png").read_bytes()).hexdigest()
        assert entry["outputs"]["masks"] == {name: f"{number}.{name}.png" for name in ("corner", "disc")}
        for annotation in coco["annotations"][2 * number : 2 * number + 2]:
            found_class = entry["classes"][{1: "corner", 2: "disc"}[annotation["category_id"]]]
            assert found_class["area"] == annotation["area"] and found_class["score"] == annotation["score"]
            assert found_class["share"] == annotation["area"] / (entry["size"][0] * entry["size"][1])


def test_bad_pictures_are_told_and_mended_ones_taken_up(
    workplace: Workplace, pictures: Path, tmp_path: Path, one_process: list[int]
) -> None:
    (pictures / "2.png").write_bytes(b"")
    (pictures / "3.png").write_text("hello")
    out = tmp_path / "out"
    answer = batch(workplace, out, pictures, "--json", "--no-overlays")
    answer.check_refused("items_failed", 3)
    assert {Path(each["input"]).name: each["code"] for each in answer.json["errors"]} == {
        "2.png": "file_empty",
        "3.png": "picture_unreadable",
    }
    assert answer.json["error"]["code"] == "items_failed" and manifest(out)["failed"] == 2
    names = [image["file_name"] for image in json.loads((out / "masks.json").read_text())["images"]]
    assert names == ["0.png", "1.png", "4.png", "5.png"]
    for_people = batch(workplace, out, pictures, "--no-overlays")
    assert for_people.code == 3 and "FAILED" in for_people.out and "4 of 6" in for_people.out
    shutil.copy(workplace.first, pictures / "2.png")
    shutil.copy(workplace.first, pictures / "3.png")
    (out / "5.disc.png").unlink()
    assert batch(workplace, out, pictures, "--no-overlays").code == 0
    assert one_process == [6, 2, 3] and (out / "5.disc.png").exists()
    assert len(json.loads((out / "masks.json").read_text())["images"]) == manifest(out)["done"] == 6


def test_shards_of_pictures(workplace: Workplace, pictures: Path, tmp_path: Path, one_process: list[int]) -> None:
    out = tmp_path / "out"
    first = batch(workplace, out, pictures, "--shard", "1/2")
    assert first.code == 0 and "INCOMPLETE: 3 items" in first.out and not manifest(out)["complete"]
    second = batch(workplace, out, pictures, "--shard", "2/2", "--json")
    assert second.code == 0 and second.json["missing"] == 0 and manifest(out)["complete"]
    assert batch(workplace, out, pictures).code == 0 and one_process == [3, 3]


def test_another_configuration_is_refused(
    workplace: Workplace, pictures: Path, tmp_path: Path, one_process: list[int]
) -> None:
    out = tmp_path / "out"
    bank = tmp_path / "bank"
    shutil.copytree(workplace.bank, bank)
    command = ["--bank", bank, "--class", "disc"]
    assert batch(workplace, out, pictures, *command).code == 0
    for changed, part in (
        ([pictures, "--bank", bank], "classes is"),
        ([pictures, *command, "--no-overlays"], "overlays is True there and False here"),
        ([pictures / "1.png", *command], "items is 6 there and 1 here"),
    ):
        assert part in batch(workplace, out, *changed).check_refused("batch_of_other", 3)
    enrol = ["--image", workplace.first, "--mask", "box:0,0,50,50", "--bank", bank]
    assert fssdeploy("enroll", workplace.artifact, "disc", *enrol).code == 0
    assert "classes is" in batch(workplace, out, pictures, *command).check_refused("batch_of_other", 3)
    shutil.copytree(pictures, tmp_path / "elsewhere")
    assert "list of items" in batch(workplace, out, tmp_path / "elsewhere", *command).check_refused("batch_of_other", 3)
    assert one_process == [6]


def test_what_is_refused_leaves_nothing(workplace: Workplace, pictures: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, int, list[object]]] = [
        ("usage", 3, [pictures, "--backend", "cloud"]),
        ("workers", 3, [pictures, "--workers", 0]),
        ("threads", 3, [pictures, "--threads", 0]),
        ("shard", 3, [pictures, "--shard", "3/2"]),
        ("file_missing", 3, [tmp_path / "none"]),
        ("class_unknown", 3, [pictures, "--class", "cat"]),
        ("artifact_missing", 3, [pictures, "--artifact", tmp_path / "none"]),
        ("bank_missing", 3, [pictures, "--bank", tmp_path / "none"]),
        ("runtime_unknown", 3, [pictures, "--runtime", "abacus"]),
        ("not_a_folder", 4, [pictures, "--out", workplace.first]),
    ]
    for code, exit_code, arguments in cases:
        answer = batch(workplace, tmp_path / "new" / "out", *arguments, "--json")
        answer.check_refused(code, exit_code)
        assert answer.json["error"]["code"] == code
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def evaluations(workplace: Workplace, *arguments: object) -> list[object]:
    return ["fsdino", "--artifact", workplace.artifact, "--threads", 1, "--shot", 2, *arguments]


def test_the_numbers_are_those_of_evaluate(workplace: Workplace, tmp_path: Path) -> None:
    command = evaluations(workplace, "--dataset", "shapes-5i", "--fold", 1, "--episodes", 7, "--seed", 3, "--json")
    plain = fssdeploy("evaluate", *command, "--out", tmp_path / "plain")
    out = tmp_path / "out"
    answer = fssdeploy("batch", "evaluate", *command, "--workers", 2, "--out", out)
    assert answer.code == plain.code == 0, answer.err
    found, expected = answer.json, plain.json
    assert found.pop("batch")["done"] == 7
    assert found.pop("files") and expected.pop("files")
    assert found == expected
    journal = "episodes-fold1.jsonl"
    assert (out / journal).read_bytes() == (tmp_path / "plain" / journal).read_bytes()
    entries = manifest(out)["items"]
    assert [episode["episode"] for entry in entries for episode in entry["episodes"]] == list(range(7))
    for folder in (out, tmp_path / "plain"):
        other = fssdeploy("batch", "evaluate", *command, "--seed", 4, "--out", folder)
        assert "seed is 3 there and 4 here" in other.check_refused("evaluation_of_other", 3)
    assert not (tmp_path / "plain" / "batch").exists()


@pytest.mark.parametrize("make", [Squares, Clip])
def test_shards_damage_and_videos(
    workplace: Workplace,
    tmp_path: Path,
    one_process: list[int],
    monkeypatch: pytest.MonkeyPatch,
    make: type[Squares],
) -> None:
    dataset = make()
    monkeypatch.setattr(data, "open_dataset", lambda name, root: dataset)
    dataset.broken = {dataset.episode(0, "test", 2, 0, 2).query}
    command = evaluations(workplace, "--dataset", "squares", "--fold", 0, "--episodes", 12, "--json")
    plain = fssdeploy("evaluate", *command)
    assert plain.code == 0 and plain.json["skipped"] > 0, plain.err
    shard = [*command, "--out", tmp_path / "out", "--shard"]
    first = fssdeploy("batch", "evaluate", *shard, "1/2")
    assert first.code == 0 and first.json["missing"] > 0 and "miou" not in first.json
    assert not (tmp_path / "out" / "report.json").exists()
    other = fssdeploy("batch", "evaluate", *shard, "2/2", "--seed", 1).check_refused("batch_of_other", 3)
    assert "seed is 0 there and 1 here" in other
    answer = fssdeploy("batch", "evaluate", *shard, "2/2")
    assert answer.code == 0 and (tmp_path / "out" / "report.json").exists(), answer.err
    assert answer.json["batch"]["failed"] > 0
    assert {each["code"] for each in answer.json["batch"]["errors"]} == {"picture_damaged"}
    expected = plain.json
    for key in ("miou", "fb_iou", "interval", "per_class", "skipped", "skipped_episodes", "protocol", "folds"):
        assert answer.json[key] == expected[key], key


def test_an_episode_that_kills_its_workers_gives_no_numbers(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(setup: Setup, items: Any, workers: int, finished: Any) -> None:
        journal = Journal(setup.journal_path(), setup.plan)
        for item in items:
            journal.add(failure(item, MachineError("worker_died", f"'{item['input']}' was given up", "SIGSEGV")))
            finished("failed")

    monkeypatch.setitem(batch_run.BACKENDS, "local", process)
    command = evaluations(workplace, "--dataset", "shapes-5i", "--fold", 0, "--episodes", 2, "--json")
    answer = fssdeploy("batch", "evaluate", *command, "--out", tmp_path / "out")
    answer.check_refused("items_failed", 3)
    assert "miou" not in answer.json and not (tmp_path / "out" / "report.json").exists()
