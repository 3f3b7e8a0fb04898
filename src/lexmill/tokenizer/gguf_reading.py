"""The tokenizer of a GGUF file as tokenizer.json: the same ids for the same text as llama.cpp gives.

The way back from `gguf_tokenizer`, for files made by anyone. llama.cpp's four kinds of vocabulary
are byte-level BPE ("gpt2"), SentencePiece's BPE ("llama"), WordPiece ("bert") and unigram ("t5").
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lexmill.errors import FormatError, ModelError
from lexmill.formats.charsmap import compile_charsmap
from lexmill.tokenizer import special
from lexmill.tokenizer.fast import panics_as_errors, parse
from lexmill.tokenizer.gguf_pre_tokenizers import as_json, pre_tokenizer
from lexmill.tokenizer.gguf_vocabulary import (
    BYTE,
    CONTROL,
    MASK,
    MASK_TAKES_SPACES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHITESPACE,
    Vocabulary,
)
from lexmill.tokenizer.loading import EMPTY, added_token, merges_of
from lexmill.tokenizer.special import SpecialIds
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.transformers_classes import (
    bert_template,
    byte_level,
    end_template,
    frame_template,
    metaspace,
)
from lexmill.tokenizer.wordpiece import normalizer as bert_normalizer

_SPACE = "▁"
_LONGEST_WORD = 100_000  # llama.cpp has no limit


def import_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Make a tokenizer of what a GGUF file says.

    Raises:
        ModelError: a form that tokenizer.json cannot express as llama.cpp applies it.
        FormatError: parts that contradict each other.
    """
    makers = {"gpt2": _byte_bpe, "llama": _sentencepiece_bpe, "bert": _wordpiece, "t5": _unigram}
    if vocabulary.model not in makers:
        raise ModelError(
            f"{vocabulary.where}: a tokenizer of the kind '{vocabulary.model[:60]}' is not supported.",
            f"Supported are {', '.join(makers)}.",
        )
    values, ids = makers[vocabulary.model](vocabulary)
    names = {
        key: vocabulary_text(values, token)
        for key, own in special.TOKEN_NAMES.items()
        if (token := getattr(ids, own)) is not None
    }
    decoder = vocabulary.model in ("gpt2", "llama") and not _is_encoder(vocabulary)
    segments = ["token_type_ids"] if vocabulary.model == "bert" and not _is_encoder(vocabulary) else []
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        **({"add_bos_token": ids.add_bos, "add_eos_token": False} if decoder else {}),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *segments, "attention_mask"],
        "model_max_length": special.NO_LIMIT,
    }
    if vocabulary.model == "bert":
        cased = not vocabulary.flag("normalizer.lowercase", True)
        settings |= {"do_lower_case": not cased, "tokenize_chinese_chars": True}
        settings["strip_accents"] = vocabulary.flag("normalizer.strip_accents", not cased)
    template = vocabulary.text("tokenizer.chat_template")
    text = json.dumps(values, ensure_ascii=False)
    try:
        return Tokenizer(text, ids, template, settings=settings)
    except FormatError:
        parse(text, vocabulary.where)  # says which file it is
        raise


def vocabulary_text(values: Mapping[str, Any], token: int) -> str:
    """The text of an id in tokenizer.json's values."""
    model = values["model"]
    if model["type"] == "Unigram":
        return str(model["vocab"][token][0])
    return next(text for text, number in model["vocab"].items() if number == token)


def _base(vocabulary: Vocabulary) -> dict[str, Any]:
    """What all kinds have in common: tokens that are found in a text before anything else happens."""
    marked = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    added = [
        added_token(text, token, special=marked[kind])
        for token, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types))
        if kind in marked
    ]
    return {**EMPTY, "added_tokens": added}


