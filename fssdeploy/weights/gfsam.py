"""Filling the networks of systems that put DINOv2 and SAM side by side, under ``encoder.`` and ``sam.``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fssdeploy.errors import InputError
from fssdeploy.systems.fsdino import initialise_untrained
from fssdeploy.systems.gfsam import GFSamNetworks
from fssdeploy.weights.checkpoint import Checkpoint, load_strict, read_checkpoint
from fssdeploy.weights.dinov2 import is_dinov2, load_dinov2
from fssdeploy.weights.provenance import Provenance
from fssdeploy.weights.sam import is_sam, load_sam, sam_size

GROUPS = ("encoder", "sam")
_ENCODER = "encoder."


def fill(model: GFSamNetworks, files: Sequence[str | Path], untrained_seed: int | None) -> Provenance:
    """Load `files`, DINOv2 (or the encoder in an FS-DINO checkpoint) and SAM, recognised by their names.

    What no file covers is filled from `untrained_seed`; without a seed that is an InputError that says where weights
    come from. Every file is loaded strictly: no name may be missing or left over, no shape may differ.
    """
    if untrained_seed is not None:
        initialise_untrained(model, untrained_seed)
    missing = list(GROUPS)
    sources = []
    for path in files:
        checkpoint = read_checkpoint(path)
        family, group = _load(model, checkpoint)
        missing = [name for name in missing if name != group]
        source = {"family": family, "file": checkpoint.file.name, "sha256": checkpoint.sha256, "groups": [group]}
        sources.append(source)
    if missing and untrained_seed is None:
        raise InputError(
            "weights_missing",
            "this preset has no weights of its own",
            f"the files given lack {' and '.join(missing)}" if files else "no file was given",
            "Pass --weights twice: dinov2_vit[s|b|l]14_pretrain.pth (DINOv2 release) and sam_vit_[b|l|h]_*.pth (Segment"
            " Anything release). For benchmarks and shape checks use --untrained.",
        )
    status = "trained" if not missing else "partial" if sources else "untrained"
    return Provenance(status, missing, untrained_seed if missing else None, sources)


def _load(model: GFSamNetworks, checkpoint: Checkpoint) -> tuple[str, str]:
    """Load one file; its family and the group it filled."""
    tensors = checkpoint.tensors
    if is_dinov2(tensors):
        load_dinov2(model.encoder, checkpoint)
        return "dinov2", "encoder"
    if is_sam(tensors):
        load_sam(model.sam, checkpoint)
        return f"sam {sam_size(checkpoint)}", "sam"
    if f"{_ENCODER}cls_token" in tensors:  # the rest of an FS-DINO checkpoint has no counterpart here
        part = {name.removeprefix(_ENCODER): value for name, value in tensors.items() if name.startswith(_ENCODER)}
        load_strict(model.encoder, part, "this DINOv2 encoder", checkpoint.file)
        return "fsdino", "encoder"
    raise InputError(
        "checkpoint_architecture",
        f"'{checkpoint.file}' is of no known family",
        f"its first name is {next(iter(tensors))}",
        "DINOv2 (original or Hugging Face), SAM and FS-DINO checkpoints are known.",
    )
