"""The compiled module, and the structs that it shares with Python (`native/engine/engine.h`)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from typing import Any

from lexmill.devices import compiled_module, left_out
from lexmill.errors import ModelError

INSTRUCTION_SETS = ("portable", "avx2", "avx512_vnni", "avx512_bf16", "amx")


def _struct(name: str, fields: list[tuple[str, Any]]) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _numbers(names: str) -> list[tuple[str, Any]]:
    return [(name, c_int64) for name in names.split()]


def _addresses(names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names.split()]


MatrixStruct = _struct("Matrix", _numbers("type rows columns") + _addresses("values scales minima"))
OperationStruct = _struct(
    "Operation",
    [
        *_numbers("kind source to"),
        ("matrices", c_int64 * 3),
        ("biases", c_int64 * 3),
        *_numbers("norm norm_bias centred activation gated add wanted slot memory queries rotary"),
        *_numbers("query_norm key_norm causal window bias"),
        ("epsilon", c_double),
        ("scale", c_double),
    ],
)
BatchStruct = _struct(
    "Batch",
    _numbers("tokens wanted rows pages memory_pages prompt")
    + _addresses("ids positions segments row tables wanted_tokens lengths memory_tables memory_lengths"),
)
PlanStruct = _struct(
    "Plan",
    [
        *_numbers("matrices vectors buffers"),
        ("operations", c_int64 * 2),
        *_numbers("slots pages most_tokens most_keys heads kv_heads head_width exact_pages parts"),
        *_addresses("matrix vector vector_size buffer_width"),
        ("operation", c_void_p * 2),
    ],
)


def available() -> bool:
    """Whether the engine was built, and is not turned off (environment variable LEXMILL_NATIVE=0)."""
    try:
        library()
    except ModelError:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled module.

    Raises:
        ModelError: it was not built, or is turned off.
    """
    if left_out():
        raise ModelError("The compiled engine is turned off (LEXMILL_NATIVE=0).")
    path = compiled_module("_engine")
    hint = "Install lexmill where there is a C++ compiler and CMake, or take --backend torch."
    if path is None:
        raise ModelError("The compiled engine was not built.", hint)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise ModelError(f"The compiled engine cannot be loaded: {error}.", hint) from error
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "open": (c_void_p, [c_void_p, c_int, c_int]),
        "run": (c_int, [c_void_p, c_int, c_void_p, c_void_p]),
        "read": (None, [c_void_p, c_int, c_int64, c_int64, c_void_p]),
        "copy_page": (None, [c_void_p, c_int64, c_int64]),
        "close": (None, [c_void_p]),
        "instruction_set": (c_char_p, [c_int]),
        "pack": (
            None,
            [POINTER(MatrixStruct), c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int],
        ),
    }
    for name, (result, arguments) in signatures.items():
        call = getattr(found, f"lexmill_engine_{name}")
        call.restype, call.argtypes = result, arguments
    return found


def instruction_set(at_most: str = INSTRUCTION_SETS[-1]) -> str:
    """The one that this computer's engine takes."""
    return str(library().lexmill_engine_instruction_set(INSTRUCTION_SETS.index(at_most)).decode())
