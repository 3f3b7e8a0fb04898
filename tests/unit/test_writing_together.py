"""Many texts written side by side: each comes out as it would alone."""

import numpy as np
import pytest
from conftest import randomise

from lexmill.errors import DataError, ModelError
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.together import group_texts, write_ids
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_loaded, build_model
from lexmill.model.config import ModelConfig
from lexmill.model.lora import add_adapter, begin_adapter

SHAPE = {
    "vocab_size": 500,
    "width": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 12,
    "mlp_width": 64,
    "context": 64,
}
T5 = {"family": "t5", "decoder_layers": 2, "kv_heads": 4, "positions": "relative", "relative_buckets": 8}
KINDS = {
    "llama": ("bpe", {}),
    "qwen3": ("bpe", {"family": "qwen3", "qk_norm": True}),
    "t5": ("unigram", {"family": "t5"}),
}


def prompts(count, seed=3, longest=40):
    random = np.random.default_rng(seed)
    return [random.integers(5, 400, int(random.integers(1, longest))).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    from lexmill.pretrain.shape import ShapeConfig
    from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

    made = {}

    def get(name):
        if name not in made:
            kind = "unigram" if name == "t5" else "bpe"
            options = {"sentinels": 10} if name == "t5" else {}
            tokenizer = train_tokenizer(
                [prose[:60_000]], TokenizerConfig(kind=kind, vocab_size=400, **options)
            )
            shape = ShapeConfig(family=name, width=48, layers=2, heads=4, context=64)
            network = randomise(build_model(shape.with_vocabulary(400)), deviation=0.25)
            made[name] = LanguageModel(network.eval(), tokenizer)
        return made[name]

    return get


def stop_often(model, ids, monkeypatch):
    """Let some ids that the model likes end a text, so that texts end at different places."""
    from dataclasses import replace

    monkeypatch.setattr(model.tokenizer, "ids", replace(model.tokenizer.ids, stop=tuple(ids)))


@pytest.mark.parametrize("family", ["llama", "qwen3", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_text_is_what_it_would_be_alone(models, family, beams, monkeypatch):
    model = models(family)
    asked = prompts(17)
    free = write_ids(model, asked, max_tokens=20)
    often = {ids[8] for ids in free[:6] if len(ids) > 8}
    stop_often(model, often, monkeypatch)
    together = write_ids(model, asked, beams=beams, max_tokens=20)
    if beams == 1:
        alone = [model.generate_ids(ids, max_tokens=20) for ids in asked]
    else:
        alone = [list(model.beam_ids(ids, beams=beams, max_tokens=20)[0].ids) for ids in asked]
    assert together == alone
    assert len({len(ids) for ids in together}) > 3, "texts end at different places"


def test_an_adapter_writes_together_too(models):
    base = models("t5")
    network = build_loaded(base.config, base.network.weights())
    adapter = begin_adapter(network, LoraConfig(rank=4), seed=0)
    random = np.random.default_rng(0)
    for change in adapter.changes.values():
        change.b[:] = random.normal(0, 0.3, change.b.shape)
    add_adapter(network, adapter)
    model = LanguageModel(network.eval(), base.tokenizer)
    asked = prompts(9)
    found = write_ids(model, asked, max_tokens=16)
    assert found == [model.generate_ids(ids, max_tokens=16) for ids in asked]
    assert found != write_ids(base, asked, max_tokens=16)


def test_a_full_context_ends_each_text_where_it_would_alone(models):
    model = models("llama")
    asked = prompts(12, longest=63)
    found = write_ids(model, asked, max_tokens=200)
    assert found == [model.generate_ids(ids, max_tokens=200) for ids in asked]
    assert max(len(a) + len(b) for a, b in zip(asked, found)) == 64


def test_groups_hold_each_text_once_and_fit_memory(models):
    shape = models("llama").config
    lengths = [len(ids) for ids in prompts(300)]
    groups = list(group_texts(lengths, shape, beams=4, max_tokens=8))
    assert sorted(text for group in groups for text in group) == list(range(300))
    assert max(map(len, groups)) == 16
    large = ModelConfig(
        vocab_size=500,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        mlp_width=64,
        context=4096,
    )
    assert all(len(group) == 1 for group in group_texts([3000] * 3, large, beams=1, max_tokens=99))


def test_what_cannot_be_written_is_refused(models):
    with pytest.raises(DataError, match="Prompt 2 has no tokens"):
        write_ids(models("llama"), [[5], []])
    with pytest.raises(ModelError, match="Prompt 1 has 64 tokens"):
        write_ids(models("llama"), [[5] * 64])
    assert write_ids(models("t5"), [[5] * 90], max_tokens=3)  # relative positions know no end
    assert write_ids(models("llama"), []) == []
    assert write_ids(models("llama"), [[5]], max_tokens=0) == [[]]
