"""Weights that this project trained itself and the artifact exported from them, once `make weights` has made them.

Never imports torch: the artifact runs on the base install.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
# What the weights are for; presets that are not here need weights of the user's.
PRESETS = ("tiny",)
# Whose weights the systems consist of: training-free ones have none of their own.
_SOURCES = {
    "fsdino": ("fsdino",),
    "gfsam": ("fsdino", "sam"),
    "matcher": ("fsdino", "sam"),
    "persam": ("sam",),
}


def artifact() -> Path | None:
    """The exported fsdino-tiny, None if this installation lacks it."""
    folder = FOLDER / "fsdino-tiny"
    return folder if (folder / "manifest.json").exists() else None


def checkpoints(system: str, preset: str) -> list[Path]:
    """The files whose weights make up a preset of a system, an empty list if there are not all of them."""
    names = _SOURCES.get(system, ()) if preset in PRESETS else ()
    files = [checkpoint(f"{name}-{preset}") for name in names]
    return [file for file in files if file] if all(files) else []


def checkpoint(name: str) -> Path | None:
    """The weights called `name` (fsdino-tiny, sam-tiny) as safetensors, None if there are none."""
    file = FOLDER / f"{name}.safetensors"
    return file if file.exists() else None
