"""lexmill, transformers and llama.cpp on the same small models; and proof that `verify` can fail."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from conftest import with_bos

from lexmill.errors import FileError
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.language_model import load
from lexmill.inference.native.library import available
from lexmill.model import gguf_shapes
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.names import weight_names, weight_shapes
from lexmill.runtimes import (
    gguf_tokenizer,
    llama_cpp,
    verify_checks,
    verify_reference,
    verify_report,
    verify_tolerances,
)
from lexmill.runtimes.huggingface import export_huggingface
from lexmill.runtimes.llama_cpp import LlamaCpp, RuntimeFailure, export_gguf
from lexmill.runtimes.verify import verify
from lexmill.runtimes.verify_cases import TEXTS
from lexmill.tokenizer.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

SHAPE = dict(
    vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=96, context=256
)
SHAPES = {
    "llama": {},
    "untied": {"tied": False, "kv_heads": 4, "rope_theta": 5e5},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6, "vocab_size": 520},
    "qwen3": {"qk_norm": True, "head_width": 32},
}


def make_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = rng.standard_normal(shape)
        scale = 0.3 if len(shape) == 1 else 1.0 / shape[-1] ** 0.5
        weights[name] = (1 + 0.1 * noise if "norm" in name else scale * noise).astype(np.float32)
        if name in ("embed.weight", "head.weight"):
            weights[name][512:] = 0  # rows without a token are never the likeliest
    return weights


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(shape):
        if shape not in made:
            config = ModelConfig(**{**SHAPE, **SHAPES[shape]})
            made[shape] = write_model_directory(folder / shape, config, make_weights(config), tokenizer)
        return made[shape]

    return get


@pytest.fixture
def without_transformers(monkeypatch):
    hide(monkeypatch, "transformers")


def hide(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def failed(report):
    return {check.check for check in report.checks if check.passed is False}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_runtimes_agree(tmp_path, models, shape):
    model = models(shape)
    published = export_huggingface(model, tmp_path / "published")
    files = [export_gguf(model, tmp_path / f"{type}.gguf", type) for type in ("f32", "f16", "bf16", "q8_0")]
    report = verify(published, files, tokens=32)
    wrong = [check for check in report.checks if not check.passed]
    if shape == "qwen2":  # transformers 5 adds NFC to every model of this type, whatever tokenizer.json says
        assert {(check.runtime, check.figure) for check in wrong} <= {("transformers", 1)}, wrong
        assert all("e\\u0301" in ascii(check.detail) for check in wrong) and failed(report) <= {
            "tokens",
            "round trip",
        }
    else:
        assert not wrong and report.passed and report.exit_code == 0, wrong
    of_engine = 3 if available() else 0  # prompt logits, logits, greedy
    assert len(report.checks) == 7 + 4 * 8 + 3 + 5 * of_engine  # of which `rounding`, but for f32
    assert {"transformers", "llama.cpp f32", "llama.cpp q8_0"} <= {check.runtime for check in report.checks}
    json.dumps(report.to_json())
    exact = [check for check in report.checks if check.runtime == "llama.cpp f32" and check.check == "logits"]
    assert exact[0].figure < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_py_reads_our_files_and_knows_every_name(tmp_path, models, shape):
    model = models(shape)
    reader = gguf.GGUFReader(export_gguf(model, tmp_path / "m.gguf", "q8_0"))
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[model.config.family]
    names = gguf.get_tensor_name_map(arch, model.config.layers)
    for name in weight_names(model.config):
        assert names.get_name(name.huggingface, (".weight", ".bias")) == name.gguf
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        for tensor in reader.tensors:
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(theirs.reshape(-1), file.read(tensor.name).reshape(-1))
        assert set(reader.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} == set(
            file.metadata
        )


def test_permutation_is_the_converters(models):
    """The formula of llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    weight = models("llama").weight("decoder.blocks.0.attention.k.weight")
    theirs = weight.reshape(2, 2, weight.shape[0] // 2 // 2, 64).swapaxes(1, 2).reshape(weight.shape)
    np.testing.assert_array_equal(llama_cpp.permute_rope(weight, 2), theirs)


def copy_model(model, folder):
    shutil.copytree(model.path, folder)
    return folder


def skip_permutation(monkeypatch, model, folder):
    monkeypatch.setattr(gguf_shapes, "permute_rope", lambda weight, heads: weight)
    return model


def change_template(monkeypatch, model, folder):
    copy_model(model, folder)
    text = (folder / "chat_template.jinja").read_text().replace("'<|im_end|>'", "' <|im_end|>'")
    (folder / "chat_template.jinja").write_text(text)
    return ModelDirectory.open(folder)


def change_stop(monkeypatch, model, folder):
    path = copy_model(model, folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "the"}))
    vocabulary = model.tokenizer.vocabulary
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [vocabulary["the"]]}))
    return ModelDirectory.open(folder)


