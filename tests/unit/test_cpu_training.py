"""The hand-written steps of training on a CPU give what torch's plain operations give in float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lexmill.model import kernels, mlp, norms
from lexmill.model.attend import attend
from lexmill.model.norms import RMSNorm
from lexmill.model.positions import rotary_table, rotate
from lexmill.model.scope import Scope
from lexmill.train.causal import counted
from lexmill.train.cross_entropy import linear_cross_entropy
from lexmill.train.examples import IGNORED


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


@pytest.mark.skipif(kernels.KERNELS is None, reason="the compiled steps were not built")
@pytest.mark.parametrize("name", sorted(kernels.ACTIVATIONS))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_activations(name, dtype, tolerance):
    gate, up = 3 * torch.randn(7, 1001), torch.randn(7, 1001)
    number, plain = kernels.ACTIVATIONS[name], mlp.ACTIVATIONS[name]
    found = gradients(
        lambda gate, up: mlp._Activated.apply(gate, up, kernels.KERNELS, number), (gate, up), dtype
    )
    assert agree(found, gradients(lambda gate, up: plain(gate) * up, (gate, up), torch.float64), tolerance)
    found = gradients(lambda gate: mlp._Activated.apply(gate, None, kernels.KERNELS, number), (gate,), dtype)
    assert agree(found, gradients(plain, (gate,), torch.float64), tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_in_blocks(causal, groups):
    q, k, v = (torch.randn(2, heads, 150, 16) for heads in (4, 4 // groups, 4 // groups))

    def ours(q, k, v):
        return attend(q, k, v, Scope(causal=causal), 0.25)

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.25, enable_gqa=True)

    expected = gradients(plain, (q, k, v), torch.float64)
    assert agree(gradients(ours, (q, k, v), torch.float32), expected, 3e-6)
    assert agree(gradients(ours, (q, k, v), torch.bfloat16), expected, 0.05)


def test_rotation_and_its_gradient():
    x, table = torch.randn(3, 11, 4, 16), rotary_table(torch.arange(11)[None], 16, 10000.0)

    def plain(x):
        cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in table)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    expected = gradients(plain, (x,), torch.float64)
    assert agree(gradients(lambda x: rotate(x, table), (x,), torch.float32), expected, 1e-6)
    assert agree(gradients(lambda x: rotate(x, table), (x,), torch.bfloat16), expected, 0.02)


@pytest.mark.skipif(kernels.KERNELS is None, reason="the compiled steps were not built")
@pytest.mark.parametrize("at_most", kernels.INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_instruction_set_and_number_of_threads(at_most, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        some = kernels.load(at_most)
        assert some is not None
        x, weight = torch.randn(301, 72), torch.rand(72)
        out, _ = some.rms_norm(x, weight, 1e-5, torch.float32)
        assert torch.allclose(out, F.rms_norm(x, (72,), weight, 1e-5), atol=1e-6)
        logits, targets = 9 * torch.randn(301, 1003), torch.randint(0, 1003, (301,))
        expected = F.cross_entropy(logits, targets, reduction="none")
        assert torch.allclose(some.cross_entropy(logits, targets, None), expected, atol=1e-5)
        assert logits.sum(-1).abs().max() < 1e-5
    finally:
        torch.set_num_threads(before)
        kernels.load()


@pytest.mark.skipif(kernels.KERNELS is None, reason="the compiled steps were not built")
def test_a_second_openmp_in_the_process_does_not_turn_them_off(tmp_path):
    """Other packages bring one along; the threads must be torch's all the same."""
    program = f"""
import ctypes, pathlib, shutil, torch
lines = open("/proc/self/maps").read().splitlines()
path = next(line.split()[-1] for line in lines if "omp.so" in line or "omp5.so" in line)
other = ctypes.CDLL(shutil.copy(path, {str(tmp_path / "libgomp-other.so")!r}))
from lexmill.model import kernels
assert kernels.KERNELS is not None
own = ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
assert kernels._openmp()[0] == own != ctypes.cast(other.GOMP_parallel, ctypes.c_void_p).value
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_seen(bad):
    hidden = torch.randn(5, 16)
    hidden[3, 2] = bad
    loss, _ = linear_cross_entropy(
        hidden.requires_grad_(), torch.tensor([1, 2, 3, 4, 5]), torch.randn(50, 16)
    )
    assert not torch.isfinite(loss)
    assert not torch.isfinite(RMSNorm(16, 1e-6)(hidden)[3]).all()


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


def test_ignored_targets_have_no_loss_and_no_gradient():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(20, 6), torch.randn(11, 6), torch.randn(11)
    targets = torch.randint(0, 11, (20,))
    some = targets.clone()
    some[[3, 4, 19]] = IGNORED
    places = some != IGNORED
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr("lexmill.train.cross_entropy.kernels_for", lambda tensor: None)
            found = []
            for states, wanted in ((hidden, some), (hidden[places], targets[places])):
                leaves = [part.clone().requires_grad_() for part in (states, weight, bias)]
                loss, _ = linear_cross_entropy(leaves[0], wanted, *leaves[1:])
                loss.backward()
                found.append((loss, *(leaf.grad for leaf in leaves)))
            (loss, to_hidden, *rest), (loss_of_kept, to_kept, *rest_of_kept) = found
            assert torch.allclose(loss, loss_of_kept)
            assert torch.allclose(to_hidden[places], to_kept, atol=1e-6)
            assert (to_hidden[~places] == 0).all()
            for one, other in zip(rest, rest_of_kept):
                assert torch.allclose(one, other, atol=1e-5)
    with torch.no_grad():
        total, right = linear_cross_entropy(hidden, some, weight, bias)
        expected, expected_right = linear_cross_entropy(hidden[places], targets[places], weight, bias)
    assert torch.allclose(total, expected) and right == expected_right


def test_few_different_numbers_of_places_occur():
    """Each number of rows of a product is compiled anew, and an encoder's batches have any number."""
    sizes = set()
    for count in range(1, 1025):
        targets = torch.full((4, 256), IGNORED)
        targets.view(-1)[torch.randperm(1024)[:count]] = 7
        hidden = torch.arange(1024.0).view(4, 256, 1)
        states, found = counted(hidden, targets)
        assert len(states) == len(found) and (found != IGNORED).sum() == count
        assert count <= len(found) <= count * 9 / 8 + 1
        kept = states[found != IGNORED, 0].long()
        assert (kept == (targets.view(-1) != IGNORED).nonzero()[:, 0]).all()
        sizes.add(len(found))
    assert len(sizes) <= 8 + 8 * 7
