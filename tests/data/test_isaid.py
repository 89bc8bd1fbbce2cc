"""iSAID-5i on miniature copies of both layouts: lists read or derived, folds, masks of class numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.isaid import open_dataset
from fssdeploy.errors import InputError

# Class numbers (1 to 15) in each patch.
PATCHES = {
    "train": {"P1_0_256": [1, 6], "P1_256_512": [6, 11, 12], "P2_0_256": [2]},
    "val": {"P9_0_256": [1, 2, 15], "P9_256_512": [2, 7], "P8_0_256": []},
}
LISTS = {"train": "trn", "val": "val"}
MASK = "_instance_color_RGB.png"


def labels(numbers: list[int]) -> np.ndarray:
    values = np.zeros((32, 32), np.uint8)
    for row, number in enumerate(numbers):
        values[row, : number + 3] = number
    values[31, 31] = 255
    return values


def make(root: Path, pictures: str, masks: str) -> Path:
    for part, patches in PATCHES.items():
        for folder in (pictures, masks):
            (root / folder.format(part)).mkdir(parents=True)
        for stem, numbers in patches.items():
            Image.new("RGB", (32, 32), (len(numbers) * 10, 0, 0)).save(root / pictures.format(part) / f"{stem}.png")
            Image.fromarray(labels(numbers)).save(root / masks.format(part) / f"{stem}{MASK}")
    return root


@pytest.fixture(params=[("{}/images", "{}/semantic_png"), ("img_dir/{}", "ann_dir/{}")], ids=["hsnet", "mmseg"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path, *request.param)


def write_lists(root: Path) -> None:
    for part, patches in PATCHES.items():
        folder = root / "splits" / LISTS[part]
        folder.mkdir(parents=True)
        for fold in range(3):
            novel = range(5 * fold + 1, 5 * fold + 6)
            lines = [f"{stem}__{n:02d}" for stem, numbers in patches.items() for n in numbers if n in novel]
            (folder / f"fold{fold}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("lists", [False, True], ids=["derived", "read"])
def test_listings(root: Path, lists: bool) -> None:
    if lists:
        write_lists(root)
    data = open_dataset(root)
    assert bool(data.notes) != lists
    assert data.classes(1, "test") == [5, 6, 7, 8, 9] and data.classes(1, "train") == [
        0,
        1,
        2,
        3,
        4,
        10,
        11,
        12,
        13,
        14,
    ]
    tested = {index: sorted(items) for index, items in data.listing(0, "test").items()}
    assert tested == {0: ["val/P9_0_256"], 1: ["val/P9_0_256", "val/P9_256_512"], 2: [], 3: [], 4: []}
    trained = {index: sorted(items) for index, items in data.listing(0, "train").items() if items}
    assert trained == {
        5: ["train/P1_0_256", "train/P1_256_512"],
        10: ["train/P1_256_512"],
        11: ["train/P1_256_512"],
    }


def test_what_the_lists_say_counts(root: Path) -> None:
    """A list that leaves a picture out, as area filters do, and names one twice."""
    write_lists(root)
    (root / "splits" / "val" / "fold0.txt").write_text("P9_0_256__02\nP9_0_256__02\n")
    listing = open_dataset(root).listing(0, "test")
    assert listing == {0: [], 1: ["val/P9_0_256"], 2: [], 3: [], 4: []}


def test_masks_are_class_numbers(root: Path) -> None:
    picture, mask = open_dataset(root).load("val/P9_0_256", 14)
    assert picture[0, 0, 0] == 30
    expected = (labels([1, 2, 15]) == 15).astype(np.uint8)
    expected[31, 31] = 255
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("values", "code"),
    [(np.full((32, 32), 16, np.uint8), "mask_labels"), (np.zeros((32, 32, 3), np.uint8), "mask_shape")],
)
def test_masks_that_hold_no_class_numbers(root: Path, values: np.ndarray, code: str) -> None:
    data = open_dataset(root)
    path = next(root.rglob(f"P9_0_256{MASK}"))
    Image.fromarray(values).save(path)
    with pytest.raises(InputError) as caught:
        data.mask("val/P9_0_256", 0)
    assert caught.value.code == code


def test_check(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert {finding.state for finding in findings.values()} == {"ok", "note"}
    assert "32 x 32" in findings["size of val"].detail and findings["size of val"].state == "note"
    assert findings["lists splits/val/fold0..2.txt"].state == "note"
    write_lists(root)
    next(root.rglob(f"P9_256_512{MASK}")).unlink()
    next(root.rglob("P9_0_256.png")).unlink()
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["lists splits/val/fold0..2.txt"].state == "ok"
    assert findings["masks of val"].state == findings["listed pictures of val"].state == "missing"
    assert "P9_0_256.png" in findings["listed pictures of val"].detail
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path_factory.mktemp("empty"))
    assert caught.value.code == "data_missing"


@pytest.mark.parametrize("line", ["P9_0_256", "P9_0_256__06", "P9_0_256__x", "../../P9__01"])
def test_a_list_that_is_none(root: Path, line: str) -> None:
    write_lists(root)
    (root / "splits" / "val" / "fold0.txt").write_text(f"{line}\n")
    data = open_dataset(root)
    with pytest.raises(InputError):
        data.listing(0, "test")
    findings = {finding.what: finding for finding in data.check()}
    assert findings["lists splits/val/fold0..2.txt"].state == "missing"


def test_episodes_are_uniform_over_pictures(root: Path) -> None:
    write_lists(root)
    names = [f"P{index}" for index in range(40)]
    for fold, lines in ((0, [f"{name}__01" for name in names[:30]] + [f"{name}__02" for name in names[:10]]),):
        lines += [f"{name}__{number:02d}" for number in (3, 4, 5) for name in names[:2]]
        (root / "splits" / "val" / f"fold{fold}.txt").write_text("\n".join(lines))
    episodes = open_dataset(root).test_list(0, 1, None, seed=0)
    assert len(episodes) == 1000
    share = sum(episode.class_index == 0 for episode in episodes) / 1000
    assert abs(share - 30 / 46) < 0.06
