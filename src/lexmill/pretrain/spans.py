"""Span corruption (Raffel et al. 2020, T5): gaps in a text, and an encoder–decoder that writes what stood there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from lexmill.data.shards import TokenShard
from lexmill.errors import ConfigError
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Example


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
) -> list[Example]:
    """One pass over all documents, in windows that fill a row, with fresh gaps.

    Args:
        length: tokens that the encoder reads in a row.
        start: the id that the decoder begins with.
    """
    random = np.random.default_rng(seed)
    full = plan_rows(length, config)
    shift = int(random.integers(full.raw)) if len(seed) > 1 and seed[1] else 0
    end = tokenizer.ids.stop[0]
    sentinels = np.array(tokenizer.require_sentinels(full.gaps), np.int64)
    examples = []
    for index in range(len(shard)):
        ids = shard[index].astype(np.int64)
        cuts = [
            0,
            *range(full.raw - shift if len(ids) > full.raw else full.raw, len(ids), full.raw),
            len(ids),
        ]
        for begin, stop in itertools.pairwise(cuts):
            if stop - begin >= 2:
                plan = full if stop - begin == full.raw else plan_text(stop - begin, config)
                example = corrupt(ids[begin:stop], plan, sentinels, end, start, random)
                examples.append(replace(example, origin=index))
    return examples


def corrupt(
    ids: np.ndarray, plan: Plan, sentinels: np.ndarray, end: int, start: int, random: np.random.Generator
) -> Example:
    """Take `plan.removed` tokens out of `ids` (plan.raw,), in `plan.gaps` pieces at random places.

    The encoder reads: text, sentinel 0, text, sentinel 1, …, text, end. The decoder writes:
    sentinel 0, the first piece, sentinel 1, the second piece, …, end.

    T5's own gaps always reach to the end of a text; here text follows the last one too, so that
    a sentence with a gap in its middle is nothing new to the model.
    """
    left = plan.raw - plan.removed
    pieces = _parts(plan.removed, plan.gaps, random)
    texts = _parts(left, min(plan.gaps + 1, left), random)
    read, written, place = [], [], 0
    for gap in range(plan.gaps):
        middle, stop = place + texts[gap], place + texts[gap] + pieces[gap]
        read += [ids[place:middle], sentinels[gap : gap + 1]]
        written += [sentinels[gap : gap + 1], ids[middle:stop]]
        place = stop
    targets = np.concatenate([*written, [end]])
    return Example(
        np.concatenate([*read, ids[place:], [end]]),
        targets,
        decoder_tokens=np.concatenate([[start], targets[:-1]]),
    )


def _parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` positive whole numbers whose sum is `total`, all such divisions equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, int)
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))
