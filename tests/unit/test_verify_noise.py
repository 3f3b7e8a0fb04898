"""What `verify` allows a runtime that rounds: measured on the model. And limits: told, and never called equal."""

import io

import gguf
import numpy as np
import pytest
import torch
import typer
from conftest import randomise
from rich.console import Console
from torch import nn

from lexmill.cli import verify as command
from lexmill.formats.blocks import BLOCK_TYPES, encode
from lexmill.formats.gguf import GGUFFile
from lexmill.model.build import build_model
from lexmill.model.config import ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.recipe.report_checks import check_row, overall_verdict
from lexmill.runtimes import verify
from lexmill.runtimes.llama_cpp import export_gguf, file_offsets, file_types, file_weights
from lexmill.runtimes.verify_checks import Comparison
from lexmill.runtimes.verify_report import Check, VerifyReport
from lexmill.runtimes.verify_rounding import ROUNDING, Rounded
from lexmill.runtimes.verify_tolerances import Noise, exact_tolerance, gap_moves, tolerance_of


@pytest.fixture
def model(tmp_path, tokenizer):
    shape = dict(vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=96)
    config = ModelConfig(**shape, context=64)
    weights = randomise(build_model(config)).weights()
    return write_model_directory(tmp_path / "model", config, weights, tokenizer)


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_activations_are_rounded_to_what_gguf_makes_of_them():
    values = numbers(40, 256)
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind)
    for type in ("Q8_0", "Q4_0", "Q4_1", "Q5_1"):
        np.testing.assert_array_equal(ROUNDING[type].apply(values).numpy(), theirs)
    ours = encode(values.numpy(), BLOCK_TYPES["BF16"]).view("<u2").astype(np.uint32) << 16
    rounded = ROUNDING["BF16"].apply(values).numpy()
    np.testing.assert_array_equal(rounded.reshape(-1), ours.view(np.float32).reshape(-1))
    blocks = ROUNDING["Q6_K"].apply(values).numpy()
    steps = np.abs(values.numpy()).max(-1, keepdims=True) / 127
    assert (np.abs(blocks - values.numpy()) <= 0.501 * steps).all()  # one scale a row of 256
    np.testing.assert_allclose(blocks / steps, np.round(blocks / steps), atol=1e-3)


def test_weights_laid_side_by_side_are_rounded_each_in_its_way():
    """Queries, keys and values are one product, and a file may hold them in several types."""
    model = nn.Module()
    model.q, model.k, model.v = (nn.Parameter(numbers(8, 64, seed=at)) for at in range(3))
    model.b = nn.Parameter(numbers(24, seed=4))
    values, offsets = numbers(5, 64, seed=3), {"v": numbers(8, 2, seed=5).numpy()}

    def product():
        return nn.functional.linear(values, torch.cat([model.q, model.k, model.v]), torch.cat([model.b]))

    with torch.no_grad(), Rounded(model, {"q": "BF16", "k": "F32", "v": "Q4_1"}, offsets):
        found = product()
    exact = product().detach()
    assert torch.equal(found[:, 8:16], exact[:, 8:16])
    q = values.bfloat16().float() @ model.q.T + model.b[:8]
    torch.testing.assert_close(found[:, :8], q.detach())
    v = ROUNDING["Q4_1"].apply(values) @ model.v.T + model.b[16:]
    moved = (found[:, 16:] - v.detach()).abs().max()
    assert 0 < moved < 0.02  # by the sums of blocks, in half precision
    assert torch.equal(product().detach(), exact)  # only within the block


@pytest.mark.parametrize("type", ["q4_1", "q5_1"])
def test_offsets_of_blocks_are_in_lexmill_s_order_of_rows(tmp_path, model, type):
    """The smallest weight of a block that ggml's plain rule made is its offset."""
    with GGUFFile.open(export_gguf(model, tmp_path / "m.gguf", type)) as file:
        weights, offsets = file_weights(file, model), file_offsets(file, model.config)
        assert offsets.keys() == {
            name for name, kind in file_types(file, model.config).items() if kind == type.upper()
        }
    assert any(name.endswith("attention.k.weight") for name in offsets)
    for name, found in offsets.items():
        blocks = weights[name].reshape(*found.shape, 32)
        np.testing.assert_array_equal(blocks.min(-1), found, name)


def test_the_tolerance_follows_the_noise_up_to_a_cap():
    quiet, loud = Noise(1e-4, 0.1, 1e-5, 0.02), Noise(3.0, 2.0, 3.0, 2.0)
    tolerance = tolerance_of(quiet)
    assert tolerance.kind == "KL" and tolerance.logits == pytest.approx(2e-4, rel=0.01)
    assert tolerance.rounding == pytest.approx(1e-4 / 3 + 2e-5, rel=0.01)
    assert tolerance.tie == pytest.approx(0.15) and tolerance.rounded_tie < tolerance.tie
    assert tolerance_of(loud).logits == tolerance_of(loud).rounding == 0.1
    assert 0 < tolerance_of(Noise(0, 0, 0, 0)).logits < 1e-6
    assert exact_tolerance(1e-6).logits == 1e-4 and exact_tolerance(1e-4).tie == pytest.approx(1.2e-3)
    assert exact_tolerance(1.0).logits == 1e-2
    ours, theirs = np.zeros((200, 2)), np.zeros((200, 2))
    theirs[:100, 0] = 0.5
    assert gap_moves(ours, theirs) == 0.5


def test_noise_that_is_no_number_passes_nothing():
    class Reference:
        logprobs = np.log(np.full((3, 4), 0.25))
        positions, vocabulary, rounding = [[1]] * 3, 4, "F16"
        noise = Noise(float("nan"), 0.1, 0.0, 0.1)

        class tokenizer:
            decode = staticmethod(str)

    class Runtime:
        logprobs = staticmethod(lambda positions, vocabulary: Reference.logprobs)

    assert not Comparison("x", Runtime(), Reference(), tolerance_of(Reference.noise)).logits().passed


LIMITED = Check("llama.cpp f16", "tokens", True, 0, 0, "44 of 45 texts equal", limits=("it drops 1 letter",))


def test_a_limit_is_told_and_not_called_equal(tmp_path):
    report = VerifyReport("m", {}, (Check("t", "tokens", True, 0, 0), LIMITED))
    assert report.limited and report.exit_code == 0
    assert report.table_rows()[1][2] == "limit" and "it drops 1 letter" in report.table_rows()[1][4]
    found = report.to_json()
    screen = Console(width=120, record=True, file=io.StringIO())
    command.show_checks(found, screen)
    told = screen.export_text()
    assert "limit" in told and "Limit of the runtime, which no file changes: it drops 1 letter." in told
    verdict, more, _ = overall_verdict(found["checks"])
    assert verdict == "1 of 2 checks equal" and "1 up to a limit of the runtime" in more
    row = check_row(found["checks"][1])
    assert ">limit<" in row and "it drops 1 letter" in row
    assert not VerifyReport("m", {}, (Check("t", "tokens", False, limits=("x",)),)).limited


@pytest.mark.parametrize("strict,code", [(False, 0), (True, 1)])
def test_strict_counts_limits_as_differences(monkeypatch, model, strict, code):
    monkeypatch.setattr(verify, "verify", lambda *_, **__: VerifyReport("m", {}, (LIMITED,)))
    with pytest.raises(typer.Exit) as ended:
        command.verify(model.path, tokens=4, strict=strict, json=True, quiet=True)
    assert ended.value.exit_code == code
