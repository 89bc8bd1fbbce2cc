"""The kernel benchmark: everything but the GPU itself runs here, on small problems, stand-ins and made-up figures."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fssdeploy.benchmarks import attention_rivals, device_timing, formulations, kernels, kernels_report, operation_cases
from fssdeploy.benchmarks.device_timing import Clock, Timing
from fssdeploy.benchmarks.kernel_worker import Worker
from fssdeploy.benchmarks.operation_cases import Case, Draw, Problem
from fssdeploy.benchmarks.operation_checks import check, distance
from fssdeploy.errors import InputError
from fssdeploy.kernels import dispatch, runtime, scma

# In half precision, and what runs in float32 alone.
CHECKS = [case for case in operation_cases.cases_to_check(tiny=True) if case.dtype == case.problem.dtypes[0]]
TIMES = [case for case in operation_cases.cases_to_time(tiny=True) if case.dtype == case.problem.dtypes[0]]


# --- The cases -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker("cpu", tiny=True)


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.key)
def test_every_operation_is_checked(case: Case, worker: Worker) -> None:
    found = worker.answer({"do": "check", "case": case.key})
    assert found["passed"], found
    errors = {name for form in found["forms"].values() for name in form["errors"]}
    assert ("gradient 0" in errors) == bool(case.problem.differentiable)


@pytest.mark.parametrize("case", TIMES, ids=lambda case: case.key)
def test_every_formulation_is_timed(case: Case, worker: Worker) -> None:
    row = worker.answer({"do": "time", "case": case.key, "seconds": 1.0})
    # Flash attention exists on GPUs alone, and so does CuPy.
    assert all("flash" in name or "efficient" in name or "CuPy" in name for name in row["failed"]), row["failed"]
    assert set(case.problem.calls) <= set(row["timings"])
    assert f"eager {case.dtype}" in row["timings"]
    assert set(row["counted"]) >= {f"eager {case.dtype}"}
    assert row["bytes"] > 0
    assert all(timing["median_us"] > 0 for timing in row["timings"].values())


def test_real_problems_cover_what_the_targets_speak_of() -> None:
    timed = operation_cases.cases_to_time(tiny=False)
    keys = [case.key for case in timed]
    assert len(set(keys)) == len(keys)
    first = timed[0].problem
    assert first.sizes.get("query", first.sizes.get("queries")) == kernels_report.LARGE
    for operation in ("masked_max", "mutual_argmax", "calibrated_attention"):
        sizes = {
            case.problem.sizes.get("query", case.problem.sizes.get("queries"))
            for case in timed
            if case.problem.operation == operation and case.dtype == "float16"
        }
        assert sizes >= ({1024, 1369, 4096})
    training = {case.problem.operation for case in timed if case.training}
    assert training == {"calibrated_attention", "correlation_projection"}
    # Every operation with a kernel meets sizes that fill no tile.
    awkward = {problem.operation for problem in operation_cases.problems() if problem.priority is None}
    assert awkward >= {problem.operation for problem in operation_cases.problems() if problem.has_kernel}


def test_rivals_compute_calibrated_attention() -> None:
    case = next(case for case in TIMES if case.problem.operation == "calibrated_attention" and not case.training)
    query, keys, values, calibration = case.problem.inputs(Draw("cpu", 3))
    start = query.shape[1]
    wanted = scma.reference_attention(query, keys, values, calibration, start, 10.0, "row", query.shape[2] ** -0.5)[0]
    for rival in (attention_rivals.with_flex_attention, attention_rivals.with_materialised_bias):
        found = rival(query, keys, values, calibration, start=start, strength=10.0)
        assert distance(found, wanted.double())[0] < 1e-5
    plain = attention_rivals.plain_attention(
        torch.nn.attention.SDPBackend.MATH, query, keys, values, torch.ones_like(calibration)
    )
    uncalibrated = scma.reference_attention(
        query, keys, values, calibration, start, 0.0, "row", query.shape[2] ** -0.5
    )[0]
    assert distance(plain, uncalibrated.double())[0] < 1e-5
    widened = attention_rivals.wide_values(query, keys, values[..., :8], calibration)[2]
    assert widened.shape[-1] == query.shape[-1]
    assert not widened[..., 8:].any()


# --- Checks find what is wrong ---------------------------------------------------------------------------------------


def _doubling(call: Any, **changes: Any) -> Problem:
    problem = Problem(
        "unit_rows",
        {"rows": 3},
        lambda draw: (draw.normal(3, 5),),
        {"ours": call},
        lambda rows: rows * 2,
        flops=1.0,
        differentiable=(0,),
        has_kernel=False,
    )
    return replace(problem, **changes)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2.1


def test_a_right_operation_passes() -> None:
    found = check(_doubling(lambda rows: rows * 2), "float32", "cpu")
    assert found["passed"]
    assert found["forms"]["ours"]["errors"]["gradient 0"]["relative"] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_error_beyond_the_dtype_is_found(dtype: str) -> None:
    assert not check(_doubling(lambda rows: rows * 2.1), dtype, "cpu")["passed"]
    errors = check(_doubling(_WrongGradient.apply), dtype, "cpu")["forms"]["ours"]["errors"]
    assert errors["output 0"]["passed"]
    assert not errors["gradient 0"]["passed"]


def test_one_wrong_element_is_found() -> None:
    def wrong(rows: torch.Tensor) -> torch.Tensor:
        doubled = rows * 2
        bump = torch.zeros_like(doubled)
        bump[0, 0] = 1e-3
        return doubled + bump

    problem = _doubling(wrong, inputs=lambda draw: (draw.normal(400, 400),))
    error = check(problem, "float32", "cpu")["forms"]["ours"]["errors"]["output 0"]
    assert error["relative"] < error["limits"][0]  # one element hardly moves the norm
    assert not error["passed"]


def test_an_element_that_nobody_wrote_is_found() -> None:
    def unwritten(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        out[1:] = (rows * 2)[1:]
        return out

    assert not check(_doubling(unwritten, differentiable=()), "float32", "cpu")["passed"]


def test_runs_that_differ_are_found() -> None:
    turns = iter(range(100))
    found = check(_doubling(lambda rows: rows * 2 + 1e-7 * next(turns)), "float32", "cpu")
    assert not found["forms"]["ours"]["repeatable"]
    assert not found["passed"]


def test_a_kernel_that_did_not_run_is_found() -> None:
    def asks(rows: torch.Tensor) -> torch.Tensor:
        with pytest.warns(dispatch.KernelWarning):
            dispatch._warn_once.cache_clear()
            return dispatch.run("unit_rows", rows, {}, lambda: rows * 2, lambda: rows * 2)

    found = check(_doubling(asks, has_kernel=True), "float32", "cpu")
    assert found["forms"]["ours"]["hindered"] == runtime.obstacle(torch.device("cpu"))
    assert not found["passed"]


def test_a_bad_choice_is_found() -> None:
    case = next(case for case in CHECKS if case.problem.operation == "masked_max")
    inputs = case.problem.inputs(Draw("cpu", 1))
    values, indices = case.problem.plain(*inputs)
    assert case.problem.exact_choice
    exact = [tensor.double() for tensor in inputs]
    call, regret = case.problem.exact_choice(exact, (values, indices))
    assert regret < 1e-6
    assert distance(call(*exact)[0], values.double())[0] < 1e-6
    assert case.problem.exact_choice(exact, (values, indices.roll(1, -1)))[1] > 1e-2


def test_distance() -> None:
    infinite = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert distance(infinite, infinite) == (0.0, 0.0)
    assert distance(torch.tensor([1.0, 2.0]), infinite)[0] != 0
    assert distance(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0], dtype=torch.float64)) == pytest.approx(
        (0.2, 1 / 12.5**0.5)
    )
    assert not distance(torch.tensor([torch.nan]), torch.ones(1, dtype=torch.float64))[0] <= 1


# --- Timing ----------------------------------------------------------------------------------------------------------


class FakeCuda:
    """As much of torch.cuda as a run uses: calls during a capture are kept and made again by every replay."""

    def __init__(self) -> None:
        self.now, self.replays, self.capturing = 0.0, 0, False
        self.properties = SimpleNamespace(name="fake", L2_cache_size=1 << 20)

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    def CUDAGraph(self) -> Any:  # noqa: N802
        def replay() -> None:
            self.replays += 1
            self.now += 0.1  # ms

        return SimpleNamespace(replay=replay)

    @contextmanager
    def graph(self, graph: Any) -> Any:
        self.capturing = True
        yield
        self.capturing = False

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    @contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    def current_stream(self) -> Any:
        return self.Stream()

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> Any:
        return self.properties

    def memory_allocated(self) -> int:
        return 1 << 20

    def max_memory_allocated(self) -> int:
        return 3 << 20

    def reset_peak_memory_stats(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in (name for name in dir(fake) if not name.startswith("_") and name not in ("now", "replays")):
        if hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_run_on_a_gpu(cuda: FakeCuda) -> None:
    seen: list[tuple[int, bool]] = []
    device = device_timing.Gpu()
    assert (device.name, device.cache_bytes) == ("fake", 1 << 20)

    def call(number: int) -> None:
        seen.append((number, cuda.capturing))
        if not cuda.capturing:
            cuda.now += 0.5

    run = device.prepare(call, [(1,), (2,)])
    assert [number for number, captured in seen if captured] == [1, 2]  # every set once
    assert not any(captured for _, captured in seen[: device_timing.WARM_UP])
    assert run.seconds() == pytest.approx(0.1e-3 / 2)
    before = cuda.replays
    run.seconds()
    assert (cuda.replays - before) * 0.1e-3 >= device_timing.SAMPLE_SECONDS * 0.999
    assert (run.graph, run.peak_mib) == (True, 2)
    loose = device.prepare(call, [(1,), (2,)], graph=False)
    assert not loose.graph
    assert loose.seconds() == pytest.approx(0.5e-3)


def test_inputs_rotate_beyond_the_cache() -> None:
    assert device_timing.set_count(10 << 20, 60 << 20) == 18
    assert device_timing.set_count(1, 60 << 20) == device_timing.MOST_SETS
    assert device_timing.set_count(1 << 40, 60 << 20) == 2


def test_contestants_take_turns() -> None:
    order: list[str] = []

    class Steps:
        graph, peak_mib = True, None

        def __init__(self, name: str, seconds: list[float]) -> None:
            self.name, self.left = name, iter(seconds)

        def seconds(self) -> float:
            order.append(self.name)
            return next(self.left)

    timings = device_timing.in_turns({"a": Steps("a", [1, 5, 2, 3, 4]), "b": Steps("b", [1] * 5)}, 5)
    assert order[:4] == ["a", "b", "b", "a"]
    assert timings["a"] == Timing(3e6, 2e6, 4e6, 5, True)
    # Late already: one round all the same.
    late = device_timing.in_turns({"a": Steps("a", [1, 1])}, 2, until=time.monotonic() - 1)
    assert late["a"].rounds == 1


def test_ceilings_on_the_clock() -> None:
    found = device_timing.ceilings(Clock(), side=64, copy_bytes=1 << 16, rounds=2)
    assert set(found["matrix_tflops"]) == {"float16", "bfloat16", "float32"}
    assert found["copy_gbs"] > 0


def test_a_call_that_cannot_be_captured_is_timed_without_a_graph() -> None:
    class Uncapturable(Clock):
        def prepare(self, call: Any, sets: Any, *, graph: bool = True) -> Any:
            if graph:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().prepare(call, sets)

    case = Case(_doubling(lambda rows: rows * 2), "float32")
    row = formulations.time_case(case, Uncapturable(), backend="eager", rounds=1)
    assert row["failed"] == {}
    assert not row["timings"]["ours"]["graph"]


def test_a_formulation_that_fails_is_named_and_the_others_are_timed() -> None:
    def fails(rows: torch.Tensor) -> torch.Tensor:
        raise ValueError("of no use")

    row = formulations.time_case(Case(_doubling(fails), "float32"), Clock(), backend="eager", rounds=1)
    assert row["failed"] == {"ours": "ValueError: of no use"}
    assert {"eager float32", "compiled"} <= set(row["timings"])


# --- The whole program -----------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 4
    said = capsys.readouterr().err.strip()
    assert "no NVIDIA GPU" in said
    assert "\n" not in said
    with pytest.raises(InputError, match="too few"):
        kernels.measure("cpu", limit=1)


def test_the_program_on_small_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "QUICK_CASES", 3)
    out, chosen = tmp_path / "results" / "kernels.json", tmp_path / "measured.json"
    chosen.write_text(json.dumps({"another GPU": {}}))
    options = ["--device", "cpu", "--tiny", "--quick", "--checkers", "1", "--limit", "900"]
    assert kernels.main([*options, "--out", str(out), "--update-table", str(chosen)]) == 0
    result = json.loads(out.read_text())
    assert result["unfinished"] == []
    assert {row["operation"] for row in result["checks"]} == {case.problem.operation for case in CHECKS}
    assert len(result["rows"]) == kernels.QUICK_CASES
    assert result["ceilings"]["copy_gbs"] > 0
    assert result["ceilings_after"]["copy_gbs"] > 0
    timing = result["rows"][0]["timings"]["ours"]
    assert timing["of_matrix"] == pytest.approx(timing["tflops"] / result["ceilings"]["matrix_tflops"]["float16"])
    assert json.loads(chosen.read_text()) == {"another GPU": {}, "cpu": {}}  # no kernel ran on this device
    assert "checks against float64" in capsys.readouterr().out


class FakeWorker:
    """Answers at once; a time takes what `seconds` says, on a clock of its own."""

    now = 0.0
    seconds = 0.0
    answers: dict[str, dict[str, Any]] = {}

    def __init__(self, device: str, tiny: bool) -> None:
        pass

    def ask(self, command: dict[str, Any], seconds: float) -> dict[str, Any]:
        FakeWorker.now += self.seconds
        return self.answers.get(command["do"], {"error": "it broke"})

    def close(self) -> None: ...


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(FakeWorker, "now", 0.0)
    monkeypatch.setattr(kernels, "WorkerProcess", FakeWorker)
    monkeypatch.setattr(kernels.time, "monotonic", lambda: FakeWorker.now)
    return FakeWorker


def test_it_stops_in_time(fake_worker: type[FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "seconds", 3.0)
    monkeypatch.setattr(FakeWorker, "answers", {"check": {"passed": True, "forms": {}}, "compile": {}})
    result = kernels.measure("cpu", limit=100, checkers=1)
    assert FakeWorker.now <= 100
    assert 0 < len(result["checks"]) <= 45 / 3 + 1
    assert 0 < len(result["rows"]) < len(operation_cases.cases_to_time(tiny=False))
    left = {do: sum(job["do"] == do for job in result["unfinished"]) for do in ("check", "time")}
    assert left["check"] + len(result["checks"]) == len(operation_cases.cases_to_check(tiny=False))
    assert left["time"] + len(result["rows"]) == len(operation_cases.cases_to_time(tiny=False))
    assert "no time was left" in kernels_report.report(result).text()


def test_a_check_that_we_cut_short_did_not_fail(fake_worker: type[FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "answers", {"check": {"error": "no answer", "expired": True}})
    hurried = kernels.measure("cpu", limit=kernels.CHECK_SECONDS, tiny=True, quick=True, checkers=1)
    assert hurried["checks"] == []
    assert len([job for job in hurried["unfinished"] if job["do"] == "check"]) == len(CHECKS)
    patient = kernels.measure("cpu", limit=10 * kernels.CHECK_SECONDS, tiny=True, quick=True, checkers=1)
    assert [row["passed"] for row in patient["checks"]] == [False] * len(CHECKS)


def test_whatever_breaks_is_written_down(
    fake_worker: type[FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    assert kernels.main(["--device", "cpu", "--tiny", "--quick", "--out", str(out)]) == 2
    result = json.loads(out.read_text())
    assert not any(row["passed"] for row in result["checks"])
    assert all(row["error"] == "it broke" for row in (*result["checks"], *result["rows"]))
    said = capsys.readouterr()
    assert "FAILED CHECK" in said.out
    assert "kernels_wrong" in said.err


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A worker that does as it is told: echo, print noise, die or hang."""
    (tmp_path / "stand_in.py").write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    do = json.loads(line)['do']\n"
        "    if do == 'die': print('illegal address', file=sys.stderr, flush=True); os._exit(7)\n"
        "    if do == 'hang': time.sleep(60)\n"
        "    print(json.dumps({'did': do, 'pid': os.getpid()}), flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in"


