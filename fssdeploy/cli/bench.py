"""`fssdeploy bench`: what a query costs on this machine, against research code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit, progress_lines
from fssdeploy.cli.export import require_export_extra
from fssdeploy.errors import InputError


def bench(
    artifact: Annotated[Path, typer.Argument(help="Directory written by fssdeploy export.")],
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
    try:
        counts = [int(part) for part in shots.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError as error:
        raise InputError("bench_usage", f"'{shots}' is no list of support counts", "", "For example 1,5,25.") from error
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
