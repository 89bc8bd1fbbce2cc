"""`fssdeploy bench`: what a query costs on this machine against research code; `bench server`: what serving costs;
`bench training-free`: what a query costs with a system that no one trained, step by step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit, group_with_default, progress_lines
from fssdeploy.cli.export import require_export_extra
from fssdeploy.errors import InputError

# `fssdeploy bench ARTIFACT` is `fssdeploy bench query ARTIFACT`.
bench_app = typer.Typer(
    help="Measure on this machine: fssdeploy bench ARTIFACT (a query), fssdeploy bench server ARTIFACT (serving),"
    " fssdeploy bench training-free (GF-SAM and GSM).",
    no_args_is_help=True,
    cls=group_with_default("query"),
)
Exported = Annotated[Path, typer.Argument(help="Directory written by fssdeploy export.")]


@bench_app.command()
def query(
    artifact: Exported,
    rounds: Annotated[int, typer.Option(help="Turns of every variant at every case.")] = 7,
    shots: Annotated[str, typer.Option(help="Support counts to compare.")] = "1,5,25",
    variants: Annotated[str, typer.Option(help="Comma-separated; default: all that are installed.")] = "all",
    weights: Annotated[list[str] | None, typer.Option(help="The checkpoints the artifact was exported with.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Result file; default: benchmarks/results/latency-NAME.json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time queries on every runtime, interleaved in one run, and write a result file and a plot."""
    require_export_extra()
    counts = _numbers(shots, "support counts", "1,5,25")
    with progress_lines(as_json) as progress:
        progress("starting")
        from fssdeploy.artifact import Artifact
        from fssdeploy.benchmarks.latency import VARIANTS, measure, report, save

        chosen = VARIANTS if variants == "all" else tuple(variants.split(","))
        result = measure(
            artifact, variants=chosen, shots=counts, rounds=rounds, weights=weights or (), progress=progress
        )
        name = Artifact.open(artifact).name
        files = save(result, out or Path("benchmarks/results") / f"latency-{name}.json")
    shown = report(result)
    shown.facts["written"] = ", ".join(str(file) for file in files)
    emit(shown, as_json)


@bench_app.command()
def server(
    artifact: Exported,
    concurrency: Annotated[str, typer.Option(help="Requests under way at once.")] = "1,2,4",
    sizes: Annotated[str, typer.Option(help="Pictures, HEIGHTxWIDTH.")] = "480x640",
    shots: Annotated[str, typer.Option(help="Support counts.")] = "1,5",
    instances: Annotated[str, typer.Option(help="Instances of each model, which share the cores.")] = "1,2",
    requests: Annotated[int, typer.Option(help="Requests in every turn of a case.")] = 50,
    rounds: Annotated[int, typer.Option(help="Turns of every case.")] = 3,
    backend: Annotated[
        str, typer.Option(help="What runs the ensemble's stages: onnxruntime or python.")
    ] = "onnxruntime",
    delay_us: Annotated[
        int | None,
        typer.Option("--delay-us", help="Let stages join requests of so many microseconds; default: join none."),
    ] = None,
    target_ms: Annotated[
        float | None,
        typer.Option("--target-ms", help="Choose a configuration whose 99th percentile stays below this."),
    ] = None,
    env: Annotated[
        Path | None,
        typer.Option(help="The private environment; default: $FSSDEPLOY_SERVING, else in the user's cache."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; default: benchmarks/results/server-NAME.json.")] = None,
    as_json: Json = False,
) -> None:
    """Load a real server with NVIDIA's perf_analyzer: enrolled path, ensemble and in-process in one table."""
    lists = {
        "concurrency": _numbers(concurrency, "numbers of requests", "1,2,4"),
        "shots": _numbers(shots, "support counts", "1,5"),
        "instances": _numbers(instances, "numbers of instances", "1,2"),
    }
    pictures = _sizes(sizes)
    with progress_lines(as_json) as progress:
        progress("starting")
        from fssdeploy.artifact import Artifact
        from fssdeploy.benchmarks.server import Plan, measure
        from fssdeploy.benchmarks.server_report import report, save
        from fssdeploy.serving.environment import ready

        plan = Plan(
            **lists,
            sizes=pictures,
            requests=requests,
            rounds=rounds,
            backend=backend,
            delay_us=delay_us,
            target_ms=target_ms,
        )
        name = Artifact.open(artifact).name
        result = measure(artifact, ready(env), plan, progress)
        file = out or Path("benchmarks/results") / f"server-{name}.json"
        save(result, file)
    shown = report(result)
    shown.facts["written"] = str(file)
    emit(shown, as_json)


@bench_app.command("training-free")
def training_free(
    preset: Annotated[
        str, typer.Option(help="tiny, small, base or large; without weights of its own: seeded.")
    ] = "tiny",
    rounds: Annotated[int, typer.Option(help="Turns of every formulation.")] = 5,
    engines: Annotated[str, typer.Option(help="What runs the stages: torch, onnxruntime or both.")] = "torch",
    points: Annotated[int | None, typer.Option(help="At most so many points; default: the preset's.")] = None,
    blobs: Annotated[str, typer.Option(help="Points of the scenes that stand for encoders and decoder.")] = "32,128",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in processes of their own.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Result file; default: benchmarks/results/training-free-PRESET.json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time GF-SAM's stages, alone and with GSM, against a step-by-step formulation with the same masks."""
    require_export_extra()
    blob_points = _numbers(blobs, "numbers of points", "32,128")
    with progress_lines(as_json) as progress:
        progress("starting")
        from fssdeploy.benchmarks.training_free import measure
        from fssdeploy.benchmarks.training_free_report import report, save

        result = measure(
            preset,
            rounds=rounds,
            engines=tuple(engines.split(",")),
            max_points=points,
            blob_points=blob_points,
            memory=memory,
            progress=progress,
        )
        file = out or Path("benchmarks/results") / f"training-free-{preset}.json"
        save(result, file)
    shown = report(result)
    shown.facts["written"] = str(file)
    emit(shown, as_json)


def _numbers(text: str, what: str, example: str) -> tuple[int, ...]:
    """A list of numbers from 1, without repetitions, in its order. Raises InputError."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if min(numbers) < 1:
            raise ValueError
    except ValueError as error:
        raise InputError("bench_usage", f"'{text}' is no list of {what}", "", f"For example {example}.") from error
    return numbers


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """A list of heights and widths. Raises InputError."""
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        if not height.isdecimal() or not width.isdecimal():
            raise InputError("bench_usage", f"'{text}' is no list of sizes", "", "For example 480x640,1080x1920.")
        sizes.append((int(height), int(width)))
    return tuple(dict.fromkeys(sizes))
