"""One process of the kernel benchmark: checks, compiles or times the cases that it is told.

A kernel that writes where it must not takes the device from its whole process, one that never ends has to be killed;
the benchmark then starts another process and goes on. Reads one JSON command per line from standard input, answers one
JSON object per line: {"do": "check" | "compile" | "time", "case": key, "seconds": s} or {"do": "ceilings"}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch

from fssdeploy.benchmarks.device_timing import Clock, Device, Gpu, ceilings
from fssdeploy.benchmarks.formulations import DeviceLostError, compile_all, time_case
from fssdeploy.benchmarks.operation_cases import cases_to_check, cases_to_time
from fssdeploy.benchmarks.operation_checks import check
from fssdeploy.kernels import runtime

TINY_CEILINGS = {"side": 128, "copy_bytes": 1 << 20, "rounds": 2}
TINY_ROUNDS = 2


class Worker:
    """Answers commands on one device; `tiny` problems and the eager backend of the compiler are for tests."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.place, self.tiny = device, tiny
        self.backend = "eager" if tiny else "inductor"
        self.device: Device = Gpu() if device == "cuda" else Clock()
        cases = (*cases_to_check(tiny), *cases_to_time(tiny))
        if device == "cpu" and not runtime.INTERPRETED:
            cases = tuple(replace(case, problem=replace(case.problem, has_kernel=False)) for case in cases)
        self.cases = {case.key: case for case in cases}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """What the command found."""
        if command["do"] == "ceilings":
            return ceilings(self.device, **(TINY_CEILINGS if self.tiny else {}))
        case = self.cases[command["case"]]
        if command["do"] == "check":
            return check(case.problem, case.dtype, self.place)
        if command["do"] == "compile":
            compile_all(case, self.place, self.backend)
            return {}
        options = {"rounds": TINY_ROUNDS} if self.tiny else {}
        return time_case(case, self.device, backend=self.backend, seconds=command["seconds"], **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    # Compilers print to standard output when they fail; answers get a channel of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(arguments.device, arguments.tiny)
    for line in sys.stdin:
        lost = False
        try:
            result = worker.answer(json.loads(line))
        except Exception as error:  # one case must not end the others
            message = " ".join(str(error).split())[:500]
            result = {"error": f"{type(error).__name__}: {message}"}
            lost = isinstance(error, DeviceLostError) or not _usable(arguments.device)
        answers.write(json.dumps(result) + "\n")
        if lost:
            os._exit(1)  # an ordinary exit would wait for the device


def _usable(device: str) -> bool:
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


if __name__ == "__main__":
    main()
