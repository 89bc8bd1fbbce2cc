"""The training loop: exact continuation, accumulation, clipping, averaging, and everything that can go wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fssdeploy import files
from fssdeploy.errors import CheckFailedError, InputError, IntegrityError, MachineError
from fssdeploy.training import checkpoint
from fssdeploy.training.loop import ATTEMPTS, LOG, SKIPPED, read_log
from fssdeploy.training.recipe import Batch, Objective
from fssdeploy.training.schedule import Phase
from tests.training.toys import (
    PHASES,
    STEPS,
    Stopped,
    Toy,
    Vectors,
    check_same_end,
    log_of,
    machine,
    state_of,
    stop_at,
    train,
)

POSITIONS = sum(phase.steps * phase.batch for phase in PHASES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    train(Toy(), out)
    return out


@pytest.mark.parametrize(("log_every", "save_every"), [(2, 3), (3, 2), (4, 1), (1, 4)])
def test_continued_as_if_never_stopped(tmp_path: Path, log_every: int, save_every: int) -> None:
    """Also the log lines whose steps lie on both sides of the checkpoint, and the count of what was skipped."""
    every = {"log_every": log_every, "save_every": save_every}

    def toy() -> Toy:
        return Toy(examples=Vectors(bad=[(1, 0), (1, 1), (30, 0)]), precision="bf16")

    outcome = train(toy(), tmp_path / "whole", **every)
    assert (outcome.steps, outcome.skipped) == (STEPS, 3)
    for step in range(STEPS):
        out = tmp_path / f"stopped{step}"
        with pytest.raises(Stopped):
            train(stop_at(toy(), step), out, **every)
        continued = train(toy(), out, **every)
        check_same_end(out, tmp_path / "whole")
        assert read_log(out, SKIPPED) == read_log(tmp_path / "whole", SKIPPED)
        assert continued.steps == STEPS - step // save_every * save_every
        assert (continued.skipped, continued.last) == (3, outcome.last)


def test_a_finished_run_is_left_as_it_is(whole: Path, tmp_path: Path) -> None:
    first, again = Toy(), Toy()
    train(first, tmp_path)
    before = (tmp_path / checkpoint.FILE).read_bytes()
    outcome = train(again, tmp_path)
    assert outcome.steps == 0 and outcome.last.keys() == {"loss", "bias"}
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    for name, tensor in first.objective.state_dict().items():
        assert torch.equal(tensor, again.objective.state_dict()[name])
    check_same_end(tmp_path, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(whole: Path, tmp_path: Path, workers: int) -> None:
    train(Toy(), tmp_path, workers)
    check_same_end(tmp_path, whole)


def test_every_position_once_in_the_size_of_its_phase(tmp_path: Path) -> None:
    toy = Toy(accumulate=2)
    train(toy, tmp_path)
    assert toy.examples.drawn == [(position, 3 if position < 20 else 2) for position in range(POSITIONS)]
    assert toy.entered == [0, 1]


def test_a_phase_is_entered_again_when_continued_within(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stop_at(Toy(), 7), tmp_path)
    toy = Toy()
    train(toy, tmp_path)
    assert toy.entered == [1]


def test_the_rate_follows_the_schedule(whole: Path, tmp_path: Path) -> None:
    train(Toy(), tmp_path / "run", log_every=1)
    assert [line["rate"] for line in read_log(tmp_path / "run")] == [(1 - step / STEPS) ** 0.9 for step in range(STEPS)]
    train(Toy(schedule_per_phase=True, schedule="cosine"), tmp_path / "phases", log_every=1)
    rates = [line["rate"] for line in read_log(tmp_path / "phases")]
    assert rates[0] == rates[5] == 1.0 and rates[7] == pytest.approx(0.5)  # half of the second phase of four
    group = state_of(whole)["optimisers"][1]["param_groups"][0]
    assert group["lr"] == pytest.approx(0.01 * (1 / STEPS) ** 0.9)


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    ends = []
    for parts in (1, 2, 4):
        toy = Toy(dropout=0.0, accumulate=parts)
        train(toy, tmp_path / str(parts), log_every=1)
        ends.append((toy.objective.state_dict(), log_of(tmp_path / str(parts))))
    for state, log in ends[1:]:
        for name, tensor in ends[0][0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
        for line, wanted in zip(log, ends[0][1], strict=True):
            assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)


class Slope(Objective):
    """A loss whose gradient is (3, 4) wherever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": self.weight @ torch.tensor([3.0, 4.0])}


