"""Tokenizers of imported GGUF files give the ids that llama.cpp gives for the file, and transformers for the directory."""

import gguf_samples as samples
import numpy as np
import pytest

from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.import_model import import_model
from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf
from lexmill.tokenizer.gguf_pre_tokenizers import PRE_TOKENIZERS

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

FORMS = {form: name for name, form in reversed(PRE_TOKENIZERS.items())}


def read_tokenizer(path):
    fields = gguf.GGUFReader(path).fields
    return {
        name: field.contents()
        for name, field in fields.items()
        if name.startswith(("tokenizer.", "general."))
    }


def differences(path, tokenizer, texts=samples.HARD_TEXTS):
    with LlamaCpp(path) as llama:
        return [
            (text, theirs, own)
            for text in texts
            if (theirs := llama.tokenize(text)) != (own := tokenizer.encode(text))
        ]


@pytest.mark.parametrize("pre", [*FORMS.values(), None])
def test_pre_tokenizer_cuts_as_in_llama_cpp(tmp_path, pre):
    tokens, merges = samples.wide_bpe()
    path = samples.write_llama(tmp_path / "m.gguf", samples.byte_bpe(pre, tokens, merges), tokens)
    model = import_model(path, tmp_path / "m")
    assert not differences(path, model.tokenizer)
    check_round_trip(path, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) - set(FORMS.values())))
def test_each_other_name_is_of_its_form(tmp_path, pre):
    test_pre_tokenizer_cuts_as_in_llama_cpp(tmp_path, pre)


def check_round_trip(path, model, folder):
    """What the file says of its tokenizer, and of itself, is what an export of its import says."""
    again = export_gguf(ModelDirectory.open(model.path), folder / "again.gguf", "f32")
    before, after = read_tokenizer(path), read_tokenizer(again)
    for key in set(before) - {"general.file_type", "general.quantization_version"}:
        if isinstance(before[key], list) and isinstance(before[key][0], float):
            np.testing.assert_array_equal(np.float32(before[key]), np.float32(after[key]), key)
        else:
            assert before[key] == after[key], key


@pytest.mark.parametrize("flags", [{}, {"add_add_bos_token": False}, {"add_add_space_prefix": False}])
def test_sentencepiece_bpe(tmp_path, flags):
    pieces = samples.sentencepiece_pieces()
    path = samples.write_llama(tmp_path / "m.gguf", samples.sentencepiece_bpe(*pieces, **flags), pieces[0])
    model = import_model(path, tmp_path / "m")
    texts = [*samples.HARD_TEXTS, "<s>a</s> b<|tool|>c <|tool|> d", "▁under▁ ▁"]
    assert not differences(path, model.tokenizer, texts)
    assert model.tokenizer.decode(
        model.tokenizer.encode("Hello, world! 中文 \U0001f600"), skip_special=True
    ) == ("Hello, world! 中文 \U0001f600")
    check_round_trip(path, model, tmp_path)
