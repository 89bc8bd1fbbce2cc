"""Matcher as stages: DINOv2 for matching, SAM for masks; what depends on the data is in `fssdeploy.glue.matcher`.

Source: Liu et al., "Matcher: Segment Anything with One Shot Using All-Purpose Feature Matching" (2023), and the
released code.

    encoder           picture -> features of its patches, unit length
    affinity          rows of references, features -> cosines
    sam_encoder       the same canvas, enlarged -> embedding
    decoder_single    points -> one mask       (grid of prompts; options "fss" and "part")
    decoder_multiple  points -> three masks    (options "coco")

A box is two points, its corners, as everywhere in `fssdeploy.glue.sam`.
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
from fssdeploy.glue.matcher.options import OPTIONS, MatcherOptions
from fssdeploy.glue.matcher.system import ENCODER, ENLARGED, MULTIPLE, SAM_ENCODER, SINGLE
from fssdeploy.modules import sam as sam_sizes
from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD, RELEASED, DinoVisionTransformer, ViTConfig
from fssdeploy.modules.sam import Sam, SamConfig
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from fssdeploy.systems import fsdino
from fssdeploy.systems.affinity_stage import AffinityStage, affinity_spec
from fssdeploy.systems.sam_stages import (
    DecoderStage,
    ImageEncoderStage,
    decoder_parameters,
    decoder_spec,
    encoder_parameters,
    encoder_spec,
)

NAME = "matcher"
FUSED_STAGES = (ENCODER,)
STATE_PARAMETERS = ("encoder.",)
# Networks that can be chosen by name for these fields of the configuration.
NETWORKS: dict[str, dict[str, Any]] = {"encoder": RELEASED, "sam": sam_sizes.PRESETS}
CHOICES = {"compat": ("corrected", "original"), "kshot": ("official", "flat")}
# Six points, as all option tables have, and the corners of a box.
CAPACITY = 8


@dataclass(frozen=True)
class MatcherConfig:
    """Both networks, the side of the canvas, the points that a prompt may have (box or padding included), the options.

    `compat`, `kshot` and `seed` are explained in `fssdeploy.glue.matcher.Matcher`. Graphs depend on the networks, the
    canvas and the capacity alone: any options run on them.
    """

    encoder: ViTConfig = field(default_factory=lambda: RELEASED["vitl14"])
    sam: SamConfig = field(default_factory=lambda: sam_sizes.PRESETS["vit_h"])
    image_size: int = 518
    capacity: int = CAPACITY
    options: MatcherOptions = OPTIONS["coco"]
    compat: str = "corrected"
    kshot: str = "official"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    "option_unknown",
                    f"{name} cannot be '{getattr(self, name)}'",
                    "",
                    f"Choose {' or '.join(allowed)}.",
                )
        if self.image_size < 2 * self.encoder.patch or self.image_size % self.encoder.patch:
            raise InputError(
                "image_size",
                f"image size {self.image_size} does not fit",
                f"pictures are cut into patches of {self.encoder.patch} pixels",
                f"Use a multiple of {self.encoder.patch}, at least {2 * self.encoder.patch}.",
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.encoder.patch

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MatcherConfig:
        sam = {**data["sam"], "global_blocks": tuple(data["sam"]["global_blocks"])}
        networks = {"encoder": ViTConfig(**data["encoder"]), "sam": SamConfig(**sam)}
        return MatcherConfig(**{**data, **networks, "options": MatcherOptions.from_dict(data["options"])})


PRESETS = {
    # A SAM this small predicts low IoU: the thresholds of the other tables would leave nothing.
    "tiny": MatcherConfig(
        fsdino.PRESETS["tiny"].encoder,
        sam_sizes.PRESETS["tiny"],
        image_size=fsdino.PRESETS["tiny"].image_size,
        options=OPTIONS["fss"],
    ),
    "small": MatcherConfig(RELEASED["vits14"], sam_sizes.PRESETS["vit_b"]),
    "base": MatcherConfig(RELEASED["vitb14"], sam_sizes.PRESETS["vit_b"]),
    "large": MatcherConfig(),
}


class MatcherNetworks(nn.Module):
    """Both networks, with the official names under ``encoder.`` and ``sam.``."""

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DinoVisionTransformer(config.encoder)
        self.sam = Sam(config.sam)


def build(config: MatcherConfig) -> MatcherNetworks:
    """The network without weights of any meaning; see fssdeploy.weights.matcher for filling it."""
    return MatcherNetworks(config).eval()


def initialise_untrained(model: MatcherNetworks, seed: int) -> None:
    """Fill every parameter from a seed; the masks mean nothing."""
    fsdino.initialise_untrained(model, seed)


class FeatureStage(nn.Module):
    """Picture uint8 (B, 3, S, S), RGB -> patch features float32 (B, N, C) of unit length.

    They are the last block's output before the final norm, as in the release.
    """

    table: torch.Tensor

    def __init__(self, encoder: DinoVisionTransformer, grid: int) -> None:
        super().__init__()
        self.encoder = encoder
        # Resampled in float32 beforehand: the exporter would leave the computation in the graph.
        with torch.no_grad():
            self.register_buffer("table", encoder.position_table(grid, grid).detach().clone())

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, std = (
            torch.tensor(values, device=picture.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        normalised = picture.float() * (1 / (255 * std)) - mean / std
        tokens = self.encoder.embed(normalised.to(self.table.dtype), self.table)
        for block in self.encoder.blocks:
            tokens = block(tokens)
        return (F.normalize(tokens[:, self.encoder.prefix :].float(), dim=-1, eps=1e-12),)


def specs(config: MatcherConfig) -> dict[str, StageSpec]:
    """The contracts of the stages, in the order they run."""
    size, count = config.image_size, config.grid**2
    picture = TensorSpec("picture", "uint8", (BATCH, 3, size, size), "RGB, 0..255")
    features = TensorSpec(
        "features", "float32", (BATCH, count, config.encoder.dim), "patches before the final norm, unit length"
    )
    sam_encoder = encoder_spec(config.sam, SAM_ENCODER)
    # A picture of its own: the canvas, enlarged.
    enlarged = dataclasses.replace(sam_encoder.inputs[0], name=ENLARGED)
    return {
        ENCODER: StageSpec(ENCODER, (picture,), (features,)),
        AFFINITY: affinity_spec(features),
        SAM_ENCODER: dataclasses.replace(sam_encoder, inputs=(enlarged,)),
        SINGLE: decoder_spec(config.sam, False, config.capacity, SINGLE),
        MULTIPLE: decoder_spec(config.sam, True, config.capacity, MULTIPLE),
    }


def preprocessing(config: MatcherConfig) -> dict[str, Any]:
    """How pictures become the canvas, and what the steps between the stages need to know."""
    return {
        "canvas": config.image_size,
        "patch": config.encoder.patch,
        "geometry": "squash",
        "options": dataclasses.asdict(config.options),
        "compat": config.compat,
        "kshot": config.kshot,
        "seed": config.seed,
    }


def reference_stages(model: MatcherNetworks) -> dict[str, nn.Module]:
    """The stages over the networks themselves, in float32."""
    return {
        ENCODER: FeatureStage(model.encoder, model.config.grid),
        AFFINITY: AffinityStage(unit=True),
        SAM_ENCODER: ImageEncoderStage(model.sam),
        SINGLE: DecoderStage(model.sam, multimask=False),
        MULTIPLE: DecoderStage(model.sam, multimask=True),
    }


def stages(model: MatcherNetworks, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Exportable copies of the stages: LayerScale folded, inside in `dtype`, borders in float32."""
    exported = copy.deepcopy(reference_stages(model))
    exported[ENCODER].get_submodule("encoder").fold_layer_scale()  # type: ignore[operator]
    return {name: stage.eval().requires_grad_(False).to(dtype) for name, stage in exported.items()}


def stage_parameters(model: MatcherNetworks, stage: str) -> int:
    """Parameters that end up in the graph of a stage (tables baked in are not counted)."""
    if stage == ENCODER:
        whole = sum(parameter.numel() for parameter in model.encoder.parameters())
        unused = [model.encoder.mask_token, *model.encoder.norm.parameters()]
        return whole - sum(parameter.numel() for parameter in unused)
    if stage == AFFINITY:
        return 0
    if stage == SAM_ENCODER:
        return encoder_parameters(model.sam)
    return decoder_parameters(model.sam, multimask=stage == MULTIPLE)
