"""How long a query takes: research code against an enrolled class on every runtime, interleaved in one run.

Each contestant is a process of its own; every round gives each of them one turn at every case, so that a slow moment of
the machine meets all alike. Wall and CPU seconds are kept with the CPU seconds that other processes used meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fssdeploy.artifact import Artifact
from fssdeploy.benchmarks.baselines.fsdino_research import extra_flops
from fssdeploy.benchmarks.machine import busy_seconds, describe_machine, matrix_peak
from fssdeploy.engines import RUNTIMES, available_cores
from fssdeploy.errors import InputError
from fssdeploy.export.profile import count_flops
from fssdeploy.report import Report, Table
from fssdeploy.systems.fsdino import FSDinoConfig

# "onnxruntime" runs the graph with fused attention, "onnxruntime-portable" the one that every engine reads.
VARIANTS = ("torch-recompute", "torch", "torch-compile", "onnxruntime-portable", "onnxruntime", "openvino")
SHOTS = (1, 5, 25)
# A sample counts as quiet while others use less than this share of the machine's cores.
QUIET = 0.02
# A case that already took this long in all rounds together is not repeated once it has two quiet samples.
CASE_BUDGET = 60.0
STARTUP = """
import json, sys, time
start = time.perf_counter()
import numpy as np, fssdeploy
system = fssdeploy.load(sys.argv[1], sys.argv[2])
picture = np.zeros((480, 640, 3), np.uint8); mask = np.zeros((480, 640), bool); mask[100:300, 100:300] = True
from fssdeploy.protocol import ClassState
spec = {tensor.name: tensor for tensor in system.specs["segment"].inputs}
names = [tensor.name for tensor in system.specs["enroll"].outputs]
state = ClassState({name: np.ones(spec[name].shape[1:], np.float32) for name in names}, 1, system.fingerprint)
system.segment(system.encode([picture]), {"class": state})
seconds = time.perf_counter() - start
from fssdeploy.benchmarks.machine import peak_memory_mib
print(json.dumps({"seconds": seconds, "peak_mib": peak_memory_mib(), "torch": "torch" in sys.modules}))
"""


@dataclass
class Sample:
    """One timed run: its wall and CPU seconds, and the share of all cores that others used meanwhile."""

    wall: float
    cpu: float
    others: float


@dataclass
class Contestant:
    """A worker process and what it has measured, by (case, shots)."""

    variant: str
    process: subprocess.Popen[str]
    engine: dict[str, Any] = field(default_factory=dict)
    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)
    peak_mib: float = float("nan")

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. RuntimeError if the worker fails or dies."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def measure(
    artifact: Path,
    *,
    variants: Sequence[str] = VARIANTS,
    shots: Sequence[int] = SHOTS,
    rounds: int = 7,
    weights: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark; everything a result file holds. InputError for an unknown variant or no rounds."""
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown or rounds < 1:
        what = f"there is no variant '{unknown[0]}'" if unknown else f"{rounds} rounds measure nothing"
        raise InputError("bench_usage", what, "", f"Variants: {', '.join(VARIANTS)}; rounds: 1 or more.")
    opened = Artifact.open(artifact)
    opened.verify()
    contestants: list[Contestant] = []
    skipped: dict[str, str] = {}
    peaks: list[float] = []
    try:
        for variant in variants:
            progress(f"starting {variant}")
            contestant = _start(artifact, variant, weights)
            try:
                contestant.engine = contestant.ask(do="prepare", shots=list(shots))["engine"]
                contestants.append(contestant)
            except RuntimeError as error:
                skipped[variant] = str(error)
                contestant.process.kill()
        for index in range(rounds):
            peaks.append(matrix_peak())
            for contestant in contestants:
                progress(f"round {index + 1} of {rounds}: {contestant.variant}")
                cases = _cases(contestant.variant, shots, list(opened.specs))
                if contestant.variant != "torch-recompute":
                    contestant.ask(do="run", case="query", shots=shots[0])  # back into the caches, not counted
                for turn in range(len(cases)):  # no case always comes first
                    _sample(contestant, *cases[(turn + index) % len(cases)])
        for contestant in contestants:
            contestant.peak_mib = contestant.ask(do="memory")["peak_mib"]
    finally:
        for contestant in contestants:
            contestant.process.kill()
    runtimes = [contestant.variant for contestant in contestants if contestant.variant in RUNTIMES]
    progress("measuring the start")
    starts = {runtime: _startup(artifact, runtime) for runtime in runtimes}
    return _result(opened, contestants, skipped, max(peaks), starts, list(shots), rounds)


