"""SAM as a whole: image encoder, prompt encoder and mask decoder.

Source: Kirillov et al., "Segment Anything" (2023). Parameters carry the official names, so that an official checkpoint
(``sam_vit_h_4b8939.pth`` and its siblings) loads with ``strict=True``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fssdeploy.modules.sam_decoder import MaskDecoder
from fssdeploy.modules.sam_encoder import ImageEncoder
from fssdeploy.modules.sam_prompt import PromptEncoder

# Of RGB pictures with values 0..255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM network.

    `dim`, `depth`, `heads`, `mlp_ratio`, `window` and `global_blocks` belong to the image encoder (window 0: every
    block is global), `out` is the width of its result and of everything after it.
    """

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...] = ()
    image_size: int = 1024
    patch: int = 16
    mlp_ratio: float = 4.0
    window: int = 14
    out: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_hidden: int = 256
    mask_channels: int = 16

    @property
    def grid(self) -> int:
        """Cells along one side of the embedding."""
        return self.image_size // self.patch


PRESETS = {
    # Decoder, mask down-scaling and position code are those of FS-DINO's tiny preset.
    "tiny": SamConfig(128, 4, 4, image_size=208, window=0, out=96, decoder_heads=4, decoder_mlp=384, iou_hidden=96),
    "vit_b": SamConfig(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamConfig(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamConfig(1280, 32, 16, (7, 15, 23, 31)),
}


class Sam(nn.Module):
    """Pictures and prompts to masks; a picture is encoded once for any number of prompts."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(
            image_size=config.image_size,
            patch=config.patch,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            window=config.window,
            global_blocks=config.global_blocks,
            out=config.out,
        )
        self.prompt_encoder = PromptEncoder(config.out, config.image_size, config.grid, config.mask_channels)
        self.mask_decoder = MaskDecoder(
            config.out, config.decoder_heads, config.decoder_mlp, iou_hidden=config.iou_hidden
        )
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S), RGB 0..255, uint8 or float -> embedding (B, out, g, g).

        ValueError if their size is not the one this network is made for.
        """
        size = self.config.image_size
        if pictures.shape[1:] != (3, size, size):
            raise ValueError(f"pictures are {tuple(pictures.shape[1:])}, this network takes {(3, size, size)}")
        return self.image_encoder((pictures - self.pixel_mean) / self.pixel_std)

    def decode(
        self,
        embedding: torch.Tensor,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        multimask: bool | None = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, N, M, 4g, 4g) and predicted IoU (B, N, M) for N prompt sets on each of B pictures.

        embedding (B, out, g, g); points (B, N, P, 2), labels (B, N, P), boxes (B, N, 4), masks (B, N, 1, 4g, 4g) as
        in `PromptEncoder.forward`, where sets with fewer points than P are filled with label -1. M is 1 (token 0, for
        prompts that leave no doubt), 3 with `multimask`, or 4, that one first, with None. Without any prompt N is 1.
        """
        batch = embedding.shape[0]
        count = next((prompt.shape[1] for prompt in (points, boxes, masks) if prompt is not None), 1)
        sets = [None if prompt is None else prompt.flatten(0, 1) for prompt in (points, labels, boxes, masks)]
        sparse, dense = self.prompt_encoder(*sets)
        logits, iou = self.mask_decoder.predict(
            embedding.unsqueeze(1).expand(-1, count, -1, -1, -1).flatten(0, 1),
            self.prompt_encoder.position(),
            sparse.expand(batch * count, -1, -1),
            dense,
        )
        wanted = slice(None) if multimask is None else slice(1, None) if multimask else slice(0, 1)
        return logits[:, wanted].unflatten(0, (batch, count)), iou[:, wanted].unflatten(0, (batch, count))
