"""`fssdeploy batch`: label folders and run large evaluations, shared among processes and machines, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssdeploy.cli.common import (
    BankDir,
    Boost,
    BoostSet,
    Json,
    Runtime,
    boost_options,
    emit,
    emit_failed,
    progress_lines,
)
from fssdeploy.cli.evaluate import (
    DataDir,
    DatasetName,
    Episodes,
    Fold,
    ListFile,
    Seed,
    Shot,
    Space,
    System,
    check_space,
    chosen_lists,
    chosen_runtime,
    from_artifact,
)
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
    boost: Boost = None,
    boost_set: BoostSet = None,
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
    options = boost_options(boost, boost_set)
    opened = Artifact.open(artifact)
    files = find_pictures(pictures)
    with progress_lines(as_json) as progress:
        progress("loading")
        system = load(artifact, runtime, threads=means.threads)
        if options:
            from fssdeploy.glue.gsm.hosts import gsm

            gsm(system, options)  # whether it can be boosted is better known before the workers start
        states = enrolled(bank, system, classes)
        report, error = segment_batch(
            opened, runtime, states, files, out, means, overlays=overlays, boost=options, progress=progress
        )
    _finish(report, error, as_json)


@batch_app.command("evaluate")
def batch_evaluate(
    system: System,
    dataset: DatasetName,
    artifact: ArtifactDir,
    out: Out,
    data_dir: DataDir = None,
    fold: Fold = None,
    shot: Shot = None,
    episodes: Episodes = None,
    seed: Seed = None,
    list_file: ListFile = None,
    space: Space = "original",
    boost: Boost = None,
    boost_set: BoostSet = None,
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
    check_space(space)
    options = boost_options(boost, boost_set)
    opened = open_dataset(dataset, data_dir)
    lists = chosen_lists(opened, list_file, fold, shot, episodes, seed)
    with progress_lines(as_json) as progress:
        progress("loading")
        subject = from_artifact(system, artifact, engine, means.threads)
        if options:
            subject = subject.boosted(options)
        run = Run(subject, opened, lists, on_canvas=space == "canvas", out=out, progress=progress)
        report, error = evaluate_batch(run, artifact, data_dir, out, means)
    _finish(report, error, as_json)


def _finish(report: Report, error: InputError | None, as_json: bool) -> None:
    """Print the report; then, if items failed, say so and leave with the error's exit code."""
    if error:
        emit_failed(report, error, as_json)
    emit(report, as_json)
