"""SentencePiece's BPE as GGUF metadata: what llama.cpp calls "llama" (Llama 2, Mistral, Gemma's older kin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.formats.gguf import Value, array, boolean, string
from lexmill.tokenizer.gguf_vocabulary import BYTE, NORMAL, UNKNOWN, UNUSED, refuse_problems
from lexmill.tokenizer.loading import merges_of

_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_LETTER_SCORE = -1e4  # of what no merge makes; only the order of merged pieces decides anything


def is_sentencepiece_bpe(values: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json is of this kind: BPE of letters that falls back to bytes."""
    model, decoder = values.get("model") or {}, values.get("decoder") or {}
    letters = decoder.get("type") != "ByteLevel"
    return letters and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_metadata(
    values: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str
) -> dict[str, Value]:
    """The keys of the vocabulary; special ids are written as for byte-level BPE.

    llama.cpp joins the neighbours whose piece has the best score, tokenizer.json the pair that stands
    first among its merges: a piece's score is the rank of the first pair that makes it. Such scores
    are SentencePiece's own in the models that are known.

    Args:
        values: tokenizer.json.
        texts: the token of each embedding row.
        types: llama.cpp's type of each.

    Raises:
        ModelError: a form that llama.cpp would apply differently.
    """
    model = values["model"]
    normalizer = values.get("normalizer") or {}
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(texts)
    pairs = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    made = dict.fromkeys(left + right for left, right in pairs)
    ranks = {piece: rank for rank, piece in enumerate(made)}
    known = {text: ranks.get(text, len(ranks)) for text in model["vocab"]}
    marked = {token["content"] for token in values.get("added_tokens") or []}
    problems = {
        "another way with spaces than a '▁' before each text and for each of them": steps
        not in ([_PREPEND, _REPLACE], [_REPLACE]),
        "a pre-tokenizer": values.get("pre_tokenizer") is not None,
        "dropout or ignore_merges": bool(model.get("dropout") or model.get("ignore_merges")),
        f"{len(missing)} of the 256 bytes missing": bool(missing),
        "merges that leave pairs of pieces apart": not _all_pairs(pairs, known, marked),
    }
    refuse_problems(where, problems)
    unknown = model.get("unk_token")
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    kinds = [
        UNKNOWN if text == unknown else BYTE if text in bytes_ and kind == NORMAL else kind
        for text, kind in zip(texts, types)
    ]
    scores = [
        -float(ranks[text]) if text in ranks else _LETTER_SCORE if kind in (NORMAL, UNUSED) else 0.0
        for text, kind in zip(texts, kinds)
    ]
    return {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.tokens": array("string", list(texts)),
        "tokenizer.ggml.scores": array("f32", scores),
        "tokenizer.ggml.token_type": array("i32", kinds),
        "tokenizer.ggml.add_space_prefix": boolean(steps == [_PREPEND, _REPLACE]),
    }


def _all_pairs(pairs: Sequence[tuple[str, ...]], known: Mapping[str, int], marked: set[str]) -> bool:
    """Whether every pair of pieces that makes a piece is a merge, the best pieces first: llama.cpp tries them all."""
    plain = {text: rank for text, rank in known.items() if text not in marked}
    wanted = [tuple(pair) for pair in merges_of(plain)]
    by_piece = [left + right for left, right in pairs]
    return set(wanted) == set(pairs) and by_piece == [left + right for left, right in wanted]
