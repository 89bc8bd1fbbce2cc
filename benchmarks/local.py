"""The enrolled path without a server: processes that each hold a deployment and ask it one thing after another.

Run as a program it is one of these processes: commands on standard input, answers on standard output, JSON lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fssdeploy.benchmarks.perf_analyzer import Load
from fssdeploy.errors import MachineError


class Pool:
    """`workers` processes with `threads` threads each, on the same artifact and bank."""

    def __init__(self, artifact: Path, bank: Path, workers: int, threads: int) -> None:
        command = [sys.executable, "-m", "fssdeploy.benchmarks.local", str(artifact), str(bank), str(threads)]
        self.cpu = 0.0  # seconds used by all runs
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(workers)
        ]

    def run(self, picture: Path, name: str, requests: int) -> Load:
        """Look for a class in a picture `requests` times in all; every worker has one request under way.

        Raises MachineError ``benchmark_worker``.
        """
        self._ask(picture, name, 0)
        answers = self._ask(picture, name, -(-requests // len(self._processes)))
        times = np.array([seconds for answer in answers for seconds in answer["seconds"]]) * 1e3
        wall = max(answer["end"] for answer in answers) - min(answer["start"] for answer in answers)
        p50, p90, p95, p99 = percentiles(times)
        return Load(len(answers), len(times) / wall, p50, p90, p95, p99, 0.0, float(times.mean()))

    def _ask(self, picture: Path, name: str, requests: int) -> list[dict[str, Any]]:
        """Have every worker send so many requests, all at once; none means one that is not counted."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps({"picture": str(picture), "name": name, "requests": requests}) + "\n")
            process.stdin.flush()
        answers = [_answer(process) for process in self._processes]
        self.cpu += sum(answer["cpu"] for answer in answers)
        return answers

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def percentiles(times: Sequence[float] | np.ndarray) -> tuple[float, float, float, float]:
    """The 50th, 90th, 95th and 99th percentile: values that occurred, never lower than the share asked for."""
    p50, p90, p95, p99 = (float(value) for value in np.percentile(times, [50, 90, 95, 99], method="inverted_cdf"))
    return p50, p90, p95, p99


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
    if "error" in answer:
        raise MachineError("benchmark_worker", "the deployment in a process of its own failed", answer["error"])
    return answer


def main() -> None:
    """Serve commands until standard input ends."""
    from fssdeploy.deployment import open_deployment

    artifact, bank, threads = sys.argv[1:]
    deployment = open_deployment(artifact, bank, threads=int(threads))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            picture = Path(command["picture"]).read_bytes()  # a client has the bytes, too
            cpu, start, seconds = time.process_time(), time.monotonic(), []
            for _ in range(max(1, command["requests"])):
                before = time.perf_counter()
                deployment.segment(picture, [command["name"]])
                seconds.append(time.perf_counter() - before)
            answer = {"seconds": seconds, "start": start, "end": time.monotonic(), "cpu": time.process_time() - cpu}
        except Exception as error:  # the parent tells it
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
