"""The system and the training-free priors as predictors, on tokens that are colours."""

from __future__ import annotations

import numpy as np
import pytest

from fssdeploy.data.episodes import Episode
from fssdeploy.evaluation.evaluate import Canvas, Case, evaluate, load_case
from fssdeploy.evaluation.predictors import CachedEncoder, StagedPredictor
from fssdeploy.evaluation.priors import (
    PRIORS,
    PriorPredictor,
    areas_by_threshold,
    best_match,
    calibrate,
    cell_shares,
    prior_map,
)
from fssdeploy.evaluation.summary import summarise
from fssdeploy.images.geometry import place
from tests.evaluation.refusal import refused
from tests.evaluation.squares import GRID, ColourEngine, Squares, colour_system

EPISODE = Episode(0, "0-4", ("0-3", "0-5"))


@pytest.fixture
def encoder() -> CachedEncoder:
    return CachedEncoder(colour_system())


def encoded(encoder: CachedEncoder) -> int:
    engine = encoder.system.engine
    assert isinstance(engine, ColourEngine)
    return engine.encoded


def test_a_staged_predictor_does_what_the_three_verbs_do(encoder: CachedEncoder) -> None:
    case = load_case(Squares(), EPISODE)
    system = colour_system()
    state = system.enroll(system.encode([p for p, _ in case.supports]), [m for _, m in case.supports])
    expected = system.segment(system.encode([case.query]), {"red": state})
    predictor = StagedPredictor(encoder, "colours", "1")
    np.testing.assert_array_equal(predictor.scores(case.supports, case.query, "red"), expected.logits[0]["red"])
    np.testing.assert_array_equal(predictor.predict(case.supports, case.query, "red"), expected.binary(0, "red"))
    assert 0 < expected.binary(0, "red").mean() < 1
    assert predictor.describe()["runtime"] == "colours"


def test_pictures_are_encoded_once_while_they_are_remembered() -> None:
    encoder = CachedEncoder(colour_system(), kept=2)
    a, b, c = (np.full((9, 9, 3), value, np.uint8) for value in (1, 2, 3))
    for pictures in ([a, b], [b, a], [a]):
        features = encoder.encode(pictures)
        assert len(features) == len(pictures) == len(features.tensors["tokens"])
    assert encoded(encoder) == 2
    np.testing.assert_array_equal(encoder.encode([b, a]).tensors["tokens"][:, 0, 0], [2 - 90, 1 - 90])
    encoder.encode([c])  # forgets b, which was asked for before a
    encoder.encode([a])
    assert encoded(encoder) == 3
    encoder.encode([b])
    assert encoded(encoder) == 4
    encoder.encode([np.ascontiguousarray(a.reshape(3, 27, 3))])  # the same bytes in another shape
    assert encoded(encoder) == 5


def test_an_empty_mask_is_seen_by_nobody(encoder: CachedEncoder) -> None:
    squares = Squares()
    episodes = [Episode(0, "0-1", ("2-1",))]  # no red in it
    everyone: list[StagedPredictor | PriorPredictor] = [
        StagedPredictor(encoder, "colours", "1"),
        *(PriorPredictor(encoder, name, 0.5, "1") for name in PRIORS),
    ]
    for predictor in everyone:
        outcome = evaluate(predictor, squares, episodes).records[0].outcomes[predictor.name]
        assert outcome.blind and outcome.areas.intersection == 0 < outcome.areas.union


