"""The systems this project deploys, by name, and what the file of each offers."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

import torch

from fssdeploy.errors import InputError
from fssdeploy.protocol import StageSpec

SYSTEMS = ("fsdino", "gfsam", "matcher", "persam")


class SystemFile(Protocol):
    """The names that ``fssdeploy/systems/<name>.py`` defines; a configuration is a dataclass with `to_dict`."""

    NAME: str
    PRESETS: dict[str, Any]
    # Stages in which ONNX Runtime's fused attention is faster.
    FUSED_STAGES: tuple[str, ...]
    # Prefixes of the parameters that features and class states depend on: what a bank is bound to.
    STATE_PARAMETERS: tuple[str, ...]

    def build(self, config: Any) -> torch.nn.Module:
        """The network of a configuration, without weights of any meaning."""

    def specs(self, config: Any) -> dict[str, StageSpec]:
        """The contracts of its stages, in the order they run."""

    def preprocessing(self, config: Any) -> dict[str, Any]:
        """How pictures become the encoder's input: canvas, patch, geometry."""

    def reference_stages(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The stages over the network itself, in float32."""

    def stages(self, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        """Copies of the stages as they are exported, computing in `dtype`."""

    def initialise_untrained(self, model: torch.nn.Module, seed: int) -> None:
        """Fill every parameter from a seed."""

    def stage_parameters(self, model: torch.nn.Module, stage: str) -> int:
        """Parameters that end up in the graph of a stage."""


def get_system(name: str) -> SystemFile:
    """The file of a system. InputError for an unknown name."""
    if name not in SYSTEMS:
        raise InputError("system_unknown", f"there is no system '{name}'", "", f"Choose from: {', '.join(SYSTEMS)}.")
    return cast(SystemFile, importlib.import_module(f"fssdeploy.systems.{name}"))
