"""What this machine can do at best (`native/engine/limits.cpp`), so that a rate can be called near or far from it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from lexmill.inference.native.library import library

# In the order of `Kind` in native/engine/limits.cpp.
_KINDS = ("read", "float32", "int8", "int8_short", "int8_vnni", "bfloat16", "int8_amx", "bfloat16_amx")
_LARGE = 512 << 20  # bytes, more than caches hold


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The best rates that were measured with so many threads; 0 where the processor has no such instructions.

    Attributes:
        threads: how many ran side by side.
        memory_bytes_per_second: read from 512 MiB.
        model_bytes_per_second: read from as many bytes as the model has: a model that caches hold is read faster.
        float32_per_second: operations (a multiplication and an addition are two) in float32.
        int8_per_second: of bytes, summed in 32 bits, by the best instructions there are.
        int8_short_per_second: of bytes, summed in 16 bits (AVX2), which overflows after some steps.
        bfloat16_per_second: of bfloat16, summed in float32, by the best instructions there are.
    """

    threads: int
    memory_bytes_per_second: float
    model_bytes_per_second: float
    float32_per_second: float
    int8_per_second: float
    int8_short_per_second: float
    bfloat16_per_second: float


def measure_limits(threads: int, model_bytes: int) -> Limits:
    """Measure, about 3 seconds long.

    Raises:
        ModelError: the engine was not built.
    """
    rate = {name: _limit(name, threads) for name in _KINDS[1:]}
    return Limits(
        threads=threads,
        memory_bytes_per_second=_limit("read", threads, _LARGE),
        model_bytes_per_second=_limit("read", threads, model_bytes),
        float32_per_second=rate["float32"],
        int8_per_second=max(rate["int8"], rate["int8_vnni"], rate["int8_amx"]),
        int8_short_per_second=rate["int8_short"],
        bfloat16_per_second=max(rate["bfloat16"], rate["bfloat16_amx"]),
    )


def _limit(kind: str, threads: int, size: int = 0) -> float:
    call = library().lexmill_limit
    call.restype, call.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    return float(call(_KINDS.index(kind), threads, size))
