"""Scaled rotary positions: the same answers in transformers and llama.cpp, and nothing lost in a GGUF file."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from made_models import model_maker
from test_import_models import check_weights_are_gguf_s

from lexmill.errors import ConfigError, ModelError
from lexmill.formats.gguf import GGUFFile, TensorToWrite, Value, write_gguf
from lexmill.inference.language_model import load
from lexmill.inference.sampling import log_softmax
from lexmill.model import gguf_rope
from lexmill.model.config import FAMILIES, ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.rope_scaling import RopeScaling
from lexmill.runtimes.import_model import import_model
from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf
from lexmill.runtimes.verify import verify

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

SHAPE = dict(
    vocab_size=520, width=64, layers=2, heads=4, kv_heads=2, head_width=32, mlp_width=96, context=512
)
LINEAR = RopeScaling(kind="linear", factor=2.5)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context=128)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=128)
KINDS = {
    "linear": {"rope_scaling": LINEAR},
    "linear qwen2": {**FAMILIES["qwen2"], "rope_scaling": LINEAR, "head_width": 16},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3, others": {
        "rope_scaling": replace(LLAMA3, factor=5.5, original_context=300, high_turns=6.5),
        "rope_theta": 5e5,
        "head_width": 64,
    },
    "yarn": {"rope_scaling": YARN},
    "yarn qwen3": {**FAMILIES["qwen3"], "rope_scaling": replace(YARN, factor=2.0)},
    "yarn, own scores": {"rope_scaling": replace(YARN, attention=0.9)},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    kinds = {name: ("bpe", flags) for name, flags in KINDS.items()}
    return model_maker(tmp_path_factory.mktemp("models"), prose, SHAPE, kinds)


@pytest.mark.parametrize("name", KINDS)
def test_every_runtime_agrees(tmp_path, models, name):
    model = models(name)
    report = verify(model.path, [export_gguf(model, tmp_path / "m.gguf", "f32")], tokens=24)
    wrong = [check for check in report.checks if check.passed is not True]
    if "qwen2" in name:  # transformers composes text (NFC) for this family whatever tokenizer.json says
        composed = [("transformers", "tokens"), ("transformers", "round trip")]
        wrong = [check for check in wrong if (check.runtime, check.check) not in composed]
    assert not wrong and len(report.checks) > 12, report.table_rows()


@pytest.mark.parametrize("name", KINDS)
def test_long_texts_have_the_same_next_token(tmp_path, models, name):
    """Behind 400 tokens, where the scalings differ most; the same weights without scaling are far off."""
    model = models(name)
    ids = np.random.default_rng(0).integers(5, 500, 400).tolist()
    with LlamaCpp(export_gguf(model, tmp_path / "m.gguf", "f32"), threads=1) as runtime:
        theirs = runtime.logprobs([ids], model.config.vocab_size)[0]
    ours = log_softmax(load(model.path).logits(ids)[-1])
    # llama.cpp multiplies angles up from pair to pair, so that a few units in the last place add up
    assert np.abs(ours - theirs).max() < 5e-3
    shutil.copytree(model.path, tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    values = json.loads(path.read_text())
    del values["rope_scaling"]
    values["rope_parameters"] = {"rope_type": "default"}
    path.write_text(json.dumps(values))
    assert np.abs(log_softmax(load(tmp_path / "plain").logits(ids)[-1]) - theirs).max() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_files_come_back(tmp_path, models, name):
    model = models(name)
    path = export_gguf(model, tmp_path / "m.gguf", "f16")
    found = import_model(path, tmp_path / "m")
    assert found.config == model.config
    assert ModelDirectory.open(found.path).config == model.config
    if not name.startswith("llama3"):
        check_weights_are_gguf_s(path, found)
    again = export_gguf(found, tmp_path / "again.gguf", "f16")
    with GGUFFile.open(path) as before, GGUFFile.open(again) as after:
        assert list(before.metadata) == list(after.metadata)
        for tensor in before.tensors:
            np.testing.assert_array_equal(before.raw(tensor), after.raw(tensor), tensor)


@pytest.mark.parametrize("context", [8192, 96, 5000])
@pytest.mark.parametrize("factor", [8.0, 32.0, 3.3])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_divisors_tell_what_made_them(width, factor, context):
    scaling = RopeScaling(kind="llama3", factor=factor, original_context=context)
    divisors = gguf_rope._divisors(scaling, width, 5e5)
    found = gguf_rope._llama3(divisors.astype(np.float64), 5e5)
    if found is None:  # fewer than two pairs on the ramp, and not one of the guesses
        on_ramp = (divisors > 1.0001) & (divisors < factor * 0.9999)
        assert on_ramp.sum() < 2
        return
    np.testing.assert_allclose(gguf_rope._divisors(found, width, 5e5), divisors, rtol=1e-5)
    if width > 16:
        assert found == scaling


def rewritten(source, path, change=None, tensors=None):
    """A copy of a file with other metadata or with other values in one of its tensors."""
    with GGUFFile.open(source) as file:
        metadata = {
            key: Value(
                file.types[key].removeprefix("array of "), value, items=file.types[key].startswith("array")
            )
            for key, value in file.metadata.items()
        } | (change or {})
        rows = [
            TensorToWrite(
                name,
                info.shape,
                info.type,
                lambda name=name: (
                    np.asarray(tensors[name], np.float32)
                    if tensors and name in tensors
                    else file.raw(name).copy()
                ),
            )
            for name, info in file.tensors.items()
        ]
        write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, rows)
    return path


@pytest.mark.parametrize(
    "key,value,said",
    [
        ("type", Value("string", "longrope"), "longrope"),
        ("attn_factor", Value("f32", 1.5), "without YaRN"),
        ("yarn_ext_factor", Value("f32", 0.5), "yarn_ext_factor"),
        ("yarn_attn_factor", Value("f32", 0.5), "yarn_attn_factor"),
        ("yarn_beta_fast", Value("f32", 8.0), "yarn_beta_fast"),
        ("factor", Value("f32", -2.0), "must be positive"),
        ("alpha", Value("f32", 2.0), "alpha"),
    ],
)
def test_other_scalings_are_refused(tmp_path, models, key, value, said):
    path = export_gguf(models("linear"), tmp_path / "m.gguf", "f32")
    other = rewritten(path, tmp_path / "o.gguf", {f"llama.rope.scaling.{key}": value})
    with pytest.raises(ModelError, match=said):
        import_model(other, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_divisors_are_refused_and_found(tmp_path, models):
    model = models("llama3")
    path = export_gguf(model, tmp_path / "m.gguf", "f32")
    with GGUFFile.open(path) as file:
        divisors = file.read("rope_freqs.weight")
    other = rewritten(path, tmp_path / "o.gguf", tensors={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(ModelError, match="in another way"):
        import_model(other, tmp_path / "m")
    report = verify(model.path, [other], tokens=4)
    assert report.exit_code == 1
    assert any("not scaled as the model's" in diagnosis.cause for diagnosis in report.diagnoses)


def test_a_forgotten_or_added_scaling_is_named(tmp_path, models):
    model = models("yarn")
    path = export_gguf(model, tmp_path / "m.gguf", "f32")
    keys = ("type", "factor")
    other = rewritten(path, tmp_path / "o.gguf", {f"llama.rope.scaling.{key}": None for key in keys})
    report = verify(model.path, [other], tokens=4)
    assert report.exit_code == 1
    assert any("how rotary positions are scaled" in diagnosis.cause for diagnosis in report.diagnoses)
    plain = models("llama3")
    added = {
        "llama.rope.scaling.type": Value("string", "linear"),
        "llama.rope.scaling.factor": Value("f32", 4.0),
    }
    other = rewritten(export_gguf(plain, tmp_path / "p.gguf", "f32"), tmp_path / "a.gguf", added)
    report = verify(plain.path, [other], tokens=4)
    assert report.exit_code == 1
    assert any("otherwise than the model" in diagnosis.cause for diagnosis in report.diagnoses)


def test_what_makes_no_sense_is_an_error(models):
    for values in ({"factor": 0.0}, {"factor": float("nan")}, {"original_context": 0}, {"high_turns": 0.5}):
        with pytest.raises(ConfigError):
            replace(LLAMA3, **values)
    with pytest.raises(ConfigError, match="does not fit"):
        ModelConfig(**{**SHAPE, **FAMILIES["modernbert"], "kv_heads": 4, "rope_scaling": LINEAR})
    values = models("llama3").config.to_huggingface()
    for change, said in (
        ({"rope_type": "dynamic"}, "dynamic"),
        ({"factor": "8"}, "factor"),
        ({"low_freq_factor": None}, "low_freq_factor"),
        ({"factor": -1.0}, "must be positive"),
    ):
        table = {**values["rope_scaling"], **change}
        with pytest.raises(ModelError, match=said):
            ModelConfig.from_huggingface({**values, "rope_scaling": table})


@pytest.mark.parametrize(
    "name,scaling,said",
    [
        ("yarn qwen3", LLAMA3, "Llama 3.1's rotary scaling"),
        ("yarn qwen3", replace(YARN, beta_fast=8.0), "other bounds"),
    ],
)
def test_what_has_no_place_in_llama_cpp(tmp_path, models, name, scaling, said):
    folder = tmp_path / "m"
    shutil.copytree(models(name).path, folder)
    values = replace(models(name).config, rope_scaling=scaling).to_huggingface()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert verify(folder, tokens=4).exit_code == 0  # transformers has it
    with pytest.raises(ModelError, match=said):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
