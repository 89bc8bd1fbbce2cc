"""`fssdeploy batch`: label folders and run large evaluations, shared among processes and machines, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import BankDir, Json, Runtime, emit, progress_lines, say_error
from fssdeploy.cli.evaluate import SPACES, chosen_runtime, drawn_lists, from_artifact, given_list
from fssdeploy.cli.segment import enrolled
from fssdeploy.errors import InputError
from fssdeploy.report import Report

batch_app = typer.Typer(
    help="Label folders and run large evaluations, shared among processes and machines; the same command continues.",
    no_args_is_help=True,
)

ArtifactDir = Annotated[Path, typer.Option(help="Directory written by fssdeploy export.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory of all results, and to continue in.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes; default: one for each core, at most 8.")]
Threads = Annotated[int | None, typer.Option(help="Threads of each worker; default: the cores divided by --workers.")]
ShardOption = Annotated[str, typer.Option("--shard", help="I/N: this machine takes every N-th item, from the I-th.")]
Backend = Annotated[str, typer.Option(help="local (processes of this machine) or ray.")]


@batch_app.command("segment")
def batch_segment(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, and folders that hold some.")],
    artifact: ArtifactDir,
    bank: BankDir,
    out: Out,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="NAME[,NAME2...], from the bank; default: all. May be repeated.")
    ] = None,
    overlays: Annotated[bool, typer.Option(help="Write an overlay for each picture.")] = True,
    workers: Workers = None,
    threads: Threads = None,
    shard: ShardOption = "1/1",
    backend: Backend = "local",
    runtime: Runtime = "onnxruntime",
    as_json: Json = False,
) -> None:
    """Segment PICTURES with enrolled classes, as fssdeploy segment does, into one directory with one manifest."""
    from fssdeploy.artifact import Artifact, load
    from fssdeploy.batch.run import Means
    from fssdeploy.batch.segment import segment_batch
    from fssdeploy.images.pictures import find_pictures

    means = Means.choose(workers, threads, shard, backend)
    opened = Artifact.open(artifact)
    files = find_pictures(pictures)
    with progress_lines(as_json) as progress:
        progress("loading")
        states = enrolled(bank, load(artifact, runtime, threads=means.threads), classes)
        report, error = segment_batch(opened, runtime, states, files, out, means, overlays=overlays, progress=progress)
    _finish(report, error, as_json)


@batch_app.command("evaluate")
def batch_evaluate(
    system: Annotated[str, typer.Argument(help="The system to evaluate: fsdino.")],
    dataset: Annotated[str, typer.Option(help="shapes-5i, pascal-5i, coco-20i, ...")],
    artifact: ArtifactDir,
    out: Out,
    data_dir: Annotated[Path | None, typer.Option(help="Directory of the data set; shapes-5i needs none.")] = None,
    fold: Annotated[str | None, typer.Option(help="A number, or all (the default): every fold and their mean.")] = None,
    shot: Annotated[int | None, typer.Option(help="Support pictures in an episode; default: 1.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Episodes in a fold; default: the published protocol's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the episodes and the intervals; default: 0.")] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="The episodes of an earlier run, instead of drawing them.")
    ] = None,
    space: Annotated[
        str, typer.Option(help="Measure on the original picture, or on the network's canvas.")
    ] = "original",
    workers: Workers = None,
    threads: Threads = None,
    shard: ShardOption = "1/1",
    backend: Backend = "local",
    runtime: Annotated[str, typer.Option(help="onnx or openvino.")] = "onnx",
    as_json: Json = False,
) -> None:
    """Evaluate the artifact of SYSTEM on the episodes of a data set, with the numbers of fssdeploy evaluate."""
    from fssdeploy.batch.evaluate import evaluate_batch
    from fssdeploy.batch.run import Means
    from fssdeploy.data import open_dataset
    from fssdeploy.evaluation.run import Run

    means = Means.choose(workers, threads, shard, backend)
    engine = chosen_runtime(runtime, artifact)
    if space not in SPACES:
        raise InputError("usage", f"there is no space '{space}'", "", f"Choose {' or '.join(SPACES)}.")
    opened = open_dataset(dataset, data_dir)
    lists = (
        [given_list(list_file, opened, fold, shot, episodes, seed)]
        if list_file
        else drawn_lists(opened, fold or "all", 1 if shot is None else shot, episodes, seed or 0)
    )
    with progress_lines(as_json) as progress:
        progress("loading")
        subject = from_artifact(system, artifact, engine, means.threads)
        run = Run(subject, opened, lists, on_canvas=space == "canvas", out=out, progress=progress)
        report, error = evaluate_batch(run, artifact, data_dir, out, means)
    _finish(report, error, as_json)


def _finish(report: Report, error: InputError | None, as_json: bool) -> None:
    """Print the report; then, if items failed, say so and leave with the error's exit code."""
    if not error:
        emit(report, as_json)
        return
    report.data["error"] = error.to_dict()
    emit(report, as_json)
    say_error(error)
    raise typer.Exit(error.exit_code)
