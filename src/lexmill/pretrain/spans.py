"""Span corruption (Raffel et al. 2020, T5): gaps in a text, and an encoder–decoder that writes what stood there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lexmill.data.shards import TokenShard
from lexmill.errors import ConfigError
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.examples import IGNORED, Examples, begins, choose_of_each, places, windows


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """How much is taken out, and in pieces of which length."""

    share: float = 0.15  # of the tokens
    mean: float = 3.0  # tokens in a gap, on average

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"'share' must lie in (0, 1), but is {self.share}.")
        if self.mean < 1:
            raise ConfigError(f"'mean' must be at least 1, but is {self.mean}.")


@dataclass(frozen=True)
class Plan:
    """Exact counts for a text of `raw` tokens: all follow from its length, only the places are random.

    Attributes:
        raw: tokens of the text.
        removed: of them taken out.
        gaps: in so many pieces.
        read: tokens that the encoder reads: what is left, a sentinel a gap, the end.
        written: tokens that the decoder writes: what was taken out, a sentinel before each piece, the end.
    """

    raw: int
    removed: int
    gaps: int

    @property
    def read(self) -> int:
        return self.raw - self.removed + self.gaps + 1

    @property
    def written(self) -> int:
        return self.removed + self.gaps + 1


def plan_text(raw: int, config: SpanConfig) -> Plan:
    """The counts for a text of `raw` tokens, at least 2."""
    removed = min(max(round(raw * config.share), 1), raw - 1)
    # before, between and behind the gaps some text remains, where there is enough of it
    gaps = max(min(max(round(removed / config.mean), 1), removed, raw - removed - 1), 1)
    return Plan(raw, removed, gaps)


def plan_rows(length: int, config: SpanConfig) -> Plan:
    """The longest text whose corrupted form still fits `length` tokens, so that rows are full.

    Raises:
        ConfigError: rows too short for any gap.
    """
    if length < 4:
        raise ConfigError(f"Rows of {length} tokens are too short for span corruption.", "Set 4 or more.")
    raw = 2
    while plan_text(raw + 1, config).read <= length:
        raw += 1
    return plan_text(raw, config)


def span_examples(
    shard: TokenShard,
    tokenizer: Tokenizer,
    config: SpanConfig,
    length: int,
    start: int,
    seed: tuple[int, ...],
) -> Examples:
    """One pass over all documents, in windows that fill a row, with fresh gaps.

    Args:
        length: tokens that the encoder reads in a row.
        start: the id that the decoder begins with.
    """
    random = np.random.default_rng(seed)
    full = plan_rows(length, config)
    shift = int(random.integers(full.raw)) if len(seed) > 1 and seed[1] else 0
    offsets = np.asarray(shard.offsets)
    document, begin, raw = windows(np.diff(offsets), full.raw, shift)
    enough = raw >= 2
    document, begin, raw = document[enough], begin[enough], raw[enough]
    ids = np.asarray(shard.ids)[places(offsets[document] + begin, raw)].astype(np.int64)
    plans = [plan_text(max(size, 2), config) for size in range(full.raw + 1)]
    return corrupt(
        ids,
        raw,
        np.array([plan.removed for plan in plans])[raw],
        np.array([plan.gaps for plan in plans])[raw],
        np.array(tokenizer.require_sentinels(full.gaps), np.int64),
        tokenizer.ids.stop[0],
        start,
        random,
        origins=document,
    )


def corrupt(
    ids: np.ndarray,
    raw: np.ndarray,
    removed: np.ndarray,
    gaps: np.ndarray,
    sentinels: np.ndarray,
    end: int,
    start: int,
    random: np.random.Generator,
    origins: np.ndarray | None = None,
) -> Examples:
    """Take `removed` tokens out of each text, in `gaps` pieces at random places; all texts at once.

    The encoder reads: text, sentinel 0, text, sentinel 1, …, text, end. The decoder writes:
    sentinel 0, the first piece, sentinel 1, the second piece, …, end. All divisions into so many
    pieces are equally likely.

    T5's own gaps always reach to the end of a text; here text follows the last one too, so that
    a sentence with a gap in its middle is nothing new to the model.

    Args:
        ids: (sum of raw,) the texts, one behind the other.
        raw, removed, gaps: (texts,) as in `Plan`.
        sentinels: at least as many as the most gaps.
        origins: (texts,) documents.
    """
    left = raw - removed
    stretches = np.minimum(gaps + 1, left)  # of what stays
    pieces, stays = _divide(removed, gaps, random), _divide(left, stretches, random)
    # a text is: what stays, a gap, what stays, …; these are the lengths in that order
    both = gaps + stretches
    lengths = np.empty(both.sum(), np.int64)
    gap_at = 2 * places(np.zeros_like(gaps), gaps) + np.repeat(begins(both), gaps) + 1
    stay_at = 2 * places(np.zeros_like(stretches), stretches) + np.repeat(begins(both), stretches)
    lengths[gap_at], lengths[stay_at] = pieces, stays
    is_gap = np.zeros(len(lengths), bool)
    is_gap[gap_at] = True
    taken = np.repeat(is_gap, lengths)
    marks = sentinels[places(np.zeros_like(gaps), gaps)]
    # the encoder: one sentinel for each gap, and the end behind each text
    shown = np.where(is_gap, 1, lengths)
    tokens, read = _with_end(shown, both, end)
    where = places(read, shown)
    keeps = np.repeat(~is_gap, shown)
    tokens[where[keeps]] = ids[~taken]
    tokens[read[gap_at]] = marks
    # the decoder: a sentinel before each piece
    written = pieces + 1
    targets, at = _with_end(written, gaps, end)
    targets[at] = marks
    targets[places(at + 1, pieces)] = ids[taken]
    sizes = removed + gaps + 1
    decoder_tokens = np.roll(targets, 1)
    decoder_tokens[begins(sizes)] = start
    return Examples(
        tokens,
        left + gaps + 1,
        targets,
        np.full(len(raw), IGNORED, np.int64),
        np.full(len(raw), -1, np.int64) if origins is None else origins,
        decoder_tokens=decoder_tokens,
        decoder_sizes=sizes,
    )


def _with_end(lengths: np.ndarray, counts: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for stretches of these lengths, `counts` of them a text, with `end` behind each text.

    Returns:
        The array, `end` wherever nothing is put yet, and where each stretch begins in it.
    """
    text = np.repeat(np.arange(len(counts)), counts)
    return np.full(int(lengths.sum()) + len(counts), end, np.int64), begins(lengths) + text


def _divide(totals: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each total as `counts` positive whole numbers, all such divisions equally likely; (sum of counts,)."""
    # a division is a choice of the places, behind all but the last thing, where it is cut
    cut = choose_of_each(totals - 1, counts - 1, random)
    first = np.zeros(int(totals.sum()), bool)
    first[begins(totals)] = True
    first[~first] = cut  # a cut behind thing i is a beginning at thing i + 1
    return np.diff(np.append(np.flatnonzero(first), len(first)))
