"""Cross-entropy straight from hidden states: the logits of all positions never exist at once."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024  # positions whose logits exist at the same time


def linear_cross_entropy(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, int | None]:
    """The sum of cross-entropies, in nats, of softmax(hidden weightᵀ + bias).

    Loss and gradients are found together, some rows at a time. The products run in autocast's
    number format where it is on, the softmax always in float32.

    Args:
        hidden: (n, width).
        targets: (n,), all of them valid ids: leave out what does not count.
        weight: (vocabulary, width).
        bias: (vocabulary,).

    Returns:
        The sum, and without gradients also how many targets are the most probable token.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, bias, dtype), None
    total, right = hidden.new_zeros((), dtype=torch.float32), 0
    with torch.autocast(device, enabled=False):
        columns = weight.to(dtype).mT
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = _logits(hidden[rows].to(dtype), columns, bias)
            picked = logits.gather(1, targets[rows, None])[:, 0]
            total += (logits.logsumexp(-1) - picked).sum()
            right += int((logits.argmax(-1) == targets[rows]).sum())
    return total, right


def _logits(hidden: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.mm(hidden, columns).float()
    return logits if bias is None else logits.add_(bias.float())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, dtype):  # type: ignore[override]
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(dtype), weight.to(dtype)
            columns = matrix.mT
            to_hidden, to_weight = torch.empty_like(inputs), torch.zeros_like(weight, dtype=torch.float32)
            to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            total = hidden.new_zeros((), dtype=torch.float32)
            for start in range(0, len(inputs), _ROWS):
                rows = slice(start, start + _ROWS)
                logprobs = torch.log_softmax(_logits(inputs[rows], columns, bias), -1)
                index = targets[rows, None]
                total -= logprobs.gather(1, index).sum()
                gradient = logprobs.exp_()  # softmax minus one at the target
                gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
                if to_bias is not None:
                    to_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                torch.mm(gradient, matrix, out=to_hidden[rows])
                if dtype == torch.float32:
                    to_weight.addmm_(gradient.mT, inputs[rows])
                else:
                    to_weight += torch.mm(gradient.mT, inputs[rows])
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale):  # type: ignore[override]
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        bias = None if to_bias is None else to_bias * scale
        return to_hidden.to(hidden) * scale, to_weight.to(weight) * scale, None, bias, None
