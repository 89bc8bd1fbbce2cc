"""A whole run on the command line's level: report, files, continuation, other runs in the same folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy.data.episodes import EpisodeList
from fssdeploy.evaluation.evaluate import Canvas, evaluate
from fssdeploy.evaluation.predictors import CachedEncoder, StagedPredictor
from fssdeploy.evaluation.priors import PRIORS
from fssdeploy.evaluation.published import published
from fssdeploy.evaluation.run import REPORT, Run, Subject, journal_file, list_file, list_hash
from fssdeploy.evaluation.summary import summarise
from fssdeploy.pipeline import StagedSystem
from tests.evaluation.refusal import refused
from tests.evaluation.squares import CANVAS, Clip, Squares, colour_system, episode_list


def subject(system: StagedSystem | None = None, fingerprint: str = "1" * 64) -> Subject:
    return Subject("fsdino", "colours", system or colour_system(), fingerprint, Canvas(CANVAS, "squash"))


def run(out: Path | None = None, fold: int | None = None, system: StagedSystem | None = None, **more: Any) -> Run:
    squares = Squares()
    folds = [0, 1] if fold is None else [fold]
    return Run(
        subject(system),
        squares,
        [episode_list(squares, each) for each in folds],
        out=out,
        calibration_episodes=6,
        **more,
    )


def numbers(data: dict[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in ("miou", "fb_iou", "interval", "per_class", "episodes", "folds", "protocol")}


def test_one_fold(tmp_path: Path) -> None:
    report = run(tmp_path / "out", fold=1).perform()
    data = json.loads(report.json())
    squares, episodes = Squares(), episode_list(Squares(), 1)
    direct = evaluate(StagedPredictor(CachedEncoder(colour_system()), "colours", ""), squares, episodes.episodes)
    expected = summarise(direct.records, "colours", 0)
    assert (data["miou"], data["fb_iou"], data["interval"]) == (expected.miou, expected.fb_iou, [*expected.interval])
    assert 20 < data["miou"] < 100
    assert set(data["per_class"]) == {"blue", "yellow"} and "priors" not in data
    assert (data["episodes"], data["skipped"], data["blind"], data["published"]) == (8, 0, 0, None)
    protocol = data["protocol"]
    assert protocol["list"] == list_hash(episodes) and protocol["notes"] == ["squares are drawn, not read"]
    assert [protocol[key] for key in ("fold", "shot", "seed", "space", "canvas", "geometry")] == [
        1, 1, 0, "original", CANVAS, "squash"
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == data
    assert sorted(Path(file).name for file in data["files"]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert EpisodeList.load(tmp_path / "out" / list_file(1)) == episodes
    assert Image.open(tmp_path / "out" / "sheet-fold1.png").width > 3 * 256
    text = report.text()
    for part in ("blue", "uniform over classes", "squash", "original", list_hash(episodes)[:16], "mean over shots"):
        assert part in text


def test_all_folds_and_their_mean() -> None:
    both = run().perform().data
    single = [run(fold=fold).perform().data for fold in (0, 1)]
    assert both["miou"] == pytest.approx(np.mean([each["miou"] for each in single]))
    for fold in (0, 1):
        assert both["folds"][str(fold)]["miou"] == single[fold]["miou"] == single[fold]["folds"][str(fold)]["miou"]
    assert both["per_class"] == {**single[0]["per_class"], **single[1]["per_class"]}
    assert (both["episodes"], both["protocol"]["fold"]) == (16, "all")
    assert set(both["protocol"]["list"]) == {"0", "1"} and "files" not in both


class Steps:
    """A progress function that interrupts the run at one of its calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.count = 0
        self._stop_at = stop_at

    def __call__(self, text: str) -> None:
        if self.count == self._stop_at:
            raise KeyboardInterrupt
        self.count += 1


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.45, 0.6, 0.8, 0.99])
def test_a_run_that_was_broken_off_ends_with_the_same_numbers(tmp_path: Path, share: float) -> None:
    steps = Steps()
    straight = json.loads(run(tmp_path / "straight", priors=True, progress=steps).perform().json())
    assert steps.count == 2 * (6 + 8 + 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", priors=True, progress=Steps(int(share * steps.count))).perform()
    resumed = json.loads(run(tmp_path / "out", priors=True).perform().json())
    assert numbers(resumed) == numbers(straight) and resumed["priors"] == straight["priors"]
    for fold in (0, 1):
        journals = [(tmp_path / name / journal_file(fold)).read_bytes() for name in ("straight", "out")]
        assert journals[0] == journals[1]


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first = run(tmp_path / "out", priors=True).perform().data
    steps = Steps()
    again = run(tmp_path / "out", priors=True, progress=steps).perform().data
    assert numbers(again) == numbers(first)
    assert steps.count == 2  # the sheets are drawn anew


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, fold=0).perform()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    squares = Squares()
    others = {
        "system": dataclasses.replace(run(out, fold=0), subject=subject(fingerprint="2" * 64)),
        "seed": dataclasses.replace(run(out), lists=[episode_list(squares, seed=1)]),
        "shot": dataclasses.replace(run(out), lists=[episode_list(squares, shot=2)]),
        "episodes": dataclasses.replace(run(out), lists=[episode_list(squares, count=7)]),
        "space": run(out, fold=0, on_canvas=True),
        "calibration_episodes": run(out, fold=0, priors=True),
    }
    for what, other in others.items():
        with refused("evaluation_of_other") as caught:
            other.perform()
        assert f"{what} is " in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_skipped_episodes_are_reported(tmp_path: Path) -> None:
    run_it = run(tmp_path / "out", fold=0)
    squares = run_it.dataset
    assert isinstance(squares, Squares)
    squares.broken = {run_it.lists[0].episodes[3].query}
    report = run_it.perform()
    data = report.data
    assert data["skipped"] == len(data["skipped_episodes"]) == 8 - data["episodes"] > 0
    assert 3 in [each["index"] for each in data["skipped_episodes"]]
    assert "cannot be decoded" in "\n".join(report.notes) and "skipped" in report.text()


