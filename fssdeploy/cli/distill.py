"""`fssdeploy distill`: SAM's image encoder into FS-DINO's adapter, from coarse to fine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fssdeploy.cli import runs
from fssdeploy.cli.common import Json
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.data.dataset import Dataset
    from fssdeploy.modules.sam import Sam
    from fssdeploy.training.recipe import Recipe


def distill(
    system: Annotated[str, typer.Argument(help="fsdino.")],
    encoder: Annotated[Path, typer.Option(help="DINOv2 checkpoint: the student's encoder, which stays as it is.")],
    teacher: Annotated[Path, typer.Option(help="SAM checkpoint: its image encoder is the teacher.")],
    dataset: runs.DatasetName = "shapes-5i",
    data_dir: runs.DataDir = None,
    fold: runs.Fold = 0,
    preset: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "tiny",
    recipe: Annotated[str | None, typer.Option(help="paper or tiny; default: tiny for the tiny preset.")] = None,
    pictures: Annotated[int | None, typer.Option(help="Use at most so many pictures, evenly over the list.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Directory of the teacher's features; default: OUT/teacher.")
    ] = None,
    model_options: Annotated[list[str] | None, typer.Option("--model", help="An open choice: NAME=VALUE.")] = None,
    out: runs.Out = Path("runs/distill"),
    phases: runs.Phases = None,
    seed: runs.Seed = 0,
    options: runs.Options = None,
    workers: runs.Workers = 1,
    threads: runs.Threads = None,
    log_every: runs.LogEvery = 20,
    save_every: runs.SaveEvery = 200,
    as_json: Json = False,
) -> None:
    """Teach the adapter of SYSTEM the embeddings of SAM. Writes OUT/adapter.safetensors."""
    _only_fsdino(system)
    started = runs.Started(
        dataset, data_dir, fold, out, phases, seed, options, workers, threads, log_every, save_every, as_json
    )

    def make(opened: Dataset) -> Recipe:
        import torch

        from fssdeploy.cli.export import configure
        from fssdeploy.systems import fsdino
        from fssdeploy.training import defaults
        from fssdeploy.training.distill import DistillRecipe
        from fssdeploy.training.pictures import BasePictures
        from fssdeploy.weights.checkpoint import read_checkpoint
        from fssdeploy.weights.dinov2 import load_dinov2

        config = configure("fsdino", preset, options=model_options)
        shown = BasePictures(opened, fold, pictures)
        settings = started.adjust(defaults.distill(chosen_recipe(recipe, preset), config, shown))
        torch.manual_seed(settings.seed)
        student = fsdino.build(config)
        source = read_checkpoint(encoder)
        load_dinov2(student.encoder, source)
        origin = {**started.origin(), "pictures": len(shown.items), "encoder": source.sha256}
        folder = cache or out / "teacher"
        return DistillRecipe(shown, student, _open_teacher(teacher), folder, settings, origin)

    def keep(recipe: Recipe, folder: Path, metadata: dict[str, str]) -> Path:
        from fssdeploy.training.distill import DistillObjective
        from fssdeploy.weights.fsdino import save_group

        file = folder / "adapter.safetensors"
        save_group(cast(DistillObjective, recipe.objective).student, "adapter", file, metadata)
        return file

    runs.train(started, make, keep)


def chosen_recipe(asked: str | None, preset: str) -> str:
    """The recipe of the command line, by default that of the preset. InputError for an unknown one."""
    from fssdeploy.training.defaults import RECIPES

    name = asked or ("tiny" if preset == "tiny" else "paper")
    if name not in RECIPES:
        raise InputError("option_unknown", f"there is no recipe '{name}'", "", f"Choose from: {', '.join(RECIPES)}.")
    return name


def _only_fsdino(system: str) -> None:
    if system != "fsdino":
        raise InputError("system_unknown", f"'{system}' has nothing to distil", "", "Choose from: fsdino.")


def _open_teacher(path: Path) -> Sam:
    """The SAM of a checkpoint, its size told by the width of the encoder."""
    from fssdeploy.modules.sam import PRESETS, Sam
    from fssdeploy.weights.checkpoint import read_checkpoint
    from fssdeploy.weights.sam import load_sam, sam_size

    checkpoint = read_checkpoint(path)
    size = sam_size(checkpoint)
    if size not in PRESETS:
        raise InputError(
            "checkpoint_architecture", f"'{path}' is no SAM of a known size", "", f"Known: {', '.join(PRESETS)}."
        )
    teacher = Sam(PRESETS[size])
    load_sam(teacher, checkpoint)
    return teacher
