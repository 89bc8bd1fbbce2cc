"""What comes with the package: weights and artifact belong together, are small, and generalise as their card says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fssdeploy import shipped
from fssdeploy.artifact import Artifact, load
from fssdeploy.data.shapes import ShapesDataset
from fssdeploy.evaluation.evaluate import evaluate
from fssdeploy.evaluation.predictors import CachedEncoder, StagedPredictor
from fssdeploy.evaluation.summary import summarise

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_weights_are_small() -> None:
    files = list(shipped.FOLDER.glob("*.safetensors"))
    assert {file.stem for file in files} == {"fsdino-tiny", "sam-tiny"}
    assert sum(file.stat().st_size for file in files) <= 10_000_000


def test_the_artifact_was_exported_from_the_weights() -> None:
    from fssdeploy.systems import fsdino
    from fssdeploy.weights.fsdino import fill
    from fssdeploy.weights.provenance import fingerprint

    folder, weights = shipped.artifact(), shipped.checkpoint("fsdino-tiny")
    assert folder and weights
    artifact = Artifact.open(folder)
    artifact.verify()
    assert not artifact.weights_note  # nothing in it is untrained
    model = fsdino.build(fsdino.PRESETS["tiny"])
    provenance = fill(model, [weights], None)
    assert artifact.fingerprint == fingerprint(model, model.config.to_dict(), fsdino.STATE_PARAMETERS)
    assert artifact.manifest["weights"]["sources"][0]["sha256"] == provenance.sources[0]["sha256"]


def test_sam_loads() -> None:
    from fssdeploy.modules.sam import PRESETS, Sam
    from fssdeploy.weights.checkpoint import read_checkpoint
    from fssdeploy.weights.sam import load_sam

    file = shipped.checkpoint("sam-tiny")
    assert file
    load_sam(Sam(PRESETS["tiny"]), read_checkpoint(file))


@pytest.fixture(scope="module")
def figures() -> dict[str, object]:
    return json.loads((RESULTS / "shapes-5i-fsdino-tiny.json").read_text())


def test_accuracy_on_novel_classes(figures: dict) -> None:
    """A few dozen episodes of a seed of their own; the guard is the measured figure less three standard errors."""
    folder = shipped.artifact()
    assert folder
    system = load(folder)
    dataset = ShapesDataset()
    episodes = dataset.test_list(0, 1, 100, seed=11)
    predictor = StagedPredictor(CachedEncoder(system), "fsdino-tiny", system.fingerprint)
    found = evaluate(predictor, dataset, episodes)
    miou = summarise(found.records, predictor.name, 0).miou
    low, high = figures["1-shot"]["interval"]
    error = (high - low) / 3.92 * np.sqrt(1000 / 100)
    assert miou > figures["1-shot"]["miou"] - 3 * error


def test_the_card_tells_what_was_measured(figures: dict) -> None:
    card = (shipped.FOLDER / "MODEL_CARD.md").read_text()
    for shot in ("1-shot", "5-shot"):
        row = next(line for line in card.splitlines() if line.startswith(f"| {shot} "))
        told = float(re.findall(r"\d+\.\d", row)[0])
        assert told == pytest.approx(figures[shot]["miou"], abs=0.05)
        assert figures[shot]["protocol"]["seed"] != 0
    assert figures["5-shot"]["miou"] > figures["1-shot"]["miou"]
