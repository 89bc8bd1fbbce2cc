"""The core of an evaluation: every episode of a list through predictors, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fssdeploy.data.dataset import IGNORE, Dataset
from fssdeploy.data.episodes import Episode
from fssdeploy.errors import CheckFailedError, FssError, InputError
from fssdeploy.evaluation.journal import Journal
from fssdeploy.evaluation.metrics import Areas, boundary_f, measure_areas
from fssdeploy.evaluation.predictors import Predictor, Scorer, Support
from fssdeploy.images.geometry import fit_picture, place

# The method cannot see the object of a support: its failure, and not that of the data.
BLIND = ("object_vanishes", "mask_empty")


@runtime_checkable
class Video(Protocol):
    """A data set of videos: a class is an object of a sequence, and the objects of a frame exclude each other."""

    def target(self, class_index: int) -> tuple[str, int]:
        """Sequence and object number of a class."""
        ...

    def scored(self, episode: Episode) -> bool:
        """Whether region and boundary of this frame count."""
        ...


@dataclass(frozen=True)
class Canvas:
    """Where the network looks: the side of its input in pixels, and how pictures are laid on it."""

    side: int
    geometry: str

    def fit(self, picture: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picture and truth on the canvas, the truth by nearest neighbour as PyTorch computes it; padding is ignored.

        Published code often measures here: the network's own resizing then has nothing left to do.
        """
        where = place(truth.shape[0], truth.shape[1], self.side, self.geometry)
        rows = np.arange(where.rows) * where.height // where.rows
        columns = np.arange(where.cols) * where.width // where.cols
        fitted = np.full((self.side, self.side), IGNORE, np.uint8)
        fitted[where.top :, where.left :][: where.rows, : where.cols] = truth[rows][:, columns]
        return fit_picture(picture, where), fitted


@dataclass(frozen=True)
class Case:
    """An episode in pixels: the name of its class, supports with masks bool, query uint8 (H, W, 3), truth uint8 (H, W).

    The truth holds 0, 1 and 255 (ignored).
    """

    key: str
    supports: list[Support]
    query: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """One predictor on one episode.

    `blind` if it could not see the object of a support, which finds nothing. `boundary_f` in videos alone, and None for
    frames that do not count there.
    """

    areas: Areas
    blind: bool
    boundary_f: float | None = None


@dataclass(frozen=True)
class Record:
    """One finished episode: its place in the list, its class, and what every predictor made of it."""

    index: int
    class_index: int
    outcomes: dict[str, Outcome]

    def to_dict(self) -> dict[str, Any]:
        outcomes = {
            name: {"areas": each.areas.as_row(), "blind": each.blind, "boundary_f": each.boundary_f}
            for name, each in self.outcomes.items()
        }
        return {"index": self.index, "class": self.class_index, "outcomes": outcomes}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Record:
        outcomes = {
            name: Outcome(Areas(*each["areas"]), each["blind"], each["boundary_f"])
            for name, each in data["outcomes"].items()
        }
        return Record(data["index"], data["class"], outcomes)


@dataclass
class Evaluation:
    """Finished episodes in the order of the list, and those left out because a picture could not be read."""

    records: list[Record]
    skipped: list[dict[str, Any]]


def load_case(dataset: Dataset, episode: Episode, canvas: Canvas | None = None) -> Case:
    """The pictures and masks of an episode; 255 is background in supports. FssError if one cannot be read."""
    supports = [dataset.load(item, episode.class_index) for item in episode.support]
    query, truth = dataset.load(episode.query, episode.class_index)
    if canvas:
        query, truth = canvas.fit(query, truth)
    key = dataset.class_names[episode.class_index]
    return Case(key, [(picture, mask == 1) for picture, mask in supports], query, truth)


