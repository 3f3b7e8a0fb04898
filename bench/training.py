"""Tokens a second of lexmill's training step against transformers' classes and nanoGPT's model, for all three shapes.

Every side has the same shape, batch and machine and trains in a process of its own; steps of all sides
are interleaved, and the median of the paired ratios against each peer's better precision is quoted. The
same run measures lexmill without its compiled steps, and the machine's matrix products: the largest rate of
square ones, and those of the step's own weights alone; what a step reaches of the latter is printed.

    python bench/training.py
    python bench/training.py decoder wide --pairs 6
    python bench/training.py decoder --loss 60      # also the loss after a minute of each side
    python bench/training.py --profile              # where the time of lexmill's steps goes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
ROWS, LENGTH, WRITTEN = 16, 256, 64
_WARM = 3  # steps of a side before it is timed: its memory and its products' code are made in them
MASKED = 0.15  # of an encoder's tokens are targets
# Name to the model's shape, and the size of its vocabulary.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "decoder": ({"family": "llama", "width": 256, "layers": 6, "heads": 4}, 4096),
    "encoder": ({"family": "bert", "width": 256, "layers": 6, "heads": 4}, 4096),
    "encoder-decoder": ({"family": "t5", "width": 256, "layers": 4, "heads": 4}, 4096),
    "wide": ({"family": "llama", "width": 512, "layers": 8, "heads": 8}, 8192),
}
OURS = ("lexmill-adamw", "lexmill-muon")
UNCOMPILED = "uncompiled-adamw"  # lexmill with LEXMILL_NATIVE=0
PEERS = {
    "decoder": ("transformers", "nanogpt"),
    "encoder": ("transformers",),
    "encoder-decoder": ("transformers",),
    "wide": ("transformers", "nanogpt"),
}
PRECISIONS = ("float32", "bfloat16")


def config(shape: str):
    from lexmill.pretrain.shape import ShapeConfig

    values, vocabulary = SHAPES[shape]
    heads = {"mlm": True, "mlm_bias": True} if values["family"] == "bert" else {}
    return ShapeConfig(**values, context=LENGTH).with_vocabulary(vocabulary, **heads)


def batches(shape: str):
    """Batches of full rows of random tokens, without end."""
    import numpy as np

    from lexmill.train.batches import Batch
    from lexmill.train.examples import IGNORED

    random, vocabulary = np.random.default_rng(0), SHAPES[shape][1]
    positions = np.tile(np.arange(LENGTH), (ROWS, 1))
    document = np.zeros((ROWS, LENGTH), np.int64)
    while True:
        ids = random.integers(0, vocabulary, (ROWS, LENGTH + 1))
        tokens, written = ids[:, :-1], random.integers(0, vocabulary, (ROWS, WRITTEN + 1))
        if shape == "encoder":
            masked = random.random((ROWS, LENGTH)) < MASKED
            yield Batch(tokens, np.where(masked, ids[:, 1:], IGNORED), positions, document)
        elif shape == "encoder-decoder":
            side = {"decoder_tokens": written[:, :-1], "decoder_document": document[:, :WRITTEN]}
            yield Batch(tokens, written[:, 1:], positions, document, **side)
        else:
            yield Batch(tokens, ids[:, 1:], positions, document)


def work(shape: str) -> float:
    """Floating-point operations of a step (`lexmill.train.cost`)."""
    from lexmill.train.cost import Row, row_flops

    written = WRITTEN if shape == "encoder-decoder" else 0
    targets = {"encoder": MASKED * LENGTH, "encoder-decoder": WRITTEN}.get(shape, LENGTH)
    return ROWS * row_flops(config(shape), Row(LENGTH, targets, written)).total


def our_side(shape: str, optimizer: str) -> tuple[Callable[[Any], float], str]:
    """A function that does one step on a batch, and the precision it runs in."""
    from lexmill.cli.options import begin_computing

    begin_computing()
    from torch import nn

    from lexmill.model.build import build_model
    from lexmill.pretrain.masked import masked_loss
    from lexmill.train.causal import causal_loss, sequence_loss
    from lexmill.train.optimizers import OptimizerSet
    from lexmill.train.precision import autocast, choose_precision

    model = build_model(config(shape))
    model.initialise(0)
    precision = choose_precision()
    optimizers = OptimizerSet(
        model,
        kind=optimizer,
        learning_rate=3e-3 if optimizer == "muon" else 1e-3,
        matrix_learning_rate=0.02,
        weight_decay=0.0,
        precision=precision,
    )
    objective = {"encoder": masked_loss, "encoder-decoder": sequence_loss}.get(shape, causal_loss)

    def step(batch) -> float:
        with autocast(precision):
            loss = objective(model, batch).sums["tokens"] / batch.counts["tokens"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1.0)
        return float(loss.detach())

    return step, precision


def peer_side(shape: str, peer: str, precision: str) -> tuple[Callable[[Any], float], str]:
    """The same with a peer's model and loss, torch's AdamW and, for bfloat16, autocast, as a Trainer does it."""
    import torch
    from peers import NanoGPT, transformers_model

    values, vocabulary = SHAPES[shape]
    if peer == "nanogpt":
        model = NanoGPT(vocabulary, values["width"], values["layers"], values["heads"], LENGTH)
        optimizer = model.optimizer(1e-3)
    else:
        model = transformers_model(config(shape))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def loss_of(batch):
        tokens, targets = batch.tensor("tokens"), batch.tensor("targets")
        if peer == "nanogpt":
            return model.loss(tokens, targets)
        if shape == "encoder":
            return model(input_ids=tokens, labels=targets).loss
        if shape == "encoder-decoder":
            return model(
                input_ids=tokens, decoder_input_ids=batch.tensor("decoder_tokens"), labels=targets
            ).loss
        # it shifts labels by itself: the last target is lost, one of 256
        return model(input_ids=tokens, labels=tokens).loss

    def step(batch) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, precision


def products_side(shape: str) -> tuple[Callable[[Any], float], str]:
    """The products of a decoder's step and nothing else: of each weight one forward and two back."""
    from lexmill.cli.options import begin_computing

    begin_computing()
    import torch

    from lexmill.model.names import weight_shapes
    from lexmill.train.precision import choose_precision

    precision = choose_precision()
    dtype = getattr(torch, precision)
    weights = [
        torch.randn(size).to(dtype) for size in weight_shapes(config(shape)).values() if len(size) == 2
    ]
    states = {
        width: torch.randn(ROWS * LENGTH, width).to(dtype) for weight in weights for width in weight.shape
    }

    def step(batch) -> float:
        for weight in weights:
            out, into = weight.shape
            torch.mm(states[into], weight.mT)
            torch.mm(states[out], weight)
            torch.mm(states[out].mT, states[into])
        return 0.0

    return step, precision


