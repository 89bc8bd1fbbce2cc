"""The affinity stage as a module and as an exported graph, and the glue that asks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from fssdeploy.engines import open_engine
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import InputError
from fssdeploy.export.lint import lint
from fssdeploy.export.onnx import export_stage
from fssdeploy.glue import affinity
from fssdeploy.glue.affinity import AFFINITY, cosines
from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.protocol import BATCH, Engine, TensorSpec
from fssdeploy.systems.affinity_stage import AffinityStage, affinity_spec

CELLS, CHANNELS = 25, 12
SPEC = affinity_spec(TensorSpec("features", "float32", (BATCH, CELLS, CHANNELS)))


def module(unit_features: bool = False) -> TorchEngine:
    return TorchEngine({AFFINITY: AffinityStage(unit_features)}, {AFFINITY: SPEC})


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("affinity")
    return folder / export_stage(AffinityStage(), SPEC, folder, precision="fp16", fuse=False).portable


@pytest.fixture(params=["torch", "onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest, graph: Path) -> Engine:
    if request.param == "torch":
        return module()
    pytest.importorskip(request.param)
    return open_engine(request.param, {AFFINITY: graph}, {AFFINITY: SPEC}, threads=1)


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 7, 60])
def test_rows_meet_unit_vectors_and_zero_vectors_stay_zero(engine: Engine, count: int) -> None:
    rows, features = random_rows(count), random_rows(CELLS, 1) * np.logspace(-6, 6, CELLS, dtype=np.float32)[:, None]
    features[3] = 0
    found = cosines(engine, rows, features)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows.astype(float) @ unit(features.astype(float)).T, rtol=1e-4, atol=1e-6)
    assert not found[:, 3].any()


def test_rows_go_in_chunks_and_pictures_one_by_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, features = random_rows(10), random_rows(3 * CELLS, 1)
    whole = cosines(engine, rows, features)
    assert whole.shape == (10, 3 * CELLS)
    np.testing.assert_allclose(whole, rows @ unit(features).T, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(affinity, "CHUNK", 4)
    np.testing.assert_allclose(cosines(engine, rows, features), whole, rtol=1e-5, atol=1e-6)


def test_features_of_length_one_can_be_left_as_they_are() -> None:
    features = random_rows(CELLS)
    identity = np.eye(CHANNELS, dtype=np.float32)
    np.testing.assert_array_equal(cosines(module(unit_features=True), identity, features), features.T)
    np.testing.assert_allclose(cosines(module(), identity, features), unit(features).T, rtol=1e-6)


def test_the_graph_keeps_its_guard_and_float32_at_every_precision(graph: Path) -> None:
    assert lint(graph, SPEC, target_opset=18, precision="fp16") == []
    model = onnx.load(graph)
    assert "Clip" in [node.op_type for node in model.graph.node]
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in types


def test_an_artifact_without_the_stage_says_so() -> None:
    with pytest.raises(InputError, match="no stage 'affinity'") as error:
        cosines(TorchEngine({}, {}), random_rows(2), random_rows(CELLS))
    assert error.value.code == "stage_missing"
