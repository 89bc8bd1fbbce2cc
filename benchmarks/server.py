"""What the server costs: the enrolled path and the stateless ensemble on a real server, against no server at all.

NVIDIA's load generator sends the requests. Every round gives each case one turn, so that a slow moment of the machine
meets all alike, and every turn keeps the share of the cores that other processes used meanwhile.
"""

from __future__ import annotations

import io
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fssdeploy.artifact import Artifact
from fssdeploy.benchmarks.local import Pool, percentiles
from fssdeploy.benchmarks.machine import busy_seconds, describe_machine, group_seconds
from fssdeploy.benchmarks.perf_analyzer import Load, generate
from fssdeploy.benchmarks.server_report import ENROLLED, ENSEMBLE, FIRST, LOCAL, choose, compare
from fssdeploy.deployment import Deployment, Found, open_deployment
from fssdeploy.engines import available_cores
from fssdeploy.errors import InputError
from fssdeploy.serving.client import Client
from fssdeploy.serving.configs import Options, row_by_row
from fssdeploy.serving.environment import Environment
from fssdeploy.serving.names import Names
from fssdeploy.serving.repository import png, sample_shot, write_repository
from fssdeploy.serving.server import Server

FIGURES = ("per_second", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "queue_ms", "compute_ms", "others_share")
# A turn counts as quiet while others use less than this share of the machine's cores.
QUIET = 0.02


@dataclass(frozen=True)
class Plan:
    """What is measured. Sizes are (height, width). InputError for what cannot be."""

    concurrency: tuple[int, ...] = (1, 2, 4)
    sizes: tuple[tuple[int, int], ...] = ((480, 640),)
    shots: tuple[int, ...] = (1, 5)
    instances: tuple[int, ...] = (1, 2)
    requests: int = 50
    rounds: int = 3
    backend: str = "onnxruntime"
    delay_us: int | None = (
        None  # how long a stage's model may wait for more requests to join; None: they are not joined
    )
    target_ms: float | None = None

    def __post_init__(self) -> None:
        lists = (self.concurrency, self.shots, self.instances, [side for size in self.sizes for side in size])
        if not all(lists) or min(map(min, lists)) < 1 or min(self.requests, self.rounds) < 1:
            raise InputError(
                "bench_usage", "nothing can be measured", "every list needs a number, all of them 1 or more", ""
            )
        if self.requests < max(*self.concurrency, *self.instances):
            raise InputError(
                "bench_usage",
                f"{self.requests} requests are fewer than are to be under way at once",
                "",
                "Give more --requests.",
            )


@dataclass(frozen=True, order=True)
class Case:
    """One line of the table. `instances` are those of a model, or the processes without a server."""

    size: tuple[int, int]
    shots: int
    instances: int
    path: str
    concurrency: int


@dataclass
class Samples:
    """The turns of a case."""

    loads: list[Load] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """A picture file to search, and shots to learn from, in files' bytes, all of one size."""

    file: Path
    query: bytes
    pictures: list[bytes]
    masks: list[bytes]

    def inputs(self, path: str, shots: int) -> dict[str, list[bytes]]:
        """One request of a path."""
        if path == ENROLLED:
            return {"picture": [self.query], "names": [class_name(shots, self).encode()]}
        supports = {"support_pictures": self.pictures[:shots], "support_masks": self.masks[:shots]}
        return {"pictures": [self.query], **supports}


def class_name(shots: int, material: Material) -> str:
    """The class that was enrolled from so many shots of a size."""
    return f"{shots} of {material.file.stem}"