class Plain(Toy):
    """Gradient descent at rate 1 on a slope."""

    def __post_init__(self) -> None:
        self.objective = Slope()  # type: ignore[assignment]

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.objective.parameters(), lr=1.0)]


@pytest.mark.parametrize(
    ("clip", "step"), [(1.0, (0.6, 0.8)), (2.5, (1.5, 2.0)), (5.5, (3, 4)), (float("inf"), (3, 4))]
)
def test_clipping_by_hand(tmp_path: Path, clip: float, step: tuple[float, float]) -> None:
    plain = Plain(phases=(Phase(1, 1, 1),), clip=clip, ema=0.0)
    train(plain, tmp_path)
    assert (-plain.objective.state_dict()["weight"]).tolist() == pytest.approx(step, rel=1e-5)


def test_moving_average_by_hand(tmp_path: Path) -> None:
    """Rates 1 and (1/2)**0.9; the result is the average, the checkpoint keeps what is trained further."""
    plain = Plain(phases=(Phase(2, 1, 1),), clip=1e9, ema=0.75)
    train(plain, tmp_path)
    first = -3.0
    second = first - 3 * 0.5**0.9
    average = 0.75 * (0.75 * 0 + 0.25 * first) + 0.25 * second
    assert plain.objective.state_dict()["weight"][0].item() == pytest.approx(average)
    stored = state_of(tmp_path)
    assert float(stored["model"]["weight"][0]) == pytest.approx(second)
    assert float(stored["average"]["weight"][0]) == pytest.approx(average)


def test_frozen_parts_stay(whole: Path) -> None:
    toy = Toy()
    before = toy.objective.frozen.weight.clone()
    stored = state_of(whole)
    assert torch.equal(stored["model"]["frozen.weight"], before)
    assert not any(name.startswith("frozen") for name in stored["average"])
    assert not torch.equal(stored["model"]["matrix.weight"], toy.objective.matrix.weight)


