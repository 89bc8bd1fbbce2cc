"""`fssdeploy demo`: the whole way in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit, progress_lines
from fssdeploy.cli.export import configure, require_export_extra


def demo(
    preset: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "tiny",
    weights: Annotated[list[Path] | None, typer.Option(help="Checkpoint; several add up.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("demo_out"),
    as_json: Json = False,
) -> None:
    """Export FS-DINO, prove the export, enrol a class from one picture and find it in others."""
    require_export_extra()
    with progress_lines(as_json) as progress:
        progress("loading PyTorch")
        from fssdeploy.demo import run

        report = run(preset, configure("fsdino", preset), weights or [], out, progress)
    emit(report, as_json)
