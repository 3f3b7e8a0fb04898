"""WordPiece and unigram tokenizers as GGUF metadata: what llama.cpp calls "bert" and "t5"; and [CLS] text [SEP]."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.errors import ModelError
from lexmill.formats.charsmap import compile_charsmap
from lexmill.formats.gguf import Value, array, boolean, string, u32
from lexmill.tokenizer.gguf_vocabulary import CONTROL, UNKNOWN, UNUSED, WHITESPACE, refuse_problems
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.wordpiece import MARKS_LAST, SPACES_FIRST

_SPACE = "▁"
_HINT = "It can be exported in every other form; only llama.cpp has this tokenizer compiled in."


def wordpiece_metadata(
    tokenizer: Tokenizer, values: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str
) -> dict[str, Value]:
    """The keys of a WordPiece tokenizer.

    llama.cpp marks what begins a word, with U+2581, and not what continues one. It has no limit to
    a word's length, where `tokenizers` has one (100 characters in BERT's own file): such words differ.

    Args:
        values: tokenizer.json.
        texts: the token of each embedding row.
        types: llama.cpp's type of each.

    Raises:
        ModelError: a form that llama.cpp would apply differently.
    """
    model, ids = values["model"], tokenizer.ids
    normalizer = bert_normalizer(values)
    cls, sep = tokenizer.require_separators()
    refuse_problems(
        where,
        {
            "another mark than '##' for what continues a word": model.get("continuing_subword_prefix")
            != "##",
            "another normalizer than BERT's": normalizer.get("type") != "BertNormalizer",
            "a normalizer that keeps control characters": not normalizer.get("clean_text", True),
            "Chinese characters that do not stand alone": not normalizer.get("handle_chinese_chars", True),
            "another pre-tokenizer than BERT's": (values.get("pre_tokenizer") or {}).get("type")
            != "BertPreTokenizer",
            "another frame than [CLS] ... [SEP]": tokenizer.encode("") != [cls, sep],
            "no token for unknown words": ids.unk is None,
        },
        _HINT,
    )
    lowercase = bool(normalizer.get("lowercase", True))
    strip = normalizer.get("strip_accents")
    written = [
        text if type in (CONTROL, UNUSED) else text[2:] if text.startswith("##") else _SPACE + text
        for text, type in zip(texts, types)
    ]
    if len(set(written)) < len(written) or "" in written:  # llama.cpp aborts, or renames the empty one
        twice = next(text for text in written if not text or written.count(text) > 1)
        raise ModelError(
            f"{where}: in llama.cpp's spelling of WordPiece two tokens, or none, would be {twice!r}.", _HINT
        )
    return {
        "tokenizer.ggml.model": string("bert"),
        "tokenizer.ggml.tokens": array("string", written),
        "tokenizer.ggml.token_type": array("i32", list(types)),
        "tokenizer.ggml.normalizer.lowercase": boolean(lowercase),
        "tokenizer.ggml.normalizer.strip_accents": boolean(lowercase if strip is None else bool(strip)),
        **frame_metadata(tokenizer),
    }


def frame_metadata(tokenizer: Tokenizer) -> dict[str, Value]:
    """The ids of an encoder's tokenizer, and that it puts [CLS] before each text and [SEP] behind it."""
    ids = tokenizer.ids
    cls, sep = tokenizer.require_separators()
    optional = {"unknown": ids.unk, "padding": ids.pad, "mask": ids.mask}
    return {
        # [CLS] is what llama.cpp calls BOS; a pair is [CLS] A [SEP] B [SEP] only with these three flags
        "tokenizer.ggml.bos_token_id": u32(cls),
        "tokenizer.ggml.eos_token_id": u32(sep),
        "tokenizer.ggml.cls_token_id": u32(cls),
        "tokenizer.ggml.seperator_token_id": u32(sep),  # the real key is misspelt
        "tokenizer.ggml.add_bos_token": boolean(True),
        "tokenizer.ggml.add_eos_token": boolean(True),
        "tokenizer.ggml.add_sep_token": boolean(False),
        **{
            f"tokenizer.ggml.{name}_token_id": u32(token)
            for name, token in optional.items()
            if token is not None
        },
    }


