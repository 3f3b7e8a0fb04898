"""Commands that run in the engine: without torch, from GGUF files too, with the answers that torch gives."""

import json
import os
import subprocess
import sys

import pytest
from conftest import lexmill

from lexmill.inference.native.library import available
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.llama_cpp import export_gguf

pytestmark = pytest.mark.skipif(not available(), reason="the engine is not built here")

SMOLLM2 = os.environ.get("LEXMILL_SMOLLM2", "")
# what a command imported, told at its end
_TELL = (
    "import atexit, sys\n"
    "atexit.register(lambda: print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)), file=sys.stderr))\n"
    "from lexmill.cli.main import main\n"
    "main()\n"
)


def run_and_tell(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", _TELL, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def gguf(model_path, tmp_path_factory):
    return export_gguf(ModelDirectory.open(model_path), tmp_path_factory.mktemp("gguf") / "model.gguf", "f32")


def test_generate_needs_no_torch(model_path, gguf):
    text, heavy = run_and_tell("generate", model_path, "It is", "-n", 8)
    assert heavy == "[]"
    assert run_and_tell("generate", gguf, "It is", "-n", 8) == (text, "[]")
    assert run_and_tell("generate", gguf, "It is", "-n", 8) == (
        text,
        "[]",
    )  # with the tokenizer that was kept
    torch = lexmill("generate", model_path, "It is", "-n", 8, "--backend", "torch")
    assert torch.stdout == text


def test_without_the_engine_torch_does_the_same(gguf):
    text = lexmill("generate", gguf, "It is", "-n", 8).stdout
    off = {"LEXMILL_NATIVE": "0"}
    assert lexmill("generate", gguf, "It is", "-n", 8, env=off).stdout == text
    told = lexmill("generate", gguf, "It is", "--backend", "native", env=off)
    assert told.returncode == 2 and "LEXMILL_NATIVE" in told.stderr
    assert "slower" in lexmill("doctor", "--fast", env=off).stdout
    wrong = lexmill("generate", gguf, "It is", "--backend", "nativ")
    assert wrong.returncode == 2 and "native" in wrong.stderr


def test_forms_are_read_from_files(gguf, tmp_path):
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}')
    done = lexmill("generate", gguf, "It is", "-q", "-n", 60, "--json-schema", schema, "--json")
    assert set(json.loads(json.loads(done.stdout)["text"])) <= {"a", "b"}
    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text('root ::= "yes" | "no"')
    assert lexmill("generate", gguf, "It is", "-q", "--grammar", grammar).stdout.strip() in ("yes", "no")
    assert lexmill("generate", gguf, "It is", "-q", "--regex", "[xyz]{3}").stdout.strip().strip("xyz") == ""
    schema.write_text('{"type": "string", "not": {"const": "a"}}')
    refused = lexmill("generate", gguf, "It is", "--json-schema", schema)
    assert refused.returncode == 2 and "not passed over" in refused.stderr and refused.stdout in ("", "It is")


def test_a_pretrained_model_from_its_file():
    if not SMOLLM2:
        pytest.skip("LEXMILL_SMOLLM2 names no GGUF file of SmolLM2-135M-Instruct")
    text, heavy = run_and_tell("generate", SMOLLM2, "The capital of France is", "-n", 2)
    assert text.strip() == "The capital of France is Paris." and heavy == "[]"