def _frame(vocabulary: Vocabulary, *, bos: bool, eos: bool) -> tuple[dict[str, Any] | None, bool]:
    """The template that puts BOS and EOS around a text, and whether there is a BOS."""
    first, last = vocabulary.id("bos"), vocabulary.id("eos")
    texts = vocabulary.texts
    before = first if first is not None and vocabulary.flag("add_bos_token", bos) else None
    after = last if last is not None and vocabulary.flag("add_eos_token", eos) else None
    if before is None and after is None:
        return None, False
    ids = {texts[token]: token for token in (before, after) if token is not None}
    begin = None if before is None else texts[before]
    end = None if after is None else texts[after]
    return frame_template(begin, end, ids), before is not None


def _byte_bpe(vocabulary: Vocabulary) -> tuple[dict[str, Any], SpecialIds]:
    form = pre_tokenizer(vocabulary.pre, vocabulary.where)
    values = _base(vocabulary) | {
        "pre_tokenizer": as_json(form),
        "decoder": byte_level(),
        "model": _bpe(_by_text(vocabulary), _pairs(vocabulary), whole_words=form.whole_words),
    }
    if _is_encoder(vocabulary):
        return _framed(vocabulary, values)
    values["post_processor"], add_bos = _frame(vocabulary, bos=form.add_bos, eos=False)
    return values, _decoder_ids(vocabulary, add_bos, vocabulary.id("unknown"))


def _is_encoder(vocabulary: Vocabulary) -> bool:
    """ModernBERT has byte-level BPE, which is a decoder's in every other model known here."""
    return vocabulary.values.get("general.architecture") == "modern-bert"


def _framed(vocabulary: Vocabulary, values: dict[str, Any]) -> tuple[dict[str, Any], SpecialIds]:
    """Byte-level BPE between [CLS] and [SEP], which llama.cpp knows as BOS and EOS."""
    cls, sep = vocabulary.id("bos"), vocabulary.id("eos")
    both = vocabulary.flag("add_bos_token", False) and vocabulary.flag("add_eos_token", False)
    if cls is None or sep is None or not both:
        raise ModelError(
            f"{vocabulary.where}: an encoder whose texts do not stand between [CLS] and [SEP] is not supported.",
            "Take the model's Hugging Face directory instead.",
        )
    values["post_processor"] = bert_template(vocabulary.texts[cls], vocabulary.texts[sep], cls, sep)
    mask = vocabulary.id("mask")
    if MASK_TAKES_SPACES in str(vocabulary.values.get("general.name", "")).lower():
        for token in values["added_tokens"]:
            token["lstrip"] |= (token["id"], token["content"]) == (mask, MASK)
    ids = SpecialIds(
        bos=None,
        eos=None,
        pad=vocabulary.id("padding"),
        stop=(),
        unk=vocabulary.id("unknown"),
        cls=cls,
        sep=sep,
        mask=mask,
    )
    return values, ids


def _decoder_ids(vocabulary: Vocabulary, add_bos: bool, unknown: int | None) -> SpecialIds:
    by_text = _by_text(vocabulary)
    return SpecialIds(
        bos=vocabulary.id("bos"),
        eos=vocabulary.id("eos"),
        pad=vocabulary.id("padding"),
        unk=unknown,
        sep=vocabulary.id("seperator"),
        mask=vocabulary.id("mask"),
        stop=vocabulary.ends(),
        add_bos=add_bos,
        sentinels=special.find_sentinels(by_text),
    )


def _by_text(vocabulary: Vocabulary) -> dict[str, int]:
    return {text: token for token, text in enumerate(vocabulary.texts)}


def _pairs(vocabulary: Vocabulary) -> list[list[str]]:
    """The merges; llama.cpp cuts at the first space after the first letter, and so do we."""
    known, pairs, seen = _by_text(vocabulary), [], set()
    for number, merge in enumerate(vocabulary.merges):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in known or right not in known or left + right not in known:
            raise FormatError(
                f"{vocabulary.where}: merge {number:,}, {merge[:60]!r}, does not make a token out of two.",
                "The file is damaged; make or copy it again.",
            )
        if (left, right) not in seen:  # of two equal merges llama.cpp takes the first
            seen.add((left, right))
            pairs.append([left, right])
    return pairs


