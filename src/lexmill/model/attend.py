"""The heart of attention: softmax(Q Kᵀ + bias) V, by the fastest way that gives the same numbers.

Inference and GPUs take torch's fused kernel. Training on a CPU takes compiled attention where its products are
bfloat16 (`native/attention.cpp`), and else products over blocks of queries: at rows of some hundred tokens both
are faster, forward and back, than the fused kernel (`bench/kernels.py`; measured in docs/decisions.md).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.model.kernels import kernels_for, learns_on_cpu
from lexmill.model.scope import Scope

_LONGEST_IN_BLOCKS = 1024  # keys; beyond, the stored weights grow too large
_BLOCK = 128  # queries
_softmax_backward = torch.ops.aten._softmax_backward_data.out


def attend(q: Tensor, k: Tensor, v: Tensor, scope: Scope, scale: float) -> Tensor:
    """What each query gathers: (batch, heads, queries, head_width).

    Args:
        q: (batch, heads, queries, head_width).
        k, v: (batch, kv_heads, keys, head_width).
    """
    if learns_on_cpu(q, k, v) and k.shape[2] <= _LONGEST_IN_BLOCKS:
        compiled = kernels_for(q)
        if compiled and compiled.attends and q.dtype == torch.bfloat16 and q.shape[3] % 2 == 0:
            return _Compiled.apply(q, k, v, scope.mask_by_key, scope.bias, scope.causal, scale, compiled)
        return _Blocks.apply(q, k, v, scope.mask, scope.bias, scope.causal, scale)
    mask = _float_mask(scope, q.dtype, q.shape[2], k.shape[2]) if scope.bias is not None else scope.mask
    causal = scope.causal and mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def attend_joined(joined: Tensor, heads: tuple[int, int], scope: Scope, scale: float) -> Tensor | None:
    """What the queries of a text gather from the text itself; None where compiled attention cannot tell.

    Queries and keys are turned by `scope.rotary` in their place: `joined` is used up. Their gradients come
    out side by side, as the product before wants them.

    Args:
        joined: (batch, time, (heads + 2 kv_heads) head_width): queries, keys and values side by side.
        heads: how many of queries, and of keys.

    Returns:
        (batch, time, heads * head_width).
    """
    compiled = kernels_for(joined)
    width = joined.shape[-1] // (heads[0] + 2 * heads[1])
    if not (compiled and compiled.attends and learns_on_cpu(joined) and joined.dtype == torch.bfloat16):
        return None
    if joined.shape[1] > _LONGEST_IN_BLOCKS or width % 2 or joined.is_leaf:
        return None
    cos, sin = scope.rotary or (None, None)
    return _Joined.apply(
        joined, cos, sin, scope.mask_by_key, scope.bias, scope.causal, scale, heads, width, compiled
    )


def attention_weights(q: Tensor, k: Tensor, scope: Scope, scale: float) -> Tensor:
    """How much each query looks at each key: (batch, heads, queries, keys), rows sum to 1."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if scope.bias is not None:
        return (scores + _float_mask(scope, scores.dtype, q.shape[2], k.shape[2])).softmax(-1)
    mask = scope.mask
    if mask is None and scope.causal and q.shape[2] > 1:
        mask = _lower_triangle(q.shape[2], k.shape[2], q.device)
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def _lower_triangle(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _float_mask(scope: Scope, dtype: torch.dtype, queries: int, keys: int) -> Tensor:
    """Mask and bias as one tensor to add."""
    assert scope.bias is not None
    bias, mask = scope.bias.to(dtype), scope.mask
    if mask is None and scope.causal and queries > 1:
        mask = _lower_triangle(queries, keys, bias.device)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


@lru_cache(maxsize=8)
def _above_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _hide(scores: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool, rows: slice) -> None:
    """Add the bias to some queries' scores, (batch, heads, queries, keys), and hide what they must not see."""
    queries, keys = scores.shape[2:]
    if bias is not None:
        scores.add_(bias[:, :, rows, :keys].to(scores.dtype))
    if mask is not None:
        scores.masked_fill_(~mask[:, :, rows, :keys], float("-inf"))
    elif causal:
        own = scores[..., keys - queries :]
        own.masked_fill_(_above_diagonal(queries, scores.device), float("-inf"))


class _Compiled(torch.autograd.Function):
    """Attention in compiled code; keeps no weights, but computes them again on the way back."""

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, causal, scale, compiled):  # type: ignore[override]
        by_key = None if bias is None else bias[0].mT.float().contiguous()
        ctx.settings = {"scale": scale, "causal": causal and mask is None}
        out, log_sums = compiled.attention(q, k, v, mask=mask, bias=by_key, **ctx.settings)
        ctx.save_for_backward(q, k, v, out, log_sums, mask, by_key)
        ctx.compiled, ctx.with_bias = compiled, bias is not None and bias.requires_grad
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        *kept, mask, by_key = ctx.saved_tensors
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        dq, dk, dv, dbias = ctx.compiled.attention_back(
            *kept, gradient, mask=mask, bias=by_key, with_bias=ctx.with_bias, **ctx.settings
        )
        return dq, dk, dv, None, None if dbias is None else dbias.mT[None], None, None, None


