"""Fixtures shared by the tests: the golden data, a small network, one exported artifact."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(os.environ.get("FSSDEPLOY_GOLDEN", Path(__file__).parent / "golden"))


def golden_cases(system: str) -> list[Path]:
    """Folders of the recorded cases of a system. None at all is a failure of the test run, not a skip."""
    cases = sorted(path.parent for path in (GOLDEN / system).glob("*/case.json"))
    if not cases:
        raise FileNotFoundError(f"there is no golden case of '{system}' under {GOLDEN}")
    return cases


def read_case(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "case.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset, exported once with seeded weights."""
    from fssdeploy.export.artifact import ExportRequest, export_artifact
    from fssdeploy.systems import fsdino, get_system
    from fssdeploy.weights.fsdino import fill

    model = fsdino.build(fsdino.PRESETS["tiny"])
    provenance = fill(model, [], untrained_seed=0)
    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    export_artifact(model, provenance, ExportRequest(get_system("fsdino"), "tiny", model.config), out)
    return out


@pytest.fixture
def picture() -> np.ndarray:
    """A structured picture, (90, 120, 3): gradients and a bright disc."""
    y, x = np.mgrid[:90, :120]
    disc = ((y - 40) ** 2 + (x - 70) ** 2) < 25**2
    channels = np.stack([x * 2, y * 2, np.full_like(x, 60)], -1)
    channels[disc] = (250, 200, 30)
    return channels.astype(np.uint8)


@pytest.fixture
def disc() -> np.ndarray:
    """The mask of the disc in `picture`."""
    y, x = np.mgrid[:90, :120]
    return ((y - 40) ** 2 + (x - 70) ** 2) < 25**2
