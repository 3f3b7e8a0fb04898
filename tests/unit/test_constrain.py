"""Texts held to a form: whatever a model wants to write, and with guesses ahead, only what fits comes out."""

import json
import re

import numpy as np
import pytest
from conftest import randomise
from slow_engine import SlowEngine

from lexmill.errors import ConfigError, ModelError
from lexmill.inference.constrain import Form, constrain
from lexmill.inference.generation import Writing, generation_config
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.native.backend import NativeBackend
from lexmill.model.build import build_model
from lexmill.model.config import ModelConfig
from lexmill.tokenizer.tokenizer import Tokenizer

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 999}, "maxItems": 3},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes, " word | "no, " word "!"\nword ::= [a-z] [a-z] [a-z]?'


@pytest.fixture(scope="module")
def models(tokenizer):
    """A random model in torch, and in the engine with guesses ahead; both are the same model."""
    config = ModelConfig(
        vocab_size=512, width=32, layers=1, heads=2, kv_heads=2, head_width=16, mlp_width=48, context=400
    )
    network = randomise(build_model(config), deviation=0.3).eval()
    backend = NativeBackend(SlowEngine(network, noise=0), lambda own: np.zeros(0))
    return LanguageModel(network, tokenizer), LanguageModel(network, tokenizer, backend=lambda: backend)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_follows_its_schema(models, temperature):
    for seed in range(3):
        found = {
            model.generate("It is", max_tokens=300, temperature=temperature, seed=seed, json_schema=SCHEMA)
            for model in models
        }
        assert len(found) == 1  # guesses and masks together change nothing
        value = json.loads(found.pop())
        assert value.keys() == {"name", "ages", "kind"} and value["kind"] in ("cat", "dog")
        assert len(value["name"]) <= 12 and len(value["ages"]) <= 3
        assert all(isinstance(one, int) and one <= 999 for one in value["ages"])


def test_expressions_and_grammars_match_whole(models):
    for model in models:
        for seed in range(4):
            drawn = {"temperature": 2.0, "seed": seed, "max_tokens": 60}
            assert re.fullmatch(
                r"[0-9]{2}:[a-f]+ä?", model.generate("It", regex=r"[0-9]{2}:[a-f]{1,9}ä?", **drawn)
            )
            text = model.generate("It", grammar=GBNF, **drawn)
            assert re.fullmatch(r"(yes, [a-z]{2,3}|no, [a-z]{2,3}!)", text)
            lark = 'start: "a" start "b" | "c"'
            assert re.fullmatch("a*cb*", model.generate("It", grammar=lark, **drawn)[:60].replace("\n", ""))


def test_a_text_that_is_cut_off_is_a_beginning(models):
    config = generation_config(max_tokens=5, json_schema=SCHEMA)
    for model in models:
        steps = list(model.stream("It is", config))
        assert steps[-1].reason == "length"
        assert "".join(step.text for step in steps).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (("json_schema", "{"), "no JSON"),
        (("json_schema", "[1]"), "an object"),
        (("json_schema", '{"type": "objekt"}'), "objekt"),
        (("json_schema", '{"not": {"type": "string"}}'), "not"),  # it would be passed over
        (("json_schema", '{"type": "string", "format": "moon"}'), "moon"),
        (("regex", "(a"), "regex"),
        (("grammar", "start: missing"), "missing"),
        (("grammar", "root ::= missing"), "missing"),
    ],
)
def test_what_is_not_understood_is_refused(tokenizer, form, said):
    with pytest.raises(ConfigError, match=said):
        constrain(Form(*form), tokenizer)


def test_forms_are_asked_for_one_at_a_time():
    with pytest.raises(ConfigError, match="one form"):
        generation_config(regex="a", grammar="root ::= [a]")
    with pytest.raises(ConfigError, match="empty"):
        generation_config(regex=" ")


def test_a_token_that_is_not_allowed_never_slips_through(tokenizer):
    constraint = constrain(Form("regex", "(yes|no)"), tokenizer)
    wrong = tokenizer.encode("maybe")[0]
    assert not constraint.allowed(512)[wrong // 32] >> np.uint32(wrong % 32) & 1
    assert constraint.fitting([wrong]) == 0
    with pytest.raises(ModelError, match="cannot go on"):
        constraint.advance(wrong)
    with pytest.raises(ModelError, match="cannot go on"):  # and it stays closed
        constraint.allowed(512)


def test_rows_beyond_the_vocabulary_are_never_allowed(tokenizer):
    constraint = constrain(Form("regex", "(.|\n)*"), tokenizer)
    bits = np.unpackbits(constraint.allowed(1000).view(np.uint8), bitorder="little")
    assert bits[:512].sum() > 200 and not bits[512:].any()
    writing = Writing(tokenizer, [5], generation_config(regex="(yes|no)", max_tokens=9), 100)
    logits = np.zeros(600, np.float32)
    logits[590] = 9
    while not writing.ended:
        writing.take(logits)
    assert tokenizer.decode(writing.ids[1:]) in ("yes", "no")


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    from dataclasses import replace

    endless = Tokenizer(tokenizer.json, replace(tokenizer.ids, stop=()))
    with pytest.raises(ModelError, match="no token that ends"):
        constrain(Form("regex", "a"), endless)


def test_a_missing_package_is_said(tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Exception, match=r"lexmill\[constrain\]"):
        constrain(Form("regex", "a"), tokenizer)
