"""`fssdeploy pretrain`: small encoders of our own, on the base classes of a fold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fssdeploy.cli import runs
from fssdeploy.cli.common import Json

if TYPE_CHECKING:
    from fssdeploy.data.dataset import Dataset
    from fssdeploy.training.recipe import Recipe

pretrain_app = typer.Typer(help="Train a small encoder on the base classes of a fold.", no_args_is_help=True)
Pictures = Annotated[int | None, typer.Option(help="Use at most so many pictures, evenly over the list.")]


@pretrain_app.command()
def dino(
    dataset: runs.DatasetName = "shapes-5i",
    data_dir: runs.DataDir = None,
    fold: runs.Fold = 0,
    preset: Annotated[str, typer.Option(help="Whose encoder: tiny, small, base or large.")] = "tiny",
    pictures: Pictures = None,
    out: runs.Out = Path("runs/dino"),
    phases: runs.Phases = None,
    seed: runs.Seed = 0,
    options: runs.Options = None,
    workers: runs.Workers = 1,
    threads: runs.Threads = None,
    log_every: runs.LogEvery = 20,
    save_every: runs.SaveEvery = 200,
    as_json: Json = False,
) -> None:
    """A DINOv2-style ViT, by dense labels of the base classes. Writes OUT/encoder.safetensors, official names."""
    started = runs.Started(
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

    runs.train(started, make, keep)


@pretrain_app.command()
def sam(
    dataset: runs.DatasetName = "shapes-5i",
    data_dir: runs.DataDir = None,
    fold: runs.Fold = 0,
    preset: Annotated[str, typer.Option(help="tiny, vit_b, vit_l or vit_h.")] = "tiny",
    pictures: Pictures = None,
    weights: Annotated[
        Path | None, typer.Option(help="Begin with the weights of this SAM, not with random ones.")
    ] = None,
    every_mask: Annotated[
        bool,
        typer.Option("--every-mask", help="Teach the single mask and the three alike, as training-free systems ask."),
    ] = False,
    out: runs.Out = Path("runs/sam"),
    phases: runs.Phases = None,
    seed: runs.Seed = 0,
    options: runs.Options = None,
    workers: runs.Workers = 1,
    threads: runs.Threads = None,
    log_every: runs.LogEvery = 20,
    save_every: runs.SaveEvery = 200,
    as_json: Json = False,
) -> None:
    """A promptable SAM (points, boxes, masks), by the objects of the base classes. Writes OUT/sam.safetensors."""
    started = runs.Started(
        dataset, data_dir, fold, out, phases, seed, options, workers, threads, log_every, save_every, as_json
    )

    def make(opened: Dataset) -> Recipe:
        from fssdeploy.training import defaults
        from fssdeploy.training.pictures import BasePictures
        from fssdeploy.training.sam import PromptObjective, SamRecipe
        from fssdeploy.weights.checkpoint import read_checkpoint
        from fssdeploy.weights.sam import load_sam

        settings = started.adjust(replace(defaults.sam(preset), every_mask=every_mask))
        shown = BasePictures(opened, fold, pictures)
        origin = {**started.origin(), "pictures": len(shown.items)}
        if weights is None:
            return SamRecipe(shown, settings, origin)
        begin = read_checkpoint(weights)
        recipe = SamRecipe(shown, settings, {**origin, "weights": begin.sha256})
        load_sam(cast(PromptObjective, recipe.objective).sam, begin)
        return recipe

    def keep(recipe: Recipe, folder: Path, metadata: dict[str, str]) -> Path:
        from fssdeploy.training.sam import PromptObjective
        from fssdeploy.weights.sam import save_sam

        file = folder / "sam.safetensors"
        save_sam(cast(PromptObjective, recipe.objective).sam, file, metadata)
        return file

    runs.train(started, make, keep)
