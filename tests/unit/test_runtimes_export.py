"""Exports on small random models, without torch and without the runtimes."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from lexmill.errors import ConfigError, FileError, FormatError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.names import weight_names, weight_shapes
from lexmill.runtimes.gguf_tokenizer import tokenizer_metadata
from lexmill.runtimes.huggingface import export_huggingface
from lexmill.runtimes.llama_cpp import FILE_TYPES, export_gguf, permute_rope, weight_error
from lexmill.runtimes.model_card import licences, model_card
from lexmill.runtimes.verify_report import Check, VerifyReport
from lexmill.tokenizer.special import CHAT_TEMPLATE
from lexmill.tokenizer.tokenizer import Tokenizer

SHAPE = dict(
    vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=96, context=128
)
SHAPES = {
    "llama": {},
    "untied": {"tied": False},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "head_width": 32},
    "padded": {"vocab_size": 522},
}


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """Makes a model directory of any shape with random weights."""

    def make(folder, seed=0, lineage=None, **changes):
        config = ModelConfig(**{**SHAPE, **changes})
        rng = np.random.default_rng(seed)
        weights = {
            name: rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
            for name, shape in weight_shapes(config).items()
        }
        return write_model_directory(folder, config, weights, tokenizer, lineage or {})

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    lineage = {"name": "a|toy", "data": {"license": "CC0-1.0"}, "scores": {"loss": 2.5}, "steps": 10}
    return make_model(tmp_path_factory.mktemp("models") / "toy", lineage=lineage)


def edited(model, folder, name, change):
    """A copy of a model directory in which one JSON file is changed."""
    folder.mkdir()
    for path in model.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return ModelDirectory.open(folder)


@pytest.mark.parametrize("type", FILE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_holds_the_model(tmp_path, make_model, shape, type):
    model = make_model(tmp_path / "m", **SHAPES[shape])
    config, family = model.config, model.config.family
    with GGUFFile.open(export_gguf(model, tmp_path / "m.gguf", type.upper())) as file:
        metadata = file.metadata
        assert metadata["general.architecture"] == family and metadata["general.name"] == "m"
        assert metadata["general.file_type"] == FILE_TYPES[type]
        assert ("general.quantization_version" in metadata) == (type not in ("f32", "f16", "bf16"))
        assert metadata[f"{family}.attention.key_length"] == config.head_width
        assert metadata[f"{family}.attention.layer_norm_rms_epsilon"] == np.float32(config.norm_eps)
        assert metadata[f"{family}.rope.freq_base"] == config.rope_theta
        assert set(file.tensors) == {name.gguf for name in weight_names(config)}
        for info in file.tensors.values():
            if len(info.shape) == 1:
                assert info.type.name == "F32"
            elif "_k" not in type and info.name not in ("output.weight", "token_embd.weight"):
                assert info.type.name == type.upper()
        error, _ = weight_error(file, model)
        # all but all of what the type explains; of fewer bits a row must be within three times that
        assert error == 0 if type == "f32" else (0.5 if "8" in type or "16" in type else 0.3) < error <= 1
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        assert len(tokens) == len(types) == config.vocab_size == len(set(tokens))
        assert types[:4].tolist() == [3] * 4 and types[4] == 1
        assert set(types[512:]) <= {5} and tokens[512:] == [
            f"[PAD{i}]" for i in range(512, config.vocab_size)
        ]
        assert (
            metadata["tokenizer.ggml.pre"] == "qwen2" and metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
        )
        ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "padding")}
        assert ids == {"bos": 0, "eos": 2, "eot": 2, "padding": 3}
        assert (
            metadata["tokenizer.ggml.add_bos_token"] is False
            and metadata["tokenizer.ggml.add_eos_token"] is False
        )


def test_query_and_key_are_permuted_for_llama_only(tmp_path, make_model):
    rows = np.arange(8.0).reshape(8, 1)
    assert permute_rope(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert permute_rope(rows[:, 0], 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    for shape, heads in [("llama", 4), ("qwen2", 1)]:
        model = make_model(tmp_path / shape, **SHAPES[shape])
        with GGUFFile.open(export_gguf(model, tmp_path / "m.gguf", "f32")) as file:
            found, own = file.read("blk.1.attn_q.weight"), model.weight("decoder.blocks.1.attention.q.weight")
            np.testing.assert_array_equal(found, permute_rope(own, heads) if shape == "llama" else own)


def test_rows_that_do_not_divide_stay_f16(tmp_path, make_model):
    model = make_model(tmp_path / "m", width=40, mlp_width=64)
    with GGUFFile.open(export_gguf(model, tmp_path / "m.gguf", "q8_0")) as file:
        assert file.tensors["token_embd.weight"].type.name == "F16"
        assert file.tensors["blk.0.ffn_down.weight"].type.name == "Q8_0"


def test_weight_error_sees_a_single_weight(tmp_path, model, make_model):
    other = make_model(tmp_path / "m", seed=1)
    with GGUFFile.open(export_gguf(model, tmp_path / "m.gguf", "q8_0")) as file:
        assert weight_error(file, other)[0] > 10
        bigger = make_model(tmp_path / "b", layers=3)
        assert weight_error(file, bigger) == (
            float("inf"),
            "blk.2.attn_norm.weight is missing or has another shape",
        )


def test_unknown_type_and_weights_out_of_range(tmp_path, model):
    with pytest.raises(ConfigError, match="iq2_xs' is not supported"):
        export_gguf(model, tmp_path / "m.gguf", "iq2_xs")
    weights = model.weights() | {"decoder.blocks.0.mlp.up.weight": np.full((96, 64), 1e5, np.float32)}
    large = write_model_directory(tmp_path / "large", model.config, weights, model.tokenizer)
    with pytest.raises(FormatError, match=r"up_proj.*too large for F16"):
        export_gguf(large, tmp_path / "m.gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def set_split(value, pattern):
    value["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern


FORMS = {
    "no name for this pre-tokenizer": lambda value: set_split(value, r"\p{L}+"),
    "prefix space|no name": lambda value: value["pre_tokenizer"]["pretokenizers"][1].update(
        add_prefix_space=True
    ),
    "a normalizer": lambda value: value.update(normalizer={"type": "Lowercase"}),
    "ignore_merges": lambda value: value["model"].update(ignore_merges=True),
    "byte_fallback": lambda value: value["model"].update(byte_fallback=True),
    "not byte-level": lambda value: value.update(decoder={"type": "Fuse"}),
    "swallows": lambda value: value["added_tokens"][1].update(lstrip=True),
}


@pytest.mark.parametrize("message", FORMS)
def test_tokenizers_that_llama_cpp_would_apply_differently_are_refused(model, message):
    value = json.loads(model.tokenizer.json)
    FORMS[message](value)
    tokenizer = Tokenizer(json.dumps(value), model.tokenizer.ids)
    with pytest.raises(ModelError, match=message):
        tokenizer_metadata(tokenizer, 512, "toy")


def with_ids(tokenizer, **changes):
    return Tokenizer(tokenizer.json, dataclasses.replace(tokenizer.ids, **changes), tokenizer.chat_template)


def test_tokenizer_ids(model):
    tokenizer = model.tokenizer
    found = tokenizer_metadata(with_ids(tokenizer, bos=None, pad=None), 512, "toy")
    assert found["tokenizer.ggml.bos_token_id"].value == 2
    assert "tokenizer.ggml.padding_token_id" not in found
    found = tokenizer_metadata(with_ids(tokenizer, stop=(2, 0, 77)), 512, "toy")
    assert found["tokenizer.ggml.eom_token_id"].value == 77
    with pytest.raises(ModelError, match="room for one"):
        tokenizer_metadata(with_ids(tokenizer, stop=(2, 77, 78)), 512, "toy")
    with pytest.raises(ModelError, match="never stop"):
        tokenizer_metadata(with_ids(tokenizer, eos=None, stop=()), 512, "toy")
    with pytest.raises(ModelError, match="adds none"):
        tokenizer_metadata(with_ids(tokenizer, add_bos=True), 512, "toy")


def test_user_defined_tokens_and_bos(model):
    value = json.loads(model.tokenizer.json)
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    value["added_tokens"].append({"id": 512, "content": "<tool>", **plain})
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    found = tokenizer_metadata(Tokenizer(json.dumps(value), model.tokenizer.ids), 513, "toy")
    assert found["tokenizer.ggml.token_type"].value[512] == 4
    assert found["tokenizer.ggml.add_bos_token"].value is True


def test_huggingface_directory(tmp_path, model):
    out = export_huggingface(model, tmp_path / "out" / "toy")
    copy = ModelDirectory.open(out)
    assert copy.config == model.config and copy.tokenizer.json == model.tokenizer.json
    assert all(np.array_equal(copy.weight(name), model.weight(name)) for name in model.weights())
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc0-1.0"\n') and "# a\\|toy" in card and "| loss | 2.5 |" in card
    assert "| steps | 10 |" in card
    export_huggingface(model.path, out)  # an earlier export may be replaced
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["toy"]


def test_huggingface_completes_what_transformers_5_leaves_out(tmp_path, model):
    def thin(settings):
        del settings["chat_template"], settings["model_input_names"]
        settings["tokenizer_class"] = "TokenizersBackend"

    out = export_huggingface(edited(model, tmp_path / "m", "tokenizer_config.json", thin), tmp_path / "out")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (
        settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        and settings["chat_template"] == CHAT_TEMPLATE
    )


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("tokenizer_config.json", lambda v: v.update(chat_template="x"), "chat templates .* differ"),
        ("generation_config.json", lambda v: v.update(eos_token_id=[0]), r"'eos_token_id' is \[0\]"),
        ("config.json", lambda v: v.update(eos_token_id=[7]), r"'eos_token_id' \[7\]"),
    ],
)
def test_huggingface_refuses_files_that_disagree(tmp_path, model, name, change, message):
    with pytest.raises(ModelError, match=message):
        export_huggingface(edited(model, tmp_path / "m", name, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_huggingface_never_replaces_anything_else(tmp_path, model):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(FileError, match="would be replaced"):
        export_huggingface(model, tmp_path / "notes")
    with pytest.raises(FileError, match="the model itself"):
        export_huggingface(model, model.path)
    assert (tmp_path / "notes" / "a.txt").read_text() == "keep me"


def test_licences_and_card_of_a_model_without_lineage(tmp_path, make_model):
    assert licences({"a": [{"license": "MIT"}, {"licenses": ["CC0", "MIT"]}], "license_note": "x"}) == [
        "MIT",
        "CC0",
    ]
    card = model_card(make_model(tmp_path / "m"))
    assert "not recorded" in card and "license:" not in card and "How it was made" not in card


def test_report():
    same, different = Check("t", "logits", True, 1e-6, 1e-4), Check("t", "tokens", False, 2, 0)
    unknown = Check("l", "all", None, detail="not installed")
    for checks, passed, code in [
        ((), False, 2),
        ((unknown,), False, 2),
        ((same, unknown), True, 2),
        ((same, different), False, 1),
    ]:
        report = VerifyReport("m", {}, checks)
        assert (report.passed, report.exit_code) == (passed, code)
    assert [row[2:4] for row in VerifyReport("m", {}, (same, different, unknown)).table_rows()] == [
        ("same", "1e-06 ≤ 0.0001"),
        ("DIFFERENT", "2 > 0"),
        ("not checked", ""),
    ]


def test_report_is_written(tmp_path):
    VerifyReport("m", {"python": "3"}, (Check("t", "tokens", True, 0, 0, "x"),)).write(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["checks"][0] == {
        "runtime": "t",
        "check": "tokens",
        "passed": True,
        "figure": 0,
        "tolerance": 0,
        "detail": "x",
        "ties": 0,
        "limits": [],
    }


def test_nothing_heavy_is_imported():
    code = (
        "import sys, lexmill.runtimes.verify, lexmill.runtimes.ollama, lexmill.runtimes.llama_cpp\n"
        "assert not {'torch', 'transformers', 'xllamacpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"], check=True)
