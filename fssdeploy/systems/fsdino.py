"""FS-DINO: one frozen DINOv2 encoder and a light segmenter that decodes with what it learned from SAM.

Source: Zhuo et al., "DINOv2-powered Few-Shot Semantic Segmentation: A Unified Framework via Cross-Model Distillation
and 4D Correlation Mining". No code was published; every choice the text leaves open is in docs/fsdino.md.

    encode   picture -> tokens of the last block, embedding (adapter on an early block)
    enroll   support tokens, mask -> prototype, semantic prompt, folded 4D kernel
    segment  query tokens and embedding, class state -> mask logits, prior logits
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
from fssdeploy.modules.bottleneck_adapter import BottleneckAdapter
from fssdeploy.modules.correlation4d import Correlation4D
from fssdeploy.modules.dinov2 import IMAGENET_MEAN, IMAGENET_STD, RELEASED, DinoVisionTransformer, ViTConfig
from fssdeploy.modules.pooling import cosine_prior, mask_to_tokens, masked_mean
from fssdeploy.modules.sam_decoder import FourierPosition, MaskDecoder, mask_downscaling
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec

NAME = "fsdino"
# Attention over long rows gains from ONNX Runtime's fused kernel; the decoder's six tokens do not.
FUSED_STAGES = ("encoder",)
STATE_PARAMETERS = ("encoder.", "adapter.", "svp.", "correlation.project.")

OPTIONS: dict[str, tuple[str, ...]] = {
    "variant": ("full", "compact"),
    "tap_norm": ("final", "none"),
    "adapter_norm": ("layer", "none"),
    "adapter_activation": ("gelu", "relu"),
    "adapter_order": ("pre", "post"),
    "svp": ("linear", "mlp", "none"),
    "correlation": ("dot", "cosine"),
    "upsample": ("exact", "literal"),
    "geometry": ("squash", "letterbox"),
}


@dataclass(frozen=True)
class FSDinoConfig:
    """Sizes and open choices; the numbers in brackets are the rows of docs/fsdino.md."""

    encoder: ViTConfig = field(default_factory=lambda: RELEASED["vitb14"])
    image_size: int = 518
    variant: str = "full"  # "compact": the cosine prior alone is the dense prompt [29]
    tap_block: int = 2  # block index whose tokens feed the adapter [5]
    tap_norm: str = "final"  # [6]
    adapter_middle: int = 256
    adapter_bottleneck: int = 128
    adapter_ffn: int = 512
    adapter_heads: int = 1  # [10]
    adapter_order: str = "pre"  # [10]
    adapter_norm: str = "layer"  # [9]
    adapter_activation: str = "gelu"  # [9]
    train_adapter: bool = False  # the paper's two versions differ: docs/fsdino.md
    svp: str = "linear"  # [16]
    correlation: str = "dot"  # [18]
    correlation_hidden: int = 512
    correlation_head: tuple[int, int, int] = (256, 128, 32)  # [26]
    upsample: str = "exact"  # [26]
    decoder_dim: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    geometry: str = "squash"  # [34]

    def __post_init__(self) -> None:
        for name, allowed in OPTIONS.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError("option_unknown", f"{name} cannot be '{value}'", "", f"Choose {' or '.join(allowed)}.")
        if self.image_size < 2 * self.encoder.patch or self.image_size % self.encoder.patch:
            raise InputError(
                "image_size",
                f"image size {self.image_size} does not fit",
                f"pictures are cut into patches of {self.encoder.patch} pixels",
                f"Use a multiple of {self.encoder.patch}, at least {2 * self.encoder.patch}.",
            )
        sizes = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.type == "int"}
        for name, size in [*sizes.items(), ("registers", self.encoder.registers)]:
            least = 0 if name in ("tap_block", "registers") else 1
            if size < least:
                raise InputError("option_unknown", f"{name} cannot be {size}", "", f"It is at least {least}.")
        # Its cross-attention works at half the width, its up-scaling ends at an eighth.
        if self.decoder_dim % 8 or self.decoder_dim % (2 * self.decoder_heads):
            raise InputError(
                "option_unknown",
                f"decoder_dim {self.decoder_dim} and decoder_heads {self.decoder_heads} do not fit",
                "the width is a multiple of 8 and of twice the heads",
            )
        if not 0 <= self.tap_block < self.encoder.depth:
            raise InputError("option_unknown", f"tap_block {self.tap_block} is not a block of this encoder")
        if self.adapter_heads < 1 or self.adapter_bottleneck % self.adapter_heads:
            raise InputError("option_unknown", f"adapter_heads {self.adapter_heads} does not divide the bottleneck")

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.encoder.patch

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FSDinoConfig:
        encoder = ViTConfig(**data["encoder"])
        return FSDinoConfig(**{**data, "encoder": encoder, "correlation_head": tuple(data["correlation_head"])})


PRESETS = {
    "tiny": FSDinoConfig(
        encoder=ViTConfig(128, 6, 4, table=13),
        image_size=182,
        adapter_middle=96,
        adapter_bottleneck=64,
        adapter_ffn=256,
        correlation_hidden=128,
        correlation_head=(64, 32, 16),
        decoder_dim=96,
        decoder_heads=4,
        decoder_mlp=384,
    ),
    "small": FSDinoConfig(encoder=RELEASED["vits14"]),
    "base": FSDinoConfig(),
    "large": FSDinoConfig(encoder=RELEASED["vitl14"]),
}


class FSDino(nn.Module):
    """The whole network. Parameter groups: encoder, adapter, svp, correlation, dense_prompt, position, decoder."""

    def __init__(self, config: FSDinoConfig) -> None:
        super().__init__()
        self.config = config
        dim, out = config.encoder.dim, config.decoder_dim
        self.encoder = DinoVisionTransformer(config.encoder)
        self.adapter = BottleneckAdapter(
            dim,
            config.adapter_middle,
            config.adapter_bottleneck,
            config.adapter_ffn,
            out,
            heads=config.adapter_heads,
            order=config.adapter_order,
            norm=config.adapter_norm,
            activation=config.adapter_activation,
        )
        self.svp = SemanticVisualPrompt(config.svp, dim, out)
        if config.variant == "full":
            self.correlation = Correlation4D(
                config.grid,
                config.correlation_hidden,
                config.correlation_head,
                measure=config.correlation,
                upsample=config.upsample,
            )
        self.dense_prompt = mask_downscaling(out)
        self.position = FourierPosition(out)
        self.decoder = MaskDecoder(out, config.decoder_heads, config.decoder_mlp, iou_hidden=out)

    def freeze(self) -> None:
        """Leave gradients only where stage 2 of the training puts them: not the encoder, the adapter if chosen."""
        self.encoder.requires_grad_(False)
        self.adapter.requires_grad_(self.config.train_adapter)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; means and norms over many terms stay in float32."""
        return self.encoder.pos_embed.dtype

    def encode(self, pictures: torch.Tensor, table: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, S, S), RGB 0..255, uint8 or float -> tokens (B, g*g, C) and embedding (B, D, g, g)."""
        config = self.config
        mean = torch.tensor(IMAGENET_MEAN, device=pictures.device).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=pictures.device).view(1, 3, 1, 1)
        normalised = pictures.float() * (1 / (255 * std)) - mean / std
        early, tokens = self.encoder(
            normalised.to(self.dtype), config.tap_block, tap_norm=config.tap_norm == "final", table=table
        )
        rows, columns = (side // config.encoder.patch for side in pictures.shape[-2:])
        return tokens, self.adapter(early, rows, columns)

    def enroll(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """State of each support by itself: tokens (B, g*g, C), soft mask (B, 1, S, S) -> tensors with leading B.

        The class state of k shots is their plain mean: docs/fsdino.md, choices 37 and 38.
        """
        weight = mask_to_tokens(mask, self.config.encoder.patch)
        state = {"prototype": masked_mean(tokens, weight)}
        tokens, weight = tokens.to(self.dtype), weight.to(self.dtype)
        prompt = self.svp.enroll(tokens, weight, state["prototype"].to(self.dtype))
        if prompt is not None:
            state["svp"] = prompt
        if self.config.variant == "full":
            state["kernel4d"] = self.correlation.fold(tokens, weight)
        return state

    def segment(
        self,
        tokens: torch.Tensor,
        embedding: torch.Tensor,
        state: dict[str, torch.Tensor],
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits and prior logits, each (B, 1, 4g, 4g), for B pairs of a query and a class state."""
        similarity = cosine_prior(tokens, state["prototype"]).to(self.dtype)
        tokens, embedding = tokens.to(self.dtype), embedding.to(self.dtype)
        state = {name: tensor.to(self.dtype) for name, tensor in state.items()}
        response = self.correlation.respond(state["kernel4d"], tokens) if self.config.variant == "full" else None
        return self.decode(
            embedding, similarity, response, self.svp.tokens(state.get("svp"), tokens.shape[0]), position
        )

    def decode(
        self,
        embedding: torch.Tensor,
        similarity: torch.Tensor,
        response: torch.Tensor | None,
        sparse: torch.Tensor,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part after support and query have met: prior, prompts, mask decoder."""
        rows, columns = embedding.shape[-2:]
        if response is not None:
            prior = self.correlation.mine(response, similarity)
        else:
            cosine = similarity.view(-1, 1, rows, columns)
            prior = F.interpolate(cosine, size=(4 * rows, 4 * columns), mode="bilinear", align_corners=False)
        if position is None:
            position = self.position(rows, columns)
        return self.decoder(embedding, position, sparse, self.dense_prompt(prior)), prior


class SemanticVisualPrompt(nn.Module):
    """The sparse prompt: support features mapped to the decoder's width, then averaged (section 3.4.1, choice 16)."""

    def __init__(self, kind: str, dim: int, out: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.proj: nn.Module = nn.Linear(dim, out)
        elif kind == "mlp":
            self.proj = nn.Sequential(nn.Linear(dim, out), nn.GELU(), nn.Linear(out, out))
        else:  # the ablation without this prompt keeps SAM's own initial sparse embedding
            self.initial = nn.Parameter(torch.randn(1, 1, out))

    def enroll(self, tokens: torch.Tensor, weight: torch.Tensor, prototype: torch.Tensor) -> torch.Tensor | None:
        """(B, out), or None if the prompt does not depend on the support."""
        if self.kind == "linear":
            return self.proj(prototype)  # mapping and averaging commute
        return masked_mean(self.proj(tokens), weight) if self.kind == "mlp" else None

    def tokens(self, prompt: torch.Tensor | None, batch: int) -> torch.Tensor:
        """Sparse tokens (B, 1, out) for the decoder."""
        return self.initial.expand(batch, -1, -1) if prompt is None else prompt.unsqueeze(1)


def build(config: FSDinoConfig) -> FSDino:
    """The network without weights of any meaning; see fssdeploy.weights for filling it."""
    return FSDino(config).eval()


def initialise_untrained(model: nn.Module, seed: int) -> None:
    """Fill every parameter from a seed, scaled so that all parts respond to their input; the masks mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.empty(parameter.shape)
            if name.endswith("gamma"):
                value.fill_(0.5)
            elif parameter.dim() == 1:
                is_norm_weight = name.endswith("weight")
                value.normal_(1.0 if is_norm_weight else 0.0, 0.1, generator=generator)
            elif name.endswith(("pos_embed", "cls_token", "register_tokens", "gaussian_matrix", "tokens.weight")):
                value.normal_(0, 0.5, generator=generator)
            else:
                fan_in = parameter[0].numel() if "output_upscaling" not in name else parameter.shape[0]
                value.normal_(0, fan_in**-0.5, generator=generator)
            parameter.copy_(value)


def specs(config: FSDinoConfig) -> dict[str, StageSpec]:
    """The contracts of the three stages."""
    size, grid, dim, out = config.image_size, config.grid, config.encoder.dim, config.decoder_dim

    def tensor(name: str, shape: tuple[int, ...], meaning: str, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, dtype, (BATCH, *shape), meaning)

    tokens = tensor("tokens", (grid * grid, dim), "patch tokens of the last block, final norm applied")
    embedding = tensor("embedding", (out, grid, grid), "image embedding for the mask decoder")
    state = [tensor("prototype", (dim,), "masked mean of the support tokens")]
    if config.svp != "none":
        state.append(tensor("svp", (out,), "semantic-aware visual prompt"))
    if config.variant == "full":
        state.append(tensor("kernel4d", (config.correlation_hidden, dim), "folded 4D correlation kernel"))
    return {
        "encoder": StageSpec(
            "encoder", (tensor("picture", (3, size, size), "RGB, 0..255", "uint8"),), (tokens, embedding)
        ),
        "enroll": StageSpec(
            "enroll",
            (tokens, tensor("mask", (1, size, size), "share of the object in every pixel, 0..1")),
            tuple(state),
        ),
        "segment": StageSpec(
            "segment",
            (tokens, embedding, *state),
            (
                tensor("mask_logits", (1, 4 * grid, 4 * grid), "the object is where these are above 0"),
                tensor("prior_logits", (1, 4 * grid, 4 * grid), "the soft guess that prompts the decoder"),
            ),
        ),
    }


def preprocessing(config: FSDinoConfig) -> dict[str, Any]:
    """How pictures become the encoder's input; part of what a bank is bound to (through the configuration)."""
    return {"canvas": config.image_size, "patch": config.encoder.patch, "geometry": config.geometry}


class EncoderStage(nn.Module):
    table: torch.Tensor

    def __init__(self, model: FSDino, table: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("table", table)

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens, embedding = self.model.encode(picture, self.table)
        return tokens.float(), embedding.float()


class EnrollStage(nn.Module):
    def __init__(self, model: FSDino) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.float() for tensor in self.model.enroll(tokens, mask).values())


class SegmentStage(nn.Module):
    position_code: torch.Tensor

    def __init__(self, model: FSDino, position: torch.Tensor, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.register_buffer("position_code", position)

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = dict(zip(self.names, state, strict=True))
        logits, prior = self.model.segment(tokens, embedding, values, self.position_code)
        return logits.float(), prior.float()


def reference_stages(model: FSDino) -> dict[str, nn.Module]:
    """The three stages over the network itself, in float32: what exported graphs are compared with."""
    grid = model.config.grid
    # Tables are computed in float32 beforehand: the exporter would leave their computation in the graph.
    with torch.no_grad():
        table = model.encoder.position_table(grid, grid).detach().clone()
        position = model.position(grid, grid).detach().clone()
    names = [spec.name for spec in specs(model.config)["enroll"].outputs]
    return {
        "encoder": EncoderStage(model, table),
        "enroll": EnrollStage(model),
        "segment": SegmentStage(model, position, names),
    }


def stages(model: FSDino, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Exportable copies of the three stages: LayerScale folded, inside in `dtype`, borders in float32."""
    exported = copy.deepcopy(reference_stages(model))
    exported["encoder"].get_submodule("model.encoder").fold_layer_scale()  # type: ignore[operator]
    return {name: stage.eval().requires_grad_(False).to(dtype) for name, stage in exported.items()}


def stage_parameters(model: FSDino, stage: str) -> int:
    """Parameters that end up in the graph of a stage (tables baked in are not counted)."""
    fixed = model.position.positional_encoding_gaussian_matrix.numel()

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    full = model.config.variant == "full"
    projection = count(model.correlation.project) if full else 0
    kept_bias = model.config.correlation_hidden if full else 0
    if stage == "encoder":
        return count(model.encoder, model.adapter) - model.encoder.mask_token.numel()
    if stage == "enroll":
        return count(model.svp) * (model.config.svp != "none") + projection - kept_bias
    decoder = model.decoder
    unused = count(decoder.iou_prediction_head, *decoder.output_hypernetworks_mlps[1:])
    segmenter = count(model.dense_prompt, model.position, decoder) - fixed - unused
    correlation = count(model.correlation) - projection + kept_bias if full else 0
    return segmenter + correlation + count(model.svp) * (model.config.svp == "none")