def _bpe(
    by_text: Mapping[str, int],
    pairs: list[list[str]],
    *,
    unknown: str | None = None,
    bytes: bool = False,
    whole_words: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": bytes,
        "byte_fallback": bytes,
        "ignore_merges": whole_words,
        "vocab": dict(by_text),
        "merges": pairs,
    }


def _sentencepiece_bpe(vocabulary: Vocabulary) -> tuple[dict[str, Any], SpecialIds]:
    """SentencePiece stores scores instead of merges: of two neighbours the pair with the best one joins."""
    texts, where = vocabulary.texts, vocabulary.where
    if len(vocabulary.scores) != len(texts):
        raise FormatError(f"{where}: a tokenizer of the kind 'llama' needs 'tokenizer.ggml.scores'.")
    bytes_there = {texts[token] for token, kind in enumerate(vocabulary.types) if kind == BYTE}
    if bytes_there != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise ModelError(
            f"{where}: the vocabulary has {len(bytes_there)} of the 256 bytes, so that llama.cpp would "
            "fail on letters that it lacks.",
            "Take the model's Hugging Face directory instead.",
        )
    pieces = [token for token, kind in enumerate(vocabulary.types) if kind == NORMAL]
    pieces.sort(key=lambda token: -float(vocabulary.scores[token]))  # stable: equal scores keep their order
    merges = merges_of({texts[token]: rank for rank, token in enumerate(pieces)})
    template, add_bos = _frame(vocabulary, bos=True, eos=False)
    prefix = vocabulary.flag("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
    back = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = vocabulary.id("unknown")
    unknown = vocabulary.types.index(UNKNOWN) if unknown is None and UNKNOWN in vocabulary.types else unknown
    values = _base(vocabulary) | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            _by_text(vocabulary),
            merges,
            unknown=None if unknown is None else texts[unknown],
            bytes=True,
        ),
    }
    return values, _decoder_ids(vocabulary, add_bos, unknown)


def _wordpiece(vocabulary: Vocabulary) -> tuple[dict[str, Any], SpecialIds]:
    """llama.cpp marks what begins a word, with U+2581; tokenizer.json what continues one, with ##."""

    def spelling(text: str, kind: int) -> str:
        if kind in (CONTROL, UNUSED, UNKNOWN):
            return text
        return text[1:] if text.startswith(_SPACE) else f"##{text}"

    texts = [spelling(text, kind) for text, kind in zip(vocabulary.texts, vocabulary.types)]
    by_text = {text: token for token, text in enumerate(texts)}
    if len(by_text) < len(texts) or "" in by_text:
        raise FormatError(
            f"{vocabulary.where}: two tokens of the vocabulary are the same in BERT's spelling."
        )
    cls, sep = _first(vocabulary, "cls", "bos"), _first(vocabulary, "seperator", "eos")
    unknown = vocabulary.id("unknown")
    if cls is None or sep is None or unknown is None:
        raise FormatError(
            f"{vocabulary.where}: the file does not say which tokens are [CLS], [SEP] and [UNK]."
        )
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    strip = vocabulary.flag("normalizer.strip_accents", lowercase)
    normalizer = bert_normalizer(lowercase, strip)
    values = _base(vocabulary) | {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": bert_template(texts[cls], texts[sep], cls, sep),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": texts[unknown],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": by_text,
        },
    }
    values["added_tokens"] = [
        one | {"content": texts[one["id"]]} for one in values["added_tokens"] if one["special"]
    ]
    ids = SpecialIds(
        bos=None,
        eos=None,
        pad=vocabulary.id("padding"),
        stop=(),
        unk=unknown,
        cls=cls,
        sep=sep,
        mask=vocabulary.id("mask"),
    )
    return values, ids


