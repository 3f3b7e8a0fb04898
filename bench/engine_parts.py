"""Where the engine's time goes: what each part of a step takes less when it is left out.

    OMP_NUM_THREADS=2 python bench/engine_parts.py smol-Q4_0.gguf smol-Q8_0.gguf

For each part an engine is opened whose plan lacks its operations; all engines work by turns. The answers are wrong then,
the time of what remains is not. A linear layer's part holds the norm before it and the activation and sum behind it, with which
it is one operation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from lexmill.devices import this_machine, threads
from lexmill.inference.native.engine import NativeEngine
from lexmill.inference.native.plan import ATTEND, LINEAR, STORE, Operation, Plan
from lexmill.inference.native.speed import Runs, open_source

_PARTS = {
    ".attention.q.": "queries, keys, values",
    ".attention.out.": "attention's output",
    ".mlp.gate.": "MLP, gate and up",
    ".mlp.up.": "MLP, gate and up",
    ".mlp.down.": "MLP, down",
}
_ALL = "all"


def part_of(operation: Operation, plan: Plan) -> str:
    if operation.kind == ATTEND:
        return "attention"
    if operation.kind == STORE:
        return "keeping keys and values"
    if operation.kind != LINEAR:
        return "the rest"
    name = plan.matrices[operation.matrices[0]]
    return next((part for key, part in _PARTS.items() if key in name), "output projection")


class Partial(NativeEngine):
    """An engine that leaves a part out."""

    part = _ALL

    def _open(self, instruction_set: str) -> int:
        plan = self._plan
        first, second = (
            [operation for operation in each if part_of(operation, plan) != self.part]
            for each in plan.operations
        )
        plan.operations = first, second
        return super()._open(instruction_set)


def without(part: str, file: str, count: int) -> Runs:
    kind = type("Partial", (Partial,), {"part": part})
    return Runs(kind.open(open_source(Path(file)), threads=count, context=2048))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="GGUF files of decoders")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--written", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{this_machine().cpu}, {this_machine().cpu_class}, {threads()} threads\n")
    parts = [*dict.fromkeys(_PARTS.values()), "attention", "keeping keys and values", "output projection"]
    print(
        f"| share of the time | {' | '.join(parts)} | the rest | all, ms |\n|---|{'---|' * (len(parts) + 2)}"
    )
    for file in arguments.files:
        sides = {part: without(part, file, threads()) for part in (_ALL, *parts)}
        for what, tokens in (("read", arguments.prompt), ("write", arguments.written)):
            seconds: dict[str, list[float]] = {part: [] for part in sides}
            for _ in range(arguments.turns + 1):
                for part, runs in sides.items():
                    start = time.perf_counter()
                    getattr(runs, what)(tokens)
                    seconds[part].append(time.perf_counter() - start)
            middle = {part: statistics.median(each[1:]) for part, each in seconds.items()}
            whole = middle[_ALL]
            shares = [1 - middle[part] / whole for part in parts]
            each = 1000 * whole / (1 if what == "read" else tokens)
            told = f"a prompt of {tokens}" if what == "read" else "a written token"
            cells = " | ".join(f"{100 * share:.0f} %" for share in (*shares, 1 - sum(shares)))
            print(f"| {Path(file).name}, {told} | {cells} | {each:.2f} |", flush=True)


if __name__ == "__main__":
    main()
