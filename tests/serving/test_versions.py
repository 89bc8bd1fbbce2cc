"""Promotion and rollback: whole or not at all, and what the server refuses is taken back."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.artifact import Artifact
from fssdeploy.errors import CheckFailedError, FssError, InputError, IntegrityError, MachineError
from fssdeploy.serving import versions
from fssdeploy.serving.check import check
from fssdeploy.serving.configs import Options
from fssdeploy.serving.control import Answer, NoAnswerError, Tensor
from fssdeploy.serving.names import Names
from fssdeploy.serving.repository import Repository, object_array, unpack_strings, write_repository
from fssdeploy.serving.versions import promote, rollback
from tests.cli.command import fssdeploy
from tests.serving.grey import write_artifact
from tests.serving.inprocess import Host, python_backend

NAMES = Names("grey")
URL = "127.0.0.1:1"


class FakeServer:
    """The part of the server's interface that a promotion uses, over models in this process."""

    def __init__(self, repository: Path) -> None:
        self.host = Host(repository)
        self.loads: list[tuple[str, int]] = []
        self.served = dict.fromkeys(NAMES.versioned, 1)
        self.refuse: set[tuple[str, int]] = set()
        self.vanish_at: str = ""
        self.wrong = False

    def load(self, model: str, timeout: float = 0) -> Answer:
        version = self.host.versions(model)[-1]
        self.loads.append((model, version))
        if model == self.vanish_at and version > 1:
            raise NoAnswerError("connection refused")
        if (model, version) in self.refuse:
            return Answer(400, json.dumps({"error": f"failed to load '{model}'"}).encode())
        if model in NAMES.stages:
            self.host.load(model)
        self.served[model] = version
        return Answer(200, b"")

    def states(self) -> list[dict[str, str]]:
        return [{"name": m, "version": str(v), "state": "READY"} for m, v in self.served.items()]

    def infer(self, model: str, inputs: Sequence[Tensor], timeout: float) -> Answer:
        given = {tensor.name: object_array(unpack_strings(tensor.data)) for tensor in inputs}
        masks = self.host.infer(model, given)["masks"]
        data = (1 - masks if self.wrong else masks).tobytes()
        output = {"name": "masks", "parameters": {"binary_data_size": len(data)}}
        score = {"name": "scores", "parameters": {"binary_data_size": 4}}
        return Answer(200, json.dumps({"outputs": [score, output]}).encode() + b"\0\0\0\x7b" + data)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts `old`, `new` and `newer` with other last stages, `strange` with another fingerprint, `fixed`."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name, width in (("old", 30), ("new", 45), ("newer", 60)):
        write_artifact(folder / name, width=width)
    write_artifact(folder / "strange", fingerprint="e" * 64)
    write_artifact(folder / "fixed", 1, width=45)
    return folder


@pytest.fixture
def repository(artifacts: Path, tmp_path: Path) -> Path:
    write_repository([str(artifacts / "old")], tmp_path / "repository", Options())
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with python_backend():
        fake = FakeServer(repository)
        monkeypatch.setattr(versions, "_control", lambda url: fake)
        yield fake


def state(repository: Path) -> dict[str, list[str]]:
    """What lies beside the configs of the models that carry weights."""
    kept = {"config.pbtxt", "warmup"}
    return {
        m: sorted(each.name for each in (repository / m).iterdir() if each.name not in kept) for m in NAMES.versioned
    }


def everywhere(*numbers: str) -> dict[str, list[str]]:
    return dict.fromkeys(NAMES.versioned, sorted(numbers))


def refused(code: str, kind: type[FssError], call: object, *arguments: object) -> FssError:
    with pytest.raises(kind) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.code == code
    return caught.value


def test_promotion_and_rollback_without_a_server(repository: Path, artifacts: Path) -> None:
    answer = fssdeploy("repo", "promote", repository, "grey", artifacts / "new", "--json")
    assert answer.code == 0 and answer.json["version"] == 2, answer.err
    assert state(repository) == everywhere("1", "2") and check(repository) == []
    served = repository / NAMES.segment / "2" / "artifact"
    assert Artifact.open(served).manifest["digest"] == Artifact.open(artifacts / "new").manifest["digest"]
    assert fssdeploy("repo", "rollback", repository, "grey").code == 0
    assert state(repository) == everywhere("1") and check(repository) == []
    # A number is never used twice: somebody may remember what it meant.
    assert promote(repository, "grey", artifacts / "newer").data["version"] == 3
    assert state(repository) == everywhere("1", "3") and Repository.open(repository).version(NAMES.segment) == 3
    assert Repository.open(repository).version(NAMES.finish) == 1 and check(repository) == []


def test_the_server_follows(server: FakeServer, repository: Path, artifacts: Path) -> None:
    promote(repository, "grey", artifacts / "new", URL)
    assert server.loads == [(model, 2) for model in NAMES.versioned] and set(server.served.values()) == {2}
    rollback(repository, "grey", URL)
    assert server.loads[5:] == [(model, 1) for model in NAMES.versioned] and set(server.served.values()) == {1}
    assert state(repository) == everywhere("1") and check(repository) == []


