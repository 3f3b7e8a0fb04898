"""WordPiece, unigram and character tokenizers: what they keep, what they refuse, and files made by others."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import ConfigError, DataError, FileError, FormatError, ModelError
from lexmill.formats import sentencepiece
from lexmill.formats.sentencepiece import parse_sentencepiece
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

CHINESE = "我爱北京天安门,天安门上太阳升。"
CONFIGS = {
    "wordpiece": TokenizerConfig(kind="wordpiece", vocab_size=500),
    "lowercase": TokenizerConfig(kind="wordpiece", vocab_size=500, lowercase=True),
    "unigram": TokenizerConfig(kind="unigram", vocab_size=500, sentinels=20),
    "characters": TokenizerConfig(kind="characters"),
}


@pytest.fixture(scope="module")
def texts(prose):
    return [prose[:50_000], CHINESE * 3]


@pytest.fixture(scope="module")
def kinds(texts):
    return {name: train_tokenizer(iter(texts), config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_texts_make_the_same_tokenizer(kinds, texts, name):
    again = train_tokenizer(texts, CONFIGS[name])
    assert again.json == kinds[name].json and again.sha256 == kinds[name].sha256
    assert name == "characters" or again.vocab_size == CONFIGS[name].vocab_size


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_lose_nothing(kinds, tmp_path, name):
    tokenizer = kinds[name]
    tokenizer.save(tmp_path, context=64)
    again = Tokenizer.load(tmp_path)
    assert (again.json, again.ids, again.chat_template) == (tokenizer.json, tokenizer.ids, "")
    assert again.settings == tokenizer.settings | {"model_max_length": 64}
    assert not (tmp_path / "chat_template.jinja").exists()
    assert (tmp_path / "generation_config.json").exists() == (tokenizer.kind != "wordpiece")
    assert again.kind == ("wordpiece" if name == "lowercase" else name)


def test_special_ids_of_each_kind(kinds):
    ids = kinds["wordpiece"].ids
    assert (ids.pad, ids.unk, ids.cls, ids.sep, ids.mask) == (0, 1, 2, 3, 4)
    assert (ids.bos, ids.eos, ids.stop, ids.sentinels) == (None, None, (), ())
    assert kinds["wordpiece"].require_mask() == 4 and kinds["wordpiece"].require_separators() == (2, 3)
    ids = kinds["unigram"].ids
    assert (ids.pad, ids.eos, ids.unk, ids.stop) == (0, 1, 2, (1,))
    assert ids.sentinels == tuple(range(499, 479, -1)) == kinds["unigram"].require_sentinels(20)
    assert kinds["unigram"].token_text(499) == "<extra_id_0>"


def test_a_tokenizer_that_lacks_what_is_needed_says_what_would_fit(kinds, tokenizer):
    with pytest.raises(ModelError, match=r"no \[MASK\] token.*--kind wordpiece"):
        kinds["unigram"].require_mask()
    with pytest.raises(ModelError, match=r"no \[CLS\] token.*--kind wordpiece"):
        tokenizer.encode_pair("a", "b")
    with pytest.raises(ModelError, match=r"no sentinels.*--kind unigram"):
        kinds["wordpiece"].require_sentinels()
    with pytest.raises(ModelError, match=r"has 20 sentinels.* needs 21"):
        kinds["unigram"].require_sentinels(21)


def test_chinese_characters_stand_alone(kinds):
    tokenizer = kinds["wordpiece"]
    ids = tokenizer.encode("我爱abc北京")
    assert [tokenizer.token_text(token) for token in (*ids[1:3], *ids[-3:-1])] == [*"我爱北京"]
    assert not tokenizer.continues_word[ids[1:3]].any()
    assert kinds["lowercase"].encode("ANNE ÉLLIOT") == kinds["lowercase"].encode("anne elliot")
    assert kinds["wordpiece"].encode("ANNE") != kinds["wordpiece"].encode("anne")


def test_pairs_have_segments(kinds):
    tokenizer = kinds["wordpiece"]
    (first,), (second,) = tokenizer.encode_plain(["the sea"]), tokenizer.encode_plain(["and Anne"])
    ids, segments = tokenizer.encode_pair("the sea", "and Anne")
    assert ids == [2, *first, 3, *second, 3]
    assert segments == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    ids, segments = kinds["unigram"].encode_pair("the sea", "and Anne")
    assert ids.count(1) == 2 and not any(segments)
    value = json.loads(tokenizer.json) | {"post_processor": None}  # then [CLS] and [SEP] are put by hand
    bare = Tokenizer(json.dumps(value), tokenizer.ids, "", settings={})
    assert bare.encode_pair("the sea", "and Anne") == tokenizer.encode_pair("the sea", "and Anne")
    assert bare.encode("the sea") == first


def test_plain_ids_have_nothing_around_them_and_special_texts_are_text(kinds):
    for name, text in {"wordpiece": "a [MASK] [SEP]", "unigram": "a </s> <extra_id_0> <pad>"}.items():
        tokenizer = kinds[name]
        special = {tokenizer.vocabulary[one] for one in tokenizer.special_texts} - {tokenizer.ids.unk}
        (plain,) = tokenizer.encode_plain([text])
        assert not special & set(plain)
        assert len(special & set(tokenizer.encode_plain([text], special=True)[0])) > 1
        before, after = ([2], [3]) if name == "wordpiece" else ([], [1])
        assert tokenizer.encode(text, special=False) == [*before, *plain, *after]
        assert tokenizer.encode_plain(["", text]) == [[], plain]


def test_which_tokens_continue_a_word(kinds, tokenizer):
    for name, mark, continues in (("wordpiece", "##", True), ("unigram", "▁", False), ("bpe", "Ġ", False)):
        one = tokenizer if name == "bpe" else kinds[name]
        assert one.continues_word.shape == (one.vocab_size,) and one.continues_word.dtype == np.bool_
        assert one.continues_word is one.continues_word
        for text, token in one.vocabulary.items():
            if text in one.special_texts:
                assert not one.continues_word[token]
            elif text[0] not in "Ċĉč":
                assert one.continues_word[token] == (text.startswith(mark) == continues), text
    assert not kinds["characters"].continues_word.any()


def test_characters_come_back_and_others_are_unknown(kinds, texts):
    tokenizer = kinds["characters"]
    assert tokenizer.vocab_size == len(set("".join(texts))) + 5
    assert tokenizer.decode(tokenizer.encode(texts[0][:2000])) == texts[0][:2000]
    assert len(tokenizer.encode("Anne\n  ж")) == 8 and tokenizer.encode("ж") == [tokenizer.ids.unk]
    assert tokenizer.encode("<|im_end|>")[0] == tokenizer.ids.eos


WORDS = st.lists(st.sampled_from(["Anne", "was", "captain", "of", "the", "sea", "could", "not", "Wentworth"]))


@given(words=WORDS)
@settings(max_examples=40, deadline=None)
def test_words_come_back(kinds, words):
    text = " ".join(words)
    for name in ("wordpiece", "unigram", "characters"):
        (ids,) = kinds[name].encode_plain([text])
        assert kinds[name].decode(ids) == text
        assert kinds[name].decode(kinds[name].encode(text), skip_special=True) == text


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_streamed_pieces_are_the_whole_text(kinds, name, data, skip):
    tokenizer = kinds[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def byte_fallback():
    """A vocabulary as Llama 2's: some pieces, and a token for each byte."""
    texts = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é", "▁▁", "\ufffd"]
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": [],
        },
    }


