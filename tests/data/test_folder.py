"""One's own data: three layouts, folds, and every complaint of the check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.dataset import Dataset, Finding
from fssdeploy.data.folder import open_dataset
from fssdeploy.errors import InputError
from fssdeploy.images.masks import save_mask

SIZE = (8, 12)
OBJECT = np.zeros(SIZE, bool)
OBJECT[2:6, 3:9] = True
CLASSES = {"bolt": 7, "nut": 6, "ring": 6}

Places = Callable[[str], tuple[Path, Path]]


def by_class(root: Path) -> Places:
    return lambda name: (root / name / "images", root / name / "masks")


def by_kind(root: Path) -> Places:
    return lambda name: (root / "images" / name, root / "masks" / name)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8))


def fill(places: Places) -> None:
    for number, (name, count) in enumerate(CLASSES.items()):
        pictures, masks = places(name)
        pictures.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index in range(count):
            picture(100 * number + index).save(pictures / f"p{index}.{'png' if index % 2 else 'jpg'}")
            save_mask(masks / f"p{index}.png", OBJECT)


def fill_coco(root: Path, folder: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    data: dict[str, list[dict[str, object]]] = {"images": [], "categories": [], "annotations": []}
    for number, (name, count) in enumerate(CLASSES.items()):
        data["categories"].append({"id": number + 1, "name": name})
        for index in range(count):
            key = 100 * number + index
            picture(key).save(root / folder / f"{name}{index}.png")
            data["images"].append({"id": key, "height": 8, "width": 12, "file_name": f"{name}{index}.png"})
            square = [3, 2, 9, 2, 9, 6, 3, 6]
            annotation = {"image_id": key, "category_id": number + 1, "segmentation": [square], "area": 24}
            data["annotations"].append(annotation)
    (root / "annotations.json").write_text(json.dumps(data))


@pytest.fixture(params=["class/images", "images/class", "coco in images", "coco beside"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param.startswith("coco"):
        fill_coco(tmp_path, "images" if request.param == "coco in images" else ".")
    else:
        fill((by_class if request.param == "class/images" else by_kind)(tmp_path))
    return tmp_path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    fill(by_class(tmp_path))
    return by_class(tmp_path)


def findings_of(root: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in open_dataset(root).check()}


def test_every_layout(root: Path) -> None:
    data = open_dataset(root)
    assert list(data.class_names) == ["bolt", "nut", "ring"] and data.folds == 1
    assert [len(items) for items in data.listing(0, "test").values()] == [7, 6, 6]
    for index, items in data.listing(0, "test").items():
        for item in items:
            shown, mask = data.load(item, index)
            assert shown.shape == (*SIZE, 3)
            np.testing.assert_array_equal(mask, OBJECT)
    assert all(len(set(episode.support)) == 5 for episode in data.test_list(0, 5, 30, seed=0))
    findings = data.check()
    assert [finding.what for finding in findings if finding.state != "ok"] == ["folds"]
    with pytest.raises(InputError) as caught:
        data.picture("bolt/../../secret.jpg")
    assert caught.value.code == "item_unknown"


def test_without_folds_every_class_is_in_both_splits(root: Path) -> None:
    data = open_dataset(root)
    assert list(data.classes(0, "test")) == list(data.classes(0, "train")) == [0, 1, 2]
    assert any("folds.json" in note for note in data.notes)


def test_folds(root: Path) -> None:
    (root / "folds.json").write_text('[["ring"], ["bolt"]]')
    data = open_dataset(root)
    assert data.folds == 2 and not data.notes
    assert [data.classes(fold, "test") for fold in (0, 1)] == [[2], [0]]
    assert [data.classes(fold, "train") for fold in (0, 1)] == [[0, 1], [1, 2]]
    assert {finding.state for finding in data.check()} == {"ok"}
    with pytest.raises(InputError, match="no fold 2"):
        data.listing(2, "test")


@pytest.mark.parametrize("text", ["[", "{}", "[]", "[[]]", '["bolt"]', '[["cog"]]', '[["bolt"], ["bolt"]]', "[[1]]"])
def test_folds_that_are_none(places: Places, tmp_path: Path, text: str) -> None:
    (tmp_path / "folds.json").write_text(text)
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path)
    assert caught.value.code == "folds_unreadable"


@pytest.mark.parametrize("layout", ["nothing", "pictures without folders", "no such directory"])
def test_no_layout(tmp_path: Path, layout: str) -> None:
    if layout == "pictures without folders":
        picture(0).save(tmp_path / "p0.png")
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path / "none" if layout == "no such directory" else tmp_path)
    assert caught.value.code == "data_missing"
    assert "CLASS/masks" in caught.value.fix


# --- masks ----------------------------------------------------------------------------------------------------------


def write_mask(places: Places, image: Image.Image) -> None:
    image.save(places("bolt")[1] / "p0.png")


def load(root: Path) -> np.ndarray:
    data: Dataset = open_dataset(root)
    return data.mask("bolt/p0.jpg", 0)


@pytest.mark.parametrize("value", [1, 7, 128, 255])
def test_masks_of_two_values(places: Places, tmp_path: Path, value: int) -> None:
    write_mask(places, Image.fromarray(OBJECT.astype(np.uint8) * np.uint8(value)))
    np.testing.assert_array_equal(load(tmp_path), OBJECT)


def test_masks_with_ignored_pixels(places: Places, tmp_path: Path) -> None:
    values = OBJECT.astype(np.uint8)
    values[0] = 255
    write_mask(places, Image.fromarray(values))
    np.testing.assert_array_equal(load(tmp_path), values)


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA"])
def test_masks_of_other_modes(places: Places, tmp_path: Path, mode: str) -> None:
    write_mask(places, Image.fromarray(OBJECT).convert(mode))
    np.testing.assert_array_equal(load(tmp_path), OBJECT)


def three_values() -> Image.Image:
    values = OBJECT.astype(np.uint8) * 3
    values[0, 0] = 9
    return Image.fromarray(values)


def only_ignored() -> Image.Image:
    """Indexed masks, as VOC has them: 255 is the border of nothing."""
    image = Image.fromarray(OBJECT.astype(np.uint8) * np.uint8(255))
    image.putpalette(list(range(256)) * 3)
    return image


def red() -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(OBJECT).convert("L"), *[Image.new("L", SIZE[::-1])] * 2])


@pytest.mark.parametrize(
    ("image", "code", "what"),
    [
        (lambda: Image.new("L", SIZE[::-1]), "mask_empty", "empty masks"),
        (lambda: Image.new("L", (5, 4), 1), "mask_size", "masks of another size than their picture"),
        (only_ignored, "mask_empty", "empty masks"),
        (three_values, "mask_labels", "masks with unknown values"),
        (red, "mask_shape", "masks with unknown values"),
        (lambda: picture(0).convert("L"), "mask_grey", "masks with unknown values"),
    ],
)
def test_masks_that_are_refused(
    places: Places, tmp_path: Path, image: Callable[[], Image.Image], code: str, what: str
) -> None:
    write_mask(places, image())
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path).load("bolt/p0.jpg", 0)
    assert caught.value.code == code
    wrong = {name: finding for name, finding in findings_of(tmp_path).items() if finding.state == "missing"}
    assert list(wrong) == [what] and "bolt/p0.jpg" in wrong[what].detail


# --- the check ------------------------------------------------------------------------------------------------------


def test_missing_and_doubled_masks(places: Places, tmp_path: Path) -> None:
    _, masks = places("nut")
    (masks / "p1.png").unlink()
    shutil.copy(masks / "p2.png", masks / "p2.bmp")
    data = open_dataset(tmp_path)
    assert len(data.listing(0, "test")[1]) == 4
    assert any("2 picture(s) without exactly one mask" in note for note in data.notes)
    findings = findings_of(tmp_path)
    assert findings["pictures without a mask"].state == "missing"
    assert "nut/p1.png" in findings["pictures without a mask"].detail
    assert "nut/p2.jpg" in findings["pictures with several masks"].detail
    with pytest.raises(InputError) as caught:
        data.picture("nut/p1.png")
    assert caught.value.code == "item_unknown"


def test_no_masks_at_all(places: Places, tmp_path: Path) -> None:
    shutil.rmtree(places("ring")[1])
    findings = findings_of(tmp_path)
    assert findings["pictures without a mask"].detail.startswith("6:")
    assert "ring" in findings["classes with fewer than 2 pictures"].detail


def test_damaged_pictures(places: Places, tmp_path: Path) -> None:
    (places("bolt")[0] / "p0.jpg").write_bytes(b"not a picture")
    finding = findings_of(tmp_path)["files that cannot be read"]
    assert finding.state == "missing" and "bolt/p0.jpg" in finding.detail


def test_missing_pictures_of_a_coco_file(tmp_path: Path) -> None:
    fill_coco(tmp_path, "images")
    (tmp_path / "images" / "nut3.png").unlink()
    finding = findings_of(tmp_path)["files that cannot be read"]
    assert finding.state == "missing" and "nut3.png (nut)" in finding.detail


def test_coco_pictures_of_several_classes_unused_categories_and_names(tmp_path: Path) -> None:
    fill_coco(tmp_path, "images")
    path = tmp_path / "annotations.json"
    data = json.loads(path.read_text())
    data["categories"].append({"id": 9, "name": "unused"})
    data["annotations"].append(
        {"image_id": 0, "category_id": 2, "segmentation": [[0, 0, 4, 0, 4, 3, 0, 3]], "area": 12}
    )
    path.write_text(json.dumps(data))
    own = open_dataset(tmp_path)
    assert list(own.class_names) == ["bolt", "nut", "ring"] and any("unused" in note for note in own.notes)
    assert "bolt0.png" in own.listing(0, "test")[0] and "bolt0.png" in own.listing(0, "test")[1]
    assert own.mask("bolt0.png", 1).sum() == 12 and own.mask("bolt0.png", 0).sum() == 24
    assert [finding.what for finding in own.check() if finding.state != "ok"] == ["folds"]
    data["images"][1]["file_name"] = "bolt0.png"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path)
    assert caught.value.code == "annotations_malformed"


def test_duplicates_by_content(places: Places, tmp_path: Path) -> None:
    pictures, _ = places("bolt")
    shutil.copy(pictures / "p0.jpg", pictures / "p2.jpg")
    shutil.copy(pictures / "p4.jpg", places("ring")[0] / "p4.jpg")
    findings = findings_of(tmp_path)
    within, across = findings["the same picture twice in a class"], findings["the same picture in several classes"]
    assert within.state == across.state == "note"
    assert within.detail == "1: bolt/p0.jpg, bolt/p2.jpg"
    assert across.detail == "1: bolt/p4.jpg, ring/p4.jpg"


def test_classes_with_few_pictures(places: Places, tmp_path: Path) -> None:
    for name, left in (("bolt", 1), ("nut", 5)):
        for index in range(left, CLASSES[name]):
            next(places(name)[0].glob(f"p{index}.*")).unlink()
    findings = findings_of(tmp_path)
    assert findings["classes with fewer than 2 pictures"] == Finding(
        "classes with fewer than 2 pictures", "missing", "1: bolt"
    )
    assert findings["classes with fewer than 6 pictures"].state == "note"
    assert "nut" in findings["classes with fewer than 6 pictures"].detail


def test_pictures_written_by_this_package_are_no_pictures_but_masks(places: Places, tmp_path: Path) -> None:
    """An overlay left among the pictures is not one; hidden files are nothing."""
    pictures, masks = places("bolt")
    save_mask(pictures / "overlay.png", OBJECT)
    for folder in (pictures, masks):
        (folder / ".DS_Store").write_bytes(b"x")
    assert len(open_dataset(tmp_path).listing(0, "test")[0]) == CLASSES["bolt"]
