"""What training costs: parameters, operations and memory by formula, against torch's own counters and real runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, lexmill
from torch.utils.flop_counter import FlopCounterMode

from lexmill.errors import ConfigError
from lexmill.model.build import build_model
from lexmill.pretrain.lessons import loss_of
from lexmill.pretrain.plan import plan_pretraining, training_row
from lexmill.pretrain.shape import ShapeConfig
from lexmill.pretrain.stage import PretrainConfig
from lexmill.recipe.config import read_recipe
from lexmill.recipe.costs import plan_costs
from lexmill.train.calibration import random_batch
from lexmill.train.cost import (
    Row,
    activation_bytes,
    checkpoint_bytes,
    count_parameters,
    optimizer_flops,
    optimizer_numbers,
    process_memory,
    row_flops,
)
from lexmill.train.optimizers import OptimizerSet, orthogonalise
from lexmill.train.parallel import Task

FAMILIES = ["llama", "qwen3", "bert", "modernbert", "t5"]


def settings(family, **changes):
    shape = {"family": family, "width": 64, "layers": 3, "heads": 4, "context": 64, **changes}
    return PretrainConfig(steps=1, rows=4, precision="float32", model=ShapeConfig(**shape))


def make(family, **changes):
    config = settings(family, **changes)
    return config, config.shape(503)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family, tied):
    _config, shape = make(family, tied=tied)
    model = build_model(shape)
    found = count_parameters(shape)
    embeddings = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name.endswith(("embed.weight", "relative.weight"))
    )
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert found.total == sum(weight.numel() for weight in model.parameters())
    assert (found.embeddings, found.matrices) == (embeddings, matrices)
    assert found.head == model.head_weight.numel()


def counted_products(model, call):
    """Operations of plain products (matrices) and of batched ones (attention), forward and back, by torch."""
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    plain, batched = 0, 0
    for operation, count in counter.get_flop_counts()["Global"].items():
        if str(operation) in ("aten.mm", "aten.addmm"):
            plain += count
        else:
            batched += count
    return plain, batched


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family, tied):
    """Every place a target and every first token a pair; torch counts attention's way back in part only."""
    rows, length, written = 2, 48, 32
    _config, shape = make(family, tied=tied)
    model = build_model(shape)
    tokens, others = torch.randint(0, 503, (rows, length)), torch.randint(0, 503, (rows, written))
    if family == "t5":
        row = Row(length, written, written)
        plain, _ = counted_products(model, lambda: model(tokens, others))
    else:
        row = Row(length, length, pairs=1.0 if shape.nsp else 0.0)

        def call():
            hidden = model.hidden(tokens)
            if family in ("llama", "qwen3"):
                return torch.nn.functional.linear(hidden, model.head_weight)
            pairs = model.pair_logits(hidden[:, 0]).sum() if shape.nsp else 0.0
            return model.masked_logits(hidden).sum() + pairs

        plain, _ = counted_products(model, call)
    assert rows * row_flops(shape, row).matrices == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_s_operations_are_those_that_torch_counts(family):
    """Forward, in the blocks of 128 queries that causal attention is computed in: a causal row of eight
    blocks multiplies 9/16 of all pairs, of which 1/2 are needed."""
    length, written = 1024, 512
    _, shape = make(family, layers=2, context=length)
    model = build_model(shape)
    tokens, others = torch.randint(0, 503, (1, length)), torch.randint(0, 503, (1, written))
    with FlopCounterMode(display=False) as counter:
        if family == "t5":
            model.decode(others, model.encode(tokens))
        else:
            model.hidden(tokens)
    batched = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    row = Row(length, length, written if family == "t5" else 0)
    forward = row_flops(shape, row).attention / 3
    if family in ("llama", "qwen3"):
        assert forward == pytest.approx(batched * (1 / 2) / (9 / 16), rel=0.01)
    elif family == "t5":  # the decoder's own: four blocks, 5/8 of the pairs
        unneeded = 2 * 2 * 2 * 64 * written**2 * (5 / 8 - 1 / 2)
        assert forward == pytest.approx(batched - unneeded, rel=0.01)
    elif family == "bert":
        assert forward == pytest.approx(batched, rel=0.001)
    else:  # local layers multiply everything, though only their windows are needed
        assert batched / 2 < forward < 0.7 * batched