DECODERS = {
    "llama": byte_fallback()["decoder"],
    "none": None,
    "across tokens": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "aa"}, "content": "x"}],
    },
    "wordpiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "suffix": {"type": "BPEDecoder", "suffix": "a"},
    "ctc": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "▁", "cleanup": True},
}
_BYTES = st.sampled_from([*"你é𝄞".encode(), 0xFF]).map(lambda byte: byte + 2)


@pytest.mark.parametrize("name", DECODERS)
@given(ids=st.lists(st.one_of(_BYTES, st.integers(258, 263), st.integers(0, 1)), max_size=20))
@settings(max_examples=80, deadline=None)
def test_every_decoder_streams(name, ids):
    value = byte_fallback() | {"decoder": DECODERS[name]}
    tokenizer = Tokenizer(json.dumps(value), NONE, "", settings={})
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


NONE = train_tokenizer(["a b"], TokenizerConfig(kind="characters")).ids


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_what_cannot_be_trained_is_refused(kind):
    size = {} if kind == "characters" else {"vocab_size": 2000}
    config = TokenizerConfig(kind=kind, **size)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], config)
    with pytest.raises(DataError, match="lone surrogate"):
        train_tokenizer(["fine", "not \ud800 fine"], config)
    if kind in ("wordpiece", "unigram"):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(["", "  \n"], config)
    if size:
        with pytest.raises(DataError, match="allow a vocabulary of only"):
            train_tokenizer(["a short text, a short text"], config)


