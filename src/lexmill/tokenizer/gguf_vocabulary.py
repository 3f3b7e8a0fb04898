"""The vocabulary of a GGUF file, checked: texts, types, scores, merges, special ids.

What a file says is not trusted: every id is inside the vocabulary, every list is as long as it
must be, and no two tokens have one text. Keys: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.errors import FormatError, ModelError
from lexmill.formats.gguf import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Unicode's White_Space, at which `WhitespaceSplit` cuts.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
# In a model with this in its name llama.cpp lets this mask swallow the spaces before it (src/llama-vocab.cpp).
MASK_TAKES_SPACES, MASK = "modern-bert", "[MASK]"

_PREFIX = "tokenizer.ggml."
_HINT = "The file is damaged, or was made by a tool that llama.cpp would not understand either."

# Tokens with these texts end generation in llama.cpp whatever the file says (src/llama-vocab.cpp).
# fmt: off
END_TEXTS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>",
        "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
        "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
    )
)
# It takes tokens with these texts for marks of filling in the middle and ends at them too, but only where the
# file gives the mark no id: the mark's name in the key `tokenizer.ggml.NAME_token_id`, and the texts.
MIDDLE_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Who fills in the middle needs these three, each under one of its names.
_INFILL_TEXTS = (
    ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
)
# fmt: on


def fills_in_the_middle(texts: Collection[str]) -> bool:
    """Whether llama.cpp would fill in the middle with a vocabulary of these texts."""
    return all(any(name in texts for name in names) for names in _INFILL_TEXTS)


EXPORTED_FORMS = (
    "Byte-level BPE, WordPiece, unigram and Llama 2's form of SentencePiece can be exported to GGUF."
)


def refuse_problems(where: str, problems: Mapping[str, bool], hint: str = EXPORTED_FORMS) -> None:
    """Refuse a tokenizer that llama.cpp would apply in another way without a word.

    Args:
        where: the model, for messages.
        problems: what llama.cpp would not do, and whether this tokenizer has it.

    Raises:
        ModelError: names the first that is there.
    """
    for problem, present in problems.items():
        if present:
            raise ModelError(
                f"{where}: the tokenizer has {problem}, which llama.cpp would not apply as tokenizer.json does.",
                hint,
            )


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a file says of its tokens.

    Attributes:
        model: "gpt2", "llama", "bert" or "t5".
        pre: name of the pre-tokenizer; "default" where there is none.
        texts: one per id, rows without a token at the end left out.
        types: as many; 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
        scores: float32, as many; empty where the file has none.
        merges: "left right", the first one first.
        rows: of the embedding.
    """

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    scores: np.ndarray
    merges: list[str]
    rows: int
    values: Mapping[str, Any]
    where: str

    def id(self, name: str) -> int | None:
        """A special token's id, e.g. `id("bos")`; None where the file names none.

        Raises:
            FormatError: it is outside the vocabulary.
        """
        key = f"{_PREFIX}{name}_token_id"
        token = self.values.get(key)
        if token is None:
            return None
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(self.texts):
            raise FormatError(
                f"{self.where}: '{key}' is {str(token)[:60]}, but there are {len(self.texts):,} tokens.",
                _HINT,
            )
        return token

    def flag(self, name: str, default: bool) -> bool:
        """A yes or no of the tokenizer, e.g. `flag("add_bos_token", False)`.

        Raises:
            FormatError: it is something else.
        """
        value = self.values.get(_PREFIX + name, default)
        if not isinstance(value, bool):
            raise FormatError(f"{self.where}: '{_PREFIX}{name}' is {str(value)[:60]}, not true or false.")
        return value

    def text(self, key: str) -> str:
        """A text by its whole key; "" where there is none.

        Raises:
            FormatError: it is something else.
        """
        value = self.values.get(key, "")
        if not isinstance(value, str):
            raise FormatError(f"{self.where}: '{key}' is {str(value)[:60]}, not a text.")
        return value

    def ends(self) -> tuple[int, ...]:
        """Every id at which llama.cpp ends a text, the file's own first."""
        named = [self.id(name) for name in ("eos", "eot", "eom")]
        known = [token for token, text in enumerate(self.texts) if text in END_TEXTS]
        return tuple(dict.fromkeys(token for token in [*named, *known] if token is not None))


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Read and check the `tokenizer.*` keys of a file.

    Raises:
        FormatError: lists of other lengths than the tokens, ids that do not exist, two equal tokens.
    """
    where, values = str(file.path), file.metadata
    model = values.get(_PREFIX + "model")
    texts = values.get(_PREFIX + "tokens")
    if not isinstance(model, str) or not isinstance(texts, list) or not texts:
        raise FormatError(f"{where} has no tokenizer ('{_PREFIX}tokens').", "Take a file that has one.")
    if not all(isinstance(text, str) for text in texts):
        raise FormatError(f"{where}: '{_PREFIX}tokens' holds something else than texts.", _HINT)
    types = _numbers(values, "token_type", len(texts), where)
    kinds = [NORMAL] * len(texts) if types is None else [int(kind) for kind in types]
    if min(kinds) < 0 or max(kinds) > BYTE:
        raise FormatError(
            f"{where}: '{_PREFIX}token_type' has the unknown type {max(kinds, key=abs)}.", _HINT
        )
    scores = _numbers(values, "scores", len(texts), where)
    scores = np.zeros(0, np.float32) if scores is None else scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise FormatError(f"{where}: '{_PREFIX}scores' holds something that is no number.", _HINT)
    merges = values.get(_PREFIX + "merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise FormatError(f"{where}: '{_PREFIX}merges' holds something else than texts.", _HINT)
    used = len(texts)
    while used > 1 and kinds[used - 1] == UNUSED and texts[used - 1] == f"[PAD{used - 1}]":
        used -= 1
    if len(set(texts)) != len(texts) or "" in texts:
        first: dict[str, int] = {}
        twice = next(
            token for token, text in enumerate(texts) if not text or first.setdefault(text, token) != token
        )
        raise FormatError(
            f"{where}: token {twice:,}, {texts[twice][:60]!r}, is empty or the text of another token too.",
            _HINT,
        )
    pre = values.get(_PREFIX + "pre", "default")
    return Vocabulary(
        model=model,
        pre=pre if isinstance(pre, str) else "",
        texts=texts[:used],
        types=kinds[:used],
        scores=scores[:used],
        merges=merges,
        rows=len(texts),
        values=values,
        where=where,
    )


def _numbers(values: Mapping[str, Any], name: str, least: int, where: str) -> np.ndarray | None:
    array = values.get(_PREFIX + name)
    if array is None:
        return None
    if not isinstance(array, np.ndarray) or len(array) < least:
        raise FormatError(
            f"{where}: '{_PREFIX}{name}' is no list of numbers as long as that of the {least:,} tokens.",
            _HINT,
        )
    return array[:least]
