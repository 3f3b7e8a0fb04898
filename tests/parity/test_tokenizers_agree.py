"""Tokenizers of every kind give the ids that transformers and llama.cpp give: our own, and those made by others."""

import base64
import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import ModelError
from lexmill.formats.blocks import BLOCK_TYPES
from lexmill.formats.charsmap import compile_charsmap
from lexmill.formats.gguf import boolean, f32, string, u32, write_gguf
from lexmill.runtimes.gguf_tokenizer import tokenizer_metadata
from lexmill.runtimes.llama_cpp import LlamaCpp
from lexmill.runtimes.verify_cases import TEXTS
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

CHINESE = "我爱北京天安门,天安门上太阳升。人人生而自由,在尊严和权利上一律平等。"
HARD = (
    *TEXTS,
    CHINESE,
    "The 天安门 gate, and naïve Élodie's café: ÀÉÎõü",
    "[MASK] [CLS] x [SEP] [UNK] [PAD]",
    "<extra_id_0> and<extra_id_3>more <extra_id_999> </s> <pad> <unk>",
    "\u3000wide\u3000\u00a0space ▁under▁ ▁▁x ▁",
    "supercalifragilisticexpialidocious" * 5,
    "👩‍🚀🇨🇭 ok",
)
# transformers takes an empty second text for none
PAIRS = (("The end", "of it."), ("", "x"), ("我爱 Anne", "z"), ("a [SEP] b", "c"), ("x\ny", "  z  "))
KINDS = {
    "bpe": {"vocab_size": 400},
    "wordpiece": {"vocab_size": 500},
    "wordpiece, lowercase": {"vocab_size": 500, "lowercase": True},
    "unigram": {"vocab_size": 500, "sentinels": 30},
    "characters": {},
}


@pytest.fixture(scope="module")
def trained(prose):
    return {
        name: train_tokenizer(
            [prose[:60_000], CHINESE * 3], TokenizerConfig(kind=name.split(",")[0], **options)
        )
        for name, options in KINDS.items()
    }


def theirs(folder):
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(folder, texts=HARD, pairs=()):
    ours, other = Tokenizer.load(folder), theirs(folder)
    for text in texts:
        assert ours.encode(text) == other.encode(text), (text, other)
    for first, second in pairs:
        both = other(first, second, return_token_type_ids=True)
        assert ours.encode_pair(first, second) == (both["input_ids"], both["token_type_ids"]), (first, second)
    return ours, other


@pytest.mark.parametrize("kind", KINDS)
def test_our_tokenizers_are_the_same_in_transformers(tmp_path, trained, kind):
    trained[kind].save(tmp_path)
    pairs = PAIRS if kind not in ("bpe", "characters") else ()
    ours, other = assert_same(tmp_path, pairs=pairs)
    assert ours.json == trained[kind].json and ours.ids == trained[kind].ids
    for name in ("mask", "cls", "sep", "unk", "pad", "eos", "bos"):
        assert getattr(other, f"{name}_token_id") == getattr(ours.ids, name), name
    sentinels = [f"<extra_id_{number}>" for number in range(len(ours.ids.sentinels))]
    assert other.convert_tokens_to_ids(sentinels) == list(ours.ids.sentinels)
    wanted = ["input_ids", "token_type_ids", "attention_mask"]
    if "wordpiece" not in kind:
        wanted.remove("token_type_ids")
    assert list(other("a")) == wanted
    assert bool(other.chat_template) == bool(ours.chat_template)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{"model_type": "bert"}, {"model_type": "t5"}, {"model_type": "llama"}])
def test_the_model_beside_them_changes_nothing(tmp_path, trained, kind, config):
    trained[kind].save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(tmp_path)


@pytest.mark.parametrize("kind,name", [("wordpiece", "BertTokenizerFast"), ("unigram", "T5TokenizerFast")])
def test_the_classes_of_the_families_agree_too(tmp_path, trained, kind, name):
    """Who names BertTokenizer or T5Tokenizer gets the same ids, but for the cases that the docs list."""
    trained[kind].save(tmp_path)
    other = getattr(transformers, name).from_pretrained(tmp_path)
    for text in HARD:
        if not {"▁", "\x85"} & set(text) and max(map(len, text.split()), default=0) <= 100:
            assert other.encode(text) == trained[kind].encode(text), text