def _first(vocabulary: Vocabulary, *names: str) -> int | None:
    return next((token for name in names if (token := vocabulary.id(name)) is not None), None)


def _unigram(vocabulary: Vocabulary) -> tuple[dict[str, Any], SpecialIds]:
    texts, where = vocabulary.texts, vocabulary.where
    if len(vocabulary.scores) != len(texts):
        raise FormatError(f"{where}: a tokenizer of the kind 't5' needs 'tokenizer.ggml.scores'.")
    unknown, end = vocabulary.id("unknown"), vocabulary.id("eos")
    unknown, end = 2 if unknown is None else unknown, 1 if end is None else end  # llama.cpp's defaults
    problems = {
        "no space before a text": not vocabulary.flag("add_space_prefix", True),
        "spaces that count one by one": not vocabulary.flag("remove_extra_whitespaces", True),
        "no token for unknown text or none for its end": max(unknown, end) >= len(texts),
        "a token before each text": vocabulary.flag("add_bos_token", False),
        "no token behind each text": not vocabulary.flag("add_eos_token", True),
    }
    for problem, present in problems.items():
        if present:
            raise ModelError(f"{where}: a unigram tokenizer with {problem} is not supported.")
    rows = [[text, float(score)] for text, score in zip(texts, vocabulary.scores)]
    values = _base(vocabulary) | {
        "post_processor": end_template(texts[end], end),
        "decoder": metaspace(),
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": rows, "byte_fallback": False},
    }
    values |= _unigram_spaces(_charsmap(vocabulary), where)
    pad = vocabulary.id("padding")
    by_text = {text: token for token, text in enumerate(texts)}
    ids = SpecialIds(
        bos=None,
        eos=end,
        pad=0 if pad is None else pad,
        stop=(end,),
        unk=unknown,
        sentinels=special.find_sentinels(by_text),
    )
    return values, ids


def _charsmap(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The compiled normalisation as a step of tokenizer.json."""
    stored = vocabulary.values.get("tokenizer.ggml.precompiled_charsmap")
    if stored is None or (isinstance(stored, np.ndarray) and not stored.size):
        return None
    if not isinstance(stored, np.ndarray) or stored.dtype.itemsize != 1:
        raise FormatError(f"{vocabulary.where}: the map of characters is no list of bytes.")
    data = stored.tobytes()
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or size > len(data) - 4:
        raise FormatError(
            f"{vocabulary.where}: the map of characters claims {size:,} bytes of {len(data) - 4:,}."
        )
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode("ascii")}


def _unigram_spaces(charsmap: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """How text is normalised and cut: as T5 has it where the map makes every whitespace a space.

    Otherwise only spaces are spaces, as in llama.cpp, which knows no other kind. A map that does
    nothing but name spaces, as lexmill's exports write it, becomes the steps that it stands for:
    `Precompiled` in tokenizers swallows a mark behind a space (an invisible joiner), llama.cpp does not.
    """
    cuts = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace()]}
    swap = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    if charsmap is not None:
        for letters, step in ((WHITESPACE + _SPACE, swap), (WHITESPACE, None)):
            own = base64.b64encode(compile_charsmap(dict.fromkeys(letters, " "))).decode("ascii")
            if charsmap["precompiled_charsmap"] == own:
                return {"normalizer": step, "pre_tokenizer": cuts}
        probe = parse(json.dumps({**EMPTY, "model": _ONE_PIECE, "normalizer": charsmap}), where)
        with panics_as_errors(f"{where}: the map of characters is damaged"):
            plain = all(probe.normalizer.normalize_str(letter) == " " for letter in WHITESPACE)
        if plain:
            return {"normalizer": charsmap, "pre_tokenizer": cuts}
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    steps = [*([charsmap] if charsmap else []), strip, replace]
    return {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": metaspace()}


_ONE_PIECE = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False}
