"""`fssdeploy repo`: model repositories for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import Json, emit, emit_failed, group_with_default, progress_lines
from fssdeploy.errors import CheckFailedError

repo_app = typer.Typer(
    help="Write a model repository for Triton Inference Server: fssdeploy repo ARTIFACT... -o DIR. Check it, promote "
    "new weights in it, roll back.",
    no_args_is_help=True,
    cls=group_with_default("write"),
)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The repository.")]
System = Annotated[str, typer.Argument(metavar="SYSTEM", help="Its name in the repository: fsdino.")]
Url = Annotated[str | None, typer.Option(help="HTTP address of the server that runs on it, host:port.")]
Plans = Annotated[Path | None, typer.Option(help="For tensorrt: the folder of <stage>.plan.")]


@repo_app.command()
def write(
    artifacts: Annotated[
        list[str],
        typer.Argument(metavar="ARTIFACT...", help="Directory of fssdeploy export, or NAME=DIRECTORY."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to make.")],
    backend: Annotated[str, typer.Option(help="onnxruntime, tensorrt or python: what runs stages.")] = "onnxruntime",
    max_batch: Annotated[int, typer.Option(help="Most rows in one call of a stage.")] = 8,
    instances: Annotated[int, typer.Option(help="Instances of each model; each has its own copy of the weights.")] = 1,
    delay_us: Annotated[
        int | None,
        typer.Option("--delay-us", help="Join requests that arrive within so many microseconds; default: join none."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of each instance of a stage, on a CPU.")] = 1,
    queue: Annotated[
        int | None, typer.Option(help="Most requests that wait for a model; more are refused. Default: no limit.")
    ] = None,
    plans: Plans = None,
    as_json: Json = False,
) -> None:
    """Write a repository that serves ARTIFACTs: statelessly as an ensemble, and by enrolled classes."""
    from fssdeploy.serving.configs import Options
    from fssdeploy.serving.repository import write_repository

    options = Options(backend, max_batch, instances, delay_us, device, threads, queue)
    with progress_lines(as_json) as progress:
        report = write_repository(artifacts, out, options, plans, progress)
    emit(report, as_json)


@repo_app.command()
def check(directory: Directory, as_json: Json = False) -> None:
    """Find what a server would refuse, hang on or do wrong, without a server."""
    from dataclasses import asdict

    from fssdeploy.report import Report, Table
    from fssdeploy.serving.check import check as check_repository

    with progress_lines(as_json) as progress:
        progress(f"checking {directory}")
        problems = check_repository(directory)
    errors = [problem for problem in problems if problem.severity == "error"]
    facts = {"repository": str(directory), "errors": len(errors), "warnings": len(problems) - len(errors)}
    rows = [[problem.where, problem.severity, problem.what] for problem in problems]
    tables = [Table("problems", ["where", "severity", "what"], rows)] if rows else []
    report = Report("repository check", facts, tables, [], {**facts, "problems": [asdict(each) for each in problems]})
    if not errors:
        emit(report, as_json)
        return
    first = errors[0]
    failure = CheckFailedError(
        "repository_faulty",
        f"'{directory}' cannot be served as it is",
        f"{first.where}: {first.what}" + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""),
        "Write it again, or mend what the report says.",
    )
    emit_failed(report, failure, as_json)


@repo_app.command()
def promote(
    directory: Directory,
    system: System,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The new weights, of the same fingerprint.")],
    url: Url = None,
    plans: Plans = None,
    as_json: Json = False,
) -> None:
    """Serve new weights as the next version, without a failed request; what fails is taken back."""
    from fssdeploy.serving.versions import promote as promote_artifact

    with progress_lines(as_json) as progress:
        report = promote_artifact(directory, system, artifact, url, plans, progress)
    emit(report, as_json)


@repo_app.command()
def rollback(directory: Directory, system: System, url: Url = None, as_json: Json = False) -> None:
    """Serve the version before again, and remove the newest."""
    from fssdeploy.serving.versions import rollback as roll_back

    with progress_lines(as_json) as progress:
        report = roll_back(directory, system, url, progress)
    emit(report, as_json)
