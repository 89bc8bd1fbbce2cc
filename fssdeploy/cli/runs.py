"""What the training verbs share: options, the run on this machine, the report at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fssdeploy.cli.common import emit, progress_lines
from fssdeploy.cli.export import require_export_extra
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.data.dataset import Dataset
    from fssdeploy.training.recipe import Recipe

DatasetName = Annotated[str, typer.Option("--dataset", help="shapes-5i, pascal-5i, coco-20i, ...")]
DataDir = Annotated[
    Path | None, typer.Option(help="Directory of the data set; for shapes-5i: where rendered pictures are kept.")
]
Fold = Annotated[int, typer.Option(help="The fold that is held out: only its base classes are seen.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory of the run; the same command continues it.")]
Phases = Annotated[str | None, typer.Option(help="STEPSxBATCHxSIZE, several with commas; default: the recipe's.")]
Seed = Annotated[int, typer.Option(help="Of weights, examples and augmentation.")]
Options = Annotated[list[str] | None, typer.Option("--set", help="A setting of the run: NAME=VALUE.")]
Workers = Annotated[int, typer.Option(help="Processes that load pictures, for each training process.")]
Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch; default: the cores this process may use.")]
LogEvery = Annotated[int, typer.Option(help="Steps between two lines of the log.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between two checkpoints.")]

_S = TypeVar("_S")


@dataclasses.dataclass(frozen=True)
class Started:
    """The common options of a training verb."""

    dataset: str
    data_dir: Path | None
    fold: int
    out: Path
    phases: str | None
    seed: int
    options: list[str] | None
    workers: int
    threads: int | None
    log_every: int
    save_every: int
    as_json: bool

    def open_dataset(self) -> Dataset:
        from fssdeploy.data import open_dataset

        return open_dataset(self.dataset, self.data_dir)

    def origin(self) -> dict[str, Any]:
        """What goes into the record of the run beside the recipe's own settings."""
        return {"dataset": self.dataset, "fold": self.fold}

    def adjust(self, settings: _S) -> _S:
        """A recipe's settings with what the command line changes. InputError for an unknown name or value."""
        from fssdeploy.training.schedule import parse_phases

        changes: dict[str, object] = {"seed": self.seed}
        if self.phases:
            changes["phases"] = parse_phases(self.phases)
        fields = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}  # type: ignore[arg-type]
        settable = sorted(name for name, value in fields.items() if type(value) in (int, float, str))
        for option in self.options or []:
            name, _, text = option.partition("=")
            if name not in settable:
                fix = f"Choose from: {', '.join(settable)}."
                raise InputError("option_unknown", f"there is no setting '{name}'", "", fix)
            try:
                changes[name] = type(fields[name])(text)
            except ValueError as error:
                raise InputError("option_unknown", f"{name} cannot be '{text}'") from error
        return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def train(
    started: Started, make: Callable[[Dataset], Recipe], keep: Callable[[Recipe, Path, dict[str, str]], Path]
) -> None:
    """Run a recipe to its end and write its weights, plot and report; `make` builds it, `keep` writes the result."""
    require_export_extra()
    threads = 1 if started.threads is None else started.threads
    if min(started.log_every, started.save_every, threads) < 1 or started.workers < 0:
        raise InputError("usage", "--log-every, --save-every and --threads are at least 1, --workers at least 0")
    with progress_lines(started.as_json) as progress:
        progress("loading PyTorch")
        import json
        import os

        import torch

        from fssdeploy.engines import available_cores
        from fssdeploy.files import made_folder
        from fssdeploy.report import Report
        from fssdeploy.training.loop import machine, run

        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(started.threads or max(1, available_cores() // local))
        recipe = make(started.open_dataset())
        with made_folder(started.out), machine(started.workers) as here:
            outcome = run(
                recipe, started.out, here, progress, log_every=started.log_every, save_every=started.save_every
            )
            if not here.leads:
                return
        from fssdeploy.training.plot import plot_run

        settings = json.dumps(recipe.settings(), sort_keys=True, default=str)
        weights = keep(recipe, started.out, {"recipe": recipe.name, "settings": settings})
        plot = plot_run(started.out, f"{recipe.name}, {started.dataset} fold {started.fold}")
        facts: dict[str, object] = {
            "weights": str(weights),
            "steps in this run": outcome.steps,
            "time of this run": f"{outcome.seconds:.0f} s",
            "examples skipped": outcome.skipped,
            **{f"last {name}": round(value, 4) for name, value in outcome.last.items()},
            "plot": str(plot),
        }
        data = {"weights": str(weights), "steps": outcome.steps, "seconds": outcome.seconds, **outcome.last}
        report = Report(recipe.name, facts, [], [], {**data, "skipped": outcome.skipped, "plot": str(plot)})
    emit(report, started.as_json)
