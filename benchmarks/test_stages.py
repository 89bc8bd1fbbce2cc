"""The stages as pytest-benchmark cases: `make bench` saves every run and compares with the last one.

FSSDEPLOY_BENCH_ARTIFACT names an artifact to time instead of the tiny preset with seeded weights.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fssdeploy.artifact import load
from fssdeploy.engines import RUNTIMES
from fssdeploy.pipeline import StagedSystem
from fssdeploy.protocol import ClassState, Features

INSTALLED = [runtime for runtime in RUNTIMES if find_spec(runtime)]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("FSSDEPLOY_BENCH_ARTIFACT"):
        return Path(given)
    from fssdeploy.export.artifact import ExportRequest, export_artifact
    from fssdeploy.systems import fsdino, get_system
    from fssdeploy.weights.fsdino import fill

    model = fsdino.build(fsdino.PRESETS["tiny"])
    provenance = fill(model, [], untrained_seed=0)
    out = tmp_path_factory.mktemp("bench") / "tiny"
    export_artifact(model, provenance, ExportRequest(get_system("fsdino"), "tiny", model.config), out)
    return out


@pytest.fixture(scope="session", params=INSTALLED)
def system(request: pytest.FixtureRequest, artifact: Path) -> StagedSystem:
    return load(artifact, request.param)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)


@pytest.fixture(scope="session")
def features(system: StagedSystem, picture: np.ndarray) -> Features:
    return system.encode([picture])


@pytest.fixture(scope="session")
def mask() -> np.ndarray:
    mask = np.zeros((480, 640), bool)
    mask[120:360, 160:480] = True
    return mask


@pytest.fixture(scope="session")
def state(system: StagedSystem, features: Features, mask: np.ndarray) -> ClassState:
    return system.enroll(features, [mask])


def test_encode(benchmark: Any, system: StagedSystem, picture: np.ndarray) -> None:
    benchmark(system.encode, [picture])


def test_enroll(benchmark: Any, system: StagedSystem, features: Features, mask: np.ndarray) -> None:
    benchmark(system.enroll, features, [mask])


def test_segment(benchmark: Any, system: StagedSystem, features: Features, state: ClassState) -> None:
    benchmark(system.segment, features, {"class": state})


@pytest.mark.parametrize("classes", [1, 8])
def test_query(benchmark: Any, system: StagedSystem, picture: np.ndarray, state: ClassState, classes: int) -> None:
    states = {f"class {index}": state for index in range(classes)}
    benchmark(lambda: system.segment(system.encode([picture]), states))