def write(folder, **files):
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        (folder / name.replace("__", ".")).write_text(text, "utf-8")
    return folder


def word_level():
    fast = tokenizers.Tokenizer(models.WordLevel({"the": 0, "end": 1, "?": 2, "un": 3}, unk_token="un"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast


def byte_level(**options):
    fast = tokenizers.Tokenizer(models.BPE(**options))
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([*TEXTS] * 3, trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=350))
    return fast


def letters():
    vocabulary = {letter: number for number, letter in enumerate(sorted(set("".join(TEXTS)) - {"é"}))}
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.decoder = decoders.Fuse()
    return fast


def suffixed():
    fast = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.decoder = decoders.BPEDecoder()
    fast.train_from_iterator(
        [*TEXTS] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>"),
    )
    return fast


def llama_form(prose):
    """A SentencePiece BPE with bytes to fall back on, as Llama 2's."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    fast = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.train_from_iterator([prose[:30_000]], trainers.BpeTrainer(vocab_size=500, special_tokens=first))
    value = json.loads(fast.to_str())
    value["added_tokens"] = value["added_tokens"][:3]
    value["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    value["pre_tokenizer"] = None
    value["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    fast = tokenizers.Tokenizer.from_str(json.dumps(value))
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return fast


def t5_form(prose):
    """As transformers 4 wrote T5's: a compiled normaliser, and two steps behind it."""
    config = TokenizerConfig(kind="unigram", vocab_size=300, sentinels=10)
    value = json.loads(train_tokenizer([prose[:30_000]], config).json)
    packed = base64.b64encode(compile_charsmap({"\n": " ", "é": "e", "Ｗ": "W"})).decode()
    steps = [
        {"type": "Precompiled", "precompiled_charsmap": packed},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]
    value["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return tokenizers.Tokenizer.from_str(json.dumps(value))


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
OTHERS = {
    "words, without any settings": (lambda prose: word_level(), {}),
    "words, the unknown one named": (
        lambda prose: word_level(),
        {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "un"}},
    ),
    "bytes with odd normalisers": (lambda prose: byte_level(), {}),
    "single letters": (lambda prose: letters(), {"config__json": {"model_type": "llama"}}),
    "ends of words marked": (lambda prose: suffixed(), {}),
    "llama, taken as it is": (
        llama_form,
        {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}},
    ),
    "llama, rebuilt": (
        llama_form,
        {"tokenizer_config__json": {"tokenizer_class": "LlamaTokenizer", **NAMED}},
    ),
    "llama, rebuilt in the old way": (
        llama_form,
        {
            "tokenizer_config__json": {
                "tokenizer_class": "LlamaTokenizerFast",
                "legacy": True,
                "add_bos_token": True,
                "add_eos_token": True,
                **NAMED,
            }
        },
    ),
    "llama, no space before": (
        llama_form,
        {"tokenizer_config__json": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    ),
    "llama, told to add no BOS": (
        llama_form,
        {"tokenizer_config__json": {"tokenizer_class": "TokenizersBackend", "add_bos_token": False, **NAMED}},
    ),
    "t5, taken as it is": (t5_form, {}),
    "t5, rebuilt": (
        t5_form,
        {"tokenizer_config__json": {"tokenizer_class": "T5TokenizerFast", "extra_ids": 10}},
    ),
    "t5, rebuilt for the model": (t5_form, {"config__json": {"model_type": "t5"}}),
    "bytes, rebuilt": (
        lambda prose: byte_level(),
        {"tokenizer_config__json": {"tokenizer_class": "GPT2Tokenizer", "bos_token": None}},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_tokenizers_of_any_kind_are_those_of_transformers(tmp_path, prose, name):
    make, files = OTHERS[name]
    made = make(prose)
    if name == "bytes, rebuilt":
        made.add_special_tokens(["<|endoftext|>"])
    write(tmp_path, tokenizer__json=made.to_str(), **files)
    ours, _ = assert_same(tmp_path)
    again = tmp_path / "again"
    ours.save(again)
    saved, _ = assert_same(again)
    assert (saved.json, saved.ids, saved.settings) == (ours.json, ours.ids, ours.settings)
    for text in ours.encode_plain(HARD):
        stream = ours.stream()
        assert "".join(map(stream.push, text)) + stream.finish() == ours.decode(text)


BERT_SETTINGS = (
    {},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"tokenize_chinese_chars": False, "model_max_length": 64},
)


@pytest.mark.parametrize("options", BERT_SETTINGS)
@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.txt"])
def test_a_bert_directory_follows_its_settings(tmp_path, trained, options, form):
    trained["wordpiece"].save(tmp_path)
    (tmp_path / ("vocab.txt" if form == "tokenizer.json" else "tokenizer.json")).unlink()
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "BertTokenizer", **options})
    (tmp_path / "special_tokens_map.json").unlink()
    ours, other = assert_same(tmp_path, pairs=PAIRS)
    assert ours.ids == trained["wordpiece"].ids and ours.require_mask() == other.mask_token_id
    ours.save(tmp_path / "again")
    again, _ = assert_same(tmp_path / "again", pairs=PAIRS)
    assert again.json == ours.json and again.settings == ours.settings
    (tmp_path / "tokenizer_config.json").unlink()  # a model's type says as much as a class
    write(tmp_path, config__json={"model_type": "bert"})
    assert_same(tmp_path)


