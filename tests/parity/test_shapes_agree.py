"""`verify` and the exports on encoders and encoder–decoders: the others agree, and what is broken is found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import lexmill
from made_models import model_maker

from lexmill.errors import ModelError
from lexmill.formats.gguf import GGUFFile, u32
from lexmill.inference.language_model import load
from lexmill.inference.native.library import available
from lexmill.inference.sampling import log_softmax
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.gguf_shapes import architecture, held_weights
from lexmill.runtimes import llama_cpp
from lexmill.runtimes.huggingface import export_huggingface
from lexmill.runtimes.llama_cpp import FILE_TYPES, export_gguf
from lexmill.runtimes.verify import verify

pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=520, width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128
)
HEADS = dict(mlm=True, mlm_bias=True, pooler=True, nsp=True)
MODELS = {
    "bert": ("bert", "wordpiece", HEADS),
    "bert masked": ("bert", "wordpiece", dict(mlm=True, mlm_bias=True, tied=False)),
    "bert pairs": ("bert", "wordpiece", dict(pooler=True, nsp=True)),
    "bert without heads": ("bert", "wordpiece", {}),
    "bert labels": ("bert", "wordpiece", dict(pooler=True, labels=("good", "坏", "c"))),
    "bert answers": ("bert", "wordpiece", dict(span=True)),
    "modernbert labels": ("modernbert", "wordpiece", dict(labels=("a", "b"), local_window=8)),
    "modernbert": ("modernbert", "wordpiece", dict(mlm=True, layers=4, local_window=8)),
    "t5 1.1": ("t5", "unigram", dict(decoder_layers=2, tied=False)),
    "t5 1.0": (
        "t5",
        "unigram",
        dict(decoder_layers=1, gated=False, activation="relu", scale_output=True),
    ),
    "t5 scaled": ("t5", "unigram", dict(decoder_layers=2, tied=False, scale_output=True)),
    "t5 deep decoder": ("t5", "unigram", dict(decoder_layers=3)),
}
OF_TOKENS = ("tokens", "stop tokens")  # of which the engine is not asked: both sides have one tokenizer
CHECKS = {
    "bert": "tokens, logits, pairs, embeddings, fill",
    "bert masked": "tokens, logits, embeddings, fill",
    "bert pairs": "tokens, pairs, embeddings",
    "bert without heads": "tokens, embeddings",
    "bert labels": "tokens, labels, embeddings",
    "bert answers": "tokens, answers, embeddings",
    "modernbert labels": "tokens, labels, embeddings",
    "modernbert": "tokens, logits, embeddings, fill",
    "t5 1.1": "tokens, logits, greedy, beams, stop tokens",
    "t5 1.0": "tokens, logits, greedy, beams, stop tokens",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    """Exported, so that the files are those which a user gets."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    kinds = {
        name: (kind, {**FAMILIES[family], **FAMILY_DEFAULTS[family], **flags})
        for name, (family, kind, flags) in MODELS.items()
    }
    own = model_maker(folder / "own", prose, SHAPE, kinds)

    def get(name):
        if name not in made:
            made[name] = ModelDirectory.open(export_huggingface(own(name), folder / name))
        return made[name]

    return get


def failed(report, runtime=None):
    """Names of the checks that failed, of all runtimes or of one."""
    return {
        check.check for check in report.checks if check.passed is False and runtime in (None, check.runtime)
    }


def asked_of(report, runtime):
    return [check.check for check in report.checks if check.runtime == runtime]


def passed_in_transformers(report):
    return {check.check: check.passed for check in report.checks if check.runtime == "transformers"}


@pytest.mark.parametrize("name", CHECKS)
def test_transformers_agrees_on_every_shape(models, name):
    report = verify(models(name).path, tokens=12)
    assert report.exit_code == 0, report.table_rows()
    asked = CHECKS[name].split(", ")
    assert asked_of(report, "transformers") == asked
    if available():
        assert asked_of(report, "engine") == [check for check in asked if check not in OF_TOKENS]
    assert all(check.figure is not None and check.figure <= check.tolerance for check in report.checks)
    json.dumps(report.to_json())