def test_the_update_s_operations_are_those_that_torch_counts():
    matrices = torch.randn(3, 24, 60)
    with FlopCounterMode(display=False) as counter:
        orthogonalise(matrices)
    _, shape = make("llama", layers=1)
    one = 2 * 5 * (2 * 24 * 24 * 60 + 24**3)
    assert counter.get_total_flops() == 3 * one
    assert optimizer_flops(shape, "adamw") == 0
    q_k_v_out = 4 * 2 * 5 * (2 * 64**3 + 64**3)
    assert optimizer_flops(shape, "muon") == q_k_v_out + 3 * 2 * 5 * (2 * 64 * 64 * 192 + 64**3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_optimiser_state_is_counted_exactly(family, optimizer):
    _config, shape = make(family)
    model = build_model(shape)
    optimizers = OptimizerSet(
        model, kind=optimizer, learning_rate=0.1, matrix_learning_rate=0.1, weight_decay=0.0
    )
    optimizers.begin_state()
    numbers = sum(
        tensor.numel() for name, tensor in optimizers.tensors().items() if not name.endswith("/step")
    )
    assert optimizer_numbers(shape, optimizer) == numbers
    assert checkpoint_bytes(shape, optimizer) == 4 * (numbers + count_parameters(shape).total)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_estimated_from_what_torch_keeps(family):
    """What autograd keeps for the way back must be most of the estimate, and not more than it."""
    config, shape = make(family, width=128)
    row = training_row(config, shape)
    model = build_model(shape)
    task = Task(model, loss_of(config, shape))
    batch = random_batch(shape, row, 8)
    kept = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task(batch, {name: 1.0 for name in batch.counts})
    assert torch.isfinite(loss)
    estimate = activation_bytes(shape, row, 8, "float32")
    assert 0.5 * estimate < sum(kept.values()) < 1.1 * estimate


def test_memory_grows_with_rows_and_shrinks_with_processes():
    config, shape = make("llama")
    row = training_row(config, shape)

    def memory(rows, **changes):
        return process_memory(shape, row, optimizer="muon", precision="float32", rows_at_once=rows, **changes)

    assert memory(8).step > 3 * (memory(2).step - memory(1).step)
    whole, shard = memory(4, world=4), memory(4, world=4, sharding="shard")
    assert shard.weights * 4 == pytest.approx(whole.weights, abs=4)
    assert shard.optimizer * 4 == pytest.approx(whole.optimizer, abs=4)
    assert shard.gathered > 0 and shard.gradients < whole.gradients
    # added up over parts, gradients stay whole until they are exchanged
    assert memory(4, parts=2, world=4, sharding="shard").gradients == whole.gradients


def test_random_rows_look_like_packed_ones():
    _config, shape = make("bert")
    row = Row(64, 9.6, documents=3.0, pairs=2.0)
    batch = random_batch(shape, row, 5)
    assert batch.counts == {"tokens": 50, "pairs": 10}
    assert batch.document.max() == 2 and (np.diff(batch.document) >= 0).all()
    assert (batch.positions[:, 0] == 0).all() and (batch.positions == 0).sum() == 15


def test_a_plan_says_what_to_change_when_memory_will_not_do(monkeypatch):
    config = settings("llama")
    small = plan_pretraining(config, vocab_size=503, seconds=0)
    assert small.warnings == () and small.time is None
    needed = small.memory.total - small.memory.program
    step = process_memory(
        config.shape(503), training_row(config, config.shape(503)),
        optimizer="muon", precision="float32", rows_at_once=4,
    ).step  # fmt: skip
    monkeypatch.setattr("lexmill.train.forecast.available_memory", lambda: int((needed - step / 3) / 0.95))
    (warning,) = plan_pretraining(config, vocab_size=503, seconds=0).warnings
    assert "micro_rows = 2" in warning
    monkeypatch.setattr("lexmill.train.forecast.available_memory", lambda: 200_000)
    none = plan_pretraining(config, vocab_size=503)
    assert "smaller width" in none.warnings[0] and 'sharding = "shard"' in none.warnings[0]
    assert none.time is None, "a calibration that does not fit must not start"


def test_a_plan_counts_the_tokens_of_documents(documents, tokenizer, tmp_path):
    from lexmill.pretrain.lessons import tokenize_documents

    config = settings("llama")
    found = plan_pretraining(config, documents=documents, tokenizer=tokenizer, seconds=0)
    shards = tokenize_documents(documents, tokenizer, tmp_path / "tokens")
    assert found.data.exact and found.data.tokens == shards["train"].tokens
    assert found.epochs == pytest.approx(found.tokens / found.data.tokens, abs=0.01)
    again = plan_pretraining(config, documents=documents, tokenizer=tokenizer, out=tmp_path, seconds=0)
    assert again.data == found.data
    with pytest.raises(ConfigError, match="vocabulary"):
        plan_pretraining(config)


def run_measured(arguments):
    """The most memory, in bytes, that `lexmill` with these arguments held, told by its process itself.

    What the system tells of an ended child is at least what its parent held when the child began.
    """
    code = f"""
import sys
from lexmill.cli.main import main
from lexmill.devices import peak_memory
sys.argv = ["lexmill", *{arguments!r}]
try:
    main()
finally:
    print("most:", peak_memory())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("most:")[2])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux")
def test_the_plan_of_a_small_model_agrees_with_its_run(documents, tokenizer, tmp_path):
    """Wide factors: this is a machine on which others compute. Time within 3, memory within 1.6."""
    tokenizer.save(tmp_path / "tokenizer")
    options = ["--set", "model.width=128", "--set", "model.context=128", "--set", "rows=16", "--steps", "12"]
    options += ["--set", "precision='float32'", "--set", "validate_every=1000"]
    paths = [documents, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out"]
    planned = lexmill("pretrain", *paths, *options, "--plan", "--json", env={"OMP_NUM_THREADS": "1"})
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "out").exists(), "a plan writes nothing"
    plan = json.loads(planned.stdout)["pretrain"]
    most = run_measured([str(argument) for argument in ("pretrain", *paths, *options, "--quiet")])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert plan["parameters"]["total"] == result["parameters"]
    assert plan["steps"] == result["steps"]
    assert 1 / 3 < plan["time"]["seconds"] / result["seconds"] < 3
    assert 1 / 1.6 < plan["memory_total"] / most < 1.6


def test_the_plan_of_a_recipe(tmp_path):
    overrides = ("pretrain.model.width=64", "pretrain.rows=2", "finetune.rows=2", "pretrain.sharding=shard")
    recipe = read_recipe(ROOT / "recipes" / "quickstart.toml", overrides)
    plans = plan_costs(recipe, tmp_path / "run", world=2, seconds=0.3)
    assert list(plans) == ["pretrain", "finetune"] and not (tmp_path / "run").exists()
    for plan in plans.values():
        assert plan.processes == 2 and plan.time.calibration_rows == 1
        assert plan.shard.weights < plan.replicate.weights
        assert plan.time.seconds_low <= plan.time.seconds <= plan.time.seconds_high
    assert plans["pretrain"].memory == plans["pretrain"].shard
    assert plans["finetune"].memory == plans["finetune"].replicate


def test_wrong_settings_of_a_plan_end_with_2():
    wrong = lexmill("pretrain", "--plan", "--steps", 3, "--set", "vocab_size=99", "--set", "model.heads=7")
    assert wrong.returncode == 2 and "multiple of 'heads'" in wrong.stderr
    nothing = lexmill("pretrain", "--steps", 3)
    assert nothing.returncode == 2 and "--plan" in nothing.stderr