def test_rare_characters_beyond_half_of_the_vocabulary_become_unknown():
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 3000))), "the cat sat on the mat " * 50]
    for kind in ("wordpiece", "unigram"):
        tokenizer = train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=200, sentinels=10))
        assert tokenizer.vocab_size == 200 and tokenizer.ids.unk in tokenizer.encode("\u4fff")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "sentencepiece"}, "kind"),
        ({"kind": "bpe", "vocab_size": 259}, "at least 260"),
        ({"kind": "wordpiece", "vocab_size": 10}, "at least 64"),
        ({"kind": "unigram", "vocab_size": 150}, "at least 164"),
        ({"kind": "characters", "vocab_size": 100}, "decided by the text"),
        ({"kind": "unigram", "sentinels": -1}, "sentinels"),
    ],
)
def test_impossible_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        TokenizerConfig(**values)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({}, FileError, "no such tokenizer file"),
        ({"vocab.txt": b""}, FormatError, "unknown words"),
        ({"vocab.txt": b"[UNK]\n\xff"}, FormatError, "UTF-8"),
        ({"vocab.txt": b"hello\nworld\n"}, FormatError, "unknown words"),
        ({"vocab.json": b"[]", "merges.txt": b""}, FormatError, "map each token"),
        ({"vocab.json": b'{"a": "b"}', "merges.txt": b""}, FormatError, "map each token"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a\n"}, FormatError, "line 1"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 1\na b\n"}, FormatError, "line 2"),
        ({"vocab.json": b'{"a": 4000000000}', "merges.txt": b""}, FormatError, "not plausible"),
        ({"vocab.json": b'{"a": 0}'}, FileError, "no such tokenizer file"),
        ({"tokenizer.json": b"[]"}, FormatError, "no model"),
        ({"tokenizer.json": b"{}"}, FormatError, "no model"),
        ({"tokenizer.json": b'{"model": {"type": "BPE"}}'}, FormatError, "not a tokenizer file"),
        ({"tokenizer.json": b"[" * 100_000}, FormatError, "not a tokenizer file"),
        ({"tokenizer.model": b""}, FormatError, "no pieces"),
        ({"spiece.model": b"\x0a\xff\xff\xff\xff\x7f"}, FormatError, "bytes stands where"),
        ({"spiece.model": b"\x0a"}, FormatError, "ends inside"),
        ({"spiece.model": b"\xff" * 20}, FormatError, "does not end"),
        ({"spiece.model": b"\x0b\x00"}, FormatError, "no known kind"),
        ({"spiece.model": b"\x0a\x03\x0a\x01\xff"}, FormatError, "piece 0 is not valid UTF-8"),
        ({"spiece.model": b"\x0a\x03\x0a\x01a\x12\x02\x18\x04"}, FormatError, "only unigram"),
        ({"spiece.model": b"\x0a\x03\x0a\x01a\x12\x03\xc0\x02\x07"}, FormatError, "unknown piece is 7"),
    ],
)
def test_damaged_files_are_refused(tmp_path, files, error, said):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=said):
        Tokenizer.load(tmp_path)


@given(data=st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_sentencepiece_model_or_an_error(data):
    try:
        model = parse_sentencepiece(data)
    except FormatError:
        return
    assert model.pieces and model.type in (sentencepiece.UNIGRAM, sentencepiece.BPE)


def test_settings_of_others_survive(kinds, tmp_path):
    kinds["wordpiece"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    own = json.loads(path.read_text()) | {"tokenizer_class": "BertTokenizer", "padding_side": "left", "x": 1}
    path.write_text(
        json.dumps(own | {"additional_special_tokens": ["the"], "chat_template": "{{ messages }}"})
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert "the" in tokenizer.special_texts and tokenizer.chat_template == "{{ messages }}"
    tokenizer.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert again["tokenizer_class"] == "BertTokenizer" and again["padding_side"] == "left" and again["x"] == 1
    assert again["additional_special_tokens"] == ["the"]
    assert json.loads((tmp_path / "again" / "special_tokens_map.json").read_text())["mask_token"] == "[MASK]"
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_sentinels_are_counted_up_to_the_first_gap(kinds, tmp_path):
    value = json.loads(kinds["unigram"].json)
    for row in value["model"]["vocab"]:
        row[0] = row[0].replace("<extra_id_3>", "<other>")
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != "<extra_id_3>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert Tokenizer.load(tmp_path).ids.sentinels == (499, 498, 497)


def test_a_hostile_charsmap_is_an_error_and_no_crash(kinds):
    value = json.loads(kinds["unigram"].json)
    for packed in ("AAAA", "BAAAAP///w8=", "/////w=="):
        value["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": packed}
        with contextlib.suppress(FormatError):
            Tokenizer(json.dumps(value), kinds["unigram"].ids, "", settings={}).encode("some text é")


def test_added_tokens_of_a_byte_level_vocabulary_stream_as_they_decode(tokenizer):
    value, size = json.loads(tokenizer.json), tokenizer.vocab_size
    for number, text in enumerate(["é", "Ġx", "ñandú", "日本", "<x y>"]):
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        if text not in tokenizer.vocabulary:
            value["added_tokens"].append({"id": size + number, "content": text, **flags})
    extended = Tokenizer(json.dumps(value), tokenizer.ids)
    assert extended.vocab_size > size
    for token in range(extended.vocab_size):
        stream = extended.stream()
        assert stream.push(token) + stream.finish() == extended.decode([token])
