"""The hand-written steps of training on a CPU give what torch's plain operations give in float64."""

import pytest
import torch
import torch.nn.functional as F

from lexmill.model import norms
from lexmill.model.norms import RMSNorm
from lexmill.train.cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of three rows, so that every loop runs more than once and ends in a shorter one."""
    monkeypatch.setattr(norms, "_CACHED", 3 * 24)


def gradients(function, inputs, dtype):
    """The result and the gradients of a random direction, in float64."""
    inputs = [one.detach().to(dtype).clone().requires_grad_() for one in inputs]
    out = function(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.double() * direction.double()).sum().backward()
    return [out.detach().double(), *(one.grad.double() for one in inputs)]


def agree(found, expected, tolerance):
    return all(
        (one - other).abs().max() <= tolerance * other.abs().max() for one, other in zip(found, expected)
    )


def test_rms_norm():
    norm = RMSNorm(24, 1e-6)
    x, weight = 3 * torch.randn(4, 5, 24), torch.rand(24) + 0.5

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def plain(x, weight):
        return F.rms_norm(x, (24,), weight, 1e-6)

    expected = gradients(plain, (x, weight), torch.float64)
    found = gradients(ours, (x, weight), torch.float32)
    assert agree(found, expected, 1e-6)
    assert not torch.equal(found[0], found[0].roll(1, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x.requires_grad_(), weight).dtype == torch.bfloat16
        assert agree(gradients(ours, (x, weight), torch.float32), expected, 0.02)
        half = gradients(
            lambda x: ours(x, weight), (x,), torch.bfloat16
        )  # as norms of queries and keys get it
        assert agree(half, expected[:2], 0.03)
    with torch.no_grad():
        assert torch.allclose(ours(x, weight), plain(x, weight))


@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy_in_parts(monkeypatch, biased):
    from lexmill.train import cross_entropy

    monkeypatch.setattr(cross_entropy, "_ROWS", 7)
    monkeypatch.setattr(cross_entropy, "_CACHED", 50 * 3)
    monkeypatch.setattr(cross_entropy, "_FEWEST", 2)
    hidden, weight, bias = torch.randn(23, 16), torch.randn(50, 16), torch.randn(50)
    targets = torch.randint(0, 50, (23,))
    inputs = (hidden, weight, bias) if biased else (hidden, weight)

    def ours(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, targets, weight, bias)[0]

    def plain(hidden, weight, bias=None):
        return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")

    expected = gradients(plain, inputs, torch.float64)
    assert agree(gradients(ours, inputs, torch.float32), expected, 3e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agree(gradients(ours, inputs, torch.float32), expected, 0.03)