def measure(
    artifact: Path, environment: Environment, plan: Plan, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run the benchmark: everything a result file holds.

    Raises InputError, MachineError and IntegrityError of writing a repository, of the server and its load generator.
    """
    opened = Artifact.open(artifact)
    names = Names(opened.manifest["system"])
    skipped = _skipped(opened, plan)
    samples: dict[Case, Samples] = {}
    first: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fssdeploy-bench-") as folder:
        root = Path(folder)
        materials = {size: _material(root, size, max(plan.shots)) for size in plan.sizes}
        bank = root / "bank" / names.system
        progress("enrolling")
        deployment = open_deployment(artifact, bank)
        for material in materials.values():
            for shots in plan.shots:
                deployment.enroll(class_name(shots, material), material.pictures[:shots], material.masks[:shots])
        for instances in plan.instances:
            threads = max(1, available_cores() // instances)
            repository = root / f"models-{instances}"
            progress(f"writing a repository with {instances} instances")
            # The stages' models are used by the ensemble alone, which has the same cores as the enrolled path.
            options = Options(plan.backend, instances=instances, threads=threads, delay_us=plan.delay_us)
            write_repository([f"{names.system}={artifact}"], repository, options)
            server = Server(repository, environment, bank=bank.parent, log=root / "log", exit_timeout=3)
            with server:
                # Before the other processes start, which would take its cores.
                first.append({"instances": instances, **_first(server, names, materials[plan.sizes[0]], plan)})
                differences += _differences(server, names, deployment, materials, plan, skipped)
                cases = _cases(plan, instances, skipped)
                with Pool(artifact, bank, instances, threads) as pool:
                    for number in range(plan.rounds):
                        # In an order of its own in every round: a turn also depends on what the cores did before it.
                        for case in random.Random(number).sample(cases, len(cases)):
                            progress(f"round {number + 1} of {plan.rounds}, {instances} instances: {_words(case)}")
                            _sample(samples.setdefault(case, Samples()), case, materials, plan, names, server, pool)
    rows = [{**asdict(case), "size": f"{case.size[0]}x{case.size[1]}"} | _figures(samples[case]) for case in samples]
    rows.sort(key=lambda row: (row["size"], row["shots"], row["path"], row["instances"], row["concurrency"]))
    weights = opened.manifest["weights"]["status"]
    result: dict[str, Any] = {
        "what": "latency and throughput of the server",
        "command": _command(opened.name, plan),
        "artifact": opened.name,
        "precision": opened.manifest["precision"],
        "weights": weights,
        "machine": describe_machine(),
        "server": environment.stamp["requirements"],
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "plan": asdict(plan),
        "rows": rows,
        "first": first,
        "differences": differences,
        "comparisons": compare(rows, first),
        "skipped": skipped,
    }
    if plan.target_ms is not None:
        result["choice"] = choose(rows, plan.target_ms)
    return result


def _skipped(artifact: Artifact, plan: Plan) -> dict[str, str]:
    """What cannot be measured with this artifact: the ensemble, by its path, beyond what it takes in one request."""
    many = [shots for shots in plan.shots if shots > 1]
    if not many or plan.backend == "python" or not any(map(row_by_row, artifact.specs.values())):
        return {}
    why = "its graphs take one row: export with --dynamic-batch, or give --backend python"
    return {ENSEMBLE: f"the ensemble with {' and '.join(map(str, many))} shots, {why}"}


def _cases(plan: Plan, instances: int, skipped: dict[str, str]) -> list[Case]:
    cases = []
    for size in plan.sizes:
        cases.append(Case(size, min(plan.shots), instances, LOCAL, instances))
        for shots in plan.shots:
            for concurrency in plan.concurrency:
                cases.append(Case(size, shots, instances, ENROLLED, concurrency))
                if shots == 1 or ENSEMBLE not in skipped:
                    cases.append(Case(size, shots, instances, ENSEMBLE, concurrency))
    return cases


def _words(case: Case) -> str:
    return f"{case.path}, {case.size[0]}x{case.size[1]}, {case.shots} shots, {case.concurrency} at once"


def _sample(
    samples: Samples,
    case: Case,
    materials: dict[tuple[int, int], Material],
    plan: Plan,
    names: Names,
    server: Server,
    pool: Pool,
) -> None:
    """One turn of a case."""
    material = materials[case.size]

    def ours() -> float:
        generator = resource.getrusage(resource.RUSAGE_CHILDREN)
        return pool.cpu + group_seconds(server.pid) + generator.ru_utime + generator.ru_stime

    busy, used, start = busy_seconds(), ours(), time.perf_counter()
    if case.path == LOCAL:
        load = pool.run(material.file, class_name(case.shots, material), plan.requests)
    else:
        assert server.environment
        model = names.segment if case.path == ENROLLED else names.stateless
        inputs = material.inputs(case.path, case.shots)
        load = generate(
            server.environment.perf_analyzer, server.grpc_url, model, inputs, case.concurrency, plan.requests
        )
    wall, others, now = time.perf_counter() - start, 0.0, busy_seconds()
    if busy is not None and now is not None:
        others = max(0.0, now - busy - (ours() - used)) / (wall * available_cores())
    samples.loads.append(load)
    samples.others.append(others)


def _figures(samples: Samples) -> dict[str, Any]:
    """Medians over the quiet turns where there are at least two, else over all; `quiet` says how many there were."""
    turns = [
        {**asdict(load), "others_share": others} for load, others in zip(samples.loads, samples.others, strict=True)
    ]
    quiet = [turn for turn in turns if turn["others_share"] <= QUIET]
    chosen = quiet if len(quiet) >= 2 else turns
    figures = {name: statistics.median(turn[name] for turn in chosen) for name in FIGURES}
    return {"turns": len(turns), "quiet": len(quiet), **figures}


def _first(server: Server, names: Names, material: Material, plan: Plan) -> dict[str, Any]:
    """The first requests to a server that has just become ready, and as many more as a turn has."""
    busy, used = busy_seconds(), group_seconds(server.pid)
    times = []
    with Client(server.http_url, names.system, timeout=300) as client:
        begin = time.perf_counter()
        for _ in range(FIRST + plan.requests):
            start = time.perf_counter()
            client.segment(material.query, [class_name(plan.shots[0], material)])
            times.append((time.perf_counter() - start) * 1e3)
        wall = time.perf_counter() - begin
    now, others = busy_seconds(), 0.0
    if busy is not None and now is not None:
        others = max(0.0, now - busy - (group_seconds(server.pid) - used)) / (wall * available_cores())
    p99 = percentiles(times[:FIRST])[3]
    return {"p99_ms": p99, "p50_ms": percentiles(times[FIRST:])[0], "first_ms": times[:FIRST], "others_share": others}


def _differences(
    server: Server,
    names: Names,
    deployment: Deployment,
    materials: dict[tuple[int, int], Material],
    plan: Plan,
    skipped: dict[str, str],
) -> list[dict[str, Any]]:
    """How far each path's answers are from the local deployment's: pixels of the mask, and the score.

    The score is computed by the NumPy of the server's environment, whose release may round its last bit differently.
    """
    found = []

    def add(path: str, shots: int, mask: np.ndarray, score: float, local: Found) -> None:
        pixels, distance = int((mask != local.mask).sum()), abs(float(score) - local.score)
        found.append({"path": path, "size": mask.shape, "shots": shots, "pixels": pixels, "score": distance})

    with Client(server.http_url, names.system, timeout=300) as client:
        for material in materials.values():
            for shots in plan.shots:
                name = class_name(shots, material)
                local = deployment.segment(material.query, [name])[name]
                enrolled = client.segment(material.query, [name])[name]
                add(ENROLLED, shots, enrolled.mask, enrolled.score, local)
                if shots == 1 or ENSEMBLE not in skipped:
                    supports = material.pictures[:shots], material.masks[:shots]
                    masks, scores = client.segment_once([material.query], *supports)
                    add(ENSEMBLE, shots, masks[0], scores[0], local)
    return found


def _material(root: Path, size: tuple[int, int], shots: int) -> Material:
    """Rendered pictures, enlarged: what is in them changes neither times nor the size of a request by much."""
    height, width = size
    pictures, masks = [], []
    for number in range(shots + 1):
        picture, mask = sample_shot(number)
        stream = io.BytesIO()
        Image.fromarray(picture).resize((width, height)).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
        masks.append(png(np.asarray(Image.fromarray(mask).resize((width, height)))))
    file = root / f"{height}x{width}.jpg"
    file.write_bytes(pictures[-1])
    return Material(file, pictures[-1], pictures[:-1], masks[:-1])


def _command(name: str, plan: Plan) -> str:
    lists = {
        "concurrency": plan.concurrency,
        "sizes": [f"{height}x{width}" for height, width in plan.sizes],
        "shots": plan.shots,
        "instances": plan.instances,
    }
    words = [f"--{option} {','.join(map(str, values))}" for option, values in lists.items()]
    words += [f"--requests {plan.requests} --rounds {plan.rounds} --backend {plan.backend}"]
    words += [] if plan.delay_us is None else [f"--delay-us {plan.delay_us}"]
    words += [] if plan.target_ms is None else [f"--target-ms {plan.target_ms:g}"]
    return " ".join([f"fssdeploy bench server artifacts/{name}", *words])