def make_side(shape: str, name: str) -> tuple[Callable[[Any], float], str]:
    kind, _, variant = name.partition("-")
    if kind == "products":
        return products_side(shape)
    if kind in ("lexmill", "uncompiled"):
        return our_side(shape, variant)
    return peer_side(shape, kind, variant)


def child(shape: str, name: str, cpu_time: bool) -> None:
    """One side in its own process: for each line on standard input, time that many steps and tell."""
    clock = time.process_time if cpu_time else time.perf_counter
    step, precision = make_side(shape, name)
    source = batches(shape)
    for _ in range(_WARM):
        step(next(source))
    print(json.dumps({"precision": precision}), flush=True)
    for line in sys.stdin:
        some = [next(source) for _ in range(int(line))]
        start = clock()
        for batch in some:
            step(batch)
        print(json.dumps({"seconds": (clock() - start) / len(some)}), flush=True)


class Side:
    """A child process that waits, without computing, until it is asked for steps."""

    def __init__(self, shape: str, name: str, cpu_time: bool) -> None:
        command = [sys.executable, __file__, shape, "--child", name, *(["--cpu-time"] if cpu_time else [])]
        native = {"LEXMILL_NATIVE": "0"} if name == UNCOMPILED else {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **native}
        )
        self.name, self.precision = name, self._read()["precision"]
        self.seconds: list[float] = []

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; its message stands above.")
        return json.loads(line)

    def time(self, steps: int) -> float:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.seconds.append(self._read()["seconds"])
        return self.seconds[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare_speed(shape: str, pairs: int, steps: int, cpu_time: bool) -> dict[str, Any]:
    """Interleave all sides, print rates and paired ratios, and return them."""
    names = [*OURS, UNCOMPILED, *(f"{peer}-{precision}" for peer in PEERS[shape] for precision in PRECISIONS)]
    if PEERS[shape] != ("transformers",):
        names.append("products")
    sides = {name: Side(shape, name, cpu_time) for name in names}
    for peer in PEERS[shape]:
        # where bfloat16 is emulated a step takes a minute: once is enough to know it
        first = {precision: sides[f"{peer}-{precision}"].time(1) for precision in PRECISIONS}
        if first["bfloat16"] > 4 * first["float32"]:
            sides.pop(f"{peer}-bfloat16").close()
    for side in sides.values():
        side.seconds.clear()
    for _ in range(pairs):
        for side in sides.values():
            side.time(steps)
    tokens = ROWS * (LENGTH + (WRITTEN if shape == "encoder-decoder" else 0))
    flops = work(shape)
    print(f"\n{shape}: {config(shape).parameters:,} parameters, {tokens:,} tokens a step")
    for name, side in sides.items():
        if name != "products":
            rate = f"{tokens / side.median:>9,.0f} tokens/s {flops / side.median / 1e9:>8,.0f} GFLOP/s"
            print(f"  {name:<24} {side.precision:<9} {1000 * side.median:>8,.0f} ms {rate}")
    found: dict[str, Any] = {
        "tokens_per_second": {name: tokens / side.median for name, side in sides.items()}
    }
    for ours in OURS:
        for peer in PEERS[shape]:
            rivals = [side for name, side in sides.items() if name.startswith(peer)]
            better = min(rivals, key=lambda side: side.median)
            ratio = statistics.median(
                theirs / mine for theirs, mine in zip(better.seconds, sides[ours].seconds)
            )
            found[f"{ours} against {peer}"] = ratio
            print(f"  {ours}: {ratio:.2f} times {better.name} (median of {pairs} paired ratios)")
    ratio = statistics.median(
        without / mine for without, mine in zip(sides[UNCOMPILED].seconds, sides[OURS[0]].seconds)
    )
    found[f"{OURS[0]} against {UNCOMPILED}"] = ratio
    print(f"  {OURS[0]}: {ratio:.2f} times {UNCOMPILED}, without compiled steps")
    if "products" in sides:
        matrices = 6 * ROWS * LENGTH * _products(shape)
        alone = matrices / sides["products"].median
        found["products_gflops"] = alone / 1e9
        for ours in OURS:
            share = flops / sides[ours].median / alone
            found[f"{ours} share of products"] = share
            print(f"  {ours}: {100 * share:.0f} % of its products' own {alone / 1e9:,.0f} GFLOP/s")
    for side in sides.values():
        side.close()
    return found


def _products(shape: str) -> int:
    from lexmill.model.names import weight_shapes

    return sum(size[0] * size[1] for size in weight_shapes(config(shape)).values() if len(size) == 2)


def compare_loss(shape: str, seconds: float) -> None:
    """Train a decoder of each side on the same stream of the shipped novels for the same time; print the losses."""
    import numpy as np

    from lexmill.data.cleaning import normalise, unwrap_paragraphs
    from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer
    from lexmill.train.batches import Batch

    texts = [
        unwrap_paragraphs(normalise(path.read_text("utf-8")))
        for path in sorted((ROOT / "corpora/austen").glob("*.txt"))
    ]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=SHAPES[shape][1]))
    stream = np.concatenate([np.array(tokenizer.encode(text, special=False)) for text in texts])
    positions = np.tile(np.arange(LENGTH), (ROWS, 1))
    document = np.zeros((ROWS, LENGTH), np.int64)
    for name in (
        "lexmill-muon",
        *(f"{peer}-{precision}" for peer in PEERS[shape] for precision in PRECISIONS),
    ):
        step, precision = make_side(shape, name)
        random = np.random.default_rng(0)
        losses, spent = [], 0.0
        while spent < seconds:
            starts = random.integers(0, len(stream) - LENGTH - 1, ROWS)
            ids = np.stack([stream[start : start + LENGTH + 1] for start in starts]).astype(np.int64)
            begin = time.perf_counter()
            losses.append(step(Batch(ids[:, :-1], ids[:, 1:], positions, document)))
            spent += time.perf_counter() - begin
        tail = statistics.mean(losses[-10:])
        print(
            f"  {name:<24} {precision:<9} {len(losses):>5} steps in {spent:.0f} s, mean loss of the last ten {tail:.3f}"
        )