def _start(artifact: Path, variant: str, weights: Sequence[str]) -> Contestant:
    command = [sys.executable, "-m", "fssdeploy.benchmarks.worker", str(artifact), variant, json.dumps(list(weights))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return Contestant(variant, process)


def _cases(variant: str, shots: Sequence[int], stages: Sequence[str]) -> list[tuple[str, int]]:
    queries = [("query", count) for count in shots]
    if variant == "torch-recompute":
        return queries
    return [*queries, *((f"stage:{stage}", shots[0]) for stage in stages)]


def _sample(contestant: Contestant, case: str, count: int) -> None:
    samples = contestant.samples.setdefault((case, count), [])
    quiet = sum(sample.others <= QUIET for sample in samples)
    if quiet >= 2 and sum(sample.wall for sample in samples) > CASE_BUDGET:
        return
    before = busy_seconds()
    answer = contestant.ask(do="run", case=case, shots=count)
    after = busy_seconds()
    others = 0.0
    if before is not None and after is not None:
        others = max(0.0, after - before - answer["cpu"]) / (answer["wall"] * available_cores())
    samples.append(Sample(answer["wall"], answer["cpu"], others))


def _startup(artifact: Path, runtime: str) -> dict[str, Any]:
    """Import, load and first mask in fresh processes: the best of three."""
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", STARTUP, str(artifact), runtime], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
    return min(runs, key=lambda run: run["seconds"])


def _result(
    artifact: Artifact,
    contestants: list[Contestant],
    skipped: dict[str, str],
    peak: float,
    starts: dict[str, dict[str, Any]],
    shots: list[int],
    rounds: int,
) -> dict[str, Any]:
    config = FSDinoConfig.from_dict(artifact.manifest["config"])
    stage_gflop = {
        stage: count_flops(artifact.graph(stage, "portable"))["total"] / 1e9 for stage in artifact.manifest["stages"]
    }
    query = stage_gflop["encoder"] + stage_gflop["segment"]
    research = {count: query + count * stage_gflop["encoder"] + extra_flops(config, count) / 1e9 for count in shots}
    rows = []
    for contestant in contestants:
        for (case, count), samples in contestant.samples.items():
            if case == "query":
                gflop = research[count] if contestant.variant == "torch-recompute" else query
            else:
                gflop = stage_gflop[case.removeprefix("stage:")]
            rows.append({"variant": contestant.variant, "case": case, "shots": count} | _figures(samples, gflop, peak))
    return {
        "what": "latency of a query",
        "command": f"fssdeploy bench artifacts/{artifact.name} --rounds {rounds} --shots {','.join(map(str, shots))}",
        "seed": artifact.manifest["weights"]["seed"],
        "artifact": artifact.name,
        "precision": artifact.manifest["precision"],
        "weights": artifact.manifest["weights"]["status"],
        "image_size": config.image_size,
        "machine": describe_machine(),
        "versions": artifact.manifest["versions"],
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "rounds": rounds,
        "gflop": {
            "stages": stage_gflop,
            "query": query,
            "recomputed": {str(k): value for k, value in research.items()},
        },
        "fp32_peak_gflops": peak,
        "engines": {contestant.variant: contestant.engine for contestant in contestants},
        "peak_mib": {contestant.variant: contestant.peak_mib for contestant in contestants},
        "startup": starts,
        "skipped": skipped,
        "rows": rows,
    }


def _figures(samples: list[Sample], gflop: float, peak: float) -> dict[str, Any]:
    """Figures of the quiet samples where there are at least two, else of all; `quiet` says how many there were."""
    quiet = [sample for sample in samples if sample.others <= QUIET]
    chosen = quiet if len(quiet) >= 2 else samples
    walls = sorted(sample.wall for sample in chosen)
    median = statistics.median(walls)
    return {
        "samples": len(samples),
        "quiet": len(quiet),
        "best_ms": walls[0] * 1e3,
        "p50_ms": median * 1e3,
        "p95_ms": walls[min(len(walls) - 1, int(0.95 * len(walls)))] * 1e3,
        "cpu_ms": statistics.median(sample.cpu for sample in chosen) * 1e3,
        "others_share": statistics.mean(sample.others for sample in chosen),
        "per_second": 1 / median,
        "gflop": gflop,
        "share_of_peak": gflop / median / peak,
    }


def report(result: dict[str, Any]) -> Report:
    """The result as tables: queries, stages, memory and start."""
    rows = result["rows"]
    base = {row["shots"]: row["p50_ms"] for row in rows if row["variant"] == "torch-recompute"}
    queries = Table(
        "query (encode + segment, preprocessing included)",
        ["variant", "shots", "p50 ms", "p95 ms", "CPU ms", "per s", "GFLOP", "of peak", "vs research", "quiet"],
        [],
    )
    stages = Table("stages", ["variant", "stage", "p50 ms", "p95 ms", "CPU ms", "GFLOP", "of peak", "quiet"], [])
    for row in rows:
        timing = [f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}", f"{row['cpu_ms']:.0f}"]
        quiet = f"{row['quiet']}/{row['samples']}"
        if row["case"] == "query":
            gain = f"{base[row['shots']] / row['p50_ms']:.2f}x" if row["shots"] in base else "-"
            extra = [f"{row['per_second']:.2f}", f"{row['gflop']:.1f}", f"{row['share_of_peak']:.0%}", gain, quiet]
            queries.rows.append([row["variant"], row["shots"], *timing, *extra])
        else:
            stage = row["case"].removeprefix("stage:")
            extra = [f"{row['gflop']:.2f}", f"{row['share_of_peak']:.0%}", quiet]
            stages.rows.append([row["variant"], stage, *timing, *extra])
    memory = Table("process", ["variant", "peak MiB", "import + load + first mask"], [])
    for variant, peak in result["peak_mib"].items():
        start = result["startup"].get(variant)
        memory.rows.append(
            [variant, f"{peak:.0f}", f"{start['seconds']:.2f} s, {start['peak_mib']:.0f} MiB" if start else "-"]
        )
    machine = result["machine"]
    facts = {
        "artifact": f"{result['artifact']}, {result['image_size']} px, {result['precision']}",
        "weights": result["weights"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
        "float32 matrix peak": f"{result['fp32_peak_gflops']:.0f} GFLOP/s, measured between the rounds",
    }
    notes = [f"skipped {variant}: {why}" for variant, why in result["skipped"].items()]
    if result["weights"] != "trained":
        notes.append("UNTRAINED weights: times are real, masks mean nothing.")
    return Report("latency", facts, [queries, stages, memory], notes, result)


def save(result: dict[str, Any], path: Path) -> list[Path]:
    """Write the result as JSON and, where matplotlib is installed, a plot beside it. MachineError if it cannot."""
    from fssdeploy.files import storage_error, write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    try:
        from fssdeploy.benchmarks.plots import plot_latency
    except ImportError:
        return [path]
    picture = path.with_suffix(".png")
    plot_latency(result, picture)
    return [path, picture]
