"""What an adapter costs to train: tokens a second and peak memory of LoRA here and with peft on transformers.

    python bench/finetune.py MODEL                  # a directory of Hugging Face whose weights are float32
    python bench/finetune.py MODEL --ours           # what lexmill's own ways cost: CASES
    OMP_NUM_THREADS=1 python bench/finetune.py MODEL --cpu-time     # on a machine with other work
    python bench/finetune.py MODEL --profile        # where the time of lexmill's steps goes

Conversations of which about half is replies, 4 rows of 256 tokens a step, rank 8 on all linear layers, AdamW. Each
side is a process of its own, because a process's peak memory never falls; steps of all sides are interleaved, and the
median of the paired ratios against each of peft's precisions is quoted ("adapter" is lexmill's side). All sides see the
same full rows. peft's rows are not told apart into documents, which spares it a mask; its bfloat16 keeps the whole
model in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH, RANK = 4, 256, 8
_WARM = 2  # steps of a side before it is timed
_ADAPTER = [f"lora.rank={RANK}", f"lora.alpha={2 * RANK}", "weight_decay=0.0"]
# name -> settings of `[finetune]`
CASES = {
    "adapter": _ADAPTER,
    "adapter on q8_0": [*_ADAPTER, "lora.quantise=q8_0"],
    "adapter on q4_1": [*_ADAPTER, "lora.quantise=q4_1"],
    "adapter on q4_1, recomputing": [*_ADAPTER, "lora.quantise=q4_1", "gradient_checkpointing=true"],
    "all weights, AdamW": ["optimizer=adamw", "learning_rate=0.00001"],
    "all weights, Muon": ["optimizer=muon", "learning_rate=0.00001", "matrix_learning_rate=0.0001"],
}


def conversations() -> list[list[dict[str, str]]]:
    """A novel, cut so that somebody says some lines and is answered with the next ones."""
    words = (ROOT / "corpora/austen/Persuasion.txt").read_text("utf-8").split()
    cuts = [
        (start, start + 45, start + 150) for start in range(0, 40_000, 150)
    ]  # half of a row, template included
    return [
        [
            {"role": "user", "content": " ".join(words[start:middle])},
            {"role": "assistant", "content": " ".join(words[middle:end])},
        ]
        for start, middle, end in cuts
    ]


def batches(folder: Path) -> Iterator[Any]:
    """Steps without end: rows as fine-tuning packs them."""
    from lexmill.finetune.chat import to_examples
    from lexmill.model.directory import ModelDirectory
    from lexmill.train.batches import Loader

    directory = ModelDirectory.open(folder)
    said = conversations()
    loader = Loader(
        lambda _: to_examples(said, directory.tokenizer, LENGTH),
        rows=ROWS,
        length=LENGTH,
        pad_id=directory.tokenizer.ids.pad or 0,
        seed=0,
    )
    while True:
        batch = loader.next()
        if len(batch.tokens) == ROWS:
            yield batch


def our_side(folder: Path, case: str) -> Callable[[Any], float]:
    """A step of lexmill as `CASES` says."""
    from torch import nn

    from lexmill.config import apply_overrides, from_mapping
    from lexmill.finetune.config import FinetuneConfig
    from lexmill.finetune.stage import learning_model
    from lexmill.model.directory import ModelDirectory
    from lexmill.train.causal import causal_loss
    from lexmill.train.optimizers import OptimizerSet
    from lexmill.train.parallel import recompute_blocks
    from lexmill.train.precision import autocast, choose_precision

    config = from_mapping(FinetuneConfig, apply_overrides({"steps": 1}, CASES[case]), "bench")
    precision = choose_precision()
    model, _ = learning_model(config, ModelDirectory.open(folder))
    model.train()
    learned = [one for one in model.parameters() if one.requires_grad]
    recompute_blocks(model, config.gradient_checkpointing)
    optimizers = OptimizerSet.of_run(model, config, precision)

    def step(batch: Any) -> float:
        with autocast(precision):
            loss = causal_loss(model, batch).sums["tokens"] / batch.counts["tokens"]
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizers.step(1.0)
        return float(loss.detach())

    return step


def peer_side(folder: Path, precision: str) -> Callable[[Any], float]:
    """A step of peft's model with the loss that transformers computes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, precision)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    model.train()
    learned = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(batch: Any) -> float:
        targets = batch.tensor("targets")
        tokens = batch.tensor("tokens")
        # the loss compares each place with the next label
        labels = torch.cat([torch.full_like(targets[:, :1], -100), targets[:, :-1]], 1)
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def make_side(name: str, folder: Path) -> Callable[[Any], float]:
    return our_side(folder, name) if name in CASES else peer_side(folder, name.removeprefix("peft "))


