"""`fssdeploy enroll`: every form of annotation, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from fssdeploy.artifact import load
from fssdeploy.bank.bank import Bank
from fssdeploy.images.masks import load_mask
from fssdeploy.images.pictures import load_picture
from fssdeploy.images.rle import encode_rle
from tests.cli.command import Answer, fssdeploy

if TYPE_CHECKING:
    from tests.cli.conftest import Workplace

RNG = np.random.default_rng(0)


@pytest.fixture
def enroll(workplace: Workplace, tmp_path: Path) -> Callable[..., Answer]:
    """Enrol class "thing" from the first picture into a bank of the test; a refusal must not have made it."""

    def run(*arguments: object, name: str = "thing", image: object = workplace.first) -> Answer:
        made = (tmp_path / "new" / "bank").exists()
        command = ["enroll", workplace.artifact, "--image", image, "--bank", tmp_path / "new" / "bank", *arguments]
        answer = fssdeploy(*command, "--", name)
        if answer.code and not made:
            assert not (tmp_path / "new").exists()
        return answer

    return run


def test_shots_on_the_command_line_are_those_of_the_api(
    workplace: Workplace, tmp_path: Path, enroll: Callable[..., Answer]
) -> None:
    answer = enroll("--mask", workplace.mask, "--image", workplace.second, "--mask", "box:20,15,75,66", "--json")
    assert answer.code == 0 and answer.err == ""
    found = answer.json
    assert (found["class"], found["version"], found["shots"]) == ("thing", 1, 2)
    assert "UNTRAINED" in found["notes"][0]
    system = load(workplace.artifact)
    pictures = [load_picture(workplace.first), load_picture(workplace.second)]
    masks = [load_mask(workplace.mask, (90, 120)), load_mask("box:20,15,75,66", (70, 120))]
    expected = system.enroll(system.encode(pictures), masks)
    with Bank.open(tmp_path / "new" / "bank", system.fingerprint) as bank:
        stored = bank.get("thing")
    assert stored.shots == 2
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(stored.tensors[name], array)


def annotations(folder: Path, disc: np.ndarray) -> dict[str, list[object]]:
    """The same object marked in every way there is."""
    y, x = np.nonzero(disc)
    box = f"{x.min()},{y.min()},{x.max() + 1},{y.max() + 1}"
    rectangle = np.zeros_like(disc)
    rectangle[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
    Image.fromarray(rectangle).save(folder / "bit.png")
    Image.fromarray(rectangle.astype(np.uint8)).save(folder / "one.png")
    Image.fromarray(rectangle.astype(np.uint8) * 255).save(folder / "grey.png")
    labels = np.where(rectangle, 3, 0).astype(np.uint8)
    labels[-5:] = 7
    Image.fromarray(labels).save(folder / "labels.png")
    Image.fromarray(labels.astype(np.uint16)).save(folder / "labels16.png")
    ignored = rectangle.astype(np.uint8)
    ignored[-5:] = 255
    Image.fromarray(ignored).save(folder / "ignored.png")
    np.save(folder / "float.npy", rectangle.astype(np.float32))
    (folder / "rle.json").write_text(json.dumps(encode_rle(rectangle)))
    (folder / "coco.json").write_text(json.dumps({"segmentation": encode_rle(rectangle), "id": 4}))
    x0, y0, x1, y1 = box.split(",")
    ways: dict[str, list[object]] = {
        name: ["--mask", folder / name]
        for name in ("bit.png", "one.png", "grey.png", "ignored.png", "float.npy", "rle.json", "coco.json")
    }
    return ways | {
        "labels": ["--mask", folder / "labels.png", "--label", 3],
        "labels16": ["--mask", folder / "labels16.png", "--label", 3],
        "box": ["--box", box],
        "box as a mask": ["--mask", f"box:{box}"],
        "polygon": ["--polygon", f"{x0},{y0},{x1},{y0},{x1},{y1},{x0},{y1}"],
        "polygon as a mask": ["--mask", f"polygon:{x0},{y0},{x1},{y0},{x1},{y1},{x0},{y1}"],
    }


def test_every_way_of_marking_the_same_object_gives_the_same_state(
    workplace: Workplace, tmp_path: Path, disc: np.ndarray
) -> None:
    bank = tmp_path / "bank"
    ways = annotations(tmp_path, disc)
    for name, arguments in ways.items():
        answer = fssdeploy("enroll", workplace.artifact, name, "--image", workplace.first, "--bank", bank, *arguments)
        assert answer.code == 0, (name, answer.err)
    assert len(list((bank / "states").iterdir())) == 1  # equal states share a file
    listed = fssdeploy("bank", "list", bank, "--json").json["classes"]
    assert sorted(entry["class"] for entry in listed) == sorted(ways)


def test_a_whole_picture_may_be_the_object(enroll: Callable[..., Answer], tmp_path: Path) -> None:
    Image.fromarray(np.full((90, 120), 255, np.uint8)).save(tmp_path / "full.png")
    assert enroll("--mask", tmp_path / "full.png").code == 0


def test_thirty_shots_of_different_sizes(workplace: Workplace, tmp_path: Path) -> None:
    arguments: list[object] = []
    for number in range(30):
        height, width = RNG.integers(30, 150, 2)
        file = tmp_path / f"{number}.png"
        Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(file)
        arguments += ["--image", file, "--box", f"3,3,{width - 3},{height - 3}"]
    bank = tmp_path / "bank"
    answer = fssdeploy("enroll", workplace.artifact, "noise", "--bank", bank, "--json", *arguments)
    assert answer.json["shots"] == 30


def test_adding_shots_counts_versions_and_shots(enroll: Callable[..., Answer], workplace: Workplace) -> None:
    assert enroll("--mask", workplace.mask).code == 0
    added = enroll("--box", "10,10,60,60", "--add", "--json").json
    assert (added["version"], added["shots"]) == (2, 2)
    replaced = enroll("--box", "10,10,60,60", "--json").json
    assert (replaced["version"], replaced["shots"]) == (3, 1)
    assert "thing" in enroll("--box", "10,10,60,60", "--add", name="other").check_refused("class_unknown", 3)


def test_adding_to_nothing(enroll: Callable[..., Answer], workplace: Workplace) -> None:
    enroll("--mask", workplace.mask, "--add").check_refused("bank_missing", 3)


@pytest.mark.parametrize("name", ["a/b", "..", "a,b", "a.b", "labels", "-rf", " edge ", "ünï 日本", "q'\"`$(x)"])
def test_any_text_is_a_class(enroll: Callable[..., Answer], workplace: Workplace, name: str) -> None:
    assert enroll("--mask", workplace.mask, "--json", name=name).json["class"] == name


@pytest.mark.parametrize("name", ["", "  ", "n" * 300, "two\nlines"])
def test_names_that_are_refused(enroll: Callable[..., Answer], workplace: Workplace, name: str) -> None:
    enroll("--mask", workplace.mask, name=name).check_refused("class_name", 3)


def save(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_masks_that_are_refused(enroll: Callable[..., Answer], workplace: Workplace, tmp_path: Path) -> None:
    empty = np.zeros((90, 120), np.uint8)
    dot, labels, soft = empty.copy(), empty.copy(), empty.copy()
    dot[40, 70] = 1
    labels[20:40, 20:40], labels[50:60] = 3, 4
    soft[:, :100] = np.arange(100)
    np.save(tmp_path / "half.npy", np.full((90, 120), 0.5))
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "rle.json").write_text('{"size": [90, 120], "counts": [0, 10801]}')
    (tmp_path / "cut.png").write_bytes(workplace.mask.read_bytes()[:60])
    (tmp_path / "zero.png").touch()
    refusals: dict[str, tuple[object, str]] = {
        "other size": (save(tmp_path / "small.png", empty[:50]), "mask_size"),
        "turned": (save(tmp_path / "turned.png", empty.T), "mask_size"),
        "empty": (save(tmp_path / "empty.png", empty), "mask_empty"),
        "only ignored": (save(tmp_path / "ignored.png", np.where(dot, 255, 2).astype(np.uint8)), "mask_labels"),
        "too small": (save(tmp_path / "dot.png", dot), "object_vanishes"),
        "several labels": (save(tmp_path / "labels.png", labels), "mask_labels"),
        "soft edges": (save(tmp_path / "soft.png", soft), "mask_grey"),
        "colours": (workplace.first, "mask_shape"),
        "fractions": (tmp_path / "half.npy", "mask_values"),
        "pickled": (tmp_path / "pickle.npy", "mask_unreadable"),
        "RLE": (tmp_path / "rle.json", "rle_malformed"),
        "truncated": (tmp_path / "cut.png", "picture_damaged"),
        "zero bytes": (tmp_path / "zero.png", "file_empty"),
        "missing": (tmp_path / "missing.png", "file_missing"),
        "folder": (tmp_path, "file_is_folder"),
        "box": ("box:1,2,3", "mask_text"),
        "box without area": ("box:10,10,10,20", "mask_text"),
        "box outside": ("box:200,0,220,10", "mask_outside"),
        "polygon": ("polygon:1,2,3,4", "mask_text"),
    }
    for case, (mask, code) in refusals.items():
        line = enroll("--mask", mask).check_refused(code, 3)
        if isinstance(mask, Path) and code not in ("mask_empty", "object_vanishes"):
            assert mask.name in line, case
    line = enroll("--mask", tmp_path / "labels.png", "--label", 9).check_refused("mask_label", 3)
    assert "0, 3, 4" in line
    assert "too small" in enroll("--mask", tmp_path / "dot.png").err


def test_every_picture_needs_exactly_one_annotation(
    enroll: Callable[..., Answer], workplace: Workplace, tmp_path: Path
) -> None:
    enroll().check_refused("annotations_count", 3)
    enroll("--mask", workplace.mask, "--box", "1,2,30,40").check_refused("annotations_count", 3)
    enroll("--mask", workplace.mask, "--image", workplace.second).check_refused("annotations_count", 3)
    fssdeploy("enroll", workplace.artifact, "x", "--bank", tmp_path / "b").check_refused("usage", 3)
    fssdeploy("enroll", workplace.artifact, "x", "--image", workplace.first).check_refused("usage", 3)


def test_a_rotated_photograph_is_annotated_as_it_is_seen(enroll: Callable[..., Answer], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(RNG.integers(0, 256, (80, 120, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    upright, lying = np.zeros((120, 80), bool), np.zeros((80, 120), bool)
    upright[20:60, 20:60] = lying[20:60, 20:60] = True
    assert enroll("--mask", save(tmp_path / "u.png", upright), image=tmp_path / "photo.jpg").code == 0
    line = enroll("--mask", save(tmp_path / "l.png", lying), image=tmp_path / "photo.jpg").check_refused("mask_size", 3)
    assert "120 x 80" in line


def test_banks_that_cannot_be_made(enroll: Callable[..., Answer], workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for bank in (tmp_path / "file", tmp_path / "file" / "below", "/dev/full", "/proc/none/bank"):
        arguments = ["--image", workplace.first, "--mask", workplace.mask, "--bank", bank]
        answer = fssdeploy("enroll", workplace.artifact, "x", *arguments)
        assert answer.code == 4 and len(answer.err.splitlines()) == 1, answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk(workplace: Workplace, small_disk: Path) -> None:
    arguments = ["--image", workplace.first, "--mask", workplace.mask, "--bank", small_disk / "new" / "bank"]
    for free in (0, 20, 90):  # at the folder, at the index, at the state
        (small_disk / "filler").write_bytes(bytes(4096))
        while os.statvfs(small_disk).f_bavail * 4096 > free * 1000:
            with (small_disk / "filler").open("ab") as stream:
                stream.write(bytes(4096))
        fssdeploy("enroll", workplace.artifact, "x", *arguments).check_refused("no_space", 4)
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    assert fssdeploy("enroll", workplace.artifact, "x", *arguments).code == 0
