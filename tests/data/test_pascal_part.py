"""PASCAL-Part from a miniature VOC2010 folder."""

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
from fssdeploy.data.pascal_part import open_dataset as open_pascal_part
from fssdeploy.errors import InputError
from fssdeploy.images.rle import encode_rle

SIZE = (30, 40)
TRAIN, VAL = [f"2008_{n:06}" for n in range(6)], [f"2010_{n:06}" for n in range(6)]
# Every picture: a dog on the left with a face and two legs; a dog on the right with legs only; nothing else.
FACE, LEGS, OTHER_LEGS = (4, 3, 9, 8), (4, 15, 12, 20), (22, 15, 34, 20)  # x0, y0, x1, y1
BOXES = [(2, 2, 16, 22), (20, 5, 36, 24)]


def box_mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def part(name: str, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    return {"name": name, "mask": [encode_rle(box_mask(box)) for box in boxes]}


def dog(box: tuple[int, int, int, int], *parts: dict[str, Any]) -> dict[str, Any]:
    return {"name": "dog", "bndbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)), "parts": [*parts]}


ANNOTATION = {
    "object": [
        dog(BOXES[0], part("FACE", FACE), part("LEGS", LEGS[:2] + (8, 20)), part("LEGS", (8, *LEGS[1:]))),
        dog(BOXES[1], part("LEGS", OTHER_LEGS)),
        {"name": "sofa", "bndbox": {"xmin": 0, "ymin": 0, "xmax": 40, "ymax": 30}, "parts": []},
    ]
}


def lists() -> dict[str, Any]:
    both, none = {"train": TRAIN, "val": VAL}, {"train": TRAIN, "val": []}
    return {
        "animals": {"object": {"dog": {"part": {"FACE": both, "LEGS": both, "TAIL": none}}}},
        "indoor": {"object": {"sofa": {"part": {"BODY": both}}}},
        "person": {"object": {"person": {"part": {"ARMS": both}}}},
        "vehicles": {"object": {"aeroplane": {"part": {"TAIL": both, "WING": both}}}},
    }


def write_annotation(root: Path, item: str, data: Any) -> None:
    (base(root) / "Annotations_Part_json_merged_part_classes" / f"{item}.json").write_text(json.dumps(data))


def base(root: Path) -> Path:
    return root / "Pascal-Part/VOCdevkit/VOC2010"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("JPEGImages", "Annotations_Part_json_merged_part_classes"):
        (base(tmp_path) / folder).mkdir(parents=True)
    (base(tmp_path) / "all_obj_part_to_image.json").write_text(json.dumps(lists()))
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[:, :20] = 200
    for item in TRAIN + VAL:
        Image.fromarray(picture).save(base(tmp_path) / "JPEGImages" / f"{item}.jpg", quality=95)
        write_annotation(tmp_path, item, ANNOTATION)
    return tmp_path


def find(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_classes_and_lists(root: Path) -> None:
    dataset = open_dataset("pascal-part", root)
    assert dataset.folds == 4
    assert dataset.class_names == ["dog+FACE", "dog+LEGS", "sofa+BODY", "person+ARMS", "aeroplane+WING"]
    assert [list(dataset.classes(fold, "test")) for fold in range(4)] == [[0, 1], [2], [3], [4]]
    assert list(dataset.classes(0, "train")) == [2, 3, 4]
    assert dataset.listing(0, "test") == {0: tuple(VAL), 1: tuple(VAL)}
    assert dataset.listing(1, "train")[0] == tuple(TRAIN)
    pickle.dumps(dataset)


@pytest.mark.parametrize("place", ["", "Pascal-Part", "Pascal-Part/VOCdevkit", "Pascal-Part/VOCdevkit/VOC2010"])
def test_roots(root: Path, place: str) -> None:
    assert open_dataset("pascal-part", root / place).picture(VAL[0]).shape == (*SIZE, 3)


def test_objects_are_cropped(root: Path) -> None:
    dataset = open_dataset("pascal-part", root)
    picture, mask = dataset.load(f"{VAL[0]}#0", 1)
    x0, y0, x1, y1 = BOXES[0]
    assert picture.shape == (y1 - y0, x1 - x0, 3) and (abs(picture.astype(int) - 200) < 10).all()
    np.testing.assert_array_equal(mask, box_mask(LEGS)[y0:y1, x0:x1])
    assert dataset.load(f"{VAL[0]}#1", 0)[1].sum() == 0  # that dog shows no face


def test_without_cropping(root: Path) -> None:
    dataset = open_pascal_part(root, box_crop=False)
    assert dataset.notes
    picture, mask = dataset.load(f"{VAL[0]}#1", 1)
    assert picture.shape == (*SIZE, 3)
    np.testing.assert_array_equal(mask, box_mask(OTHER_LEGS))  # still of this object alone


def test_whole_picture(root: Path) -> None:
    dataset = open_dataset("pascal-part", root)
    np.testing.assert_array_equal(dataset.load(VAL[0], 1)[1], box_mask(LEGS, OTHER_LEGS))
    write_annotation(root, VAL[0], {"object": []})
    assert dataset.load(VAL[0], 1)[1].sum() == 0


def test_test_episodes(root: Path) -> None:
    dataset = open_dataset("pascal-part", root)
    episodes = dataset.test_list(0, 2, 40, seed=1)
    assert [episode.class_index for episode in episodes] == [0, 1] * 20
    objects = set()
    for episode in episodes:
        items = [episode.query, *episode.support]
        assert len({item.partition("#")[0] for item in items}) == 3
        assert all(dataset.load(item, episode.class_index)[1].any() for item in items)
        objects |= {(episode.class_index, item.partition("#")[2]) for item in items}
    assert objects == {(0, "0"), (1, "0"), (1, "1")}
    assert episodes == open_dataset("pascal-part", root).test_list(0, 2, 40, seed=1)
    assert len(dataset.test_list(0, 1, None, seed=0)) == 12  # two classes of six pictures
    assert len(dataset.test_list(3, 1, 0, seed=0)) == 0


def test_val_entries_of_left_out_classes_count(root: Path) -> None:
    dataset = open_dataset("pascal-part", root)
    assert find(dataset.check(), "list vehicles").detail == "12 test episodes of 1 class(es)"


def test_training_episodes(root: Path) -> None:
    dataset = open_dataset("pascal-part", root)
    episodes = [dataset.episode(2, "train", 1, 0, index) for index in range(20)]
    assert {episode.class_index for episode in episodes} == {0, 1}  # no annotation here shows the other base classes
    assert all(item[:4] == "2008" for episode in episodes for item in (episode.query, *episode.support))


def test_pictures_without_the_part_are_passed_over(root: Path) -> None:
    for item in VAL[:3]:
        write_annotation(root, item, {"object": ANNOTATION["object"][1:]})  # no face
    dataset = open_dataset("pascal-part", root)
    for index in range(0, 20, 2):
        episode = dataset.episode(0, "test", 2, 0, index)
        assert {item[:11] for item in (episode.query, *episode.support)} == set(VAL[3:])
    write_annotation(root, VAL[3], {"object": []})
    with pytest.raises(InputError) as caught:
        dataset.episode(0, "test", 2, 0, 0)
    assert caught.value.code == "part_missing"
    with pytest.raises(InputError) as caught:
        dataset.episode(0, "test", 6, 0, 0)
    assert caught.value.code == "class_too_small"


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"object": 3},
        {"object": [{"name": "dog"}]},
        {"object": [dog(BOXES[0], {"name": "LEGS", "mask": [{"size": [30, 40], "counts": "zz"}]})]},
        {"object": [dog(BOXES[0], {"name": "LEGS", "mask": ["x"]})]},
        {"object": [dog((9, 9, 3, 3), part("LEGS", LEGS))]},
        {"object": [dog(BOXES[0], part("LEGS", LEGS)) | {"bndbox": {"xmin": "left"}}]},
        {"object": []},
    ],
)
def test_broken_annotations(root: Path, data: Any) -> None:
    write_annotation(root, VAL[0], data)
    with pytest.raises(InputError) as caught:
        open_dataset("pascal-part", root).mask(f"{VAL[0]}#0", 1)
    assert caught.value.code == "annotations_malformed" and VAL[0] in caught.value.line()


