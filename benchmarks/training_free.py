"""What a query costs with GF-SAM, alone and with GSM, against a step-by-step formulation; interleaved in one run.

Everything runs in one process on the same weights and inputs, in rounds, so that a slow moment of the machine meets all
alike, and every mask must be that of the baseline. The same is repeated on a scene of blobs, without encoders and
decoder. Only peak memory is measured in processes of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fssdeploy import shipped
from fssdeploy.benchmarks.baselines import gfsam_research
from fssdeploy.benchmarks.baselines.gfsam_research import Answer
from fssdeploy.benchmarks.blobs import BlobEngine, Scene, blob_scene
from fssdeploy.benchmarks.machine import busy_seconds, describe_machine, peak_memory_mib
from fssdeploy.benchmarks.stopwatch import Spent, Stopwatch
from fssdeploy.demo import Case, natural_case, shapes_case
from fssdeploy.engines import available_cores, open_engine
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import CheckFailedError, InputError
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.glue.gsm import system as gsm_module
from fssdeploy.glue.gsm.gfsam import GFSamHost
from fssdeploy.glue.gsm.hosts import gsm
from fssdeploy.images.geometry import place
from fssdeploy.protocol import ClassState, Engine, Features
from fssdeploy.systems import gfsam
from fssdeploy.weights.gfsam import fill

ENGINES = ("torch", "onnxruntime")
BASELINE = "baseline"
BLOB_POINTS = (32, 128)
SEED = 0
STRIPED_RING = 1  # a class of shapes-5i that the tiny networks find
CLASS = "class"
BOOSTED = "+gsm"

CANVAS, MATCHING, EMBEDDING = "picture to canvas", "matching encoder", "SAM encoder"
MAPS, DECODER, ENLARGED = "maps and points", "decoder", "masks at full size"
GATES, UNION, BOOST, RESULT = "graph and gates", "union", "boost", "to the picture's size"
SECTIONS = (CANVAS, MATCHING, EMBEDDING, MAPS, DECODER, ENLARGED, GATES, UNION, BOOST, RESULT)
ENCODERS = (MATCHING, EMBEDDING)
# What GSM does after the host's own pass, its sections together.
ADDED = "added by gsm"
STAGE_SECTIONS = {"encoder": MATCHING, "affinity": MAPS, "sam_encoder": EMBEDDING, "decoder": DECODER}
# The functions of the glue that stand for sections; what they call counts to the innermost.
PLACES = (
    (GFSam, "encode", CANVAS),
    (GFSam, "segment", RESULT),
    (gsm_module.Gsm, "segment", RESULT),
    (GFSam, "maps", MAPS),
    (GFSam, "finish", MAPS),
    (GFSam, "_decode", DECODER),
    (GFSam, "_judge", GATES),
    (GFSam, "_union", UNION),
    (gsm_module, "boost", BOOST),
)
# Masks may differ in so many pixels of a million: those whose logit is 0 but for rounding.
TOLERATED_PIXELS = 20e-6


@dataclasses.dataclass
class Contestant:
    """What has been measured of one formulation: one entry a round, and the share of the cores others used then."""

    rounds: list[dict[str, Spent]] = dataclasses.field(default_factory=list)
    others: list[float] = dataclasses.field(default_factory=list)


def measure(
    preset: str,
    *,
    rounds: int = 5,
    engines: Sequence[str] = ("torch",),
    max_points: int | None = None,
    blob_points: Sequence[int] = BLOB_POINTS,
    memory: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark; everything a result file holds. `max_points` takes the place of the preset's.

    InputError for an unknown preset or engine, or no rounds; CheckFailedError if masks are not those of the baseline.
    """
    unknown = [name for name in engines if name not in ENGINES]
    if unknown or rounds < 1 or preset not in gfsam.PRESETS:
        what = f"{rounds} rounds measure nothing"
        if unknown or preset not in gfsam.PRESETS:
            what = f"there is no engine '{unknown[0]}'" if unknown else f"there is no preset '{preset}'"
        presets = ", ".join(gfsam.PRESETS)
        fix = f"Presets: {presets}; engines: {', '.join(ENGINES)}; rounds: 1 or more."
        raise InputError("bench_usage", what, "", fix)
    torch.set_num_threads(available_cores())
    progress("building the networks")
    model, weights = build(preset, max_points)
    case = _case(weights)
    with tempfile.TemporaryDirectory() as folder:
        systems = {name: _system(model, _engine(name, model, Path(folder), progress)) for name in engines}
        query = _measure_query(model, systems, case, rounds, progress)
    blobs = {str(count): _measure_blobs(model.config, count, rounds, progress) for count in blob_points}
    peaks = {}
    if memory:
        for name, boost in (("host", False), ("host+gsm", True)):
            progress(f"measuring the memory of {name}")
            peaks[name] = _memory_of(preset, max_points, boost)
    return {
        "what": "latency of a query, training-free",
        "command": f"fssdeploy bench training-free --preset {preset} --rounds {rounds} --engines {','.join(engines)}"
        + (f" --points {max_points}" if max_points else ""),
        "seed": None if weights == "trained" else SEED,
        "system": "gfsam",
        "preset": preset,
        "compat": model.config.compat,
        "max_points": model.config.max_points,
        "weights": weights,
        "image_sizes": {"matching": model.config.image_size, "sam": model.config.sam.image_size},
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "rounds": rounds,
        "engines": {name: system.engine.describe() for name, system in systems.items()},
        "query": query,
        "blobs": blobs,
        "peak_mib": peaks,
    }


