"""The tokenizer: every text comes back, streaming gives whole characters, special texts are handled."""

import json
import time

import jinja2.sandbox
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


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "product": "{{ 'a' * 10 ** 9 }}",
    "product of a list": "{{ ([1] * 10 ** 9)|length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "padding": "{{ 'a'|center(10 ** 10) }}",
    "padding by a method": "{{ 'a'.ljust(10 ** 10) }}",
    "padding by a format": "{{ '%9999999999d'|format(1) }}",
    "padding by %": "{{ '%9999999999d' % 1 }}",
    "padding by format()": "{{ '{:>9999999999}'.format(1) }}",
    "indent": "{{ [1]|tojson(indent=10 ** 10) }}",
    "replace": "{% set a = 'a' * 99999 %}{{ a.replace('a', a)|length }}",
    "replace by a filter": "{% set a = 'a' * 99999 %}{{ a|replace('a', a)|length }}",
    "join": "{{ range(99999)|join('a' * 99999) }}",
    "map": "{% for a in range(9999) %}{{ range(99999)|map('abs')|sum }}{% endfor %}",
    "sum": "{{ range(99999)|map('list')|sum(start=[]) }}",
    "billion laughs": "{% set a = ['ha'] %}"
    + "{% set a = [a, a, a, a, a, a, a, a, a, a] %}" * 12
    + "{{ a }}",
    "billion laughs as JSON": "{% set a = ['ha'] %}" + "{% set a = [a, a, a, a] %}" * 30 + "{{ a|tojson }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_works_without_end_is_stopped(bomb):
    started = time.monotonic()
    with pytest.raises(FormatError, match="chat template"):
        render_chat(BOMBS[bomb], [{"role": "user", "content": "x"}])
    assert time.monotonic() - started < 30  # far more than it needs; the limit itself is five seconds


def test_ordinary_templates_work_in_the_sandbox():
    template = (
        "{% macro turn(m) %}<{{ m.role ~ '|' ~ loop_free }}>{{ m.content | trim }}{% endmacro %}"
        "{% set ns = namespace(first=true) %}{% set loop_free = 1 %}"
        "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ '!' if loop.last else '' }}"
        "{{ turn(m) }}{% if loop.previtem is defined %}{{ loop.previtem.role[:1] }}{% endif %}"
        "{% if '</t>' in m.content %}{{ m.content.split('</t>')[-1].lstrip('\n') }}{% endif %}{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% else %}none{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% break %}{% endfor %}"
        "{{ messages | map(attribute='role') | join(', ') }}{{ [1, {'a': 'é'}] | tojson }}"
        "{{ (messages | selectattr('role', 'equalto', 'user') | list | length) * 3 }}{{ '-' * 3 }}{{ 7 % 4 }}"
        "{{ messages[::-1][0].role }}{{ '%s!' % 'x' }}{{ undefined_thing }}{{ 'a,b'.replace(',', ';') | upper }}"
    )
    said = [{"role": "user", "content": " q "}, {"role": "assistant", "content": "t</t>\nr"}]
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    assert render_chat(template, said) == plain.from_string(template).render(messages=said)


def test_long_conversations_are_no_bomb():
    said = [{"role": ("user", "assistant")[i % 2], "content": "word " * 50} for i in range(20_000)]
    assert len(render_chat(CHAT_TEMPLATE, said)) > 5_000_000


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
