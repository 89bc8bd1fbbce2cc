"""`fssdeploy segment`: the masks it writes are those of the Python API, and bad pictures never cost the good ones."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fssdeploy import annotate, shipped
from fssdeploy.artifact import load
from fssdeploy.bank.bank import Bank
from fssdeploy.cli.segment import default_artifact
from fssdeploy.engines.onnxruntime import OnnxRuntimeEngine
from fssdeploy.images.pictures import load_picture
from tests.cli.command import Answer, fssdeploy

if TYPE_CHECKING:
    from tests.cli.conftest import Workplace


def segment(workplace: Workplace, out: Path, *arguments: object) -> Answer:
    return fssdeploy("segment", workplace.artifact, "--bank", workplace.bank, "-o", out, *arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_mask(path: Path) -> np.ndarray:
    values = np.asarray(Image.open(path))
    assert set(np.unique(values)) <= {0, 255}
    return values == 255


def test_masks_are_those_of_the_api_and_of_the_rle(workplace: Workplace, tmp_path: Path) -> None:
    answer = segment(workplace, tmp_path / "out", workplace.second, "--class", "disc,corner", "--json")
    assert answer.code == 0 and answer.err == ""
    system = load(workplace.artifact)
    picture = load_picture(workplace.second)
    with Bank.open(workplace.bank, system.fingerprint) as bank:
        masks = system.segment(system.encode([picture]), {name: bank.get(name) for name in ("disc", "corner")})
    labels = np.asarray(Image.open(tmp_path / "out" / "second.labels.png"))
    np.testing.assert_array_equal(labels, masks.labels(0))
    data = COCO(str(tmp_path / "out" / "masks.json"))
    assert [data.cats[index]["name"] for index in (1, 2)] == ["disc", "corner"]
    (image,) = data.imgs.values()
    assert (image["file_name"], image["height"], image["width"]) == ("second.png", 70, 120)
    for name, annotation in zip(("disc", "corner"), data.anns.values(), strict=True):
        found = read_mask(tmp_path / "out" / f"second.{name}.png")
        assert 0 < found.mean() < 1
        np.testing.assert_array_equal(found, masks.binary(0, name))
        np.testing.assert_array_equal(data.annToMask(annotation).astype(bool), found)
        assert annotation["area"] == found.sum() == coco_mask.area(annotation["segmentation"])
        assert annotation["bbox"] == list(coco_mask.toBbox(annotation["segmentation"]))
        assert annotation["file"] == f"second.{name}.png"
        reported = answer.json["pictures"][0]["classes"][name]
        assert reported["segmentation"] == annotation["segmentation"]
        assert reported["score"] == pytest.approx(masks.score(0, name))
    assert Image.open(tmp_path / "out" / "second.overlay.jpg").size == (120, 70)
    assert "UNTRAINED" in answer.json["notes"][0] and "UNTRAINED" in data.dataset["info"]["weights"]


def test_all_classes_share_one_encoder_pass(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    original = OnnxRuntimeEngine.run

    def counting(self: OnnxRuntimeEngine, stage: str, inputs: Any) -> dict[str, np.ndarray]:
        ran.append(stage)
        return original(self, stage, inputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", counting)
    assert segment(workplace, tmp_path / "out", workplace.first, workplace.second).code == 0
    assert ran == ["encoder", "segment", "segment"] * 2


def test_support_and_query_in_one_go(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert segment(workplace, tmp_path / "bank", workplace.second, "--class", "disc").code == 0
    monkeypatch.chdir(tmp_path)
    arguments = ["--support", f"{workplace.first}:{workplace.mask}", "--query", workplace.second]
    assert fssdeploy("segment", workplace.artifact, *arguments, "-o", "named").code == 0
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "fsdino-tiny").symlink_to(workplace.artifact)
    assert fssdeploy("segment", *arguments, "-o", "default", "--class", "my thing").code == 0
    expected = read_mask(tmp_path / "bank" / "second.disc.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "named" / "second.object.png"), expected)
    np.testing.assert_array_equal(read_mask(tmp_path / "default" / "second.my thing.png"), expected)


@pytest.mark.parametrize("mask", ["box:40,20,100,70", "polygon:40,20,100,20,70,70"])
def test_supports_marked_by_text(workplace: Workplace, tmp_path: Path, mask: str) -> None:
    arguments = ["--support", f"{workplace.first}:{mask}", "--support", f"{workplace.second}:box:1,2,50,60"]
    answer = fssdeploy("segment", workplace.artifact, *arguments, workplace.second, "-o", tmp_path / "out", "--json")
    assert answer.code == 0 and list(answer.json["pictures"][0]["classes"]) == ["object"]


@pytest.mark.parametrize("support", ["first.png", ":mask.png", "first.png:", "a:b:box:1,2"])
def test_supports_that_are_refused(workplace: Workplace, tmp_path: Path, support: str) -> None:
    arguments = ["--support", support, workplace.second, "-o", tmp_path / "out"]
    answer = fssdeploy("segment", workplace.artifact, *arguments)
    assert answer.code == 3 and len(answer.err.splitlines()) == 1
    assert names(tmp_path) == []


def test_runtimes_agree(workplace: Workplace, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for runtime in ("onnxruntime", "openvino"):
        arguments = ["--class", "disc", "--runtime", runtime, "--threads", 1]
        assert segment(workplace, tmp_path / runtime, workplace.second, *arguments).code == 0
    first, second = (read_mask(tmp_path / name / "second.disc.png") for name in ("onnxruntime", "openvino"))
    assert (first != second).mean() < 1e-3


def test_a_runtime_that_is_not_installed(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fssdeploy.engines.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    answer = segment(workplace, tmp_path / "out", workplace.second, "--runtime", "openvino")
    assert "pip install 'fssdeploy[openvino]'" in answer.check_refused("runtime_missing", 4)


def picture_files(folder: Path) -> list[Path]:
    """The same picture in every kind of file that is handled rather than refused."""
    colour = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    rgb = Image.fromarray(colour)
    exif = Image.Exif()
    exif[0x0112] = 8
    rgb.save(folder / "rgb.png")
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("1").save(folder / "bit.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(colour[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(colour[:, :1]).save(folder / "thin.png")
    Image.fromarray(colour[:1]).save(folder / "flat.png")
    Image.fromarray(colour[:1, :1]).save(folder / "dot.png")
    return sorted(folder.iterdir())


def test_every_kind_of_picture(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = picture_files(folder)
    answer = segment(workplace, tmp_path / "out", folder, "--class", "disc", "--json")
    assert answer.code == 0 and answer.err == ""
    sizes = {Path(entry["file"]).name: entry["size"] for entry in answer.json["pictures"]}
    assert list(sizes) == [file.name for file in files]
    assert sizes["rotated.jpg"] == [50, 40] and sizes["thin.png"] == [40, 1]
    for file in files:
        assert list(read_mask(tmp_path / "out" / f"{file.stem}.disc.png").shape) == sizes[file.name]


def test_a_hundred_megapixels(workplace: Workplace, tmp_path: Path) -> None:
    Image.new("L", (10_000, 10_000), 90).save(tmp_path / "huge.png", compress_level=1)
    assert segment(workplace, tmp_path / "out", tmp_path / "huge.png", "--class", "disc", "--no-overlays").code == 0
    assert Image.open(tmp_path / "out" / "huge.disc.png").size == (10_000, 10_000)
    assert names(tmp_path / "out") == ["huge.disc.png", "masks.json"]


def bad_pictures(folder: Path, good: Path) -> dict[Path, str]:
    """Files that are no pictures, with the code of their error."""
    data = good.read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    Image.open(good).save(folder / "cut.tif", compression="tiff_lzw")
    (folder / "cut.tif").write_bytes((folder / "cut.tif").read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    Image.fromarray(np.full((4, 4), 7.5, np.float32)).save(folder / "float.tif")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")
    return {
        folder / "cut.png": "picture_damaged",
        folder / "cut.tif": "picture_unreadable",
        folder / "empty.png": "file_empty",
        folder / "float.tif": "picture_range",
        folder / "gone.png": "file_missing",
        folder / "pipe.png": "file_irregular",
        folder / "text.png": "picture_unreadable",
    }


def test_bad_pictures_alone(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for file, code in bad_pictures(tmp_path / "bad", workplace.first).items():
        if code == "file_missing":
            continue  # named on the command line, it is refused before anything is read
        answer = segment(workplace, tmp_path / "new" / "out", file, "--json")
        assert file.name in answer.check_refused(code, 3)
        assert answer.json["error"]["code"] == code
    assert names(tmp_path) == ["bad"]


def test_bad_pictures_among_good_ones(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(workplace.first, folder / "a.png")
    shutil.copy(workplace.second, folder / "z.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    bad = bad_pictures(folder, workplace.first)
    answer = segment(workplace, tmp_path / "out", folder, "--class", "disc", "--json")
    answer.check_refused("pictures_skipped", 3)
    assert {Path(entry["file"]): entry["code"] for entry in answer.json["errors"]} == bad
    assert answer.json["error"]["code"] == "pictures_skipped"
    data = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["a.png", "z.png"]
    assert names(tmp_path / "out") == [
        "a.disc.png",
        "a.overlay.jpg",
        "masks.json",
        "z.disc.png",
        "z.overlay.jpg",
    ]
    for_people = segment(workplace, tmp_path / "again", folder, "--class", "disc")
    assert for_people.code == 3
    assert all(f"SKIPPED '{file}'" in for_people.out for file in bad)


def test_nothing_but_bad_pictures_leaves_no_folder(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    bad_pictures(tmp_path / "bad", workplace.first)
    segment(workplace, tmp_path / "new" / "out", tmp_path / "bad").check_refused("pictures_skipped", 3)
    assert names(tmp_path) == ["bad"]


def test_its_own_masks_are_not_taken_for_pictures(workplace: Workplace, tmp_path: Path) -> None:
    shutil.copy(workplace.first, tmp_path / "a.png")
    shutil.copy(workplace.second, tmp_path / "b.png")
    assert segment(workplace, tmp_path, tmp_path).code == 0
    written = names(tmp_path)
    for _ in range(2):
        answer = segment(workplace, tmp_path, tmp_path, "--json")
        assert [Path(entry["file"]).name for entry in answer.json["pictures"]] == ["a.png", "b.png"]
        assert names(tmp_path) == written


def test_equal_stems_and_repeated_pictures(workplace: Workplace, tmp_path: Path) -> None:
    for folder, source in (("x", workplace.first), ("y", workplace.second)):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "a.png")
    files = [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png", tmp_path / "x" / "a.png"]
    answer = segment(workplace, tmp_path / "out", *files, "--class", "disc", "--json")
    assert [Path(entry["file"]) for entry in answer.json["pictures"]] == files
    shapes = [read_mask(tmp_path / "out" / f"{stem}.disc.png").shape for stem in ("a", "a-2", "a-3")]
    assert shapes == [(90, 120), (70, 120), (90, 120)]


def test_names_of_files_that_are_hard_to_write(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("-o.png", "two\nlines.png", "l" * 250 + ".png", os.fsdecode(b"\xff\xfe.png"), "[bold].png", "ü.PNG"):
        shutil.copy(workplace.second, folder / name)
    for arguments in ([], ["--json"]):
        answer = segment(workplace, tmp_path / "out", folder, "--class", "disc", *arguments)
        assert answer.code == 0, answer.err
    assert len(answer.json["pictures"]) == 6
    data = json.loads((tmp_path / "out" / "masks.json").read_text())
    for annotation in data["annotations"]:
        assert read_mask(tmp_path / "out" / annotation["file"]).shape == (70, 120)


def test_classes_that_are_hard_to_name(workplace: Workplace, tmp_path: Path) -> None:
    wanted = ["a/b", "..", "a,b", "a.b", "labels", "-rf", " edge ", "日本" * 60, "ünï"]
    arguments = ["--image", workplace.first, "--mask", workplace.mask, "--bank", tmp_path / "bank"]
    for name in wanted:
        assert fssdeploy("enroll", workplace.artifact, *arguments, "--", name).code == 0
    command = ["segment", workplace.artifact, "--bank", tmp_path / "bank", workplace.second, "--json"]
    answer = fssdeploy(*command, "-o", tmp_path / "all")
    assert sorted(answer.json["pictures"][0]["classes"]) == sorted(wanted)
    assert len([name for name in names(tmp_path / "all") if name.endswith(".png")]) == len(wanted) + 1
    for text, chosen in {
        "a,b": ["a,b"],
        " edge ": [" edge "],
        "a/b, ..,labels": ["a/b", "..", "labels"],
        "u\u0308ni\u0308": ["ünï"],
        "a.b,a.b": ["a.b"],
    }.items():
        answer = fssdeploy(*command, "-o", tmp_path / "some", f"--class={text}")
        assert list(answer.json["pictures"][0]["classes"]) == chosen
    answer = fssdeploy(*command, "-o", tmp_path / "some", "--class", "a,b", "--class=-rf")
    assert list(answer.json["pictures"][0]["classes"]) == ["a,b", "-rf"]


def test_arguments_that_are_refused(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    picture, bank, support = workplace.second, ["--bank", workplace.bank], f"{workplace.first}:{workplace.mask}"
    cases: list[tuple[str, int, list[object]]] = [
        ("usage", 3, [picture]),
        ("usage", 3, [picture, *bank, "--support", support]),
        ("usage", 3, [picture, *bank, "--nothing"]),
        ("usage", 3, [picture, *bank, "--threads", "two"]),
        ("usage", 3, [picture, "--support", support, "--class", "a", "--class", "b"]),
        ("class_name", 3, [picture, "--support", support, "--class", ""]),
        ("class_name", 3, [picture, *bank, "--class", ""]),
        ("class_unknown", 3, [picture, *bank, "--class", "disk"]),
        ("class_unknown", 3, [picture, *bank, "--class", "disc,disk"]),
        ("threads", 3, [picture, *bank, "--threads", 0]),
        ("threads", 3, [picture, *bank, "--threads", 10**6]),
        ("runtime_unknown", 3, [picture, *bank, "--runtime", "nope"]),
        ("no_pictures", 3, [*bank]),
        ("no_pictures", 3, [tmp_path, *bank]),
        ("file_missing", 3, [tmp_path / "none.png", *bank]),
        ("bank_missing", 3, [picture, "--bank", tmp_path / "none"]),
        ("bank_missing", 3, [picture, "--bank", tmp_path / "file"]),
        ("not_a_folder", 4, [picture, *bank, "-o", tmp_path / "file"]),
        ("not_a_folder", 4, [picture, *bank, "-o", tmp_path / "file" / "below"]),
        ("not_a_folder", 4, [picture, *bank, "-o", "/dev/full"]),
    ]
    for code, exit_code, arguments in cases:
        out = [] if "-o" in arguments else ["-o", tmp_path / "new" / "out"]
        answer = fssdeploy("segment", workplace.artifact, *arguments, *out, "--json")
        answer.check_refused(code, exit_code)
        assert answer.json["error"]["code"] == code and answer.json["error"]["exit_code"] == exit_code
        assert names(tmp_path) == ["file"], arguments


def test_an_artifact_that_is_none(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_artifact() == shipped.artifact()
    monkeypatch.setattr(shipped, "artifact", lambda: None)
    for first in ([tmp_path / "none"], [workplace.second], [tmp_path], []):
        answer = fssdeploy("segment", *first, "--bank", workplace.bank, "--query", workplace.second)
        assert "fssdeploy export" in answer.check_refused("artifact_missing", 3)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_a_list_of_what_is_done(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        shutil.copy(workplace.second, tmp_path / f"{number}.png")
    original = annotate.overlay

    def interrupted(picture: np.ndarray, masks: dict[str, np.ndarray]) -> np.ndarray:
        if (tmp_path / "out" / "2.disc.png").exists():
            raise KeyboardInterrupt
        return original(picture, masks)

    monkeypatch.setattr(annotate, "overlay", interrupted)
    files = [tmp_path / f"{number}.png" for number in range(4)]
    segment(workplace, tmp_path / "out", *files, "--class", "disc").check_refused("interrupted", 130)
    data = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["0.png", "1.png"]
    listed = {annotation["file"] for annotation in data["annotations"]}
    assert {name for name in names(tmp_path / "out") if name.endswith(".png")} == listed


def test_a_full_disk(workplace: Workplace, small_disk: Path) -> None:
    noise = small_disk.parent / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)).save(noise)
    segment(workplace, small_disk / "new" / "out", noise).check_refused("no_space", 4)
    assert names(small_disk) == []
    # The small picture fits, the other does not any more.
    segment(workplace, small_disk / "out", workplace.second, noise).check_refused("no_space", 4)
    data = json.loads((small_disk / "out" / "masks.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["second.png"]
    assert [name for name in names(small_disk / "out") if not name.startswith("second.")] == ["masks.json"]
