"""Training a tokenizer: one entry, four kinds, each applied identically by transformers and, but for characters, llama.cpp."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Literal

from lexmill.errors import ConfigError, DataError
from lexmill.progress import SILENT, Progress, Task
from lexmill.tokenizer import special
from lexmill.tokenizer.fast import refuse_surrogates
from lexmill.tokenizer.gguf_pre_tokenizers import QWEN2_PATTERN
from lexmill.tokenizer.special import SPECIAL_TOKENS
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.unigram import train_unigram
from lexmill.tokenizer.wordpiece import train_wordpiece

_SMALLEST = {"bpe": 256 + len(SPECIAL_TOKENS), "wordpiece": 64, "unigram": 64}
_DEFAULT_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How to train a tokenizer.

    `kind`: "bpe" for decoders, "wordpiece" for encoders, "unigram" for encoder-decoders,
    "characters" for experiments in which each character of the text is a token.
    `vocab_size` counts everything: special tokens, sentinels, the 256 bytes of BPE. A vocabulary of
    characters is as large as the text makes it.
    `lowercase` (wordpiece): case and accents do not matter. `sentinels` (unigram): marks for what
    span corruption takes out.
    """

    kind: Literal["bpe", "wordpiece", "unigram", "characters"] = "bpe"
    vocab_size: int = _DEFAULT_SIZE
    min_frequency: int = 2
    lowercase: bool = False
    sentinels: int = 100

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "wordpiece", "unigram", "characters"):
            raise ConfigError(
                f"'kind' is {self.kind!r}.", "Kinds are bpe, wordpiece, unigram and characters."
            )
        if self.kind == "characters" and self.vocab_size != _DEFAULT_SIZE:
            raise ConfigError(
                "'vocab_size' of a tokenizer of characters is decided by the text.", "Leave it out."
            )
        if not 0 <= self.sentinels <= 10_000:
            raise ConfigError("'sentinels' must be from 0 to 10000.")
        if self.kind != "characters" and self.vocab_size < self.smallest:
            parts = {
                "bpe": "bytes and special tokens",
                "wordpiece": "special tokens and an alphabet",
                "unigram": "special tokens, sentinels and an alphabet",
            }
            raise ConfigError(f"'vocab_size' must be at least {self.smallest} ({parts[self.kind]}).")
        if self.vocab_size > 1 << 20:
            raise ConfigError("'vocab_size' of more than 2^20 is not supported.")

    @property
    def smallest(self) -> int:
        """The least `vocab_size` of this kind."""
        return _SMALLEST.get(self.kind, 0) + (self.sentinels if self.kind == "unigram" else 0)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, progress: Progress = SILENT) -> Tokenizer:
    """Train a tokenizer on `texts`.

    Raises:
        DataError: no text, a lone surrogate in it, or too little for a vocabulary of the size asked for.
    """
    with progress.task("training the tokenizer", None, "texts") as task:
        return _train(_Counted(texts, task), config)


def _train(counted: _Counted, config: TokenizerConfig) -> Tokenizer:
    if config.kind == "bpe":
        tokenizer = _train_bpe(counted, config)
    elif config.kind == "characters":
        tokenizer = _train_characters(counted)
    else:
        with _kept(counted) as kept:
            if counted.visible == 0:
                raise DataError("There is no text to train a tokenizer on.")
            if config.kind == "wordpiece":
                tokenizer = train_wordpiece(kept, config.vocab_size, config.min_frequency, config.lowercase)
            else:
                tokenizer = train_unigram(kept, config.vocab_size, config.sentinels)
    if counted.characters == 0:
        raise DataError("There is no text to train a tokenizer on.")
    reached = tokenizer.vocab_size
    if config.kind != "characters" and reached < config.vocab_size:
        fitting = _round_down(reached, config.smallest)
        raise DataError(
            f"These {counted.characters:,} characters allow a vocabulary of only {reached:,}, "
            f"not the {config.vocab_size:,} asked for.",
            f"Set tokenizer.vocab_size to {fitting} or less, or give more text."
            if fitting
            else "Give more text.",
        )
    return tokenizer


class _Counted:
    """Texts that are counted as they pass."""

    def __init__(self, texts: Iterable[str], task: Task) -> None:
        self._texts, self._task = texts, task
        self.characters = self.visible = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            refuse_surrogates([text])
            self.characters += len(text)
            self.visible += bool(text.strip())
            self._task.advance()
            yield text


class _Kept:
    """Texts that a file holds, to be read as often as needed."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)


@contextlib.contextmanager
def _kept(texts: Iterable[str]) -> Iterator[_Kept]:
    """The texts, which may come but once, in a file that lives as long as the block."""
    with tempfile.TemporaryFile("w+", encoding="ascii") as file:
        for text in texts:
            file.write(json.dumps(text) + "\n")
        yield _Kept(file)


def _train_bpe(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

    There is no normaliser, so that every Unicode text comes back unchanged, and llama.cpp, which
    runs none, gives the same ids.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

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
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(fast.to_str())


def _train_characters(texts: Iterable[str]) -> Tokenizer:
    """Each distinct character a token, in the order of their code points; others are unknown."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    found: set[str] = set()
    for text in texts:
        found.update(text)
    first = [*SPECIAL_TOKENS, special.UNKNOWN_CHARACTER]
    vocabulary = {text: token for token, text in enumerate([*first, *sorted(found)])}
    fast = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=special.UNKNOWN_CHARACTER))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in first])
    settings = special.tokenizer_config() | {"unk_token": special.UNKNOWN_CHARACTER}
    del settings["chat_template"]
    return Tokenizer(fast.to_str(), chat_template="", settings=settings)


def _round_down(size: int, smallest: int) -> int:
    """To a multiple of 64 where that leaves a vocabulary (kernels like such widths); 0 if none is left."""
    rounded = max(size // 64 * 64, smallest)
    return rounded if rounded <= size else 0


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str], limit_bytes: int = 1 << 20) -> float:
    """Mean UTF-8 bytes that a token stands for, over the first `limit_bytes` of `texts`."""
    size = tokens = 0
    for text in texts:
        tokens += len(tokenizer.encode_plain([text])[0])
        size += len(text.encode("utf-8"))
        if size >= limit_bytes:
            break
    return size / tokens if tokens else math.nan
