"""What fine-tuning costs: all weights, an adapter, an adapter on a base in 8 or 4 bits; time a step and memory.

    python bench/finetuning.py MODEL DATA [--steps 6] [--rows 4] [--length 256] [--set KEY=VALUE ...]

Each case is a process of its own, because a process's peak memory never falls. Cases take turns, so that a
machine that changes its speed changes it for all; the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "all weights, Muon": ["optimizer=muon"],
    "all weights, AdamW": ["optimizer=adamw"],
    "adapter": ["lora.rank=16"],
    "adapter, base in q8_0": ["lora.quantise=q8_0"],
    "adapter, base in q4_1": ["lora.quantise=q4_1"],
    "adapter, base in q4_1, blocks computed again": ["lora.quantise=q4_1", "gradient_checkpointing=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(asked)))
        return
    found: dict[str, list[dict]] = {case: [] for case in CASES}
    for _ in range(asked.rounds):
        for case in CASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{asked.rows} rows of {asked.length} tokens a step, {found['adapter'][0]['precision']}")
    print(f"{'':<46} {'s a step':>9} {'peak MB':>9} {'learning':>12}")
    for case, rounds in found.items():
        step, peak = (min(one[key] for one in rounds) for key in ("step", "peak"))
        print(f"{case:<46} {step:>9.2f} {peak:>9,.0f} {rounds[0]['learning']:>12,}")


def measure(asked: argparse.Namespace) -> dict:
    """One case, in this process."""
    from lexmill.cli.options import begin_computing

    begin_computing()
    from lexmill.config import apply_overrides, from_mapping
    from lexmill.devices import peak_memory
    from lexmill.finetune.config import FinetuneConfig
    from lexmill.finetune.stage import finetune
    from lexmill.model.directory import ModelDirectory

    table = {"steps": asked.steps, "rows": asked.rows, "row_length": asked.length, "validation_fraction": 0.0}
    config = from_mapping(
        FinetuneConfig, apply_overrides(table, [*CASES[asked.case], *asked.overrides]), "bench"
    )
    with tempfile.TemporaryDirectory() as folder:
        _, result = finetune(config, ModelDirectory.open(asked.model), asked.data, Path(folder))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        told = json.loads((Path(folder) / "training.json").read_text())
    seconds = [0.0] + [line["seconds"] for line in lines if "loss" in line]
    steps = [after - before for before, after in itertools.pairwise(seconds)]
    return {
        "step": statistics.median(steps[1:]),
        "peak": peak_memory() / 1e6,
        "learning": told["learning"],
        "precision": result.precision,
    }


if __name__ == "__main__":
    main()
