"""The three verbs for systems without data-dependent steps: one graph each for encode, enroll and segment.

The same code runs on PyTorch modules and on exported graphs. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.images.geometry import Placement, fit_mask, fit_picture, place, unfit
from fssdeploy.images.masks import Mask, mask_from_array
from fssdeploy.protocol import ClassState, Engine, Features, Masks, StageSpec

# An object that covers less of its fullest feature cell than this is background to the encoder: the prototype would
# describe the surroundings. One tenth of a 14-pixel patch is a patch of 4 x 5 pixels, or a line 1.4 pixels wide.
MIN_COVERAGE = 0.1
# Bounds the memory of a call with many pictures; graphs with a fixed batch run one picture at a time.
CHUNK = 8


def require_stage(specs: Mapping[str, StageSpec], stage: str) -> StageSpec:
    """The contract of a stage. InputError for one that an artifact was exported without."""
    if stage not in specs:
        raise InputError(
            "stage_missing",
            f"this artifact has no stage '{stage}'",
            f"it holds {', '.join(specs)}",
            "Export it with --components all.",
        )
    return specs[stage]


def run_in_chunks(
    engine: Engine, spec: StageSpec, inputs: Mapping[str, np.ndarray], chunk: int = CHUNK
) -> dict[str, np.ndarray]:
    """Run a stage on any number of rows: in chunks if its batch may vary, else in the batch it was exported for (1).

    Inputs that all rows share are passed as they are.
    """
    step = chunk if spec.free_batch else int(spec.inputs[0].shape[0])
    total = next(len(array) for name, array in inputs.items() if name not in spec.shared)
    parts = []
    for start in range(0, total, step):
        rows = {
            name: np.ascontiguousarray(array if name in spec.shared else array[start : start + step])
            for name, array in inputs.items()
        }
        parts.append(engine.run(spec.name, rows))
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def mean_of_shots(per_shot: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a class state from those of its k shots, each (k, ...): their plain mean."""
    return {name: array.mean(0, dtype=np.float64).astype(array.dtype) for name, array in per_shot.items()}


def objects_of(
    masks: Sequence[Mask | np.ndarray], placements: Sequence[Placement], *, allow_empty: bool = False
) -> list[np.ndarray]:
    """The objects, bool (height, width), in one mask for each placed picture.

    InputError if their number differs, a mask is not of its picture's size, or it is empty and must not be.
    """
    if len(masks) != len(placements):
        raise InputError(
            "masks_count",
            f"{len(placements)} pictures came with {len(masks)} masks",
            "",
            "Give one mask for each picture.",
        )
    objects = [(mask if isinstance(mask, Mask) else mask_from_array(mask)).object for mask in masks]
    for number, (found, where) in enumerate(zip(objects, placements, strict=True), 1):
        if found.shape != (where.height, where.width):
            raise InputError(
                "mask_size",
                f"mask {number} is {' x '.join(map(str, found.shape))} pixels (height x width)",
                f"its picture is {where.height} x {where.width}",
                "Masks are never resized: make it at the picture's size.",
            )
        if not allow_empty and not found.any():
            raise InputError("mask_empty", f"mask {number} marks nothing", "", "Mark the object in every picture.")
    return objects


def check_coverage(coverage: float, number: int) -> None:
    """InputError if an object covers so little of its fullest feature cell that no feature is of the object."""
    if coverage < MIN_COVERAGE:
        raise InputError(
            "object_vanishes",
            f"the object in mask {number} is too small to be seen",
            f"it fills {coverage:.1%} of the feature cell it fills most; {MIN_COVERAGE:.0%} are needed",
            "Crop the picture around the object, or export with a larger --image-size.",
        )


def check_origin(fingerprint: str, expected: str, what: str) -> None:
    """IntegrityError unless features or a class state carry the fingerprint of the artifact that is to use them."""
    if fingerprint != expected:
        raise IntegrityError(
            "other_artifact",
            f"{what} came from another artifact",
            "weights or preprocessing differ",
            "Encode and enrol again with this one.",
        )


def check_query(features: Features, states: Mapping[str, ClassState], fingerprint: str) -> None:
    """Whether `segment` can begin: InputError without classes, IntegrityError where something is of other weights."""
    check_origin(features.fingerprint, fingerprint, "features")
    if not states:
        raise InputError("no_classes", "there is no class to look for", "", "Enrol one first.")
    for name, state in states.items():
        check_origin(state.fingerprint, fingerprint, f"class '{name}'")