def test_what_transformers_cannot_write_is_not_checked(models):
    report = verify(models("t5 deep decoder").path, tokens=4)
    words = passed_in_transformers(report)
    assert words == {"tokens": True, "logits": True, "greedy": None, "beams": None, "stop tokens": None}
    assert report.exit_code == 2 and "more layers" in report.checks[2].detail


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 1.1", "llama"])
def test_a_model_without_tokenizer_is_compared_by_ids(models, model_path, tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(model_path if name == "llama" else models(name).path, folder)
    for path in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / path).unlink(missing_ok=True)
    report = verify(folder, tokens=4)
    assert report.exit_code == 0, report.table_rows()
    assert {check.check for check in report.checks} <= {"logits", "pairs", "embeddings"}
    assert not failed(verify(export_huggingface(folder, tmp_path / "hf"), tokens=4))


@pytest.mark.parametrize(
    "name,weight,expected",
    [
        ("bert", "encoder.blocks.1.mlp.down.weight", {"logits", "pairs", "embeddings"}),
        ("bert", "mlm.dense.weight", {"logits"}),
        ("bert", "pooler.weight", {"pairs"}),
        ("bert", "segment_embed.weight", {"logits", "pairs", "embeddings"}),
        ("modernbert", "encoder.blocks.2.attention.q.weight", {"logits", "embeddings"}),
        ("t5 1.1", "decoder.blocks.1.cross.v.weight", {"logits"}),
        ("t5 1.1", "encoder.relative.weight", {"logits"}),
    ],
)
def test_one_weight_that_a_runtime_reads_otherwise_is_found(models, monkeypatch, name, weight, expected):
    """All read the same files, so torch's side in lexmill is what is turned here."""
    from lexmill.model import load as loading

    load = loading.load_model

    def turned(directory, *more):
        model = load(directory, *more)
        weights = model.weights()
        weights[weight].reshape(-1)[7] += 0.5
        model.load_weights(weights)
        return model

    monkeypatch.setattr(loading, "load_model", turned)
    report = verify(models(name).path, tokens=4)
    assert report.exit_code == 1
    for runtime in ("transformers", "engine") if available() else ("transformers",):
        assert expected <= failed(report, runtime), report.table_rows()


def other_case(value):
    value["normalizer"] = {"type": "Lowercase"}


def other_form(value):
    value["normalizer"] = {"type": "NFKD"}


@pytest.mark.parametrize("name,change", [("bert", other_form), ("t5 1.1", other_case)])
def test_another_normalizer_is_found(models, monkeypatch, name, change):
    """transformers keeps the model's own; lexmill reads one with another normalizer."""
    from lexmill.tokenizer.tokenizer import Tokenizer

    model = models(name)
    value = json.loads(model.tokenizer.json)
    change(value)
    old = model.tokenizer
    other = Tokenizer(json.dumps(value), old.ids, "", settings=old.settings, generation=old.generation)
    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, folder: other))
    report = verify(model.path, tokens=4)
    assert "tokens" in failed(report) and report.exit_code == 1


