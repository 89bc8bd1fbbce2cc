"""The kernels on a GPU: right or wrong, then how fast, in one call of a few minutes.

    python -m fssdeploy.benchmarks.kernels [--out FILE] [--quick] [--limit SECONDS] [--update-table [FILE]]

Several processes check all cases at once and fill the compilers' caches; then one process alone on the device measures
its ceilings and times the cases, the most important first. What breaks or hangs is recorded and the rest goes on; when
the time is up, what there is is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fssdeploy.benchmarks.kernels_report import enrich, report, table
from fssdeploy.benchmarks.operation_cases import Case, cases_to_check, cases_to_time
from fssdeploy.errors import CheckFailedError, FssError, InputError, MachineError
from fssdeploy.files import made_folder, write_atomic
from fssdeploy.kernels import dispatch, runtime

WORKER = "fssdeploy.benchmarks.kernel_worker"
LIMIT_SECONDS = 420.0
QUICK_SECONDS = 150.0
# Checking and compiling may take this part of the time; timing must be alone on the device and comes after.
CHECKING_SHARE = 0.45
# Kept for ending politely: the case that is just being timed, the closing ceilings, the file.
CLOSING_SECONDS = 20.0
CHECKERS = 6
# One command; a kernel that hangs is killed with its process.
CHECK_SECONDS, COMPILE_SECONDS, TIME_SECONDS = 90.0, 60.0, 60.0
ROUNDS_SECONDS = 6.0
QUICK_CASES = 8
# Of the printed tables, whose first column is long.
TEXT_WIDTH = 200

Progress = Callable[[str], None]


class WorkerProcess:
    """A worker that is started when first asked, and again after it has died."""

    def __init__(self, device: str, tiny: bool, module: str = WORKER) -> None:
        self.command = [sys.executable, "-m", module, device, *(["--tiny"] if tiny else [])]
        self.process: subprocess.Popen[str] | None = None
        self.noise = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as this object)

    def ask(self, command: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer; {"error": why} where the worker says so, dies, or takes longer than `seconds`."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.noise,
                text=True,
                env={"TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ},  # each process would start one per core
            )
        process = self.process
        assert process.stdin and process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            expired = not timer.is_alive()
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        process.wait()
        if expired:
            return {"error": f"no answer within {seconds:.0f} s", "expired": True}
        return {"error": f"the process ended with {process.returncode}: {self._last_words()}"}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.noise.close()

    def _last_words(self) -> str:
        self.noise.seek(0)
        lines = [line.strip() for line in self.noise if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


def measure(
    device: str = "cuda",
    *,
    limit: float = LIMIT_SECONDS,
    quick: bool = False,
    tiny: bool = False,
    checkers: int = CHECKERS,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Everything a result file holds, within about `limit` seconds.

    `quick` leaves out most cases. `tiny` problems and the device "cpu" are for tests of this program. InputError for a
    limit in which nothing can be measured, MachineError where there is no NVIDIA GPU that kernels run on.
    """
    if limit <= CLOSING_SECONDS:
        what = f"{limit:g} seconds are too few"
        raise InputError("bench_usage", what, "", f"Give --limit more than {CLOSING_SECONDS:g}.")
    require_gpu(device)
    start = time.monotonic()
    to_check, to_time = _chosen(cases_to_check(tiny), cases_to_time(tiny), quick)
    checks, unfinished = _check_all(device, tiny, to_check, to_time, checkers, start, limit, progress)
    worker = WorkerProcess(device, tiny)
    rows: list[dict[str, Any]] = []
    try:
        progress("measuring the ceilings")
        before = worker.ask({"do": "ceilings"}, TIME_SECONDS)
        for index, case in enumerate(to_time):
            left = start + limit - CLOSING_SECONDS - time.monotonic()
            if left <= 0:
                unfinished += [{"do": "time", "case": later.key} for later in to_time[index:]]
                break
            progress(f"timing {index + 1} of {len(to_time)}: {case.key}")
            seconds = min(ROUNDS_SECONDS, left)
            patience = min(TIME_SECONDS, left + CLOSING_SECONDS / 2)
            answer = worker.ask({"do": "time", "case": case.key, "seconds": seconds}, patience)
            rows.append(_identity(case) | answer)
        after = worker.ask({"do": "ceilings"}, CLOSING_SECONDS)
    finally:
        worker.close()
    result = {
        "what": "kernels on a GPU: errors against float64, times under CUDA graphs",
        "command": f"python -m fssdeploy.benchmarks.kernels{' --quick' if quick else ''} --limit {limit:g}",
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpu": describe_gpu(device),
        "versions": versions(),
        "seconds": time.monotonic() - start,
        "ceilings": before,
        "ceilings_after": after,
        "checks": checks,
        "rows": rows,
        "unfinished": unfinished,
    }
    return enrich(result)


