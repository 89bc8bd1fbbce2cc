"""shapes-5i: pictures that are a function of their name, folds that keep apart, no answer without looking."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.data import open_dataset
from fssdeploy.data import shapes as module
from fssdeploy.data.shapes import FOLDS, LEAST_AREA, PICTURES, SIDE, ShapesDataset, class_of, parts_of
from fssdeploy.errors import InputError

DATASET = ShapesDataset()
TEST = [f"test-seed0-fold0-{index}" for index in range(30)]
TRAIN = [f"train-seed0-fold0-{index}" for index in range(30)]


def target(item: str) -> int:
    """The class that a picture is listed under."""
    split, _, fold, index = item.split("-")
    classes = DATASET.classes(int(fold[4:]), split)  # type: ignore[arg-type]
    return classes[int(index) % len(classes)]


def digest(dataset: ShapesDataset, items: list[str]) -> str:
    scenes = [dataset.scene(item) for item in items]
    return sha256(b"".join(each.picture.tobytes() + each.objects.tobytes() for each in scenes)).hexdigest()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Pictures are rendered anew."""
    module._render.cache_clear()
    yield
    module._render.cache_clear()


def test_a_class_is_a_shape_with_a_texture() -> None:
    parts = [parts_of(index) for index in range(20)]
    assert len(set(parts)) == 20
    assert [class_of(*each) for each in parts] == list(range(20))
    for index, (shape, texture) in enumerate(parts):
        assert DATASET.class_names[index] == f"{module.TEXTURES[texture]} {module.SHAPES[shape]}"


def test_folds_test_every_class_once_and_every_shape_each() -> None:
    novel = [set(DATASET.classes(fold, "test")) for fold in range(FOLDS)]
    assert set.union(*novel) == set(range(20)) and sum(map(len, novel)) == 20
    for fold in range(FOLDS):
        assert set(DATASET.classes(fold, "train")) == set(range(20)) - novel[fold]
        assert {parts_of(index)[0] for index in novel[fold]} == set(range(5))
        assert {parts_of(index)[1] for index in novel[fold]} == set(range(4))
    with pytest.raises(InputError):
        DATASET.classes(FOLDS, "test")


def test_every_picture_is_listed_under_its_target() -> None:
    for split, items in (("train", TRAIN), ("test", TEST)):
        listing = DATASET.listing(0, split)  # type: ignore[arg-type]
        listed = [item for names in listing.values() for item in names]
        assert len(listed) == len(set(listed)) == PICTURES[split]  # type: ignore[index]
        assert all(item in listing[target(item)] for item in items)


def test_what_a_picture_holds() -> None:
    """At least three objects, the target among them and large enough, all of base classes in training."""
    base = set(DATASET.classes(0, "train"))
    for item in (*TEST, *TRAIN):
        scene = DATASET.scene(item)
        assert scene.picture.shape == (SIDE, SIDE, 3) and scene.picture.dtype == np.uint8
        areas = np.bincount(scene.objects.ravel())[1:]
        assert (areas > 0).sum() >= 3
        assert areas[areas > 0].min() >= LEAST_AREA * SIDE * SIDE
        classes = scene.classes()
        assert (classes == target(item)).sum() >= LEAST_AREA * SIDE * SIDE
        present = set(np.unique(classes)) - {-1}
        assert target(item) in present
        assert item.startswith("test") or present <= base
        assert np.array_equal(DATASET.mask(item, target(item)), classes == target(item))
        regions = DATASET.regions(item, [])
        assert np.array_equal(regions.classes, classes)
        assert sum(each.sum() for each in regions.objects) == (classes >= 0).sum()
    shown = {index for item in TEST for index in np.unique(DATASET.scene(item).classes())}
    assert shown - base - {-1} == set(DATASET.classes(0, "test")) and shown & base