def test_a_class_without_the_head_leaves_it_unchecked(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models("bert").path, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertModel"]}))
    words = passed_in_transformers(verify(folder))
    assert words == {"tokens": True, "logits": None, "pairs": None, "embeddings": True, "fill": None}


def test_tokenizers_that_leave_out_segments_are_found(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models("bert").path, folder)
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert failed(verify(folder)) == {"tokens"}


@pytest.mark.parametrize("name", ["bert", "bert masked", "bert without heads"])
def test_llama_cpp_embeds_as_lexmill_does(models, tmp_path, name):
    pytest.importorskip("xllamacpp")
    model = models(name)
    files = [export_gguf(model, tmp_path / f"{type}.gguf", type) for type in FILE_TYPES]
    report = verify(model.path, files)
    assert report.exit_code == 0, report.table_rows()
    for type in FILE_TYPES:
        assert asked_of(report, f"llama.cpp {type}") == ["weights", "tokens", "embeddings"]
        assert not available() or asked_of(report, f"engine {type}") == ["embeddings"]


def test_a_file_that_pools_otherwise_is_found(models, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    make, model = llama_cpp.shape_metadata, models("bert")
    with monkeypatch.context() as patch:
        first = {"bert.pooling_type": u32(2)}
        patch.setattr(llama_cpp, "shape_metadata", lambda *shape: make(*shape) | first)
        file = export_gguf(model, tmp_path / "m.gguf", "f32")
    assert {"weights", "embeddings"} <= failed(verify(model.path, [file]))


@pytest.mark.parametrize(
    "name,weight", [("bert", "encoder.blocks.1.mlp.down.weight"), ("t5 1.1", "head.weight")]
)
def test_one_weight_in_a_file_is_found(models, tmp_path, name, weight):
    model = models(name)
    weights = {own: found.copy() for own, found in model.weights().items()}
    weights[weight].reshape(-1)[7] += 3
    other = write_model_directory(tmp_path / "m", model.config, weights, model.tokenizer)
    report = verify(model.path, [export_gguf(other, tmp_path / "m.gguf", "q8_0")], tokens=4)
    assert "weights" in failed(report) and report.exit_code == 1


@pytest.mark.parametrize("name", ["t5 1.1", "t5 1.0", "t5 scaled"])
def test_llama_cpp_computes_t5_as_lexmill_does(models, tmp_path, name):
    """By its C interface. Its cache is in half precision there, which moves log-probabilities by about 0.01."""
    pytest.importorskip("xllamacpp")
    model, source, written = models(name), [5, 6, 7, 140, 33, 1], [0, 20, 130, 40, 77, 60]
    file = export_gguf(model, tmp_path / "m.gguf", "f32")
    script = Path(__file__).with_name("t5_in_llama_cpp.py")
    asked = [sys.executable, script, file, json.dumps([source, written])]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    theirs, ours = np.array(answer["logits"]), load(model.path).logits(source, written)
    assert answer["start"] == model.config.decoder_start
    difference = np.abs(log_softmax(theirs) - log_softmax(ours)).max()
    assert difference < 0.05 and (theirs.argmax(-1) == ours.argmax(-1)).all(), difference
    # the rows themselves too: without the scaling they would be other numbers, though not other choices
    assert np.abs(theirs - ours).max() < 0.05


def test_of_a_t5_file_the_weights_are_compared_and_the_rest_is_said_to_be_open(models, tmp_path):
    for name in ("t5 1.1", "t5 1.0", "t5 scaled"):
        model = models(name)
        files = [export_gguf(model, tmp_path / f"{type}.gguf", type) for type in FILE_TYPES]
        report = verify(model.path, files, tokens=2)
        ours = [check for check in report.checks if check.runtime.startswith("llama.cpp")]
        assert [(check.check, check.passed) for check in ours] == len(FILE_TYPES) * [
            ("weights", True),
            ("runs", None),
        ]
        assert not failed(report), [check for check in report.checks if check.passed is False]
        assert report.exit_code == 2 and "ends its process" in ours[1].detail
        for type in FILE_TYPES if available() else ():
            assert asked_of(report, f"engine {type}") == ["logits", "greedy", "beams"]
        with GGUFFile.open(files[0]) as file:
            back = llama_cpp.file_weights(file, model)
        assert set(back) == set(model.weights())
        for own, weight in model.weights().items():
            np.testing.assert_allclose(back[own], weight, rtol=1e-6)


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 1.0"])
def test_gguf_py_knows_every_name(models, tmp_path, name):
    gguf = pytest.importorskip("gguf")
    config = models(name).config
    arch = {known: number for number, known in gguf.MODEL_ARCH_NAMES.items()}[architecture(config)]
    names = gguf.get_tensor_name_map(arch, 8)
    held = held_weights(config)
    for one in held:
        plain = one.huggingface.removeprefix("bert.").removeprefix("model.")
        assert names.get_name(plain, (".weight", ".bias")) == one.gguf
    reader = gguf.GGUFReader(export_gguf(models(name), tmp_path / "m.gguf", "q8_0"))
    assert {tensor.name for tensor in reader.tensors} == {one.gguf for one in held}
    for tensor in reader.tensors:
        if "norm" in tensor.name or tensor.name in ("position_embd.weight", "token_types.weight"):
            assert tensor.tensor_type.name == "F32", tensor.name


@pytest.mark.parametrize(
    "name,change,said",
    [
        ("modernbert", {"hidden_activation": "relu", "classifier_activation": "relu"}, "activation 'relu'"),
        ("t5 deep decoder", {}, "more layers than the encoder"),
        ("bert", {"hidden_act": "silu"}, "activation 'silu'"),
        ("t5 1.1", {"relative_attention_max_distance": 64}, "relative positions up to 64"),
        ("t5 1.1", {"feed_forward_proj": "gated-silu"}, "activation 'silu' in its MLP"),
    ],
)
def test_what_llama_cpp_has_no_form_for_is_refused(models, tmp_path, name, change, said):
    folder = tmp_path / "m"
    shutil.copytree(models(name).path, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    if name == "modernbert":
        done = lexmill("export", "gguf", folder, "--out", tmp_path / "m.gguf")
        assert done.returncode == 2 and "fits no model of llama.cpp" in done.stderr


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 1.1"])
def test_exported_directories_are_whole(models, tmp_path, name):
    model = models(name)
    out = export_huggingface(model, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    kept = {"model.packed"}  # the engine's weights, where it has run the model: nobody else's business
    assert {path.name for path in model.path.iterdir()} - kept == names
    assert ("vocab.txt" in names) == (name != "t5 1.1")
    assert ("generation_config.json" in names) == (name == "t5 1.1")
    copy = ModelDirectory.open(out)
    assert copy.config == model.config
    assert all(np.array_equal(copy.weight(own), model.weight(own)) for own in model.weights())
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('path = "."', f"path = {str(out)!r}").replace("=100", "=3"), {})


def test_the_older_forms_of_a_tokenizer_are_exported_too(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models("bert").path, folder)
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}))
    out = export_huggingface(folder, tmp_path / "out")
    assert (out / "vocab.txt").is_file() and not (out / "tokenizer.json").exists()
    assert verify(out).exit_code == 0