def change_merges(monkeypatch, model, folder):
    path = copy_model(model, folder) / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"][0:20] = []
    path.write_text(json.dumps(value))
    return ModelDirectory.open(folder)


def change_one_weight(monkeypatch, model, folder):
    weights = model.weights()
    weights["decoder.blocks.1.mlp.down.weight"] = weights["decoder.blocks.1.mlp.down.weight"].copy()
    weights["decoder.blocks.1.mlp.down.weight"][3, 5] += 3
    return write_model_directory(folder, model.config, weights, model.tokenizer)


def change_norm_epsilon(monkeypatch, model, folder):
    path = copy_model(model, folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.2}))
    return ModelDirectory.open(folder)


@pytest.mark.parametrize("type", ["f32", "q8_0"])
@pytest.mark.parametrize(
    "breakage,expected",
    [
        (skip_permutation, {"weights", "logits"}),
        (change_template, {"chat template"}),
        (change_stop, {"stop tokens"}),
        (change_merges, {"tokens"}),
        (change_one_weight, {"weights"}),
        (change_norm_epsilon, {"logits"}),
    ],
)
def test_verify_finds_what_is_broken(
    tmp_path, models, monkeypatch, without_transformers, breakage, expected, type
):
    model = models("llama")
    with monkeypatch.context() as patch:
        file = export_gguf(breakage(patch, model, tmp_path / "broken"), tmp_path / "broken.gguf", type)
    report = verify(model.path, [file], tokens=16)
    assert expected <= failed(report), report.table_rows()
    assert report.exit_code == 1 and not report.passed


def patch_tensor(change, name):
    def breakage(path, type):
        with GGUFFile.open(path) as file:
            info = file.tensors[name]
        data = np.fromfile(path, np.uint8)
        change(data[info.offset : info.offset + info.size], type)
        data.tofile(path)

    return breakage


def one_scale(data, type):
    """The first block's weights are 1 % too large."""
    if type == "q8_0":
        scale = data[:2].view("<f2")
        scale[:] = scale * np.float16(1.01)
    else:
        weights = (data[:64].view("<u2").astype("<u4") << 16).view("<f4") * np.float32(1.01)
        data[:64].view("<u2")[:] = weights.view("<u4") >> 16


def one_norm(data, type):
    data[:4].view("<f4")[:] *= np.float32(1.001)


def patch_number(key):
    def breakage(path, type):
        data = path.read_bytes()
        at = data.index(key.encode()) + len(key) + 4  # behind the key comes the type, then the value
        value = (np.frombuffer(data[at : at + 4], "<f4") * np.float32(1.01)).tobytes()
        path.write_bytes(data[:at] + value + data[at + 4 :])

    return breakage


@pytest.mark.parametrize("type", ["bf16", "q8_0"])
@pytest.mark.parametrize(
    "breakage",
    [
        patch_tensor(one_scale, "blk.1.ffn_down.weight"),
        patch_tensor(one_norm, "blk.0.attn_norm.weight"),
        patch_number("llama.rope.freq_base"),
        patch_number("llama.attention.layer_norm_rms_epsilon"),
    ],
    ids=["scale", "norm", "rope", "epsilon"],
)
def test_a_slightly_wrong_file_fails_too(tmp_path, models, without_transformers, breakage, type):
    """1 % on one block of 32 weights, or on one constant; 0.1 % on one weight of a norm."""
    file = export_gguf(models("llama"), tmp_path / "m.gguf", type)
    breakage(file, type)
    assert "weights" in failed(verify(models("llama").path, [file], prompts=["The"], tokens=4))