@pytest.mark.parametrize("value", [[], {"animals": {}}, lists() | {"indoor": {"object": {"sofa": {"part": ["x"]}}}}])
def test_broken_lists(root: Path, value: Any) -> None:
    (base(root) / "all_obj_part_to_image.json").write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        open_dataset("pascal-part", root)
    assert caught.value.code == "annotations_malformed"


def test_ids_do_not_lead_out(root: Path) -> None:
    value = lists()
    value["person"]["object"]["person"]["part"]["ARMS"]["val"] = ["../../secret"]
    (base(root) / "all_obj_part_to_image.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="not a picture's id"):
        open_dataset("pascal-part", root)


def test_check(root: Path) -> None:
    findings = open_dataset("pascal-part", root).check()
    assert find(findings, "list animals").state == "ok"
    indoor = find(findings, "list indoor")
    assert indoor.state == "note" and "published are 959 of 4" in indoor.detail
    assert find(findings, "pictures").state == find(findings, "annotations").state == "ok"
    (base(root) / "JPEGImages" / f"{VAL[2]}.jpg").unlink()
    (base(root) / "Annotations_Part_json_merged_part_classes" / f"{VAL[1]}.json").unlink()
    findings = open_dataset("pascal-part", root).check()
    assert "1 of 12" in find(findings, "pictures").detail
    assert find(findings, "annotations").state == "missing" and VAL[1] in find(findings, "annotations").detail


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset("pascal-part", tmp_path)
    assert caught.value.code == "data_missing" and "all_obj_part_to_image.json" in caught.value.line()