def child(name: str, folder: Path, cpu_time: bool) -> None:
    """One side in its own process: a step for each line on standard input."""
    clock = time.process_time if cpu_time else time.perf_counter
    from lexmill.cli.options import begin_computing

    if name in CASES:
        begin_computing()
    from lexmill.devices import peak_memory

    source = batches(folder)
    step = make_side(name, folder)
    for _ in range(_WARM):
        step(next(source))
    print("{}", flush=True)
    for _ in sys.stdin:
        batch = next(source)
        started = clock()
        loss = step(batch)
        told = {"seconds": clock() - started, "peak": peak_memory(), "loss": loss}
        print(json.dumps({**told, "targets": batch.counts["tokens"]}), flush=True)


class Side:
    """A child process that waits until it is asked for a step."""

    def __init__(self, name: str, folder: Path, cpu_time: bool) -> None:
        command = [sys.executable, __file__, str(folder), "--child", name]
        command += ["--cpu-time"] if cpu_time else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        self.name, self.steps = name, list[dict[str, float]]()
        self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; its message stands above.")
        found: dict[str, float] = json.loads(line)
        return found

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.steps.append(self._read())

    @property
    def seconds(self) -> list[float]:
        return [step["seconds"] for step in self.steps]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def profile(folder: Path) -> None:
    """Print where the time of our step goes."""
    from lexmill.cli.options import begin_computing

    begin_computing()
    import torch

    source, step = batches(folder), make_side("adapter", folder)
    for _ in range(_WARM):
        step(next(source))
    with torch.profiler.profile() as found:
        for _ in range(3):
            step(next(source))
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=7, help="steps of each side")
    parser.add_argument("--ours", action="store_true", help="all ways of lexmill, and no peer")
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a busy machine")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.model, asked.cpu_time)
        return
    if asked.profile:
        profile(asked.model)
        return
    names = [*CASES] if asked.ours else ["adapter", "peft bfloat16", "peft float32"]
    # one after another: a peer that loads would disturb the steps that warm another one up
    sides = [Side(name, asked.model, asked.cpu_time) for name in names]
    for pair in range(1, asked.pairs + 1):
        for side in sides:
            side.step()
        taken = ", ".join(f"{side.name} {side.seconds[-1]:.2f} s" for side in sides)
        print(f"{pair} of {asked.pairs}: {taken}", file=sys.stderr)
    targets = statistics.mean(step["targets"] for step in sides[0].steps) / (ROWS * LENGTH)
    print(f"{ROWS} rows of {LENGTH} tokens a step, {100 * targets:.0f} % of them targets; rank {RANK}")
    for side in sides:
        median = statistics.median(side.seconds)
        print(
            f"{side.name:<28} {ROWS * LENGTH / median:>7,.0f} tokens/s {1000 * median:>8,.0f} ms a step "
            f"{side.steps[-1]['peak'] / 1e6:>8,.0f} MB at most, loss {side.steps[-1]['loss']:.3f}"
        )
    for peer in (side for side in sides if side.name.startswith("peft")):
        ratio = statistics.median(theirs / mine for theirs, mine in zip(peer.seconds, sides[0].seconds))
        memory = sides[0].steps[-1]["peak"] / peer.steps[-1]["peak"]
        print(
            f"adapter: {ratio:.2f} times {peer.name} (median of {asked.pairs} paired ratios), "
            f"{memory:.2f} of its memory"
        )
    for side in sides:
        side.close()


if __name__ == "__main__":
    main()
