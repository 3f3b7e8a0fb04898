"""Training a byte-level BPE vocabulary that transformers and llama.cpp apply identically."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lexmill.errors import ConfigError, DataError
from lexmill.tokenizer.special import SPECIAL_TOKENS
from lexmill.tokenizer.tokenizer import Tokenizer

# The pre-tokenizer that llama.cpp calls "qwen2" (Qwen team, Qwen2 tokenizer.json).
QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How to train a tokenizer.

    `vocab_size` counts everything: 256 bytes, 4 special tokens, and merges.
    """

    vocab_size: int = 4096
    min_frequency: int = 2

    def __post_init__(self) -> None:
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise ConfigError(
                f"'vocab_size' must be at least {_SMALLEST_VOCABULARY} (bytes and special tokens)."
            )
        if self.vocab_size > 1 << 20:
            raise ConfigError("'vocab_size' of more than 2^20 is not supported.")


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) on `texts`.

    There is no normaliser, so that every Unicode text comes back unchanged, and llama.cpp, which
    runs none, gives the same ids.

    Raises:
        DataError: no text, or too little for a vocabulary of the size asked for.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    fast = tokenizers.Tokenizer(models.BPE(byte_fallback=False, ignore_merges=False))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(counted(), trainer)
    if characters == 0:
        raise DataError("There is no text to train a tokenizer on.")
    reached = fast.get_vocab_size()
    if reached < config.vocab_size:
        raise DataError(
            f"These {characters:,} characters allow a vocabulary of only {reached:,}, "
            f"not the {config.vocab_size:,} asked for.",
            f"Set tokenizer.vocab_size to {_round_down(reached):,} or less, or give more text.".replace(
                ",", ""
            ),
        )
    return Tokenizer(fast.to_str())


def _round_down(size: int) -> int:
    """To a multiple of 64 where that leaves a vocabulary: kernels like such widths."""
    return max(size // 64 * 64, _SMALLEST_VOCABULARY)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str], limit_bytes: int = 1 << 20) -> float:
    """Mean UTF-8 bytes that a token stands for, over the first `limit_bytes` of `texts`."""
    size = tokens = 0
    for text in texts:
        tokens += len(tokenizer.encode(text, special=False))
        size += len(text.encode("utf-8"))
        if size >= limit_bytes:
            break
    return size / tokens if tokens else math.nan
