"""Compiled steps of training against torch's own, one at a time, by the processor's time of one thread.

For each activation the time of a number; for attention, forward and back, compiled and in blocks of torch's
products; and the rates of a weight's three products. The smallest of some runs counts, so that other work on
the machine disturbs little. To hold oneDNN to smaller instruction sets, set ONEDNN_MAX_CPU_ISA.

    OMP_NUM_THREADS=1 python bench/kernels.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lexmill.cli.options import begin_computing

begin_computing()

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from lexmill.model import attend as attention  # noqa: E402
from lexmill.model.kernels import ACTIVATIONS, Kernels, load  # noqa: E402
from lexmill.model.scope import Scope  # noqa: E402

TORCH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
ROWS, WIDTH, INNER = 4096, 256, 1024
TEXTS, HEADS, LENGTH, HEAD_WIDTH = 16, 4, 256, 64


def smallest(work: Callable[[], Any], runs: int = 10) -> float:
    """Seconds of this process."""
    work()
    found = []
    for _ in range(runs):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def activations(kernels: Kernels) -> None:
    """Nanoseconds a number, bfloat16."""
    gate, up, down = (torch.randn(ROWS, INNER).bfloat16() for _ in range(3))
    print("activations, ns a number: forward, back, gated forward, gated back; torch forward")
    for name, number in ACTIVATIONS.items():
        works = (
            partial(kernels.gated, gate, None, number),
            partial(kernels.gated_back, gate, None, down, number),
            partial(kernels.gated, gate, up, number),
            partial(kernels.gated_back, gate, up, down, number),
            partial(TORCH[name], gate),
        )
        print(f"  {name:<10}" + "".join(f"{1e9 * smallest(work) / gate.numel():8.2f}" for work in works))


def scopes() -> dict[str, Scope]:
    """What queries see: all, what is behind them, their own of some documents in a row, and both."""
    document = torch.randint(0, 4, (TEXTS, LENGTH)).sort(1).values
    same = (document[:, :, None] == document[:, None, :])[:, None]
    behind = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return {
        "all": Scope(),
        "causal": Scope(causal=True),
        "documents": Scope(same),
        "documents, causal": Scope(same & behind),
    }


def attend_in_turn(levels: list[str]) -> None:
    """Milliseconds, forward and back, bfloat16."""
    together = torch.randn(TEXTS, LENGTH, 3 * HEADS, HEAD_WIDTH).bfloat16()
    leaves = [part.transpose(1, 2).requires_grad_() for part in together.split(HEADS, 2)]
    down = torch.randn(TEXTS, LENGTH, HEADS, HEAD_WIDTH).bfloat16().transpose(1, 2)
    print("attention, ms forward and back: " + ", ".join(levels))

    def both(scope: Scope) -> None:
        for leaf in leaves:
            leaf.grad = None
        attention.attend(*leaves, scope, HEAD_WIDTH**-0.5).backward(down)

    for name, scope in scopes().items():
        times = []
        for level in levels:
            chosen = load("avx512" if level == "blocks" else level)
            attention.kernels_for = partial(lambda kernels, tensor: kernels, chosen)
            times.append(smallest(partial(both, scope)))
        print(f"  {name:<20}" + "".join(f"{1000 * seconds:8.1f}" for seconds in times))


def products(kernels: Kernels) -> None:
    """GFLOP/s of a weight's products, bfloat16."""
    x, gradient = torch.randn(ROWS, WIDTH).bfloat16(), torch.randn(ROWS, INNER).bfloat16()
    weight, turned = torch.randn(INNER, WIDTH).bfloat16(), gradient.mT.contiguous()
    print(f"products of {ROWS} rows, {WIDTH} to {INNER}, GFLOP/s")
    works: dict[str, Callable[[], Any]] = {
        "forward, X Wᵀ": lambda: x @ weight.mT,
        "to its input, G W": lambda: gradient @ weight,
        "to the weight, Gᵀ X": lambda: gradient.mT @ x,
        "the same, G turned before": lambda: turned @ x,
    }
    if kernels.finds_weight_gradients:
        works["the same, compiled, float32"] = partial(kernels.weight_gradient, gradient, x, biased=False)
    for name, work in works.items():
        print(f"  {name:<32}{2 * ROWS * WIDTH * INNER / smallest(work) / 1e9:8,.0f}")


def main() -> None:
    torch.set_num_threads(1)
    kernels = load()
    if kernels is None:
        raise SystemExit("There are no compiled steps here; lexmill doctor says why.")
    print(f"compiled for {kernels.instruction_set}")
    activations(kernels)
    levels = [level for level in ("amx", "avx512_bf16") if load(level).instruction_set == level]
    attend_in_turn([*levels, "blocks"])
    products(load() or kernels)  # the best instruction set again: it is the process's


if __name__ == "__main__":
    main()
