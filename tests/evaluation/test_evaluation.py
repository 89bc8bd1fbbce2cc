"""The core: right numbers on squares, resumption, what is skipped and what is the method's failure, videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.data.dataset import IGNORE
from fssdeploy.data.davis import Davis17
from fssdeploy.data.episodes import Episode
from fssdeploy.errors import CheckFailedError, InputError
from fssdeploy.evaluation.evaluate import (
    Canvas,
    Record,
    Video,
    evaluate,
    load_case,
    load_together,
    predict_together,
)
from fssdeploy.evaluation.journal import open_journal
from fssdeploy.evaluation.metrics import boundary_f
from fssdeploy.evaluation.sheet import chosen_episodes, draw_sheet
from fssdeploy.evaluation.summary import mean_over_folds, summarise
from tests.evaluation.refusal import refused
from tests.evaluation.squares import Clip, ColourPredictor, Squares


@pytest.fixture
def squares() -> Squares:
    return Squares()


def test_the_right_answer_scores_100(squares: Squares) -> None:
    found = evaluate(ColourPredictor(), squares, squares.test_list(0, 2, 8, 0))
    assert [record.index for record in found.records] == list(range(8)) and not found.skipped
    summary = summarise(found.records, "colour", 0)
    assert (summary.miou, summary.fb_iou, summary.interval) == (100, 100, (100, 100))
    assert set(summary.per_class) == {0, 1} and sum(count for _, count in summary.per_class.values()) == 8


def test_ious_of_a_predictor_that_finds_everything(squares: Squares) -> None:
    """Then the IoU of a class is its share of all the pixels of its queries that are not ignored."""
    episodes = squares.test_list(1, 1, 10, 3)
    summary = summarise(evaluate(ColourPredictor(1000), squares, episodes).records, "colour", 0)
    shares = {}
    for index in (2, 3):
        truths = [squares.mask(each.query, index) for each in episodes if each.class_index == index]
        shares[index] = 100 * sum((t == 1).sum() for t in truths) / sum((t != IGNORE).sum() for t in truths)
        assert summary.per_class[index] == (pytest.approx(shares[index]), len(truths))
    assert summary.miou == pytest.approx(np.mean(list(shares.values())))
    assert summary.interval[0] < summary.miou < summary.interval[1]


def test_supports_count_255_as_background(squares: Squares) -> None:
    case = load_case(squares, Episode(0, "0-1", ("0-0", "0-2")))
    for (picture, mask), item in zip(case.supports, ("0-0", "0-2"), strict=True):
        np.testing.assert_array_equal(mask, squares.mask(item, 0) == 1)
        np.testing.assert_array_equal(picture, squares.picture(item))
    assert (case.truth == IGNORE).any() and case.key == "red"


@pytest.mark.parametrize("stop_at", range(8))
def test_an_interrupt_changes_nothing(squares: Squares, tmp_path: Path, stop_at: int) -> None:
    episodes = squares.test_list(0, 1, 8, 0)
    straight = evaluate(ColourPredictor(100), squares, episodes)
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path / "journal", {}) as journal:
        evaluate(ColourPredictor(100, stop_at=stop_at), squares, episodes, journal=journal)
    predictor = ColourPredictor(100)
    with open_journal(tmp_path / "journal", {}) as journal:
        resumed = evaluate(predictor, squares, episodes, journal=journal)
    assert resumed == straight
    assert predictor.calls == 8 - stop_at


def test_an_unreadable_picture_costs_its_episodes_alone(squares: Squares, tmp_path: Path) -> None:
    episodes = squares.test_list(0, 1, 8, 0)
    lost = [index for index, each in enumerate(episodes) if episodes[2].query in (each.query, *each.support)]
    squares.broken = {episodes[2].query}
    with open_journal(tmp_path / "journal", {}) as journal:
        found = evaluate(ColourPredictor(), squares, episodes, journal=journal)
    assert [each["index"] for each in found.skipped] == lost and 0 < len(lost) < 8
    assert found.skipped[0]["code"] == "picture_damaged"
    assert [record.index for record in found.records] == [index for index in range(8) if index not in lost]
    squares.broken = set()
    predictor = ColourPredictor()
    with open_journal(tmp_path / "journal", {}) as journal:
        mended = evaluate(predictor, squares, episodes, journal=journal)
    assert mended == evaluate(ColourPredictor(), squares, episodes) and predictor.calls == len(lost)


def test_nothing_but_unreadable_pictures(squares: Squares) -> None:
    squares.broken = {f"{index}-{number}" for index in range(4) for number in range(6)}
    with refused("all_skipped", CheckFailedError) as caught:
        evaluate(ColourPredictor(), squares, squares.test_list(0, 1, 3, 0))
    assert "cannot be decoded" in str(caught.value)


def test_an_object_that_cannot_be_seen_is_a_failure_of_the_method(squares: Squares) -> None:
    class Blind(ColourPredictor):
        code = "object_vanishes"

        def predict(self, supports: Sequence, query: np.ndarray, key: str) -> np.ndarray:
            if key == "red":
                raise InputError(self.code, "it is too small")
            return super().predict(supports, query, key)

    episodes = squares.test_list(0, 1, 8, 0)
    found = evaluate(Blind(), squares, episodes)
    summary = summarise(found.records, "colour", 0)
    red = sum(each.class_index == 0 for each in episodes)
    assert not found.skipped and summary.blind == red > 0
    assert {index: iou for index, (iou, _) in summary.per_class.items()} == {0: 0, 1: 100}
    assert summary.miou == 50
    Blind.code = "other"
    with refused("other"):
        evaluate(Blind(), squares, episodes)


def test_several_predictors_see_the_same_pictures_once(squares: Squares) -> None:
    everything = ColourPredictor(1000)
    everything.name = "everything"
    episodes = squares.test_list(0, 1, 4, 0)
    found = evaluate(ColourPredictor(), squares, episodes, beside=[everything])
    assert len(squares.read) == 8
    alone = evaluate(everything, squares, episodes)
    assert summarise(found.records, "everything", 0).miou == summarise(alone.records, "everything", 0).miou < 100
    assert summarise(found.records, "colour", 0).miou == 100


def test_an_episode_that_was_drawn_twice_counts_twice(squares: Squares) -> None:
    episode = Episode(0, "0-1", ("0-0",))
    predictor = ColourPredictor()
    assert [r.index for r in evaluate(predictor, squares, [episode] * 3).records] == [0, 1, 2]


def test_records_survive_json(squares: Squares) -> None:
    for record in evaluate(ColourPredictor(80), squares, squares.test_list(0, 1, 4, 0)).records:
        assert Record.from_dict(record.to_dict()) == record


def test_the_canvas_takes_the_truth_of_the_nearest_pixel(squares: Squares) -> None:
    picture, truth = squares.load("0-2", 0)  # its ignored row is the fifth
    fitted, small = Canvas(24, "squash").fit(picture, truth)
    assert fitted.shape == (24, 24, 3)
    expected = [[truth[y * 40 // 24, x * 48 // 24] for x in range(24)] for y in range(24)]
    np.testing.assert_array_equal(small, expected)
    fitted, small = Canvas(24, "letterbox").fit(picture, truth)
    assert (small[20:] == IGNORE).all() and set(np.unique(small[:20])) == {0, 1, IGNORE}


def test_measuring_on_the_canvas(squares: Squares) -> None:
    episodes = squares.test_list(0, 1, 8, 0)
    on_canvas = evaluate(ColourPredictor(1000), squares, episodes, canvas=Canvas(24, "letterbox"))
    for record in on_canvas.records:
        case = load_case(squares, episodes[record.index], Canvas(24, "letterbox"))
        outcome = record.outcomes["colour"]
        assert outcome.areas.union == (case.truth != IGNORE).sum() <= 20 * 24
        assert outcome.areas.intersection == (case.truth == 1).sum()


def test_the_mean_over_folds(squares: Squares) -> None:
    predictor = ColourPredictor(1000)
    folds = [
        summarise(evaluate(predictor, squares, squares.test_list(fold, 1, 8 + fold, 0)).records, "colour", 0)
        for fold in (0, 1)
    ]
    mean = mean_over_folds(folds)
    assert mean.miou == pytest.approx((folds[0].miou + folds[1].miou) / 2)
    assert mean.fb_iou == pytest.approx((folds[0].fb_iou + folds[1].fb_iou) / 2)
    assert set(mean.per_class) == {0, 1, 2, 3} and mean.episodes == 17
    # Two independent halves: the interval of their mean is narrower than that of either.
    assert np.diff(mean.interval) < min(np.diff(fold.interval) for fold in folds)


def test_the_sheet_shows_best_median_and_worst(squares: Squares) -> None:
    episodes = squares.test_list(0, 2, 8, 0)
    records = evaluate(ColourPredictor(1000), squares, episodes).records
    chosen = chosen_episodes(records, "colour", each=2)
    assert [label for label, _ in chosen] == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
    ious = [record.outcomes["colour"].areas.iou for _, record in chosen]
    everything = sorted((record.outcomes["colour"].areas.iou for record in records), reverse=True)
    assert ious == [everything[rank] for rank in (0, 1, 3, 4, 6, 7)]
    for count in (1, 2, 3, 4, 5):
        few = [record for _, record in chosen_episodes(records[:count], "colour", each=2)]
        assert len(few) == len({record.index for record in few}) == count
    sheet = draw_sheet(ColourPredictor(1000), squares, episodes, records)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 3 * 256 and sheet.shape[0] > 6 * 200


# Frames show red and, as the other square, green.
FRAMES = [Episode(index, f"0-{number}", ("0-0",)) for index in (0, 1) for number in range(1, 6)]


def test_davis_is_a_video() -> None:
    assert issubclass(Davis17, Video) and isinstance(Clip(), Video) and not isinstance(Squares(), Video)


def test_in_a_video_the_largest_score_takes_a_pixel() -> None:
    clip = Clip()
    greedy = ColourPredictor(1000)  # both objects would take every pixel
    cases = load_together(clip, FRAMES[0])
    assert [case.key for case in cases.values()] == ["red", "green"]
    masks = [mask for mask, _ in predict_together(greedy, cases).values()]
    assert not (masks[0] & masks[1]).any() and (masks[0] | masks[1]).all()
    for mask, case in zip(masks, cases.values(), strict=True):
        assert mask[case.truth == 1].all()


def test_j_and_f_are_means_over_objects_of_means_over_frames() -> None:
    clip, predictor = Clip(), ColourPredictor(1000)
    found = evaluate(predictor, clip, FRAMES)
    assert predictor.calls == len(FRAMES)  # each frame once for each object
    expected_j, expected_f = [], []
    for index in (0, 1):
        regions, boundaries = [], []
        for episode in FRAMES[5 * index : 5 * index + 4]:  # the last frame does not count
            cases = load_together(clip, episode)
            mask, truth = predict_together(predictor, cases)[episode][0], cases[episode].truth
            inside = mask & (truth != IGNORE)
            regions.append((inside & (truth == 1)).sum() / (inside | (truth == 1)).sum())
            boundaries.append(boundary_f(inside, truth == 1))
        expected_j.append(np.mean(regions))
        expected_f.append(np.mean(boundaries))
    video = summarise(found.records, "colour", 0).video
    assert video and 0 < video.f < 100
    assert (video.j, video.f) == (pytest.approx(100 * np.mean(expected_j)), pytest.approx(100 * np.mean(expected_f)))
    assert video.both == pytest.approx((video.j + video.f) / 2)


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 6, 9])
def test_a_video_goes_on_where_it_was(tmp_path: Path, stop_at: int) -> None:
    clip = Clip()
    straight = evaluate(ColourPredictor(100), clip, FRAMES)
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path / "journal", {}) as journal:
        evaluate(ColourPredictor(100, stop_at=stop_at), clip, FRAMES, journal=journal)
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    if len(lines) > 2:
        (tmp_path / "journal").write_bytes(b"".join(lines[:-1]))  # only one object of the last frame was kept
    with open_journal(tmp_path / "journal", {}) as journal:
        assert evaluate(ColourPredictor(100), clip, FRAMES, journal=journal) == straight


def test_rivals_that_are_not_in_the_list_still_take_their_pixels() -> None:
    clip = Clip()
    some = evaluate(ColourPredictor(1000), clip, FRAMES[:2])
    assert some.records == evaluate(ColourPredictor(1000), clip, FRAMES).records[:2]


def test_a_video_needs_scores() -> None:
    class Silent:
        name, fingerprint = "silent", "0"

        def describe(self) -> dict[str, str]:
            return {}

        def predict(self, supports: Sequence, query: np.ndarray, key: str) -> np.ndarray:
            return np.zeros(query.shape[:2], bool)

    with refused("predictor_scores"):
        evaluate(Silent(), Clip(), FRAMES)
