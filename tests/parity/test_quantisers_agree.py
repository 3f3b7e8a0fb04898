"""lexmill's quantisers and importance matrices against ggml's own, reached through the xllamacpp wheel."""

import numpy as np
import pytest
import torch
from llama_library import library

from lexmill.evaluate.importance import collect_importance
from lexmill.formats.blocks import BLOCK_TYPES, decode, encode
from lexmill.formats.gguf import GGUFFile
from lexmill.formats.imatrix import read_imatrix, write_imatrix
from lexmill.inference.language_model import load
from lexmill.model.config import ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.model.names import weight_shapes
from lexmill.runtimes.llama_cpp import export_gguf, weight_error
from lexmill.runtimes.verify import verify

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def ggml():
    """ggml's quantiser as a function of weights, type and importance."""
    quantise = library().ggml_quantize_chunk

    def call(weights, kind, importance=None):
        out = np.empty(kind.byte_size(weights.shape), np.uint8)
        at = None if importance is None else importance.ctypes.data
        rows, columns = weights.shape
        assert quantise(kind.id, weights.ctypes.data, out.ctypes.data, 0, rows, columns, at) == out.size
        return out

    return call


def made(kind, seed=0):
    rng = np.random.default_rng(seed)
    weights = {"normal": rng.standard_normal((128, 1024)), "heavy tails": rng.standard_t(4, (128, 1024))}[
        kind
    ]
    return (0.05 * weights).astype(np.float32), np.exp(rng.standard_normal(1024)).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_of_32_have_ggmls_bytes(ggml, name, kind):
    weights, _ = made(kind)
    assert encode(weights, BLOCK_TYPES[name]).tobytes() == ggml(weights, BLOCK_TYPES[name]).tobytes()


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_searches_are_no_worse_than_ggmls(ggml, name, kind):
    """In the squared error weighted as ggml weights it; without importance, of K-quants, in the plain one."""
    weights, importance = made(kind)
    block = BLOCK_TYPES[name]
    spread = (2 if name.endswith("K") else 1) * np.square(weights).mean(1, keepdims=True)
    cost = importance * np.sqrt(spread + np.square(weights))
    for factors, given in ((cost, importance), (1, None)):
        if given is None and not name.endswith("K"):
            continue
        ours, theirs = (
            (factors * (decode(data, block, weights.shape) - weights) ** 2).mean()
            for data in (encode(weights, block, given), ggml(weights, block, given))
        )
        assert ours <= 1.001 * theirs, (given is None, ours / theirs)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A random model whose rows divide into blocks of 256, untied."""
    config = ModelConfig(
        vocab_size=512,
        width=256,
        layers=4,
        heads=4,
        kv_heads=2,
        head_width=64,
        mlp_width=512,
        context=128,
        tied=False,
    )
    rng = np.random.default_rng(5)
    weights = {
        name: (
            1 + 0.1 * rng.standard_normal(shape)
            if "norm" in name
            else rng.standard_normal(shape) / shape[-1] ** 0.5
        )
        for name, shape in weight_shapes(config).items()
    }
    return write_model_directory(tmp_path_factory.mktemp("m") / "wide", config, weights, tokenizer)


def test_importance_is_what_transformers_matrices_meet(tmp_path, model, prose):
    """Sums of squares at the same layers of transformers' own model, by hooks of their own."""
    transformers = pytest.importorskip("transformers")
    found = collect_importance(load(model.path), prose[:4000], chunk_size=64, chunks=3, dataset="prose")
    assert (found.chunks, found.chunk_size) == (3, 64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down"}
    names = {
        f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}.weight"
        for layer in range(4)
        for theirs, ours in parts.items()
    } | {"lm_head": "output.weight"}
    sums = {}
    for module, name in names.items():
        theirs.get_submodule(module).register_forward_pre_hook(
            lambda _, inputs, name=name: sums.update(
                {name: sums.get(name, 0) + inputs[0].square().sum((0, 1)).double()}
            )
        )
    ids = model.tokenizer.encode(prose[:4000], special=False)
    with torch.inference_mode():
        for start in (0, 64, 128):
            theirs(torch.tensor([ids[start : start + 64]]))
    assert found.entries.keys() == sums.keys()
    for name, expected in sums.items():
        entry = found.entries[name]
        assert entry.counts.tolist() == [192]
        np.testing.assert_allclose(entry.sums[0], expected.numpy(), rtol=1e-3)
    write_imatrix(tmp_path / "m.gguf", found)
    assert read_imatrix(tmp_path / "m.gguf").datasets == ("prose",)


def test_importance_makes_a_better_file(tmp_path, model, prose):
    """Output errors of every matrix on what it meets, weighed by importance, fall in every type."""
    matrix = collect_importance(load(model.path), prose[:20000], chunk_size=128)
    write_imatrix(tmp_path / "m.gguf", matrix)
    for mix in ("q4_0", "q4_k_m"):
        errors = []
        for importance in (None, tmp_path / "m.gguf"):
            with GGUFFile.open(
                export_gguf(model, tmp_path / f"{mix}.gguf", mix, importance=importance)
            ) as file:
                assert weight_error(file, model)[0] <= 1
                assert ("quantize.imatrix.file" in file.metadata) == (importance is not None)
                weight = model.weight("decoder.blocks.3.mlp.down.weight")
                error = (file.read("blk.3.ffn_down.weight") - weight) ** 2
                errors.append((error * matrix.importance("blk.3.ffn_down.weight", 512)).sum())
        assert errors[1] < errors[0]


@pytest.mark.parametrize("mix", ["q4_0", "q5_1", "q4_k_m", "q5_k_s", "q6_k"])
def test_llama_cpp_computes_what_quantised_files_say(tmp_path, model, mix, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    report = verify(
        model.path, [export_gguf(model, tmp_path / "m.gguf", mix)], prompts=["The", "She was"], tokens=16
    )
    found = {check.check: check for check in report.checks if check.runtime == f"llama.cpp {mix}"}
    assert all(check.passed for check in found.values()), report.table_rows()
    assert "rounding" in found  # activations rounded in the same way explain nearly everything
    if mix != "q5_1":
        assert found["rounding"].figure < found["logits"].figure / 3


def test_a_quantised_file_of_another_model_fails(tmp_path, model):
    weights = model.weights()
    name = "decoder.blocks.2.attention.k.weight"
    other = write_model_directory(
        tmp_path / "m", model.config, weights | {name: weights[name][::-1]}, model.tokenizer
    )
    with GGUFFile.open(export_gguf(other, tmp_path / "m.gguf", "q4_k_m")) as file:
        assert weight_error(file, other)[0] <= 1
        error, where = weight_error(file, model)
        assert error > 1 and where == "blk.2.attn_k.weight"
