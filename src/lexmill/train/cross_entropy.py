"""Cross-entropy straight from hidden states: the logits of all positions never exist at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from lexmill.model.kernels import kernels_for
from lexmill.train.examples import IGNORED

_ROWS = 1024  # positions whose logits exist at the same time
_GPU_ROWS = 4096  # the same on a GPU, which is idle between products that are small
# Logits that are worked on at once on a CPU without kernels, so that they stay in its cache.
_CACHED = 1 << 18
_FEWEST = 8  # positions of them, however large the vocabulary
_FUSED: ContextVar[bool] = ContextVar("fused", default=False)


@contextlib.contextmanager
def fused_softmax(fused: bool) -> Iterator[None]:
    """Let torch.compile make one kernel of what happens to logits on a GPU, while the block runs."""
    before = _FUSED.set(fused)
    try:
        yield
    finally:
        _FUSED.reset(before)


def linear_cross_entropy(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, int | None]:
    """The sum of cross-entropies, in nats, of softmax(hidden weightᵀ + bias).

    Loss and gradients are found together, some rows at a time. The products run in autocast's
    number format where it is on, the softmax always in float32.

    Args:
        hidden: (n, width).
        targets: (n,), valid ids, or IGNORED where nothing is learned.
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
        for rows in _parts(hidden):
            logits = _logits(hidden[rows].to(dtype), columns, bias)
            counts = targets[rows] != IGNORED
            picked = logits.gather(1, targets[rows, None].clamp(min=0))[:, 0]
            total += (logits.logsumexp(-1) - picked)[counts].sum()
            right += int((logits.argmax(-1) == targets[rows]).sum())  # IGNORED is no id
    return total, right


def linear_token_losses(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """The cross-entropy of each place by itself, (n,), float32; 0 where the target is IGNORED.

    For losses that weigh places by what others lost. Arguments as in `linear_cross_entropy`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearTokenLosses.apply(hidden, weight, targets, dtype)


class _LinearTokenLosses(torch.autograd.Function):
    """Keeps each place's own gradient where the head does not learn; else makes the logits again on the way back."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):  # type: ignore[override]
        wanted, with_weight = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(dtype), weight.to(dtype)
            lost = hidden.new_zeros(len(hidden), dtype=torch.float32)
            to_hidden = torch.empty_like(inputs) if wanted and not with_weight else None
            for rows in _parts(inputs):
                logits = torch.mm(inputs[rows], matrix.mT)
                exact = logits.float()
                picked = exact.gather(1, targets[rows, None].clamp(min=0))[:, 0]
                lost[rows] = (exact.logsumexp(-1) - picked) * (targets[rows] != IGNORED)
                if to_hidden is not None:
                    _to_gradient(logits, targets[rows], None)
                    torch.mm(logits, matrix, out=to_hidden[rows])
        ctx.save_for_backward(to_hidden, *((inputs, matrix, targets) if with_weight else ()))
        ctx.dtypes = hidden.dtype, weight.dtype
        return lost

    @staticmethod
    def backward(ctx, scales):  # type: ignore[override]
        to_hidden, *kept = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        if to_hidden is not None:
            return (to_hidden * scales[:, None]).to(hidden), None, None, None
        inputs, matrix, targets = kept
        to_hidden = torch.empty_like(inputs)
        to_weight = torch.zeros_like(matrix, dtype=torch.float32)
        with torch.autocast(inputs.device.type, enabled=False):
            for rows in _parts(inputs):
                logits = torch.mm(inputs[rows], matrix.mT)
                _to_gradient(logits, targets[rows], None)
                logits *= scales[rows, None].to(logits.dtype)
                torch.mm(logits, matrix, out=to_hidden[rows])
                _add_gradients(logits, inputs[rows], to_weight, None)
        return to_hidden.to(hidden), to_weight.to(weight), None, None


def _logits(hidden: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.mm(hidden, columns).float()
    return logits if bias is None else logits.add_(bias.float())


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits of a part turn into their gradient where they lie."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, dtype):  # type: ignore[override]
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(dtype), weight.to(dtype)
            to_hidden = torch.empty_like(inputs)
            # a head that does not learn needs no gradient, which would be the largest tensor of a step
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
            to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            total = hidden.new_zeros((), dtype=torch.float32)
            for rows in _parts(inputs):
                logits = torch.mm(inputs[rows], matrix.mT)
                total += _to_gradient(logits, targets[rows], bias)
                torch.mm(logits, matrix, out=to_hidden[rows])
                _add_gradients(logits, inputs[rows], to_weight, to_bias)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale):  # type: ignore[override]
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        bias = None if to_bias is None else to_bias * scale
        learned = None if to_weight is None else to_weight.to(weight) * scale
        return to_hidden.to(hidden) * scale, learned, None, bias, None


def _add_gradients(gradient: Tensor, part: Tensor, to_weight: Tensor | None, to_bias: Tensor | None) -> None:
    """Add what some rows give to the gradients of weight and bias, where they are wanted.

    Args:
        gradient: (n, vocabulary), of the logits.
        part: (n, width), hidden states in the same type.
    """
    compiled = kernels_for(gradient)
    if to_weight is not None and gradient.dtype == torch.float32:
        to_weight.addmm_(gradient.mT, part)
    elif to_weight is not None and compiled and compiled.finds_weight_gradients:
        some, some_bias = compiled.weight_gradient(gradient, part, biased=to_bias is not None)
        to_weight += some
        if to_bias is not None and some_bias is not None:
            to_bias += some_bias
        return
    elif to_weight is not None:
        to_weight += torch.mm(gradient.mT, part)
    if to_bias is not None:
        to_bias += gradient.sum(0, dtype=torch.float32)


def _to_gradient(logits: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Put the gradient of the cross-entropy in the place of some logits; returns its sum.

    Args:
        logits: (n, vocabulary), without `bias`.
        targets: (n,); the gradient of an ignored one is 0.
    """
    if compiled := kernels_for(logits):
        return compiled.cross_entropy(logits, targets, bias).sum()
    if logits.is_cuda and _FUSED.get():
        return _fused_gradient()(logits, targets, bias)
    lost = logits.new_zeros((), dtype=torch.float32)
    at_once = len(logits) if logits.is_cuda else max(_CACHED // logits.shape[1], _FEWEST)
    for rows, index in zip(logits.split(at_once), targets[:, None].split(at_once)):
        exact = rows.float()  # the logits themselves where they are float32
        if bias is not None:
            exact += bias
        torch.log_softmax(exact, -1, out=exact)
        counts = index != IGNORED
        index = index.clamp(min=0)
        lost -= (exact.gather(1, index) * counts).sum()
        exact.exp_().scatter_add_(1, index, exact.new_full(index.shape, -1.0))  # less one at the target
        torch.mul(exact, counts, out=rows)  # converts in the same pass
    return lost


def _softmax_gradient(logits: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """The same as `_to_gradient` in whole operations, for torch.compile."""
    exact = logits.float() if bias is None else logits.float() + bias
    chances, counts = torch.log_softmax(exact, -1), (targets != IGNORED)[:, None]
    index = targets[:, None].clamp(min=0)
    lost = -(chances.gather(1, index) * counts).sum()
    own = torch.arange(logits.shape[1], device=logits.device)[None] == index
    logits.copy_((chances.exp() - own.float()) * counts)
    return lost


@functools.lru_cache(maxsize=1)
def _fused_gradient() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return torch.compile(_softmax_gradient)


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of (n, width) whose logits are made one after another."""
    size = _GPU_ROWS if rows.is_cuda else _ROWS
    return (slice(start, start + size) for start in range(0, len(rows), size))
