"""Two processes train what one does: the same losses and weights, everything counted, each failing for both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from fssdeploy.training.loop import LOG, SKIPPED, read_log
from fssdeploy.training.recipe import Recipe
from tests.training.toys import Stopped, Toy, Vectors, log_of, state_of, stop_at, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs Gloo")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tests.training.test_processes import toys
from tests.training.toys import Stopped
from fssdeploy.errors import CheckFailedError
from fssdeploy.training.loop import machine, run

with machine(0) as here:
    for name, toy in toys().items():
        try:
            run(toy, Path(sys.argv[1]) / name, here, lambda line: None, log_every=1, save_every=6)
        except Stopped:
            print(f"{here.rank} stopped", flush=True)
        except CheckFailedError as error:
            print(f"{here.rank} {error.code}", flush=True)
            raise
"""


def toys() -> dict[str, Toy]:
    """In this order; with the last one the second process fails, and the first cannot go on alone."""
    return {
        "plain": Toy(dropout=0.0),
        "accumulated": Toy(dropout=0.0, accumulate=2, examples=Vectors(bad=[(0, 0), (3, 0), (3, 1), (31, 0)])),
        "stopped": stop_at(Toy(dropout=0.0), 7),
        "poisoned": Toy(dropout=0.0, examples=Vectors(poisoned=3)),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where two processes trained all toys, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    for name in toys():
        (folder / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode, "the poisoned toy ends both"
        assert "poisoned" not in out and ("CheckFailedError" in errors or "gloo" in errors.lower()), errors
        said += out.splitlines()
    return folder, said


def check_close(out: Path, reference: Path, recipe: Recipe) -> None:
    """The log of `out` and its last weights agree with those that one process leaves in `reference`."""
    train(recipe, reference, log_every=1)
    found, wanted = log_of(out), log_of(reference)
    assert len(found) == len(wanted) == 9
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    found, wanted = state_of(out), state_of(reference)
    assert found["step"] == wanted["step"]
    for part in ("model", "average"):
        for name, tensor in wanted[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one(pair: tuple[Path, list[str]], tmp_path: Path) -> None:
    check_close(pair[0] / "plain", tmp_path / "one", toys()["plain"])


def test_with_accumulation_and_unreadable_pictures_on_both(pair: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = pair[0] / "accumulated"
    check_close(out, tmp_path / "one", toys()["accumulated"])
    assert [line["skipped"] for line in log_of(out)] == [3] * 6 + [4] * 3
    assert read_log(out, SKIPPED) == read_log(tmp_path / "one", SKIPPED) != []


def test_one_process_continues_what_two_began(pair: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = pair[0] / "stopped"
    assert {"0 stopped", "1 stopped"} <= set(pair[1])
    assert state_of(out)["step"] == 6 and len((out / LOG).read_text().splitlines()) == 7
    assert train(toys()["plain"], out, log_every=1).steps == 3
    check_close(out, tmp_path / "one", toys()["plain"])
    with pytest.raises(Stopped):
        train(toys()["stopped"], tmp_path / "alone")


def test_a_failure_of_one_ends_both(pair: tuple[Path, list[str]]) -> None:
    """The position is the second process' share of the first step."""
    assert "1 loss_not_finite" in pair[1]
    kept = torch.load(pair[0] / "poisoned" / "failed-step1-rank1.pt", weights_only=True)
    assert kept["examples"] == ["2/0", "3/0"]
    kept_files = {path.name for path in (pair[0] / "poisoned").iterdir()}
    assert kept_files - {"tensorboard"} == {LOG, "failed-step1-rank1.pt"}