@pytest.mark.parametrize("name", ["bert", "t5 1.1"])
def test_the_command(models, tmp_path, name):
    model = models(name).path
    done = lexmill("verify", model, "--tokens", 8, "--out", tmp_path / "v.json", "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal" in done.stdout and "DIFFERENT" not in done.stdout
    assert json.loads((tmp_path / "v.json").read_text())["passed"]
    done = lexmill("export", "ollama", model, "--out", tmp_path / "o" / "Modelfile")
    if name == "bert":  # Ollama serves its embeddings
        assert done.returncode == 0 and "TEMPLATE" not in (tmp_path / "o" / "Modelfile").read_text()
    else:
        assert done.returncode == 2 and "only decoders" in done.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["bert", "t5 1.1"])
def test_the_command_on_a_damaged_model(models, tmp_path, name):
    """A tokenizer whose settings tell transformers something else than lexmill reads in config.json."""
    folder = tmp_path / "m"
    shutil.copytree(models(name).path, folder)
    if name == "bert":
        path, change = folder / "tokenizer_config.json", {"model_input_names": ["input_ids"]}
    else:
        path, change = folder / "generation_config.json", {"decoder_start_token_id": 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = lexmill("verify", folder, "--tokens", 8, "--quiet")
    assert done.returncode == 1 and "DIFFERENT" in done.stdout, done.stdout + done.stderr