# What a step's time goes to: the first row that fits an operation's name has it.
PARTS = (
    ("products of weights", ("aten::mm", "aten::addmm", "mkldnn::", "_LinearBackward")),
    (
        "attention",
        (
            "aten::bmm",
            "aten::baddbmm",
            "_Compiled",
            "_Joined",
            "_Blocks",
            "aten::_softmax",
            "aten::masked_fill",
        ),
    ),
    ("norms", ("_AddNorm", "_RMSNorm", "aten::native_layer_norm", "aten::rms_norm")),
    ("activations", ("_Activated", "aten::silu", "aten::gelu")),
    ("rotation", ("_Rotate",)),
    ("cross-entropy", ("_LinearCrossEntropy", "aten::_log_softmax", "aten::exp")),
    (
        "copies and number formats",
        ("aten::copy_", "aten::cat", "aten::_to_copy", "aten::fill_", "aten::zero"),
    ),
    (
        "optimiser and clipping",
        ("aten::_fused_adamw", "Optimizer", "aten::linalg_vector_norm", "aten::_foreach"),
    ),
    ("sums", ("aten::add", "aten::mul", "aten::sum")),
    ("the rest", ("",)),
)


def profile(shape: str, steps: int = 10) -> None:
    """Print where the time of lexmill's step goes, as torch's profiler sees it (its own cost included)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    step, precision = our_side(shape, "adamw")
    source = batches(shape)
    some = [next(source) for _ in range(steps + _WARM)]
    for batch in some[:_WARM]:
        step(batch)
    with watch(activities=[ProfilerActivity.CPU]) as seen:
        for batch in some[_WARM:]:
            step(batch)
    spent = dict.fromkeys((name for name, _ in PARTS), 0.0)
    for event in seen.key_averages():
        part = next(name for name, starts in PARTS if event.key.startswith(starts))
        spent[part] += event.self_cpu_time_total / 1000 / steps
    print(f"\n{shape}, {precision}, AdamW: {sum(spent.values()):.0f} ms a step")
    for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:<28} {milliseconds:>6.1f} ms  {100 * milliseconds / sum(spent.values()):>3.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help=f"any of {', '.join(SHAPES)}; all when not given")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a pair")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's time, all threads together: with OMP_NUM_THREADS=1, for busy machines",
    )
    parser.add_argument("--loss", type=float, metavar="SECONDS", help="also a decoder's loss at equal time")
    parser.add_argument("--profile", action="store_true", help="only tell where a step's time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    shapes = arguments.shapes or list(SHAPES)
    if arguments.child:
        child(shapes[0], arguments.child, arguments.cpu_time)
        return
    from lexmill.devices import this_machine, threads

    machine = this_machine()
    import torch

    from lexmill.train.precision import matmul_gflops

    print(f"{machine.cpu}, {machine.cpu_class} ({' '.join(machine.features)}), {threads()} threads")
    peaks = {
        str(dtype).split(".")[1]: matmul_gflops(dtype, 1024, 1.0) for dtype in (torch.float32, torch.bfloat16)
    }
    print(
        "square products reach " + ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in peaks.items())
    )
    if arguments.profile:
        for shape in shapes:
            profile(shape)
        return
    found = {
        shape: compare_speed(shape, arguments.pairs, arguments.steps, arguments.cpu_time) for shape in shapes
    }
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"cpu": machine.cpu, "class": machine.cpu_class, **found}, indent=2)
        )
    for shape in shapes if arguments.loss else ():
        if SHAPES[shape][0]["family"] == "llama":
            print(f"\n{shape}: loss at equal time")
            compare_loss(shape, arguments.loss)


if __name__ == "__main__":
    main()
