"""PerSAM and PerSAM-F as stages over one SAM; what depends on the data is in `fssdeploy.glue.persam.system`.

Source: Zhang et al., "Personalize Segment Anything Model with One Shot" (2023), and the released code.

    sam_encoder  picture -> embedding
    guided       points, attention bias, target embedding -> one mask          (PerSAM, first call)
    decoder      points -> three masks                                         (PerSAM-F and videos, first call)
    refine       points, the mask before -> three masks                        (second and third call)

A box is two points, its corners, as everywhere in `fssdeploy.glue.sam`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fssdeploy.errors import InputError
from fssdeploy.glue.persam.options import PerSamOptions
from fssdeploy.glue.persam.system import DECODER, ENCODER, GUIDED, REFINE
from fssdeploy.modules import sam as sam_module
from fssdeploy.modules.sam import PIXEL_MEAN, PIXEL_STD, Sam, SamConfig
from fssdeploy.modules.sam_decoder import Guidance
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from fssdeploy.systems import fsdino
from fssdeploy.systems.sam_stages import (
    MULTIPLE,
    SINGLE,
    DecoderStage,
    PromptedStage,
    decoder_parameters,
    decoder_spec,
    encoder_parameters,
    encoder_spec,
)

NAME = "persam"
FUSED_STAGES = (ENCODER,)
# The encoder alone would do for PerSAM; PerSAM-F's mixing weights were fitted to the decoder's masks.
STATE_PARAMETERS = ("sam.",)


@dataclass(frozen=True)
class PerSamConfig:
    """The SAM network, the points that a prompt may have (corners of its box and padding included), the options."""

    sam: SamConfig = field(default_factory=lambda: sam_module.PRESETS["vit_h"])
    capacity: int = 5
    options: PerSamOptions = field(default_factory=PerSamOptions)

    def __post_init__(self) -> None:
        if self.capacity < 4:
            raise InputError(
                "option_unknown",
                f"capacity cannot be {self.capacity}",
                "two points and a box take 4",
                "Use at least 4.",
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PerSamConfig:
        sam = {**data["sam"], "global_blocks": tuple(data["sam"]["global_blocks"])}
        return PerSamConfig(SamConfig(**sam), data["capacity"], PerSamOptions(**data["options"]))


PRESETS = {
    "tiny": PerSamConfig(sam_module.PRESETS["tiny"]),
    "base": PerSamConfig(sam_module.PRESETS["vit_b"]),
    "large": PerSamConfig(sam_module.PRESETS["vit_l"]),
    "huge": PerSamConfig(),  # as published
}


class PerSamNetwork(nn.Module):
    """One SAM, with the official names under ``sam.``."""

    def __init__(self, config: PerSamConfig) -> None:
        super().__init__()
        self.config = config
        self.sam = Sam(config.sam)


def build(config: PerSamConfig) -> PerSamNetwork:
    """The network without weights of any meaning; see fssdeploy.weights.persam for filling it."""
    return PerSamNetwork(config).eval()


def initialise_untrained(model: PerSamNetwork, seed: int) -> None:
    """Fill every parameter from a seed; the masks mean nothing."""
    fsdino.initialise_untrained(model, seed)


class LetterboxEncoderStage(nn.Module):
    """Picture uint8 (B, 3, S, S), RGB, and its extent int32 (B, 2), rows and columns from the upper left corner, to an
    embedding float32 (B, out, g, g).

    What lies outside the extent is zero after normalisation, as in SAM; no colour of 8 bits is.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder

    def forward(self, picture: torch.Tensor, extent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, std = (torch.tensor(values, device=picture.device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        normalised = picture.float() * (1 / std) - mean / std
        place = torch.arange(picture.shape[-1], device=picture.device, dtype=extent.dtype)
        inside_rows = (place < extent[:, :1])[:, None, :, None]
        inside_columns = (place < extent[:, 1:])[:, None, None, :]
        occupied = inside_rows.float() * inside_columns.float()
        return (self.image_encoder((normalised * occupied).to(self.image_encoder.pos_embed.dtype)).float(),)


class GuidedStage(PromptedStage):
    """SAM's decoder under PerSAM's guidance: the single mask of points, an attention bias and a target embedding.

    points (B, P, 2), labels (B, P), attention_bias (B, g*g), target_embedding (B, out), embedding (1, out, g, g)
    -> mask logits (B, 1, 4g, 4g) and predicted IoU (B, 1).
    """

    def forward(
        self,
        points: torch.Tensor,
        labels: torch.Tensor,
        attention_bias: torch.Tensor,
        target_embedding: torch.Tensor,
        embedding: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.position.dtype
        guidance = Guidance(attention_bias[:, None, None].to(dtype), target_embedding[:, None].to(dtype))
        return self.predict(points, labels, self.no_mask, embedding, SINGLE, guidance)


class RefineStage(PromptedStage):
    """SAM's decoder with a mask as prompt: points (B, P, 2), labels (B, P), mask_prompt (B, 1, 4g, 4g), embedding
    (1, out, g, g) -> three masks' logits (B, 3, 4g, 4g) and predicted IoU (B, 3).
    """

    def forward(
        self, points: torch.Tensor, labels: torch.Tensor, mask_prompt: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dense = self.prompts.mask_downscaling(mask_prompt.to(self.position.dtype))
        return self.predict(points, labels, dense, embedding, MULTIPLE)


def specs(config: PerSamConfig) -> dict[str, StageSpec]:
    """The contracts of the stages that the variant needs."""
    sam, capacity = config.sam, config.capacity
    single, multiple = (decoder_spec(sam, multimask, capacity) for multimask in (False, True))
    points, labels, embedding = multiple.inputs
    bias = TensorSpec("attention_bias", "float32", (BATCH, sam.grid**2), "similarity with the target, 0..1")
    target = TensorSpec("target_embedding", "float32", (BATCH, sam.out), "mean embedding of the object")
    mask = TensorSpec("mask_prompt", "float32", (BATCH, 1, 4 * sam.grid, 4 * sam.grid), "logits of the mask before")
    extent = TensorSpec("extent", "int32", (BATCH, 2), "rows and columns that the picture occupies")
    encoder = encoder_spec(sam)
    encoder = StageSpec(encoder.name, (*encoder.inputs, extent), encoder.outputs)
    first = multiple
    if config.options.variant == "persam":
        first = StageSpec(GUIDED, (points, labels, bias, target, embedding), single.outputs)
    refine = StageSpec(REFINE, (points, labels, mask, embedding), multiple.outputs)
    return {stage.name: stage for stage in (encoder, first, refine)}


def preprocessing(config: PerSamConfig) -> dict[str, Any]:
    """How pictures become the encoder's input, and the options of the steps between the stages."""
    return {
        "canvas": config.sam.image_size,
        "patch": config.sam.patch,
        "geometry": "letterbox",
        "options": dataclasses.asdict(config.options),
    }


def reference_stages(model: PerSamNetwork) -> dict[str, nn.Module]:
    """The stages over the network itself, in float32."""
    guided = model.config.options.variant == "persam"
    return {
        ENCODER: LetterboxEncoderStage(model.sam),
        **({GUIDED: GuidedStage(model.sam)} if guided else {DECODER: DecoderStage(model.sam, multimask=True)}),
        REFINE: RefineStage(model.sam),
    }


def stages(model: PerSamNetwork, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Exportable copies of the stages, computing in `dtype`, borders in float32."""
    exported = copy.deepcopy(reference_stages(model))
    return {name: stage.eval().requires_grad_(False).to(dtype) for name, stage in exported.items()}


def stage_parameters(model: PerSamNetwork, stage: str) -> int:
    """Parameters that end up in the graph of a stage."""
    sam = model.sam
    if stage == ENCODER:
        return encoder_parameters(sam)
    count = decoder_parameters(sam, multimask=stage != GUIDED)
    if stage == REFINE:  # a mask in place of the embedding of its absence
        masks, none = sam.prompt_encoder.mask_downscaling, sam.prompt_encoder.no_mask_embed
        count += sum(p.numel() for p in masks.parameters()) - none.weight.numel()
    return count
