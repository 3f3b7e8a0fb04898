"""Several processes train one model (gloo): the same curve, a death that all notice, a resume on any number."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from train_together import close, run, same

from lexmill.train.batches import pack
from lexmill.train.examples import IGNORED, next_token_example
from lexmill.train.parallel import own_parts
from lexmill.train.processes import Processes


@pytest.mark.parametrize(
    "options",
    [
        ("family=llama", "sharding=replicate"),
        ("family=llama", "sharding=shard"),
        ("family=bert", "sharding=replicate"),
        ("family=t5", "sharding=shard", "smoothing=0.1"),
        ("lora=q8_0", "sharding=replicate"),
        pytest.param(
            ("lora=float32", "sharding=shard", "gradient_checkpointing=true"), marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_two_processes_give_the_curve_of_one(options, tmp_path):
    alone, weights, _ = run(tmp_path / "one", 0, *options)
    together, shared, _ = run(tmp_path / "two", 2, *options)
    assert len(alone) == len(together) == 12
    assert np.allclose(alone, together, atol=2e-4)
    assert close(weights, shared, 5e-3)  # Muon makes small differences of a gradient's direction larger


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_torchruns_only_process_goes_the_way_of_many(sharding, tmp_path):
    """So that FSDP and its checkpoints can be tried where there is one GPU."""
    options = (f"sharding={sharding}", "dropout=0.1")
    alone, weights, _ = run(tmp_path / "alone", 0, *options)
    run(tmp_path / "one", 1, *options, "kill=30", fails=True)
    shards = list((tmp_path / "one" / "checkpoints").glob("step-*/shards"))
    assert bool(shards) == (sharding == "shard")
    found, again, _ = run(tmp_path / "one", 1, *options)
    assert np.allclose(alone, found, atol=2e-4)
    assert close(weights, again, 5e-3)


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_a_process_that_dies_stops_all_and_the_run_goes_on(sharding, tmp_path):
    options = (f"sharding={sharding}", "dropout=0.1", "micro_rows=2")
    _, whole, _ = run(tmp_path / "whole", 2, *options)
    _, _, said = run(tmp_path / "killed", 2, *options, "kill=7", fails=True)
    assert "lost the others" in said and "The same command goes on" in said
    assert any((tmp_path / "killed" / "checkpoints").glob("step-*/state.json"))
    _, again, _ = run(tmp_path / "killed", 2, *options)
    assert same(whole, again)


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_another_number_of_processes_goes_on_in_the_same_order(sharding, tmp_path):
    options = (f"sharding={sharding}",)
    losses, whole, _ = run(tmp_path / "whole", 0, *options)
    run(tmp_path / "moved", 2, *options, "kill=12", fails=True)
    found, again, _ = run(tmp_path / "moved", 0, *options)
    assert np.allclose(losses, found, atol=2e-4)
    assert close(whole, again, 5e-3)


@pytest.mark.parametrize("rows, world, micro", [(5, 2, 2), (3, 4, None), (8, 3, 1), (1, 2, None)])
def test_every_row_is_taken_once(rows, world, micro):
    random = np.random.default_rng(0)
    made = [next_token_example(random.integers(0, 97, 33)) for _ in range(rows)]
    batch = pack(made, 32, 0)
    taken, parts = [], set()
    for rank in range(world):
        own = own_parts(batch, Processes(rank, world, torch.device("cpu")), micro)
        parts.add(len(own))
        for part in own:
            taken += [
                tuple(row) for row, targets in zip(part.tokens, part.targets) if (targets != IGNORED).any()
            ]
    assert len(parts) == 1  # as many in each: they meet at the end of the last
    assert sorted(taken) == sorted(map(tuple, batch.tokens))
    assert (batch.targets != IGNORED).all()  # a row that stands in is a copy


RECIPE = """
name = "together"
steps = ["prepare", "tokenizer", "pretrain"]

[prepare]
validation_fraction = 0.2
sources = [{ path = "*.txt" }]

[tokenizer]
vocab_size = 260

[pretrain]
steps = 6
rows = 4
precision = "float32"

[pretrain.model]
width = 32
layers = 2
heads = 2
context = 32
"""


@pytest.mark.slow
def test_a_recipe_runs_on_two_processes_as_on_one(tmp_path):
    for number in range(12):
        words = " ".join(f"word{(number * 7 + place) % 50}" for place in range(120))
        (tmp_path / f"{number}.txt").write_text(words, "utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, "utf-8")
    alone = [sys.executable, "-m", "lexmill"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    curves = []
    for name, start in (("one", alone), ("two", [*launch, "-m", "lexmill"])):
        out = tmp_path / name
        command = [*start, "run", str(tmp_path / "recipe.toml"), "--out", str(out), "--set"]
        done = subprocess.run([*command, "pretrain.device=cpu"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("from raw data to a running model") == 1  # one process speaks for all
        assert (out / "pretrain" / "model" / "model.safetensors").is_file()
        lines = (out / "pretrain" / "metrics.jsonl").read_text().splitlines()
        curves.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(curves[0]) == 6 and np.allclose(*curves, atol=2e-4)