def test_a_worker_that_dies_or_hangs_is_replaced(stand_in: str) -> None:
    worker = kernels.WorkerProcess("cpu", True, stand_in)
    try:
        first = worker.ask({"do": "echo"}, 30)
        assert first["did"] == "echo"
        died = worker.ask({"do": "die"}, 30)["error"]
        assert "7" in died
        assert "illegal address" in died
        second = worker.ask({"do": "echo"}, 30)
        assert second["pid"] != first["pid"]
        assert "no answer within" in worker.ask({"do": "hang"}, 0.2)["error"]
        assert worker.ask({"do": "echo"}, 30)["pid"] != second["pid"]
    finally:
        worker.close()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_run_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = next(case for case in CHECKS if case.problem.operation == "masked_max")
    worker = kernels.WorkerProcess("cpu", True)
    try:
        found = worker.ask({"do": "check", "case": case.key}, 300)
        assert found["passed"], found
        assert found["forms"]["ours"]["hindered"] is None
        row = worker.ask({"do": "time", "case": case.key, "seconds": 1.0}, 300)
        assert [entry["took"] for entry in row["dispatched"]["ours"]] == ["triton"]
    finally:
        worker.close()


# --- Figures ---------------------------------------------------------------------------------------------------------


def _row(operation: str, sizes: dict[str, int], micros: dict[str, float], **changes: Any) -> dict[str, Any]:
    forms = [name for name in micros if name in ("ours", "rows", "flash")]
    entry = {"operation": operation, "dtype": "float16", "sizes": sizes, "took": "triton"}
    asked = {form: [dict(entry)] for form in forms}
    return {
        "case": f"{operation} {sizes}",
        "operation": operation,
        "sizes": sizes,
        "variant": "",
        "dtype": "float16",
        "training": False,
        "has_kernel": True,
        "flops": 1e9,
        "bytes": 1e6,
        "failed": {},
        "counted": ["eager float16", "compiled"],
        "dispatched": asked,
        "timings": {
            name: {"median_us": value, "low_us": value, "high_us": value, "rounds": 1, "graph": True, "peak_mib": 1.0}
            for name, value in micros.items()
        },
    } | changes


