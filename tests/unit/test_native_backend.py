"""A model in the engine answers like one in torch: texts, beams, logits, heads. On the slow engine and the real one."""

import functools

import numpy as np
import pytest
from made_models import model_maker
from slow_engine import SlowEngine

from lexmill.errors import ModelError
from lexmill.inference.language_model import LanguageModel, generation_config
from lexmill.inference.native.backend import NativeBackend
from lexmill.inference.native.engine import NativeEngine
from lexmill.inference.native.library import available
from lexmill.inference.native.sources import DirectorySource
from lexmill.inference.together import write_ids
from lexmill.model.load import load_model

SHAPE = {
    "vocab_size": 512,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 8,
    "mlp_width": 48,
    "context": 300,
}
KINDS = {
    "decoder": ("bpe", {"kv_heads": 2}),
    "bert": (
        "wordpiece",
        {
            "shape": "encoder", "positions": "learned", "norm": "layer", "norm_bias": True, "post_norm": True,
            "embed_norm": True, "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
            "activation": "gelu", "segments": 2, "norm_eps": 1e-12, "mlm": True, "mlm_bias": True, "nsp": True, "pooler": True,
        },
    ),
    "t5": (
        "unigram",
        {
            "shape": "encoder_decoder", "positions": "relative", "scale_scores": False, "activation": "gelu_tanh",
            "norm_eps": 1e-6, "decoder_layers": 2,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("models"), prose, SHAPE, KINDS)


@pytest.fixture(scope="module", params=["slow", "native"])
def both(made, request):
    """The model of a name in torch, and in an engine: the slow one without noise, as only answers matter here."""
    if request.param == "native" and not available():
        pytest.skip("the engine is not built here")

    @functools.cache
    def get(name):
        directory = made(name)
        network = load_model(directory)
        engine = SlowEngine(network, 64, noise=0)
        if request.param == "native":
            engine = NativeEngine.open(DirectorySource(directory), threads=1, pages=64, keep=False)
        backend = NativeBackend(engine, directory.weight)
        torch = LanguageModel(network, directory.tokenizer, directory.path)
        return torch, LanguageModel(network, directory.tokenizer, directory.path, backend=lambda: backend)

    return get


def whole(model):
    """All pages are free, and nothing is remembered."""
    backend = model.backend
    kept = getattr(backend.engine, "read", None) or getattr(backend.engine, "_memory", None)
    return backend.scheduler.store.available == backend.engine.pages and not kept


@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_texts_and_beams_are_the_same(both, name):
    torch, native = both(name)
    for text in ("She was", "It is a truth that a man of no small fortune " * 4):
        assert native.generate(text, max_tokens=30) == torch.generate(text, max_tokens=30)
        drawn = {"max_tokens": 20, "temperature": 0.9, "seed": 3}
        assert native.generate(text, **drawn) == torch.generate(text, **drawn)
        ids = torch.tokenizer.encode(text)
        for beams in (1, 3):
            expected = torch.beam_ids(ids, beams=beams, max_tokens=40)
            found = native.beam_ids(ids, beams=beams, max_tokens=40)
            assert [one.ids for one in found] == [one.ids for one in expected]
            assert [one.logprob for one in found] == pytest.approx(
                [one.logprob for one in expected], abs=1e-4
            )
    assert whole(native)


@pytest.mark.parametrize("name", ["decoder", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_many_texts_are_the_same(both, name, beams):
    torch, native = both(name)
    prompts = [torch.tokenizer.encode("and " * size + "the house") for size in (1, 40, 7, 120)]
    counted = []
    options = {"beams": beams, "max_tokens": 25}
    assert write_ids(native, prompts, done=counted.append, **options) == write_ids(torch, prompts, **options)
    assert sum(counted) == len(prompts)
    assert whole(native)


def test_logits_are_the_same(both):
    for name in ("decoder", "bert"):
        torch, native = both(name)
        ids = torch.tokenizer.encode("It is a truth universally acknowledged " * 20)[:290]
        assert len(ids) > 256 or name == "bert"
        assert native.logits(ids) == pytest.approx(torch.logits(ids), abs=1e-4)
    torch, native = both("t5")
    ids = torch.tokenizer.encode("She was not")
    assert native.logits(ids, [0, 5, 6, 7]) == pytest.approx(torch.logits(ids, [0, 5, 6, 7]), abs=1e-4)
    assert whole(native)


def test_encoders_embed_fill_and_judge_pairs_the_same(both):
    torch, native = both("bert")
    texts = ["She was here.", "A house of no small size, and a man."]
    for pooling in ("mean", "cls", "max"):
        assert native.embed(texts, pooling=pooling) == pytest.approx(
            torch.embed(texts, pooling=pooling), abs=1e-5
        )
    ours, theirs = native.fill_mask("She [MASK] here."), torch.fill_mask("She [MASK] here.")
    assert [one.token for one in ours] == [one.token for one in theirs]
    assert native.next_sentence(*texts) == pytest.approx(torch.next_sentence(*texts), abs=1e-5)
    torch, native = both("t5")
    assert native.embed(texts) == pytest.approx(torch.embed(texts), abs=1e-5)


def test_what_is_left_unread_gives_back_its_pages(both):
    _, native = both("decoder")
    stream = native.stream("It is", generation_config(max_tokens=50))
    next(stream)
    assert not whole(native)
    stream.close()
    assert whole(native)


def test_what_does_not_fit_is_said(both):
    _, native = both("decoder")
    ids = native.tokenizer.encode("the " * 200)[:200]
    with pytest.raises(ModelError, match="no room"):
        native.beam_ids(ids, beams=400, max_tokens=80)
    assert whole(native)


def test_heads_of_tasks_are_the_same(tmp_path, made):
    from dataclasses import replace

    from conftest import randomise

    from lexmill.model.build import build_model
    from lexmill.model.directory import write_model_directory

    plain = made("bert")
    modern = {
        "positions": "rotary", "post_norm": False, "gated": True, "qkv_bias": False, "out_bias": False,
        "mlp_bias": False, "segments": 0, "norm_bias": False, "local_window": 8, "pooler": False, "mlm_bias": False,
        "local_theta": 10000.0,
    }  # fmt: skip
    bare = replace(plain.config, mlm=False, nsp=False, mlm_bias=False)
    for number, config in enumerate(
        [
            replace(bare, labels=("a", "b", "c")),
            replace(bare, pooler=False, span=True),
            replace(bare, **modern, labels=("a", "b"), label_pooling="mean"),
            replace(bare, **modern, span=True),
        ]
    ):
        weights = randomise(build_model(config)).weights()
        directory = write_model_directory(tmp_path / str(number), config, weights, plain.tokenizer)
        network = load_model(directory)
        backend = NativeBackend(SlowEngine(network), directory.weight)
        torch = LanguageModel(network, directory.tokenizer)
        native = LanguageModel(network, directory.tokenizer, backend=lambda one=backend: one)
        pairs = [("Who was here?", "She was here, and nobody else."), ("It is", "a truth")]
        if config.span:
            ours, theirs = native.answers(pairs), torch.answers(pairs)
            assert [one.candidate for one in ours] == [one.candidate for one in theirs]
            assert [one.null_score for one in ours] == pytest.approx(
                [one.null_score for one in theirs], abs=1e-4
            )
        else:
            assert native.label_logits(pairs) == pytest.approx(torch.label_logits(pairs), abs=1e-4)
            assert np.ptp(torch.label_logits(pairs)) > 1e-3


def test_a_small_model_guesses_and_must_have_the_same_tokenizer(made, tmp_path):
    import lexmill
    from lexmill.errors import ConfigError

    if not available():
        pytest.skip("the engine is not built here")
    path = made("decoder").path
    model, with_draft = lexmill.load(path, backend="native"), lexmill.load(path, draft=path)
    assert with_draft.generate("She was", max_tokens=40) == model.generate("She was", max_tokens=40)
    for one in (model, with_draft):
        one.close()
    with pytest.raises(ConfigError, match="guesses"):
        lexmill.load(path, draft=path, backend="torch")
    with pytest.raises(ConfigError, match="Decoders"):
        lexmill.load(path, draft=made("t5").path).generate("She was")
    with pytest.raises(ConfigError, match="does not run"):
        lexmill.load(path, backend="native", quantise="q8_0")
