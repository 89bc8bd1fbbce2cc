"""mIoU of every training-free system on shapes-5i, with the rows of GSM's ablation on the same episodes.

    python -m fssdeploy.benchmarks.training_free_accuracy ARTIFACT... [--episodes 1000] [--shots 1,5] [--work DIR]

All rows of a host share its encoders, its maps and its first answer, so that they cost little more than the host. Each
pair of artifact and shot runs in a process of its own and continues what was broken off in --work; pairs that the
result file has already and that are not measured again stay in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fssdeploy.artifact import load
from fssdeploy.benchmarks.machine import describe_machine
from fssdeploy.data.shapes import ShapesDataset
from fssdeploy.engines import available_cores
from fssdeploy.errors import InputError
from fssdeploy.evaluation.evaluate import evaluate
from fssdeploy.evaluation.journal import open_journal
from fssdeploy.evaluation.paired import compare
from fssdeploy.evaluation.predictors import CachedEncoder, Predictor, StagedPredictor, Support
from fssdeploy.evaluation.summary import summarise
from fssdeploy.files import write_atomic
from fssdeploy.glue.gsm.boost import Affinity, boost
from fssdeploy.glue.gsm.hosts import HOSTS
from fssdeploy.glue.gsm.options import ABLATION, GsmOptions
from fssdeploy.glue.gsm.system import Answer, Host
from fssdeploy.images.geometry import Placement, unfit
from fssdeploy.protocol import ClassState

FOLD = 0
# Not the seed of the training pictures.
SEED = 1
HOST_ROW = "A"
# With one support RR weighs two references alike: these rows are others, bit for bit.
SAME_AT_ONE_SHOT = {"D": "A", "E": "B", "F": "C"}
RESULT = Path("benchmarks/results/shapes-5i-training-free.json")


class SharedPass:
    """What all rows of one episode share: the host's state, maps and first answer."""

    def __init__(self, encoder: CachedEncoder, host: Host[Any]) -> None:
        self.encoder, self.host = encoder, host
        self._case: tuple[Sequence[Support], np.ndarray] | None = None
        self._found: tuple[Any, Placement, ClassState, Affinity, Answer] | None = None

    def find(
        self, supports: Sequence[Support], query: np.ndarray
    ) -> tuple[Any, Placement, ClassState, Affinity, Answer]:
        """The host's own query, its place on the canvas, the class state, the maps and the answer of the first pass."""
        asked_before = self._case is not None and self._case[0] is supports and self._case[1] is query
        if self._found is None or not asked_before:
            self._case, self._found = None, None
            pictures = [picture for picture, _ in supports]
            state = self.host.enroll(self.encoder.encode(pictures), [mask for _, mask in supports])
            features = self.encoder.encode([query])
            (asked,) = self.host.queries(features, None)
            affinity = self.host.affinity(asked, state, None)
            answer = self.host.first(asked, state, affinity, None)
            self._case, self._found = (supports, query), (asked, features.placements[0], state, affinity, answer)
        return self._found


class Row:
    """One row of the ablation as a predictor."""

    def __init__(self, name: str, shared: SharedPass) -> None:
        self.name = name
        self.options = GsmOptions(**ABLATION[name])
        self.fingerprint = shared.host.fingerprint
        self._shared = shared

    def describe(self) -> dict[str, Any]:
        return ABLATION[self.name]

    def predict(self, supports: Sequence[Support], query: np.ndarray, key: str) -> np.ndarray:
        asked, where, state, affinity, answer = self._shared.find(supports, query)
        boosted = boost(affinity, answer.logits > 0, self.options)
        if boosted.changed:
            answer = self._shared.host.second(asked, state, boosted, None)
        return unfit(answer.logits, where) > 0


def predictors(encoder: CachedEncoder, shot: int) -> list[Predictor]:
    """The system alone as row A, and the other rows where GSM has an adapter for it."""
    adapter = HOSTS.get(type(encoder.system))
    if adapter is None:
        return [StagedPredictor(encoder, HOST_ROW, encoder.system.fingerprint)]
    shared = SharedPass(encoder, adapter(encoder.system))
    return [Row(name, shared) for name in ABLATION if shot > 1 or name not in SAME_AT_ONE_SHOT]


