"""SAM checkpoints: ``sam_vit_h_4b8939.pth`` and its siblings, or one of a smaller SAM under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fssdeploy.errors import InputError
from fssdeploy.modules.sam import PRESETS, Sam
from fssdeploy.weights.checkpoint import Checkpoint, load_strict, write_checkpoint

PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
_WIDTHS = {config.dim: name for name, config in PRESETS.items()}


def is_sam(names: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the parameters of a SAM network."""
    return "mask_decoder.iou_token.weight" in names


def sam_part(checkpoint: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, which is removed from their names.

    InputError if the file holds anything outside SAM's three parts, or lacks one of them.
    """
    strange = [name for name in checkpoint.tensors if not name.startswith(PARTS)]
    absent = [part for part in PARTS if not any(name.startswith(part) for name in checkpoint.tensors)]
    if strange or absent:
        why = f"it has {strange[0]}" if strange else f"it has nothing under {absent[0]}"
        raise InputError(
            "checkpoint_architecture", f"'{checkpoint.file}' is not a SAM checkpoint", why, "Use the official file."
        )
    return {name[len(prefix) :]: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}


def sam_size(checkpoint: Checkpoint) -> str:
    """The preset of `fssdeploy.modules.sam`, from the width of the image encoder."""
    patches = checkpoint.tensors.get("image_encoder.patch_embed.proj.weight")
    return _WIDTHS.get(patches.shape[0], "of unknown size") if patches is not None else "of unknown size"


def load_sam(sam: Sam, checkpoint: Checkpoint) -> None:
    """Fill the whole network, every name and shape equal. InputError says what differs."""
    load_strict(sam, checkpoint.tensors, "this SAM", checkpoint.file)


def save_sam(sam: Sam, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the network as safetensors under the official names; atomic. MachineError if it cannot be written."""
    write_checkpoint(path, sam.state_dict(), metadata)
