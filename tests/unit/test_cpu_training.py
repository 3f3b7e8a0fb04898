"""The hand-written steps of training on a CPU give what torch's plain operations give in float64."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lexmill.model import kernels, mlp, norms
from lexmill.model.attend import attend, attend_joined
from lexmill.model.build import build_model
from lexmill.model.linear import linear
from lexmill.model.norms import RMSNorm, add_norm
from lexmill.model.positions import rotary_table, rotate
from lexmill.model.scope import Record, Scope
from lexmill.pretrain.shape import ShapeConfig
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


class Normed(torch.nn.Module):
    """`add_norm` on leaves: the stream and the normed sum, side by side."""

    def __init__(self, kind, post, biased):
        super().__init__()
        self.norm = RMSNorm(24, 1e-6) if kind == "rms" else torch.nn.LayerNorm(24, 1e-6, bias=biased)
        self.post = post

    def forward(self, x, branch):
        return torch.cat(add_norm(self.norm, x, branch, post=self.post), -1)

    def on_leaves(self, x, branch, weight, bias=None):
        values = {"norm.weight": weight} | ({} if bias is None else {"norm.bias": bias})
        return torch.func.functional_call(self, values, (x, branch))


@pytest.mark.parametrize("kind, biased", [("rms", False), ("layer", False), ("layer", True)])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_branch_is_added_and_the_sum_normed(kind, biased, post, half):
    both = Normed(kind, post, biased)
    x, branch = 3 * torch.randn(4, 5, 24) + 1, torch.randn(4, 5, 24).bfloat16().float()
    leaves = [x, branch, torch.rand(24) + 0.5, *([torch.randn(24)] if biased else [])]
    expected = gradients(both.on_leaves, leaves, torch.float64)  # the kernels do not take float64
    if half:
        with torch.autocast("cpu", dtype=torch.bfloat16):

            def mixed(x, branch, *rest):
                return both.on_leaves(x, branch.bfloat16(), *rest)

            found = gradients(mixed, leaves, torch.float32)
            stream, normed = add_norm(both.norm, x.requires_grad_(), branch.bfloat16(), post=post)
        assert normed.dtype == (torch.bfloat16 if kernels.KERNELS or kind == "rms" else torch.float32)
        if kernels.KERNELS or not (post and kind == "rms"):  # no family has that, and torch's rounds
            assert stream.dtype == torch.float32
            assert agree([found[0][..., :24]], [expected[0][..., :24]], 1e-6), "the stream is not rounded"
    else:
        found = gradients(both.on_leaves, leaves, torch.float32)
    assert agree(found, expected, 0.02 if half else 2e-6)


def test_results_that_nobody_uses_have_no_gradient():
    """The last norm's sum; the copy for products behind an encoder's last block; a sum alone."""
    x, branch, direction = torch.randn(7, 24), torch.randn(7, 24).bfloat16(), torch.randn(7, 24)
    for kind, post, used in itertools.product(("rms", "layer"), (False, True), (0, 1)):
        norm = Normed(kind, post, True).norm
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [part.detach().to(dtype).clone().requires_grad_() for part in (x, branch.float())]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                out = add_norm(norm.to(dtype), *leaves, post=post)[used]
            (out.double() * direction).sum().backward()
            found.append([leaf.grad.double() for leaf in leaves])
        assert agree(*found, 0.03)


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert", "t5"])
def test_models_learn_the_same_without_compiled_steps(family, monkeypatch):
    """Through blocks of every kind, their records included; in float32."""
    heads = {"mlm": True} if family in ("bert", "modernbert") else {}
    shape = ShapeConfig(family=family, width=32, layers=3, heads=2, context=16)
    model = build_model(shape.with_vocabulary(50, **heads))
    model.initialise(0)
    tokens, found = torch.randint(0, 50, (2, 16)), []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(kernels, "KERNELS", None)
        model.zero_grad()
        record = Record()
        if family == "t5":
            memory = model.encode(tokens, record=record)
            out = model.decode(tokens, memory, record=record)
        else:
            out = model.hidden(tokens, record=record)
        (out.square().sum() + sum(hidden.sum() for hidden in record.hidden)).backward()
        grads = [value.grad.flatten() for value in model.parameters() if value.grad is not None]
        found.append([out.detach(), *(hidden.detach() for hidden in record.hidden), torch.cat(grads)])
    assert len(found[0]) == len(found[1]) >= 5
    assert agree(*found, 1e-5)


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


@pytest.mark.parametrize("at_most", ["avx512_bf16", "amx"])
@pytest.mark.parametrize("sees", ["all", "causal", "documents"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "heads", "kv_heads"),
    [(64, 64, 64, 2, 2), (70, 70, 24, 4, 2), (33, 65, 40, 2, 1), (5, 3, 2, 1, 1), (32, 200, 136, 1, 1)],
)
def test_compiled_attention(at_most, sees, biased, queries, keys, width, heads, kv_heads):
    torch.manual_seed(queries)
    some, before = kernels.load(at_most), torch.get_num_threads()
    try:
        if some is None or some.instruction_set != at_most:
            pytest.skip(f"this machine has no {at_most}")
        if sees == "causal" and queries > keys:
            pytest.skip("the first queries would see nothing")
        # heads behind each other, or side by side as a projection leaves them
        q = torch.randn(2, queries, heads, width).bfloat16().transpose(1, 2)
        k, v = (torch.randn(2, kv_heads, keys, width).bfloat16() for _ in range(2))
        mask = None
        if sees == "documents":
            document = torch.arange(max(queries, keys)) // 11
            mask = (document[None, None, :keys] == document[None, :queries, None]).expand(2, 1, queries, keys)
            mask = mask | (torch.arange(keys) == 0)  # each sees something
        bias = torch.randn(1, heads, queries, keys) if biased else None
        scope = Scope(mask, sees == "causal", bias=bias)

        def ours(q, k, v, *bias):
            scope = Scope(mask, sees == "causal", bias=bias[0].float() if bias else None)
            found = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), scope, width**-0.5)
            assert "_Compiled" in type(found.grad_fn).__name__
            return found

        def plain(q, k, v, *bias):
            k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
            scores = q @ k.mT * width**-0.5 + (bias[0] if bias else 0)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            elif scope.causal:
                seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
                scores = scores.masked_fill(~seen, -torch.inf)
            return scores.softmax(-1) @ v

        inputs = (q, k, v) if bias is None else (q, k, v, bias)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lexmill.model.attend.kernels_for", lambda tensor: some)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found = gradients(ours, inputs, torch.float32)
                assert agree(found, gradients(plain, inputs, torch.float64), 0.02)
    finally:
        kernels.load()
        torch.set_num_threads(before)


@pytest.mark.skipif(
    kernels.KERNELS is None or not kernels.KERNELS.attends, reason="this machine has no compiled attention"
)
def test_compiled_attention_keeps_what_torch_can_take_away():
    """All that it keeps passes through torch's hooks, by which checkpointing lets go of it."""
    q, k, v = (torch.randn(1, 2, 40, 32).bfloat16().requires_grad_() for _ in range(3))
    mask, bias = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(), torch.randn(1, 2, 40, 40)
    kept = []

    def moved(tensor):  # elsewhere in memory, as after computing it again
        kept.append(tensor)
        return tensor.clone(memory_format=torch.preserve_format)

    with torch.autograd.graph.saved_tensors_hooks(moved, lambda tensor: tensor):
        out = attend(q, k, v, Scope(mask, bias=bias), 0.2)
    assert len(kept) == 7
    twice = []
    for _ in range(2):  # the graph may be kept
        twice.append(torch.autograd.grad(out.float().square().sum(), (q, k, v), retain_graph=True))
    assert all(torch.equal(one, other) for one, other in zip(*twice))