def _result(rows: list[dict[str, Any]], checks: list[dict[str, Any]]) -> dict[str, Any]:
    ceilings = {"matrix_tflops": {"float16": 100.0}, "copy_gbs": 1000.0}
    return {"rows": rows, "checks": checks, "ceilings": ceilings, "gpu": {"name": "a GPU"}}


def test_targets() -> None:
    large = {"query": 4096, "channels": 768}
    attention = {"queries": 4096}
    rows = [
        _row("masked_max", large, {"ours": 15.0, "eager float16": 100.0}),  # 66.7 of 100 TFLOP/s
        _row("masked_max", {"query": 1024}, {"ours": 15.0}),  # no target
        _row("mutual_argmax", large, {"ours": 20.0}),  # 50 of 100
        _row("calibrated_attention", attention, {"flash": 17.0, "eager float16": 40.0, kernels_report.FLASH: 10.0}),
        _row("calibrated_attention", attention, {"flash": 10.0, "eager float16": 40.0}),
        _row("mutual_argmax", large, {}, timings={}),
    ]
    found = kernels_report.enrich(_result(rows, []))["targets"]
    assert [(target["reached"], target["met"]) for target in found] == [
        (pytest.approx(2 / 3), True),
        (pytest.approx(0.5), False),
        (pytest.approx(1.7), False),
        (pytest.approx(40 / 17), False),
        (None, None),
        (pytest.approx(4.0), True),
        (None, None),
    ]


