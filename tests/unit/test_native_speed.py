"""`lexmill bench`: the machine's limits, what a model asks of it, and the figures as they are printed."""

import json

import pytest
from typer.testing import CliRunner

from lexmill.cli.main import make_app
from lexmill.devices import this_machine
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.native import limits
from lexmill.inference.native.library import available
from lexmill.model.config import ModelConfig

pytestmark = pytest.mark.skipif(not available(), reason="the compiled engine is not built")


@pytest.fixture(scope="module")
def found():
    return limits.measure_limits(1, 1 << 20)


def test_limits_have_the_size_of_a_processors(found):
    for name, rate in vars(found).items():
        if name.endswith("second") and rate:
            assert 1e8 < rate < 1e15, name
    assert found.memory_bytes_per_second and found.float32_per_second


def test_what_a_processor_lacks_has_no_limit(found):
    features = this_machine().features
    if "avx2" in features:
        assert found.int8_per_second > 0 and found.int8_short_per_second > 0
    if "avx512_bf16" not in features and "amx_bf16" not in features:
        assert found.bfloat16_per_second == 0
    if "avx512_vnni" in features:  # one instruction where AVX2 takes three, and twice the width
        assert limits._limit("int8_vnni", 1) > limits._limit("int8", 1)


@pytest.mark.parametrize(
    ("kind", "threads", "size"), [(99, 1, 0), (-1, 1, 0), (0, 0, 1), (1, -3, 0), (0, 1, -5)]
)
def test_what_makes_no_sense_is_nothing(found, kind, threads, size):
    assert limits.library().lexmill_limit(kind, threads, size) == 0


@pytest.mark.parametrize("size", [0, 1, 4095, 100_001])
def test_any_size_is_read(found, size):
    assert limits._limit("read", 2, size) > 0


def test_operations_of_a_prompt():
    from lexmill.inference.native.speed import prompt_operations

    shape = ModelConfig(
        vocab_size=10, width=4, layers=3, heads=2, kv_heads=1, head_width=2, mlp_width=6, context=16
    )
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6  # q, k and v, out, mlp
    # a prompt of 5: the head once; the i-th token looks at i keys, a product with keys and one with values
    every = 2 * (5 * 3 * layer + 10 * 4) + 3 * 2 * 2 * 2 * 2 * (1 + 2 + 3 + 4 + 5)
    assert prompt_operations(shape, 5) == pytest.approx(every / 5)


def test_bytes_of_a_step(model_path):
    from lexmill.inference.native.engine import NativeEngine
    from lexmill.inference.native.speed import open_source, step_bytes, stored_type

    source = open_source(model_path)
    engine = NativeEngine.open(source, threads=1, keep=False)
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96
    assert step_bytes(engine) == 4 * (2 * (attention + mlp) + 512 * 64)  # tied: the embeddings are the head
    assert stored_type(source) == "F32"


@pytest.mark.parametrize("as_gguf", [False, True])
def test_bench_prints_figures(model_path, tmp_path, as_gguf):
    model = model_path
    if as_gguf:
        from lexmill.model.directory import ModelDirectory
        from lexmill.runtimes.llama_cpp import export_gguf

        model = export_gguf(ModelDirectory.open(model_path), tmp_path / "model.gguf", "q8_0")
        assert GGUFFile.open(model).tensors
    arguments = ["bench", str(model), "--prompt", "40", "--generate", "8", "--threads", "1", "--repeat", "2"]
    done = CliRunner().invoke(make_app(), [*arguments, "--json"], catch_exceptions=False)
    values = json.loads(done.stdout)
    assert values["weights"] == ("Q8_0" if as_gguf else "F32") and values["threads"] == 1 and values["cpu"]
    assert len(values["prompt_runs"]) == len(values["decode_runs"]) == 2
    for kind in ("prompt", "decode"):
        runs = values[f"{kind}_runs"]
        assert min(runs) <= values[f"{kind}_tokens_per_second"] <= max(runs)
    assert values["share_of_memory_rate"] == pytest.approx(
        values["decode_tokens_per_second"] * values["step_bytes"] / values["limits"]["model_bytes_per_second"]
    )
    text = CliRunner().invoke(make_app(), arguments, catch_exceptions=False).stdout
    assert "tokens/s" in text and "GB/s" in text


def test_bench_without_a_prompt(model_path):
    arguments = ["bench", str(model_path), "--prompt", "0", "--generate", "2", "--repeat", "1", "--json"]
    values = json.loads(CliRunner().invoke(make_app(), arguments, catch_exceptions=False).stdout)
    assert values["prompt_tokens_per_second"] is None and values["decode_tokens_per_second"] > 0


def test_bench_names_a_missing_model(tmp_path):
    from lexmill.errors import LexmillError

    with pytest.raises(LexmillError, match=r"nothing\.gguf"):
        CliRunner().invoke(make_app(), ["bench", str(tmp_path / "nothing.gguf")], catch_exceptions=False)
