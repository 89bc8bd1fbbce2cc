"""PASCAL-5i from a miniature VOC2012 folder, with the published kind of lists and without."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data import open_dataset
from fssdeploy.data.dataset import Finding
from fssdeploy.errors import InputError

# Picture -> class numbers in its mask; "a" pictures are for training, "b" pictures are in val.txt.
SHOWN = {f"a_{number:02}": (number,) for number in range(1, 21)} | {"a_21": (1, 6), "a_22": (6, 20)}
SHOWN |= {f"b_{number:02}": (number % 20 + 1, (number + 7) % 20 + 1) for number in range(60)}


def make_masks(voc: Path, palette: bool = True) -> None:
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for item, numbers in SHOWN.items():
        labels = np.zeros((12, 16), np.uint8)
        labels[0] = 255
        for place, number in enumerate(numbers):
            labels[2:6, 4 * place : 4 * place + 3] = number
        mask = Image.fromarray(labels)
        if palette:
            mask.putpalette([part for index in range(256) for part in (index, 255 - index, 7)])
        mask.save(voc / "SegmentationClassAug" / f"{item}.png")
        Image.new("RGB", (16, 12), (250, 10, 10)).save(voc / "JPEGImages" / f"{item}.jpg")
    val = "\n".join(item for item in SHOWN if item.startswith("b"))
    (voc / "ImageSets/Segmentation/val.txt").write_text(val + "\n")


def make_lists(place: Path) -> None:
    for folder, start in (("trn", "a"), ("val", "b")):
        for fold in range(4):
            lines = [
                f"{item}__{number:02}"
                for item, numbers in SHOWN.items()
                for number in numbers
                if item.startswith(start) and (number - 1) // 5 == fold
            ]
            path = place / "splits" / folder / f"fold{fold}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_masks(tmp_path / "VOC2012")
    return tmp_path


def find(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


@pytest.mark.parametrize("place", ["", "VOC2012"])
def test_reads_the_lists(root: Path, place: str) -> None:
    make_lists(root / place)
    dataset = open_dataset("pascal-5i", root)
    assert dataset.notes == []
    assert list(dataset.classes(0, "test")) == [0, 1, 2, 3, 4]
    test, train = dataset.listing(1, "test"), dataset.listing(1, "train")
    assert list(test) == [5, 6, 7, 8, 9]
    assert list(test[5]) == [item for item, numbers in SHOWN.items() if 6 in numbers and item[0] == "b"]
    assert list(train) == [0, 1, 2, 3, 4, *range(10, 20)]
    assert train[0] == ("a_01", "a_21") and train[19] == ("a_20", "a_22")  # pictures that show class 6 are not dropped


def test_folder_itself_is_a_root(root: Path) -> None:
    make_lists(root / "VOC2012")
    assert open_dataset("pascal-5i", root / "VOC2012").listing(3, "test")[19]


def test_derives_what_the_lists_would_hold(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    derived = open_dataset("pascal-5i", root)
    assert len(derived.notes) == 2 and all("derived" in note for note in derived.notes)
    listed = tmp_path_factory.mktemp("listed")
    shutil.copytree(root, listed, dirs_exist_ok=True)
    make_lists(listed)
    read = open_dataset("pascal-5i", listed)
    for fold in range(4):
        for split in ("train", "test"):
            assert derived.listing(fold, split) == read.listing(fold, split)
    assert find(derived.check(), "list val/fold0").state == "note"
    assert "derived" in find(derived.check(), "list val/fold0").detail


def test_derives_training_from_trainaug(root: Path) -> None:
    (root / "VOC2012/ImageSets/Segmentation/trainaug.txt").write_text("a_21\na_03\n")
    train = open_dataset("pascal-5i", root).listing(3, "train")
    assert train[0] == ("a_21",) and train[2] == ("a_03",) and train[1] == ()


@pytest.mark.parametrize("palette", [True, False])
def test_masks(tmp_path: Path, palette: bool) -> None:
    make_masks(tmp_path / "VOC2012", palette)
    dataset = open_dataset("pascal-5i", tmp_path)
    picture, mask = dataset.load("a_21", 5)
    assert picture.shape == (12, 16, 3) and mask.shape == (12, 16) and mask.dtype == np.uint8
    assert (mask[0] == 255).all() and (mask[1] == 0).all()
    assert (mask[2:6, 4:7] == 1).all()
    assert (mask[2:6, 0:3] == 0).all()  # the other class is background
    assert np.count_nonzero(mask == 1) == 12


def test_episodes_hold_the_class_and_differ(root: Path) -> None:
    make_lists(root)
    dataset = open_dataset("pascal-5i", root)
    pickle.dumps(dataset)  # loader processes get a copy
    episodes = dataset.test_list(2, 5, 40, seed=3)
    assert len(episodes) == 40 and len({episode.class_index for episode in episodes}) == 5
    for episode in episodes:
        items = {episode.query, *episode.support}
        assert len(items) == 6
        assert all(dataset.mask(item, episode.class_index).max() and item.startswith("b") for item in items)
        assert all((dataset.mask(item, episode.class_index) == 1).any() for item in items)
    assert episodes == open_dataset("pascal-5i", root).test_list(2, 5, 40, seed=3)
    assert len(dataset.test_list(0, 1, None, seed=0)) == 1000


def test_a_line_twice_is_one_entry(root: Path) -> None:
    make_lists(root)
    path = root / "splits/val/fold0.txt"
    path.write_text(path.read_text() * 2)
    items = open_dataset("pascal-5i", root).listing(0, "test")[0]
    assert len(items) == len(set(items))


@pytest.mark.parametrize("line", ["b_01", "b_01__21", "b_01__00", "../../b_01__01", "b_01__x", "b_01__²"])
def test_broken_list(root: Path, line: str) -> None:
    make_lists(root)
    (root / "splits/val/fold0.txt").write_text(f"b_00__01\n{line}\n")
    dataset = open_dataset("pascal-5i", root)
    with pytest.raises(InputError) as caught:
        dataset.listing(0, "test")
    assert caught.value.code == "list_malformed"
    assert find(dataset.check(), "list val/fold0").state == "missing"


def test_coloured_masks_are_refused(root: Path) -> None:
    make_lists(root)
    Image.new("RGB", (16, 12), (128, 0, 0)).save(root / "VOC2012/SegmentationClassAug/b_00.png")
    Image.fromarray(np.full((12, 16), 150, np.uint8)).save(root / "VOC2012/SegmentationClassAug/b_01.png")
    for item, code in (("b_00", "mask_shape"), ("b_01", "mask_labels")):
        with pytest.raises(InputError) as caught:
            open_dataset("pascal-5i", root).mask(item, 0)
        assert caught.value.code == code


def test_damaged_and_missing_pictures(root: Path) -> None:
    make_lists(root)
    dataset = open_dataset("pascal-5i", root)
    picture = root / "VOC2012/JPEGImages/b_00.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(InputError, match="b_00"):
        dataset.load("b_00", 0)
    picture.unlink()
    with pytest.raises(InputError) as caught:
        dataset.load("b_00", 0)
    assert caught.value.code == "file_missing"
    finding = find(dataset.check(), "pictures")
    assert finding.state == "missing" and "1 of 82" in finding.detail and "b_00.jpg" in finding.detail
    assert find(dataset.check(), "masks").state == "ok"


def test_check_names_what_is_missing(root: Path) -> None:
    shutil.rmtree(root / "VOC2012/SegmentationClassAug")
    make_lists(root)
    findings = open_dataset("pascal-5i", root).check()
    masks = find(findings, "masks")
    assert masks.state == "missing" and "SegmentationClassAug" in masks.source
    count = find(findings, "list trn/fold2")
    assert count.state == "note" and "5,883" in count.detail
    shutil.rmtree(root / "splits")
    (root / "VOC2012/ImageSets/Segmentation/val.txt").unlink()
    assert find(open_dataset("pascal-5i", root).check(), "list val/fold0").state == "missing"


def test_counts_as_published_are_ok(root: Path) -> None:
    make_lists(root)
    lines = [f"x_{number}__03" for number in range(346)]
    (root / "splits/val/fold0.txt").write_text("\n".join(lines))
    assert find(open_dataset("pascal-5i", root).check(), "list val/fold0").state == "ok"


def test_nothing_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError) as caught:
            open_dataset("pascal-5i", place)
        assert caught.value.code == "data_missing" and "SegmentationClassAug" in caught.value.line()


def test_folds_end(root: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset("pascal-5i", root).listing(4, "test")
    assert caught.value.code == "fold_unknown"
