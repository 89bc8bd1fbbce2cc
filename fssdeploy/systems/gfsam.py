"""GF-SAM's stages: DINOv2 to compare pictures, SAM for masks. The steps between are in ``fssdeploy/glue/gfsam/``.

Source: Zhang et al., "Bridge the Points: Graph-based Few-shot Segment Anything Semantically" (2024). No training.

    encoder      picture -> features of its cells
    affinity     rows of references, features -> cosines
    sam_encoder  picture -> SAM's embedding
    decoder      points, one a prompt, on an embedding -> the mask of each
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fssdeploy.errors import InputError
from fssdeploy.glue.affinity import AFFINITY
from fssdeploy.modules import sam as sam_sizes
from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD, RELEASED, DinoVisionTransformer, ViTConfig
from fssdeploy.modules.sam import Sam, SamConfig
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from fssdeploy.systems import fsdino
from fssdeploy.systems.affinity_stage import AffinityStage, affinity_spec
from fssdeploy.systems.sam_stages import (
    DECODER,
    ENCODER,
    DecoderStage,
    ImageEncoderStage,
    decoder_parameters,
    decoder_spec,
    encoder_parameters,
    encoder_spec,
)

NAME = "gfsam"
FUSED_STAGES = ("encoder",)
STATE_PARAMETERS = ("encoder.",)
# Networks that can be chosen by name for these fields of the configuration.
NETWORKS: dict[str, dict[str, Any]] = {"encoder": RELEASED, "sam": sam_sizes.PRESETS}
# One point and the padding point that stands for "no box".
CAPACITY = 2


@dataclass(frozen=True)
class GFSamConfig:
    """Sizes of both networks and the choices of the method; `compat` is explained in `fssdeploy.glue.gfsam.GFSam`.

    Pictures are stretched to SAM's size; from there DINOv2's picture of side `image_size` is made, with `antialias` or
    without (published results: without).
    """

    encoder: ViTConfig = field(default_factory=lambda: RELEASED["vitl14"])
    sam: SamConfig = field(default_factory=lambda: sam_sizes.PRESETS["vit_h"])
    image_size: int = 518
    antialias: bool = False
    max_points: int = 128
    compat: str = "corrected"

    def __post_init__(self) -> None:
        if self.compat not in ("corrected", "original"):
            raise InputError("option_unknown", f"compat cannot be '{self.compat}'", "", "Choose corrected or original.")
        if self.image_size < 2 * self.encoder.patch or self.image_size % self.encoder.patch:
            raise InputError(
                "image_size",
                f"image size {self.image_size} does not fit",
                f"pictures are cut into patches of {self.encoder.patch} pixels",
                f"Use a multiple of {self.encoder.patch}, at least {2 * self.encoder.patch}.",
            )
        if not 1 <= self.max_points <= self.grid**2:
            raise InputError(
                "option_unknown",
                f"max_points cannot be {self.max_points}",
                f"there are {self.grid**2} cells",
                "Give at least one and at most as many as there are cells.",
            )

    @property
    def grid(self) -> int:
        """Cells along one side."""
        return self.image_size // self.encoder.patch

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> GFSamConfig:
        sam = SamConfig(**{**data["sam"], "global_blocks": tuple(data["sam"]["global_blocks"])})
        return GFSamConfig(**{**data, "encoder": ViTConfig(**data["encoder"]), "sam": sam})


PRESETS = {
    "tiny": GFSamConfig(
        encoder=fsdino.PRESETS["tiny"].encoder,
        sam=sam_sizes.PRESETS["tiny"],
        image_size=fsdino.PRESETS["tiny"].image_size,
    ),
    "small": GFSamConfig(encoder=RELEASED["vits14"], sam=sam_sizes.PRESETS["vit_b"]),
    "base": GFSamConfig(encoder=RELEASED["vitb14"], sam=sam_sizes.PRESETS["vit_b"]),
    "large": GFSamConfig(),
}


class GFSamNetworks(nn.Module):
    """Both networks, under the prefixes ``encoder.`` and ``sam.``."""

    def __init__(self, config: GFSamConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DinoVisionTransformer(config.encoder)
        self.sam = Sam(config.sam)


def build(config: GFSamConfig) -> GFSamNetworks:
    """The networks without weights of any meaning; see fssdeploy.weights for filling them."""
    return GFSamNetworks(config).eval()


def initialise_untrained(model: GFSamNetworks, seed: int) -> None:
    """Fill every parameter from a seed; the masks mean nothing."""
    fsdino.initialise_untrained(model, seed)


def specs(config: GFSamConfig) -> dict[str, StageSpec]:
    """The contracts of the stages, in the order they run."""
    size = config.sam.image_size
    picture = TensorSpec("picture", "uint8", (BATCH, 3, size, size), "RGB, 0..255")
    features = TensorSpec(
        "features", "float32", (BATCH, config.grid**2, config.encoder.dim), "of every cell; channels of length one"
    )
    return {
        "encoder": StageSpec("encoder", (picture,), (features,)),
        AFFINITY: affinity_spec(features),
        ENCODER: encoder_spec(config.sam),
        DECODER: decoder_spec(config.sam, multimask=False, capacity=CAPACITY),
    }


def preprocessing(config: GFSamConfig) -> dict[str, Any]:
    """How pictures become the canvas, and what the steps between the stages need to know."""
    return {
        "canvas": config.sam.image_size,
        "patch": config.encoder.patch,
        "geometry": "squash",
        "compat": config.compat,
        "max_points": config.max_points,
    }


class EncoderStage(nn.Module):
    """Canvas uint8 (B, 3, S, S) -> features float32 (B, cells, C)."""

    table: torch.Tensor
    shrink: torch.Tensor

    def __init__(self, encoder: DinoVisionTransformer, canvas: int, image_size: int, antialias: bool) -> None:
        super().__init__()
        self.encoder = encoder
        grid = image_size // encoder.config.patch
        with torch.no_grad():
            self.register_buffer("table", encoder.position_table(grid, grid).detach().clone())
            # The resize is linear and separable: one matrix is all of it. Engines disagree about weights between pixels
            # by more than everything after them, and not all of them antialias.
            identity, size = torch.eye(canvas)[None, None], (image_size, canvas)
            self.register_buffer("shrink", F.interpolate(identity, size, mode="bilinear", antialias=antialias)[0, 0])

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.tokens(self.resized(picture))
        # Each channel has length one over all cells of its picture (not each cell over its channels): huge channels of
        # the last block lose their weight. Published results depend on it.
        return (F.normalize(tokens, dim=1),)

    def resized(self, picture: torch.Tensor) -> torch.Tensor:
        """Canvas uint8 -> the encoder's picture, normalised, float32 (B, 3, s, s)."""
        mean, std = (torch.tensor(v, device=picture.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        shrink = self.shrink.float()
        return (shrink @ picture.float() @ shrink.T) * (1 / (255 * std)) - mean / std

    def tokens(self, normalised: torch.Tensor) -> torch.Tensor:
        """Patch tokens of the last block without the final norm (the official ``x_prenorm``), float32 (B, cells, C)."""
        embedded = self.encoder.embed(normalised.to(self.encoder.pos_embed.dtype), self.table)
        return self.encoder.streams(embedded)[-1][:, self.encoder.prefix :].float()


def reference_stages(model: GFSamNetworks) -> dict[str, nn.Module]:
    """The stages over the networks themselves, in float32: what exported graphs are compared with."""
    config = model.config
    return {
        "encoder": EncoderStage(model.encoder, config.sam.image_size, config.image_size, config.antialias),
        AFFINITY: AffinityStage(),
        ENCODER: ImageEncoderStage(model.sam),
        DECODER: DecoderStage(model.sam, multimask=False, absent=False),
    }


def stages(model: GFSamNetworks, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Exportable copies of the stages: LayerScale folded, inside in `dtype`, borders in float32."""
    exported = copy.deepcopy(reference_stages(model))
    exported["encoder"].get_submodule("encoder").fold_layer_scale()  # type: ignore[operator]
    return {name: stage.eval().requires_grad_(False).to(dtype) for name, stage in exported.items()}


def stage_parameters(model: GFSamNetworks, stage: str) -> int:
    """Parameters that end up in the graph of a stage (tables baked in are not counted)."""
    if stage == AFFINITY:
        return 0
    if stage == ENCODER:
        return encoder_parameters(model.sam)
    if stage == DECODER:
        return decoder_parameters(model.sam, multimask=False)
    unused = [model.encoder.mask_token, *model.encoder.norm.parameters()]
    total = sum(parameter.numel() for parameter in model.encoder.parameters())
    return total - sum(parameter.numel() for parameter in unused)
