"""`fssdeploy data`: look after data sets on disk. Works on the base install."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from fssdeploy.cli.common import Json, emit, emit_failed, progress_lines
from fssdeploy.errors import CheckFailedError, InputError

data_app = typer.Typer(help="Look after data sets: check, list episodes, prepare.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="DATASET", help="pascal-5i, coco-20i, fss-1000, folder, ...")]
Directory = Annotated[Path | None, typer.Argument(metavar="DIR", help="Its directory; shapes-5i needs none.")]


@data_app.command()
def check(name: Name, directory: Directory = None, as_json: Json = False) -> None:
    """Say what of a data set is there, what is missing and where it comes from."""
    from fssdeploy.data import open_dataset
    from fssdeploy.data.dataset import Finding
    from fssdeploy.report import Report, Table

    notes: list[str] = []
    with progress_lines(as_json) as progress:
        progress(f"checking {name}")
        try:
            dataset = open_dataset(name, directory)
            findings, notes = dataset.check(), list(dataset.notes)
        except InputError as error:
            if error.code != "data_missing" or directory is None:
                raise
            findings = [Finding(error.what, "missing", error.why, error.fix)]
    missing = [finding.what for finding in findings if finding.state == "missing"]
    rows = [[each.what, each.state, each.detail, "" if each.state == "ok" else each.source] for each in findings]
    data = {"dataset": name, "directory": directory, "complete": not missing, "findings": [*map(asdict, findings)]}
    facts = {"data set": name, "directory": directory, "complete": not missing}
    report = Report(f"data check {name}", facts, [Table("", ["what", "state", "detail", "source"], rows)], notes, data)
    if not missing:
        emit(report, as_json)
        return
    failure = CheckFailedError(
        "data_incomplete",
        f"{name} cannot be used as it is",
        "; ".join(missing),
        "See the report for what to do.",
    )
    emit_failed(report, failure, as_json)


@data_app.command()
def episodes(
    name: Name,
    out: Annotated[Path, typer.Option(help="The list to write, JSON lines.")],
    directory: Directory = None,
    fold: Annotated[int, typer.Option(help="The fold.")] = 0,
    shot: Annotated[int, typer.Option(help="Support pictures of an episode.")] = 1,
    count: Annotated[
        int | None, typer.Option("--episodes", min=1, help="How many; default: as many as the published protocol.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    split: Annotated[Literal["train", "test"], typer.Option(help="Classes to train on, or those to test.")] = "test",
    as_json: Json = False,
) -> None:
    """Draw a list of episodes, which reproduces an evaluation anywhere."""
    from fssdeploy.data import open_dataset
    from fssdeploy.data.episodes import EpisodeList
    from fssdeploy.report import Report

    with progress_lines(as_json) as progress:
        progress(f"opening {name}")
        dataset = open_dataset(name, directory)
        dataset.check_fold(fold)
        progress("drawing episodes")
        if split == "test":
            drawn = dataset.test_list(fold, shot, count, seed)
        else:
            total = dataset.test_episodes if count is None else count
            drawn = [dataset.episode(fold, split, shot, seed, index) for index in range(total)]
        EpisodeList(dataset.name, fold, shot, seed, tuple(drawn)).save(out)
    classes = len({episode.class_index for episode in drawn})
    facts = {"data set": name, "fold": fold, "split": split, "shot": shot, "seed": seed}
    facts |= {"episodes": len(drawn), "classes": classes, "list": out}
    data = {"dataset": name, **{key: value for key, value in facts.items() if key != "data set"}}
    emit(Report("episodes", facts, [], list(dataset.notes), data), as_json)


@data_app.command()
def prepare(
    name: Annotated[Literal["deepglobe"], typer.Argument(metavar="DATASET", help="deepglobe.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The download: ID_sat.jpg and ID_mask.png.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    as_json: Json = False,
) -> None:
    """Turn a download into the layout that is read: cut DeepGlobe into tiles."""
    from fssdeploy.data.deepglobe import cut_tiles
    from fssdeploy.report import Report

    with progress_lines(as_json) as progress:
        tiles = cut_tiles(source, target, progress)
    emit(Report("prepared", {"directory": target, **tiles}, [], [], {"directory": target, "tiles": tiles}), as_json)
