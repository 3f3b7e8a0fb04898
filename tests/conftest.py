"""Shared by all tests: a tiny trained tokenizer and model directory, made once, and the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT / "corpora"


def lexmill(*arguments, cwd=None, env=None, text=None, timeout=300):
    """Run the command line as a user would; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "lexmill.cli.main", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **(env or {})},
        input=text,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def randomise(model, deviation=0.15, norms=0.2, seed=11):
    """Give a torch model random weights that are not degenerate: norms near 1, nothing zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            norm = "norm" in name.lower() and name.endswith("weight")
            weight.copy_(1 + norms * noise if norm else deviation * noise)
    return model


def with_bos(value):
    """Let a tokenizer.json put a BOS before each text."""
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }


@pytest.fixture(scope="session")
def any_tokenizer():
    """A tokenizer of fewer than 99 tokens, with ids that end a text."""
    from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

    return train_tokenizer(["the quick brown fox jumps"], TokenizerConfig(kind="characters"))


@pytest.fixture(scope="session")
def prose():
    """Some hundred thousand characters of a novel."""
    return (CORPORA / "austen" / "Persuasion.txt").read_text("utf-8")[:200_000]


@pytest.fixture(scope="session")
def tokenizer(prose):
    from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

    return train_tokenizer([prose], TokenizerConfig(vocab_size=512))


@pytest.fixture(scope="session")
def documents(tmp_path_factory, prose):
    """A small prepared folder with text and chat documents."""
    from lexmill.data.prepare import PrepareConfig, SourceConfig, prepare

    raw = tmp_path_factory.mktemp("raw")
    (raw / "novel.txt").write_text(prose[:60_000], "utf-8")
    lines = (CORPORA / "dialogues" / "dialogues.jsonl").read_text("utf-8").splitlines()
    (raw / "dialogues.jsonl").write_text("\n".join(lines[:80]) + "\n", "utf-8")
    out = tmp_path_factory.mktemp("prepared") / "documents"
    sources = (
        SourceConfig(path="novel.txt", split="^Chapter [0-9]+$", unwrap=True),
        SourceConfig(path="dialogues.jsonl", kind="chat"),
    )
    prepare(PrepareConfig(sources=sources, validation_fraction=0.2), out, raw)
    return out


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, tokenizer):
    """A model directory with random but not degenerate weights."""
    from lexmill.model.build import build_model
    from lexmill.model.config import ModelConfig
    from lexmill.model.directory import write_model_directory

    config = ModelConfig(
        vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=96, context=128
    )
    model = randomise(build_model(config), deviation=0.12, norms=0.1)
    path = tmp_path_factory.mktemp("models") / "model"
    write_model_directory(path, config, model.weights(), tokenizer)
    return path
