"""Kill a training run at every step of every write, and go on: it ends as if nothing had happened, to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fssdeploy.training import checkpoint
from fssdeploy.training.loop import LOG
from fssdeploy.weights.checkpoint import read_checkpoint
from tests.cli.command import fssdeploy
from tests.training.toys import Toy, check_same_end, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

ROOT = Path(__file__).parents[2]

# Imports once and forks a child for every run. The profile hook of the interpreter sees each call that changes a file,
# whoever makes it.
NURSERY = """
import io, json, os, signal, sys, tempfile, traceback
from pathlib import Path
from tests.training.toys import Toy, train

CHANGES = {"open", "write", "flush", "fsync", "replace", "unlink", "mkdir", "close", "__exit__"}

def die_at(number):
    calls = 0
    def count(frame, event, function):
        nonlocal calls
        if event != "c_call" or function.__name__ not in CHANGES or isinstance(function.__self__, io.BytesIO):
            return
        if (function.__module__ or type(function.__self__).__module__) in ("posix", "_io", "io"):
            calls += 1
            if calls == number:
                os.write(1, (function.__name__ + " ").encode())
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)

with tempfile.TemporaryDirectory() as folder:  # what is imported late is imported now
    train(Toy(), Path(folder))
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            out, number = json.loads(line)
            toy = Toy()
            die_at(number)
            train(toy, Path(out))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else "failed" if status else "done", flush=True)
"""

# The whole command, killed between the fourth line of its log and the checkpoint that belongs to it.
KILLED_COMMAND = """
import os, signal
from fssdeploy.training import loop
write = loop._Log.write
def write_and_die(log, line):
    write(log, line)
    if line["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
loop._Log.write = write_and_die
from fssdeploy.cli.main import main
main()
"""


class Nursery:
    """Starts runs that kill themselves in their call number `number` that changes a file."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-c", NURSERY], subprocess.PIPE
        # A child forked from a process with OpenMP threads would wait for them for ever.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=alone)

    def run(self, out: Path, number: int) -> list[str]:
        """The call that was not made, if any, and "killed" or "done"."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(out), number]) + "\n")
        self.process.stdin.flush()
        words = self.process.stdout.readline().split()
        assert words[-1] in ("killed", "done")
        return words


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    assert nursery.process.stdin
    nursery.process.stdin.close()
    assert nursery.process.wait(10) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(Toy(), out)
    return out


def test_killed_at_every_write(whole: Path, tmp_path: Path, nursery: Nursery) -> None:
    met = []
    resumed_from = set()
    number = 0
    while True:
        number += 1
        out = tmp_path / str(number)
        *call, end = nursery.run(out, number)
        if end == "done":
            break
        met += call
        resumed_from.add(9 - train(Toy(), out).steps)
        check_same_end(out, whole)
    assert resumed_from == {0, 3, 6, 9}
    # Three checkpoints and the first log are renamed into place; each checkpoint and its folder are flushed to disk.
    assert met.count("replace") == 4 and met.count("fsync") == 6 and met.count("write") >= 9


def test_killed_again_and_again(whole: Path, tmp_path: Path, nursery: Nursery) -> None:
    rng = random.Random(3)
    for turn in range(3):
        kills = 0
        while nursery.run(tmp_path / str(turn), rng.randint(10, 30))[-1] == "killed":
            kills += 1
        assert kills
        check_same_end(tmp_path / str(turn), whole)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """What a training starts from: encoder and adapter of the tiny preset, made up."""
    from fssdeploy.systems import fsdino
    from fssdeploy.weights.dinov2 import save_dinov2
    from fssdeploy.weights.fsdino import fill, save_group

    model = fsdino.build(fsdino.PRESETS["tiny"])
    fill(model, [], untrained_seed=4)
    save_dinov2(model.encoder, tmp_path / "encoder.safetensors", {})
    save_group(model, "adapter", tmp_path / "adapter.safetensors", {})
    return tmp_path


def test_the_command_killed_and_given_again(tmp_path: Path, weights: Path) -> None:
    arguments = ["train", "fsdino", "--phases", "6x2x28", "--model", "image_size=28", "--threads", "1"]
    arguments += ["--log-every", "1", "--save-every", "2", "--set", "ema=0.9"]
    for group in ("encoder", "adapter"):
        arguments += ["--weights", str(weights / f"{group}.safetensors")]

    command = [sys.executable, "-c", KILLED_COMMAND, *arguments, "--out", str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((tmp_path / "killed" / LOG).read_text().splitlines()) == 4
    assert torch.load(tmp_path / "killed" / checkpoint.FILE, weights_only=True)["step"] == 2

    threads = torch.get_num_threads()
    for out in ("killed", "whole"):
        answer = fssdeploy(*arguments, "--out", tmp_path / out, "--json")
        assert answer.code == 0, answer.err
        assert answer.json["steps"] == {"killed": 4, "whole": 6}[out]
    torch.set_num_threads(threads)
    check_same_end(tmp_path / "killed", tmp_path / "whole")
    killed_end, whole_end = (read_checkpoint(tmp_path / out / "fsdino.safetensors") for out in ("killed", "whole"))
    assert killed_end.metadata == whole_end.metadata
    assert killed_end.tensors.keys() == whole_end.tensors.keys()
    assert all(torch.equal(tensor, whole_end.tensors[name]) for name, tensor in killed_end.tensors.items())
