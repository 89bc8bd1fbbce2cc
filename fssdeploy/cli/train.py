"""`fssdeploy train`: a system's own training, on the base classes of a fold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fssdeploy.cli import runs
from fssdeploy.cli.common import Json
from fssdeploy.cli.distill import chosen_recipe
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.data.dataset import Dataset
    from fssdeploy.training.recipe import Recipe


def train_system(
    system: Annotated[str, typer.Argument(help="fsdino.")],
    weights: Annotated[
        list[Path], typer.Option(help="Where it starts: DINOv2 encoder, SAM decoder, distilled adapter; one each.")
    ],
    dataset: runs.DatasetName = "shapes-5i",
    data_dir: runs.DataDir = None,
    fold: runs.Fold = 0,
    preset: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "tiny",
    recipe: Annotated[str | None, typer.Option(help="paper or tiny; default: tiny for the tiny preset.")] = None,
    variant: Annotated[str | None, typer.Option(help="full, or compact (no 4D correlation).")] = None,
    model_options: Annotated[
        list[str] | None,
        typer.Option("--model", help="An open choice: NAME=VALUE (train_adapter=true, svp=none, ...)."),
    ] = None,
    out: runs.Out = Path("runs/fsdino"),
    phases: runs.Phases = None,
    seed: runs.Seed = 0,
    options: runs.Options = None,
    workers: runs.Workers = 1,
    threads: runs.Threads = None,
    log_every: runs.LogEvery = 20,
    save_every: runs.SaveEvery = 200,
    as_json: Json = False,
) -> None:
    """Train the segmenter of SYSTEM on episodes of base classes. Writes OUT/fsdino.safetensors."""
    if system != "fsdino":
        raise InputError("system_unknown", f"'{system}' cannot be trained", "", "Choose from: fsdino.")
    started = runs.Started(
        dataset, data_dir, fold, out, phases, seed, options, workers, threads, log_every, save_every, as_json
    )

    def make(opened: Dataset) -> Recipe:
        import torch

        from fssdeploy.cli.export import configure
        from fssdeploy.systems import fsdino
        from fssdeploy.training import defaults
        from fssdeploy.training.episodic import EpisodicRecipe
        from fssdeploy.weights.fsdino import fill

        config = configure("fsdino", preset, variant=variant, options=model_options)
        settings = started.adjust(defaults.episodic(chosen_recipe(recipe, preset), config, opened, fold))
        torch.manual_seed(settings.seed)
        model = fsdino.build(config)
        # What no checkpoint is published for; a decoder from scratch is a choice, an adapter or encoder a mistake.
        sources = fill(model, weights, None, to_train=("svp", "correlation", "dense_prompt", "position", "decoder"))
        origin = {**started.origin(), "weights": [each["sha256"] for each in sources.sources]}
        return EpisodicRecipe(opened, fold, model, settings, origin)

    def keep(recipe: Recipe, folder: Path, metadata: dict[str, str]) -> Path:
        from fssdeploy.training.episodic import EpisodicObjective
        from fssdeploy.weights.fsdino import save_checkpoint

        file = folder / "fsdino.safetensors"
        save_checkpoint(cast(EpisodicObjective, recipe.objective).model, file, metadata)
        return file

    runs.train(started, make, keep)
