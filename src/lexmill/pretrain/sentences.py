"""Documents as sentences, and tokens as words: what masking and next-sentence prediction need to know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.data.documents import read_texts
from lexmill.data.shards import TokenShard, write_token_shard
from lexmill.errors import ConfigError, DataError
from lexmill.pretrain.made import Origin
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer

# Behind a full stop of Chinese, or of a spaced script and white space, and at the end of a line.
_END = re.compile(
    r"(?<=[。！？；…])(?=[^。！？；…”’」』）])|(?<=[。！？；…][”’」』）])(?=.)"
    r"|(?<=[.!?;])\s+|(?<=[.!?;][\"'”’)])\s+|\n+"
)
# Within a sentence: behind a comma or the like, and at white space between Chinese characters.
_CLAUSE = re.compile(
    r"(?<=[，、：])|(?<=,)(?=[\u4e00-\u9fff])|(?<=,)\s+|(?<=[\u4e00-\u9fff])\s+(?=[\u4e00-\u9fff])"
)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without white space around them.

    A text of a single sentence comes as its clauses, so that it, too, has a first and a second part.
    """
    sentences = _parts(_END, text)
    return sentences if len(sentences) > 1 else _parts(_CLAUSE, text)


def _parts(boundary: re.Pattern[str], text: str) -> list[str]:
    return [part for part in (piece.strip() for piece in boundary.split(text)) if part]


@dataclass(frozen=True)
class FlatSentences:
    """All sentences of a split, one behind the other.

    Attributes:
        ids: (tokens,), without separators.
        continues: (tokens,) booleans: whether a token continues the word of the one before.
        sizes: (sentences,) tokens of each.
        documents: (sentences,) which document each is of, ascending.
    """

    ids: np.ndarray
    continues: np.ndarray
    sizes: np.ndarray
    documents: np.ndarray


class Sentences:
    """The tokenized sentences of a split's documents, mapped from disk.

    Two token shards with the same cuts: one of ids, in which the tokenizer's separator stands
    between sentences, and one that is 1 where a token continues the word of the one before.
    """

    def __init__(self, ids: TokenShard, continues: TokenShard, separator: int) -> None:
        self._ids, self._continues, self._separator = ids, continues, separator

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int:
        """Tokens in all, separators included."""
        return self._ids.tokens

    def __getitem__(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, continues) of each sentence of document `index`; both (n,)."""
        ids, continues = self._ids[index].astype(np.int64), self._continues[index].astype(bool)
        cuts = np.flatnonzero(ids == self._separator)
        starts, ends = [0, *(cuts + 1)], [*cuts, len(ids)]
        return [(ids[a:b], continues[a:b]) for a, b in zip(starts, ends) if b > a]

    def flat(self) -> FlatSentences:
        """The sentences of all documents at once."""
        ids, offsets = np.asarray(self._ids.ids), np.asarray(self._ids.offsets)
        separates = ids == self._separator
        # a sentence begins behind a separator and at the beginning of a document
        starts = np.union1d(offsets[:-1], np.flatnonzero(separates) + 1)
        kept_before = np.concatenate([[0], np.cumsum(~separates)])
        sizes = np.diff(kept_before[np.append(starts, len(ids))])
        documents = np.searchsorted(offsets, starts, side="right") - 1
        some = sizes > 0
        return FlatSentences(
            ids[~separates].astype(np.int64),
            np.asarray(self._continues.ids)[~separates].astype(bool),
            sizes[some],
            documents[some],
        )


def tokenize_sentences(
    documents: Path,
    tokenizer: Tokenizer,
    out: Path,
    *,
    chinese_words: bool,
    splits: tuple[str, ...] = ("train", "validation"),
    progress: Progress = SILENT,
) -> dict[str, Sentences]:
    """Turn the text documents of the splits into `Sentences`, in token shards below `out`.

    Args:
        chinese_words: find words in Chinese text (with the package jieba), where every character
            is a token of its own and nothing tells words apart.

    Raises:
        DataError: there are no text documents.
        ConfigError: jieba is not installed.
    """
    _, separator = tokenizer.require_separators()
    origin = Origin(out, documents, tokenizer, splits, chinese_words=chinese_words)
    if origin.is_of_shards():
        return {
            split: Sentences(TokenShard.open(out / split), TokenShard.open(out / f"{split}-words"), separator)
            for split in splits
        }
    origin.forget()
    found = {}
    for split in splits:
        with progress.task(f"tokenizing {split}", None, "documents") as task:
            words = _Words(tokenizer, chinese_words)
            flags: list[np.ndarray] = []

            def encoded(split: str = split, task: Any = task, words: _Words = words, flags: list = flags):
                for document in read_texts(documents / f"{split}.parquet"):
                    task.advance()
                    text = document.text or ""
                    ids, continues = words.document(split_sentences(text), separator)
                    flags.append(continues)
                    yield ids.tolist(), len(text.encode("utf-8"))

            ids = _write(out / split, encoded(), tokenizer)
            continues = _write(
                out / f"{split}-words", ((flag.astype(int).tolist(), 0) for flag in flags), tokenizer
            )
            found[split] = Sentences(ids, continues, separator)
    if not len(found[splits[0]]):
        raise DataError(
            f"{documents}: there are no text documents to pretrain on.", "Add a source of kind 'text'."
        )
    origin.remember()
    return found


def _write(folder: Path, documents: Iterator, tokenizer: Tokenizer) -> TokenShard:
    return write_token_shard(
        folder, documents, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    )


class _Words:
    """Which tokens continue a word."""

    def __init__(self, tokenizer: Tokenizer, chinese: bool) -> None:
        self._tokenizer, self._continues = tokenizer, tokenizer.continues_word
        self._cut: Any = _chinese_cutter() if chinese else None

    def document(self, sentences: list[str], separator: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all sentences with separators between, and what continues a word; both (n,)."""
        parts: list[list[int]] = []
        flags: list[np.ndarray] = []
        for sentence, ids in zip(sentences, self._tokenizer.encode_plain(sentences)):
            if not ids:
                continue
            if parts:
                parts.append([separator])
                flags.append(np.zeros(1, bool))
            array = np.array(ids, np.int64)
            continues = self._continues[array].copy()
            if self._cut is not None and _CHINESE.search(sentence):
                continues |= self._in_chinese_words(sentence, ids)
            continues[0] = False
            parts.append(ids)
            flags.append(continues)
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, bool)
        return np.concatenate([np.array(part, np.int64) for part in parts]), np.concatenate(flags)

    def _in_chinese_words(self, sentence: str, ids: list[int]) -> np.ndarray:
        """True where a token begins inside a word of jieba's."""
        inside = np.ones(len(sentence) + 1, bool)
        place = 0
        for word in self._cut(sentence):
            inside[place] = False
            place += len(word)
        framed, offsets = self._tokenizer.encode_with_offsets(sentence)
        begins = [begin for token, (begin, end) in zip(framed, offsets) if end > begin]
        if len(begins) != len(ids):  # a normaliser that drops characters: leave it to the vocabulary
            return np.zeros(len(ids), bool)
        return inside[np.array(begins)]


def _chinese_cutter() -> Any:
    try:
        import jieba
    except ImportError as error:
        raise ConfigError(
            "Masking whole Chinese words needs the package jieba, which is not installed.",
            "pip install 'lexmill[chinese]', or set masking.chinese_words = false.",
        ) from error
    jieba.setLogLevel("ERROR")
    return jieba.lcut
