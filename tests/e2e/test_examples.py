"""Every script in examples/ runs as its first lines say, on small inputs."""

import os
import subprocess
import sys

import pytest
from conftest import CORPORA, ROOT

EXAMPLES = ROOT / "examples"


def example(name, *arguments, text="", timeout=300):
    """Run a script from an empty-handed shell; returns what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate(model_path):
    said = example("generate.py", model_path, "She was", "--max-tokens", 4)
    assert said.startswith("She was") and len(said.split("three likeliest:\n")[1].splitlines()) == 4


def test_chat_keeps_the_conversation(model_path):
    said = example("chat.py", model_path, text="Hello\nAnd you?\n")
    assert said.count("you > ") == 3 and said.endswith("4 messages\n")


def test_tokenizer(tmp_path, prose):
    (tmp_path / "prose.txt").write_text(prose, "utf-8")
    said = example("tokenizer.py", tmp_path / "prose.txt", "--vocabulary", 400)
    assert "400 tokens" in said and "'<|im_end|>': 1 tokens" in said


def test_pretrain_from_text(tmp_path):
    novel = CORPORA / "austen" / "Persuasion.txt"
    small = ("--steps", 4, "--width", 32, "--layers", 1)
    said = example("pretrain_from_text.py", novel, tmp_path / "out", *small)
    assert "parameters" in said and (tmp_path / "out" / "pretrain" / "model" / "config.json").is_file()


def test_translate_from_scratch(tmp_path, prose):
    pytest.importorskip("sacrebleu")
    words = prose.split()
    sentences = [words[place : place + 6] for place in range(0, 1800, 6)]
    for name, some in (("train", sentences), ("test", sentences[::20])):
        for language, order in (("ab", 1), ("ba", -1)):
            lines = [" ".join(sentence[::order]) for sentence in some]
            (tmp_path / f"{name}.{language}").write_text("\n".join(lines) + "\n", "utf-8")
    files = tmp_path / "train.{ab,ba}", tmp_path / "test.{ab,ba}", tmp_path / "out"
    small = ("--minutes", 0.02, "--vocabulary", 200, "--width", 32, "--limit", 4)
    said = example("translate_from_scratch.py", *files, *small)
    assert "1 beams: {'bleu'" in said and "4 beams: {'bleu'" in said and "nrefs:1" in said


def test_compare_runtimes(model_path):
    pytest.importorskip("transformers")
    pytest.importorskip("xllamacpp")
    said = example("compare_runtimes.py", model_path, "--types", "f16", "--tokens", 4)
    assert "llama.cpp f16" in said and "transformers" in said and "DIFFERENT" not in said


def test_every_example_is_tested_and_listed():
    with open(__file__, encoding="utf-8") as file:
        tests = file.read()
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in tests and f"({path.name})" in listed, path
