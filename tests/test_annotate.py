"""Names of output files, and what stays of a picture whose files cannot all be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy import annotate
from fssdeploy.annotate import annotate_files, safe_name, unique_stems
from fssdeploy.errors import MachineError
from fssdeploy.images.geometry import place
from fssdeploy.images.mark import is_marked
from fssdeploy.images.masks import load_mask
from fssdeploy.images.pictures import find_pictures
from fssdeploy.protocol import ClassState, Features, Masks

FINGERPRINT = "f" * 64


class Threshold:
    """Stands in for a system: class number i is where the first channel is above 40 * i."""

    fingerprint = FINGERPRINT

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, pictures: list[np.ndarray]) -> Features:
        self.encoded += len(pictures)
        self.pictures = pictures
        return Features({}, [place(*picture.shape[:2], 14, "squash") for picture in pictures], FINGERPRINT)

    def segment(self, features: Features, states: dict[str, ClassState]) -> Masks:
        red = self.pictures[0][..., 0].astype(np.float32)
        logits = {name: red - 40 * index for index, name in enumerate(states, 1)}
        return Masks(list(states), [logits], [{}])


@pytest.fixture
def files(tmp_path: Path, picture: np.ndarray) -> list[Path]:
    for name in ("a", "b", "c"):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in ("a", "b", "c")]


def run(files: list[Path], out: Path, classes: tuple[str, ...] = ("x", "y"), **options: Any) -> dict[str, Any]:
    states = {name: ClassState({}, 1, FINGERPRINT) for name in classes}
    return annotate_files(Threshold(), states, files, out, **options).data  # type: ignore[arg-type]


def test_files_of_a_picture(files: list[Path], tmp_path: Path, picture: np.ndarray) -> None:
    run(files[:1], tmp_path / "out", note="UNTRAINED")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.labels.png", "a.overlay.jpg", "a.x.png", "a.y.png", "masks.json"]
    for index, name in enumerate("xy", 1):
        mask = load_mask(tmp_path / "out" / f"a.{name}.png", (90, 120)).object
        np.testing.assert_array_equal(mask, picture[..., 0] > 40 * index)
    assert np.unique(Image.open(tmp_path / "out" / "a.labels.png")).tolist() == [0, 1]  # "x" has the larger logit
    assert json.loads((tmp_path / "out" / "masks.json").read_text())["info"]["weights"] == "UNTRAINED"
    run(files[:1], tmp_path / "bare", ("x",), overlays=False)
    assert sorted(os.listdir(tmp_path / "bare")) == ["a.x.png", "masks.json"]


def test_an_empty_mask_is_an_answer(files: list[Path], tmp_path: Path) -> None:
    classes = run(files[:1], tmp_path / "out", tuple("abcdefg"))["pictures"][0]["classes"]
    assert (classes["g"]["area"], classes["g"]["bbox"], classes["g"]["score"]) == (0, [0, 0, 0, 0], 0.0)


def test_more_classes_than_an_indexed_file_can_hold(files: list[Path], tmp_path: Path) -> None:
    for count in (255, 256):
        out = tmp_path / str(count)
        run(files[:1], out, tuple(f"class {number}" for number in range(count)), overlays=False)
        assert (out / "a.labels.png").exists() == (count == 255)


@pytest.mark.parametrize("step", ["save_mask", "save_labels", "save_picture"])
@pytest.mark.parametrize("error", [MachineError("no_space", "full"), KeyboardInterrupt()])
def test_a_picture_is_written_whole_or_not_at_all(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    original = getattr(annotate, step)

    def failing(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.startswith("b.") and not path.name.startswith("b.x"):
            raise error
        original(path, *arguments, **options)

    monkeypatch.setattr(annotate, step, failing)
    out = tmp_path / "out"
    with pytest.raises(type(error)):
        run(files, out)
    assert sorted(os.listdir(out)) == ["a.labels.png", "a.overlay.jpg", "a.x.png", "a.y.png", "masks.json"]
    assert [image["file_name"] for image in json.loads((out / "masks.json").read_text())["images"]] == ["a.png"]
    with pytest.raises(type(error)):
        run(files[1:], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_every_output_is_marked_and_no_picture_is(files: list[Path], tmp_path: Path) -> None:
    run(files[:1], tmp_path)
    written = set(tmp_path.iterdir()) - set(files)
    assert [is_marked(path) for path in written if path.suffix != ".json"] == [True] * 4
    assert find_pictures([tmp_path]) == files
    assert find_pictures([tmp_path / "a.x.png"]) == [tmp_path / "a.x.png"]  # named, it is wanted


def test_stems() -> None:
    long = "x" * 300
    paths = [
        "p/a.jpg",
        "q/a.png",
        "q/A.png",
        "a-2.png",
        "b.tar.png",
        f"{long}1.png",
        f"{long}2.png",
        "é" * 120 + ".png",
    ]
    stems = unique_stems([Path(path) for path in paths])
    assert stems[:5] == ["a", "a-2", "A-3", "a-2-2", "b.tar"]
    assert len({stem.casefold() for stem in stems}) == len(paths)
    assert all(len(os.fsencode(stem)) <= 160 for stem in stems)


@pytest.mark.parametrize(
    "name", ["cup", "two words", "a/b", "..", "a.b", "labels", "~x", "a%2Fb", "日本", "NUL\\", "-rf"]
)
def test_class_names_in_file_names_can_be_read_back(name: str) -> None:
    from urllib.parse import unquote

    safe = safe_name(name)
    assert unquote(safe) == name
    assert not set(safe) & set("/\\.~") and safe != "labels"


def test_long_class_names_stay_apart() -> None:
    names = [safe_name("n" * 190 + end) for end in "ab"] + [safe_name("日" * 190)]
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 80 for name in names)
