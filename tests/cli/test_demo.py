"""`fssdeploy demo`: on the base install it enrols classes that training never saw, and the masks are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fssdeploy.data.shapes import ShapesDataset
from fssdeploy.demo import FOLD, SEED, natural_case, shapes_case
from tests.cli.test_process import WITHOUT_TORCH


def test_on_the_base_install(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "demo", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ious = [entry["iou"] for entry in told["queries"]]
    # Above what any answer that ignores the support can reach; seeded weights give less than 0.2.
    assert np.mean(ious) > 0.5 and np.median(ious) > 0.5
    sheet = np.asarray(Image.open(tmp_path / "out" / "demo.png"))
    assert sheet.shape[0] > 200 and sheet.std() > 10
    masks = sorted((tmp_path / "out").glob("*query*.png"))
    assert len(masks) == len(ious) == 12


def test_the_classes_are_novel() -> None:
    dataset = ShapesDataset()
    base = {dataset.class_names[each] for each in dataset.classes(FOLD, "train")}
    for index in dataset.classes(FOLD, "test"):
        case = shapes_case(index, queries=2)
        assert case.name not in base
        assert case.mask.any() and all(truth is not None and truth.any() for _, truth in case.queries.values())
    assert SEED != 0  # the seed that training draws its pictures from


def test_photographs_for_other_weights() -> None:
    case = natural_case()
    assert case.mask.shape == case.support.shape[:2]
    assert 0.05 < case.mask.mean() < 0.6 and len(case.queries) == 4
