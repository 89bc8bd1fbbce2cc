"""`fssdeploy data`: what is reported and how it ends, lists of episodes, tiles of DeepGlobe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.cli.app import app
from fssdeploy.cli.data import data_app
from fssdeploy.data import open_dataset
from fssdeploy.data.episodes import EpisodeList
from fssdeploy.images.masks import save_mask
from tests.cli.command import fssdeploy

OBJECT = np.zeros((8, 12), bool)
OBJECT[2:6, 3:9] = True

# Any attempt to import these ends the process with a traceback.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "onnx", "onnxscript", "skimage", "matplotlib"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from fssdeploy.cli.app import app
from fssdeploy.cli.data import data_app
if "data" not in [group.name for group in app.registered_groups]:
    app.add_typer(data_app, name="data")
from fssdeploy.cli.main import main
main()
"""


@pytest.fixture(autouse=True)
def verb() -> None:
    """The verb is there even where the command does not list it yet."""
    if "data" not in [group.name for group in app.registered_groups]:
        app.add_typer(data_app, name="data")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    for number, name in enumerate(("bolt", "nut")):
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True)
        for index in range(7):
            pixels = np.random.default_rng(10 * number + index).integers(0, 256, (8, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / "images" / f"{index}.png")
            save_mask(folder / name / "masks" / f"{index}.png", OBJECT)
    return folder


def test_a_healthy_directory(root: Path) -> None:
    answer = fssdeploy("data", "check", "folder", root)
    assert answer.code == 0 and answer.err == ""
    assert "empty masks" in answer.out and "folds.json" in answer.out
    report = fssdeploy("data", "check", "folder", root, "--json").json
    assert report["complete"] is True and report["directory"] == str(root)
    assert {finding["state"] for finding in report["findings"]} == {"ok", "note"}
    assert any("folds.json" in note for note in report["notes"])


def test_an_incomplete_directory(root: Path) -> None:
    (root / "nut" / "masks" / "3.png").unlink()
    text = fssdeploy("data", "check", "folder", root)
    line = text.check_refused("data_incomplete", 2)
    assert "pictures without a mask" in line and "empty masks" not in line
    assert "nut/3.png" in text.out
    answer = fssdeploy("data", "check", "folder", root, "--json")
    answer.check_refused("data_incomplete", 2)
    assert answer.json["complete"] is False and answer.json["error"]["code"] == "data_incomplete"
    wrong = [finding for finding in answer.json["findings"] if finding["state"] == "missing"]
    assert [finding["what"] for finding in wrong] == ["pictures without a mask"]
    assert set(wrong[0]) == {"what", "state", "detail", "source"}


@pytest.mark.parametrize("name", ["fss-1000", "davis-17", "deepglobe", "isic", "isaid-5i", "folder"])
def test_an_empty_directory_says_what_is_expected(tmp_path: Path, name: str) -> None:
    answer = fssdeploy("data", "check", name, tmp_path, "--json")
    answer.check_refused("data_incomplete", 2)
    (finding,) = answer.json["findings"]
    assert finding["state"] == "missing" and finding["detail"] and finding["source"]


def test_arguments_that_are_wrong(root: Path) -> None:
    fssdeploy("data", "check", "imagenet", root).check_refused("dataset_unknown", 3)
    fssdeploy("data", "check", "folder").check_refused("data_missing", 3)
    fssdeploy("data", "check").check_refused("usage", 3)
    (root / "folds.json").write_text("[[")
    fssdeploy("data", "check", "folder", root).check_refused("folds_unreadable", 3)


def test_it_needs_no_torch(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.jsonl"
    for command in (["check", "folder", root], ["episodes", "folder", root, "--episodes", "3", "--out", out]):
        answer = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, "data", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert answer.returncode == 0, answer.stderr


def test_a_list_of_episodes(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.jsonl"
    command = ["data", "episodes", "folder", root, "--shot", 5, "--episodes", 12, "--seed", 4, "--out", out, "--json"]
    answer = fssdeploy(*command)
    assert answer.code == 0, answer.err
    assert answer.json["episodes"] == 12 and answer.json["classes"] == 2
    written = EpisodeList.load(out)
    assert (written.dataset, written.fold, written.shot, written.seed) == ("folder", 0, 5, 4)
    assert list(written.episodes) == open_dataset("folder", root).test_list(0, 5, 12, 4)
    train = tmp_path / "train.jsonl"
    assert fssdeploy(*command[:-3], "--split", "train", "--out", train).code == 0
    assert len(EpisodeList.load(train)) == 12


def test_lists_that_cannot_be_drawn(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.jsonl"
    command = ["data", "episodes", "folder", root, "--out", out]
    fssdeploy(*command, "--fold", 1).check_refused("fold_unknown", 3)
    fssdeploy(*command, "--shot", 7).check_refused("class_too_small", 3)
    fssdeploy(*command, "--split", "val").check_refused("usage", 3)
    fssdeploy(*command, "--episodes", 0).check_refused("usage", 3)
    fssdeploy("data", "episodes", "folder", tmp_path, "--out", out).check_refused("data_missing", 3)
    assert not out.exists()


def test_tiles_of_deepglobe(tmp_path: Path) -> None:
    source = tmp_path / "train"
    source.mkdir()
    colours = np.zeros((60, 60, 3), np.uint8)
    colours[:, ::2] = (0, 255, 0)
    Image.fromarray(colours).save(source / "1_mask.png")
    Image.new("RGB", (60, 60), (9, 9, 9)).save(source / "1_sat.jpg")
    answer = fssdeploy("data", "prepare", "deepglobe", source, tmp_path / "tiles", "--json")
    assert answer.code == 0 and answer.json["tiles"]["forest"] == 36
    assert len(os.listdir(tmp_path / "tiles" / "4" / "test" / "origin")) == 36
    fssdeploy("data", "prepare", "deepglobe", source, tmp_path / "tiles").check_refused("target_exists", 3)
    fssdeploy("data", "prepare", "isic", source, tmp_path / "other").check_refused("usage", 3)