@pytest.mark.parametrize("sees", ["all", "causal", "documents"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("time", "width", "heads", "kv_heads"), [(64, 64, 2, 2), (33, 24, 4, 2), (5, 2, 1, 1)]
)
def test_attention_of_what_lies_side_by_side(sees, turned, biased, time, width, heads, kv_heads):
    """The same bits as in parts, and gradients in one tensor."""
    if kernels.KERNELS is None or not kernels.KERNELS.attends:
        pytest.skip("this machine has no compiled attention")
    torch.manual_seed(time)
    start = torch.randn(2, time, (heads + 2 * kv_heads) * width).bfloat16()
    table = rotary_table(torch.arange(time)[None], width, 100.0) if turned else None
    document = torch.arange(time) // 7
    mask = (document[:, None] == document[None, :])[None, None] if sees == "documents" else None
    down = torch.randn(2, time, heads * width).bfloat16()
    found = []
    for whole in (True, False):
        leaf = start.clone().requires_grad_()
        bias = torch.randn(1, heads, time, time, generator=torch.Generator().manual_seed(0))
        scope = Scope(mask, sees == "causal", table, bias.requires_grad_() if biased else None)
        joined = leaf * 1
        if whole:
            out = attend_joined(joined, (heads, kv_heads), scope, 0.3)
        else:
            q, k, v = joined.unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
            if turned:
                q, k = rotate(q, table), rotate(k, table)
            out = attend(*(part.transpose(1, 2) for part in (q, k, v)), scope, 0.3).transpose(1, 2).flatten(2)
        out.backward(down)
        found.append([out.detach(), leaf.grad, *([bias.grad] if biased else [])])
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert attend_joined(start, (heads, kv_heads), scope, 0.3) is None  # no gradient is wanted
    assert attend_joined(start.float().requires_grad_() * 1, (heads, kv_heads), scope, 0.3) is None


@pytest.fixture
def tiles():
    """Compiled steps with AMX."""
    some = kernels.KERNELS
    if some is None or not some.finds_weight_gradients:
        pytest.skip("this machine has no AMX, or the compiled steps were not built")
    return some


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 5, 3), (64, 32, 32), (100, 48, 70), (257, 33, 160), (700, 160, 33), (1024, 1, 97), (31, 96, 1)],
)
def test_gradients_of_weights(tiles, threads, rows, outputs, inputs):
    torch.manual_seed(rows)
    before = torch.get_num_threads()
    # rows of a wider tensor, as parts of a joined product are
    gradient = torch.randn(rows, outputs + 7).bfloat16()[:, 3 : outputs + 3]
    x = torch.randn(rows, inputs).bfloat16()
    torch.set_num_threads(threads)
    try:
        to_weight, to_bias = tiles.weight_gradient(gradient, x, biased=True)
        assert tiles.weight_gradient(gradient, x, biased=False)[1] is None
    finally:
        torch.set_num_threads(before)
    assert to_weight.dtype == to_bias.dtype == torch.float32
    exact = gradient.double().mT @ x.double(), gradient.double().sum(0)
    assert agree([to_weight.double(), to_bias.double()], exact, 1e-5)
    once = tiles.weight_gradient(gradient, x, biased=True)
    assert torch.equal(once[0], to_weight) and torch.equal(once[1], to_bias)  # whatever the number of threads


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", [(40,), (40, 24, 24)])
def test_linear_layers_in_bfloat16(tiles, outputs, biased):
    """Gradients in float32 that are nearer to the exact ones than torch's, which it rounds to bfloat16."""
    torch.manual_seed(0)
    # numbers that bfloat16 holds, so that nothing but the sums differ
    x, *weights = (
        torch.randn(*size).bfloat16().float() for size in ((2, 50, 72), *((n, 72) for n in outputs))
    )
    bias = torch.randn(sum(outputs)).bfloat16().float() if biased else None
    down = torch.randn(2, 50, sum(outputs)).bfloat16()

    def learn(function, dtype):
        leaves = [
            one.to(dtype).clone().requires_grad_() for one in (x, *weights, *([bias] if biased else ()))
        ]
        out = function(leaves[0], leaves[1 + len(weights)] if biased else None, *leaves[1 : 1 + len(weights)])
        out.backward(down.to(out.dtype))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    def plain(x, bias, *weights):
        return F.linear(x, torch.cat(weights), bias)

    exact = learn(plain, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, torchs = learn(linear, torch.float32), learn(plain, torch.float32)
        assert "_Linear" in type(linear(x, bias, *(w.requires_grad_() for w in weights)).grad_fn).__name__
    assert agree(ours, exact, 0.01)
    for one, other, goal in zip(ours[2:], torchs[2:], exact[2:]):
        assert (one - goal).abs().max() < 0.1 * (other - goal).abs().max()
    frozen = linear(x.requires_grad_(), bias, *(w.requires_grad_(False) for w in weights))
    assert "_Linear" not in type(frozen.grad_fn).__name__  # no gradient of weights is wanted


def test_rotation_and_its_gradient():
    x, table = torch.randn(3, 11, 4, 16), rotary_table(torch.arange(11)[None], 16, 10000.0)

    def plain(x):
        cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in table)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    expected = gradients(plain, (x,), torch.float64)
    assert agree(gradients(lambda x: rotate(x, table), (x,), torch.float32), expected, 1e-6)
    assert agree(gradients(lambda x: rotate(x, table), (x,), torch.bfloat16), expected, 0.02)


