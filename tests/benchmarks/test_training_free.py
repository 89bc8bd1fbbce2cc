"""The training-free benchmark compares equal masks only, counts every second once, and its report shows it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.benchmarks import training_free
from fssdeploy.benchmarks.baselines import gfsam_research
from fssdeploy.benchmarks.blobs import blob_scene
from fssdeploy.benchmarks.stopwatch import Spent, Stopwatch
from fssdeploy.benchmarks.training_free import ADDED, BASELINE, BOOST, DECODER, ENCODERS, GATES, MAPS, SECTIONS, measure
from fssdeploy.benchmarks.training_free_report import report, save
from fssdeploy.errors import CheckFailedError, InputError
from fssdeploy.systems import gfsam


def test_tiny_against_the_baseline(tmp_path: Path) -> None:
    result = measure("tiny", rounds=2, blob_points=(16,), memory=False)
    query, blobs = result["query"], result["blobs"]["16"]
    assert query["points"] > 0
    assert blobs["points"] == 16
    assert set(query["contestants"]) == {BASELINE, "torch", "torch+gsm"}
    for contestant in query["contestants"].values():
        assert {*ENCODERS, MAPS, DECODER, GATES} <= set(contestant["sections"]) <= set(SECTIONS)
        parts = sum(section["best_ms"] for section in contestant["sections"].values())
        assert 0 < parts <= contestant["total"]["best_ms"] + 1e-6
    assert BOOST in query["contestants"]["torch+gsm"]["sections"]
    assert BOOST not in query["contestants"]["torch"]["sections"]
    targets = query["targets"]["torch"]
    assert 0 < targets["encoders_share"] < 1
    assert targets["gsm_added"] > 0
    for contestant in blobs["contestants"].values():  # neither networks nor their stand-in count
        assert not {*ENCODERS, DECODER} & set(contestant["sections"])

    save(result, tmp_path / "results" / "training-free.json")
    assert json.loads((tmp_path / "results" / "training-free.json").read_text()) == result
    text = report(result).text(width=200)
    for expected in ("outside the encoders", ">= 80%", "<= 10%", "blobs, 16 points", "graph and gates"):
        assert expected in text


def test_other_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gfsam_research.segment_features

    def wrong(*args: object) -> gfsam_research.Answer:
        answer = right(*args)  # type: ignore[arg-type]
        return dataclasses.replace(answer, mask=~answer.mask)

    monkeypatch.setattr(gfsam_research, "segment_features", wrong)
    with pytest.raises(CheckFailedError, match="other masks"):
        measure("tiny", rounds=1, blob_points=(), memory=False)


def test_figures_follow_from_the_sections() -> None:
    def contestant(**seconds: float) -> training_free.Contestant:
        return training_free.Contestant([{name: Spent(wall, wall) for name, wall in seconds.items()}])

    encoders = {ENCODERS[0]: 3.0, ENCODERS[1]: 5.0}
    slow = contestant(**{**encoders, MAPS: 6.0, DECODER: 4.0})
    fast = contestant(**{**encoders, MAPS: 1.0, DECODER: 1.0})
    boosted = contestant(**{**encoders, MAPS: 1.5, DECODER: 1.0, ADDED: 0.5})
    targets = training_free._targets({BASELINE: slow, "torch": fast, "torch+gsm": boosted})
    assert targets["torch"] == pytest.approx(
        {
            "outside_encoders": 5.0,
            "outside_encoders_and_decoder": 6.0,
            "total": 1.8,
            "encoders_share": 0.8,
            "gsm_added": 0.05,
        }
    )


def test_nested_sections_count_once() -> None:
    class Worker:
        def inner(self) -> None:
            time.sleep(0.02)

    watch = Stopwatch()
    untouched = Worker.inner
    with watch.watching([(Worker, "inner", "inner")]), watch.section("outer"):
        time.sleep(0.01)
        Worker().inner()
    assert Worker.inner is untouched
    assert watch.spent["inner"].wall == pytest.approx(0.02, abs=0.01)
    assert watch.spent["outer"].wall == pytest.approx(0.01, abs=0.008)


def test_blobs_answer_points_with_the_blob_they_lie_in() -> None:
    scene = blob_scene(gfsam.PRESETS["tiny"], seed=3)
    logits = scene.logits(scene.centres)[:, 0]
    step = scene.picture.shape[0] / scene.mask_side
    for found, radius, (x, y) in zip(logits, scene.radii, scene.centres, strict=True):
        assert found[int(y / step), int(x / step)] > 0
        assert (found > 0).sum() * step**2 == pytest.approx(np.pi * radius**2, rel=0.35)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="no preset 'huge'"):
        measure("huge")
    with pytest.raises(InputError, match="no engine 'tensorflow'"):
        measure("tiny", engines=("tensorflow",))
    with pytest.raises(InputError, match="0 rounds"):
        measure("tiny", rounds=0)
