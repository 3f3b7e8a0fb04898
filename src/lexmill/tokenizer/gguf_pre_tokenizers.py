"""What cuts text into words before byte-level BPE, by the names that llama.cpp has for it, both ways.

llama.cpp has these compiled in (src/llama-vocab.cpp) and finds them by `tokenizer.ggml.pre`;
tokenizer.json spells them out. Each is a list of steps; every step cuts the pieces of the one
before. Only names whose form was seen to cut a set of hard texts as llama.cpp does are here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lexmill.config import suggest
from lexmill.errors import ModelError

# The pre-tokenizer that llama.cpp calls "qwen2" (Qwen team, Qwen2 tokenizer.json).
QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = "words and bytes"  # GPT-2's words, then bytes
_DIGITS = "single digits"
_BYTES = "bytes"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_LINES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_NO_PUNCTUATION = r" ?[^(\s|.,!?…。，、।۔،)]+"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """One of llama.cpp's forms.

    `steps` in the spelling of `spelled`. `whole_words`: a word that is a token is taken as it is,
    whatever the merges say (`ignore_merges` in tokenizer.json). `add_bos`: what holds where a file
    does not say.
    """

    steps: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


def _split(*patterns: str) -> tuple[str, ...]:
    return (*(f"split {pattern}" for pattern in patterns), _BYTES)


_QWEN2 = PreTokenizer(_split(QWEN2_PATTERN))
_GPT = PreTokenizer((_WORDS,))
_CODE = PreTokenizer((_DIGITS, _WORDS))
_LLAMA_BPE = PreTokenizer(_split(_LLAMA3), whole_words=True, add_bos=True)
_DBRX = PreTokenizer(_split(_LLAMA3))
_GPT4O = PreTokenizer(
    _split(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_ENDS}"
    )
)
_BLOOM = PreTokenizer(_split(_NO_PUNCTUATION))

# The first name of a form is the one that is written for it.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "qwen2": _QWEN2,
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2),
    "gpt-2": _GPT,
    **dict.fromkeys(("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat"), _GPT),
    **dict.fromkeys(("a.x-4.0", "mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais"), _GPT),
    **dict.fromkeys(("trillion", "granite-docling"), _GPT),
    "smollm": _CODE,
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _CODE),
    "mellum2": _CODE,
    "llama-bpe": _LLAMA_BPE,
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA_BPE),
    **dict.fromkeys(("lfm2", "jina-v5-nano"), _LLAMA_BPE),
    "dbrx": _DBRX,
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe"), _DBRX),
    "default": PreTokenizer(_split(_PUNCTUATION, _GPT2, r"\p{N}+", _THREE_DIGITS)),
    "falcon": PreTokenizer(_split(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
    "gpt-4o": _GPT4O,
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    "tekken": PreTokenizer(
        _split(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
            rf"\p{{N}}|{_ENDS}"
        ),
        whole_words=True,
        add_bos=True,
    ),
    "bloom": _BLOOM,
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), _BLOOM),
    "viking": PreTokenizer(_split(_NO_PUNCTUATION, r"\p{N}")),
    "bailingmoe": PreTokenizer(
        _split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]|\s+(?!\S)|\s+"
        )
    ),
    "seed-coder": PreTokenizer(
        _split(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ),
    "qwen35": PreTokenizer(
        _split(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ),
}


def pre_tokenizer(name: str, where: str) -> PreTokenizer:
    """The form that a file names.

    Raises:
        ModelError: it is none that tokenizer.json could express as llama.cpp applies it.
    """
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where}: the pre-tokenizer '{name[:60]}' (tokenizer.ggml.pre) is not known here.",
            f"{suggest(name, PRE_TOKENIZERS)} Take the model's Hugging Face directory instead.".strip(),
        )
    return PRE_TOKENIZERS[name]


def name_of(steps: tuple[str, ...], whole_words: bool) -> str | None:
    """llama.cpp's name for a form; None where it has none."""
    for name, form in PRE_TOKENIZERS.items():
        if (form.steps, form.whole_words) == (steps, whole_words):
            return name
    return None


def as_json(form: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` of tokenizer.json."""

    def one(step: str) -> dict[str, Any]:
        if step == _DIGITS:
            return {"type": "Digits", "individual_digits": True}
        if step in (_WORDS, _BYTES):
            return {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": step == _WORDS,
            }
        pattern = {"Regex": step.removeprefix("split ")}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}

    steps = [one(step) for step in form.steps]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def spelled(value: Any) -> tuple[str, ...]:
    """A canonical spelling of what the `pre_tokenizer` of tokenizer.json does to ids; offsets do not matter."""
    if not isinstance(value, Mapping):
        return ("nothing",)
    kind = value.get("type")
    if kind == "Sequence":
        return tuple(step for part in value.get("pretokenizers", []) for step in spelled(part))
    if kind == "ByteLevel" and not value.get("add_prefix_space"):
        return (_WORDS,) if value.get("use_regex", True) else (_BYTES,)
    if kind == "Digits" and value.get("individual_digits"):
        return (_DIGITS,)
    pattern = value.get("pattern") or {}
    if (
        kind == "Split"
        and value.get("behavior") == "Isolated"
        and not value.get("invert")
        and "Regex" in pattern
    ):
        return (f"split {pattern['Regex']}",)
    return (json.dumps(value, ensure_ascii=False, sort_keys=True),)
