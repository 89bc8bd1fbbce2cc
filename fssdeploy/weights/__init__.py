"""Checkpoint families: safe reading, key maps, strict loading, provenance."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from fssdeploy.weights.provenance import Provenance


def fill(system: str, model: torch.nn.Module, files: Sequence[str | Path], untrained_seed: int | None) -> Provenance:
    """Load checkpoint files into the network of a system; see ``fssdeploy/weights/<system>.py``."""
    provenance: Provenance = importlib.import_module(f"fssdeploy.weights.{system}").fill(model, files, untrained_seed)
    return provenance