def build(preset: str, max_points: int | None = None) -> tuple[gfsam.GFSamNetworks, str]:
    """The networks of a preset, and whether their weights are "trained" or "untrained" (seeded).

    In the original's way wherever the two differ, because the baseline is.
    """
    config = gfsam.PRESETS[preset]
    model = gfsam.build(dataclasses.replace(config, compat="original", max_points=max_points or config.max_points))
    files = shipped.checkpoints("gfsam", preset)
    return model, fill(model, files, None if files else SEED).status


def _case(weights: str) -> Case:
    """A class, its support and queries: what the shipped weights were trained for, else photographs."""
    return shapes_case(STRIPED_RING, queries=1) if weights == "trained" else natural_case()


def _system(model: gfsam.GFSamNetworks, engine: Engine) -> GFSam:
    return GFSam("gfsam", engine.specs, engine, gfsam.preprocessing(model.config), "benchmark")


def _engine(name: str, model: gfsam.GFSamNetworks, folder: Path, progress: Callable[[str], None]) -> Engine:
    """The baseline's own modules, or graphs exported from them."""
    specs = gfsam.specs(model.config)
    if name == "torch":
        return TorchEngine(gfsam.reference_stages(model), specs)
    from fssdeploy.export.onnx import export_stage

    graphs = {}
    for stage, module in gfsam.stages(model).items():
        progress(f"exporting {stage}")
        files = export_stage(module, specs[stage], folder, precision="fp32", fuse=stage in gfsam.FUSED_STAGES)
        graphs[stage] = folder / (files.onnxruntime or files.portable)
    return open_engine(name, graphs, specs)


