"""A linear layer with an adapter, and several of the same input at once.

In training in bfloat16 on a CPU the layers of one input are one step of the graph: one thin product for all their A,
each B added where the layer's own result lies, and one gradient of the input that all of them add to
(measured: docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.linear import Linear


class LoraLinear(nn.Module):
    """base(x) + scale · B (A dropout(x)); only A and B learn (Hu et al. 2021).

    Args:
        base: a linear layer, kept as it is.
        a: (rank, inputs); shared by layers that Hugging Face holds as one.
        b: (outputs, rank).
    """

    base: Any  # a module with a weight and a bias

    def __init__(
        self, base: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b = base, a, b
        self.scale, self.dropout = scale, dropout
        self.off = False  # compute as the base does; see `without_adapter`

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.base(x)
        found = adapted(x, [self])
        if found is not None:
            return found[0]
        seen = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return self.base(x) + F.linear(F.linear(seen, self.lora_a) * self.scale, self.lora_b)

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs): the merged weight, for who multiplies with it himself, as the loss does with a head's."""
        if self.off:
            return self.base.weight
        return self.base.weight + self.scale * (self.lora_b @ self.lora_a)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def adapted(x: Tensor, *outputs: Sequence[nn.Module]) -> tuple[Tensor, ...] | None:
    """What adapted layers make of the same input; None where they are to be called one by one.

    Args:
        x: (…, inputs).
        outputs: layers whose results are wanted side by side, for each result.

    Returns:
        Tensors (…, outputs of all its layers), bfloat16.
    """
    layers: list[Any] = [layer for output in outputs for layer in output if _is_plain(layer)]
    if len(layers) < sum(map(len, outputs)) or not _learns_in_bfloat16(x):
        return None
    weights = [layer.base.weight for layer in layers]
    biases = [layer.base.bias for layer in layers]
    halves = [half for layer in layers for half in (layer.lora_a, layer.lora_b)]
    counts, scales = [len(output) for output in outputs], [layer.scale for layer in layers]
    return _Adapted.apply(x, counts, scales, weights, biases, *halves)


def _is_plain(layer: nn.Module) -> bool:
    """A frozen linear layer with an adapter that is on and drops nothing, whole in this process."""
    return (
        isinstance(layer, LoraLinear)
        and not layer.off
        and not (layer.training and layer.dropout)
        and type(layer.base) is Linear
        and not layer.base.weight.requires_grad
        and not hasattr(layer.lora_a, "full_tensor")
    )


def _learns_in_bfloat16(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class _Adapted(torch.autograd.Function):
    """Products in bfloat16. `halves` are A and B of each layer, and their gradients float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        counts: list[int],
        scales: list[float],
        weights: list[Tensor],
        biases: list[Tensor | None],
        *halves: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1]).bfloat16()
            a = torch.cat(halves[::2]).bfloat16()
            scaled = [half * scale for half, scale in zip(halves[1::2], scales)]
            seen = rows @ a.mT
            ctx.parts, results, start = [], [], 0
            for group in _groups(counts):
                weight, b = _joined(weights[group]), torch.block_diag(*scaled[group]).bfloat16()
                kept = [bias for bias in biases[group] if bias is not None]
                out = F.linear(rows, weight, torch.cat(kept).bfloat16() if kept else None)
                some = slice(start, start + b.shape[1])
                results.append(out.addmm_(seen[:, some], b.mT).view(*x.shape[:-1], -1))
                ctx.parts.append((group, some))
                start = some.stop
            ctx.save_for_backward(rows, seen, *halves)
        ctx.scales, ctx.weights, ctx.shape, ctx.dtype = scales, weights, x.shape, x.dtype
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, seen, *halves = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            a = torch.cat(halves[::2]).bfloat16()
            to_seen, to_rows, to_b = torch.empty_like(seen), None, []
            for (group, some), gradient in zip(ctx.parts, gradients):
                down = gradient.reshape(len(rows), -1)
                own = [half * scale for half, scale in zip(halves[1::2][group], ctx.scales[group])]
                torch.mm(down, torch.block_diag(*own).bfloat16(), out=to_seen[:, some])
                # thin one way or the other: torch is faster at few rows than at few columns
                to_b += _diagonal((seen[:, some].mT @ down).mT, own, ctx.scales[group])
                if ctx.needs_input_grad[0]:
                    weight = _joined(ctx.weights[group])
                    to_rows = down @ weight if to_rows is None else to_rows.addmm_(down, weight)
            to_a = (to_seen.mT @ rows).float().split([len(half) for half in halves[::2]])
            if to_rows is not None:
                to_rows = to_rows.addmm_(to_seen, a).view(ctx.shape).to(ctx.dtype)
        return to_rows, None, None, None, None, *(half for pair in zip(to_a, to_b) for half in pair)


def _groups(counts: list[int]) -> list[slice]:
    """Which layers make each result."""
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts)]


def _joined(weights: list[Tensor]) -> Tensor:
    return (weights[0] if len(weights) == 1 else torch.cat(weights)).bfloat16()


def _diagonal(gradient: Tensor, halves: list[Tensor], scales: list[float]) -> list[Tensor]:
    """What a gradient of `block_diag` says of each block, float32, times the block's scale."""
    found, row, column = [], 0, 0
    for half, scale in zip(halves, scales):
        rows, columns = half.shape
        found.append(gradient[row : row + rows, column : column + columns].float() * scale)
        row, column = row + rows, column + columns
    return found