def test_a_class_without_an_episode_is_named() -> None:
    squares = Squares()
    episodes = tuple(each for each in squares.test_list(0, 1, 8, 0) if each.class_index == 0)
    report = Run(subject(), squares, [EpisodeList("squares", 0, 1, 0, episodes)]).perform()
    assert any("green" in note for note in report.notes) and list(report.data["per_class"]) == ["red"]


def test_priors_stand_beside_the_system(tmp_path: Path) -> None:
    report = run(tmp_path / "out", priors=True).perform()
    assert list(report.data["priors"]) == list(PRIORS)
    for found in report.data["priors"].values():
        assert 0 < found["miou"] <= 100 and set(found["thresholds"]) == {"0", "1"} and found["episodes"] == 16
    assert "training-free priors on the same encoder" in report.text()
    alone = run().perform().data
    assert alone["miou"] == report.data["miou"]


def test_a_video_is_reported_by_region_and_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clip, "name", "davis-17")
    clip = Clip()
    report = Run(subject(), clip, [episode_list(clip)]).perform()
    data = report.data
    assert data["j_and_f"] == pytest.approx((data["j"] + data["f"]) / 2) and 0 < data["j"] < 100
    assert data["published"]["value"] == 76.6 and "76.6 J&F" in report.text(200)


def test_measuring_on_the_canvas_says_so() -> None:
    data = run(fold=0, on_canvas=True).perform().data
    assert data["protocol"]["space"] == "canvas" and data["miou"] != run(fold=0).perform().data["miou"]


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / journal_file(0)).write_text("my own notes\n")
    with refused("evaluation_of_other"):
        run(tmp_path / "out", fold=0).perform()
    assert (tmp_path / "out" / journal_file(0)).read_text() == "my own notes\n"


def test_published_numbers() -> None:
    mean = published("fsdino", "coco-20i", 5, None)
    assert mean and mean.value == 65.4 and "DINOv2-B" in mean.system
    fold = published("fsdino", "pascal-5i", 1, 2)
    assert fold and fold.value == 72.2
    other = published("gfsam+gsm", "isaid-5i", 1, None)
    assert other and other.value == 49.8
    for unknown in (("fsdino", "isic", 1, None), ("fsdino", "fss-1000", 5, None), ("fcp", "pascal-5i", 1, 0),
                    ("fsdino", "pascal-5i", 2, None), ("nobody", "pascal-5i", 1, None)):  # fmt: skip
        assert published(*unknown) is None


def test_the_paper_is_printed_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Squares, "name", "pascal-5i")
    both = run().perform()
    assert both.data["published"]["value"] == 75.4 and "75.4 mIoU: FS-DINO" in both.text(200)
    assert both.data["folds"]["1"]["published"]["value"] == 80.3
    assert run(fold=0).perform().data["published"]["value"] == 75.6