def load_together(dataset: Dataset, episode: Episode, canvas: Canvas | None = None) -> dict[Episode, Case]:
    """The episode and, in a video, those of the other objects of its sequence. FssError if one is unreadable."""
    classes = [episode.class_index]
    if isinstance(dataset, Video):
        sequence = dataset.target(episode.class_index)[0]
        classes = [index for index in range(len(dataset.class_names)) if dataset.target(index)[0] == sequence]
    rivals = [dataclasses.replace(episode, class_index=index) for index in classes]
    return {each: load_case(dataset, each, canvas) for each in rivals}


def predict_together(predictor: Predictor, cases: Mapping[Episode, Case]) -> dict[Episode, tuple[np.ndarray, bool]]:
    """For every case its mask bool (H, W), and whether the predictor was blind to a support (then it finds nothing).

    Of several cases, which show the same query, the largest score takes a pixel. InputError if it has no scores.
    """
    if len(cases) == 1:
        ((episode, case),) = cases.items()
        mask, blind = _seeing(predictor.predict, case)
        return {episode: (np.zeros(case.truth.shape, bool) if mask is None else mask, blind)}
    if not isinstance(predictor, Scorer):
        raise InputError(
            "predictor_scores", f"'{predictor.name}' cannot be used on a video", "it gives no scores to compare"
        )
    found = {episode: _seeing(predictor.scores, case) for episode, case in cases.items()}
    shape = next(iter(cases.values())).truth.shape
    scores = np.stack([np.full(shape, -np.inf) if each is None else each for each, _ in found.values()])
    winner = np.where(scores.max(0) > 0, scores.argmax(0), -1)
    return {episode: (winner == index, found[episode][1]) for index, episode in enumerate(cases)}


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    episodes: Sequence[Episode],
    *,
    beside: Sequence[Predictor] = (),
    canvas: Canvas | None = None,
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Every episode through `predictor` and those `beside` it, measured on the original picture or on a canvas.

    What the journal holds is not computed again, and what is finished is added to it. An episode with a picture that
    cannot be read is left out; a later run with the same journal tries it again. CheckFailedError if all are left out.
    """
    records: dict[int, Record] = {}
    if journal:
        records = {index: Record.from_dict(entry) for index, entry in journal.episodes.items()}
    places = {episode: index for index, episode in enumerate(episodes)}
    skipped: list[dict[str, Any]] = []
    for index, episode in enumerate(episodes):
        if index in records:
            continue
        progress(f"{dataset.name}, episode {index + 1} of {len(episodes)}")
        try:
            cases = load_together(dataset, episode, canvas)
        except FssError as error:
            skipped.append({"index": index, "query": episode.query, **error.to_dict()})
            continue
        outcomes: dict[Episode, dict[str, Outcome]] = {each: {} for each in cases}
        for each in (predictor, *beside):
            for solved, (mask, blind) in predict_together(each, cases).items():
                outcomes[solved][each.name] = _measure(dataset, solved, mask, cases[solved].truth, blind)
        for solved, by_predictor in outcomes.items():
            # The same episode can be drawn twice; the one at hand has its own place.
            at = index if solved == episode else places.get(solved)
            if at is not None and at not in records:
                records[at] = Record(at, solved.class_index, by_predictor)
                if journal:
                    journal.add_episode(records[at].to_dict())
    if not records:
        why = f"the first: {skipped[0]['what']}" if skipped else "the list is empty"
        raise CheckFailedError("all_skipped", "no episode could be evaluated", why, "Run: fssdeploy data check")
    return Evaluation([records[index] for index in sorted(records)], skipped)


def _seeing(
    find: Callable[[Sequence[Support], np.ndarray, str], np.ndarray], case: Case
) -> tuple[np.ndarray | None, bool]:
    try:
        return find(case.supports, case.query, case.key), False
    except InputError as error:
        if error.code not in BLIND:
            raise
        return None, True


def _measure(dataset: Dataset, episode: Episode, mask: np.ndarray, truth: np.ndarray, blind: bool) -> Outcome:
    scored = isinstance(dataset, Video) and dataset.scored(episode)
    contour = boundary_f(mask & (truth != IGNORE), truth == 1) if scored else None
    return Outcome(measure_areas(mask, truth), blind, contour)
