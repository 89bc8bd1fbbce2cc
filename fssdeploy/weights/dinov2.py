"""DINOv2 checkpoints: the original layout and Hugging Face's on-disk layout, both brought to the official names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fssdeploy.errors import InputError
from fssdeploy.modules.dinov2 import RELEASED, DinoVisionTransformer
from fssdeploy.weights.checkpoint import Checkpoint, load_strict, write_checkpoint

_HUGGING_FACE = {
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"blocks.\1.attn.proj.",
    r"^encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$": r"blocks.\1.ls\2.gamma",
    r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.": r"blocks.\1.mlp.w12.",
    r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.": r"blocks.\1.mlp.w3.",
    r"^encoder\.layer\.(\d+)\.": r"blocks.\1.",
    r"^layernorm\.": "norm.",
}
_QKV = re.compile(r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")


def is_dinov2(names: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the parameters of a DINOv2 network, in either layout."""
    return ("cls_token" in names and "patch_embed.proj.weight" in names) or "embeddings.cls_token" in names


def to_official(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in either layout -> official names. Chunked training files lose their chunk numbers."""
    if "embeddings.cls_token" not in tensors:
        return {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
    official: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if found := _QKV.match(name):
            block, part, kind = found.groups()
            if part == "query":  # the three are one matrix in the official layout, rows in this order
                parts = [name.replace(".query.", f".{each}.") for each in ("query", "key", "value")]
                if all(each in tensors for each in parts):
                    official[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([tensors[each] for each in parts])
            continue
        renamed = name
        for pattern, replacement in _HUGGING_FACE.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                break
        official[renamed] = tensor
    return official


def load_dinov2(encoder: DinoVisionTransformer, checkpoint: Checkpoint) -> None:
    """Fill the encoder, every name and shape equal. InputError names the network the file seems to be for."""
    tensors = to_official(checkpoint.tensors)
    found = tensors.get("pos_embed")
    if found is not None and found.dim() == 3 and found.shape[2] != encoder.config.dim:
        seems = [name for name, config in RELEASED.items() if config.dim == found.shape[2]]
        raise InputError(
            "checkpoint_architecture",
            f"'{checkpoint.file}' is of another size",
            f"its width is {found.shape[2]}{f' ({seems[0]})' if seems else ''}, the preset needs {encoder.config.dim}",
            "Choose the preset that fits, or the file that fits.",
        )
    load_strict(encoder, tensors, "this DINOv2 encoder", checkpoint.file)


def save_dinov2(encoder: DinoVisionTransformer, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the encoder as safetensors under the official names; atomic. MachineError if it cannot be written."""
    write_checkpoint(path, encoder.state_dict(), metadata)
