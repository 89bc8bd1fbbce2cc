"""FS-DINO as research code runs it: every query encodes its supports again and forms the 4D correlation volume.

It follows section 3.4.1 of the paper literally: eq. 3 as a full product, the 1x1 convolution over the flattened support
axis, both transpositions around eq. 5. Same weights, same numbers as enrolling first; only slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fssdeploy.modules.pooling import cosine_prior, mask_to_tokens, masked_mean
from fssdeploy.systems.fsdino import FSDino, FSDinoConfig


def joint_forward(
    model: FSDino, query: torch.Tensor, supports: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and prior logits (1, 1, 4g, 4g): query (1, 3, S, S), k supports (k, 3, S, S), their masks (k, 1, S, S)."""
    tokens, embedding = model.encode(query)
    shots = [model.encode(supports[index : index + 1])[0] for index in range(len(supports))]
    weights = [mask_to_tokens(masks[index : index + 1], model.config.encoder.patch) for index in range(len(supports))]

    prototypes = [masked_mean(shot, weight) for shot, weight in zip(shots, weights, strict=True)]
    similarity = cosine_prior(tokens, torch.stack(prototypes).mean(0))
    prompts = [
        model.svp.enroll(shot, weight, prototype)
        for shot, weight, prototype in zip(shots, weights, prototypes, strict=True)
    ]
    prompt = None if prompts[0] is None else torch.stack([p for p in prompts if p is not None]).mean(0)
    sparse = model.svp.tokens(prompt, 1)
    if model.config.variant == "compact":
        return model.decode(embedding, similarity, None, sparse)

    responses = [correlate(model, tokens, shot, weight) for shot, weight in zip(shots, weights, strict=True)]
    prior = mine(model, torch.stack(responses).mean(0), similarity)
    position = model.position(model.config.grid, model.config.grid)
    return model.decoder(embedding, position, sparse, model.dense_prompt(prior)), prior


def correlate(model: FSDino, tokens: torch.Tensor, support: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and the 1x1 convolution: the volume (1, N_support, g, g) with support cells as channels, then `hidden`."""
    branch, grid = model.correlation, model.config.grid
    volume = branch.scale(tokens) @ (branch.scale(support) * weight.transpose(1, 2)).transpose(1, 2)
    return branch.project(volume.transpose(1, 2).unflatten(2, (grid, grid)))


def mine(model: FSDino, response: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Eqs. 4 and 5 with both forms spelt out: depthwise over the query, pointwise on the transposed form."""
    branch, grid, half = model.correlation, model.config.grid, model.correlation.coarse
    first = branch.reduce(F.gelu(response))  # (1, support cells, h, h): the query is the picture
    second = first.flatten(2).transpose(1, 2).unflatten(2, (half, half))  # (1, query cells, h, h): the support is
    second = branch.pointwise(second).flatten(2).transpose(1, 2).unflatten(2, (half, half))
    prior = similarity.view(-1, 1, grid, grid)
    coarse = F.avg_pool2d(prior, 3, stride=2, padding=1, count_include_pad=False)
    return branch.upsample_prior(branch.depthwise(first) + second + coarse)


def extra_flops(config: FSDinoConfig, shots: int) -> float:
    """FLOPs per query of the unfolded 4D branch beyond the folded one: volume and projection for each shot."""
    if config.variant == "compact":
        return 0.0
    tokens, dim, hidden = config.grid**2, config.encoder.dim, config.correlation_hidden
    unfolded = shots * (2 * tokens * tokens * dim + 2 * tokens * tokens * hidden)
    return unfolded - 2.0 * tokens * hidden * dim