def test_a_directory_of_merges_is_read(tmp_path, trained):
    model = json.loads(trained["bpe"].json)["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    write(
        tmp_path, vocab__json=model["vocab"], merges__txt=merges + "\n", config__json={"model_type": "gpt2"}
    )
    ours, _ = assert_same(tmp_path)
    assert ours.token_bytes(ours.encode("\n")[0]) == b"\n"
    assert ours.ids.eos == model["vocab"]["<|endoftext|>"]


def test_tokens_that_only_the_settings_list_are_added(tmp_path, trained):
    trained["wordpiece"].save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
    listed = {"500": {"content": "[NEW]", **plain}, "501": {"content": "word", **plain, "lstrip": True}}
    write(
        tmp_path,
        tokenizer_config__json={"tokenizer_class": "BertTokenizer", "added_tokens_decoder": listed},
    )
    ours, _ = assert_same(tmp_path, [*HARD, "a [NEW] word [new] words"])
    assert ours.vocab_size == 502


def protobuf(*fields):
    """Bytes of a protobuf message: (number, int | float | bytes | text) each."""

    def varint(value):
        value &= (1 << 64) - 1
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def spiece(rows, *, kind=1, charsmap=b"", ids=(2, -1, 1), byte_fallback=False):
    pieces = [(1, protobuf((1, text), (2, float(score)), (3, type))) for text, score, type in rows]
    unk, bos, eos = ids
    trainer = protobuf((3, kind), (35, int(byte_fallback)), (40, unk), (41, bos), (42, eos))
    normalizer = protobuf((1, "own"), (2, charsmap), (3, 1), (4, 1))
    return protobuf(*pieces, (2, trainer), (3, normalizer))


def t5_rows(tokenizer):
    rows = json.loads(tokenizer.json)["model"]["vocab"]
    types = {0: 3, 1: 3, 2: 2}
    return [(*row, types.get(token, 1)) for token, row in enumerate(rows) if "<extra_id" not in row[0]]


def test_a_sentencepiece_model_of_t5_is_what_its_class_makes_of_it(tmp_path, trained):
    """transformers needs two more packages to read the file, so its class gets the pieces by hand."""
    rows = t5_rows(trained["unigram"])
    (tmp_path / "spiece.model").write_bytes(spiece(rows))
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "T5Tokenizer", "extra_ids": 30})
    ours = Tokenizer.load(tmp_path)
    vocabulary = [(text, np.float32(score).item()) for text, score, _ in rows]
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(30))]
    other = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=30)
    for text in HARD:
        assert ours.encode(text) == other.encode(text), text
    assert ours.ids == trained["unigram"].ids
    ours.save(tmp_path / "again")
    assert_same(tmp_path / "again")


