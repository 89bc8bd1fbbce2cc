"""Systems with steps of their own between the stages, behind the real server: the masks are the local ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="repositories and clients need the extra 'serve'")

from fssdeploy import shipped
from fssdeploy.deployment import open_deployment
from fssdeploy.errors import InputError
from fssdeploy.export.artifact import ExportRequest, export_artifact
from fssdeploy.serving.check import check
from fssdeploy.serving.client import Client
from fssdeploy.serving.configs import Options
from fssdeploy.serving.environment import Environment
from fssdeploy.serving.repository import png, read_samples, sample_shot, write_repository
from fssdeploy.serving.server import Server
from fssdeploy.systems import get_system
from fssdeploy.weights import fill

(SUPPORT, MASK), (QUERY, _) = sample_shot(0), sample_shot(1)


@pytest.fixture(
    scope="module",
    params=["gfsam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("matcher", "persam"))],
)
def written(
    request: pytest.FixtureRequest, server_environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A system's name and a folder with its artifact, of the package's own weights, and a repository of it."""
    name = str(request.param)
    system, folder = get_system(name), tmp_path_factory.mktemp(name)
    model = system.build(system.PRESETS["tiny"])
    provenance = fill(name, model, shipped.checkpoints(name, "tiny"), None)
    export_artifact(model, provenance, ExportRequest(system, "tiny", system.PRESETS["tiny"]), folder / "artifact")
    write_repository([f"{name}={folder / 'artifact'}"], folder / "models", Options())
    assert check(folder / "models") == []
    return name, folder


@pytest.fixture(scope="module")
def served(written: tuple[str, Path], server_environment: Environment) -> Iterator[tuple[Client, Server, Path]]:
    """The server also has a model `<system>_scripted`: the enrolled path over the server's own stage models."""
    name, folder = written
    script(folder / "models", name)
    with (
        Server(folder / "models", server_environment, log=folder / "log", exit_timeout=2) as server,
        Client(server.http_url, name, timeout=120) as client,
    ):
        yield client, server, folder


def script(models: Path, name: str) -> None:
    """Let `<system>_segment` call the stage models, as it does on a GPU; it cannot do so while the server loads it."""
    config = models / f"{name}_segment" / "config.pbtxt"
    text, changed = re.subn(r'(key: "engine"\s+value \{\s+string_value: )"session"', r'\1"models"', config.read_text())
    assert changed == 1
    config.write_text(re.sub(r"^model_warmup \{.*?^\}\n", "", text, flags=re.DOTALL | re.MULTILINE))


def test_masks_are_the_local_ones(served: tuple[Client, Server, Path], tmp_path: Path) -> None:
    """Enrolled, through models that call models, and stateless in one model."""
    client, _, folder = served
    local = open_deployment(folder / "artifact", tmp_path / "bank", threads=1)
    for api in (local, client):
        api.enroll("thing", [SUPPORT], [MASK])
    for picture in (SUPPORT, QUERY):
        np.testing.assert_array_equal(
            client.segment(picture, ["thing"])["thing"].mask, local.segment(picture, ["thing"])["thing"].mask
        )
    assert local.segment(SUPPORT, ["thing"])["thing"].mask.any()
    pictures, supports, masks = [png(SUPPORT), png(QUERY)], [png(SUPPORT)] * 2, [png(MASK)] * 2
    found, scores = client.segment_once(pictures, supports, masks)
    expected = local.segment_once(pictures, supports, masks)
    np.testing.assert_array_equal(found, [each.mask for each in expected])
    np.testing.assert_allclose(scores, [each.score for each in expected], rtol=1e-6)


def test_mistakes_are_named(served: tuple[Client, Server, Path]) -> None:
    client, _, _ = served
    blank = png(np.zeros(MASK.shape, bool))
    for code, masks in (("masks_count", [png(MASK)] * 2), ("mask_empty", [blank])):
        with pytest.raises(InputError) as caught:
            client.segment_once([png(QUERY)], [png(SUPPORT)], masks)
        assert caught.value.code == code


def test_stages_are_warmed_up_by_what_they_get(written: tuple[str, Path]) -> None:
    name, folder = written
    samples = read_samples(folder / "models" / f"{name}_stage_sam_encoder")
    assert all(array.size for array in samples.values()) and samples
