"""Which number format to compute in: tried on this machine, never assumed."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

_TURNS = 4


def matmul_gflops(dtype: torch.dtype, size: int = 512, seconds: float = 0.05) -> float:
    """The best rate of a square matrix product in `dtype` within a short time, in GFLOP/s."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return 2 * size**3 / best / 1e9


def choose_precision(asked: str = "auto", device: str = "cpu") -> str:
    """ "float32" or "bfloat16".

    A GPU is asked whether it has bfloat16; a CPU is tried.

    bfloat16 is chosen only where a product in it runs at least 1.5 times as fast: on CPUs without
    the instructions it is tens of times slower.
    """
    if asked != "auto":
        return asked
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    best = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    for _ in range(_TURNS):  # in turn: another process may hold a core for a while
        for dtype in best:
            best[dtype] = max(best[dtype], matmul_gflops(dtype))
    return "bfloat16" if best[torch.bfloat16] >= 1.5 * best[torch.float32] else "float32"


def autocast(precision: str, device: str = "cpu") -> Any:
    """A context in which products run in `precision`; weights and sums stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()