def require_gpu(device: str) -> None:
    """MachineError (no_gpu) unless `device` is there and kernels can run on it."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        why = "this is a PyTorch without CUDA" if torch.version.cuda is None else "PyTorch sees none"
        fix = "Run it on a machine with an NVIDIA GPU and a CUDA build of PyTorch."
        raise MachineError("no_gpu", "there is no NVIDIA GPU to measure", why, fix)
    hindrance = runtime.obstacle(torch.device("cuda", torch.cuda.current_device()))
    if hindrance:
        raise MachineError("no_gpu", "kernels cannot run on this GPU", hindrance, "")


def describe_gpu(device: str) -> dict[str, Any]:
    """Name, multiprocessors, cache and memory."""
    if device == "cpu":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cache_mib": properties.L2_cache_size / 2**20,
        "memory_gib": properties.total_memory / 2**30,
    }


def versions() -> dict[str, str | None]:
    """Of what the times depend on."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": runtime.triton.__version__ if runtime.triton else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def update_table(result: dict[str, Any], path: Path) -> int:
    """Write what was measured for the dispatcher, beside what it holds of other devices; the number of measurements."""
    known = json.loads(path.read_text()) if path.exists() else {}
    measured = table(result)
    known[result["gpu"]["name"]] = measured
    write_atomic(path, (json.dumps(known, indent=1) + "\n").encode())
    return sum(map(len, measured.values()))


def _chosen(to_check: list[Case], to_time: list[Case], quick: bool) -> tuple[list[Case], list[Case]]:
    if not quick:
        return to_check, to_time
    return [case for case in to_check if case.dtype == case.problem.dtypes[0]], to_time[:QUICK_CASES]


def _identity(case: Case) -> dict[str, Any]:
    problem = case.problem
    return {
        "case": case.key,
        "operation": problem.operation,
        "sizes": dict(problem.sizes),
        "variant": problem.variant,
        "dtype": case.dtype,
        "training": case.training,
        "has_kernel": problem.has_kernel,
    }


def _check_all(
    device: str,
    tiny: bool,
    to_check: Sequence[Case],
    to_time: Sequence[Case],
    checkers: int,
    start: float,
    limit: float,
    progress: Progress,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Check all cases and compile what will be timed, in several processes; the checks, and what was not reached."""
    jobs: queue.SimpleQueue[tuple[str, Case]] = queue.SimpleQueue()
    for case in to_check:
        jobs.put(("check", case))
    for case in to_time:
        jobs.put(("compile", case))
    seconds = {"check": CHECK_SECONDS, "compile": COMPILE_SECONDS}
    checks: list[dict[str, Any]] = []
    unfinished: list[dict[str, str]] = []

    def work() -> None:
        worker = WorkerProcess(device, tiny)
        try:
            while True:
                try:
                    do, case = jobs.get_nowait()
                except queue.Empty:
                    return
                left = start + CHECKING_SHARE * limit - time.monotonic()
                if left <= 0:
                    unfinished.append({"do": do, "case": case.key})
                    continue
                progress(f"{do}ing {case.key}")
                answer = worker.ask({"do": do, "case": case.key}, min(seconds[do], left))
                if answer.get("expired") and left < seconds[do]:  # our own haste, no fault of the case
                    unfinished.append({"do": do, "case": case.key})
                elif do == "check":
                    checks.append(_identity(case) | {"passed": False} | answer)
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(checkers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {case.key: index for index, case in enumerate(to_check)}
    return sorted(checks, key=lambda row: order[row["case"]]), unfinished


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"), help="the result (JSON)")
    parser.add_argument("--quick", action="store_true", help="a few cases only, to see that it works")
    parser.add_argument("--limit", type=float, help=f"seconds ({LIMIT_SECONDS:g}; quick: {QUICK_SECONDS:g})")
    parser.add_argument(
        "--update-table",
        type=Path,
        nargs="?",
        const=dispatch.TABLE,
        metavar="FILE",
        help="write what FSSDEPLOY_KERNELS=auto goes by (default FILE: the package's own)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkers", type=int, default=CHECKERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except FssError as error:
        print(f"error [{error.code}]: {error.line()}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    limit = options.limit if options.limit is not None else QUICK_SECONDS if options.quick else LIMIT_SECONDS
    result = measure(
        options.device,
        limit=limit,
        quick=options.quick,
        tiny=options.tiny,
        checkers=options.checkers,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    shown = report(result)
    with made_folder(options.out.parent):
        write_atomic(options.out, (shown.json() + "\n").encode())
    print(shown.text(TEXT_WIDTH))
    print(f"written to {options.out}")
    if options.update_table:
        count = update_table(result, options.update_table)
        print(f"{count} measurements of {result['gpu']['name']} written to {options.update_table}")
    wrong = [row["case"] for row in result["checks"] if not row["passed"]]
    if wrong:
        what = f"{len(wrong)} of {len(result['checks'])} checks failed"
        raise CheckFailedError("kernels_wrong", what, f"the first is {wrong[0]}", f"See {options.out}.")


if __name__ == "__main__":
    sys.exit(main())