def bert_normalizer(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """BERT's own step among the normalizers of tokenizer.json; empty where others than ours stand beside it."""
    steps = _steps(values.get("normalizer"), "normalizers")
    found = [step for step in steps if step not in (SPACES_FIRST, MARKS_LAST)]
    return found[0] if len(found) == 1 else {}


def unigram_metadata(
    tokenizer: Tokenizer, values: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str
) -> dict[str, Value]:
    """The keys of a unigram tokenizer as T5 has it. Arguments and errors as `wordpiece_metadata`."""
    model, ids = values["model"], tokenizer.ids
    cuts = _steps(values.get("pre_tokenizer"), "pretokenizers")
    normalizers = _steps(values.get("normalizer"), "normalizers")
    splits = [step.get("type") for step in cuts[:-1]] == ["WhitespaceSplit"]
    last = cuts[-1] if cuts else {}
    plain = [step for step in normalizers if not _merges_spaces(step)]
    swaps_space = any(_swaps_space(step) for step in plain)
    charsmaps = [step for step in plain if step.get("type") == "Precompiled"]
    refuse_problems(
        where,
        {
            "byte_fallback": bool(model.get("byte_fallback")),
            "another pre-tokenizer than T5's": last.get("type") != "Metaspace"
            or last.get("replacement") != _SPACE
            or last.get("prepend_scheme", "always") != "always"
            or not last.get("split", True)
            or (len(cuts) > 1 and not splits),
            "a normalizer that is not T5's": len(charsmaps) + swaps_space != len(plain) or len(plain) > 1,
            "spaces that count one by one": not splits
            and {step.get("type") for step in normalizers} & {"Strip", "Replace"} != {"Strip", "Replace"},
            "no token for unknown text, or none that ends a text": ids.unk is None or ids.eos is None,
            "another frame than a closing </s>": tokenizer.encode("") != [ids.eos],
        },
        _HINT,
    )
    scores = [-10_000.0] * len(texts)
    for token, (_, score) in enumerate(model["vocab"]):
        scores[token] = float(score)
    for text in tokenizer.special_texts:
        if tokenizer.vocabulary[text] >= len(model["vocab"]):
            scores[tokenizer.vocabulary[text]] = -1000.0
    kinds = [UNKNOWN if token == ids.unk else type for token, type in enumerate(types)]
    metadata = {
        "tokenizer.ggml.model": string("t5"),
        "tokenizer.ggml.tokens": array("string", list(texts)),
        "tokenizer.ggml.token_type": array("i32", kinds),
        "tokenizer.ggml.scores": array("f32", scores),
        "tokenizer.ggml.add_space_prefix": boolean(True),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(True),
        "tokenizer.ggml.eos_token_id": u32(ids.eos or 0),
        "tokenizer.ggml.unknown_token_id": u32(ids.unk or 0),
        "tokenizer.ggml.padding_token_id": u32((ids.eos or 0) if ids.pad is None else ids.pad),
        "tokenizer.ggml.add_bos_token": boolean(False),
        "tokenizer.ggml.add_eos_token": boolean(True),
    }
    if charsmaps:
        charsmap = base64.b64decode(charsmaps[0]["precompiled_charsmap"])
    else:
        # llama.cpp knows one kind of space; the others become it before anything else happens
        letters = (WHITESPACE if splits else "") + (_SPACE if swaps_space else "")
        charsmap = compile_charsmap({letter: " " for letter in letters})
    if charsmaps or splits or swaps_space:
        metadata["tokenizer.ggml.precompiled_charsmap"] = array("u8", list(charsmap))
    return metadata


def _steps(value: Any, parts: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, Mapping):
        return []
    if value.get("type") == "Sequence":
        return [step for part in value.get(parts) or [] for step in _steps(part, parts)]
    return [value]


def _merges_spaces(step: Mapping[str, Any]) -> bool:
    """Strip, or runs of spaces to one: what llama.cpp's remove_extra_whitespaces does."""
    if step.get("type") == "Strip":
        return bool(step.get("strip_right", True))
    pattern = step.get("pattern") or {}
    return (
        step.get("type") == "Replace"
        and pattern.get("Regex") in (" {2,}", " +")
        and step.get("content") in (" ", _SPACE)
    )


def _swaps_space(step: Mapping[str, Any]) -> bool:
    """The letter that stands for a space counts as one."""
    return (
        step.get("type") == "Replace"
        and (step.get("pattern") or {}).get("String") == _SPACE
        and step.get("content") == " "
    )
