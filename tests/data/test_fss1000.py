"""FSS-1000 on a miniature copy: lists that are read, every test picture once as the query, what check reports."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.fss1000 import Fss1000, open_dataset
from fssdeploy.errors import InputError

SPLITS = {"trn": ["ant", "bus"], "val": ["cup"], "test": ["zebra", "dog", "eel"]}
MASK = np.zeros((8, 9), np.uint8)
MASK[2:5, 3:7] = 200
MASK[0, 0] = 127
MASK[7, 8] = 128


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "splits").mkdir()
    for part, names in SPLITS.items():
        (tmp_path / "splits" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True)
            for number in range(1, 11):
                Image.new("RGB", (9, 8), (number * 20, 40, 60)).save(folder / f"{number}.jpg")
                Image.fromarray(np.stack([MASK] * 3, -1)).save(folder / f"{number}.png")
    return tmp_path


def test_splits_are_read_and_numbers_sorted_by_value(root: Path) -> None:
    data = open_dataset(root)
    assert list(data.class_names) == ["ant", "bus", "cup", "dog", "eel", "zebra"]
    assert [data.class_names[index] for index in data.classes(0, "test")] == ["dog", "eel", "zebra"]
    assert [data.class_names[index] for index in data.classes(0, "train")] == ["ant", "bus"]
    assert data.listing(0, "test")[3] == [f"dog/{number}" for number in range(1, 11)]
    with pytest.raises(InputError, match="no fold 1"):
        data.classes(1, "test")


def test_a_mask_starts_at_128(root: Path) -> None:
    picture, mask = open_dataset(root).load("dog/7", 3)
    assert abs(int(picture[0, 0, 0]) - 140) < 4
    np.testing.assert_array_equal(mask, MASK >= 128)


@pytest.mark.parametrize("shot", [1, 5, 9])
def test_every_test_picture_is_the_query_once(root: Path, shot: int) -> None:
    data = open_dataset(root)
    episodes = data.test_list(0, shot, None, seed=3)
    assert len(episodes) == 30
    assert {episode.query for episode in episodes} == {
        item for items in data.listing(0, "test").values() for item in items
    }
    for episode in episodes:
        assert len({*episode.support, episode.query}) == shot + 1
        assert {item.split("/")[0] for item in (*episode.support, episode.query)} == {
            data.class_names[episode.class_index]
        }


def test_supports_come_from_the_seed_and_a_short_list_covers_every_class(root: Path) -> None:
    data = open_dataset(root)
    first, again, other = (data.test_list(0, 2, None, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [episode.query for episode in first] == [episode.query for episode in other]
    assert Counter(episode.class_index for episode in data.test_list(0, 2, 6, 0)) == {3: 2, 4: 2, 5: 2}
    assert data.test_list(0, 2, 6, 0) == first[:6]


def test_refusals(root: Path) -> None:
    data = open_dataset(root)
    for arguments, code in (((0, 1, 31, 0), "episodes_too_many"), ((0, 10, None, 0), "class_too_small")):
        with pytest.raises(InputError) as caught:
            data.test_list(*arguments)
        assert caught.value.code == code
    for item in ("../secret", "/etc/secret"):
        with pytest.raises(InputError) as caught:
            data.picture(item)
        assert caught.value.code == "item_unknown"


def test_training_episodes_are_drawn(root: Path) -> None:
    data = open_dataset(root)
    episodes = [data.episode(0, "train", 1, 0, index) for index in range(20)]
    assert {episode.class_index for episode in episodes} == {0, 1}


def test_check_compares_with_the_published_counts(root: Path) -> None:
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["classes in splits/test.txt"].state == "note"
    assert "3; published are 240" in findings["classes in splits/test.txt"].detail
    assert findings["masks of test"].state == "ok"
    (root / "data" / "eel" / "4.png").unlink()
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["masks of test"].state == "missing" and "eel/4.png" in findings["masks of test"].detail


def test_a_class_in_two_splits(root: Path) -> None:
    (root / "splits" / "trn.txt").write_text("ant\ndog\n")
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["splits"].state == "missing"


def test_without_lists_nothing_is_derived(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (root / "splits" / "test.txt").unlink()
    data = open_dataset(root)
    findings = {finding.what: finding for finding in data.check()}
    assert findings["classes in splits/test.txt"].state == "missing"
    with pytest.raises(InputError) as caught:
        data.listing(0, "test")
    assert caught.value.code == "split_missing"
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path_factory.mktemp("empty"))
    assert caught.value.code == "data_missing" and "splits/test.txt" in caught.value.why


def test_the_published_protocol() -> None:
    assert Fss1000.test_episodes == 2400
