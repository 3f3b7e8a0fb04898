"""Training on a GPU: the CPU's curve, bfloat16, torch.compile, exact resume, NCCL and FSDP, adapters, preferences.

make test-gpu
"""

import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import CORPORA
from train_together import close, left, main, run, same

from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.stage import finetune
from lexmill.inference.generation import GenerationConfig, generate
from lexmill.inference.sampling import SamplingConfig
from lexmill.inference.torch_backend import TorchSession
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_loaded
from lexmill.model.directory import ModelDirectory
from lexmill.pretrain.shape import ShapeConfig
from lexmill.pretrain.stage import PretrainConfig, pretrain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
GPU = "device=cuda"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product of this process


@pytest.fixture(autouse=True)
def in_any_order():
    """A run that was told to be deterministic leaves its process so."""
    yield
    torch.use_deterministic_algorithms(False)


def here(folder, *options):
    """Losses and weights of a run in this process."""
    main([str(folder), *options])
    return left(folder)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_gpu_gives_the_curve_of_the_cpu(family, tmp_path):
    options = (f"family={family}", "steps=20")
    losses, weights = here(tmp_path / "cpu", *options)
    found, learned = here(tmp_path / "gpu", *options, GPU)
    assert np.allclose(losses, found, atol=1e-3)
    assert close(weights, learned, 1e-2)  # Muon makes small differences of a gradient's direction larger


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_compiled_blocks_give_the_same_curve(family, tmp_path):
    options = (f"family={family}", "steps=20", GPU)
    losses, _ = here(tmp_path / "plain", *options)
    found, _ = here(tmp_path / "compiled", *options, "compile=true")
    assert np.allclose(losses, found, atol=1e-3)


def test_pretraining_in_bfloat16_and_compiled_follows_float32_on_a_cpu(documents, tokenizer, tmp_path):
    """One model learns real text three ways; each also learns as much."""
    curves = {}
    for name, more in (
        ("cpu", {"device": "cpu", "precision": "float32"}),
        ("bfloat16", {"device": "cuda", "precision": "bfloat16"}),
        ("compiled", {"device": "cuda", "precision": "bfloat16", "compile": True}),
    ):
        shape = ShapeConfig(width=64, layers=3, heads=4, context=64)
        config = PretrainConfig(steps=60, rows=8, validate_every=60, model=shape, **more)
        made, _ = pretrain(config, documents, tokenizer, tmp_path / name)
        steps, validations = curve(tmp_path / name)
        curves[name] = [line["loss"] for line in steps], validations[-1]["validation_loss"], made
    losses, validation, _ = curves["cpu"]
    assert losses[-1] < losses[0] - 1.5
    for name in ("bfloat16", "compiled"):
        assert np.allclose(losses, curves[name][0], atol=0.1)
        assert abs(validation - curves[name][1]) < 0.03
        assert curves[name][2].config == curves["cpu"][2].config


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_killed_deterministic_run_goes_on_to_the_same_bits(family, tmp_path):
    options = (
        f"family={family}",
        "steps=20",
        "precision=bfloat16",
        "dropout=0.1",
        "micro_rows=2",
        "deterministic=true",
        GPU,
    )
    _, whole = here(tmp_path / "whole", *options)
    run(tmp_path / "killed", 0, *options, "kill=12", fails=True)
    assert any((tmp_path / "killed" / "checkpoints").glob("step-*/state.json"))
    _, again = here(tmp_path / "killed", *options)
    assert same(whole, again)


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_nccl_and_fsdp_give_the_curve_of_one_process(sharding, tmp_path):
    options = ("steps=20", "precision=bfloat16", "optimizer=adamw", f"sharding={sharding}", GPU)
    losses, weights = here(tmp_path / "alone", *options)
    run(tmp_path / "group", 1, *options, "kill=40", fails=True)
    shards = list((tmp_path / "group" / "checkpoints").glob("step-*/shards"))
    assert bool(shards) == (sharding == "shard")
    found, learned, _ = run(tmp_path / "group", 1, *options)
    assert np.allclose(losses, found, atol=5e-3)
    assert close(weights, learned, 2e-2)


@pytest.mark.parametrize("kept", ["float32", "q8_0"])
def test_an_adapter_learns_as_on_the_cpu(kept, tmp_path):
    options = (f"lora={kept}", "steps=20")
    losses, _ = here(tmp_path / "cpu", *options)
    found, _ = here(tmp_path / "gpu", *options, GPU)
    assert np.allclose(losses, found, atol=1e-3)


def settings(task, **more):
    common = {"steps": 30, "rows": 4, "row_length": 128, "too_long": "drop", "precision": "float32"}
    return FinetuneConfig(task=task, **{**common, **more})


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "validation_loss" in line]


def test_chat_is_learned_and_written(model_path, tmp_path):
    base = ModelDirectory.open(model_path)
    said = {}
    for device in ("cpu", "cuda"):
        texts = []

        def reply(model, tokenizer, prompt, texts=texts):
            ids, greedy = tokenizer.encode(prompt), SamplingConfig(temperature=0.0)
            config = GenerationConfig(max_tokens=12, sampling=greedy)
            steps = generate(TorchSession(model), tokenizer, ids, config)
            made = [step.token for step in steps if step.token is not None]
            texts.append((next(model.parameters()).device.type, made))
            return tokenizer.decode(made)

        config = settings("chat", device=device, prompts=("Who are you?",), sample_every=15)
        out = tmp_path / device
        model, _ = finetune(config, base, CORPORA / "dialogues" / "dialogues.jsonl", out, reply=reply)
        said[device] = texts, curve(out), model
    assert [kind for kind, _ in said["cuda"][0]] == ["cuda"] * 2
    assert said["cpu"][0][0][1] == said["cuda"][0][0][1]  # the same tokens, half way
    for one, other in zip(said["cpu"][1][0], said["cuda"][1][0]):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-3)
    # what lies on disk is what was learned there, read by a CPU
    network = build_loaded(said["cuda"][2].config, said["cuda"][2].weights_on_demand())
    assert all(torch.isfinite(weight).all() for weight in network.parameters())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_preferences_are_learned_as_on_the_cpu(model_path, tmp_path, lora):
    base, chance = ModelDirectory.open(model_path), random.Random(0)
    rows = tmp_path / "pairs.jsonl"
    words = ["sea", "town", "walk", "captain", "letter", "sister"]
    lines = [
        {"prompt": f"What of the {chance.choice(words)}?", "chosen": "I like it.", "rejected": "It is so."}
        for _ in range(60)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        config = settings("prefer", device=device, lora=lora, learning_rate=0.001, validation_fraction=0.2)
        finetune(config, base, rows, out)
        found[device] = curve(out)
    for one, other in zip(found["cpu"][0], found["cuda"][0]):
        assert one["loss"] == pytest.approx(other["loss"], abs=3e-3)
    assert found["cuda"][0][-1]["loss"] < 0.6 < 0.69 < found["cuda"][0][0]["loss"] + 0.01
    if lora:
        assert (tmp_path / "cuda" / "adapter_model.safetensors").is_file()
