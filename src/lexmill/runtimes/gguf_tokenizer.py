"""A tokenizer as GGUF metadata: everything that llama.cpp needs to cut text as tokenizer.json does.

llama.cpp has the pre-tokenizers compiled in and knows them by name, so only a tokenizer whose form
is one of those can be exported. Keys: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lexmill.errors import ModelError
from lexmill.formats.gguf import Value, array, boolean, string, u32
from lexmill.runtimes.gguf_encoder_tokenizers import frame_metadata, unigram_metadata, wordpiece_metadata
from lexmill.runtimes.gguf_sentencepiece import is_sentencepiece_bpe, sentencepiece_metadata
from lexmill.tokenizer.gguf_pre_tokenizers import name_of, spelled
from lexmill.tokenizer.gguf_vocabulary import (
    CONTROL,
    END_TEXTS,
    MASK,
    MASK_TAKES_SPACES,
    MIDDLE_TEXTS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    fills_in_the_middle,
    refuse_problems,
)
from lexmill.tokenizer.special import END_OF_TURN
from lexmill.tokenizer.tokenizer import Tokenizer


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, where: str) -> dict[str, Value]:
    """The `tokenizer.*` keys for a tokenizer of any kind that llama.cpp has.

    Args:
        tokenizer: as loaded from a model directory.
        rows: of the embedding; ids above the vocabulary become unused padding tokens.
        where: the model, for messages.

    Raises:
        ModelError: a tokenizer that llama.cpp would apply differently; says what differs.
    """
    values = json.loads(tokenizer.json)
    make = {"wordpiece": wordpiece_metadata, "unigram": unigram_metadata}.get(tokenizer.kind)
    if make is not None:
        return make(tokenizer, values, *_tokens(tokenizer, values, rows, where), where)
    pre = "" if is_sentencepiece_bpe(values) else _check_form(values, where)
    texts, types = _tokens(tokenizer, values, rows, where)
    if pre and _is_framed(tokenizer):
        return _byte_bpe(pre, values, texts, types, where) | frame_metadata(tokenizer)
    ids = tokenizer.ids
    end = ids.eos if ids.eos is not None else next(iter(ids.stop), None)
    if end is None:
        raise ModelError(
            f"{where}: no token ends a text, so llama.cpp would never stop.",
            "Set 'eos_token' in tokenizer_config.json.",
        )
    if pre:
        vocabulary = _byte_bpe(pre, values, texts, types, where)
    else:
        vocabulary = sentencepiece_metadata(values, texts, types, where)
    metadata = vocabulary | {
        # llama.cpp's default for each missing id is 11: write them even where nothing uses them
        "tokenizer.ggml.bos_token_id": u32(end if ids.bos is None else ids.bos),
        "tokenizer.ggml.eos_token_id": u32(end),
        "tokenizer.ggml.add_bos_token": boolean(adds_bos(tokenizer, where)),
        "tokenizer.ggml.add_eos_token": boolean(False),
    }
    if ids.pad is not None:
        metadata["tokenizer.ggml.padding_token_id"] = u32(ids.pad)
    unknown = values["model"].get("unk_token")
    if unknown is not None and unknown in tokenizer.vocabulary:
        metadata["tokenizer.ggml.unknown_token_id"] = u32(tokenizer.vocabulary[unknown])
    metadata |= _turn_ends(tokenizer, texts, end, where)
    metadata |= _no_other_ends(tokenizer, end)
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = string(tokenizer.chat_template)
    return metadata


def _byte_bpe(
    pre: str, values: Mapping[str, Any], texts: list[str], types: list[int], where: str
) -> dict[str, Value]:
    merges = [_merge_text(pair, where) for pair in values["model"]["merges"]]
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": array("string", texts),
        "tokenizer.ggml.token_type": array("i32", types),
        "tokenizer.ggml.merges": array("string", merges),
    }


def _is_framed(tokenizer: Tokenizer) -> bool:
    """Whether each text stands between [CLS] and [SEP], as encoders have it."""
    ids = tokenizer.ids
    return None not in (ids.cls, ids.sep) and tokenizer.encode("") == [ids.cls, ids.sep]


def model_name(name: str, tokenizer: Tokenizer) -> str:
    """A model's name as a file says it: llama.cpp lets it depend on the name whether the mask takes spaces."""
    mask = tokenizer.ids.mask
    if mask is None or tokenizer.kind == "wordpiece":  # to which spaces mean nothing
        return name
    takes = any(_takes_spaces(token, mask) for token in json.loads(tokenizer.json).get("added_tokens") or [])
    if takes == (MASK_TAKES_SPACES in name.lower()):
        return name
    return (
        f"{name} ({MASK_TAKES_SPACES})"
        if takes
        else re.sub(MASK_TAKES_SPACES, "modernbert", name, flags=re.I)
    )