@pytest.mark.parametrize("type", ["bf16", "q8_0", "q4_1", "q5_1"])
def test_rounded_activations_explain_what_llama_cpp_does(tmp_path, models, type):
    """lexmill with its activations rounded is far nearer to llama.cpp than without; so is each kind of product."""
    model, texts = models("llama"), [[5, 80, 200], [17], [300, 12, 9, 44, 131]]
    file = export_gguf(model, tmp_path / "m.gguf", type)
    reference = verify_reference.Reference(load(model.path), model, ["The"], 2)
    with GGUFFile.open(file) as opened:
        own = reference.with_weights(
            llama_cpp.file_weights(opened, model),
            llama_cpp.file_types(opened, model.config),
            llama_cpp.file_offsets(opened, model.config),
        )
    with LlamaCpp(file, threads=1) as runtime:
        theirs = runtime.logprobs(texts, 512)
    plain, rounded = (
        np.median([np.abs(own._rows(ids, within)[-1] - row).max() for ids, row in zip(texts, theirs)])
        for within in (None, own._rounded)
    )
    assert rounded < plain / 3


def test_weights_come_back_from_a_file_in_lexmill_s_order(tmp_path, models):
    for shape in ("llama", "qwen2"):
        model = models(shape)
        with GGUFFile.open(export_gguf(model, tmp_path / f"{shape}.gguf", "f32")) as file:
            back = llama_cpp.file_weights(file, model)
        for name, weight in model.weights().items():
            np.testing.assert_array_equal(back[name], weight)


class Choosy:
    """A runtime that agrees with lexmill on everything but one token of a continuation."""

    def __init__(self, reference, rank):
        self.reference, self.rank = reference, rank

    def greedy(self, ids, limit):
        first = np.argsort(-self.reference.row(ids))[self.rank]
        return [int(first), *self.reference.model.generate_ids([*ids, int(first)], max_tokens=limit - 1)]

    def logprobs(self, prompts, vocabulary):
        return np.stack([self.reference.row(ids) for ids in prompts])


def test_another_choice_is_a_tie_only_within_the_gap(models):
    model = models("llama")
    reference = verify_reference.Reference(load(model.path), model, ["The"], 8)
    loose = verify_tolerances.Tolerance(1.0, "KL", 100.0)
    check = verify_checks.Comparison("x", Choosy(reference, 0), reference, loose).greedy()
    assert check.passed and not check.ties and "identical" in check.detail
    for tolerance in (
        verify_tolerances.TOLERANCES["q8_0"],
        loose,
    ):  # loose: its own probabilities do not excuse it
        check = verify_checks.Comparison("x", Choosy(reference, 3), reference, tolerance).greedy()
        assert not check.passed and not check.ties


def test_ties_are_told_apart_from_equal_texts(models):
    model = models("llama")
    reference = verify_reference.Reference(load(model.path), model, ["The"], 8)

    class Rounding(Choosy):
        def logprobs(self, prompts, vocabulary):
            return super().logprobs(prompts, vocabulary) + 50 * (np.arange(vocabulary) % 2)

    loose = verify_tolerances.Tolerance(1.0, "KL", 100.0)
    check = verify_checks.Comparison("x", Rounding(reference, 1), reference, loose).greedy()
    assert check.passed and check.ties == len(reference.greedy) and "but for ties" in check.detail
    rows = verify_report.VerifyReport("m", {}, (check,)).table_rows()
    assert rows[0][2] == "same*"


def test_verify_finds_a_broken_transformers_directory(tmp_path, models, monkeypatch):
    """transformers reads the same files as lexmill, so lexmill's side is what is turned here."""
    model = models("llama")
    reference = verify_reference.Reference

    class Turned(reference):
        def _rows(self, *arguments):
            return super()._rows(*arguments) + (np.arange(self.vocabulary) == 9) * 1e-3

    monkeypatch.setattr("lexmill.runtimes.verify_reference.Reference", Turned)
    report = verify(model.path, prompts=["The"], tokens=4, engine=False)
    assert failed(report) == {"logits"} and report.exit_code == 1


