"""How weights begin and how fast they move: heads that look nearby, gaps that are found, queries that stay."""

import pytest
import torch

from lexmill.model.beginning import rate_factor
from lexmill.model.build import build_model
from lexmill.model.scope import Record
from lexmill.pretrain.shape import ShapeConfig
from lexmill.train.optimizers import OptimizerSet

VOCABULARY = 500


def begun(family, **changes):
    shape = ShapeConfig(**{**dict(family=family, width=192, layers=2, heads=3, context=64), **changes})
    heads = {"mlm": True, "mlm_bias": True, "pooler": True, "nsp": True} if family == "bert" else {}
    model = build_model(shape.with_vocabulary(VOCABULARY, **heads)).eval()
    model.initialise(0)
    return model


def tokens(count=64):
    return torch.randint(10, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(0))


def share_within(weights, reach):
    """What each head spends on places at most `reach` away, on average."""
    place = torch.arange(weights.shape[-1])
    near = (place[:, None] - place[None]).abs() <= reach
    return (weights[0] * near).sum(-1).mean(-1)


def test_two_thirds_of_the_heads_of_learned_positions_begin_nearby():
    seen = Record()
    with torch.no_grad():
        begun("bert").hidden(tokens(), record=seen)
    near = share_within(seen.attention[0], 5)
    evenly = 11 / 64
    assert (near[:2] > 3 * evenly).all()
    assert near[2] < 1.5 * evenly


def test_heads_of_relative_positions_begin_behind_ahead_and_anywhere():
    seen = Record()
    with torch.no_grad():
        begun("t5").encode(tokens(), record=seen)
    behind = torch.ones(64, 64, dtype=torch.bool).tril(-1)
    weights = seen.attention[0][0]
    shares = (weights * behind).sum(-1)[:, 10:-10].mean(-1)
    assert shares[0] > 0.9 and shares[1] < 0.1 and 0.3 < shares[2] < 0.7
    assert (share_within(seen.attention[0], 3)[:2] > 0.8).all()


def test_what_is_written_begins_by_finding_itself_in_what_was_read():
    model, read = begun("t5"), tokens()
    seen = Record()
    with torch.no_grad():
        model.decode(read[:, 20:24], model.encode(read), record=seen)
    found = seen.cross[0][0, :, torch.arange(4), torch.arange(20, 24)]
    assert found.mean() > 0.5  # evenly it would be 1/64


@pytest.mark.parametrize("family, slow", [("llama", 1.0), ("t5", 64**-0.5)])
def test_queries_move_as_slowly_as_they_begin_small(family, slow):
    model = begun(family)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = OptimizerSet(
        model, kind="muon", learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizers.step(1.0)
    moved = {
        name: float((weight.detach() - before[name]).norm()) for name, weight in model.named_parameters()
    }
    for name in moved:
        if name.endswith(".q.weight"):
            assert rate_factor(name, model.config) == slow
            assert moved[name] == pytest.approx(slow * moved[name.replace(".q.", ".k.")], rel=0.1)


def test_heads_that_judge_texts_move_at_a_tenth_of_the_rate_and_not_by_muon():
    model = begun("bert")
    optimizers = OptimizerSet(
        model, kind="muon", learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizers.step(1.0)  # AdamW's first step moves each weight by its rate
    moved = {name: (weight.detach() - before[name]).abs().mean() for name, weight in model.named_parameters()}
    for name in ("pooler.weight", "pooler.bias", "nsp.weight", "nsp.bias"):
        assert float(moved[name]) == pytest.approx(1e-4, rel=0.01)
    assert float(moved["embed.weight"]) == pytest.approx(1e-3, rel=0.01)
    assert "mlm.dense.weight/momentum" in optimizers.state()
    assert "pooler.weight/momentum" not in optimizers.state()
