"""Filling Matcher from checkpoint files, and the record of what came from where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fssdeploy.systems.gfsam import GFSamNetworks
from fssdeploy.systems.matcher import MatcherNetworks
from fssdeploy.weights import gfsam
from fssdeploy.weights.provenance import Provenance


def fill(model: MatcherNetworks, files: Sequence[str | Path], untrained_seed: int | None) -> Provenance:
    """Load DINOv2 and SAM checkpoints, as `fssdeploy.weights.gfsam.fill` does: the networks have the same parts."""
    return gfsam.fill(cast(GFSamNetworks, model), files, untrained_seed)
