"""DAVIS 2017 on a miniature copy: objects as classes, the first frame as the support, what the official tool scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.davis import open_dataset
from fssdeploy.data.episodes import Episode
from fssdeploy.errors import InputError

FRAMES = {"bike": 4, "camel": 3}
OBJECTS = {"bike": (1, 2), "camel": (1,)}


def labels(sequence: str, frame: int) -> np.ndarray:
    values = np.zeros((6, 10), np.uint8)
    for number in OBJECTS[sequence]:
        values[number, frame : frame + 3] = number
    values[5, 9] = 255
    return values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for sequence, count in FRAMES.items():
        for folder in ("JPEGImages", "Annotations"):
            (tmp_path / folder / "480p" / sequence).mkdir(parents=True)
        for frame in range(count):
            Image.new("RGB", (10, 6), (frame * 50, 0, 0)).save(
                tmp_path / "JPEGImages" / "480p" / sequence / f"{frame:05d}.jpg"
            )
            image = Image.fromarray(labels(sequence, frame))
            # Colours that have nothing to do with the numbers: an index is what counts.
            image.putpalette([value for index in range(256) for value in (255 - index, index // 2, 7)])
            image.save(tmp_path / "Annotations" / "480p" / sequence / f"{frame:05d}.png")
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bike\ncamel\n")
    return tmp_path


def test_classes_are_objects_of_sequences(root: Path) -> None:
    data = open_dataset(root)
    assert list(data.class_names) == ["bike/1", "bike/2", "camel/1"]
    assert data.target(1) == ("bike", 2)
    assert data.objects == {"bike": [1, 2], "camel": [1]}
    assert data.listing(0, "test")[2] == ["camel/00000", "camel/00001", "camel/00002"]
    assert any("2 validation sequences" in note for note in data.notes)


def test_episodes_are_the_later_frames(root: Path) -> None:
    data = open_dataset(root)
    episodes = data.test_list(0, 1, None, seed=0)
    assert len(episodes) == data.test_episodes == 3 + 3 + 2
    assert episodes[0] == Episode(0, "bike/00001", ("bike/00000",))
    assert episodes[-1] == Episode(2, "camel/00002", ("camel/00000",))
    assert data.test_list(0, 1, None, seed=9) == episodes
    assert data.test_list(0, 1, 2, seed=0) == episodes[:2]
    assert [data.scored(episode) for episode in episodes] == [True, True, False] * 2 + [True, False]


def test_masks_are_palette_indices_and_255_is_ignored(root: Path) -> None:
    data = open_dataset(root)
    _, mask = data.load("bike/00002", 1)
    expected = (labels("bike", 2) == 2).astype(np.uint8)
    expected[5, 9] = 255
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(("arguments", "code"), [((0, 5, None, 0), "shots"), ((0, 1, 9, 0), "episodes_too_many")])
def test_refusals(root: Path, arguments: tuple[int, int, int | None, int], code: str) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset(root).test_list(*arguments)
    assert caught.value.code == code


def test_there_is_nothing_to_train_on(root: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset(root).listing(0, "train")
    assert caught.value.code == "split_missing"


def test_check(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    findings = {finding.what: finding for finding in open_dataset(root).check()}
    assert findings["sequences in ImageSets/2017/val.txt"].state == "note"
    assert findings["annotations of the frames"].state == "ok"
    (root / "Annotations" / "480p" / "camel" / "00000.png").unlink()
    data = open_dataset(root)
    assert list(data.class_names) == ["bike/1", "bike/2"]
    findings = {finding.what: finding for finding in data.check()}
    assert findings["annotations of the frames"].state == "missing"
    assert "camel" in findings["sequences that can be used"].detail
    with pytest.raises(InputError) as caught:
        open_dataset(tmp_path_factory.mktemp("empty"))
    assert caught.value.code == "data_missing"