@pytest.fixture(scope="module")
def spm(tmp_path_factory, prose):
    """Models by SentencePiece itself, which need not be installed."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text(prose[:60_000] + CHINESE, "utf-8")

    def make(kind, **options):
        path = folder / f"{kind}{len(options)}"
        if not path.with_suffix(".model").exists():
            sentencepiece.SentencePieceTrainer.train(
                input=str(folder / "text.txt"),
                model_prefix=str(path),
                model_type=kind,
                vocab_size=600,
                minloglevel=2,
                num_threads=1,
                **options,
            )
        return path.with_suffix(".model")

    return make


T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def test_a_sentencepiece_model_of_t5_by_its_own_library(tmp_path, spm):
    shutil.copy(spm("unigram", **T5_IDS), tmp_path / "spiece.model")
    write(tmp_path, config__json={"model_type": "t5"})
    ours, _ = assert_same(tmp_path, pairs=PAIRS)
    assert len(ours.ids.sentinels) == 100 and ours.ids.sentinels[0] == ours.vocab_size - 1
    ours.save(tmp_path / "again")
    assert_same(tmp_path / "again", pairs=PAIRS)


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"legacy": True}])
def test_a_sentencepiece_model_of_llama_by_its_own_library(tmp_path, spm, options):
    shutil.copy(spm("bpe", byte_fallback=True), tmp_path / "tokenizer.model")
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", **options})
    ours, _ = assert_same(tmp_path)
    ours.save(tmp_path / "again")
    assert_same(tmp_path / "again")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_model_without_a_class_acts_as_its_own_library(tmp_path, spm, kind):
    import sentencepiece

    path = spm(kind, **T5_IDS)
    shutil.copy(path, tmp_path / "tokenizer.model")
    ours, other = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in HARD:
        if "▁" not in text and not text.startswith("<"):
            assert ours.encode(text) == other.encode(text), text


WIDTH, CONTEXT = 32, 64


def shape_keys(family):
    """The least that llama.cpp must know of a model of one layer."""
    sizes = {"context_length": CONTEXT, "embedding_length": WIDTH, "block_count": 1}
    sizes |= {"feed_forward_length": WIDTH, "attention.head_count": 1}
    if family == "t5encoder":
        sizes |= {"attention.key_length": WIDTH, "attention.value_length": WIDTH}
        sizes |= {"attention.relative_buckets_count": 8}
    norm = "layer_norm" if family == "bert" else "layer_norm_rms"
    return {
        "general.architecture": string(family),
        **{f"{family}.{key}": u32(size) for key, size in sizes.items()},
        f"{family}.attention.{norm}_epsilon": f32(1e-6),
        f"{family}.attention.causal": boolean(False),
    }


def bert_weights(rows):
    square, vector = (WIDTH, WIDTH), (WIDTH,)
    yield from (("token_embd.weight", (rows, WIDTH)), ("position_embd.weight", (CONTEXT, WIDTH)))
    yield ("token_types.weight", (2, WIDTH))
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        yield from ((f"{name}.weight", vector), (f"{name}.bias", vector))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
        yield from ((f"blk.0.{name}.weight", square), (f"blk.0.{name}.bias", vector))


def t5_weights(rows):
    square, vector = (WIDTH, WIDTH), (WIDTH,)
    yield from (("token_embd.weight", (rows, WIDTH)), ("enc.output_norm.weight", vector))
    yield ("enc.blk.0.attn_rel_b.weight", (8, 1))
    yield from ((f"enc.blk.0.{name}_norm.weight", vector) for name in ("attn", "ffn"))
    for name in ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down"):
        yield (f"enc.blk.0.{name}.weight", square)


def toy_gguf(path, tokenizer, rows=None):
    """A model of one layer of noise, around a tokenizer."""
    rows = rows or tokenizer.vocab_size
    family, weights = ("bert", bert_weights) if tokenizer.kind == "wordpiece" else ("t5encoder", t5_weights)
    metadata = shape_keys(family) | tokenizer_metadata(tokenizer, rows, "toy")
    if family == "bert":
        metadata["tokenizer.ggml.token_type_count"] = u32(2)
    rng = np.random.default_rng(0)
    tensors = [
        (name, shape, BLOCK_TYPES["F32"], lambda shape=shape: rng.random(shape, np.float32))
        for name, shape in weights(rows)
    ]
    write_gguf(path, metadata, tensors)
    return path


@pytest.mark.parametrize("kind", ["wordpiece", "wordpiece, lowercase", "unigram"])
def test_llama_cpp_gives_the_same_ids(tmp_path, trained, kind):
    pytest.importorskip("xllamacpp")
    tokenizer = trained[kind]
    with LlamaCpp(toy_gguf(tmp_path / "m.gguf", tokenizer, tokenizer.vocab_size + 3), threads=1) as runtime:
        for text in HARD:
            assert runtime.tokenize(text) == tokenizer.encode(text), text


def test_llama_cpp_gives_the_same_ids_for_t5_with_a_charsmap(tmp_path, trained):
    """As T5's own files are: the normalisation is compiled, and nothing is said of the letter for a space."""
    pytest.importorskip("xllamacpp")
    charsmap = compile_charsmap({"\n": " ", "\t": " ", "é": "e", "Ⅷ": "VIII", "ｗ": "w", "\r": ""})
    value = json.loads(trained["unigram"].json)
    packed = base64.b64encode(charsmap).decode()
    value["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": packed}
    tokenizer = Tokenizer(json.dumps(value), trained["unigram"].ids, "", settings={})
    with LlamaCpp(toy_gguf(tmp_path / "m.gguf", tokenizer), threads=1) as runtime:
        for text in ("é", "café\nⅧ a\tb", "ｗide 🇨🇭 \r\n x", "plain", "", "我 éé"):
            assert runtime.tokenize(text) == tokenizer.encode(text), text


