"""The training loop: steps over a stream of examples, on one process or several, killed and continued at will.

A step's examples are a function of the seed and their positions in the stream, not of processes or workers; together
with a checkpoint of model, optimisers and random state this makes a continued run end with the weights of one that
was never interrupted.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate

from fssdeploy.errors import CheckFailedError, FssError, InputError, MachineError
from fssdeploy.files import storage_error, write_atomic
from fssdeploy.training import checkpoint
from fssdeploy.training.recipe import Batch, Examples, Recipe
from fssdeploy.training.schedule import SCHEDULES, Place, locate

LOG = "log.jsonl"
SKIPPED = "skipped.jsonl"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Draws for one position before the data are given up.
ATTEMPTS = 20

# What a process that loads pictures sends: a batch, or the class and the arguments of an error.
Answer = Batch | tuple[type[FssError], tuple[str, ...]]
# Examples of this process that go through the network at once, and (position, attempt) of each.
Part = tuple[Batch, list[tuple[int, int]]]


@dataclass(frozen=True)
class Machine:
    """How the run is spread: this process' rank among `world`, its device, processes that load pictures."""

    rank: int
    world: int
    device: torch.device
    workers: int

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


@contextmanager
def machine(workers: int) -> Iterator[Machine]:
    """This process' part, as torchrun announced it; NCCL on GPUs, Gloo on CPUs."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Machine(rank, world, device, workers)
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Outcome:
    """What a run came to: steps and seconds of this process, pictures skipped since the beginning, the last figures."""

    steps: int
    seconds: float
    skipped: int
    last: dict[str, float]


@dataclass
class _Tally:
    """Losses summed since the last line of the log, pictures skipped since the beginning, the last line's figures."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    skipped: int = 0
    last: dict[str, float] = field(default_factory=dict)


@contextmanager
def _worker_deaths() -> Iterator[None]:
    """MachineError when a worker dies: PyTorch raises from a signal handler, wherever the run happens to be."""
    lost = (ConnectionResetError, ConnectionRefusedError, EOFError)
    try:
        try:
            yield
        except lost:  # a batch was to be fetched from a process that is gone; the signal comes any moment
            time.sleep(1)
            raise
    except (RuntimeError, *lost) as error:
        if isinstance(error, RuntimeError) and not re.search(r"DataLoader worker \(pid|ancillary data", str(error)):
            raise
        raise MachineError(
            "worker_died",
            "a process that loads pictures died",
            str(error).split("\n")[0],
            "The last checkpoint is whole: run the same command again, with fewer --workers.",
        ) from error


