"""Tokens a second of lexmill's pretraining step against transformers' `LlamaForCausalLM` with AdamW.

Both sides have the same shape, batch and machine, run in one process each, interleaved, and the
median of the paired ratios is quoted. Also prints the machine's matrix-product peak measured in
the same run, and, with --loss SECONDS, what loss each side reaches on the shipped novels in equal time.

    python bench/training.py
    python bench/training.py --pairs 3 --loss 120
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 4096,
    "width": 256,
    "layers": 6,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 64,
    "mlp_width": 768,
}
ROWS, LENGTH = 16, 256


def config():
    from lexmill.model.config import ModelConfig

    return ModelConfig(**SHAPE, context=LENGTH)


def flops_per_step(tokens: int) -> float:
    """Multiply-adds counted as two, forward and back (`lexmill.train.cost`)."""
    from lexmill.train.cost import Row, row_flops

    return row_flops(config(), Row(LENGTH, LENGTH)).total * tokens / LENGTH


def our_side(optimizer: str):
    """A function that does one step on a batch of ids, and the precision it runs in."""
    from lexmill.devices import keep_freed_memory

    keep_freed_memory()
    import numpy as np
    from torch import nn

    from lexmill.model.decoder import Decoder
    from lexmill.train.batches import Batch
    from lexmill.train.causal import causal_loss
    from lexmill.train.optimizers import OptimizerSet
    from lexmill.train.precision import autocast, choose_precision

    model = Decoder(config())
    model.initialise(0)
    precision = choose_precision()
    rate = 3e-3 if optimizer == "muon" else 1e-3
    optimizers = OptimizerSet(
        model,
        kind=optimizer,
        learning_rate=rate,
        matrix_learning_rate=0.02,
        weight_decay=0.0,
        precision=precision,
    )
    positions = np.tile(np.arange(LENGTH), (ROWS, 1))
    document = np.zeros((ROWS, LENGTH), np.int64)

    def step(ids) -> float:
        batch = Batch(ids[:, :-1], ids[:, 1:], positions, document)
        with autocast(precision):
            loss = causal_loss(model, batch).sums["tokens"] / batch.counts["tokens"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1.0)
        return float(loss.detach())

    return step, f"lexmill, {optimizer}, {precision}"


def their_side(precision: str):
    """The same with transformers, torch's AdamW and, for bfloat16, autocast."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = config().to_huggingface()
    values.pop("architectures")
    values.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**values))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def step(ids) -> float:
        tokens = torch.from_numpy(ids[:, :-1].copy())
        targets = torch.from_numpy(ids[:, 1:].copy())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, f"transformers, AdamW, {precision}"


SIDES = {
    "lexmill-adamw": lambda: our_side("adamw"),
    "lexmill-muon": lambda: our_side("muon"),
    "transformers-float32": lambda: their_side("float32"),
    "transformers-bfloat16": lambda: their_side("bfloat16"),
}


def child(name: str) -> None:
    """One side in its own process: for each line on standard input, time that many steps and tell."""
    import numpy as np

    step, label = SIDES[name]()
    random = np.random.default_rng(0)

    def batch():
        return random.integers(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1))

    step(batch())
    print(json.dumps({"label": label}), flush=True)
    for line in sys.stdin:
        ids = [batch() for _ in range(int(line))]
        start = time.perf_counter()
        for one in ids:
            step(one)
        print(json.dumps({"seconds": (time.perf_counter() - start) / len(ids)}), flush=True)


class Side:
    """A child process that waits, without computing, until it is asked for steps."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--child", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.label = json.loads(self._process.stdout.readline())["label"]
        self.seconds: list[float] = []

    def time(self, steps: int) -> float:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.seconds.append(json.loads(self._process.stdout.readline())["seconds"])
        return self.seconds[-1]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def peak_gflops() -> float:
    """The machine's matrix-product peak in float32."""
    import torch

    from lexmill.train.precision import matmul_gflops

    return max(matmul_gflops(torch.float32, size, 1.0) for size in (512, 1024))


def compare_speed(pairs: int, steps: int) -> str:
    """Interleave all sides, print rates and paired ratios; returns the faster of transformers' sides."""
    from lexmill.devices import this_machine, threads

    machine = this_machine()
    peak = peak_gflops()
    print(f"{machine.cpu}, {machine.cpu_class} ({' '.join(machine.features)}), {threads()} threads")
    print(f"matrix products reach {peak:.0f} GFLOP/s in float32 in this run")
    sides = {name: Side(name) for name in SIDES}
    slow = sides["transformers-bfloat16"].time(1) > 4 * sides["transformers-float32"].time(1)
    sides["transformers-float32"].seconds.clear()
    if not slow:
        sides["transformers-bfloat16"].seconds.clear()
    for _ in range(pairs):
        for name, side in sides.items():
            # where bfloat16 is emulated a step takes a minute, and once is enough to know it
            if not (slow and name == "transformers-bfloat16"):
                side.time(steps)
    work = flops_per_step(ROWS * LENGTH)
    for side in sides.values():
        seconds = statistics.median(side.seconds)
        print(
            f"{side.label:<34} {ROWS * LENGTH / seconds:>8,.0f} tokens/s  {work / seconds / 1e9:>6.1f} GFLOP/s"
            f"  {100 * work / seconds / 1e9 / peak:>3.0f} % of peak"
        )
    names = ("transformers-float32", "transformers-bfloat16")
    better = min(names, key=lambda name: statistics.median(sides[name].seconds))
    for ours in ("lexmill-adamw", "lexmill-muon"):
        ratios = [theirs / mine for theirs, mine in zip(sides[better].seconds, sides[ours].seconds)]
        print(f"{ours}: {statistics.median(ratios):.2f} times {better} (median of {pairs} paired ratios)")
    for side in sides.values():
        side.close()
    return better


def compare_loss(seconds: float, theirs: str) -> None:
    """Train each side on the same stream of the shipped novels for the same time; print the last losses."""
    import numpy as np

    from lexmill.data.cleaning import normalise, unwrap_paragraphs
    from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

    texts = [
        unwrap_paragraphs(normalise(path.read_text("utf-8")))
        for path in sorted((ROOT / "corpora/austen").glob("*.txt"))
    ]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=SHAPE["vocab_size"]))
    stream = np.concatenate([np.array(tokenizer.encode(text, special=False)) for text in texts])
    for name in ("lexmill-muon", theirs):
        step, label = SIDES[name]()
        random = np.random.default_rng(0)
        losses, spent = [], 0.0
        while spent < seconds:
            starts = random.integers(0, len(stream) - LENGTH - 1, ROWS)
            ids = np.stack([stream[start : start + LENGTH + 1] for start in starts]).astype(np.int64)
            begin = time.perf_counter()
            losses.append(step(ids))
            spent += time.perf_counter() - begin
        tail = statistics.mean(losses[-10:])
        print(
            f"{label:<34} {len(losses):>4} steps in {spent:.0f} s, mean training loss of the last ten {tail:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a pair")
    parser.add_argument("--loss", type=float, metavar="SECONDS", help="also compare the loss at equal time")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    better = compare_speed(arguments.pairs, arguments.steps)
    if arguments.loss:
        compare_loss(arguments.loss, better)


if __name__ == "__main__":
    main()