LETTERS = st.sampled_from("aábéçя\n\t 我🦊")


@settings(max_examples=80, deadline=None)
@given(
    table=st.dictionaries(LETTERS, st.text(LETTERS, max_size=3), min_size=1),
    text=st.text(LETTERS, max_size=12),
)
def test_our_compiled_replacements_are_those_of_tokenizers(table, text):
    """Of single code points: of longer keys `tokenizers` takes the shortest."""
    theirs = normalizers.Precompiled(compile_charsmap(table))
    assert theirs.normalize_str(text) == "".join(table.get(letter, letter) for letter in text)


REFUSED = {
    "wordpiece": {
        "another mark": lambda value: value["model"].update(continuing_subword_prefix="@@"),
        "another normalizer": lambda value: value.update(normalizer={"type": "Lowercase"}),
        "do not stand alone": lambda value: value["normalizer"]["normalizers"][1].update(
            handle_chinese_chars=False
        ),
        "another pre-tokenizer": lambda value: value.update(pre_tokenizer={"type": "Whitespace"}),
        "another frame": lambda value: value.update(post_processor=None),
        "two tokens, or none": lambda value: value["model"]["vocab"].update(
            {"▁x": 500, "##▁x": 501, "##": 502}
        ),
    },
    "unigram": {
        "byte_fallback": lambda value: value["model"].update(byte_fallback=True),
        "another pre-tokenizer": lambda value: value.update(pre_tokenizer={"type": "WhitespaceSplit"}),
        "a normalizer": lambda value: value.update(normalizer={"type": "NFKC"}),
        "one by one": lambda value: value.update(pre_tokenizer=value["pre_tokenizer"]["pretokenizers"][1]),
        "another frame": lambda value: value.update(post_processor=None),
    },
}


@pytest.mark.parametrize("kind,message", [(kind, message) for kind in REFUSED for message in REFUSED[kind]])
def test_what_llama_cpp_would_apply_differently_is_refused(trained, kind, message):
    value = json.loads(trained[kind].json)
    REFUSED[kind][message](value)
    tokenizer = Tokenizer(json.dumps(value), trained[kind].ids, "", settings={})
    with pytest.raises(ModelError, match=message):
        tokenizer_metadata(tokenizer, 510, "toy")
