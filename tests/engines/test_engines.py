"""Engines: the same answers behind one interface, and no surprises at run time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.artifact import load
from fssdeploy.errors import InputError
from fssdeploy.protocol import Engine

RUN = """
import sys, numpy as np, fssdeploy
fssdeploy.load(sys.argv[1], sys.argv[2]).encode([np.zeros((30, 40, 3), np.uint8)])
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_nothing_is_left_in_the_home_directory(tiny_artifact: Path, tmp_path: Path, runtime: str) -> None:
    """ONNX Runtime's telemetry keeps its unsent reports and a device number there."""
    pytest.importorskip(runtime)
    # A variable named CI silences the telemetry too and would hide a mistake.
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(
        [sys.executable, "-c", RUN, str(tiny_artifact), runtime],
        env={**environment, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")},
        check=True,
    )
    assert list(home.rglob("*")) == []


def test_runtimes_agree(tiny_artifact: Path, picture: np.ndarray, disc: np.ndarray) -> None:
    pytest.importorskip("openvino")
    answers = []
    for runtime in ("onnxruntime", "openvino"):
        system = load(tiny_artifact, runtime, threads=1)
        assert isinstance(system.engine, Engine)
        assert system.engine.describe()["threads"] == 1
        features = system.encode([picture])
        answers.append(system.segment(features, {"disc": system.enroll(features, [disc])}).logits[0]["disc"])
    np.testing.assert_allclose(*answers, rtol=1e-3, atol=1e-3)


def test_wrong_inputs_are_named(tiny_artifact: Path) -> None:
    engine = load(tiny_artifact).engine
    spec = engine.specs["encoder"].inputs[0]
    right = np.zeros(spec.shape, np.uint8)
    with pytest.raises(InputError, match="float32 for 'picture'"):
        engine.run("encoder", {"picture": right.astype(np.float32)})
    with pytest.raises(InputError, match="shape .1, 3, 100, 100. for 'picture'"):
        engine.run("encoder", {"picture": np.zeros((1, 3, 100, 100), np.uint8)})
    with pytest.raises(InputError, match=r"got the inputs \['image'\]"):
        engine.run("encoder", {"image": right})


def test_unknown_runtime_and_threads(tiny_artifact: Path) -> None:
    with pytest.raises(InputError, match="no runtime 'tensorflow'"):
        load(tiny_artifact, "tensorflow")
    with pytest.raises(InputError, match="0 threads"):
        load(tiny_artifact, threads=0)