@dataclass(frozen=True)
class Preprocessing:
    """How pictures and masks come to lie on an encoder's square canvas: its side, a patch's side, `place`'s mode."""

    canvas: int
    patch: int
    geometry: str

    def fit_pictures(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, list[Placement]]:
        """Pictures, each uint8 RGB (height, width, 3), to an encoder's input uint8 (n, 3, S, S) and their places in it.

        InputError for anything else.
        """
        if not pictures:
            raise InputError("no_pictures", "there is no picture to encode", "", "Give at least one.")
        for picture in pictures:
            if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
                got = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
                raise InputError(
                    "not_a_picture",
                    f"a picture was given as {got}",
                    "pictures are uint8 RGB arrays (height, width, 3)",
                    "Read files with fssdeploy.images.pictures.load_picture.",
                )
        placements = [place(picture.shape[0], picture.shape[1], self.canvas, self.geometry) for picture in pictures]
        canvases = [fit_picture(picture, where) for picture, where in zip(pictures, placements, strict=True)]
        return np.stack(canvases).transpose(0, 3, 1, 2), placements

    def fit_masks(self, masks: Sequence[Mask | np.ndarray], placements: Sequence[Placement]) -> np.ndarray:
        """One mask for each placed picture, at the picture's size, to float32 (k, 1, S, S).

        InputError if their number differs, or a mask is empty, of another size, or so small that no feature cell sees
        the object.
        """
        pairs = zip(objects_of(masks, placements), placements, strict=True)
        fitted = np.stack([fit_mask(found, where) for found, where in pairs])
        cells = self.canvas // self.patch
        shares = fitted.reshape(len(fitted), cells, self.patch, cells, self.patch).mean((2, 4))
        for number, share in enumerate(shares, 1):
            check_coverage(float(share.max()), number)
        return fitted[:, None]


class StagedSystem:
    """A system whose stages `encoder`, `enroll` and `segment` chain by the names of their tensors."""

    def __init__(
        self,
        name: str,
        specs: Mapping[str, StageSpec],
        engine: Engine,
        preprocessing: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.name = name
        self.specs = dict(specs)
        self.engine = engine
        self.fingerprint = fingerprint
        self.preprocessing = Preprocessing(*(preprocessing[key] for key in ("canvas", "patch", "geometry")))

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """Features of pictures, each uint8 RGB (height, width, 3) of any size. InputError for anything else."""
        spec = require_stage(self.specs, "encoder")
        batch, placements = self.preprocessing.fit_pictures(pictures)
        return Features(run_in_chunks(self.engine, spec, {spec.inputs[0].name: batch}), placements, self.fingerprint)

    def enroll(self, features: Features, masks: Sequence[Mask | np.ndarray]) -> ClassState:
        """The state of one class from the features of its k pictures and one mask for each, at the picture's size.

        InputError if a mask is empty, of another size, or so small that no feature cell sees the object.
        """
        check_origin(features.fingerprint, self.fingerprint, "features")
        fitted = self.preprocessing.fit_masks(masks, features.placements)
        spec = require_stage(self.specs, "enroll")
        inputs = self._gather(spec, features.tensors, {"mask": fitted})
        tensors = mean_of_shots(run_in_chunks(self.engine, spec, inputs))
        return ClassState(tensors, len(masks), self.fingerprint)

    def segment(self, features: Features, states: Mapping[str, ClassState]) -> Masks:
        """Masks of every class in every picture; its cost does not depend on the number of shots behind a state."""
        check_query(features, states, self.fingerprint)
        spec = require_stage(self.specs, "segment")
        masks = Masks(list(states), [], [])
        for index in range(len(features)):
            picture, where = features[index], features.placements[index]
            logits, priors = {}, {}
            for name, state in states.items():
                class_rows = {key: array[None] for key, array in state.tensors.items()}
                outputs = self.engine.run(spec.name, self._gather(spec, picture.tensors, class_rows))
                logits[name] = unfit(outputs["mask_logits"][0, 0], where)
                priors[name] = outputs["prior_logits"][0, 0]
            masks.logits.append(logits)
            masks.prior.append(priors)
        return masks

    def _gather(self, spec: StageSpec, *sources: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of a stage, by name, from what the stages before it returned."""
        available = {name: array for source in sources for name, array in source.items()}
        return {tensor.name: available[tensor.name] for tensor in spec.inputs if tensor.name in available}
