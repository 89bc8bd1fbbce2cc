"""What every system speaks: stages with declared shapes, and the three values that pass between the verbs.

``encode(pictures) -> Features``, ``enroll(Features, masks) -> ClassState``, ``segment(Features, states) -> Masks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.images.geometry import Placement

BATCH = "batch"
# In `ClassState.meta`: how states of one class become one. Without it, tensors are means over shots.
MERGE, CONCATENATE = "merge", "concatenate"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a stage. A dimension is a number or a name; only ``"batch"`` may be a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str = ""

    def check(self, array: np.ndarray, stage: str) -> None:
        """Raise InputError unless `array` has this dtype and these dimensions."""
        if str(array.dtype) != self.dtype:
            raise InputError(
                "wrong_dtype",
                f"stage '{stage}' got {array.dtype} for '{self.name}'",
                f"it is declared {self.dtype}",
                f"Convert it with .astype('{self.dtype}').",
            )
        fits = array.ndim == len(self.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise InputError(
                "wrong_shape",
                f"stage '{stage}' got shape {tuple(array.shape)} for '{self.name}'",
                f"it is declared {self.shape_text()}",
                "Encode the picture with the same artifact.",
            )

    def shape_text(self) -> str:
        return "(" + ", ".join(str(dim) for dim in self.shape) + ")"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "meaning": self.meaning}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TensorSpec:
        return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]), data.get("meaning", ""))


@dataclass(frozen=True)
class StageSpec:
    """The contract of one stage: export, lint, profiles, server configurations and docs are derived from it."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def free_batch(self) -> bool:
        """Whether the number of rows may vary."""
        return any(tensor.shape[0] == BATCH for tensor in self.inputs)

    @property
    def shared(self) -> tuple[str, ...]:
        """Inputs that serve every row: of one picture, where the rows are prompts."""
        return tuple(tensor.name for tensor in self.inputs if tensor.shape[0] != BATCH) if self.free_batch else ()

    def check(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Raise InputError for a missing, surplus, mistyped or misshapen input."""
        expected = [spec.name for spec in self.inputs]
        if set(expected) != set(inputs):
            raise InputError(
                "wrong_inputs",
                f"stage '{self.name}' got the inputs {sorted(inputs)}",
                f"it needs {sorted(expected)}",
                "Pass the outputs of the stage before it unchanged.",
            )
        for spec in self.inputs:
            spec.check(inputs[spec.name], self.name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StageSpec:
        return StageSpec(
            data["name"],
            tuple(TensorSpec.from_dict(item) for item in data["inputs"]),
            tuple(TensorSpec.from_dict(item) for item in data["outputs"]),
        )


@runtime_checkable
class Engine(Protocol):
    """Runs stages. The same interface over PyTorch modules and exported graphs."""

    name: str
    specs: dict[str, StageSpec]

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one stage on named arrays; the batch must be one that the stage's spec allows."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, device, threads, precision hints: what a report needs to be reproducible."""
        ...


@dataclass
class Features:
    """What `encode` returns: one row per picture in every tensor.

    `placements[i]` says where picture i lies on the encoder's square canvas and how large it was.
    """

    tensors: dict[str, np.ndarray]
    placements: list[Placement]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.placements)

    def __getitem__(self, index: int) -> Features:
        """The features of one picture, batch dimension kept."""
        row = range(len(self))[index]
        tensors = {name: array[row : row + 1] for name, array in self.tensors.items()}
        return Features(tensors, [self.placements[row]], self.fingerprint)


@dataclass
class ClassState:
    """What `enroll` returns: all that a query needs to know of a class.

    Usually every tensor is a mean over shots without a batch dimension, so its size does not depend on k. Where
    ``meta["merge"]`` is "concatenate", the first axis of every tensor lists the shots, or rows of one shot after the
    other. Either way, states of the same class can be merged.
    """

    tensors: dict[str, np.ndarray]
    shots: int
    fingerprint: str
    meta: dict[str, Any] = field(default_factory=dict)

    def merge(self, other: ClassState) -> ClassState:
        """The state of both sets of shots together, each shot weighing the same (docs/fsdino.md, choices 37, 38)."""
        if self.fingerprint != other.fingerprint:
            raise InputError(
                "state_of_other_artifact",
                "class states cannot be merged",
                "they were enrolled with different weights or preprocessing",
                "Enrol both with the same artifact.",
            )
        total = self.shots + other.shots
        if self.meta.get(MERGE) == CONCATENATE:
            listed = {name: np.concatenate([array, other.tensors[name]]) for name, array in self.tensors.items()}
            return ClassState(listed, total, self.fingerprint, {**self.meta, **other.meta})
        tensors = {
            name: ((array.astype(np.float64) * self.shots + other.tensors[name] * float(other.shots)) / total).astype(
                array.dtype
            )
            for name, array in self.tensors.items()
        }
        return ClassState(tensors, total, self.fingerprint, {**self.meta, **other.meta})


@dataclass
class Masks:
    """What `segment` returns: one logit map per (picture, class), at the resolution of its picture.

    `logits[i][name]` is float32 (height, width); a pixel belongs to the class where its logit is above 0.
    `prior[i][name]` is the soft guess that prompted the decoder, (cells, cells), where a system has one.
    """

    names: list[str]
    logits: list[dict[str, np.ndarray]]
    prior: list[dict[str, np.ndarray]]

    def binary(self, picture: int, name: str) -> np.ndarray:
        """Boolean mask (height, width) of one class in one picture."""
        return self.logits[picture][name] > 0

    def score(self, picture: int, name: str) -> float:
        """Mean foreground probability inside the mask, 0 where the mask is empty. Not calibrated."""
        logits = self.logits[picture][name]
        inside = logits[logits > 0]
        return float(np.mean(1.0 / (1.0 + np.exp(-inside)))) if inside.size else 0.0

    def labels(self, picture: int, names: Sequence[str] | None = None) -> np.ndarray:
        """Indexed mask (height, width) uint8: 0 background, i+1 the i-th name; of several, the largest logit wins."""
        chosen = list(names or self.names)
        stack = np.stack([self.logits[picture][name] for name in chosen])
        best = stack.argmax(0)
        return np.where(stack.max(0) > 0, best + 1, 0).astype(np.uint8)
