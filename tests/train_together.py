"""Trains a tiny model on fixed documents, alone or under torchrun; tests look at what it leaves.

python tests/train_together.py FOLDER [family=bert] [lora=q8_0] [sharding=shard] [kill=STEP] [steps=12] ...

device=cuda trains on a GPU. With lora=TYPE an adapter learns, and the base is kept in that type; lora=float32 keeps it whole.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lexmill.errors import LexmillError
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_model
from lexmill.model.lora import add_adapter, begin_adapter, read_adapter
from lexmill.model.quantised import build_quantised
from lexmill.pretrain.masked import FOLLOWS, masked_loss
from lexmill.pretrain.shape import ShapeConfig
from lexmill.train.batches import Loader, fixed_batches
from lexmill.train.causal import causal_loss, sequence_loss
from lexmill.train.config import TrainConfig
from lexmill.train.examples import IGNORED, Example, next_token_example
from lexmill.train.loop import Hooks, train
from lexmill.train.objective import measure
from lexmill.train.processes import Processes

VOCABULARY = 97


def examples(family: str, epoch: int) -> list[Example]:
    """Documents of unequal lengths, so that packing, masks and weights by targets all matter."""
    random = np.random.default_rng([5, epoch])
    made = []
    for number, length in enumerate((20, 31, 7, 15, 30, 26, 12, 9, 22, 5, 17)):
        ids = random.integers(0, VOCABULARY, length)
        if family == "llama":
            made.append(next_token_example(ids, origin=number))
            continue
        targets = np.where(random.random(length) < 0.3, ids, IGNORED)
        targets[0] = ids[0]
        if family == "bert":
            segments = (np.arange(length) > length // 2).astype(np.int64)
            label = FOLLOWS + number % 2 if number < 3 else IGNORED  # most rows have no pair
            made.append(Example(ids, targets, segments, label=label, origin=number))
        else:
            written = ids[: length // 2]
            made.append(Example(ids, written, decoder_tokens=np.r_[0, written[:-1]], origin=number))
    return made


def run(folder, count, *options, fails=False):
    """Train in `count` processes, 0 for none but this one's child; returns losses, weights, and what was said."""
    start = [sys.executable]
    if count:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*start, __file__, str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return ([], {}, done.stderr) if fails else (*left(folder), done.stderr)


def left(folder):
    """The losses of the steps, and the weights in the end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with np.load(folder / "weights.npz") as file:
        weights = {name: file[name] for name in file.files}
    return [line["loss"] for line in lines if "loss" in line], weights


def close(one, other, tolerance):
    return all(np.abs(one[name] - other[name]).max() < tolerance for name in one)


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    options = dict(argument.split("=", 1) for argument in arguments[1:])
    family, kill = options.pop("family", "llama"), int(options.pop("kill", 0))
    dropout, lora = float(options.pop("dropout", 0)), options.pop("lora", "")
    smoothing = float(options.pop("smoothing", 0))
    device = options.pop("device", "cpu")
    values = {
        name: json.loads(value) if value[0] in "0123456789tfn{" else value for name, value in options.items()
    }
    config = TrainConfig(
        **{"steps": 12, "rows": 3, "micro_rows": 1, "warmup": 3, "precision": "float32", "seed": 3}
        | {"checkpoint_seconds": 0.0, "clip": 1.0}
        | ({"optimizer": "adamw"} if lora else {})
        | values
    )
    torch.set_num_threads(1)
    heads = {"mlm": True, "mlm_bias": True, "pooler": True, "nsp": True} if family == "bert" else {}
    shape = ShapeConfig(family=family, width=32, layers=2, heads=2, context=32, dropout=dropout)
    model = build_model(shape.with_vocabulary(VOCABULARY, **heads))
    model.initialise(0)
    adapter = None
    if lora:
        if lora != "float32":
            model, _ = build_quantised(model.config, model.weights(), lora)
        adapter = begin_adapter(model, LoraConfig(rank=4, dropout=dropout), seed=0)
        add_adapter(model, adapter)
    loss = {"llama": causal_loss, "bert": masked_loss, "t5": sequence_loss}[family]
    if smoothing:
        loss = partial(loss, smoothing=smoothing)
    processes = Processes.join(device, deterministic=config.deterministic)
    steps = 0

    def objective(model, batch):
        nonlocal steps
        steps += 1
        if kill and processes.rank == processes.world - 1 and steps > kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)

    written = 20 if family == "t5" else 0
    # other random documents: soon the model only learns its own by heart, and training stops if told so
    held_out = fixed_batches(examples(family, 1 << 20), rows=3, length=32, pad_id=0, decoder_length=written)

    def validate(model):
        return measure(model, loss, held_out).figures("validation")

    hooks = Hooks(validate=validate if "validate_every" in values else None)
    loader = Loader(
        lambda epoch: examples(family, epoch),
        rows=config.rows,
        length=32,
        pad_id=0,
        seed=3,
        decoder_length=written,
    )
    try:
        train(model, objective, loader, config, folder, hooks=hooks, processes=processes)
    except LexmillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if adapter is None:
        weights = model.weights()
    else:
        changes = read_adapter(model, adapter).changes
        weights = {
            f"{name} {half}": getattr(change, half) for name, change in changes.items() for half in "ab"
        }
    if processes.first:
        np.savez(folder / "weights.npz", **weights)


if __name__ == "__main__":
    main(sys.argv[1:])
