"""The systems this project deploys, by name."""

from __future__ import annotations

import importlib
from types import ModuleType

from fssdeploy.errors import InputError

SYSTEMS = ("fsdino",)


def get_system(name: str) -> ModuleType:
    """The module of a system: its presets, model and stages. Needs torch. InputError for an unknown name."""
    if name not in SYSTEMS:
        raise InputError("system_unknown", f"there is no system '{name}'", "", f"Choose from: {', '.join(SYSTEMS)}.")
    return importlib.import_module(f"fssdeploy.systems.{name}")