@_worker_deaths()
def run(
    recipe: Recipe,
    out: Path,
    on: Machine,
    progress: Callable[[str], None],
    *,
    log_every: int = 20,
    save_every: int = 200,
) -> Outcome:
    """Train to the end, from the checkpoint in `out` if there is one; `recipe.objective` holds the result.

    InputError for a batch that the processes cannot share, settings that differ from the checkpoint's or data that
    cannot be read; CheckFailedError when a loss or gradient is not finite (the examples are saved for replay);
    MachineError when a checkpoint cannot be written or a worker dies: the last checkpoint stays, the same call
    continues.
    """
    _check(recipe, on)
    total = sum(phase.steps for phase in recipe.phases)
    objective = recipe.objective.to(on.device).train()
    optimisers = recipe.optimisers()
    rates = [[group["lr"] for group in each.param_groups] for each in optimisers]
    average = _Average(objective, recipe.ema) if recipe.ema else None
    scaler = torch.amp.GradScaler(on.device.type, enabled=recipe.precision == "fp16")
    settings = {**recipe.settings(), "world_batch": [phase.batch for phase in recipe.phases]}
    start, tally = 0, _Tally()
    stored = checkpoint.load(out, settings)
    if stored:
        start, tally = stored["step"], _Tally(**stored.get("tally", {}))
        objective.load_state_dict(stored["model"])
        for optimiser, its_state in zip(optimisers, stored["optimisers"], strict=True):
            optimiser.load_state_dict(its_state)
        scaler.load_state_dict(stored["scaler"])
        if average:
            average.load(stored["average"])
        torch.set_rng_state(stored["rng"])
    else:
        torch.manual_seed(recipe.seed)
    log = _Log(out, start) if on.leads else None
    parallel: nn.Module = objective
    if on.world > 1:
        parallel = DistributedDataParallel(objective, find_unused_parameters=True)
    amp = PRECISIONS[recipe.precision]
    begun = window = time.perf_counter()
    window_examples, entered = 0, -1
    trained = [each for group in optimisers for part in group.param_groups for each in part["params"]]

    for step, place, parts in _batches(recipe, on, start, total):
        if place.phase != entered:
            recipe.enter(place.phase)
            entered = place.phase
        factor = _factor(recipe, step, total, place)
        for optimiser, base in zip(optimisers, rates, strict=True):
            for group, rate in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = rate * factor
            optimiser.zero_grad(set_to_none=True)
        values: dict[str, torch.Tensor] = {}
        for number, (loaded, _) in enumerate(parts):
            batch = {name: tensor.to(on.device, non_blocking=True) for name, tensor in loaded.items()}
            batch["step"] = torch.tensor(step)
            share = 1 / len(parts)
            waits = on.world > 1 and number < len(parts) - 1
            with parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with _attention(on), torch.autocast(on.device.type, amp or torch.bfloat16, enabled=amp is not None):
                    losses = parallel(batch)
                if not torch.isfinite(losses["loss"]):
                    _fail(recipe, out, on, step, [parts[number]], "loss", losses["loss"].detach())
                scaler.scale(losses["loss"] * share).backward()
            for name, value in losses.items():
                values[name] = values.get(name, 0) + value.detach().float() * share
        for optimiser in optimisers:
            scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        if not (torch.isfinite(norm) or scaler.is_enabled()):  # a scaler leaves such a step out by itself
            _fail(recipe, out, on, step, parts, "gradient", norm)
        for optimiser in optimisers:
            scaler.step(optimiser)
        scaler.update()
        if average:
            average.update(objective)

        skipped = [
            recipe.examples.describe(position, failed)
            for _, examples in parts
            for position, attempt in examples
            for failed in range(attempt)
        ]
        skipped = _over_processes(values, skipped, on)
        tally.skipped += len(skipped)
        if log and skipped:
            log.skip(step + 1, skipped)
            progress(f"{recipe.name} step {step + 1}: cannot be read, skipped: {'; '.join(skipped)}")
        for name, value in values.items():
            tally.sums[name] = tally.sums.get(name, 0.0) + float(value)
        tally.count += 1
        window_examples += len(place.positions)
        done = step + 1
        if log and (done % log_every == 0 or done == total):
            rate = window_examples / (time.perf_counter() - window)
            last = {name: value / tally.count for name, value in tally.sums.items()}
            tally = _Tally(skipped=tally.skipped, last=last)
            log.write({"step": done, **last, "rate": factor, "examples_per_second": rate, "skipped": tally.skipped})
            left = (time.perf_counter() - begun) / (done - start) * (total - done)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in last.items())
            progress(f"{recipe.name} step {done}/{total}: {shown}; {rate:.0f} examples/s; {_clock(left)} left")
            window, window_examples = time.perf_counter(), 0
        if on.leads and (done % save_every == 0 or done == total):
            state: dict[str, Any] = {
                "model": objective.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "scaler": scaler.state_dict(),
                "average": average.shadow if average else {},
                "tally": asdict(tally),
            }
            checkpoint.save(out, settings, done, state)
    if average:
        average.copy_to(objective)
    objective.eval()
    if log:
        log.close()
    return Outcome(total - start, time.perf_counter() - begun, tally.skipped, tally.last)


def _check(recipe: Recipe, on: Machine) -> None:
    for name, fits, allowed in (
        ("accumulate", recipe.accumulate >= 1, "at least 1"),
        ("clip", recipe.clip > 0, "above 0; inf for none"),
        ("ema", 0 <= recipe.ema < 1, "at least 0, which is none, and below 1"),
    ):
        if not fits:
            raise InputError("setting", f"{name} cannot be {getattr(recipe, name)}", "", f"It is {allowed}.")
    for phase in recipe.phases:
        if phase.batch % (on.world * recipe.accumulate):
            raise InputError(
                "batch",
                f"a batch of {phase.batch} cannot be shared",
                f"{on.world} process(es) accumulate {recipe.accumulate} part(s) each",
                "Make it a multiple of their product.",
            )
    if recipe.precision not in PRECISIONS:
        raise InputError("precision", f"precision '{recipe.precision}'", "", f"Choose from: {', '.join(PRECISIONS)}.")


def _attention(on: Machine) -> AbstractContextManager[None]:
    """On CPUs the plain form of attention: the backward pass of the fused one takes half of a whole step there."""
    return sdpa_kernel(SDPBackend.MATH) if on.device.type == "cpu" else nullcontext()


def _factor(recipe: Recipe, step: int, total: int, place: Place) -> float:
    schedule = SCHEDULES[recipe.schedule]
    if recipe.schedule_per_phase:
        return float(schedule(place.step / recipe.phases[place.phase].steps))
    return float(schedule(step / total))


