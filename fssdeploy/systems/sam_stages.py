"""SAM as two stages that training-free systems share: the picture once, then any number of prompts.

Source: Kirillov et al., "Segment Anything" (2023). The stages stand over `fssdeploy.modules.sam.Sam`; the glue calls
them through `fssdeploy.glue.sam`.
"""

from __future__ import annotations

import torch
from torch import nn

from fssdeploy.glue.sam import ABSENT, PADDING
from fssdeploy.modules.sam import PIXEL_MEAN, PIXEL_STD, Sam, SamConfig
from fssdeploy.modules.sam_decoder import Guidance
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec

ENCODER, DECODER = "sam_encoder", "decoder"
# Mask tokens: the first answers a prompt that leaves no doubt, the others offer a part, a whole and what lies between.
SINGLE, MULTIPLE = slice(0, 1), slice(1, None)


class ImageEncoderStage(nn.Module):
    """Picture uint8 (B, 3, S, S), RGB -> embedding float32 (B, out, g, g)."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, std = (torch.tensor(values, device=picture.device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        normalised = picture.float() * (1 / std) - mean / std
        return (self.image_encoder(normalised.to(self.image_encoder.pos_embed.dtype)).float(),)


class PromptedStage(nn.Module):
    """SAM's decoder over one embedding; what prompts it besides points is the subclass's.

    Absent points take no part; where there are never any, `absent` False leaves the mask of the attention out, with
    which the fused kernels are slower or not used at all.
    """

    position: torch.Tensor

    def __init__(self, sam: Sam, absent: bool = True) -> None:
        super().__init__()
        self.absent = absent
        self.prompts = sam.prompt_encoder
        self.decoder = sam.mask_decoder
        # The codes of the grid are computed in float32 beforehand: the exporter would leave their computation in.
        with torch.no_grad():
            self.register_buffer("position", sam.prompt_encoder.position().detach().clone())

    @property
    def no_mask(self) -> torch.Tensor:
        """The dense prompt (1, out, 1, 1) where no mask is one."""
        return self.prompts.no_mask_embed.weight[:, :, None, None]

    def predict(
        self,
        points: torch.Tensor,
        labels: torch.Tensor,
        dense: torch.Tensor,
        embedding: torch.Tensor,
        wanted: slice,
        guidance: Guidance | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, M, 4g, 4g) and predicted IoU (B, M) of the `wanted` masks, float32."""
        logits, iou = self.decoder.predict(
            embedding.to(self.position.dtype),
            self.position,
            self.prompts.embed_points(points, labels.clamp(min=PADDING)),
            dense,
            absent=labels == ABSENT if self.absent else None,
            guidance=guidance,
            wanted=wanted,
        )
        return logits.float(), iou.float()


class DecoderStage(PromptedStage):
    """Points float32 (B, P, 2) and labels int32 (B, P) on one embedding (1, out, g, g) -> masks (B, M, 4g, 4g), IoU.

    Labels are those of `fssdeploy.glue.sam`. M is 1 (the single mask, the only one that is computed then), or 3 with
    `multimask`.
    """

    def __init__(self, sam: Sam, multimask: bool, absent: bool = True) -> None:
        super().__init__(sam, absent)
        self.wanted = MULTIPLE if multimask else SINGLE

    def forward(
        self, points: torch.Tensor, labels: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.predict(points, labels, self.no_mask, embedding, self.wanted)


def encoder_spec(config: SamConfig, name: str = ENCODER) -> StageSpec:
    """The contract of `ImageEncoderStage`."""
    size = config.image_size
    picture = TensorSpec("picture", "uint8", (BATCH, 3, size, size), "RGB, 0..255")
    shape = (BATCH, config.out, config.grid, config.grid)
    return StageSpec(name, (picture,), (TensorSpec("embedding", "float32", shape, "SAM's embedding of the picture"),))


def decoder_spec(config: SamConfig, multimask: bool, capacity: int, name: str = DECODER) -> StageSpec:
    """The contract of `DecoderStage` with room for `capacity` points a prompt; its batch counts prompts."""
    masks, grid = 3 if multimask else 1, config.grid
    return StageSpec(
        name,
        (
            TensorSpec("points", "float32", (BATCH, capacity, 2), "x, y in pixels of SAM's picture"),
            TensorSpec(
                "labels", "int32", (BATCH, capacity), "-2 absent, -1 padding, 0 outside, 1 inside, 2, 3 corners"
            ),
            TensorSpec("embedding", "float32", (1, config.out, grid, grid), "SAM's embedding of the picture"),
        ),
        (
            TensorSpec(
                "mask_logits", "float32", (BATCH, masks, 4 * grid, 4 * grid), "the mask is where these are above 0"
            ),
            TensorSpec("iou", "float32", (BATCH, masks), "predicted IoU of each mask with the truth"),
        ),
    )


def encoder_parameters(sam: Sam) -> int:
    """Parameters that end up in the graph of `ImageEncoderStage`."""
    return _count(sam.image_encoder)


def decoder_parameters(sam: Sam, multimask: bool) -> int:
    """Parameters that end up in the graph of `DecoderStage`: not those of mask prompts and of masks nobody asks for."""
    mlps = list(sam.mask_decoder.output_hypernetworks_mlps)
    wanted = MULTIPLE if multimask else SINGLE
    unused = _count(*mlps) - _count(*mlps[wanted])
    return _count(sam.mask_decoder, sam.prompt_encoder) - _count(sam.prompt_encoder.mask_downscaling) - unused


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
