"""The pictures of base classes, and the words in their names."""

from __future__ import annotations

import numpy as np
import pytest

from fssdeploy.data.shapes import ShapesDataset
from fssdeploy.errors import InputError
from fssdeploy.training.pictures import BasePictures
from tests.evaluation.squares import PICTURES, Squares


def test_every_picture_of_base_classes_once() -> None:
    pictures = BasePictures(Squares(), 0)
    assert pictures.items == [f"{each}-{number}" for each in (2, 3) for number in range(PICTURES)]
    assert pictures.classes == [2, 3]
    drawn = {pictures.draw(np.random.default_rng(seed)) for seed in range(100)}
    assert drawn == set(pictures.items)


def test_regions_of_the_listed_classes() -> None:
    regions = BasePictures(Squares(), 0).regions("2-3")
    assert set(np.unique(regions.classes)) == {-2, -1, 2}  # the yellow square beside it is not listed here
    assert len(regions.objects) == 1 and np.array_equal(regions.objects[0], regions.classes == 2)


def test_fewer_pictures_evenly() -> None:
    pictures = BasePictures(Squares(), 1, limit=3)
    assert pictures.items == ["0-0", "0-5", "1-5"]
    assert BasePictures(Squares(), 1, limit=100).items == BasePictures(Squares(), 1).items
    for limit in (0, -1):
        with pytest.raises(InputError) as caught:
            BasePictures(Squares(), 1, limit=limit)
        assert caught.value.code == "no_pictures"
    with pytest.raises(InputError):
        BasePictures(Squares(), 2)


def test_words_of_class_names() -> None:
    dataset = ShapesDataset()
    words, table = BasePictures(dataset, 0, limit=4).words()
    assert len(words) == 9 and table.shape == (20, 9)
    for index, name in enumerate(dataset.class_names):
        expected = set(name.split()) if index in dataset.classes(0, "train") else set()
        assert {word for word, has in zip(words, table[index], strict=True) if has} == expected