class _Stream(Dataset[Answer]):
    """Maps the keys of a part, (position, size) each, to its batch; unreadable pictures are replaced by other draws."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, keys: list[tuple[int, int]]) -> Answer:
        try:
            return default_collate([self._example(*key) for key in keys])
        except FssError as error:  # DataLoader would hand on its text alone
            return type(error), (error.code, error.what, error.why, error.fix)

    def _example(self, position: int, size: int) -> Batch:
        for attempt in range(ATTEMPTS):
            try:
                example = self.examples.draw(position, attempt, size)
                return {**example, "attempt": torch.tensor(attempt), "position": torch.tensor(position)}
            except InputError as error:
                failure = error
        raise InputError(
            "data_unusable",
            f"{ATTEMPTS} draws in a row could not be read",
            f"the last: {failure.line()}",
            "Run: fssdeploy data check",
        )


def _batches(recipe: Recipe, on: Machine, start: int, total: int) -> Iterator[tuple[int, Place, list[Part]]]:
    """(step, place, parts) from `start` on; parts are this process' share of the step's examples, to be accumulated."""

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in range(start, total):
            place = locate(recipe.phases, step)
            for part in _shares(place.positions, on.rank, on.world, recipe.accumulate):
                yield [(position, place.size) for position in part]

    loader = DataLoader(
        _Stream(recipe.examples),
        batch_size=None,
        sampler=keys(),
        collate_fn=lambda answer: answer,
        num_workers=on.workers,
        multiprocessing_context="fork" if on.workers else None,
        generator=torch.Generator(),  # or it would draw from the run's random state
    )
    answers = iter(loader)
    for step in range(start, total):
        parts: list[Part] = []
        for _ in range(recipe.accumulate):
            answer: Answer = next(answers)
            if isinstance(answer, tuple):
                error, words = answer
                raise error(*words)
            examples = zip(answer.pop("position").tolist(), answer.pop("attempt").tolist(), strict=True)
            parts.append((answer, list(examples)))
        yield step, locate(recipe.phases, step), parts


def _shares(positions: range, rank: int, world: int, accumulate: int) -> list[range]:
    """The positions of one process, cut into parts; all processes together cover the step's."""
    mine = positions[rank * len(positions) // world : (rank + 1) * len(positions) // world]
    size = len(mine) // accumulate
    return [mine[index * size : (index + 1) * size] for index in range(accumulate)]


def _over_processes(values: dict[str, torch.Tensor], skipped: list[str], on: Machine) -> list[str]:
    """Turn `values` into means over the processes; everything that any of them skipped."""
    if on.world == 1:
        return skipped
    names = sorted(values)
    count = torch.tensor(float(len(skipped)), device=on.device)
    together = torch.stack([*(values[name] for name in names), count])
    torch.distributed.all_reduce(together)
    values.update(zip(names, together / on.world, strict=False))
    if not together[-1]:
        return []
    everywhere: list[list[str]] = [[] for _ in range(on.world)]
    torch.distributed.all_gather_object(everywhere, skipped)
    return [each for part in everywhere for each in part]


def _fail(
    recipe: Recipe, out: Path, on: Machine, step: int, parts: list[Part], what: str, value: torch.Tensor
) -> NoReturn:
    """Keep what is needed to compute the step again, then stop."""
    file = out / f"failed-step{step + 1}-rank{on.rank}.pt"
    batch = {name: torch.cat([each[name] for each, _ in parts]) for name in parts[0][0]}
    content = {
        "step": step + 1,
        "examples": [recipe.examples.describe(*each) for _, examples in parts for each in examples],
        "batch": {**batch, "step": torch.tensor(step)},
        "model": recipe.objective.state_dict(),
    }
    checkpoint.save_file(file, content)
    raise CheckFailedError(
        f"{what}_not_finite",
        f"the {what} of step {step + 1} is {float(value):g}",
        f"its examples, batch and weights are in '{file}'",
        "Lower the learning rate, or use --set precision=fp32.",
    )


class _Average:
    """Exponential moving average of the trained parameters, float32 on their device."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        named = network.named_parameters()
        self.shadow = {name: each.detach().clone().float() for name, each in named if each.requires_grad}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if name in self.shadow:
                self.shadow[name].lerp_(parameter.float(), 1 - self.decay)

    def load(self, shadow: dict[str, torch.Tensor]) -> None:
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])


class _Log:
    """One JSON line for every few steps, and TensorBoard where it is installed; what was skipped in a file of its own.

    Lines of steps that were lost with a kill are dropped.
    """

    def __init__(self, out: Path, start: int) -> None:
        self.out = out
        for name in (LOG, SKIPPED):
            kept = [line for line in read_log(out, name) if line["step"] <= start]
            if name == LOG or (out / name).exists():
                write_atomic(out / name, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start)

    def write(self, line: dict[str, float]) -> None:
        self._append(LOG, line)
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, int(line["step"]))

    def skip(self, step: int, examples: list[str]) -> None:
        self._append(SKIPPED, {"step": step, "examples": examples})

    def close(self) -> None:
        if self.board:
            self.board.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        try:
            with (self.out / name).open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise storage_error(error, self.out / name) from error


def read_log(out: Path, name: str = LOG) -> list[dict[str, Any]]:
    """The log of a run, without a line cut short by a kill."""
    file = out / name
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
