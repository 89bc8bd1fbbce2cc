"""Named recipes: what the paper trained with, and what our tiny preset trains with in an hour on two CPU cores."""

from __future__ import annotations

from fssdeploy.data.dataset import Dataset
from fssdeploy.errors import InputError
from fssdeploy.modules.sam import PRESETS as SAM_PRESETS
from fssdeploy.systems.fsdino import PRESETS, FSDinoConfig
from fssdeploy.training.augment import Augmentation
from fssdeploy.training.dino import DinoSettings
from fssdeploy.training.episodic import EpisodicSettings
from fssdeploy.training.pictures import BasePictures
from fssdeploy.training.recipe import RunSettings
from fssdeploy.training.sam import SamSettings
from fssdeploy.training.schedule import Phase

RECIPES = ("paper", "tiny")
# Epochs of episodic training (FS-DINO, section 4.1).
_EPOCHS = {"pascal-5i": 100, "coco-20i": 50}


def dino(preset: str) -> DinoSettings:
    return DinoSettings(encoder=PRESETS[preset].encoder)


def sam(preset: str) -> SamSettings:
    """Only our tiny SAM is pre-trained here: the published sizes come trained."""
    if preset not in SAM_PRESETS:
        raise InputError("preset_unknown", f"there is no SAM '{preset}'", "", f"Choose from: {', '.join(SAM_PRESETS)}.")
    return SamSettings(network=SAM_PRESETS[preset])


def distill(recipe: str, config: FSDinoConfig, pictures: BasePictures) -> RunSettings:
    """The paper: 15 epochs each at a quarter, a half and the whole of the grid, batch 8 (section 4.1)."""
    patch, grid = config.encoder.patch, config.grid
    sizes = [patch * max(2, grid // 4), patch * max(2, grid // 2), patch * grid]
    if recipe == "paper":
        steps = max(1, 15 * len(pictures.items) // 8)
        return RunSettings(phases=tuple(Phase(steps, 8, size) for size in sizes))
    return RunSettings(phases=tuple(Phase(500, 16, size) for size in sizes), precision="bf16")


def episodic(recipe: str, config: FSDinoConfig, dataset: Dataset, fold: int) -> EpisodicSettings:
    """The paper: 100 epochs on PASCAL-5i and 50 elsewhere, batch 8, rate 1e-3, HDMNet's augmentation (section 4.1)."""
    if recipe == "paper":
        entries = sum(len(items) for items in dataset.listing(fold, "train").values())
        steps = max(1, _EPOCHS.get(dataset.name, 50) * entries // 8)
        return EpisodicSettings(phases=(Phase(steps, 8, config.image_size),))
    # Objects that are turned already gain nothing from a rotation.
    return EpisodicSettings(
        phases=(Phase(4000, 8, config.image_size),),
        precision="bf16",
        ema=0.998,
        augmentation=Augmentation((0.9, 1.2), 0.0, 0.2, 0.5),
    )
