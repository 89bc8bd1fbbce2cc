"""A network small enough to export in seconds, with every part that the real one has."""

from __future__ import annotations

from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.systems.fsdino import FSDinoConfig

SMALL = FSDinoConfig(
    encoder=ViTConfig(48, 4, 3, table=5),
    image_size=70,
    adapter_middle=24,
    adapter_bottleneck=16,
    adapter_ffn=32,
    correlation_hidden=20,
    correlation_head=(12, 8, 4),
    decoder_dim=32,
    decoder_heads=4,
    decoder_mlp=64,
)