def _measure_query(
    model: gfsam.GFSamNetworks,
    systems: dict[str, GFSam],
    case: Case,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Pictures to masks: the baseline with its support each time, every engine with an enrolled class."""
    picture = next(iter(case.queries.values()))[0]
    states = {}
    for name, system in systems.items():
        progress(f"enrolling with {name}")
        states[name] = system.enroll(system.encode([case.support]), [case.mask])
    contestants: dict[str, Contestant] = {}
    points = new_points = 0
    for index in range(rounds + 1):  # the first warms up
        progress(f"round {index} of {rounds}: {BASELINE}")
        with _turn(contestants, BASELINE, index) as watch:
            answer = gfsam_research.segment_pictures(model, picture, [case.support], [case.mask], watch)
        points = len(answer.points)
        for name, system in systems.items():
            progress(f"round {index} of {rounds}: {name}")
            trace: dict[str, np.ndarray] = {}
            with _turn(contestants, name, index) as watch, _watching(watch, system):
                features = system.encode([picture])
                system.segment(features, {CLASS: states[name]}, trace)
            _require_same(name, system, trace, answer)
            # GSM uses what the encoders found for the host, so that their scatter does not hide what it adds.
            with _turn(contestants, name + BOOSTED, index) as boosted, _watching(boosted, system):
                new_points = _boosted(system, features, states[name], boosted)
            boosted.spent |= {
                section: watch.spent[section] for section in (CANVAS, *ENCODERS) if section in watch.spent
            }
    return {"points": points, "points_with_gsm": new_points, **_figures(contestants)}


def _measure_blobs(
    config: gfsam.GFSamConfig, points: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Features to masks of a scene of blobs, at most so many points; the decoder's stand-in is not counted."""
    config = dataclasses.replace(config, max_points=min(points, config.grid**2))
    scene = blob_scene(config, SEED)
    system = GFSam(
        "gfsam", gfsam.specs(config), BlobEngine(scene, gfsam.specs(config)), gfsam.preprocessing(config), ""
    )
    side = config.sam.image_size
    where = [place(side, side, side, "squash")]
    state = system.enroll(Features({"features": scene.support[None]}, where, ""), [scene.mask])
    contestants: dict[str, Contestant] = {}
    found = 0
    for index in range(rounds + 1):
        progress(f"blobs, {points} points: round {index} of {rounds}")
        with _turn(contestants, BASELINE, index) as watch:
            answer = _research_on(config, scene, watch)
        found = len(answer.points)
        features = Features(
            {"features": scene.query[None], "canvas": scene.picture.transpose(2, 0, 1)[None], "embedding": np.zeros(1)},
            where,
            "",
        )
        trace: dict[str, np.ndarray] = {}
        with _turn(contestants, "numpy", index) as watch, _watching(watch, system):
            system.segment(features, {CLASS: state}, trace)
        _require_same("numpy", system, trace, answer)
        with _turn(contestants, "numpy" + BOOSTED, index) as watch, _watching(watch, system):
            _boosted(system, features, state, watch)
    for contestant in contestants.values():
        for spent in contestant.rounds:
            spent.pop(DECODER, None)
    return {"points": found, **_figures(contestants)}


def _research_on(config: gfsam.GFSamConfig, scene: Scene, watch: Stopwatch) -> Answer:
    def decode(points: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(scene.logits(points.numpy()))

    query, support = torch.from_numpy(scene.query), torch.from_numpy(scene.support)
    masks = torch.from_numpy(scene.mask)[None].float()
    return gfsam_research.segment_features(config, query, support[None], masks, decode, watch)


def _boosted(system: GFSam, features: Features, state: ClassState, watch: Stopwatch) -> int:
    """Segment with GSM; how many points its second pass had, 0 if there was none. `watch` learns what GSM ADDED."""
    trace: dict[str, Any] = {}
    added = Stopwatch()
    with added.watching(((gsm_module, "boost", ADDED), (GFSamHost, "second", ADDED))):
        gsm(system).segment(features, {CLASS: state}, trace)
    watch.spent |= added.spent
    return len(trace.get("second_points_xy", ()))


@contextmanager
def _watching(watch: Stopwatch, system: GFSam) -> Iterator[None]:
    """Count the sections of a system's glue, and its stages by name."""
    run = system.engine.run

    def counted(stage: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with watch.section(STAGE_SECTIONS[stage]):
            return run(stage, inputs)

    system.engine.run = counted  # type: ignore[method-assign,assignment]
    try:
        with watch.watching(PLACES):
            yield
    finally:
        system.engine.run = run  # type: ignore[method-assign]


@contextmanager
def _turn(contestants: dict[str, Contestant], name: str, index: int) -> Iterator[Stopwatch]:
    """A contestant's turn in a round; what is done in round 0 is not kept."""
    watch = Stopwatch()
    busy, start, own = busy_seconds(), time.perf_counter(), time.process_time()
    yield watch
    if index == 0:
        return
    contestant = contestants.setdefault(name, Contestant())
    contestant.rounds.append(watch.spent)
    after, wall = busy_seconds(), time.perf_counter() - start
    if busy is not None and after is not None:
        others = after - busy - (time.process_time() - own)
        contestant.others.append(max(0.0, others) / (wall * available_cores()))


def _require_same(name: str, system: GFSam, trace: dict[str, np.ndarray], answer: Answer) -> None:
    """CheckFailedError unless the points and the mask on the canvas are the baseline's.

    Labels may differ: whether a mask counts as accepted that lies inside those accepted before is up to rounding.
    """
    mask = np.zeros_like(answer.mask)
    if "chosen" in trace:
        mask = system._union(trace["low_res_logits"][trace["chosen"]]) > 0
    same_points = np.array_equal(trace["points_xy"], answer.points)
    differing = float((mask != answer.mask).mean())
    if not same_points or differing > TOLERATED_PIXELS:
        what = "masks" if same_points else "points"
        raise CheckFailedError(
            "masks_differ",
            f"{name} and the baseline have other {what}",
            f"{differing:.4%} of the pixels differ",
            "No time is worth anything then: look for what changed.",
        )


def _figures(contestants: dict[str, Contestant]) -> dict[str, Any]:
    """Medians over rounds of every contestant, in ms, and what follows from them."""
    figures: dict[str, Any] = {}
    for name, contestant in contestants.items():
        sections = [section for section in SECTIONS if section in contestant.rounds[0]]
        figures[name] = {
            "sections": {section: _ms([spent[section] for spent in contestant.rounds]) for section in sections},
            "encoders": _ms([_sum(spent, ENCODERS) for spent in contestant.rounds]),
            "outside": _ms([_sum(spent, [s for s in SECTIONS if s not in ENCODERS]) for spent in contestant.rounds]),
            "total": _ms([_sum(spent, SECTIONS) for spent in contestant.rounds]),
            "others_share": float(np.mean(contestant.others)) if contestant.others else None,
        }
    return {"contestants": figures, "targets": _targets(contestants)}


def _targets(contestants: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    """By engine: medians over rounds of the ratios that targets are set for, from wall times."""
    targets: dict[str, dict[str, float]] = {}
    outside = [section for section in SECTIONS if section not in ENCODERS]
    for name, contestant in contestants.items():
        if name == BASELINE or name.endswith(BOOSTED):
            continue
        rows = zip(contestants[BASELINE].rounds, contestant.rounds, contestants[name + BOOSTED].rounds, strict=True)
        ratios = []
        for slow, fast, boosted in rows:
            slow_glue, fast_glue = (_sum(spent, outside).wall for spent in (slow, fast))
            undecoded = [section for section in outside if section != DECODER]
            slow_steps, fast_steps = (_sum(spent, undecoded).wall for spent in (slow, fast))
            whole = _sum(fast, SECTIONS).wall
            ratios.append(
                {
                    "outside_encoders": slow_glue / fast_glue,
                    "outside_encoders_and_decoder": slow_steps / fast_steps,
                    "total": _sum(slow, SECTIONS).wall / whole,
                    "encoders_share": _sum(fast, ENCODERS).wall / whole,
                    "gsm_added": boosted[ADDED].wall / whole,
                }
            )
        targets[name] = {key: float(np.median([ratio[key] for ratio in ratios])) for key in ratios[0]}
    return targets


def _sum(spent: dict[str, Spent], sections: Sequence[str]) -> Spent:
    return sum((spent[section] for section in sections if section in spent), Spent())


def _ms(samples: Sequence[Spent]) -> dict[str, float]:
    walls = [sample.wall * 1e3 for sample in samples]
    return {
        "p50_ms": float(np.median(walls)),
        "best_ms": min(walls),
        "worst_ms": max(walls),
        "cpu_ms": float(np.median([sample.cpu * 1e3 for sample in samples])),
    }


def _memory_of(preset: str, max_points: int | None, boost: bool) -> float:
    """Peak resident MiB of a process that builds a system, enrols a class and segments one picture."""
    chosen = [preset, str(max_points or 0), "gsm" if boost else "host"]
    command = [sys.executable, "-m", "fssdeploy.benchmarks.training_free", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["peak_mib"])


def main() -> None:
    """The process that `_memory_of` starts: preset, points (0: the preset's), then "host" or "gsm"."""
    preset, points, kind = sys.argv[1:]
    torch.set_num_threads(available_cores())
    model, weights = build(preset, int(points) or None)
    system = _system(model, _engine("torch", model, Path(), lambda _: None))
    case = _case(weights)
    state = system.enroll(system.encode([case.support]), [case.mask])
    features = system.encode([next(iter(case.queries.values()))[0]])
    (gsm(system) if kind == "gsm" else system).segment(features, {CLASS: state})
    print(json.dumps({"peak_mib": peak_memory_mib()}))


if __name__ == "__main__":
    main()
