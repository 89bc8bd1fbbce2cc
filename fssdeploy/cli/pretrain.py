"""`fssdeploy pretrain`: small encoders of our own, on the base classes of a fold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fssdeploy.cli.common import Json
from fssdeploy.cli.runs import (
    DataDir,
    DatasetName,
    Fold,
    LogEvery,
    Options,
    Out,
    Phases,
    SaveEvery,
    Seed,
    Started,
    Threads,
    Workers,
    train,
)

if TYPE_CHECKING:
    from fssdeploy.data.dataset import Dataset
    from fssdeploy.training.recipe import Recipe

pretrain_app = typer.Typer(help="Train a small encoder on the base classes of a fold.", no_args_is_help=True)
Pictures = Annotated[int | None, typer.Option(help="Use at most so many pictures, evenly over the list.")]


@pretrain_app.command()
def dino(
    dataset: DatasetName = "shapes-5i",
    data_dir: DataDir = None,
    fold: Fold = 0,
    preset: Annotated[str, typer.Option(help="Whose encoder: tiny, small, base or large.")] = "tiny",
    pictures: Pictures = None,
    out: Out = Path("runs/dino"),
    phases: Phases = None,
    seed: Seed = 0,
    options: Options = None,
    workers: Workers = 1,
    threads: Threads = None,
    log_every: LogEvery = 20,
    save_every: SaveEvery = 200,
    as_json: Json = False,
) -> None:
    """A DINOv2-style ViT, by dense labels of the base classes. Writes OUT/encoder.safetensors, official names."""
    started = Started(
        dataset, data_dir, fold, out, phases, seed, options, workers, threads, log_every, save_every, as_json
    )

    def make(opened: Dataset) -> Recipe:
        from fssdeploy.cli.export import configure
        from fssdeploy.training import defaults
        from fssdeploy.training.dino import DinoRecipe
        from fssdeploy.training.pictures import BasePictures

        configure("fsdino", preset)  # for its error
        settings = started.adjust(defaults.dino(preset))
        shown = BasePictures(opened, fold, pictures)
        return DinoRecipe(shown, settings, {**started.origin(), "pictures": len(shown.items)})

    def keep(recipe: Recipe, folder: Path, metadata: dict[str, str]) -> Path:
        from fssdeploy.training.dino import WordObjective
        from fssdeploy.weights.dinov2 import save_dinov2

        file = folder / "encoder.safetensors"
        save_dinov2(cast(WordObjective, recipe.objective).encoder, file, metadata)
        return file

    train(started, make, keep)


@pretrain_app.command()
def sam(
    dataset: DatasetName = "shapes-5i",
    data_dir: DataDir = None,
    fold: Fold = 0,
    preset: Annotated[str, typer.Option(help="tiny, vit_b, vit_l or vit_h.")] = "tiny",
    pictures: Pictures = None,
    out: Out = Path("runs/sam"),
    phases: Phases = None,
    seed: Seed = 0,
    options: Options = None,
    workers: Workers = 1,
    threads: Threads = None,
    log_every: LogEvery = 20,
    save_every: SaveEvery = 200,
    as_json: Json = False,
) -> None:
    """A promptable SAM (points, boxes, masks), by the objects of the base classes. Writes OUT/sam.safetensors."""
    started = Started(
        dataset, data_dir, fold, out, phases, seed, options, workers, threads, log_every, save_every, as_json
    )

    def make(opened: Dataset) -> Recipe:
        from fssdeploy.training import defaults
        from fssdeploy.training.pictures import BasePictures
        from fssdeploy.training.sam import SamRecipe

        settings = started.adjust(defaults.sam(preset))
        shown = BasePictures(opened, fold, pictures)
        return SamRecipe(shown, settings, {**started.origin(), "pictures": len(shown.items)})

    def keep(recipe: Recipe, folder: Path, metadata: dict[str, str]) -> Path:
        from fssdeploy.training.sam import PromptObjective
        from fssdeploy.weights.sam import save_sam

        file = folder / "sam.safetensors"
        save_sam(cast(PromptObjective, recipe.objective).sam, file, metadata)
        return file

    train(started, make, keep)
