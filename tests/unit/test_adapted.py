"""Adapted layers of one input computed together: the same as one by one, values and gradients."""

import pytest
import torch
from conftest import randomise

import lexmill.model.adapted
import lexmill.model.attention
import lexmill.model.mlp
from lexmill.model.adapted import LoraLinear, adapted
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_loaded, build_model
from lexmill.model.config import ModelConfig
from lexmill.model.lora import add_adapter, begin_adapter, frozen_matrices, without_adapter
from lexmill.train.precision import autocast

SHAPE = {"vocab_size": 512, "width": 64, "layers": 2, "heads": 4, "head_width": 16, "context": 128}
LLAMA = ModelConfig(**SHAPE, kv_heads=2, mlp_width=96)
QWEN = ModelConfig(**SHAPE, kv_heads=4, mlp_width=96, qkv_bias=True)
TOKENS = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))


def learner(config, kept=False, **lora):
    """A frozen model with an adapter that already changes something; `kept` in bfloat16."""
    lora, model = LoraConfig(rank=4, **lora), randomise(build_model(config))
    if kept:
        model = build_loaded(config, model.weights(), frozen_matrices(lora, config))
    add_adapter(model, begin_adapter(model, lora, seed=0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def hidden_and_gradients(model, precision):
    with autocast(precision):
        hidden = model.hidden(TOKENS).float()
        loss = (hidden**2).mean() + 0.01 * hidden.sum()
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return hidden.detach(), gradients


def off_by(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "biases"])
@pytest.mark.parametrize(
    "lora", [{}, {"targets": ("q_proj", "v_proj", "up_proj", "down_proj")}], ids=["all", "some"]
)
@pytest.mark.parametrize("kept", [False, True], ids=["float32", "kept"])
def test_together_is_as_near_to_float32_as_one_by_one(config, lora, kept, monkeypatch):
    exact, exact_gradients = hidden_and_gradients(learner(config, **lora), "float32")
    model = learner(config, kept, **lora)
    found, gradients = hidden_and_gradients(model, "bfloat16")
    for place in (lexmill.model.adapted, lexmill.model.attention, lexmill.model.mlp):
        monkeypatch.setattr(place, "adapted", lambda *_: None)
    plain, plain_gradients = hidden_and_gradients(learner(config, **lora), "bfloat16")
    assert gradients.keys() == plain_gradients.keys() == exact_gradients.keys()
    assert off_by(found, exact) < max(1.2 * off_by(plain, exact), 0.03)
    assert all(one.dtype == torch.float32 for one in gradients.values())
    all_of = [
        torch.cat([one[name].flatten() for name in exact_gradients])
        for one in (gradients, plain_gradients, exact_gradients)
    ]
    # one draw of rounding against another, which vary by a factor of two; the test below is exact
    assert off_by(all_of[0], all_of[2]) < 2 * off_by(all_of[1], all_of[2])


def test_products_of_whole_numbers_are_exact():
    """In numbers that bfloat16 holds exactly, so that nothing but the formula can differ."""
    random = torch.Generator().manual_seed(0)
    layers = []
    for outputs, rank, scale in ((6, 2, 2.0), (4, 3, 0.5), (8, 1, 1.0)):
        base = lexmill.model.adapted.Linear(5, outputs, bias=True).requires_grad_(False)
        halves = [torch.nn.Parameter(torch.zeros(size)) for size in ((rank, 5), (outputs, rank))]
        with torch.no_grad():
            for one in (base.weight, base.bias, *halves):
                one.copy_(torch.randint(-2, 3, one.shape, generator=random))
        layers.append(LoraLinear(base, *halves, scale, 0.0))
    x = torch.randint(-2, 3, (2, 3, 5), generator=random).float().requires_grad_()
    with autocast("bfloat16"):
        joined, alone = adapted(x, layers[:2], layers[2:])
    (joined.float().sum() + 2 * alone.float().sum()).backward()
    found = [x.grad, *(half.grad for layer in layers for half in (layer.lora_a, layer.lora_b))]
    again = x.detach().requires_grad_()
    plain = [layer(again) for layer in layers]
    assert torch.equal(joined.float(), torch.cat(plain[:2], -1)) and torch.equal(alone.float(), plain[2])
    total = plain[0].sum() + plain[1].sum() + 2 * plain[2].sum()
    halves = [half for layer in layers for half in (layer.lora_a, layer.lora_b)]
    for one, other in zip(found, torch.autograd.grad(total, [again, *halves])):
        assert torch.equal(one, other)


def test_a_base_kept_in_16_bits_is_read_in_float32_too():
    model, rounded = learner(LLAMA, kept=True), learner(LLAMA)
    with torch.no_grad():
        for layer in rounded.modules():
            if isinstance(layer, LoraLinear):
                layer.base.weight.copy_(layer.base.weight.bfloat16())
        assert torch.equal(model.eval().hidden(TOKENS), rounded.eval().hidden(TOKENS))
        with without_adapter(model), without_adapter(rounded):
            assert torch.equal(model.hidden(TOKENS), rounded.hidden(TOKENS))
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)


def test_dropout_and_no_autocast_take_the_layers_one_by_one():
    model = learner(LLAMA, dropout=0.5)
    layer = model.decoder.blocks[0].mlp.up
    x = torch.randn(2, 64)
    with autocast("bfloat16"):
        assert adapted(x, [layer]) is None
        layer.eval()
        assert adapted(x, [layer]) is not None
    assert adapted(x, [layer]) is None


def test_what_lies_outside_of_blocks_stays_float32():
    """Those layers are multiplied as they lie, in float32 too: a head with the adapter off, a pooler."""
    config = ModelConfig(**SHAPE, kv_heads=2, mlp_width=96, tied=False)
    model = learner(config, kept=True, targets=("lm_head", "q_proj")).eval()
    assert model.head.base.weight.dtype == torch.float32
    assert model.decoder.blocks[0].attention.q.base.weight.dtype == torch.bfloat16
    with torch.no_grad(), without_adapter(model):
        assert torch.isfinite(model(TOKENS)).all()
