"""LVIS-92i from a miniature copy: 25 classes, some with too few pictures."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data import open_dataset
from fssdeploy.data.dataset import Finding
from fssdeploy.errors import InputError
from fssdeploy.images.rle import encode_rle

SIZE = (16, 24)
# Pictures of class index 0 to 24 in the validation file: 0 and 1 are too few for one shot, 2 for two.
VAL_COUNTS = [0, 1, 2] + [4] * 20 + [2, 1]
# 0-based; those with more than one picture, and those with more than two
KEPT = {1: list(range(2, 24)), 2: list(range(3, 23))}


def name(number: int) -> str:
    return f"{'val' if number % 2 else 'train'}2017/{number:012}.jpg"


def annotations(first_picture: int, counts: list[int]) -> dict[str, Any]:
    rows = []
    for index, count in enumerate(counts):
        for number in range(count):
            picture = first_picture + (3 * index + number) % 40
            mask = np.zeros(SIZE, bool)
            mask[2:6, 2:8] = True
            rows.append({"image_id": picture, "segmentation": encode_rle(mask)})
            rows.append({"image_id": picture, "segmentation": [[10, 3, 20, 3, 20, 9, 10, 9]]})
            for row in rows[-2:]:
                row |= {"category_id": 100 + index, "area": 24.0}  # LVIS has no iscrowd
    return {
        "categories": [{"id": 100 + index, "name": f"class{index}"} for index in reversed(range(len(counts)))],
        "images": [
            {"id": number, "coco_url": f"http://example.org/{name(number)}", "height": SIZE[0], "width": SIZE[1]}
            for number in range(first_picture, first_picture + 40)
        ],
        "annotations": rows,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "LVIS"
    for part in ("train2017", "val2017"):
        (base / "coco" / part).mkdir(parents=True)
    (base / "lvis_v1_val.json").write_text(json.dumps(annotations(0, VAL_COUNTS)))
    (base / "lvis_v1_train.json").write_text(json.dumps(annotations(40, [3, 1] + [4] * 23)))
    for number in range(80):
        Image.new("RGB", SIZE[::-1]).save(base / "coco" / name(number))
    return tmp_path


def find(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_folds_take_every_tenth_kept_class(root: Path) -> None:
    dataset = open_dataset("lvis-92i", root)
    assert dataset.class_names[3] == "class3" and len(dataset.class_names) == 25
    for fold in range(10):  # 22 kept: two a fold, the last two in none
        assert list(dataset.classes(fold, "test")) == [KEPT[1][fold], KEPT[1][fold + 10]]
    assert dataset.listing(0, "test")[2] == (name(6), name(7))


def test_membership_follows_the_shots(root: Path) -> None:
    dataset = open_dataset("lvis-92i", root)
    for shot, kept in KEPT.items():
        episodes = dataset.test_list(1, shot, 7, seed=5)
        assert [episode.class_index for episode in episodes] == [kept[1], kept[11]] * 3 + [kept[1]]
        for episode in episodes:
            items = {episode.query, *episode.support}
            assert len(items) == shot + 1
            assert all(dataset.mask(item, episode.class_index).any() for item in items)
    with pytest.raises(InputError) as caught:
        dataset.episode(0, "test", 9, 0, 0)
    assert caught.value.code == "no_classes"


def test_published_number_of_episodes(root: Path) -> None:
    dataset = open_dataset("lvis-92i", root)
    episodes = dataset.test_list(0, 1, None, seed=0)
    assert len(episodes) == 2300
    assert len({(episode.query, episode.support) for episode in episodes}) > 5


def test_training(root: Path) -> None:
    dataset = open_dataset("lvis-92i", root)
    # All but the novel 2 and 12, and class 1, which has a single training picture.
    assert list(dataset.classes(0, "train")) == [index for index in range(25) if index not in (1, 2, 12)]
    assert dataset.listing(0, "train")[0] == (name(40), name(41), name(42))
    drawn = {dataset.episode(0, "train", 3, 0, index).class_index for index in range(200)}
    # With three shots 3 and 13 are novel, and class 0 has a picture too few.
    assert drawn == {2, *range(4, 25)} - {13}
    assert dataset.mask(name(40), 0).any()
    (root / "LVIS/lvis_v1_train.json").unlink()
    with pytest.raises(InputError) as caught:
        open_dataset("lvis-92i", root).listing(0, "train")
    assert caught.value.code == "file_missing"


def test_mask_is_the_union_of_instances(root: Path) -> None:
    dataset = open_dataset("lvis-92i", root)
    _, mask = dataset.load(name(9), 3)
    expected = np.zeros(SIZE, np.uint8)
    expected[2:6, 2:8] = expected[3:9, 10:20] = 1
    np.testing.assert_array_equal(mask, expected)
    pickle.dumps(dataset)


def test_picture_missing(root: Path) -> None:
    dataset = open_dataset("lvis-92i", root)
    (root / "LVIS/coco" / name(9)).unlink()
    with pytest.raises(InputError) as caught:
        dataset.load(name(9), 3)
    assert caught.value.code == "file_missing"
    finding = find(dataset.check(), "pictures test")
    assert finding.state == "missing" and name(9) in finding.detail


def test_check(root: Path) -> None:
    findings = open_dataset("lvis-92i", root / "LVIS").check()
    classes = find(findings, "classes")
    assert classes.state == "note" and "22 classes" in classes.detail and "2 a fold; published are 92" in classes.detail
    assert find(findings, "pictures test").state == find(findings, "pictures train").state == "ok"
    (root / "LVIS/lvis_v1_train.json").unlink()
    train = find(open_dataset("lvis-92i", root).check(), "annotations train")
    assert train.state == "note" and "only to train" in train.detail
    (root / "LVIS/lvis_v1_train.json").write_text("{")
    assert find(open_dataset("lvis-92i", root).check(), "annotations train").state == "missing"


def test_check_reports_broken_outlines(root: Path) -> None:
    data = annotations(0, VAL_COUNTS)
    for row in data["annotations"][:2]:  # the instances of one class in one picture
        row |= {"segmentation": [[1, 2, 3]], "area": 1}
    (root / "LVIS/lvis_v1_val.json").write_text(json.dumps(data))
    finding = find(open_dataset("lvis-92i", root).check(), "annotations test")
    assert finding.state == "missing" and "x, y" in finding.detail


def test_train_file_of_another_set_is_refused(root: Path) -> None:
    (root / "LVIS/lvis_v1_train.json").write_text(json.dumps(annotations(40, [4] * 24)))
    with pytest.raises(InputError) as caught:
        open_dataset("lvis-92i", root).listing(0, "train")
    assert caught.value.code == "annotations_malformed"


def test_nothing_there_or_pickles(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset("lvis-92i", tmp_path)
    assert caught.value.code == "data_missing" and "lvis_v1_val.json" in caught.value.line()
    (tmp_path / "lvis_val.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="pickles are never opened"):
        open_dataset("lvis-92i", tmp_path)