def check_add_norm(some, centred):
    """Each of its results and gradients, at a width that no vector divides."""
    x, branch, weight, bias = (torch.randn(*size) for size in ((301, 77), (301, 77), (77,), (77,)))
    sizes = dict(centred=centred, exact=True)
    total, normed, exact, statistics = some.add_norm(
        x, branch.bfloat16(), weight, bias, 1e-5, torch.bfloat16, **sizes
    )
    assert torch.equal(total, x + branch.bfloat16())
    leaves = [part.double().requires_grad_() for part in (total, weight, bias)]
    if centred:
        expected = F.layer_norm(leaves[0], (77,), *leaves[1:], 1e-5)
    else:
        expected = F.rms_norm(leaves[0], (77,), leaves[1], 1e-5) + leaves[2]
    assert agree([exact.double()], [expected.detach()], 1e-6) and torch.equal(normed, exact.bfloat16())
    below = torch.randn(301, 77), torch.randn(301, 77).bfloat16(), torch.randn(301, 77)
    ((below[1].double() + below[2]) * expected + below[0] * leaves[0]).sum().backward()
    found = some.add_norm_back(total, weight, statistics, below, torch.bfloat16, centred=centred, biased=True)
    to_x, to_branch, to_weight, to_bias = found
    assert agree([to_x.double(), to_weight.double(), to_bias.double()], [leaf.grad for leaf in leaves], 3e-6)
    assert torch.equal(to_branch, to_x.bfloat16())


@pytest.mark.skipif(kernels.KERNELS is None, reason="the compiled steps were not built")
@pytest.mark.parametrize("at_most", kernels.INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_instruction_set_and_number_of_threads(at_most, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        some = kernels.load(at_most)
        assert some is not None
        for centred in (False, True):
            check_add_norm(some, centred)
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
