"""A recipe that trains in milliseconds: two optimisers, two phases, dropout, a frozen part, examples that misbehave."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fssdeploy.errors import InputError, MachineError
from fssdeploy.training import checkpoint
from fssdeploy.training.loop import Machine, Outcome, read_log, run
from fssdeploy.training.recipe import Batch, Objective, adamw
from fssdeploy.training.schedule import Phase

PHASES = (Phase(5, 4, 3), Phase(4, 8, 2))
STEPS = 9
# Differs between two runs that are otherwise the same.
TIMING = "examples_per_second"


@dataclass
class Vectors:
    """Examples: `x` (size, 4) and `y` (1,). What happens at some positions: unreadable, NaN, the process dies.

    `bad` holds (position, attempt); `drawn` collects (position, size) of what was drawn in this process.
    """

    bad: Sequence[tuple[int, int]] = ()
    poisoned: int = -1
    deadly: int = -1
    full_disk: int = -1
    drawn: list[tuple[int, int]] = field(default_factory=list)

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        if position == self.deadly:
            os._exit(1)
        if position == self.full_disk:
            raise MachineError("no_space", "the pictures cannot be kept", "there is no space left")
        if (position, attempt) in self.bad:
            raise InputError("picture_damaged", f"picture {position} cannot be decoded")
        self.drawn.append((position, size))
        rng = np.random.default_rng([position, attempt])
        x = rng.standard_normal((size, 4)).astype(np.float32)
        y = np.array([np.nan if position == self.poisoned else x.sum() / size], np.float32)
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}

    def describe(self, position: int, attempt: int) -> str:
        return f"{position}/{attempt}"


class Fit(Objective):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.matrix = nn.Linear(4, 6)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(6, 1)
        self.before: Callable[[int], None] = lambda step: None

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.before(int(batch["step"]))
        hidden = self.dropout(torch.tanh(self.matrix(self.frozen(batch["x"]))))
        error = self.out(hidden).mean((1, 2)) - batch["y"][:, 0]
        return {"loss": error.square().mean(), "bias": error.mean()}


@dataclass
class Toy:
    """A recipe; whatever is given differently gives other numbers."""

    phases: Sequence[Phase] = PHASES
    schedule: str = "poly"
    schedule_per_phase: bool = False
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    ema: float = 0.9
    seed: int = 0
    dropout: float = 0.2
    examples: Vectors = field(default_factory=Vectors)
    name: str = "toy"
    entered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.objective = Fit(self.dropout)

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "phases": self.phases, "schedule": self.schedule, "clip": self.clip}

    def optimisers(self) -> list[torch.optim.Optimizer]:
        network = self.objective
        rest = [network.matrix.bias, *network.out.parameters()]
        return [torch.optim.Muon([network.matrix.weight], lr=0.02), adamw(rest, 0.01, 0.1)]

    def enter(self, phase: int) -> None:
        self.entered.append(phase)


def machine(workers: int = 0, rank: int = 0, world: int = 1) -> Machine:
    return Machine(rank, world, torch.device("cpu"), workers)


def train(toy: Any, out: Path, workers: int = 0, *, log_every: int = 2, save_every: int = 3) -> Outcome:
    out.mkdir(exist_ok=True)
    return run(toy, out, machine(workers), lambda line: None, log_every=log_every, save_every=save_every)


class Stopped(Exception):
    """Ends a run in the middle of a step."""


def stop_at(toy: Toy, step: int) -> Toy:
    """The toy, made to stop in its step `step` (counted from 0)."""

    def check(now: int) -> None:
        if now == step:
            raise Stopped

    toy.objective.before = check
    return toy


def log_of(out: Path) -> list[dict[str, float]]:
    """The log without the times."""
    return [{name: value for name, value in line.items() if name != TIMING} for line in read_log(out)]


def state_of(out: Path) -> dict[str, Any]:
    """The checkpoint of a run, as it was stored."""
    return torch.load(out / checkpoint.FILE, weights_only=True)  # type: ignore[no-any-return]


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Every tensor and number of a checkpoint under a name of its own, tensors as bytes: for exact comparison."""
    if isinstance(state, dict):
        return {k: v for name, each in state.items() for k, v in flat(each, f"{prefix}.{name}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state.numpy().tobytes() if isinstance(state, torch.Tensor) else json.dumps(state)}


def check_same_end(out: Path, reference: Path) -> None:
    """Weights, moving average, state of optimisers and random numbers, and the log are equal to the last bit."""
    check_same_state(out, reference)
    assert log_of(out) == log_of(reference)


def check_same_state(out: Path, reference: Path, but: Sequence[str] = ()) -> None:
    """All of the above but the log, and but some parts of the checkpoint."""
    found, wanted = (flat({k: v for k, v in state_of(each).items() if k not in but}) for each in (out, reference))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
