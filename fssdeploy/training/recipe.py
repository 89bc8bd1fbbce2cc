"""What a recipe gives the training loop: a stream of examples, a network that computes losses, optimisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fssdeploy.errors import InputError, MachineError
from fssdeploy.training.schedule import Phase

Batch = dict[str, torch.Tensor]


class Examples(Protocol):
    """A stream of training examples; pickled to worker processes, so it holds no network."""

    def draw(self, position: int, attempt: int, size: int) -> Batch:
        """Example `position` as tensors without a batch dimension, for pictures of side `size`.

        It depends on nothing but its arguments. `attempt` counts up when a picture cannot be read (InputError): another
        draw takes its place.
        """

    def describe(self, position: int, attempt: int) -> str:
        """Which pictures an example shows: for reports of what was skipped or failed."""


class Objective(nn.Module):
    """Network and losses in one module, so that data parallelism wraps both."""

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Means over the batch: "loss" is minimised, the others are shown. Frozen parts have no gradient."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every recipe can be told; `rate` and `decay` are AdamW's, `ema` is the decay of the averaged weights."""

    phases: tuple[Phase, ...]
    rate: float = 1e-3
    decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    ema: float = 0.0
    seed: int = 0


class Recipe(ABC):
    """One way to train; ``fssdeploy/training/<recipe>.py``."""

    name: str
    schedule = "warmup_cosine"
    # The learning rate follows the schedule within every phase instead of over the run.
    schedule_per_phase = False

    def __init__(
        self, settings: RunSettings, origin: Mapping[str, Any], examples: Examples, objective: Objective
    ) -> None:
        """`origin`: what it starts from (data set, fold, checkpoints), for the record of the run."""
        self._settings, self._origin = settings, origin
        self.phases, self.clip, self.accumulate = settings.phases, settings.clip, settings.accumulate
        self.precision, self.ema, self.seed = settings.precision, settings.ema, settings.seed
        self.examples, self.objective = examples, objective

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on: a run continues only under the same."""
        return {"recipe": self.name, **self._origin, **asdict(self._settings)}

    @abstractmethod
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Optimisers over all trained parameters; the rate they are made with is the schedule's 1."""

    def enter(self, phase: int) -> None:  # noqa: B027 - most recipes have nothing to do
        """Called before the first step of a phase, also on resuming within it."""


def adamw(parameters: Sequence[nn.Parameter], rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: norms and biases do not decay."""
    trained = [each for each in parameters if each.requires_grad]
    groups = [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": decay},
        {"params": [each for each in trained if each.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.98))


def muon_and_adamw(network: nn.Module, rate: float, matrix_rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks, AdamW for the rest: from scratch it needs far fewer steps.

    Source: Jordan et al., "Muon: An optimizer for hidden layers" (2024), PyTorch's implementation.
    """
    if not hasattr(torch.optim, "Muon"):
        raise MachineError("package_old", "pre-training needs torch.optim.Muon", f"torch is {torch.__version__}", "")
    named = [(name, each) for name, each in network.named_parameters() if each.requires_grad]
    matrices = [each for name, each in named if each.dim() == 2 and ".blocks." in f".{name}" and "rel_pos" not in name]
    if not matrices:
        raise InputError("option_unknown", "this network has no transformer blocks")
    chosen = {id(each) for each in matrices}
    rest = [each for _, each in named if id(each) not in chosen]
    return [torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, momentum=0.95), adamw(rest, rate, decay)]
