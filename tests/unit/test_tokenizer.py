"""The tokenizer: every text comes back, streaming gives whole characters, special texts are handled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import DataError, FileError, FormatError, ModelError
from lexmill.tokenizer.chat import render_chat
from lexmill.tokenizer.special import CHAT_TEMPLATE, SPECIAL_TOKENS
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
LOOKALIKES = st.lists(
    st.one_of(TEXT, st.sampled_from([*SPECIAL_TOKENS, "<|im_", "end|>", "\r\n", "  "]))
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=LOOKALIKES)
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert not set(tokenizer.encode(text, special=False)) & {0, 1, 2, 3}


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=40))
def test_streamed_pieces_are_the_whole_text(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@given(text=TEXT)
@settings(max_examples=50, deadline=None)
def test_no_streamed_piece_holds_half_a_character(tokenizer, text):
    stream = tokenizer.stream()
    for token in tokenizer.encode(text, special=False):
        assert "\ufffd" not in stream.push(token) or "\ufffd" in text


def test_save_and_load_lose_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path, context=128)
    again = Tokenizer.load(tmp_path)
    assert (again.json, again.ids, again.chat_template) == (
        tokenizer.json,
        tokenizer.ids,
        tokenizer.chat_template,
    )
    assert again.ids.pad not in again.ids.stop


def test_chat_template_renders_plain_chatml(tokenizer):
    text = tokenizer.render_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{x}}"}]
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{x}}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text).count(tokenizer.ids.eos) == 2


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "is a string, not a list"),
        ([], "empty"),
        ([{"role": "robot", "content": "x"}], "message 1: its role 'robot' is unknown"),
        ([{"role": "user", "content": "x"}, {"role": "assistant"}], "message 2: its content is missing"),
    ],
)
def test_malformed_conversations_are_refused(messages, said):
    with pytest.raises(DataError, match=said):
        render_chat(CHAT_TEMPLATE, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set x = 1 / 0 %}{{ x }}",
    ],
)
def test_hostile_templates_are_refused(template):
    with pytest.raises(FormatError):
        render_chat(template, [{"role": "user", "content": "x"}])


def test_bad_input_is_said_clearly(tokenizer, tmp_path):
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="Token id 512 is outside"):
        tokenizer.decode([512])
    with pytest.raises(FileError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.json[:-50], "utf-8")
    with pytest.raises(FormatError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    config = (tmp_path / "tokenizer_config.json").read_text("utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        config.replace('"eos_token": "<|im_end|>"', '"eos_token": "<x>"')
    )
    with pytest.raises(FormatError, match="not in the vocabulary"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(tokenizer.json, chat_template="").render_chat([{"role": "user", "content": "x"}])


def test_a_vocabulary_larger_than_the_corpus_allows_is_refused():
    with pytest.raises(DataError, match="allow a vocabulary of only"):
        train_tokenizer(["a short text, a short text"], TokenizerConfig(vocab_size=2000))
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], TokenizerConfig(vocab_size=300))