def test_the_table_that_the_dispatcher_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"query": 4096, "support": 4096, "channels": 768}
    keys = {"queries": 1024, "keys": 2056}
    forward = _row("calibrated_attention", keys, {"rows": 8.0, "flash": 20.0, "eager float16": 30.0, "compiled": 12.0})
    forward["dispatched"]["rows"][0]["operation"] = "calibrated_attention_rows"
    training = _row(
        "calibrated_attention", keys, {"flash": 70.0, "eager float16": 90.0, "compiled": 40.0}, training=True
    )
    training["case"] = forward["case"] + " training"
    asked = training["dispatched"]["flash"]
    asked.append(asked[0] | {"operation": "calibrated_attention_backward"})
    micros = {"ours": 50.0, "eager float16": 90.0, "compiled": 70.0, "eager float32": 10.0}
    rows = [
        _row("masked_max", sizes, micros),
        _row("unit_rows", sizes, {"ours": 1.0, "compiled": 2.0}),
        forward,
        training,
    ]
    checks = [
        {"operation": "masked_max", "dtype": "float16", "passed": True},
        {"operation": "calibrated_attention", "dtype": "float16", "passed": True},
        {"operation": "unit_rows", "dtype": "float16", "passed": True},
        {"operation": "unit_rows", "dtype": "float16", "passed": False},
    ]
    path = tmp_path / "measured.json"
    assert kernels.update_table(_result(rows, checks), path) == 4
    written = json.loads(path.read_text())["a GPU"]
    assert {name: [(row["triton_us"], row["reference_us"]) for row in rows] for name, rows in written.items()} == {
        "calibrated_attention": [(20.0, 12.0)],
        "calibrated_attention_backward": [(50.0, 28.0)],
        "calibrated_attention_rows": [(8.0, 12.0)],
        "masked_max": [(50.0, 70.0)],
    }
    monkeypatch.setattr(dispatch, "TABLE", path)
    dispatch._table.cache_clear()
    try:
        near = {name: extent + 16 for name, extent in sizes.items()}
        assert dispatch._faster("masked_max", "a GPU", torch.float16, near).implementation == "triton"
        assert dispatch._faster("calibrated_attention", "a GPU", torch.float16, keys).implementation == "reference"
        assert dispatch._faster("unit_rows", "a GPU", torch.float16, sizes).implementation == "reference"
    finally:
        dispatch._table.cache_clear()


def test_a_check_leaves_no_trace() -> None:
    before = dict(os.environ)
    check(_doubling(lambda rows: rows * 2), "float32", "cpu")
    assert dict(os.environ) == before
    assert not torch.are_deterministic_algorithms_enabled()
