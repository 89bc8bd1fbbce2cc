"""DeepGlobe: cutting originals by PATNet's rules, and the tiles as a data set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.deepglobe import COLOURS, cut_tiles, open_dataset
from fssdeploy.errors import InputError

SIDE = 20  # of a tile: 400 pixels, of which 4.8 % are 19.2
FOREST, WATER, URBAN, UNKNOWN = COLOURS["forest"], COLOURS["water"], COLOURS["urban"], (0, 0, 0)


def tile(*parts: tuple[tuple[int, int, int], int]) -> np.ndarray:
    """Colours (20, 20, 3): the pixels in reading order are these colours, so many of each."""
    return np.concatenate([np.tile(np.uint8(colour), (count, 1)) for colour, count in parts]).reshape(SIDE, SIDE, 3)


TILES = {
    (0, 0): tile((FOREST, 300), (WATER, 100)),
    (0, 1): tile((FOREST, 380), (WATER, 20)),  # 5.0 %: kept
    (0, 2): tile((FOREST, 381), (WATER, 19)),  # 4.75 %: dropped
    (0, 3): tile((URBAN, 200), (UNKNOWN, 200)),
    (5, 5): tile((URBAN, 390), (UNKNOWN, 10)),  # unknown counts as a colour: dropped
}


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    colours = np.zeros((6 * SIDE, 6 * SIDE, 3), np.uint8)
    colours[:] = FOREST  # a single colour: dropped
    picture = np.zeros_like(colours)
    for row in range(6):
        for column in range(6):
            area = slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE)
            picture[area] = (row * 40, column * 40, 90)
            colours[area] = TILES.get((row, column), colours[area])
    Image.fromarray(picture).save(folder / "7_sat.jpg", quality=100, subsampling=0)
    # Nearly pure colours, as they occur, mean the pure ones.
    Image.fromarray(np.where(colours == 255, 250, 3).astype(np.uint8)).save(folder / "7_mask.png")
    return folder


def test_tiles_are_cut_and_dropped_by_the_published_rules(originals: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "tiles"
    counts = cut_tiles(originals, target)
    assert counts == {"agriculture": 0, "urban": 1, "rangeland": 0, "forest": 2, "water": 2, "barren": 0}
    data = open_dataset(target)
    listing = data.listing(0, "test")
    assert [list(items) for items in listing.values()] == [
        [],
        ["2/7_03"],
        [],
        ["4/7_00", "4/7_01"],
        ["5/7_00", "5/7_01"],
        [],
    ]
    picture, mask = data.load("5/7_01", 4)
    assert picture.shape == (SIDE, SIDE, 3)
    assert np.abs(picture.astype(int) - (0, 40, 90)).max() < 8
    np.testing.assert_array_equal(mask, (TILES[0, 1] == WATER).all(-1))
    np.testing.assert_array_equal(data.mask("2/7_03", 1), (TILES[0, 3] == URBAN).all(-1))
    assert os.listdir(tmp_path / "new") == ["tiles"]


@pytest.mark.parametrize("damage", ["no mask", "another size", "target there"])
def test_what_cannot_be_cut_leaves_nothing(originals: Path, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "new" / "tiles"
    if damage == "no mask":
        (originals / "7_mask.png").unlink()
    elif damage == "another size":
        Image.new("RGB", (60, 60)).save(originals / "7_mask.png")
    else:
        target.mkdir(parents=True)
    codes = {"no mask": "file_missing", "another size": "mask_size", "target there": "target_exists"}
    with pytest.raises(InputError) as caught:
        cut_tiles(originals, target)
    assert caught.value.code == codes[damage]
    assert (tmp_path / "new").exists() == (damage == "target there")


def test_no_originals(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        cut_tiles(tmp_path, tmp_path / "tiles")
    assert caught.value.code == "data_missing"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(1, 7):
        for kind, suffix in (("origin", ".jpg"), ("groundtruth", ".png")):
            folder = tmp_path / str(number) / "test" / kind
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("L", (5, 4), 127 + index).save(folder / f"{index}_00{suffix}")
    return tmp_path


def test_episodes(root: Path) -> None:
    data = open_dataset(root)
    episodes = data.test_list(0, 1, None, seed=0)
    assert len(episodes) == 600 and [episode.class_index for episode in episodes[:8]] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert data.folds == 1 and len(data.class_names) == 6
    assert not data.mask("3/0_00", 2).any() and data.mask("3/1_00", 2).all()


def test_check(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert {finding.state for finding in open_dataset(root).check()} == {"ok"}
    (root / "6" / "test" / "groundtruth" / "2_00.png").unlink()
    for path in (root / "1" / "test" / "origin").iterdir():
        path.unlink()
    missing = [finding.what for finding in open_dataset(root).check() if finding.state == "missing"]
    assert missing == ["tiles of 1 (agriculture)", "masks of 6 (barren)"]
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path_factory.mktemp("empty"))
    assert caught.value.code == "data_missing" and "prepare deepglobe" in caught.value.fix