class _Joined(torch.autograd.Function):
    """The same for queries, keys and values side by side, rotation included."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, joined, cos, sin, mask, bias, causal, scale, heads, width, compiled
    ):
        turned, *parts = _parts(joined, heads, width)
        if cos is not None:
            compiled.rotate(turned, turned, cos, sin, 1.0)
        by_key = None if bias is None else bias[0].mT.float().contiguous()
        ctx.settings = {"scale": scale, "causal": causal and mask is None}
        out, log_sums = compiled.attention(*parts, mask=mask, bias=by_key, **ctx.settings)
        ctx.save_for_backward(joined, out, log_sums, mask, by_key, cos, sin)
        ctx.compiled, ctx.with_bias = compiled, bias is not None and bias.requires_grad
        ctx.heads, ctx.width = heads, width
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        joined, out, log_sums, mask, by_key, cos, sin = ctx.saved_tensors
        to_joined = torch.empty_like(joined)
        turned, *into = _parts(to_joined, ctx.heads, ctx.width)
        down = gradient.contiguous().unflatten(-1, (-1, ctx.width)).transpose(1, 2)
        kept = *_parts(joined, ctx.heads, ctx.width)[1:], out, log_sums
        *_, dbias = ctx.compiled.attention_back(
            *kept, down, mask=mask, bias=by_key, with_bias=ctx.with_bias, into=into, **ctx.settings
        )
        if cos is not None:
            ctx.compiled.rotate(turned, turned, cos, sin, -1.0)
        return to_joined, None, None, None, None if dbias is None else dbias.mT[None], *(None,) * 5


def _parts(joined: Tensor, heads: tuple[int, int], width: int) -> list[Tensor]:
    """Queries and keys together, (batch, time, heads, width), and of each of the three (batch, heads, time, width)."""
    split = joined.unflatten(-1, (-1, width))
    three = split.split([heads[0], heads[1], heads[1]], dim=2)
    return [split[:, :, : sum(heads)], *(part.transpose(1, 2) for part in three)]


class _Blocks(torch.autograd.Function):
    """Attention by plain products, a block of queries at a time; keeps the weights for the way back.

    With `causal`, a block multiplies only the keys up to its own end: a third of the work is saved.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, causal, scale):  # type: ignore[override]
        batch, heads, time, width = q.shape
        groups, keys = heads // k.shape[1], k.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            # heads that share keys lie behind each other, as more queries: (batch * kv_heads, groups, …)
            compiled = kernels_for(q) if mask is None and bias is None else None
            # scores are scaled in the softmax, or else the queries: they are fewer
            queries = (q if compiled else q * scale).reshape(-1, groups, time, width)
            k, v = (part.reshape(-1, keys, width) for part in (k, v))
            out = torch.empty_like(queries)
            weights, ends = [], []
            for start in range(0, time, _BLOCK):
                end = min(time, start + _BLOCK)
                seen = end + keys - time if causal else keys
                block = queries[:, :, start:end].reshape(-1, groups * (end - start), width)
                scores = torch.bmm(block, k[:, :seen].mT)
                if compiled:
                    compiled.softmax(scores, end - start, scale, causal=causal)
                else:
                    shaped = scores.view(batch, heads, end - start, seen)
                    _hide(shaped, mask, bias, causal, slice(start, end))
                    torch.softmax(scores, -1, out=scores)
                out[:, :, start:end] = torch.bmm(scores, v[:, :seen]).view(-1, groups, end - start, width)
                weights.append(scores)
                ends.append((start, end, seen))
        ctx.save_for_backward(queries, k, v, *weights)
        ctx.ends, ctx.scale, ctx.shape = ends, scale, (batch, heads, time, width)
        ctx.compiled = compiled
        ctx.bias_shape = None if bias is None or not bias.requires_grad else bias.shape
        return out.view(batch, heads, time, width)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        queries, k, v, *weights = ctx.saved_tensors
        batch, heads, time, width = ctx.shape
        groups, keys = queries.shape[1], k.shape[1]
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.reshape(-1, groups, time, width)
            dq, dk, dv = torch.empty_like(queries), torch.zeros_like(k), torch.zeros_like(v)
            dbias = None if ctx.bias_shape is None else k.new_zeros(ctx.bias_shape, dtype=torch.float32)
            for share, (start, end, seen) in zip(weights, ctx.ends):
                flat = (-1, groups * (end - start), width)
                block, down = queries[:, :, start:end].reshape(flat), gradient[:, :, start:end].reshape(flat)
                dscores = torch.bmm(down, v[:, :seen].mT)
                if ctx.compiled:
                    ctx.compiled.softmax_back(share, dscores, ctx.scale)
                else:
                    _softmax_backward(dscores, share, -1, share.dtype, grad_input=dscores)
                if dbias is not None:
                    shaped = dscores.view(batch, heads, end - start, seen)
                    dbias[0, :, start:end, :seen] += shaped.sum(0, dtype=torch.float32)
                dv[:, :seen].baddbmm_(share.mT, down)
                dk[:, :seen].baddbmm_(dscores.mT, block)
                dq[:, :, start:end] = torch.bmm(dscores, k[:, :seen]).view(-1, groups, end - start, width)
        if not ctx.compiled:
            dq.mul_(ctx.scale)
        dk, dv = (part.view(batch, -1, keys, width) for part in (dk, dv))
        return dq.view(ctx.shape), dk, dv, None, dbias, None, None
