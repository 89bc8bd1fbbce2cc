"""Stages as PyTorch modules: the reference that exported graphs are held against, and the engine of research."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fssdeploy.protocol import StageSpec


class TorchEngine:
    """Runs modules whose forward takes the spec's inputs in order and returns its outputs in order."""

    name = "torch"

    def __init__(
        self, modules: Mapping[str, torch.nn.Module], specs: Mapping[str, StageSpec], device: str = "cpu"
    ) -> None:
        self.specs = dict(specs)
        self._device = torch.device(device)
        self._modules = {name: module.to(self._device).eval() for name, module in modules.items()}

    @torch.inference_mode()
    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of one stage by name; inputs must follow its spec."""
        spec = self.specs[stage]
        spec.check(inputs)
        arguments = [torch.from_numpy(np.ascontiguousarray(inputs[t.name])).to(self._device) for t in spec.inputs]
        outputs = self._modules[stage](*arguments)
        return {t.name: value.cpu().numpy() for t, value in zip(spec.outputs, outputs, strict=True)}

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            "version": torch.__version__,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
        }
