"""What llama.cpp's rounding of activations costs: lexmill rounds them in the same way and looks.

llama.cpp multiplies weights of 16 bits and fewer with activations that it rounds first, and no option
turns that off on a CPU. How much that changes depends on the model, so it is measured on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

_LAST_BIT = 2.0**-23  # of a float32: what two correct programs differ by


class Rounding(NamedTuple):
    """How llama.cpp rounds what it multiplies with weights of some type."""

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]


def _to_q8_0(values: torch.Tensor) -> torch.Tensor:
    """As ggml's quantize_row_q8_0 and back; rows that do not divide into blocks are f16, like their weights."""
    if values.shape[-1] % 32:
        return values.half().float()
    blocks = values.reshape(-1, 32)
    whole, scale = _whole_numbers(blocks)
    return (whole * scale.half().float()).reshape(values.shape)


def _whole_numbers(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks as whole numbers from -127 to 127, and the scale of each, in float32."""
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return torch.round(blocks * inverse), largest / 127


def _sum_errors(values: torch.Tensor) -> torch.Tensor:
    """By how much the sums of blocks of 32 in ggml's Q8_1 are not the sums of their rounded values.

    They are stored for themselves, in half precision, and the offsets of the weights are multiplied with them.
    """
    whole, scale = _whole_numbers(values.unflatten(-1, (-1, 32)))
    sums = whole.sum(-1)
    return (sums * scale[..., 0]).half().float() - sums * scale[..., 0].half().float()


def _to_q8_k(values: torch.Tensor) -> torch.Tensor:
    """As ggml's quantize_row_q8_K and back: blocks of 256, whose largest weight becomes -127; a float32 scale."""
    blocks = values.reshape(-1, 256)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(peak != 0, -127 / peak, torch.zeros_like(peak))
    scale = torch.where(peak != 0, 1 / inverse, torch.zeros_like(peak))
    return (torch.round(blocks * inverse) * scale).reshape(values.shape)


_BF16 = Rounding("BF16", lambda values: values.bfloat16().float())
_F16 = Rounding("F16", lambda values: values.half().float())
_Q8_0, _Q8_K = Rounding("Q8_0", _to_q8_0), Rounding("Q8_K", _to_q8_k)
_Q8_1 = Rounding("Q8_1", _to_q8_0)  # the same blocks; their sums are `_sum_errors`
# By the type of the weights (ggml-cpu.c, `vec_dot_type`).
ROUNDING = {
    "F16": _F16,
    "BF16": _BF16,
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "MXFP4"), _Q8_0),
    **dict.fromkeys(("Q4_1", "Q5_1"), _Q8_1),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), _Q8_K),
}


class _Product(NamedTuple):
    """A weight, how its activations are rounded, and the offsets of its blocks, (rows, blocks)."""

    rounding: Rounding | None
    offsets: torch.Tensor | None


_EXACT = _Product(None, None)


class Rounded(TorchFunctionMode):
    """Within this block the input of every product with a weight of `network` is rounded as llama.cpp does.

    Args:
        types: the type of each weight in the file, by lexmill's names.
        offsets: of the weights whose types have them, (rows, blocks) by the same names.
        in_bf16: multiply in bfloat16 instead, as the engine reads prompts: inputs and weights that are not
            float32 are rounded to it, and so are values, and where no weight inside blocks is BF16 queries and keys.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        types: Mapping[str, str],
        offsets: Mapping[str, np.ndarray],
        in_bf16: bool = False,
    ) -> None:
        super().__init__()
        self._in_bf16 = in_bf16
        # of queries, keys and values; the engine looks at the same weights (`native/engine.py`, `_parts`)
        inside = {type for name, type in types.items() if ".blocks." in name}
        self._first_rounded = 2 if "BF16" in inside else 0
        self._products = {
            id(weight): _Product(
                ROUNDING.get(types.get(name, "")),
                torch.from_numpy(offsets[name]) if name in offsets else None,
            )
            for name, weight in network.named_parameters()
        }
        self.names = sorted(
            {product.rounding.name for product in self._products.values() if product.rounding}
        )
        self._shaken = False
        # the last matrices that were laid side by side for one product, as queries, keys and values are
        self._joined: tuple[torch.Tensor | None, list[torch.Tensor]] = (None, [])

    def shaken(self) -> Rounded:
        """The same, but each input is moved by about the last bit of a float32 first, the same way each time.

        What changes then is what no program could get the same.
        """
        other = copy.copy(self)
        other._shaken = True
        return other

    def __enter__(self) -> Rounded:
        self._generator = torch.Generator().manual_seed(0)
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self._in_bf16:
            first = self._first_rounded
            rounded: Any = [_BF16.apply(side) for side in args[first:3]]
            return func(*args[:first], *rounded, *args[3:], **(kwargs or {}))
        if func is not torch.nn.functional.linear:
            result = func(*args, **(kwargs or {}))
            if func is torch.cat and all(id(part) in self._products and part.ndim == 2 for part in args[0]):
                self._joined = result, list(args[0])
            return result
        values, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
        parts = self._joined[1] if weight is self._joined[0] else [weight]
        if self._shaken:
            noise = torch.randn(values.shape, generator=self._generator)
            values = values * (1 + _LAST_BIT * noise)
        product = torch.cat([self._multiplied(values, part) for part in parts], -1)
        return product if bias is None else product + bias

    def _multiplied(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rounding, offsets = self._products.get(id(weight), _EXACT)
        if self._in_bf16:
            return values @ weight.T if rounding is None else _BF16.apply(values) @ _BF16.apply(weight).T
        rounded = values if rounding is None else rounding.apply(values)
        product = rounded @ weight.T
        return product if offsets is None else product + _sum_errors(values) @ offsets.T