def test_a_file_that_does_not_load_is_a_failure(tmp_path, models, monkeypatch, without_transformers):
    metadata = llama_cpp._metadata
    drop = lambda *a: {key: value for key, value in metadata(*a).items() if "block_count" not in key}  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "_metadata", drop)
        file = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    with pytest.raises(RuntimeFailure, match="does not load"):
        LlamaCpp(file).__enter__()
    assert failed(verify(models("llama").path, [file], tokens=2)) == {"runs"}
    file.write_bytes(file.read_bytes()[:5000])
    assert failed(verify(models("llama").path, [file], tokens=2)) == {"weights"}


def test_a_crash_of_llama_cpp_stays_in_its_process(tmp_path, models, monkeypatch):
    """Two tokens with one text abort llama.cpp; our exporter refuses them, so the file is made by force."""
    real = gguf_tokenizer._tokens

    def doubled(*arguments):
        texts, types = real(*arguments)
        return [*texts[:-1], texts[-2]], types

    monkeypatch.setattr(gguf_tokenizer, "_tokens", doubled)
    file = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    with pytest.raises(RuntimeFailure, match="ended with code"), LlamaCpp(file):
        pass


def test_missing_packages_are_not_a_pass(models, tmp_path, monkeypatch):
    file = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    hide(monkeypatch, "transformers", "xllamacpp")
    report = verify(models("llama").path, [], tokens=2, engine=False)
    assert [check.passed for check in report.checks] == [None] and report.exit_code == 2
    assert "pip install" in report.checks[0].detail
    report = verify(models("llama").path, [file], tokens=2, engine=False)
    assert [check.passed for check in report.checks] == [None, True, None]


def test_a_model_without_chat_template_is_compared_all_the_same(tmp_path, models, without_transformers):
    folder = copy_model(models("llama"), tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": ""}))
    report = verify(folder, [export_gguf(folder, tmp_path / "m.gguf", "f32")], tokens=4)
    assert report.passed
    assert [check.detail for check in report.checks if check.check == "chat template"] == [
        "the model has no chat template"
    ]


def gpt2_form(value):
    value["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }


def smollm_form(value):
    gpt2_form(value)
    digits = {"type": "Digits", "individual_digits": True}
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, value["pre_tokenizer"]]}


def user_token(value):
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    value["model"]["vocab"]["<tool>"] = 512
    value["added_tokens"].append({"id": 512, "content": "<tool>", **plain})


@pytest.mark.parametrize("form", [gpt2_form, smollm_form, user_token, with_bos])
def test_every_known_tokenizer_form_gives_the_same_ids(tmp_path, models, form):
    base = models("llama")
    value = json.loads(base.tokenizer.json)
    form(value)
    tokenizer = Tokenizer(json.dumps(value), base.tokenizer.ids, base.tokenizer.chat_template)
    config = ModelConfig(**{**SHAPE, "vocab_size": 520})
    model = write_model_directory(tmp_path / "m", config, make_weights(config), tokenizer)
    with LlamaCpp(export_gguf(model, tmp_path / "m.gguf", "f32"), threads=1) as runtime:
        for text in (*TEXTS, "a <tool>b<tool> c"):
            assert runtime.tokenize(text) == tokenizer.encode(text), text


def test_llama_cpp_refuses_what_it_cannot_do(tmp_path, models):
    with pytest.raises(FileError, match="no such GGUF"):
        LlamaCpp(tmp_path / "none.gguf")
    file = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    with LlamaCpp(file, threads=1) as runtime:
        with pytest.raises(RuntimeFailure, match="refuses /completion"):
            runtime.greedy([5] * 5000, 2)
        runtime._process.kill()
        with pytest.raises(RuntimeFailure, match="gave no answer"):
            runtime.tokenize("a")
        with pytest.raises(RuntimeFailure, match="not running"):
            runtime.tokenize("a")
