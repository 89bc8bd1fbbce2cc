"""Where a network's weights came from, and the fingerprint that banks are bound to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Provenance:
    """Where a network's weights came from. `status`: "trained", "partial" (some groups untrained) or "untrained"."""

    status: str
    untrained_groups: list[str]
    seed: int | None
    sources: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def fingerprint(model: torch.nn.Module, config: Mapping[str, Any], parameters: tuple[str, ...]) -> str:
    """sha256 over the configuration and the weights whose names begin with `parameters`, as float32."""
    state = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(parameters):
            state.update(name.encode())
            state.update(tensor.float().contiguous().numpy().tobytes())
    return state.hexdigest()