def test_half_precision_is_scaled_and_continued(tmp_path: Path) -> None:
    train(Toy(precision="fp16"), tmp_path / "whole")
    assert state_of(tmp_path / "whole")["scaler"]["scale"] > 1
    with pytest.raises(Stopped):
        train(stop_at(Toy(precision="fp16"), 5), tmp_path / "stopped")
    train(Toy(precision="fp16"), tmp_path / "stopped")
    check_same_end(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_replaced_and_counted(whole: Path, tmp_path: Path, workers: int) -> None:
    def toy() -> Toy:
        return Toy(examples=Vectors(bad=[(2, 0), (9, 0), (9, 1), (35, 0)]))

    outcome = train(toy(), tmp_path / "run", workers, log_every=1)
    assert outcome.skipped == 4
    assert [line["skipped"] for line in read_log(tmp_path / "run")] == [1, 1, 3, 3, 3, 3, 4, 4, 4]
    # Steps of four, then of eight from the sixth on: position 35 comes in the seventh.
    named = [(line["step"], line["examples"]) for line in read_log(tmp_path / "run", SKIPPED)]
    assert named == [(1, ["2/0"]), (3, ["9/0", "9/1"]), (7, ["35/0"])]
    train(toy(), tmp_path / "again", 1 - workers, log_every=1)
    check_same_end(tmp_path / "again", tmp_path / "run")
    assert log_of(tmp_path / "run")[0]["loss"] != log_of(whole)[0]["loss"]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_at_all(tmp_path: Path, workers: int) -> None:
    bad = [(21, attempt) for attempt in range(ATTEMPTS)]
    with pytest.raises(InputError) as caught:
        train(Toy(examples=Vectors(bad=bad)), tmp_path, workers)
    assert caught.value.code == "data_unusable" and "picture 21" in caught.value.why
    assert state_of(tmp_path)["step"] == 3  # the step before the bad one was done, its checkpoint not due


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_machine_keeps_its_words(tmp_path: Path, workers: int) -> None:
    with pytest.raises(MachineError) as caught:
        train(Toy(examples=Vectors(full_disk=6)), tmp_path, workers)
    assert (caught.value.code, caught.value.why) == ("no_space", "there is no space left")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_is_not_finite_can_be_replayed(tmp_path: Path, parts: int) -> None:
    toy = Toy(examples=Vectors(poisoned=27, bad=[(26, 0)]), accumulate=parts)
    with pytest.raises(CheckFailedError) as caught:
        train(toy, tmp_path)
    assert caught.value.code == "loss_not_finite" and "step 6 is nan" in caught.value.what
    assert state_of(tmp_path)["step"] == 3
    kept = torch.load(tmp_path / "failed-step6-rank0.pt", weights_only=True)
    assert kept["step"] == 6
    assert kept["examples"] == [f"{each}/{int(each == 26)}" for each in range(20 if parts == 1 else 24, 28)]
    replayed = Toy(seed=5).objective
    replayed.load_state_dict(kept["model"])
    assert replayed(kept["batch"])["loss"].isnan()
    kept["batch"]["y"][-1] = 0
    assert replayed(kept["batch"])["loss"].isfinite()


class Cusp(Slope):
    """A finite loss with an infinite gradient, as a square root at zero has it, from the third step on."""

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        losses = super().forward(batch)
        if int(batch["step"]) >= 2:
            losses["loss"] = losses["loss"] + (self.weight - self.weight.detach()).abs().sum().sqrt()
        return losses


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    plain = Plain(phases=(Phase(4, 2, 1),), accumulate=2)
    plain.objective = Cusp()  # type: ignore[assignment]
    with pytest.raises(CheckFailedError) as caught:
        train(plain, tmp_path, save_every=1)
    assert caught.value.code == "gradient_not_finite"
    stored = state_of(tmp_path)
    assert stored["step"] == 2 and stored["model"]["weight"].isfinite().all()
    kept = torch.load(tmp_path / "failed-step3-rank0.pt", weights_only=True)
    assert kept["examples"] == ["4/0", "5/0"] and len(kept["batch"]["x"]) == 2
    objective = Cusp()
    objective.load_state_dict(kept["model"])
    objective(kept["batch"])["loss"].backward()
    assert objective.weight.grad is not None and not objective.weight.grad.isfinite().all()


def test_a_full_disk_leaves_the_checkpoint_before(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = 0

    def fsync(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 3:  # the first checkpoint took two: the file and its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(MachineError) as caught:
            train(Toy(), tmp_path)
    assert caught.value.code == "no_space" and checkpoint.FILE in caught.value.what
    assert state_of(tmp_path)["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} - {"tensorboard"} == {checkpoint.FILE, LOG}
    train(Toy(), tmp_path)
    check_same_end(tmp_path, whole)


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def full(path: Path, mode: str = "r", *rest: Any) -> Any:
        return original(Path("/dev/full") if path.name == LOG and mode == "a" else path, mode, *rest)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError) as caught:
        train(Toy(), tmp_path)
    assert caught.value.code == "no_space" and LOG in caught.value.what


def test_lines_of_lost_steps_and_torn_lines_are_dropped(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stop_at(Toy(), 4), tmp_path)  # checkpoint at 3, log lines up to 4
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4]
    with (tmp_path / LOG).open("a") as stream:
        stream.write('{"step": 6, "loss": 0.2')
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4]
    train(Toy(), tmp_path)
    check_same_end(tmp_path, whole)


@pytest.mark.parametrize(
    ("other", "name"), [(Toy(seed=1), "seed"), (Toy(clip=2.0), "clip"), (Toy(phases=PHASES[:1]), "phases")]
)
def test_a_run_continues_only_under_its_own_settings(whole: Path, other: Toy, name: str) -> None:
    with pytest.raises(InputError) as caught:
        train(other, whole)
    assert caught.value.code == "other_settings" and caught.value.why.startswith(f"{name} is ")


@pytest.mark.parametrize(
    ("toy", "code"),
    [
        (Toy(accumulate=3), "batch"),
        (Toy(precision="int4"), "precision"),
        (Toy(accumulate=0), "setting"),
        (Toy(clip=0.0), "setting"),
        (Toy(clip=float("nan")), "setting"),
        (Toy(ema=1.0), "setting"),
        (Toy(ema=-0.5), "setting"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, toy: Toy, code: str) -> None:
    with pytest.raises(InputError) as caught:
        train(toy, tmp_path)
    assert caught.value.code == code
    assert not any(tmp_path.iterdir())


def change(data: bytes, place: int, bits: int = 1) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def test_damaged_checkpoints(whole: Path, tmp_path: Path) -> None:
    sound = (whole / checkpoint.FILE).read_bytes()
    weights = state_of(whole)["model"]["out.weight"].numpy().tobytes()
    place = sound.index(weights)
    flipped = [change(sound, place), change(sound, sound.index(b"PK\x01\x02") + 38, 0x10)]  # a weight; "is a folder"
    foreign = tmp_path / "foreign"
    torch.save({"format": "something", "state": torch.zeros(3)}, foreign)
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "run").mkdir()
    damaged = [b"", b"text", sound[:100], sound[:-30], *flipped, foreign.read_bytes(), (tmp_path / "list").read_bytes()]
    for data in damaged:
        (tmp_path / "run" / checkpoint.FILE).write_bytes(data)
        with pytest.raises(IntegrityError) as caught:
            train(Toy(), tmp_path / "run")
        assert caught.value.code == "checkpoint_damaged"
        assert (tmp_path / "run" / checkpoint.FILE).read_bytes() == data
    (tmp_path / "run" / checkpoint.FILE).write_bytes(sound)
    assert train(Toy(), tmp_path / "run").steps == 0


def test_a_checkpoint_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / checkpoint.FILE).mkdir()
    with pytest.raises(MachineError):
        train(Toy(), tmp_path)


def test_a_worker_that_dies(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        train(Toy(examples=Vectors(deadly=34)), tmp_path, 1, save_every=1)
    assert caught.value.code == "worker_died" and "exit" in caught.value.why
    assert 0 < state_of(tmp_path)["step"] <= 6
    train(Toy(), tmp_path, save_every=1)
    assert log_of(tmp_path)[-1] == log_of(whole)[-1]


def test_a_worker_that_dies_while_the_network_computes(tmp_path: Path) -> None:
    """The news comes as a signal, not from the loader."""
    others = multiprocessing.active_children()

    def kill(step: int) -> None:
        if step == 2:
            (worker,) = set(multiprocessing.active_children()) - set(others)
            os.kill(worker.pid or 0, signal.SIGKILL)
            time.sleep(5)
            raise AssertionError("the signal did not come")

    toy = Toy(phases=(Phase(50, 4, 2),))
    toy.objective.before = kill
    with pytest.raises(MachineError) as caught:
        train(toy, tmp_path, 1)
    assert caught.value.code == "worker_died" and "Killed" in caught.value.why


def test_other_failures_are_not_taken_for_dead_workers(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("a matrix does not fit")

    toy = Toy()
    toy.objective.before = fail
    with pytest.raises(RuntimeError, match="does not fit"):
        train(toy, tmp_path)


def test_only_the_leading_process_writes() -> None:
    assert machine().leads and not machine(rank=1, world=2).leads
