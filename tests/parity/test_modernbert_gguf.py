"""ModernBERT in llama.cpp: its shape and its tokenizer there and back, and its embeddings against transformers'."""

import json

import numpy as np
import pytest
from conftest import randomise
from test_import_models import check_weights_are_gguf_s

from lexmill.errors import ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.language_model import load
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.runtimes.import_model import import_model
from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf
from lexmill.runtimes.verify import verify
from lexmill.runtimes.verify_cases import TEXTS
from lexmill.tokenizer.special import SpecialIds
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SHAPE = dict(
    vocab_size=520, width=64, layers=5, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128
)
FLAGS = {**FAMILIES["modernbert"], **FAMILY_DEFAULTS["modernbert"], "local_window": 8}
KINDS = {
    "modernbert": {"mlm": True},
    "every second layer global": {"global_every": 2, "local_theta": 20000.0, "local_window": 9},
    "no local layers": {"local_window": 0},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "gelu_tanh"},
}
MARKS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")


@pytest.fixture(scope="module")
def bpe(prose):
    """A tokenizer of ModernBERT's own form: GPT-2's words, [CLS] and [SEP], a mask that swallows spaces."""
    values = json.loads(train_tokenizer([prose[:60_000]], TokenizerConfig(vocab_size=500)).json)
    values["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = 1 + max(max(values["model"]["vocab"].values()), *(one["id"] for one in values["added_tokens"]))
    ids = dict(zip(MARKS, range(first, first + 5)))
    values["added_tokens"] += [
        {"id": token, "content": text, **plain, "lstrip": text == "[MASK]"} for text, token in ids.items()
    ]
    cls, sep = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("[CLS]", "[SEP]"))
    a, b = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [cls, a, sep],
        "pair": [cls, a, sep, b, sep],
        "special_tokens": {
            text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in ("[CLS]", "[SEP]")
        },
    }
    own = SpecialIds(
        bos=None,
        eos=None,
        pad=ids["[PAD]"],
        stop=(),
        unk=ids["[UNK]"],
        cls=ids["[CLS]"],
        sep=ids["[SEP]"],
        mask=ids["[MASK]"],
    )
    names = {f"{text.strip('[]').lower()}_token": text for text in MARKS}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    return Tokenizer(json.dumps(values), own, settings=settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory, bpe, prose):
    folder, made = tmp_path_factory.mktemp("models"), {}
    wordpiece = train_tokenizer(
        [prose[:60_000]], TokenizerConfig(kind="wordpiece", vocab_size=500, lowercase=True)
    )

    def get(name):
        if name not in made:
            flags = KINDS.get(name, {})
            config = ModelConfig(**{**SHAPE, **FLAGS, **flags})
            weights = randomise(build_model(config)).weights()
            tokenizer = wordpiece if name == "wordpiece" else bpe
            made[name] = write_model_directory(folder / name, config, weights, tokenizer)
        return made[name]

    return get


@pytest.mark.parametrize("name", [*KINDS, "wordpiece"])
def test_verify_agrees(tmp_path, models, name):
    """transformers, llama.cpp and lexmill; ids of hard texts, the mask among them, and embeddings."""
    model = models(name)
    files = [export_gguf(model, tmp_path / f"{type}.gguf", type) for type in ("f32", "q8_0")]
    report = verify(model.path, files)
    assert report.exit_code == 0, report.table_rows()
    checked = {check.check for check in report.checks if check.runtime == "llama.cpp f32" and check.passed}
    assert checked == {"tokens", "embeddings", "weights"}


def test_embeddings_are_transformers_own(tmp_path, models):
    """Straight from one to the other, longer than the window of local layers."""
    model = models("modernbert")
    theirs = transformers.AutoModel.from_pretrained(model.path).eval()
    with LlamaCpp(export_gguf(model, tmp_path / "m.gguf", "f32"), embeddings=True, threads=1) as runtime:
        for text in (TEXTS[0], " ".join(TEXTS[:4])[:120]):
            ids = runtime.tokenize(text)
            with torch.no_grad():
                meant = theirs(torch.tensor([ids])).last_hidden_state[0].mean(0).double().numpy()
            found = runtime.embed(ids)
            assert 1 - found @ meant / np.linalg.norm(found) / np.linalg.norm(meant) < 1e-5


def test_the_mask_swallows_spaces_in_every_runtime(tmp_path, models):
    model = models("modernbert")
    text = "It is a [MASK] universally"
    fast = transformers.AutoTokenizer.from_pretrained(model.path)
    meant = fast(text).input_ids
    assert meant != fast(text, add_special_tokens=False).input_ids
    with LlamaCpp(export_gguf(model, tmp_path / "m.gguf", "f32"), embeddings=True, threads=1) as runtime:
        assert runtime.tokenize(text) == meant == model.tokenizer.encode(text)


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", [*KINDS, "wordpiece"])
def test_files_come_back(tmp_path, models, name, type):
    model = models(name)
    path = export_gguf(model, tmp_path / "m.gguf", type)
    found = import_model(path, tmp_path / "m")
    fields = model.config.__dataclass_fields__
    heads = {"mlm", "mlm_bias"}  # for which a file has no place
    assert {key: getattr(found.config, key) for key in fields if key not in heads} == {
        key: getattr(model.config, key) for key in fields if key not in heads
    }
    check_weights_are_gguf_s(path, found)
    assert found.tokenizer.ids == model.tokenizer.ids
    for text in (*TEXTS, "a [MASK] b"):
        assert found.tokenizer.encode(text) == model.tokenizer.encode(text), text
    if type != "q8_0":
        again = export_gguf(found, tmp_path / "again.gguf", type)
        with GGUFFile.open(path) as before, GGUFFile.open(again) as after:
            assert {key: str(value) for key, value in before.metadata.items()} == {
                key: str(value) for key, value in after.metadata.items()
            }
            for tensor in before.tensors:
                np.testing.assert_array_equal(before.raw(tensor), after.raw(tensor), tensor)


@pytest.mark.parametrize("flags", [{"norm_bias": True}, {"mlp_bias": True}, {"activation": "relu"}])
def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path, bpe, flags):
    config = ModelConfig(**{**SHAPE, **FLAGS, **flags})
    weights = randomise(build_model(config)).weights()
    model = write_model_directory(tmp_path / "m", config, weights, bpe)
    with pytest.raises(ModelError, match="fits no model"):
        export_gguf(model, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


def test_a_fault_in_a_part_of_a_fused_matrix_is_found(tmp_path, models):
    model = models("modernbert")
    weights = model.weights()
    name = "encoder.blocks.2.attention.k.weight"
    weights[name] = weights[name][::-1].copy()
    other = write_model_directory(tmp_path / "m", model.config, weights, model.tokenizer)
    report = verify(model.path, [export_gguf(other, tmp_path / "m.gguf", "f16")])
    failed = {check.check for check in report.checks if check.passed is False}
    assert {"weights", "embeddings"} <= failed and report.diagnoses
    assert load(model.path).embed(["the sea"]).shape == (1, 64)
