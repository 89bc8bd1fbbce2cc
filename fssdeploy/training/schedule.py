"""Phases of a run and the learning rate's course over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fssdeploy.errors import InputError


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps on pictures of side `size`, `batch` examples each, over all processes together."""

    steps: int
    batch: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where a step lies: its phase, its step within the phase, and the positions of its examples in the stream."""

    phase: int
    step: int
    positions: range
    size: int


def locate(phases: Sequence[Phase], step: int) -> Place:
    """The place of a step (from 0). Positions are counted over all phases: an example is drawn once."""
    first = 0
    for number, phase in enumerate(phases):
        if step < phase.steps:
            start = first + step * phase.batch
            return Place(number, step, range(start, start + phase.batch), phase.size)
        step -= phase.steps
        first += phase.steps * phase.batch
    raise IndexError(step)


def check_sizes(phases: Sequence[Phase], patch: int, only: int | None = None) -> None:
    """InputError unless every phase's pictures can be cut into patches, or have the `only` size a network takes."""
    for phase in phases:
        if phase.size % patch or phase.size < 2 * patch or (only and phase.size != only):
            fix = f"Use {only}." if only else f"Use multiples of {patch}, at least {2 * patch}."
            raise InputError("phases", f"pictures of {phase.size} pixels do not fit this network", "", fix)


def warmup_cosine(done: float, warmup: float = 0.05) -> float:
    """Factor of the learning rate at a share of the run, 0..1: linear up to 1, then half a cosine down to 0."""
    if done < warmup:
        return max(done / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def cosine(done: float) -> float:
    """Half a cosine from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def poly(done: float, power: float = 0.9) -> float:
    """(1 - done) ** 0.9: HDMNet's schedule, which FS-DINO follows (section 4.1)."""
    return float(max(0.0, 1 - done) ** power)


SCHEDULES = {"warmup_cosine": warmup_cosine, "cosine": cosine, "poly": poly}


def parse_phases(text: str) -> tuple[Phase, ...]:
    """ "STEPSxBATCHxSIZE" for each phase, joined by commas. InputError if it reads otherwise."""
    try:
        phases = tuple(Phase(*(int(part) for part in each.split("x"))) for each in text.split(","))
        if any(min(phase.steps, phase.batch, phase.size) < 1 for phase in phases):
            raise ValueError("numbers below 1")
    except (ValueError, TypeError) as error:
        raise InputError(
            "phases", f"'{text}' are no phases", str(error), "Write STEPSxBATCHxSIZE, for several with commas."
        ) from error
    return phases
