"""Filling PerSAM from an official SAM checkpoint, and the record of where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fssdeploy.errors import InputError
from fssdeploy.systems.persam import PerSamNetwork, initialise_untrained
from fssdeploy.weights.checkpoint import read_checkpoint
from fssdeploy.weights.provenance import Provenance
from fssdeploy.weights.sam import is_sam, load_sam, sam_size


def fill(model: PerSamNetwork, files: Sequence[str | Path], untrained_seed: int | None) -> Provenance:
    """Load the one SAM checkpoint that PerSAM is made of, every name and shape equal, or fill from `untrained_seed`.

    InputError for no file without a seed, for several files, and for one that is not of this SAM.
    """
    if not files and untrained_seed is not None:
        initialise_untrained(model, untrained_seed)
        return Provenance("untrained", ["sam"], untrained_seed, [])
    if len(files) != 1:
        raise InputError(
            "weights_missing",
            f"PerSAM got {len(files)} weight files" if files else "this preset has no weights of its own",
            "it is one SAM" if files else "no file was given",
            "Pass --weights with sam_vit_[b|l|h]_*.pth (Segment Anything release). For benchmarks and shape checks use"
            " --untrained.",
        )
    checkpoint = read_checkpoint(files[0])
    if not is_sam(checkpoint.tensors):
        raise InputError("checkpoint_architecture", f"'{checkpoint.file}' is not a SAM checkpoint")
    load_sam(model.sam, checkpoint)
    source = {
        "family": f"sam {sam_size(checkpoint)}",
        "file": checkpoint.file.name,
        "sha256": checkpoint.sha256,
        "groups": ["sam"],
    }
    return Provenance("trained", [], None, [source])
