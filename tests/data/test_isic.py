"""ISIC 2018 on a miniature copy: diagnoses as classes, classes taken in turn, counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.isic import open_dataset
from fssdeploy.errors import InputError

INPUT, TRUTH = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
LESION = np.zeros((7, 11), np.uint8)
LESION[1:4, 2:9] = 255


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / TRUTH).mkdir()
    for number, count in ((1, 8), (2, 7), (3, 6)):
        (tmp_path / INPUT / str(number)).mkdir(parents=True)
        for index in range(count):
            stem = f"ISIC_{number}{index:06d}"
            Image.new("RGB", (11, 7), (number * 60, index, 0)).save(tmp_path / INPUT / str(number) / f"{stem}.jpg")
            Image.fromarray(LESION).save(tmp_path / TRUTH / f"{stem}_segmentation.png")
    (tmp_path / INPUT / "1" / "ATTRIBUTION.txt").write_text("not a picture")
    return tmp_path


def test_classes_and_masks(root: Path) -> None:
    data = open_dataset(root)
    assert list(data.class_names) == ["nevus", "melanoma", "seborrheic keratosis"]
    assert [len(items) for items in data.listing(0, "test").values()] == [8, 7, 6]
    picture, mask = data.load("2/ISIC_2000003", 1)
    assert abs(int(picture[0, 0, 0]) - 120) < 4
    np.testing.assert_array_equal(mask, LESION == 255)
    with pytest.raises(InputError) as caught:
        data.listing(0, "train")
    assert caught.value.code == "split_missing"


def test_classes_take_turns(root: Path) -> None:
    data = open_dataset(root)
    episodes = data.test_list(0, 5, None, seed=0)
    assert len(episodes) == 600
    assert [episode.class_index for episode in episodes[:7]] == [0, 1, 2, 0, 1, 2, 0]
    assert all(len({*episode.support, episode.query}) == 6 for episode in episodes)
    assert episodes == data.test_list(0, 5, None, seed=0) != data.test_list(0, 5, None, seed=1)


def test_check(root: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["pictures of 1 (nevus)"].detail == "8; published are 1,867"
    assert findings["pictures of 2 (melanoma)"].state == "note"
    assert findings["masks"].state == "ok"
    (root / TRUTH / "ISIC_3000002_segmentation.png").unlink()
    for path in (root / INPUT / "2").iterdir():
        path.unlink()
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["masks"].state == findings["pictures of 2 (melanoma)"].state == "missing"
    assert "class_id.csv" in findings["pictures of 2 (melanoma)"].source
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path_factory.mktemp("empty"))
    assert caught.value.code == "data_missing"


def test_items_cannot_leave_the_directory(root: Path) -> None:
    for item in ("1/../../x", "/x", "x/y"):
        with pytest.raises(InputError) as caught:
            open_dataset(root).picture(item)
        assert caught.value.code == "item_unknown"