def measure(artifact: Path, shot: int, episodes: int, work: Path, pictures: Path | None) -> dict[str, Any]:
    """All rows of one system at one number of shots: figures of each, and each against the host."""
    system = load(artifact, threads=1)
    dataset = ShapesDataset(pictures) if pictures else ShapesDataset()
    drawn = dataset.test_list(FOLD, shot, episodes, SEED)
    rows = predictors(CachedEncoder(system), shot)
    # Without the number of episodes: fewer are the first of more, so a journal can be gone on with.
    binding = {"system": system.fingerprint, "shot": shot, "rows": [row.name for row in rows]}
    work.mkdir(parents=True, exist_ok=True)
    name = f"{system.name}-{shot}"

    def progress(line: str) -> None:
        print(f"{name}: {line}", flush=True)

    with open_journal(work / f"{name}.jsonl", binding) as journal:
        records = evaluate(rows[0], dataset, drawn, beside=rows[1:], journal=journal, progress=progress).records
    found: dict[str, Any] = {}
    for row in rows:
        summary = summarise(records, row.name, SEED)
        found[row.name] = summary.to_dict(dataset.class_names)
        if row.name != HOST_ROW:
            found[row.name]["against host"] = compare(records, row.name, HOST_ROW, SEED).to_dict()
    if shot == 1 and len(rows) > 1:
        found |= {name: {"same masks as": other} for name, other in SAME_AT_ONE_SHOT.items()}
    measured = {"system": system.name, "shot": shot, "episodes": len(records), "fingerprint": system.fingerprint}
    return {**measured, "rows": found}


def lines(result: Mapping[str, Any]) -> list[str]:
    """One line a system, shot and row."""
    shown = []
    for part in result["results"]:
        for name, row in part["rows"].items():
            head = f"{part['system']:12} {part['shot']}-shot, {part['episodes']} episodes, {name}"
            if "miou" not in row:
                shown.append(f"{head}: as {row['same masks as']}")
                continue
            low, high = row["interval"]
            text = f"{head}: mIoU {row['miou']:.1f} ({low:.1f} to {high:.1f}), FB-IoU {row['fb_iou']:.1f}"
            if gain := row.get("against host"):
                low, high = gain["interval"]
                text += f", {gain['difference']:+.2f} ({low:+.2f} to {high:+.2f}), p {gain['p_value']:.3f}"
            shown.append(text)
    return shown


def _place(part: Mapping[str, Any]) -> tuple[str, int]:
    return part["system"], part["shot"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--shots", default="1,5", help="numbers of supports, with commas")
    parser.add_argument("--work", type=Path, default=Path("runs/training-free"), help="journals")
    parser.add_argument("--pictures", type=Path, help="cache of drawn pictures")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    shots = [int(shot) for shot in given.shots.split(",")]
    if min(shots) < 1 or given.episodes < 1:
        raise InputError("usage", "shots and episodes are at least 1")
    # Those with more shots take longer and begin first.
    tasks = list(itertools.product(sorted(shots, reverse=True), given.artifacts))
    with ProcessPoolExecutor(available_cores()) as pool:
        futures = [
            pool.submit(measure, artifact, shot, given.episodes, given.work, given.pictures) for shot, artifact in tasks
        ]
        results = {_place(part): part for part in (each.result() for each in futures)}
    if given.out.exists():
        results = {_place(part): part for part in json.loads(given.out.read_text())["results"]} | results
    result = {
        "command": "python -m fssdeploy.benchmarks.training_free_accuracy artifacts/SYSTEM-tiny [--episodes N]",
        "machine": describe_machine(),
        "protocol": {"dataset": "shapes-5i", "fold": FOLD, "seed": SEED},
        "results": [results[place] for place in sorted(results)],
    }
    print("\n".join(lines(result)))
    write_atomic(given.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
