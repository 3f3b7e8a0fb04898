"""How weights begin, and which learn more slowly: it saves small models hundreds of steps (docs/decisions.md)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lexmill.model.config import ModelConfig
from lexmill.model.positions import relative_bucket

# What writes into the residual stream: begins at zero.
_WRITERS = ("attention.out.weight", "cross.out.weight", "mlp.down.weight")
# Heads that judge a whole text.
JUDGES = ("pooler.", "nsp.", "label.")
_FARTHEST = -8.0  # the lowest position bias: next to nothing, but still within reach of learning


def begin_weights(parameters: Mapping[str, Tensor], config: ModelConfig, seed: int) -> None:
    """Fill a model's parameters, by their own names; the same for the same seed on every machine.

    Normal with deviation 1/sqrt(inputs); what writes into the residual stream begins at zero
    (each block begins as the identity), and so trains faster from the first step. Where positions
    must be learned, some heads begin by looking nearby ("mimetic initialization", Trockman & Kolter
    2023): from nothing, a small model predicts by frequency alone for hundreds of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in parameters.items():
            if name.endswith(_WRITERS) or name.endswith(("bias", "relative.weight")):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * _deviation(name, weight, config)
                )
        if config.positions == "learned":
            _begin_learned_positions(parameters, config)
        elif config.positions == "relative":
            _begin_relative_positions(parameters, config, generator)


def _deviation(name: str, weight: Tensor, config: ModelConfig) -> float:
    if name in ("embed.weight", "segment_embed.weight"):
        return 0.02 if config.positions == "rotary" else 0.1
    if name == "head.weight":
        return 0.02
    deviation = weight.shape[1] ** -0.5
    unscaled = not config.scale_scores and name.endswith(".q.weight")
    return deviation * config.head_width**-0.5 if unscaled else deviation


def rate_factor(name: str, config: ModelConfig) -> float:
    """What the learning rate of a parameter is multiplied by.

    Optimisers move weights by their rate, however small weights and gradients are. Queries whose
    scores are not divided by sqrt(head_width) begin that much smaller instead, and must move that
    much slower. What judges whole texts beside another objective has few labels a step, and walks at
    random at full rate; a classifier learns nothing but its labels.
    """
    if config.nsp and name.startswith(JUDGES):
        return 0.1
    if not config.scale_scores and name.endswith(".q.weight"):
        return config.head_width**-0.5
    return 1.0


def _begin_learned_positions(parameters: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Positions as sinusoids (Vaswani et al. 2017) over the first `head_width` features, stronger there than words.

    In two thirds of the heads queries and keys begin as just these features, so that places that
    are alike, that is near, look at each other. The other features and heads stay free for words,
    and to gather from afar.
    """
    positions, size = parameters["position_embed.weight"], config.head_width
    rates = 1000 ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.arange(len(positions)).float()[:, None] * rates
    positions.zero_()
    positions[:, :size] = 0.4 * torch.cat([angles.sin(), angles.cos()], 1)[:, :size]
    for name, weight in parameters.items():
        if name.endswith(("attention.q.weight", "attention.k.weight")):
            for head in weight.split(size)[: config.heads * 2 // 3]:
                head.copy_(0.8 * torch.eye(size, weight.shape[1]))


def _begin_relative_positions(
    parameters: Mapping[str, Tensor], config: ModelConfig, generator: torch.Generator
) -> None:
    """Heads in three parts: some look just behind, some just ahead (a decoder's: a little behind), some anywhere.

    What the encoder sees nearby goes into its stream from the first step, and a decoder's
    cross-attention begins with keys that match queries: a sentinel that is being written finds
    the same sentinel in the text, and with it what surrounds the gap.
    """
    third = config.heads // 3
    for side, causal in (("encoder", False), ("decoder", True)):
        bias = parameters[f"{side}.relative.weight"]
        offset = _nearest_offsets(len(bias), config.relative_distance, causal)[:, None]
        near = -offset.abs().float()
        bias[:, :third] = torch.where(offset < 0, near, _FARTHEST)
        bias[:, third : 2 * third] = 0.25 * near if causal else torch.where(offset > 0, near, _FARTHEST)
        bias.clamp_(min=_FARTHEST)
    for name, weight in parameters.items():
        if name.startswith("encoder.") and name.endswith("attention.out.weight"):
            scale = 0.1 * weight.shape[1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        elif name.endswith("cross.k.weight"):
            weight.copy_(1.5 * config.head_width**0.5 * parameters[name.replace("cross.k", "cross.q")])


def _nearest_offsets(buckets: int, distance: int, causal: bool) -> Tensor:
    """Of each bucket of a position bias the offset nearest to 0: (buckets,)."""
    offsets = torch.arange(1 - distance, distance) if not causal else torch.arange(1 - distance, 1)
    order = offsets.abs().argsort(descending=True, stable=True)  # the nearest is written last and stays
    nearest = torch.zeros(buckets, dtype=torch.long)
    for offset, bucket in zip(offsets[order], relative_bucket(offsets[order], buckets, distance, causal)):
        nearest[bucket] = offset
    return nearest