def test_something_else_has_the_colours_of_the_target() -> None:
    """The twin: among the other objects one comes much nearer in colour than chance would have it."""

    def colours(picture: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """The darkest and the lightest tenth of an object: its two colours, as far as light and noise let them be."""
        pixels = picture[inside].astype(float)
        order = pixels.sum(1).argsort()
        tenth = max(1, len(order) // 10)
        return np.array([np.median(pixels[order[:tenth]], 0), np.median(pixels[order[-tenth:]], 0)])

    twins, chances = [], []
    for item, other in zip(TEST, TEST[1:], strict=False):
        scene = DATASET.scene(item)
        mine = colours(scene.picture, scene.classes() == target(item))
        for place, found in ((item, twins), (other, chances)):
            regions = DATASET.regions(place, [])
            rest = [each for each in regions.objects if regions.classes[each][0] != target(place)]
            found.append(min(np.abs(colours(regions.picture, each) - mine).mean() for each in rest))
    assert np.median(twins) < 0.5 * np.median(chances)


def test_a_picture_depends_on_its_name_alone(forgetful: None) -> None:
    """Not on the order, the process or what was drawn before."""
    items = [TEST[3], TRAIN[7], "test-seed5-fold2-11"]
    first = [digest(DATASET, [item]) for item in items]
    module._render.cache_clear()
    assert [digest(ShapesDataset(), [item]) for item in reversed(items)] == first[::-1]
    script = f"from tests.data.test_shapes import *; print(digest(DATASET, {items[1:]!r}))"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == digest(DATASET, items[1:]), answer.stderr


def test_another_seed_fold_split_or_number_is_another_picture() -> None:
    names = [
        "test-seed0-fold0-3",
        "test-seed1-fold0-3",
        "test-seed0-fold1-3",
        "test-seed0-fold0-4",
        "train-seed0-fold0-3",
    ]
    assert len({digest(DATASET, [name]) for name in names}) == 5
    mine, other = (DATASET.episode(0, "test", 2, seed, 9) for seed in (0, 1))
    assert mine.query.startswith("test-seed0-") and other.query.startswith("test-seed1-")
    assert DATASET.episode(0, "test", 2, 0, 9) == mine
    for item in (mine.query, *mine.support):
        assert target(item) == mine.class_index


def test_the_cache_holds_what_is_drawn(tmp_path: Path, forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    items = TEST[:3]
    drawn = digest(DATASET, items)
    cached = open_dataset("shapes-5i", tmp_path / "new" / "folder")
    assert isinstance(cached, ShapesDataset)
    assert digest(cached, items) == drawn
    monkeypatch.setattr(module, "_render", None)
    assert digest(cached, items) == drawn
    for item in items:
        assert np.array_equal(cached.mask(item, target(item)), cached.scene(item).classes() == target(item))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"other", lambda data: data[:50]]
)
def test_a_damaged_cache_is_reported(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    cached = ShapesDataset(tmp_path)
    cached.picture(TEST[0])
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError) as caught:
        cached.picture(TEST[0])
    assert caught.value.code == "picture_unreadable" and str(file) in caught.value.what
    file.unlink()
    assert np.array_equal(cached.picture(TEST[0]), DATASET.picture(TEST[0]))


@pytest.mark.parametrize("item", ["", "test-seed0-fold4-1", "val-seed0-fold0-1", "test-seed0-fold0-1/../2", "17"])
def test_names_that_are_none(item: str) -> None:
    with pytest.raises(InputError) as caught:
        DATASET.picture(item)
    assert caught.value.code == "item_unknown"


def test_answers_that_do_not_look_are_worth_little() -> None:
    """Mean IoU over the classes, in percent, as evaluation counts it: everything, all objects, the largest, any one."""
    answers = {"everything": 0, "all objects": 1, "the largest": 2, "the smallest": 3}
    overlap, union = np.zeros((len(answers), 20)), np.zeros((len(answers), 20))
    for item in TEST:
        scene, index = DATASET.scene(item), target(item)
        areas = np.bincount(scene.objects.ravel())
        areas[0] = 0
        smallest = np.where(areas > 0, areas, SIDE**2).argmin()
        truth = scene.classes() == index
        given = [np.ones_like(truth), scene.objects > 0, scene.objects == areas.argmax(), scene.objects == smallest]
        for number, answer in enumerate(given):
            overlap[number, index] += (answer & truth).sum()
            union[number, index] += (answer | truth).sum()
    novel = DATASET.classes(0, "test")
    miou = 100 * (overlap[:, novel] / union[:, novel]).mean(1)
    assert miou[0] < 25 and miou[2] < 25, miou
    assert miou.max() < 50, miou
