"""Tokens a second of training on a GPU: the loop as users run it, with and without compiled blocks, beside transformers.

    python bench/gpu.py                 # a decoder of 124 million weights, 16 rows of 1,024 tokens, bfloat16
    python bench/gpu.py --width 512 --layers 8 --steps 10

Each side trains `--steps` steps on the same random tokens; the median of the steps behind the first third counts.
transformers' side is its Llama with fused attention and fused AdamW, fed in the leanest loop: no log, no checkpoint.
Operations are counted as `lexmill … --plan` counts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lexmill.model.build import build_model
from lexmill.pretrain.shape import ShapeConfig
from lexmill.train.batches import Loader
from lexmill.train.causal import causal_loss
from lexmill.train.config import TrainConfig
from lexmill.train.examples import next_token_example
from lexmill.train.loop import train
from lexmill.train.processes import Processes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", default=())
    asked = parser.parse_args()
    shape = ShapeConfig(width=asked.width, layers=asked.layers, heads=asked.width // 64, context=asked.length)
    config = shape.with_vocabulary(asked.vocabulary)
    random = np.random.default_rng(0)
    rows = [random.integers(0, asked.vocabulary, asked.length + 1) for _ in range(asked.rows * asked.steps)]
    sides = {
        "lexmill, AdamW": lambda: ours(config, rows, asked),
        "lexmill, AdamW, compiled": lambda: ours(config, rows, asked, compile=True),
        "lexmill, Muon, compiled": lambda: ours(config, rows, asked, compile=True, optimizer="muon"),
        "transformers, AdamW": lambda: theirs(config, rows, asked, False),
        "transformers, AdamW, compiled": lambda: theirs(config, rows, asked, True),
    }
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "a CPU"
    print(f"{config.parameters:,} weights, {asked.rows} rows of {asked.length} tokens, bfloat16, {name}")
    for side, run in sides.items():
        if asked.only and not any(word in side for word in asked.only):
            continue
        if asked.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, loss = run()
        step = statistics.median(seconds[len(seconds) // 3 :])
        peak = torch.cuda.max_memory_allocated() / 1e9 if asked.device == "cuda" else 0.0
        rate = asked.rows * asked.length / step
        print(
            f"{side:<32}{rate:>12,.0f} tokens/s {step * 1e3:>8.1f} ms a step {peak:>7.1f} GB, "
            f"first step {seconds[0]:.1f} s, loss {loss:.3f}",
            flush=True,
        )


def ours(config, rows, asked, **more) -> tuple[list[float], float]:
    """lexmill's loop: (seconds of each step, the last loss)."""
    settings = TrainConfig(
        steps=asked.steps, rows=asked.rows, precision="bfloat16", device=asked.device, checkpoint_seconds=1e9,
        **{"optimizer": "adamw", **more},
    )  # fmt: skip
    model = build_model(config)
    model.initialise(0)
    loader = Loader(
        lambda _: [next_token_example(row) for row in rows],
        rows=asked.rows, length=asked.length, pad_id=0, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        device = Processes.join(asked.device)
        train(model, causal_loss, loader, settings, Path(folder), processes=device)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    size = asked.rows * asked.length
    return [size / line["tokens_per_second"] for line in lines], lines[-1]["loss"]


def theirs(config, rows, asked, compiled: bool) -> tuple[list[float], float]:
    """transformers' Llama: the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            use_cache=False,
        )
    ).to(asked.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if compiled else model
    seconds, loss = [], torch.zeros(())
    for step in range(asked.steps):
        started = time.perf_counter()
        some = np.stack(rows[step * asked.rows : (step + 1) * asked.rows])
        ids, wanted = (torch.from_numpy(part.copy()).to(asked.device) for part in (some[:, :-1], some[:, 1:]))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10)
        with torch.autocast(asked.device, dtype=torch.bfloat16):
            loss = run(input_ids=ids, labels=ids, shift_labels=wanted).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown = float(loss.detach())  # waits for the GPU, as a log does
        seconds.append(time.perf_counter() - started)
    return seconds, shown


if __name__ == "__main__":
    main()
