"""Generation: sampling filters, stop strings, streaming, and the Python API that others rely on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lexmill
from lexmill.errors import ConfigError, DataError, FileError, FormatError, LexmillError, ModelError
from lexmill.inference.generation import _StopStrings
from lexmill.inference.sampling import SamplingConfig, choose, distribution, log_softmax, penalise


@pytest.fixture(scope="module")
def model(model_path):
    return lexmill.load(model_path)


def test_filters_keep_what_they_should():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))

    def keep(**options):
        return list(np.flatnonzero(distribution(logits, SamplingConfig(temperature=1, **options))))

    assert keep() == [0, 1, 2, 3]
    assert keep(top_k=2) == [0, 1]
    assert keep(top_p=0.5) == [0]
    assert keep(top_p=0.6) == [0, 1]
    assert keep(min_p=0.3) == [0, 1, 2]
    assert keep(top_k=3, top_p=0.99, min_p=0.5) == [0, 1]
    assert distribution(logits, SamplingConfig(temperature=1)) == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert distribution(logits, SamplingConfig(temperature=0))[0] == 1
    assert distribution(logits, SamplingConfig(temperature=1e-300))[0] == 1


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=30),
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_a_distribution_is_one(logits, temperature, top_k, top_p, min_p):
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = distribution(np.array(logits, np.float32), config)
    assert probabilities.sum() == pytest.approx(1)
    assert (probabilities >= 0).all()


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.6, 0.3, 0.1]))
    random = np.random.default_rng(0)
    draws = [choose(logits, [], SamplingConfig(temperature=1), random).token for _ in range(4000)]
    assert np.bincount(draws) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_penalties_know_what_was_said_and_what_was_written():
    logits, seen = np.array([2.0, -2.0, 1.0, 0.5], np.float32), [0, 1, 3, 3]

    def after(**options):
        return penalise(logits, seen, 2, SamplingConfig(**options)).tolist()

    assert after(repetition_penalty=2.0) == [1.0, -4.0, 1.0, 0.25]
    assert after(presence_penalty=1.0) == [2.0, -2.0, 1.0, -0.5]
    assert after(frequency_penalty=1.0) == [2.0, -2.0, 1.0, -1.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"frequency_penalty": float("nan")},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cut=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_are_found_however_the_text_arrives(text, stops, cut):
    held, shown, stopped, place = _StopStrings(stops), "", False, 0
    while place < len(text) and not stopped:
        size = cut.draw(st.integers(1, 4))
        piece, stopped = held.push(text[place : place + size])
        shown, place = shown + piece, place + size
    if not stopped:
        shown += held.rest()
    found = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(found)
    if not found:
        assert shown == text
    else:
        # pieces may complete two stop strings at once: nothing behind the first may ever be shown
        assert text.startswith(shown) and not any(stop in shown for stop in stops)


def test_logits_and_greedy_agree(model):
    ids = model.tokenizer.encode("She was")
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.vocab_size)
    assert logits.dtype == np.float32
    expected = list(ids)
    for _ in range(20):
        following = int(model.logits(expected)[-1].argmax())
        if following in model.tokenizer.ids.stop:
            break
        expected.append(following)
    assert model.generate_ids(ids, max_tokens=20) == expected[len(ids) :]


def test_generation_is_repeatable_and_obeys_its_limits(model):
    first = model.generate("It is", max_tokens=12, temperature=1.0, seed=5)
    assert first == model.generate("It is", max_tokens=12, temperature=1.0, seed=5)
    assert first != model.generate("It is", max_tokens=12, temperature=1.0, seed=6)
    assert model.generate("It is", max_tokens=0) == ""
    assert isinstance(model.generate("", max_tokens=3), str)
    text = model.generate("It is", max_tokens=30)
    assert len(text) > 4
    assert model.generate("It is", max_tokens=30, stop=text[3:5]) == text[: text.find(text[3:5])]
    assert isinstance(model.chat([{"role": "user", "content": "Hi"}], max_tokens=5), str)


def test_logprobs_tell_the_distribution(model):
    from lexmill.inference.language_model import generation_config

    ids = model.tokenizer.encode("It is")
    step = next(model.stream_ids(ids, generation_config(max_tokens=1, logprobs=4)))
    expected = log_softmax(model.logits(ids)[-1])
    assert step.logprob == pytest.approx(expected.max(), abs=1e-5)
    assert [rival.token for rival in step.rivals] == list(np.argsort(-expected)[:4])


def test_the_context_is_a_limit(model):
    full = [5] * model.config.context
    assert len(model.generate_ids(full[:-3], max_tokens=100)) <= 3
    with pytest.raises(ModelError, match="context is 128"):
        model.generate_ids(full)
    with pytest.raises(ModelError, match="do not fit"):
        model.logits([*full, 5])
    with pytest.raises(DataError, match="outside the vocabulary"):
        model.logits([100_000])
    with pytest.raises(DataError, match="no token ids"):
        model.logits([])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_incomplete_model_directories_are_said_clearly(model_path, tmp_path, name, damage):
    import shutil

    broken = tmp_path / "model"
    shutil.copytree(model_path, broken)
    data = (broken / name).read_bytes()
    if damage == "missing":
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(LexmillError) as caught:
        lexmill.load(broken)
    assert isinstance(caught.value, (FileError, FormatError, ModelError))
    assert name in str(caught.value) or name == "config.json"


def test_unsupported_models_are_refused(model_path, tmp_path):
    import json
    import shutil

    shutil.copytree(model_path, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change, said in (
        ({"model_type": "mamba"}, "not supported"),
        ({"hidden_act": "relu"}, "activation"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"hidden_size": 32}, "shape"),
        ({"vocab_size": "many"}, "should be of type int"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=said):
            lexmill.load(tmp_path / "m")
