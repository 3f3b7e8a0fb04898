"""`verify` and the exports on encoders and encoder–decoders: transformers agrees, and what is broken is found."""

import json
import shutil

import numpy as np
import pytest
from conftest import lexmill, randomise

from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.runtimes.huggingface import export_huggingface
from lexmill.runtimes.verify import verify
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

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
    "modernbert": ("modernbert", "wordpiece", dict(mlm=True, layers=4, local_window=8)),
    "t5 1.1": ("t5", "unigram", dict(decoder_layers=2, tied=False)),
    "t5 1.0": (
        "t5",
        "unigram",
        dict(decoder_layers=1, gated=False, activation="relu", scale_output=True),
    ),
    "t5 deep decoder": ("t5", "unigram", dict(decoder_layers=3)),
}
CHECKS = {
    "bert": "tokens, logits, pairs, embeddings, fill",
    "bert masked": "tokens, logits, embeddings, fill",
    "bert pairs": "tokens, pairs, embeddings",
    "bert without heads": "tokens, embeddings",
    "modernbert": "tokens, logits, embeddings, fill",
    "t5 1.1": "tokens, logits, greedy, beams, stop tokens",
    "t5 1.0": "tokens, logits, greedy, beams, stop tokens",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    folder, made, tokenizers = tmp_path_factory.mktemp("models"), {}, {}

    def get(name):
        family, kind, flags = MODELS[name]
        if kind not in tokenizers:
            options = {"sentinels": 10} if kind == "unigram" else {"lowercase": True}
            settings = TokenizerConfig(kind=kind, vocab_size=500, **options)
            tokenizers[kind] = train_tokenizer([prose[:60_000]], settings)
        if name not in made:
            config = ModelConfig(**{**SHAPE, **FAMILIES[family], **FAMILY_DEFAULTS[family], **flags})
            weights = randomise(build_model(config)).weights()
            model = write_model_directory(folder / "own" / name, config, weights, tokenizers[kind])
            made[name] = ModelDirectory.open(export_huggingface(model, folder / name))
        return made[name]

    return get


def failed(report):
    return {check.check for check in report.checks if check.passed is False}


@pytest.mark.parametrize("name", CHECKS)
def test_transformers_agrees_on_every_shape(models, name):
    report = verify(models(name).path, tokens=12)
    assert report.exit_code == 0, report.table_rows()
    found = [check.check for check in report.checks]
    assert found == CHECKS[name].split(", ")
    assert all(check.figure is not None and check.figure <= check.tolerance for check in report.checks)
    json.dumps(report.to_json())


def test_what_transformers_cannot_write_is_not_checked(models):
    report = verify(models("t5 deep decoder").path, tokens=4)
    words = {check.check: check.passed for check in report.checks}
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
def test_one_weight_that_transformers_reads_otherwise_is_found(models, monkeypatch, name, weight, expected):
    """Both read the same files, so lexmill's side is what is turned here."""
    from lexmill.inference import torch_backend

    load = torch_backend.load_model

    def turned(directory):
        model = load(directory)
        weights = model.weights()
        weights[weight].reshape(-1)[7] += 0.5
        model.load_weights(weights)
        return model

    monkeypatch.setattr(torch_backend, "load_model", turned)
    report = verify(models(name).path, tokens=4)
    assert expected <= failed(report) and report.exit_code == 1, report.table_rows()


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
    words = {check.check: check.passed for check in verify(folder).checks}
    assert words == {"tokens": True, "logits": None, "pairs": None, "embeddings": True, "fill": None}


def test_tokenizers_that_leave_out_segments_are_found(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models("bert").path, folder)
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert failed(verify(folder)) == {"tokens"}


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 1.1"])
def test_exported_directories_are_whole(models, tmp_path, name):
    model = models(name)
    out = export_huggingface(model, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert {path.name for path in model.path.iterdir()} == names
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
