"""`fssdeploy demo`: the whole way in one command."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit, progress_lines
from fssdeploy.cli.export import UNTRAINED_SEED, configure, require_export_extra, sources


def demo(
    preset: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "tiny",
    weights: Annotated[list[Path] | None, typer.Option(help="Checkpoint; several add up.")] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Export and prove the export first, instead of using the shipped artifact.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("demo_out"),
    as_json: Json = False,
) -> None:
    """Enrol classes from one picture each and find them in others, with the shipped artifact or with WEIGHTS."""
    from fssdeploy import demo as walk
    from fssdeploy import shipped

    artifact = shipped.artifact() if preset in shipped.PRESETS and not weights and not export else None
    proof: dict[str, object] = {}
    with progress_lines(as_json) as progress:
        if artifact is None:
            artifact = out / "artifact"
            proof = _export(preset, weights or [], artifact, progress)
        trained_on_shapes = preset in shipped.PRESETS and not weights
        cases = [walk.shapes_case(each) for each in (1, 2, 4)] if trained_on_shapes else [walk.natural_case()]
        report = walk.run(artifact, cases, out, progress)
    report.facts = {**proof, **report.facts}
    report.data |= proof
    emit(report, as_json)


def _export(preset: str, weights: list[Path], target: Path, progress: Callable[[str], None]) -> dict[str, object]:
    """Export the preset; facts of the proof. What no weights cover is seeded, and every output says so."""
    require_export_extra()
    progress("loading PyTorch")
    from fssdeploy.export.artifact import ExportRequest, export_artifact
    from fssdeploy.systems import fsdino, get_system
    from fssdeploy.weights.fsdino import fill

    config = configure(fsdino.NAME, preset)
    files, _ = sources(fsdino.NAME, preset, config, weights, untrained=False)
    model = fsdino.build(config)
    provenance = fill(model, files, UNTRAINED_SEED)
    request = ExportRequest(get_system(fsdino.NAME), preset, config)
    start = time.perf_counter()
    proof = export_artifact(model, provenance, request, target, progress)
    seconds = time.perf_counter() - start
    return {"exported and proved in": f"{seconds:.1f} s", "parity": proof.facts["parity: verdict"]}
