"""Small results that change only on purpose. A change that is meant is recorded anew, and its diff looked at:

LEXMILL_RECORD=1 python -m pytest tests/golden
"""

import difflib
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, lexmill

RECORDED = Path(__file__).parent / "recorded"
HOW = "If this change is meant: LEXMILL_RECORD=1 python -m pytest tests/golden"
TEXTS = (
    "It is a truth universally acknowledged, that a single man",
    "  two  spaces\n\n\tand a tab",
    "Anne Elliot 1814, naïve café 你好 🙂",
    "<|im_start|>user\nHello<|im_end|>\n",
)
CONVERSATION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Hello <b>&amp;</b>\n你好"},
    {"role": "assistant", "content": " Good day. "},
    {"role": "user", "content": "And?"},
]


def recorded(name, text):
    """The recorded text of that name; `text` is recorded first when that is asked for."""
    path = RECORDED / name
    if os.environ.get("LEXMILL_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert path.is_file(), f"{name} was never recorded. {HOW}"
    return path.read_text("utf-8")


def compare(name, text):
    before = recorded(name, text)
    diff = difflib.unified_diff(before.splitlines(), text.splitlines(), "recorded", "now", lineterm="")
    assert text == before, "\n".join([*diff, HOW])


def test_ids_of_the_tokenizer_trained_on_the_shipped_prose(tokenizer):
    lines = [f"{text!r}\n{' '.join(map(str, tokenizer.encode(text)))}\n" for text in TEXTS]
    compare("tokens.txt", "".join(lines))


def test_the_rendered_chat_prompt(tokenizer):
    compare("chat-prompt.txt", tokenizer.render_chat(CONVERSATION))


def test_the_plan_of_the_quickstart(tmp_path):
    plan = lexmill("run", ROOT / "recipes" / "quickstart.toml", "--out", tmp_path / "run", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    compare("plan.txt", plan.stdout)


def test_the_first_losses_of_a_tiny_model(documents, tokenizer, tmp_path):
    """Data, batches, initial weights, loss, optimiser and schedule together, in float32.

    Sums in another order on another machine move the fourth decimal.
    """
    from lexmill.pretrain.stage import PretrainConfig, ShapeConfig, pretrain

    shape = ShapeConfig(width=32, layers=2, heads=2, kv_heads=1, mlp_width=64, context=64)
    config = PretrainConfig(model=shape, steps=5, rows=4, precision="float32", seed=0)
    pretrain(config, documents, tokenizer, tmp_path / "out")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 5
    before = recorded("losses.txt", "".join(f"{loss:.4f}\n" for loss in losses))
    assert losses == pytest.approx([float(line) for line in before.split()], abs=5e-4), HOW