def tokens_and_shares(encoder: CachedEncoder, case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every support its tokens, and the share of the object in every cell."""
    shown = []
    for picture, mask in case.supports:
        features = encoder.encode([picture])
        shares = cell_shares(mask, features.placements[0], GRID)
        shown.append((features.tensors["tokens"][0].astype(float), shares.astype(float)))
    return shown


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def by_definition(name: str, encoder: CachedEncoder, case: Case) -> np.ndarray:
    """Every prior, one token at a time."""
    query = encoder.encode([case.query]).tensors["tokens"][0].astype(float)
    maps = []
    for tokens, shares in tokens_and_shares(encoder, case):
        inside = [token for token, share in zip(tokens, shares, strict=True) if share >= 0.5]
        assert 1 < len(inside) < len(tokens)
        prototype = sum(share * token for token, share in zip(tokens, shares, strict=True)) / shares.sum()
        around = sum((1 - share) * token for token, share in zip(tokens, shares, strict=True)) / (1 - shares).sum()
        if name == "prototype cosine":
            values = np.array([cosine(token, prototype) for token in query])
        elif name == "nearest of two prototypes":
            values = np.array([cosine(token, prototype) - cosine(token, around) for token in query])
        else:
            matches = np.array([[cosine(token, other) for other in inside] for token in query])
            values = matches.max(1) if name == "best match (PFENet)" else matches.mean(1)
            values = (values - values.min()) / (values.max() - values.min() + 1e-7)
        maps.append(values)
    return np.mean(maps, 0).reshape(GRID, GRID)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_follow_their_definitions(encoder: CachedEncoder, name: str) -> None:
    # A query of the size of the token grid, so that nothing is resized on the way back.
    case = load_case(Squares(), EPISODE, Canvas(GRID, "squash"))
    found = prior_map(PRIORS[name], encoder, case.supports, case.query)
    np.testing.assert_allclose(found, by_definition(name, encoder, case), atol=2e-5)
    assert found.std() > 0.1


def test_padding_does_not_stretch_a_prior() -> None:
    """The lowest value that counts is that of the picture, even where padding would be lower."""
    encoder = CachedEncoder(colour_system("letterbox"))
    picture = np.full((16, 32, 3), (91, 91, 240), np.uint8)  # lower half of the canvas: padding
    picture[:, :16] = (240, 91, 91)
    mask = np.zeros((16, 32), bool)
    mask[:, :16] = True
    values = prior_map(PRIORS["best match (PFENet)"], encoder, [(picture, mask)], picture)
    assert values.min() == pytest.approx(0, abs=1e-5) and values.max() == pytest.approx(1, abs=1e-5)


def test_an_object_smaller_than_half_a_cell_keeps_its_fullest_cell() -> None:
    mask = np.zeros((40, 40), bool)
    mask[11, 17] = True
    shares = cell_shares(mask, place(40, 40, 32, "squash"), 8)
    assert np.flatnonzero(shares).tolist() == [8 * 2 + 3] and shares.sum() == pytest.approx(1 / 25)
    encoder = CachedEncoder(colour_system())
    picture = np.full((40, 40, 3), 200, np.uint8)
    assert np.isfinite(prior_map(PRIORS["best match (PFENet)"], encoder, [(picture, mask)], picture)).all()
    assert PRIORS["best match (PFENet)"].rule is best_match


def test_areas_at_every_threshold() -> None:
    rng = np.random.default_rng(0)
    values, truth = rng.normal(size=(20, 30)).round(1), rng.choice([0, 1, 255], (20, 30)).astype(np.uint8)
    thresholds = np.linspace(-2, 2, 41).round(1)
    for (intersection, union), threshold in zip(areas_by_threshold(values, truth, thresholds), thresholds, strict=True):
        found = (values > threshold) & (truth != 255)
        assert intersection == (found & (truth == 1)).sum()
        assert union == (found | (truth == 1)).sum()


def test_thresholds_are_the_best_on_base_classes_and_never_see_novel_ones(encoder: CachedEncoder) -> None:
    squares = Squares()
    chosen = calibrate(encoder, squares, 0, 1, 0, episodes=10)
    assert {item.split("-")[0] for item in squares.read} == {"2", "3"}
    assert list(chosen) == list(PRIORS) and chosen["nearest of two prototypes"] == 0
    base = [squares.episode(0, "train", 1, 0, index) for index in range(10)]

    def miou(name: str, threshold: float) -> float:
        predictor = PriorPredictor(encoder, name, threshold, "1")
        return summarise(evaluate(predictor, squares, base).records, name, 0).miou

    for name, prior in PRIORS.items():
        best = miou(name, chosen[name])
        others = prior.thresholds[20 :: len(prior.thresholds) // 6 + 1]
        assert all(best >= miou(name, each) for each in others)
        assert best > 50 or name == "nearest of two prototypes"


def test_thresholds_need_base_classes(encoder: CachedEncoder) -> None:
    class NovelOnly(Squares):
        def classes(self, fold: int, split: str) -> list[int]:
            return [0, 1, 2, 3] if split == "test" else []

    with refused("split_missing"):
        calibrate(encoder, NovelOnly(), 0, 1, 0)
    squares = Squares()
    squares.broken = {f"{index}-{number}" for index in range(4) for number in range(6)}
    with refused("no_base_episode"):
        calibrate(encoder, squares, 0, 1, 0, episodes=3)
