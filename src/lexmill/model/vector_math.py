"""torch's elementwise functions on a CPU, called once by one thread before several threads call them.

Intel's vector library, which torch has these computed by, finds out at the first call of each function which code is best for the CPU.
Where several threads make that call at once, one of them may run code of a lower precision, with errors of 1e-4, for that one
call (pytorch/pytorch#188792; seen here in the cosines of rotary positions, in about one training run of thirty on a busy machine).
"""

from __future__ import annotations

import functools

import torch

_FUNCTIONS = [
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "rsqrt",
    "sigmoid",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "trunc",
]


@functools.cache
def settle_vector_math() -> None:
    """Make each function's first call; what follows gives the same bits every time. Once a process."""
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _FUNCTIONS:
            getattr(torch, name)(one)
