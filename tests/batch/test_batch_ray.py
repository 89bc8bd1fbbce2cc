"""The adapter to Ray Data, against a stand-in that implements the calls it makes. Real Ray was never run here."""

from __future__ import annotations

import multiprocessing.reduction
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fssdeploy.batch.plan import Plan
from fssdeploy.batch.ray_backend import RayWorker, process_on_ray
from fssdeploy.batch.run import run_batch
from fssdeploy.errors import MachineError
from tests.batch.jobs import Notes, attempts, means, plan_of, states

ON_RAY = means(process_on_ray)


@dataclass
class FakeRay:
    """One actor in this process; what it was asked for, and an error to end with."""

    init: dict[str, Any] | None = None
    mapped: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    breaks: Exception | None = None

    def start(self, **options: Any) -> None:
        self.init = options

    def from_items(self, items: list[dict[str, Any]]) -> FakeRay:
        self.rows = items
        return self

    def map_batches(self, actor: Callable[..., Any], **options: Any) -> FakeRay:
        assert actor is RayWorker
        self.mapped = options
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        # As for an actor elsewhere, which gets a copy.
        (setup,) = self.mapped["fn_constructor_args"]
        assert multiprocessing.reduction.ForkingPickler.dumps(setup)
        worker, size = RayWorker(setup), self.mapped["batch_size"]
        for start in range(0, len(self.rows), size):
            chunk = self.rows[start : start + size]
            self.batches.append(len(chunk))
            answers = worker({"item": np.array([row["item"] for row in chunk])})
            for answer in answers["answer"]:
                yield {"answer": answer}
            if self.breaks:
                raise self.breaks


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    package, data = ModuleType("ray"), ModuleType("ray.data")
    names: dict[str, Any] = {"is_initialized": lambda: fake.init is not None, "init": fake.start, "data": data}
    context = SimpleNamespace(get_current=lambda: SimpleNamespace(enable_progress_bars=True))
    pools: dict[str, Any] = {"DataContext": context, "ActorPoolStrategy": lambda size: ("actors", size)}
    vars(package).update(names)
    vars(data).update(pools, from_items=fake.from_items)
    monkeypatch.setitem(sys.modules, "ray", package)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    return fake


def test_the_same_worker_does_the_items(tmp_path: Path, ray: FakeRay) -> None:
    names = [*"abcdefghi", os.fsdecode(b"\xff")]
    plan = Plan("notes", {}, [{"index": index, "input": name} for index, name in enumerate(names)])
    job = Notes(tmp_path, {"d": "unreadable"})
    plain = Plan("notes", {}, plan.items[:-1])
    outcome = run_batch(plain, job, tmp_path, ON_RAY)
    assert outcome.complete and outcome.finished == 9
    assert states(tmp_path) == {name: "failed" if name == "d" else "done" for name in names[:-1]}
    assert ray.batches == [4, 4, 1] and len(attempts(tmp_path)) == 9
    assert ray.mapped["compute"] == ("actors", 2) and ray.mapped["num_cpus"] == 1
    assert ray.mapped["max_task_retries"] == 1
    assert ray.init == {"include_dashboard": False, "log_to_driver": False, "logging_level": 40}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_later_run_continues_on_ray_or_without(tmp_path: Path, ray: FakeRay) -> None:
    ray.breaks = RuntimeError("an actor died\nand more")
    with pytest.raises(MachineError, match="RuntimeError: an actor died") as caught:
        run_batch(plan_of("abcdef"), Notes(tmp_path), tmp_path, ON_RAY)
    assert caught.value.code == "ray_failed" and "and more" not in str(caught.value)
    assert list(states(tmp_path).values()) == ["done"] * 4 + ["missing"] * 2
    ray.breaks = None
    assert run_batch(plan_of("abcdef"), Notes(tmp_path), tmp_path, ON_RAY).complete
    assert {name: len(by) for name, by in attempts(tmp_path).items()} == dict.fromkeys("abcdef", 1)


def test_errors_of_workers_arrive_as_they_are(tmp_path: Path, ray: FakeRay) -> None:
    for acts in ({"open": "refuse"}, {"b": "refuse"}):
        with pytest.raises(Exception, match="there is no space") as caught:
            run_batch(plan_of("ab"), Notes(tmp_path, acts), tmp_path, ON_RAY)
        assert (caught.value.code, caught.value.exit_code) == ("no_space", 4)  # type: ignore[attr-defined]


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError) as caught:
        run_batch(plan_of("ab"), Notes(tmp_path), tmp_path, ON_RAY)
    assert caught.value.code == "package_missing" and "pip install 'fssdeploy[batch]'" in caught.value.fix
