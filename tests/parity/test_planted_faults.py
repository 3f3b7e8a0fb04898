"""The proof of the prover: known faults, planted one at a time in good files, and what `verify` says of each.

A fault is a function that spoils a GGUF file in memory. Each must be caught, and its cause named in words.
"""

import io
import json
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import randomise, with_bos

from lexmill.cli.verify import show_checks
from lexmill.formats.blocks import BLOCK_TYPES, encode
from lexmill.formats.gguf import GGUFFile, TensorToWrite, Value, write_gguf
from lexmill.inference.language_model import load
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.model.gguf_shapes import permute_rope, unpermute_rope
from lexmill.recipe.report_checks import verification
from lexmill.runtimes import verify_checks
from lexmill.runtimes.diagnosis import diagnose_file
from lexmill.runtimes.gguf_tokenizer import tokenizer_metadata
from lexmill.runtimes.llama_cpp import export_gguf
from lexmill.runtimes.verify import verify
from lexmill.runtimes.verify_checks import Comparison
from lexmill.runtimes.verify_reference import Reference
from lexmill.runtimes.verify_report import Check
from lexmill.runtimes.verify_stress import Stress, stress_texts
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

pytest.importorskip("xllamacpp")

SHAPE = dict(
    vocab_size=520, width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=256
)
Q, K = "blk.{}.attn_q.weight", "blk.{}.attn_k.weight"


