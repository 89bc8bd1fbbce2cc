"""Filling FS-DINO from checkpoint files, and the record of what came from where."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fssdeploy.errors import InputError
from fssdeploy.systems.fsdino import FSDino, FSDinoConfig, initialise_untrained
from fssdeploy.weights.checkpoint import Checkpoint, load_strict, read_checkpoint, write_checkpoint
from fssdeploy.weights.dinov2 import is_dinov2, load_dinov2
from fssdeploy.weights.provenance import Provenance
from fssdeploy.weights.sam import is_sam, sam_part, sam_size

_CONFIG = "fsdino_config"
# What an adapter by itself depends on: it serves every picture size and every segmenter.
_ADAPTER_CHOICES = ("encoder", "tap_", "adapter_")


def fill(
    model: FSDino, files: Sequence[str | Path], untrained_seed: int | None, to_train: Sequence[str] = ()
) -> Provenance:
    """Load `files` (FS-DINO, DINOv2 or SAM checkpoints, recognised by their names) into the network.

    Groups that no file covers are filled from `untrained_seed`; without a seed they are an InputError that says where
    weights come from. Every file is loaded strictly: no name may be missing or left over, no shape may differ.
    `to_train` names groups that may stay as the network was built: a training run starts them from scratch.
    """
    if untrained_seed is not None:
        initialise_untrained(model, untrained_seed)
    open_groups = [name for name, _ in model.named_children() if _parameters(model, name)]
    sources = []
    for path in files:
        checkpoint = read_checkpoint(path)
        family, groups = _load(model, checkpoint)
        open_groups = [group for group in open_groups if group not in groups]
        source = {"family": family, "file": checkpoint.file.name, "sha256": checkpoint.sha256, "groups": groups}
        sources.append(source)
    if set(open_groups) - set(to_train) and untrained_seed is None:
        given = f"the files given lack {', '.join(open_groups)}" if files else "no file was given"
        raise InputError(
            "weights_missing",
            "this preset has no weights of its own",
            given,
            "Pass --weights with a trained FS-DINO checkpoint. The encoder comes from dinov2_vit[s|b|l]14_pretrain.pth"
            " (DINOv2 release), the decoder's initial values from sam_vit_h_4b8939.pth (Segment Anything release);"
            " several --weights add up. For benchmarks and shape checks use --untrained.",
        )
    status = "trained" if not open_groups else "partial" if sources else "untrained"
    return Provenance(status, open_groups, untrained_seed if open_groups else None, sources)


def save_checkpoint(model: FSDino, path: str | Path, metadata: dict[str, str]) -> None:
    """Write every parameter as safetensors, with the configuration beside them; atomic."""
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    write_checkpoint(path, model.state_dict(), {**metadata, _CONFIG: config})


def save_group(model: FSDino, group: str, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the parameters of one group (encoder, adapter, ...) under its own prefix; atomic."""
    tensors = {f"{group}.{name}": tensor for name, tensor in getattr(model, group).state_dict().items()}
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    write_checkpoint(path, tensors, {**metadata, _CONFIG: config})


def _load(model: FSDino, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """Load one file; its family and the parameter groups it filled."""
    families: list[tuple[Callable[..., bool], Callable[[FSDino, Checkpoint], tuple[str, list[str]]]]] = [
        (is_dinov2, _load_encoder),
        (is_sam, _load_sam),
        (_is_fsdino, _load_own),
    ]
    for recognises, load in families:
        if recognises(checkpoint.tensors):
            return load(model, checkpoint)
    raise InputError(
        "checkpoint_architecture",
        f"'{checkpoint.file}' is of no known family",
        f"its first name is {next(iter(checkpoint.tensors))}",
        "FS-DINO, DINOv2 (original or Hugging Face) and SAM checkpoints are known.",
    )


def _load_encoder(model: FSDino, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    load_dinov2(model.encoder, checkpoint)
    return "dinov2", ["encoder"]


def _load_sam(model: FSDino, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """SAM's decoder, mask down-scaling and Gaussian matrix; its initial sparse embedding if no prompt replaces it."""
    file = checkpoint.file
    prompts = sam_part(checkpoint, "prompt_encoder.")
    pe, down = "pe_layer.", "mask_downscaling."
    position = {name[len(pe) :]: tensor for name, tensor in prompts.items() if name.startswith(pe)}
    scaling = {name[len(down) :]: tensor for name, tensor in prompts.items() if name.startswith(down)}
    load_strict(model.decoder, sam_part(checkpoint, "mask_decoder."), "SAM's mask decoder", file)
    load_strict(model.dense_prompt, scaling, "SAM's mask down-scaling", file)
    load_strict(model.position, position, "SAM's position code", file)
    groups = ["decoder", "dense_prompt", "position"]
    if model.config.svp == "none":
        with torch.no_grad():
            model.svp.initial.copy_(prompts["not_a_point_embed.weight"].view(1, 1, -1))
        groups.append("svp")
    return f"sam {sam_size(checkpoint)}", groups


def _is_fsdino(tensors: dict[str, torch.Tensor]) -> bool:
    return any(name.startswith("adapter.down.") for name in tensors)


def _load_own(model: FSDino, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """A checkpoint of this project; it may leave out whole groups (a segmenter without its frozen encoder)."""
    if _CONFIG in checkpoint.metadata:
        made_for = FSDinoConfig.from_dict(json.loads(checkpoint.metadata[_CONFIG]))
        groups = {name.split(".", 1)[0] for name in checkpoint.tensors}
        differing = [
            item.name
            for item in dataclasses.fields(FSDinoConfig)
            if item.name != "train_adapter"
            and (groups != {"adapter"} or item.name.startswith(_ADAPTER_CHOICES))
            and getattr(made_for, item.name) != getattr(model.config, item.name)
        ]
        if differing:
            name = differing[0]
            raise InputError(
                "checkpoint_architecture",
                f"'{checkpoint.file}' was trained with another configuration",
                f"{name} is {getattr(made_for, name)} there, {getattr(model.config, name)} here",
                "Choose the preset, image size and options that these weights were made for.",
            )
    given = {name.split(".", 1)[0] for name in checkpoint.tensors}
    known = {name: child for name, child in model.named_children()}
    for group in sorted(given):
        part = {k[len(group) + 1 :]: v for k, v in checkpoint.tensors.items() if k.startswith(group + ".")}
        if group not in known:
            raise InputError(
                "checkpoint_architecture", f"'{checkpoint.file}' does not fit", f"'{group}' is no part of this network"
            )
        load_strict(known[group], part, f"group '{group}'", checkpoint.file)
    return "fsdino", sorted(given)


def _parameters(model: FSDino, group: str) -> bool:
    return any(True for _ in getattr(model, group).parameters())
