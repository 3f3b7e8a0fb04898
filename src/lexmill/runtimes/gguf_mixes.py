"""Which type each tensor of a GGUF file gets: the mixes of llama.cpp, tensor by tensor (src/llama-quant.cpp).

A mix is a default type and exceptions: the output projection, and in some layers what llama.cpp's
authors found to suffer most (values of attention, the way down of the MLP). A type whose blocks do not
divide a tensor's rows is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lexmill.formats.blocks import BLOCK_TYPES, BlockType
from lexmill.model.config import ModelConfig


class Mix(NamedTuple):
    """`number` is the file's `general.file_type`; `default` the type of most tensors."""

    number: int
    default: str


# include/llama.h: llama_ftype. Q4_K and Q5_K alone mean the medium mix, as in llama-quantize.
MIXES: dict[str, Mix] = {
    "f32": Mix(0, "F32"),
    "f16": Mix(1, "F16"),
    "bf16": Mix(32, "BF16"),
    "q8_0": Mix(7, "Q8_0"),
    "q6_k": Mix(18, "Q6_K"),
    "q5_k_m": Mix(17, "Q5_K"),
    "q5_k_s": Mix(16, "Q5_K"),
    "q5_1": Mix(9, "Q5_1"),
    "q5_0": Mix(8, "Q5_0"),
    "q4_k_m": Mix(15, "Q4_K"),
    "q4_k_s": Mix(14, "Q4_K"),
    "q4_1": Mix(3, "Q4_1"),
    "q4_0": Mix(2, "Q4_0"),
}
ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}
# For rows that do not divide into blocks of 256.
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"


class Choice(NamedTuple):
    """The type of a tensor, and the one that it would have if its rows divided into blocks."""

    type: BlockType
    wanted: BlockType


def choose_types(
    mix: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, *, importance: bool = False
) -> dict[str, Choice]:
    """The type of each matrix in a file.

    Args:
        mix: one of `MIXES`.
        shapes: of every matrix that may be quantised, in torch's order, by its name in GGUF files.
        config: the model's.
        importance: whether there is an importance matrix; it changes the first layers of Q4_0 and Q5_0.
    """
    default = MIXES[mix].default
    values = sum(_is_value(name) for name in shapes)
    seen_values = seen_downs = 0
    chosen = {}
    for name in _processing_order(shapes):
        kind = default
        if not BLOCK_TYPES[default].quantised:
            pass
        elif name == _OUTPUT or (name == _EMBEDDING and _OUTPUT not in shapes):
            kind = _output_type(default, shapes[name])
        elif _is_value(name):
            kind = _value_type(mix, default, seen_values, values, config)
            seen_values += 1
        elif "ffn_down" in name:
            kind = _down_type(mix, default, seen_downs, config.layers, importance)
            seen_downs += 1
        chosen[name] = Choice(_that_fits(kind, shapes[name]), BLOCK_TYPES[kind])
    return chosen


def _processing_order(names: Iterable[str]) -> list[str]:
    """llama.cpp's: by layer where a name begins with one, then by name."""

    def key(name: str) -> tuple[int, str]:
        found = re.match(r"blk\.(\d+)\.", name)
        return (int(found[1]) if found else -1, name)

    return sorted(names, key=key)


def _is_value(name: str) -> bool:
    return "attn_v.weight" in name or "attn_qkv.weight" in name


def _output_type(default: str, shape: tuple[int, ...]) -> str:
    if not BLOCK_TYPES[default].fits(shape):
        return "Q8_0"
    return default if default == "Q8_0" else "Q6_K"


def _value_type(mix: str, default: str, index: int, count: int, config: ModelConfig) -> str:
    kind = default
    if mix in ("q4_k_m", "q5_k_m") and _gets_more_bits(index, count):
        kind = "Q6_K"
    elif mix == "q4_k_s" and index < 4:
        kind = "Q5_K"
    # llama.cpp calls this shape "70B": eight heads share each value, so more bits cost little
    large = config.layers == 80 and config.family in ("llama", "qwen2") and config.kv_heads < config.heads
    return "Q5_K" if large and kind == "Q4_K" else kind


def _down_type(mix: str, default: str, index: int, layers: int, importance: bool) -> str:
    first = index < layers // 8
    if mix in ("q4_k_m", "q5_k_m") and _gets_more_bits(index, layers):
        return "Q6_K"
    if mix == "q4_k_s" and first:
        return "Q5_K"
    if mix in ("q4_0", "q5_0") and importance and first:
        return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[mix]
    return default


def _gets_more_bits(index: int, count: int) -> bool:
    """The first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _that_fits(kind: str, shape: tuple[int, ...]) -> BlockType:
    for name in (kind, _SMALLER_BLOCKS.get(kind, kind), "F16"):
        if BLOCK_TYPES[name].fits(shape):
            return BLOCK_TYPES[name]
    raise AssertionError("F16 fits every shape")
