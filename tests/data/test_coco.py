"""COCO-style annotations, and COCO-20i from a miniature COCO2014 folder."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data import open_dataset
from fssdeploy.data.coco_json import CocoAnnotations
from fssdeploy.data.dataset import Finding
from fssdeploy.errors import InputError
from fssdeploy.images.rle import encode_rle

HEIGHT, WIDTH = 20, 30
CATEGORY_IDS = [number for number in range(1, 91) if number % 9]  # 80 ids with gaps, as COCO's


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def box_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def annotation(category: int, picture: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {"category_id": category, "image_id": picture, "segmentation": segmentation, "iscrowd": 0, **more}


SMALL: dict[str, Any] = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    "images": [{"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH} for number in (5, 2, 9)],
    "annotations": [
        annotation(3, 5, [box_polygon(2, 3, 8, 9), box_polygon(20, 3, 25, 9)], area=66),
        annotation(3, 5, encode_rle(box_mask(6, 6, 12, 14).astype(bool)), area=48),
        annotation(3, 2, [box_polygon(1, 1, 9, 9)], area=64),
        annotation(7, 9, {"size": [HEIGHT, WIDTH], "counts": [0, 40, 560]}, iscrowd=1, area=40),
        annotation(7, 5, [[4, 4, 4.1, 4, 4.1, 4.1]], area=0.005),  # covers the centre of no pixel
        annotation(7, 2, {"size": [HEIGHT, WIDTH], "counts": [0, 3, 597]}, area=3),
        annotation(3, 9, []),  # a box without an outline
    ],
}


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def changed(*keys: Any, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(SMALL)
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return data


def test_annotations(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    annotations = CocoAnnotations(write(tmp_path / "a.json", SMALL))
    assert annotations.categories == {3: "cat", 7: "dog"} and list(annotations.categories) == [3, 7]
    assert annotations.pictures(3) == (2, 5)
    assert annotations.pictures(7) == (2,)  # neither the crowd nor the outline without a pixel
    assert annotations.file_name(5) == "5.jpg" and annotations.find("5.jpg") == 5 and annotations.size(5) == (20, 30)
    assert annotations.has("9.jpg") and not annotations.has("1.jpg")
    union = annotations.mask(5, 3)
    assert union.dtype == np.uint8
    np.testing.assert_array_equal(union, box_mask(2, 3, 8, 9) | box_mask(20, 3, 25, 9) | box_mask(6, 6, 12, 14))
    assert annotations.mask(9, 7).sum() == 0
    assert annotations.mask(2, 7)[:3, 0].all() and annotations.mask(2, 7).sum() == 3  # down the columns
    pickle.dumps(annotations)
    assert capfd.readouterr() == ("", "")


def test_area_may_be_absent(tmp_path: Path) -> None:
    data = copy.deepcopy(SMALL)
    for each in data["annotations"]:
        each.pop("area", None)
    annotations = CocoAnnotations(write(tmp_path / "a.json", data))
    assert annotations.pictures(3) == (2, 5) and annotations.pictures(7) == (2,)


def test_coco_url_stands_in_for_the_file_name(tmp_path: Path) -> None:
    image = {"id": 1, "coco_url": "http://example.org/train2017/000000000001.jpg", "height": 2, "width": 3}
    data = {"categories": [], "images": [image], "annotations": []}
    assert CocoAnnotations(write(tmp_path / "a.json", data)).file_name(1) == "train2017/000000000001.jpg"


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"categories": [], "images": []},
        changed("categories", value=[{"id": 3}]),
        changed("categories", value=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]),
        changed("categories", 0, "id", value="7"),
        changed("images", 0, "id", value=2),
        changed("images", 0, "height", value=0),
        changed("images", 0, "height", value=10**9),
        changed("images", 0, "file_name", value="../secret.jpg"),
        changed("images", 0, "file_name", value="/etc/passwd"),
        changed("annotations", 0, "image_id", value=77),
        changed("annotations", 0, "category_id", value=[3]),
        changed("annotations", 0, "area", value="large"),
        changed("annotations", value=[5]),
    ],
)
def test_broken_files(tmp_path: Path, data: Any) -> None:
    with pytest.raises(InputError) as caught:
        CocoAnnotations(write(tmp_path / "a.json", data))
    assert caught.value.code == "annotations_malformed" and "\n" not in caught.value.line()


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b'{"segmentation": [["x"]]}', b"[" * 100_000])
def test_not_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        CocoAnnotations(tmp_path / "a.json")
    assert caught.value.code == "json_malformed"


@pytest.mark.parametrize(
    "outline",
    [
        [[1, 1, 5, 1, 5]],
        [[1, 1, 5, 1, 5, 1e9]],
        [[-1e5, 1, 5, 1, 5, 5]],
        [[1, 1, math.nan, 1, 5, 5]],
        [[[1, 1, 5, 1, 5, 5]]],
        {"size": [HEIGHT, WIDTH], "counts": "zzzz"},
        {"size": [WIDTH, HEIGHT], "counts": [600]},
        {"counts": [600]},
        "polygon",
    ],
)
def test_broken_outlines(tmp_path: Path, outline: Any) -> None:
    path = write(tmp_path / "a.json", changed("annotations", 0, "segmentation", value=outline))
    with pytest.raises(InputError) as caught:
        CocoAnnotations(path).mask(5, 3)
    assert caught.value.code == "annotations_malformed" and "'cat' in '5.jpg'" in caught.value.line()


def test_two_points_enclose_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", changed("annotations", 2, "segmentation", value=[[1, 1, 9, 9]]))
    assert not CocoAnnotations(path).mask(2, 3).any()


# COCO-20i: picture n shows the classes n % 80 and (n + 1) % 80, side by side.
PICTURES = range(160)


def part_json(part: str) -> dict[str, Any]:
    annotations = []
    for number in PICTURES:
        for place, index in enumerate((number % 80, (number + 1) % 80)):
            outline = [box_polygon(10 * place + 2, 5, 10 * place + 8, 15)]
            annotations.append(annotation(CATEGORY_IDS[index], number, outline, area=60))
    # A crowd of class 8 in a picture that shows only classes 0 and 1.
    annotations.append(annotation(CATEGORY_IDS[8], 0, {"size": [20, 30], "counts": [0, 600]}, iscrowd=1, area=600))
    return {
        "categories": [{"id": each, "name": f"category {each}"} for each in reversed(CATEGORY_IDS)],
        "images": [
            {"id": number, "file_name": f"COCO_{part}_{number:012}.jpg", "height": 20, "width": 30}
            for number in reversed(PICTURES)
        ],
        "annotations": annotations,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "COCO2014"
    for part in ("train2014", "val2014"):
        write(base / f"annotations/instances_{part}.json", part_json(part))
        (base / part).mkdir()
        Image.new("RGB", (30, 20)).save(base / part / "picture.jpg")
        for number in PICTURES:
            (base / part / f"COCO_{part}_{number:012}.jpg").hardlink_to(base / part / "picture.jpg")
    return tmp_path


def item(number: int, part: str = "val2014") -> str:
    return f"{part}/COCO_{part}_{number:012}.jpg"


def find(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_derived_lists(root: Path) -> None:
    dataset = open_dataset("coco-20i", root)
    test = dataset.listing(1, "test")
    assert list(test) == list(range(1, 80, 4))
    assert test[5] == (item(4), item(5), item(84), item(85))
    train = dataset.listing(1, "train")
    assert list(train) == [index for index in range(80) if index % 4 != 1]
    assert train[0] == tuple(item(number, "train2014") for number in (0, 79, 80, 159))
    assert item(0) not in dataset.listing(0, "test")[8]  # a crowd only
    assert any("derived" in note for note in dataset.notes)
    assert dataset.class_names[0] == "person" and dataset.class_names[79] == "toothbrush"


def test_masks_from_annotations(root: Path) -> None:
    dataset = open_dataset("coco-20i", root)
    _, mask = dataset.load(item(4), 5)
    np.testing.assert_array_equal(mask, box_mask(12, 5, 18, 15))
    assert any("drawn" in note for note in dataset.notes)
    with pytest.raises(InputError) as caught:
        dataset.mask("val2014/unheard_of.jpg", 5)
    assert caught.value.code == "picture_unknown"


def test_masks_from_pictures(root: Path) -> None:
    folder = root / "COCO2014/annotations/val2014"
    folder.mkdir()
    labels = 6 * box_mask(1, 1, 4, 4) + 80 * box_mask(5, 5, 9, 9)
    Image.fromarray(labels).save(folder / "COCO_val2014_000000000004.png")
    dataset = open_dataset("coco-20i", root)
    np.testing.assert_array_equal(dataset.mask(item(4), 5), box_mask(1, 1, 4, 4))
    np.testing.assert_array_equal(dataset.mask(item(4), 79), box_mask(5, 5, 9, 9))
    assert dataset.mask(item(4, "train2014"), 5).any()  # that part has no PNG masks
    with pytest.raises(InputError) as caught:
        dataset.mask(item(5), 5)
    assert caught.value.code == "file_missing"
    Image.new("RGB", (30, 20)).save(folder / "COCO_val2014_000000000005.png")
    with pytest.raises(InputError) as caught:
        dataset.mask(item(5), 5)
    assert caught.value.code == "mask_shape"


def test_lists_as_json(root: Path) -> None:
    for fold in range(4):
        lists = {str(index): [item(index), item(index + 80), item(index)] for index in range(fold, 80, 4)}
        write(root / f"COCO2014/splits/val/fold{fold}.json", lists)
    dataset = open_dataset("coco-20i", root)
    assert dataset.listing(2, "test")[6] == (item(6), item(86))
    assert not any("test list" in note for note in dataset.notes)
    assert dataset.listing(2, "train")[0]  # derived
    write(root / "COCO2014/splits/val/fold0.json", {"0": ["../../../etc/passwd"]})
    with pytest.raises(InputError) as caught:
        dataset.listing(0, "test")
    assert caught.value.code == "item_unknown"
    assert find(dataset.check(), "list val/fold0").state == "missing"


@pytest.mark.parametrize("data", [[], {"a": []}, {"0": 5}, {"0": [5]}])
def test_broken_lists(root: Path, data: Any) -> None:
    for fold in range(4):
        write(root / f"COCO2014/splits/val/fold{fold}.json", data)
    with pytest.raises(InputError) as caught:
        open_dataset("coco-20i", root).listing(0, "test")
    assert caught.value.code == "list_malformed"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_items_do_not_lead_out(root: Path, name: str) -> None:
    dataset = open_dataset("coco-20i", root)
    with pytest.raises(InputError) as caught:
        dataset.load(name, 0)
    assert caught.value.code == "item_unknown"


def test_test_episodes(root: Path) -> None:
    dataset = open_dataset("coco-20i", root)
    pickle.dumps(dataset)
    episodes = dataset.test_list(3, 3, None, seed=1)
    assert len(episodes) == 1000
    assert {episode.class_index for episode in episodes} == set(range(3, 80, 4))
    for episode in episodes[:20]:
        assert len({episode.query, *episode.support}) == 4
        assert all(dataset.mask(each, episode.class_index).any() for each in (episode.query, *episode.support))


def test_check(root: Path) -> None:
    findings = open_dataset("coco-20i", root).check()
    fold = find(findings, "list val/fold0")
    assert fold.state == "note" and "80 entries over 80 pictures" in fold.detail and "35,783 over 26,052" in fold.detail
    assert find(findings, "pictures val2014").state == "ok"
    assert find(findings, "masks val2014").state == "note"
    (root / "COCO2014/val2014/COCO_val2014_000000000003.jpg").unlink()
    (root / "COCO2014/annotations/instances_train2014.json").unlink()
    (root / "COCO2014/splits/val").mkdir(parents=True)
    (root / "COCO2014/splits/val/fold0.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (root / "COCO2014/annotations/val2014").mkdir()
    findings = open_dataset("coco-20i", root).check()
    assert "1 of 160" in find(findings, "pictures val2014").detail
    assert find(findings, "list trn/fold1").state == "missing"
    assert "pickle" in find(findings, "list val/fold0").detail
    assert find(findings, "masks val2014").state == "missing"


def test_other_annotations_are_refused(root: Path) -> None:
    write(root / "COCO2014/annotations/instances_val2014.json", SMALL)
    with pytest.raises(InputError) as caught:
        open_dataset("coco-20i", root).listing(0, "test")
    assert caught.value.code == "annotations_malformed"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset("coco-20i", tmp_path)
    assert caught.value.code == "data_missing" and "instances_" in caught.value.line()