def begins_with_bos(tokenizer):
    """The same tokenizer, but with a BOS before each text, and with another template than ChatML."""
    value = json.loads(tokenizer.json)
    with_bos(value)
    template = tokenizer.chat_template.replace("<|im_end|>' + '\n'", "<|im_end|>' + '\n\n'")
    return Tokenizer(json.dumps(value), tokenizer.ids, template)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, prose):
    """Four good models; their weights are random, but no two parts of them are alike."""
    folder = tmp_path_factory.mktemp("models")
    wordpiece = train_tokenizer(
        [prose[:60_000]], TokenizerConfig(kind="wordpiece", vocab_size=500, lowercase=True)
    )
    kinds = {
        "llama": ({"rope_theta": 20000.0}, tokenizer),
        "untied": ({"tied": False}, begins_with_bos(tokenizer)),
        "qwen2": ({"qkv_bias": True}, tokenizer),
        "bert": ({**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"], "mlm": True, "mlm_bias": True}, wordpiece),
    }
    made = {}
    for name, (flags, its_tokenizer) in kinds.items():
        config = ModelConfig(**{**SHAPE, **flags})
        weights = randomise(build_model(config)).weights()
        for own in ("embed.weight", "head.weight"):
            if own in weights and name != "bert":
                weights[own][its_tokenizer.vocab_size :] = 0  # rows without a token are never the likeliest
        made[name] = write_model_directory(folder / name, config, weights, its_tokenizer)
    return made


def spoiled(model, path, type, fault):
    """Export a model, but let a fault change `metadata` and `tensors` (float32, not rounded yet) on the way."""
    exact = export_gguf(model, path.with_suffix(".exact"), "f32")
    with GGUFFile.open(export_gguf(model, path, type)) as file, GGUFFile.open(exact) as unrounded:
        metadata = {}
        for key, value in file.metadata.items():
            kind, items = file.types[key].removeprefix("array of "), file.types[key].startswith("array of")
            metadata[key] = Value(kind, list(value) if items else value, items)
        read = SimpleNamespace(
            metadata=metadata,
            tensors={name: unrounded.read(name).copy() for name in file.tensors},
            types={name: info.type for name, info in file.tensors.items()},
        )
    fault(read)

    def row(name, tensor):
        kind = read.types.get(name, BLOCK_TYPES["F32"])
        return TensorToWrite(
            name, tensor.shape, kind, lambda: encode(np.ascontiguousarray(tensor, np.float32), kind)
        )

    write_gguf(path, read.metadata, [row(name, tensor) for name, tensor in read.tensors.items()])
    return path


def setting(key, change):
    """A fault: another value of one key."""

    def fault(file):
        old = file.metadata[key]
        file.metadata[key] = Value(old.type, change(old.value), old.items)

    return fault


def without(*keys):
    """A fault: keys that are left out."""

    def fault(file):
        for key in keys:
            del file.metadata[key]

    return fault


def token(change):
    return setting("tokenizer.ggml.tokens", change)


def template(change):
    return setting("tokenizer.chat_template", change)


def each(*names, change):
    """A fault: the tensors of all layers changed by one function."""

    def fault(file):
        for name in (name.format(layer) for name in names for layer in range(2)):
            file.tensors[name] = np.ascontiguousarray(change(file.tensors[name]))

    return fault


def exchanged(one, other):
    """A fault: two tensors in each other's place."""

    def fault(file):
        file.tensors[one], file.tensors[other] = file.tensors[other], file.tensors[one]

    return fault


def swap(row, one=0, other=1):
    row = list(row)
    row[one], row[other] = row[other], row[one]
    return row


def swap_used_merges(merges):
    """Two merges that compete for one letter: which comes first shows in the ids."""
    return [*merges[40:80], *merges[:40], *merges[80:]]


def padded_vocabulary(file):
    """Rows and tokens up to the next multiple of 64, as some trainers have them."""
    embedding, extra = file.tensors["token_embd.weight"], 576 - 520
    file.tensors["token_embd.weight"] = np.concatenate([embedding, np.zeros((extra, 64), np.float32)])
    texts, types = (file.metadata[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type"))
    texts += [f"[PAD{number}]" for number in range(520, 576)]
    types += [5] * extra
    setting("llama.vocab_size", lambda _: 576)(file)


def tied_head(file):
    del file.tensors["output.weight"]


def no_biases(file):
    for name in [name for name in file.tensors if name.endswith(("attn_q.bias", "attn_k.bias"))]:
        file.tensors[name][:] = 0


def shuffled_scales(file):
    """The scale of each block of 32 goes to the block before it."""
    blocks = file.tensors["blk.1.ffn_up.weight"].reshape(-1, 32)
    peaks = np.abs(blocks).max(1, keepdims=True)
    blocks *= np.roll(peaks, -1) / peaks


def zeros_at_the_end(file):
    file.tensors["blk.0.ffn_down.weight"].reshape(-1)[3000:] = 0


def one_bit(file):
    file.tensors["blk.1.attn_v.weight"][5, 7] *= -2


def other_model(file):
    for number, (name, tensor) in enumerate(file.tensors.items()):
        noise = np.random.default_rng(number).standard_normal(tensor.shape).astype(np.float32)
        file.tensors[name] = 1 + 0.2 * noise if tensor.ndim == 1 else 0.15 * noise


def to_bf16(weight):
    return (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)


def mark_ordinary(types):
    """Of <|im_start|>; llama.cpp itself mends <|im_end|>."""
    return [1 if number == 1 else kind for number, kind in enumerate(types)]


# (name, model, type of the file, fault, a check that must fail, a word of the cause)
FAULTS = [
    ("q and k not permuted", "llama", "f32", each(Q, K, change=lambda w: unpermute_rope(w, 4)), "logits", "not permuted"),
    ("q and k permuted twice", "llama", "q8_0", each(Q, K, change=lambda w: permute_rope(w, 4)), "weights", "permuted twice"),
    ("q and k of qwen2 permuted", "qwen2", "f32", each(Q, K, change=lambda w: permute_rope(w, 4)), "logits", "do not want it"),
    ("rope theta", "llama", "f32", setting("llama.rope.freq_base", lambda _: 10000.0), "logits", "RoPE theta"),
    ("rope theta left out", "llama", "f32", without("llama.rope.freq_base"), "logits", "RoPE theta"),
    ("norm epsilon", "llama", "f32", setting("llama.attention.layer_norm_rms_epsilon", lambda _: 1e-2), "logits", "epsilon"),
    ("context length", "llama", "f32", setting("llama.context_length", lambda _: 128), "weights", "context length"),
    ("BOS missing", "untied", "f32", setting("tokenizer.ggml.add_bos_token", lambda _: False), "tokens", "BOS is missing"),
    ("BOS left out", "untied", "f32", without("tokenizer.ggml.add_bos_token"), "tokens", "BOS is missing"),
    ("BOS too many", "llama", "f32", setting("tokenizer.ggml.add_bos_token", lambda _: True), "tokens", "extra BOS"),
    ("EOS id", "llama", "f32", setting("tokenizer.ggml.eos_token_id", lambda _: 300), "stop tokens", "EOS id"),
    ("template without a newline", "llama", "f32", template(lambda t: t.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")), "chat template", "newline is missing"),
    ("template without its end", "llama", "f32", template(lambda t: t[: t.index("{% if add")]), "chat template", "generation prompt"),
    ("another template", "llama", "f32", template(lambda t: t.replace("assistant", "model")), "chat template", "another one"),
    ("template left out", "untied", "f32", without("tokenizer.chat_template"), "chat template", "template is missing"),
    ("padded vocabulary", "llama", "f32", padded_vocabulary, "weights", "padded"),
    ("merges in another order", "llama", "f32", setting("tokenizer.ggml.merges", swap_used_merges), "tokens", "merges are swapped"),
    ("merges left out", "llama", "f32", setting("tokenizer.ggml.merges", lambda m: m[20:]), "tokens", "merges are not"),
    ("pre-tokenizer", "llama", "f32", setting("tokenizer.ggml.pre", lambda _: "default"), "tokens", "pre-tokenizer has the wrong name"),
    ("pre-tokenizer left out", "llama", "f32", without("tokenizer.ggml.pre"), "tokens", "names no pre-tokenizer"),
    ("two tokens swapped", "llama", "f32", token(lambda t: swap(t, 310, 400)), "tokens", "another order"),
    ("a control token is ordinary", "llama", "f32", setting("tokenizer.ggml.token_type", mark_ordinary), "tokens", "marked as"),
    ("untied head as tied", "untied", "f32", tied_head, "weights", "written as tied"),
    ("transposed, square", "llama", "q8_0", each("blk.{}.attn_output.weight", change=lambda w: w.T), "logits", "transposed"),
    ("transposed in memory", "llama", "f32", each("blk.{}.ffn_up.weight", change=lambda w: w.T.reshape(w.shape)), "logits", "transposed"),
    ("layers exchanged", "llama", "q8_0", exchanged("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"), "logits", "other's place"),
    ("gate and up exchanged", "llama", "f32", exchanged("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"), "logits", "other's place"),
    ("norms of another family", "llama", "f32", each("blk.{}.ffn_norm.weight", change=lambda w: w + 1), "logits", "one too large"),
    ("scales shuffled", "llama", "q8_0", shuffled_scales, "logits", "scales of quantised blocks are shuffled"),
    ("scaled", "llama", "q8_0", each("blk.{}.attn_output.weight", change=lambda w: w * 0.5), "logits", "multiplied with 0.5"),
    ("rounded before", "llama", "f32", each("blk.{}.ffn_up.weight", change=to_bf16), "weights", "rounded to BF16"),
    ("tensor cut off", "llama", "f32", zeros_at_the_end, "logits", "filled with zeros"),
    ("one weight", "llama", "f32", one_bit, "weights", "Single weights are damaged"),
    ("another model", "llama", "f32", other_model, "logits", "another model"),
    ("biases zero", "qwen2", "f32", no_biases, "logits", "filled with zeros"),
    ("pooling", "bert", "f32", setting("bert.pooling_type", lambda _: 2), "embeddings", "pooling"),
    ("norm epsilon of BERT", "bert", "f32", setting("bert.attention.layer_norm_epsilon", lambda _: 0.1), "embeddings", "epsilon"),
    ("CLS id", "bert", "f32", setting("tokenizer.ggml.bos_token_id", lambda _: 3), "tokens", "BOS id"),
]  # fmt: skip


def checked(model, path):
    report = verify(model.path, [path], prompts=["Once upon a time"], tokens=8)
    return report, {check.check for check in report.checks if check.passed is False}


@pytest.fixture
def without_transformers(monkeypatch):
    """It reads the model directory, which stays good: only llama.cpp is asked."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )


@pytest.mark.parametrize("type", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "untied", "qwen2", "bert"])
def test_a_good_file_passes(models, tmp_path, without_transformers, name, type):
    """Also when it is read and written again as the faults are: what fails below fails for its fault alone."""
    path = spoiled(models[name], tmp_path / "m.gguf", type, lambda file: None)
    assert path.read_bytes() == export_gguf(models[name], tmp_path / "again.gguf", type).read_bytes()
    report, failed = checked(models[name], path)
    assert not failed, report.table_rows()
    assert not report.diagnoses


@pytest.mark.parametrize("name,model,type,fault,check,word", FAULTS, ids=[row[0] for row in FAULTS])
def test_a_planted_fault_is_caught_and_named(
    models, tmp_path, without_transformers, name, model, type, fault, check, word
):
    path = spoiled(models[model], tmp_path / "m.gguf", type, fault)
    report, failed = checked(models[model], path)
    assert report.exit_code == 1
    assert check in failed, report.table_rows()
    assert word in report.diagnoses[0].cause, report.diagnoses
    assert report.to_json()["diagnoses"][0]["runtime"] == f"llama.cpp {type}"


def with_token(good, folder, text):
    """A good model whose vocabulary has one more token, special but no stop."""
    value = json.loads(good.tokenizer.json)
    value["added_tokens"].append({**value["added_tokens"][0], "id": 512, "content": text})
    named = Tokenizer(json.dumps(value), good.tokenizer.ids, good.tokenizer.chat_template)
    return write_model_directory(folder, good.config, good.weights(), named)


@pytest.mark.parametrize(
    "text,key", [("<reponame>", "fim_rep"), ("<|file_sep|>", "fim_sep"), ("[PAD]", "fim_pad")]
)
def test_a_text_at_which_llama_cpp_would_end_is_kept_from_it(
    models, tmp_path, without_transformers, text, key
):
    """It ends at marks of filling in the middle that it finds by their texts; not where the file gives them an id."""
    model, key = with_token(models["llama"], tmp_path / "m", text), f"tokenizer.ggml.{key}_token_id"
    report, failed = checked(model, export_gguf(model, tmp_path / "m.gguf", "f32"))
    assert not failed and not report.limited
    report, failed = checked(model, spoiled(model, tmp_path / "open.gguf", "f32", without(key)))
    assert failed == {"stop tokens"} and report.exit_code == 1
    (cause,) = [diagnosis.cause for diagnosis in report.diagnoses]
    assert f"{text!r} because of" in cause and "Export the model again" in cause


def test_a_text_that_ends_in_any_file_is_a_limit_only_where_it_is_rare(
    models, tmp_path, without_transformers, monkeypatch
):
    model = with_token(models["llama"], tmp_path / "m", "<eos>")
    path = export_gguf(model, tmp_path / "m.gguf", "f32")
    report, failed = checked(model, path)  # the random model often writes it
    assert failed == {"stop tokens"} and "'<eos>' because of" in report.diagnoses[0].cause
    assert "Export" not in report.diagnoses[0].cause
    monkeypatch.setattr(verify_checks, "_RARE", 1.0)
    report, failed = checked(model, path)
    (limit,) = [limit for check in report.checks for limit in check.limits]
    assert not failed and report.limited and "'<eos>'" in limit
    # another token that ends a text is no limit
    fault = setting("tokenizer.ggml.eot_token_id", lambda _: 300)
    _, failed = checked(model, spoiled(model, tmp_path / "other.gguf", "f32", fault))
    assert failed == {"stop tokens"}


def test_marks_of_a_model_that_fills_in_the_middle_are_left_to_llama_cpp(models):
    value = json.loads(models["llama"].tokenizer.json)
    texts = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<reponame>")
    value["added_tokens"] += [
        {**value["added_tokens"][0], "id": 512 + number, "content": text} for number, text in enumerate(texts)
    ]
    for left, keys in (
        (4, {}),
        (3, {}),  # without <reponame> there is nothing to say
    ):
        named = Tokenizer(
            json.dumps({**value, "added_tokens": value["added_tokens"][: 4 + left]}),
            models["llama"].tokenizer.ids,
        )
        assert not any(".fim_" in key for key in tokenizer_metadata(named, 520, "m")), keys
    del value["added_tokens"][4]  # no prefix, so nothing is filled in
    for number, token in enumerate(value["added_tokens"]):
        token["id"] = number if number < 4 else 508 + number
    named = Tokenizer(json.dumps(value), models["llama"].tokenizer.ids)
    assert tokenizer_metadata(named, 520, "m")["tokenizer.ggml.fim_rep_token_id"].value == named.ids.eos


def test_what_the_file_cannot_explain_is_said_to_be_the_runtime_s(models, tmp_path):
    path = export_gguf(models["llama"], tmp_path / "m.gguf", "f32")
    (only,) = diagnose_file("llama.cpp", path, models["llama"], {"rounding"})
    assert "Nothing in the file explains what was found in rounding" in only.cause


def test_a_cause_says_only_what_explains_a_failure(models, tmp_path):
    def fault(file):
        setting("tokenizer.ggml.eos_token_id", lambda _: 300)(file)
        setting("llama.rope.freq_base", lambda _: 1.0)(file)

    path = spoiled(models["llama"], tmp_path / "m.gguf", "f32", fault)
    for check, word in [("stop tokens", "EOS id"), ("logits", "RoPE theta")]:
        (only,) = diagnose_file("llama.cpp", path, models["llama"], {check})
        assert word in only.cause


def test_the_causes_are_in_the_table_the_json_and_the_report(models, tmp_path, without_transformers):
    from rich.console import Console

    path = spoiled(models["llama"], tmp_path / "m.gguf", "f32", setting("llama.context_length", lambda _: 64))
    report, _ = checked(models["llama"], path)
    report.write(tmp_path / "verify.json")
    found = json.loads((tmp_path / "verify.json").read_text())
    cause = "The context length is wrong: llama.context_length is 64, the model has 256."
    assert found["diagnoses"] == [{"runtime": "llama.cpp f32", "cause": cause}]
    assert report.table_rows()[-1] == ("llama.cpp f32", "likely cause", "", "", cause)
    screen = Console(width=200, record=True, file=io.StringIO())
    show_checks(found, screen)
    assert f"Likely cause, llama.cpp f32: {cause}" in screen.export_text()
    assert cause in verification(found["checks"], found["diagnoses"])


def test_generated_texts_are_the_same_each_time_and_composed():
    texts = stress_texts()
    assert len(texts) == 4000 and len(set(texts)) > 3800
    assert texts == stress_texts.__wrapped__()
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)
    letters = set("".join(texts))
    assert not [letter for letter in letters if unicodedata.category(letter) in ("Cn", "Co", "Cs")]
    scripts = {unicodedata.name(letter).split()[0] for letter in letters if letter.isalpha()}
    assert len(scripts) > 30, scripts


def test_a_difference_that_only_generated_texts_show_is_found(models):
    """A letter that is in none of the hard texts, and its place in the batch."""
    tokenizer = models["llama"].tokenizer
    check = Check("x", "tokens", True, 0, 0, "45 of 45 texts equal")

    def other(text):
        return [*tokenizer.encode(text.replace("Ա", "Բ"))]

    found = Stress(tokenizer).added_to(check, other)
    assert found.passed is False and found.figure > 0 and "Ա" in found.detail
    assert Stress(tokenizer).added_to(check, tokenizer.encode).passed


def test_a_user_who_reaches_a_control_token_is_found(models):
    """A runtime that reads every text as its own."""
    model = models["llama"]
    reference = Reference(load(model.path), model, ["The"], 2)

    class Trusting:
        tokenize_plain = staticmethod(model.tokenizer.encode)

    check = Comparison("x", Trusting(), reference, None).injection()
    assert check.passed is False and "a user's text becomes a control token" in check.detail

    class Careful:
        tokenize_plain = staticmethod(lambda text: model.tokenizer.encode(text, special=False))

    assert Comparison("x", Careful(), reference, None).injection().passed


@pytest.mark.parametrize("size", [0, 10, 3000, 60_000])
def test_a_file_that_is_cut_off_is_refused_and_said_so(models, tmp_path, without_transformers, size):
    path = export_gguf(models["llama"], tmp_path / "m.gguf", "f32")
    path.write_bytes(path.read_bytes()[:size])
    report, failed = checked(models["llama"], path)
    assert failed == {"weights"} and report.exit_code == 1
    assert "cut off" in report.diagnoses[0].cause and str(path) in report.diagnoses[0].cause
