"""The work of `fssdeploy evaluate` as a batch: the same episodes and numbers, computed by many."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fssdeploy import data as datasets
from fssdeploy.artifact import load
from fssdeploy.batch.journal import Entry
from fssdeploy.batch.plan import Item, Plan
from fssdeploy.batch.run import Means, manifest_lock, run_batch
from fssdeploy.batch.worker import UnusableItemError, Work
from fssdeploy.data.dataset import Dataset
from fssdeploy.data.episodes import Episode, EpisodeList
from fssdeploy.errors import CheckFailedError, FssError, InputError
from fssdeploy.evaluation.evaluate import Canvas, evaluate, load_together
from fssdeploy.evaluation.predictors import CachedEncoder, StagedPredictor
from fssdeploy.evaluation.run import Run, journal_file, list_hash
from fssdeploy.report import Report

if TYPE_CHECKING:
    from fssdeploy.glue.gsm.options import GsmOptions


@dataclass(frozen=True)
class EvaluateJob:
    """Episodes that share query and supports; in a video these are the objects of a frame, which are solved together.

    `name` and `fingerprint` are those of the subject, `canvas` where it is measured (None: the original picture).
    """

    artifact: Path
    runtime: str
    dataset: str
    data_dir: Path | None
    canvas: Canvas | None
    name: str
    fingerprint: str
    boost: GsmOptions | None = None

    def open(self, threads: int) -> Work:
        encoder = CachedEncoder(load(self.artifact, self.runtime, threads=threads))
        predictor = StagedPredictor(encoder, self.name, self.fingerprint, self.boost)
        return partial(self._finish, predictor, datasets.open_dataset(self.dataset, self.data_dir))

    def _finish(self, predictor: StagedPredictor, dataset: Dataset, item: Item) -> dict[str, Any]:
        episodes = [Episode(each, item["input"], tuple(item["support"])) for each in item["classes"]]
        try:
            found = evaluate(predictor, dataset, episodes, canvas=self.canvas)
        except CheckFailedError as none_left:
            raise UnusableItemError(_reason(dataset, episodes[0], none_left)) from none_left
        records = [{**record.to_dict(), "index": item["episodes"][record.index]} for record in found.records]
        facts = [
            {
                "episode": item["episodes"][record.index],
                "class": dataset.class_names[record.class_index],
                "iou": record.outcomes[predictor.name].areas.iou,
                "blind": record.outcomes[predictor.name].blind,
            }
            for record in found.records
        ]
        return {"facts": {"fold": item["fold"], "episodes": facts}, "record": records}


def evaluate_batch(
    run: Run, artifact: Path, data_dir: Path | None, out: Path, means: Means
) -> tuple[Report, InputError | None]:
    """Compute the episodes of `run` in a batch, then perform it on their records; `out` is the folder of both.

    It is performed once no shard lacks an episode. Until then, and if an episode killed its workers, the report says
    what there is. Episodes with a picture that cannot be read are left out, as in any evaluation. Raises as `run_batch`
    and `Run.perform`; what a command should end with after the report is returned.
    """
    subject = run.subject
    for episodes in run.lists:
        # Of another evaluation? That is better known now than at the end.
        if (out / journal_file(episodes.fold)).exists():
            _merge(run, episodes, [])
    configuration = {
        "system": subject.fingerprint,
        "runtime": subject.system.engine.name,
        "dataset": run.dataset.name,
        "shot": run.lists[0].shot,
        "seed": run.lists[0].seed,
        "space": "canvas" if run.on_canvas else "original",
        "lists": {str(episodes.fold): list_hash(episodes) for episodes in run.lists},
    }
    job = EvaluateJob(
        Path(os.path.abspath(artifact)),
        subject.system.engine.name,
        run.dataset.name,
        Path(os.path.abspath(data_dir)) if data_dir else None,
        subject.canvas if run.on_canvas else None,
        subject.name,
        subject.fingerprint,
        subject.boost,
    )
    groups = [group for episodes in run.lists for group in _groups(episodes)]
    plan = Plan("evaluate", configuration, [{"index": index, **group} for index, group in enumerate(groups)])
    outcome = run_batch(plan, job, out, means, progress=run.progress)
    if not outcome.complete or outcome.killers:
        notes = [*([subject.note] if subject.note else []), *outcome.notes()]
        report = Report("evaluated a part in a batch", outcome.facts(out), [], notes, outcome.data(out))
        return report, outcome.failure() if outcome.killers else None
    with manifest_lock(out):
        for episodes in run.lists:
            done = [entry for entry in outcome.done if entry["facts"]["fold"] == episodes.fold]
            _merge(run, episodes, done)
        report = run.perform()
    report.facts |= outcome.facts(out)
    report.data["batch"] = outcome.data(out)
    return report, None


def _groups(episodes: EpisodeList) -> list[dict[str, Any]]:
    """Items of a list without their index: episodes that share query and supports, by their places in the list."""
    places: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for place, episode in enumerate(episodes.episodes):
        places[episode.query, episode.support].append(place)
    return [
        {
            "input": query,
            "support": list(support),
            "fold": episodes.fold,
            "episodes": found,
            "classes": [episodes.episodes[place].class_index for place in found],
        }
        for (query, support), found in places.items()
    ]


def _merge(run: Run, episodes: EpisodeList, entries: Sequence[Entry]) -> None:
    """Enter what was computed into the evaluation's own journal. InputError if that is of another evaluation."""
    records = [record for entry in entries for record in entry["record"]]
    with run.open_journal_of(episodes) as journal:
        assert journal
        for record in sorted(records, key=itemgetter("index")):
            if record["index"] not in journal.episodes:
                journal.add_episode(record)


def _reason(dataset: Dataset, episode: Episode, otherwise: FssError) -> FssError:
    """Why no episode of a group could be loaded."""
    try:
        load_together(dataset, episode)
    except FssError as error:
        return error
    return otherwise
