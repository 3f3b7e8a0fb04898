"""The race on tiny Shakespeare: nanoGPT's published CPU setting against recipes/shakespeare-char.toml.

nanoGPT's side is written anew from its description: GPT-2's shape without biases (4 layers, 4 heads,
width 128, 64 characters), AdamW with a cosine schedule, 12 rows a step, 2,000 steps, float32. Both
sides run one after the other in processes of their own on the same machine, learn from the first nine
tenths of the text and are judged on all of the last tenth. Time is that of training steps; the clock
stands still while a side is judged.

    python bench/shakespeare.py PATH/input.txt
    python bench/shakespeare.py PATH/input.txt --pairs 3 --json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
# Of nanoGPT's time. A budget in seconds becomes a number of steps, which may take some percent longer:
# so somewhat less is given than a quarter and the whole.
SHARES = (0.24, 0.96)
RECIPE = ROOT / "recipes/shakespeare-char.toml"


def nanogpt(text: str) -> dict:
    """Train nanoGPT's setting; returns its seconds and its validation loss."""
    import numpy as np
    import torch
    from peers import NanoGPT
    from torch import nn

    length, rows, steps = 64, 12, 2000

    def rate(step: int) -> float:
        if step < 100:
            return 1e-3 * (step + 1) / 101
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / 1900)) * (1e-3 - 1e-4)

    train, held_out, characters = _split(text)
    torch.manual_seed(1337)
    model = NanoGPT(characters, width=128, layers=4, heads=4, length=length)
    optimizer = model.optimizer(1e-3)
    random, seconds = np.random.default_rng(0), 0.0
    for step in range(steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        places = random.integers(0, len(train) - length, rows)
        batch = torch.from_numpy(np.stack([train[place : place + length + 1] for place in places]))
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
    return {
        "side": "nanoGPT's setting",
        "parameters": sum(weight.numel() for weight in model.parameters()) - model.places.weight.numel(),
        "steps": steps,
        "tokens": steps * rows * length,
        "seconds": seconds,
        "loss": _judge(lambda tokens: model(tokens), held_out, length),
    }


def lexmill(text: str, seconds: float) -> dict:
    """Train the recipe for so many seconds; returns its validation loss."""
    from lexmill.cli.options import begin_computing

    begin_computing()
    import numpy as np

    from lexmill.model.build import build_model
    from lexmill.pretrain.stage import PretrainConfig
    from lexmill.recipe.config import read_recipe
    from lexmill.train.batches import Loader
    from lexmill.train.causal import causal_loss
    from lexmill.train.examples import next_token_example
    from lexmill.train.loop import train

    recipe: PretrainConfig = read_recipe(RECIPE).table("pretrain")
    values = {**vars(recipe), "steps": None, "minutes": seconds / 60}
    config = PretrainConfig(**values)
    learn, held_out, characters = _split(text)
    shape = config.shape(characters)
    length = config.row_length or shape.context
    model = build_model(shape)
    model.initialise(config.seed)

    def examples(epoch: int) -> list:
        shift = int(np.random.default_rng([config.seed, epoch]).integers(length)) if epoch else 0
        starts = range(shift, len(learn) - length - 1, length)
        return [next_token_example(learn[start : start + length + 1]) for start in starts]

    loader = Loader(examples, rows=config.rows, length=length, pad_id=0, seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, causal_loss, loader, config, Path(folder))
    model.eval()
    return {
        "side": f"lexmill, {result.precision}",
        "parameters": shape.parameters,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "loss": _judge(model, held_out, length),
        "loss_in_rows_of_64": _judge(model, held_out, 64),
    }


def _split(text: str):
    """Ids of the first nine tenths and of the last, and how many characters there are."""
    import numpy as np

    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    ids = np.array([number[character] for character in text], np.int64)
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(characters)


def _judge(model, held_out, length: int) -> float:
    """Mean cross-entropy in nats over all of the held-out text, in rows of `length` side by side."""
    import torch
    import torch.nn.functional as F

    rows = (len(held_out) - 1) // length
    tokens = torch.from_numpy(held_out[: rows * length].reshape(rows, length))
    targets = torch.from_numpy(held_out[1 : rows * length + 1].reshape(rows, length))
    total = 0.0
    with torch.no_grad():
        for start in range(0, rows, 128):
            logits = model(tokens[start : start + 128]).float()
            wanted = targets[start : start + 128].flatten()
            total += float(F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
    return total / (rows * length)


def _child(path: Path, side: str, seconds: float) -> dict:
    command = [sys.executable, __file__, str(path), "--child", side, "--seconds", str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="tiny Shakespeare, input.txt")
    parser.add_argument("--pairs", type=int, default=1, help="how often the whole race is run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=("nanogpt", "lexmill"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        text = arguments.path.read_text("utf-8")
        print(json.dumps(nanogpt(text) if arguments.child == "nanogpt" else lexmill(text, arguments.seconds)))
        return
    from lexmill.devices import this_machine, threads

    machine = this_machine()
    runs = []
    for _ in range(arguments.pairs):
        theirs = _child(arguments.path, "nanogpt", 0)
        runs += [theirs]
        runs += [_child(arguments.path, "lexmill", theirs["seconds"] * share) for share in SHARES]
    if arguments.json:
        print(json.dumps({"cpu": machine.cpu, "class": machine.cpu_class, "runs": runs}, indent=2))
        return
    print(f"{machine.cpu}, {machine.cpu_class}, {threads()} threads")
    for run in runs:
        rate = run["tokens"] / run["seconds"]
        short = f"  in rows of 64: {run['loss_in_rows_of_64']:.3f}" if "loss_in_rows_of_64" in run else ""
        print(
            f"{run['side']:<20} {run['parameters']:>9,} parameters {run['steps']:>6,} steps {run['seconds']:>6.1f} s "
            f"{rate:>7,.0f} tokens/s  validation loss {run['loss']:.3f}{short}"
        )
    for name, offset in (("a quarter of the time", 1), ("the same time", 2)):
        theirs = statistics.median(run["loss"] for run in runs[::3])
        ours = statistics.median(run["loss"] for run in runs[offset::3])
        print(f"in {name}: {ours:.3f} against {theirs:.3f} in all of it")


if __name__ == "__main__":
    main()