@pytest.mark.parametrize("model", NAMES.versioned)
def test_what_the_server_refuses_is_taken_back(
    model: str, server: FakeServer, repository: Path, artifacts: Path
) -> None:
    server.refuse = {(model, 2)}
    error = refused("promotion_failed", CheckFailedError, promote, repository, "grey", artifacts / "new", URL)
    assert model in str(error) and "Version 1 goes on serving" in str(error)
    assert set(server.served.values()) == {1} and server.loads[-5:] == [(each, 1) for each in NAMES.versioned]
    assert state(repository) == everywhere("1") and check(repository) == []


def test_a_wrong_answer_is_taken_back(server: FakeServer, repository: Path, artifacts: Path) -> None:
    server.wrong = True
    error = refused("promotion_failed", CheckFailedError, promote, repository, "grey", artifacts / "new", URL)
    assert "differs from the local one" in str(error)
    assert state(repository) == everywhere("1") and set(server.served.values()) == {1}


def test_a_server_on_another_repository_is_noticed(server: FakeServer, repository: Path, artifacts: Path) -> None:
    server.host.repository = Path(shutil.copytree(repository, repository.with_name("other")))
    error = refused("promotion_failed", CheckFailedError, promote, repository, "grey", artifacts / "new", URL)
    assert "does it run on this repository" in str(error)
    assert state(repository) == everywhere("1")


def test_a_server_that_goes_away(server: FakeServer, repository: Path, artifacts: Path) -> None:
    server.vanish_at = NAMES.stage("segment")
    refused("promotion_failed", CheckFailedError, promote, repository, "grey", artifacts / "new", URL)
    assert state(repository) == everywhere("1") and check(repository) == []


@pytest.mark.parametrize("renames", range(5))
def test_an_interrupt_is_taken_back(
    renames: int, repository: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, count = os.rename, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == renames + 1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        promote(repository, "grey", artifacts / "new")
    assert state(repository) == everywhere("1") and check(repository) == []


def test_a_full_disk_is_taken_back(repository: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(versions, "sync_tree", full)
    refused("no_space", MachineError, promote, repository, "grey", artifacts / "new")
    assert state(repository) == everywhere("1") and check(repository) == []


def test_what_a_kill_leaves_is_reported_and_superseded(repository: Path, artifacts: Path) -> None:
    promote(repository, "grey", artifacts / "new")
    shutil.copytree(repository / NAMES.segment / "2", repository / NAMES.segment / "3")
    problems = [problem.what for problem in check(repository)]
    assert any("would take version 3, not 2" in what for what in problems)
    assert any("was a promotion interrupted" in what for what in problems)
    rollback(repository, "grey")
    assert state(repository) == everywhere("1") and check(repository) == []
    shutil.copytree(repository / NAMES.segment / "1", repository / NAMES.segment / "7")
    shutil.copytree(repository / NAMES.enroll / "1", repository / NAMES.enroll / ".0123456789abcdef")
    assert promote(repository, "grey", artifacts / "newer").data["version"] == 8
    assert state(repository)[NAMES.enroll] == ["1", "8"]


def test_rollback_that_the_server_refuses(server: FakeServer, repository: Path, artifacts: Path) -> None:
    promote(repository, "grey", artifacts / "new", URL)
    server.refuse = {(NAMES.segment, 1)}
    refused("rollback_failed", CheckFailedError, rollback, repository, "grey", URL)
    assert state(repository) == everywhere("1", "2") and set(server.served.values()) == {2}
    assert check(repository) == []


def test_artifacts_that_cannot_follow(repository: Path, artifacts: Path) -> None:
    error = refused("other_fingerprint", IntegrityError, promote, repository, "grey", artifacts / "strange")
    assert "enrolled classes would not fit" in str(error)
    refused("other_shapes", InputError, promote, repository, "grey", artifacts / "fixed")
    refused("already_served", InputError, promote, repository, "grey", artifacts / "old")
    refused("system_unknown", InputError, promote, repository, "gray", artifacts / "new")
    refused("artifact_missing", InputError, promote, repository, "grey", artifacts / "nowhere")
    refused("repository_missing", InputError, promote, artifacts, "grey", artifacts / "new")
    refused("repository_missing", InputError, promote, artifacts / "nowhere", "grey", artifacts / "new")
    refused("no_earlier_version", InputError, rollback, repository, "grey")
    refused("url", InputError, promote, repository, "grey", artifacts / "new", "localhost")
    assert state(repository) == everywhere("1") and check(repository) == []


def test_a_repository_of_another_release(repository: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "__version__", "9.9.9")
    refused("repository_version", IntegrityError, promote, repository, "grey", artifacts / "new")


def test_one_change_at_a_time(repository: Path, artifacts: Path) -> None:
    descriptor = os.open(repository, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused("repository_busy", MachineError, promote, repository, "grey", artifacts / "new")
    refused("repository_busy", MachineError, rollback, repository, "grey")
    os.close(descriptor)
    promote(repository, "grey", artifacts / "new")


def test_new_weights_answer_otherwise(server: FakeServer, repository: Path, artifacts: Path) -> None:
    """Else the tests above would not see which version answers."""
    from fssdeploy.serving.repository import png, sample_shot

    (picture, mask), (query, _) = sample_shot(0), sample_shot(1)
    given = {"pictures": query, "support_pictures": picture, "support_masks": mask}
    inputs = {name: object_array([png(array)]) for name, array in given.items()}
    before = server.host.infer("grey", inputs)["masks"]
    promote(repository, "grey", artifacts / "new", URL)
    assert 0.02 < np.mean(before != server.host.infer("grey", inputs)["masks"]) < 0.9