def _takes_spaces(token: Mapping[str, Any], mask: int | None) -> bool:
    others = token.get("rstrip") or token.get("single_word")
    return (token["id"], token["content"]) == (mask, MASK) and bool(token.get("lstrip")) and not others


def adds_bos(tokenizer: Tokenizer, where: str) -> bool:
    """Whether the tokenizer puts its BOS before each text, judged by what it does.

    Raises:
        ModelError: it adds something else, or says that it adds a BOS and does not.
    """
    added = tokenizer.encode("")
    if added not in ([], [tokenizer.ids.bos]) or tokenizer.encode("a", special=True)[len(added) :] == []:
        raise ModelError(
            f"{where}: the tokenizer adds the ids {added} to each text; only one BOS is supported."
        )
    if tokenizer.ids.add_bos and not added:
        raise ModelError(
            f"{where}: tokenizer_config.json says 'add_bos_token', but tokenizer.json adds none.",
            "Make the two agree; every runtime would follow the one it reads.",
        )
    return bool(added)


def _turn_ends(tokenizer: Tokenizer, texts: list[str], end: int, where: str) -> dict[str, Value]:
    """llama.cpp stops at three ids that can be named, and at known texts; that must cover every stop id."""
    turn = tokenizer.vocabulary.get(END_OF_TURN, end)
    if turn not in tokenizer.ids.stop:
        turn = end
    rest = [
        token for token in tokenizer.ids.stop if token not in (end, turn) and texts[token] not in END_TEXTS
    ]
    if len(rest) > 1:
        raise ModelError(
            f"{where}: the ids {rest} end a text, but GGUF has room for one "
            "besides the end of text and of turn.",
            "Shorten 'eos_token_id' in generation_config.json.",
        )
    ends = {"tokenizer.ggml.eot_token_id": u32(turn)}
    return ends | ({"tokenizer.ggml.eom_token_id": u32(rest[0])} if rest else {})


def _no_other_ends(tokenizer: Tokenizer, end: int) -> dict[str, Value]:
    """Ids for marks that llama.cpp would otherwise find by their texts, and then end at.

    `<reponame>`, say, is an ordinary token for most models. The id given is one that ends a text
    anyway. Where a model does fill in the middle, its marks are left to llama.cpp.
    """
    vocabulary, stop = tokenizer.vocabulary, tokenizer.ids.stop
    if fills_in_the_middle(vocabulary):
        return {}
    return {
        f"tokenizer.ggml.{name}_token_id": u32(end)
        for name, texts in MIDDLE_TEXTS.items()
        if any(text in vocabulary and vocabulary[text] not in stop for text in texts)
    }


def _tokens(
    tokenizer: Tokenizer, values: Mapping[str, Any], rows: int, where: str
) -> tuple[list[str], list[int]]:
    texts = [f"[PAD{token}]" for token in range(rows)]
    types = [UNUSED] * rows
    for text, token in tokenizer.vocabulary.items():
        texts[token], types[token] = text, NORMAL
    for added in values.get("added_tokens") or []:
        swallows = any(added.get(key) for key in ("lstrip", "rstrip", "single_word"))
        if swallows and not _takes_spaces(added, tokenizer.ids.mask):
            raise ModelError(
                f"{where}: the added token {added['content']!r} swallows its surroundings (lstrip, rstrip or "
                "single_word); llama.cpp cannot do that."
            )
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    if len(set(texts)) != rows:  # llama.cpp aborts on such a file
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ModelError(f"{where}: two tokens have the text {twice!r}; llama.cpp needs them all to differ.")
    return texts, types


def _merge_text(pair: Any, where: str) -> str:
    if isinstance(pair, str):  # the older form of tokenizer.json
        return pair
    if any(" " in part for part in pair):
        raise ModelError(f"{where}: the merge {pair} holds a space; GGUF cannot express it.")
    return " ".join(pair)


def _check_form(values: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of the pre-tokenizer, after checking that nothing else would differ."""
    model, normalizer = values.get("model") or {}, values.get("normalizer")
    problems = {
        f"a model of type {model.get('type')}": model.get("type") != "BPE",
        "byte_fallback": bool(model.get("byte_fallback")),
        "dropout": bool(model.get("dropout")),
        "a prefix or suffix for parts of words": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        # Qwen's NFC is let through, as by llama.cpp's own converter: it leaves composed text alone
        "a normalizer": normalizer is not None and normalizer.get("type") != "NFC",
        "a decoder that is not byte-level": (values.get("decoder") or {}).get("type") != "ByteLevel",
    }
    refuse_problems(where, problems)
    steps, whole_words = spelled(values.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    name = name_of(steps, whole_words)
    if name is None:
        raise ModelError(
            f"{where}: llama.cpp has no name for this pre-tokenizer"
            f"{' with ignore_merges' if whole_words else ''}: {' then '.join(steps)[:200]}.",
            "Forms that can be exported: qwen2, gpt-2, smollm, llama-bpe and others that llama.cpp knows.",
        )
    return name
