"""The state of a class from the states of its shots, once for each query: the rule of `StagedSystem.enroll`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fssdeploy.pipeline import mean_of_shots
from fssdeploy.serving.models.answers import Settings, answer_each, required


class MergeShots:
    """The tensors of a state, (k, ...) each, and `placements` (n, 7) -> the same tensors, (n, ...) each.

    The placements only tell how many queries there are. `picture`, the queries' canvases, is passed on: in an ensemble
    whatever takes it waits for this step.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read which tensors make a state."""
        config = Settings.read(args).config
        self._tensors = [output["name"] for output in config["output"] if output["name"] != "picture"]

    @answer_each
    def execute(self, request: Any) -> dict[str, np.ndarray]:
        """The merged state of one request."""
        queries = len(required(request, "placements"))
        state = mean_of_shots({name: required(request, name) for name in self._tensors})
        repeated = {name: np.repeat(array[None], queries, axis=0) for name, array in state.items()}
        return {**repeated, "picture": required(request, "picture")}
