"""The decoder against transformers' Llama, Qwen2 and Qwen3: logits and gradients, on random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lexmill.model.cache import Cache
from lexmill.model.config import ModelConfig
from lexmill.model.decoder import Decoder
from lexmill.model.names import weight_names, weight_shapes
from lexmill.model.positions import rotary_table
from lexmill.model.rope_scaling import RopeScaling

transformers = pytest.importorskip("transformers")

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context=64)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=32)
BASE = dict(
    vocab_size=331,
    width=64,
    layers=3,
    heads=4,
    kv_heads=4,
    head_width=16,
    mlp_width=96,
    context=128,
    norm_eps=1e-5,
)
SHAPES = {
    "plain": {},
    "untied": {"tied": False},
    "grouped": {"kv_heads": 2},
    "one kv head, theta": {"kv_heads": 1, "rope_theta": 500000.0},
    "wide heads": {"head_width": 32, "tied": False, "norm_eps": 1e-6},
    "qwen2": {"qkv_bias": True, "kv_heads": 2},
    "qwen3": {"qk_norm": True, "kv_heads": 2, "head_width": 32},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=3.0)},
    "llama3": {"rope_scaling": LLAMA3, "head_width": 32, "rope_theta": 500000.0},
    "yarn": {"rope_scaling": YARN, "head_width": 32, "qkv_bias": True},
    "yarn, own": {
        "rope_scaling": replace(YARN, attention=0.7, beta_fast=4.0, beta_slow=0.5),
        "qk_norm": True,
    },
}


def pair(**changes):
    """Our decoder and transformers' model with the same random weights."""
    config = ModelConfig(**{**BASE, **changes})
    ours = Decoder(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else noise / 8)
    values = config.to_huggingface()
    kind = transformers.AutoConfig.for_model(**{k: v for k, v in values.items() if k != "architectures"})
    kind._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(kind).float().eval()
    state = {name.huggingface: torch.from_numpy(ours.weights()[name.own]) for name in weight_names(config)}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return config, ours, theirs


@pytest.mark.parametrize("name", ["plain", "linear", "llama3", "yarn", "yarn, own"])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_rotary_tables_are_transformers_bit_for_bit(name, width):
    """At every position up to 131,072, as far as float32 reaches."""
    scaling = SHAPES[name].get("rope_scaling")
    if scaling and scaling.original_context:
        scaling = replace(scaling, original_context=8192)
    config = ModelConfig(
        **{**BASE, "head_width": width, "rope_scaling": scaling, "context": 131072, "rope_theta": 5e5}
    )
    kind = transformers.LlamaConfig(**{k: v for k, v in config.to_huggingface().items() if k != "model_type"})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(kind)
    positions = torch.tensor([[0, 1, 2, 77, 8191, 8192, 30_001, 131_071]])
    cos, sin = theirs(torch.zeros(1), positions)
    ours = rotary_table(positions, width, config.rope_theta, scaling)
    assert torch.equal(ours[0], cos[..., : width // 2]) and torch.equal(ours[1], sin[..., : width // 2])
    assert ModelConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_equal_transformers(changes):
    config, ours, theirs = pair(**changes)
    tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    mine, reference = ours(tokens), theirs(tokens).logits
    assert (mine - reference).abs().max() < 1e-5
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2)) / 100
    (mine * weight).sum().backward()
    (reference * weight).sum().backward()
    gradients = dict(theirs.named_parameters())
    parameters = dict(ours.named_parameters())
    for name in weight_names(config):
        expected = gradients[name.huggingface].grad
        assert (parameters[name.own].grad - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), (
            name.own
        )


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_weight_tables_are_total_and_one_to_one(changes):
    config, ours, theirs = pair(**changes)
    names = weight_names(config)
    own = dict(ours.named_parameters())
    assert {name.own for name in names} == set(own)
    theirs_names = {name for name, _ in theirs.named_parameters()}
    assert {name.huggingface for name in names} == theirs_names
    assert len({name.gguf for name in names}) == len(names)
    assert weight_shapes(config) == {name: tuple(weight.shape) for name, weight in own.items()}
    assert config.parameters == sum(weight.numel() for weight in own.values())


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_cached_decoding_equals_recomputation_for_left_padded_batches(changes):
    config, ours, _ = pair(**changes)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, config.vocab_size, (length,), generator=generator) for length in (3, 17, 30)]
    longest = max(len(row) for row in rows)
    padding = torch.tensor([longest - len(row) for row in rows])
    batch = torch.stack(
        [torch.cat([torch.zeros(int(pad), dtype=torch.long), row]) for pad, row in zip(padding, rows)]
    )
    cache = Cache(config, rows=3, padding=padding)
    with torch.no_grad():
        logits = ours(batch, cache=cache)[:, -1]
        for _ in range(20):
            for index, row in enumerate(rows):
                alone = ours(row[None])[0, -1]
                assert (logits[index] - alone).abs().max() < 1e-5
                assert logits[index].argmax() == alone.argmax()
            following = logits.argmax(-1)
            rows = [torch.cat([row, token[None]]) for row, token in zip(rows, following)]
            logits = ours(following[:, None], cache=cache)[:, -1]


def test_huggingface_config_round_trip():
    for changes in SHAPES.values():
        config = ModelConfig(**{**BASE, **changes})
        assert ModelConfig.from_huggingface(config.to_huggingface()) == config


def test_initialise_is_the_same_for_the_same_seed():
    config = ModelConfig(**BASE)
    first, second, third = Decoder(config), Decoder(config), Decoder(config)
    first.initialise(1), second.initialise(1), third.initialise(2)
    assert all(np.array_equal(first.weights()[name], second.weights()[name]) for name in first.weights())
    assert not np.array_equal(first.weights()["embed.weight"], third.weights()["embed.weight"])
