"""Embeddings as a fine-tuning task: a query comes to lie near the text that belongs to it, and far from the others.

Karpukhin et al. 2020, "Dense Passage Retrieval": the texts of all other queries of a batch are what a query is told
apart from, and the negatives that rows bring are among them (InfoNCE, van den Oord et al. 2018).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lexmill.data.labelled import Match
from lexmill.errors import DataError
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lengths import Lengths
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TRAIN, VALIDATION, TaskData
from lexmill.model.directory import ModelDirectory
from lexmill.model.heads import without_heads
from lexmill.tokenizer.pairs import cut, encode_pairs
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch
from lexmill.train.examples import IGNORED, Example
from lexmill.train.objective import Losses
from lexmill.train.pooling import pool

_QUERY, _POSITIVE = 0, 1  # parts of an example; negatives have the numbers behind


def embed_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Telling each query's text from all others that are computed at once: a step's, or those of `micro_rows`.

    Raises:
        DataError: no rows, or only one.
        ModelError: the model is no encoder.
    """
    base = without_heads(model)
    rows = list(data.rows(TRAIN, Match))
    if len(rows) < 2:
        raise DataError(
            f"There are {len(rows)} pairs of query and text; a query is told apart from the texts of others."
        )
    held_out = list(itertools.islice(data.rows(VALIDATION, Match), config.validation_rows))
    length, tokenizer = config.length(base.config), base.tokenizer
    lengths = Lengths(config.too_long, length)
    examples = match_examples(rows, tokenizer, length, lengths)
    validation = match_examples(held_out, tokenizer, length, Lengths(config.too_long, length))
    negatives = sum(len(row.negatives) for row in rows)
    return Lesson(
        functools.partial(match_loss, pooling=base.pooling, temperature=config.temperature),
        lambda epoch: examples,
        validation,
        length,
        tokenizer.ids.pad or 0,
        f"{len(rows):,} queries with a text, {negatives:,} negatives, pooling: {base.pooling}"
        + lengths.told(),
        facts={
            "pairs": len(rows),
            "negatives": negatives,
            "too_long": lengths.longer,
            "temperature": config.temperature,
        },
        base=base,
        targets="pairs",
    )


def match_examples(
    rows: Sequence[Match], tokenizer: Tokenizer, length: int, lengths: Lengths | None = None
) -> list[Example]:
    """One example a row: query, text and negatives behind each other, told apart by their segments.

    A row that is cut has each of its texts cut to an equal share. The first token's target marks a pair.

    Args:
        length: tokens of all texts of a row.
        lengths: what happens to longer rows; cut when not given.
    """
    lengths = lengths or Lengths("cut", length)
    every = [
        (row, encode_pairs(tokenizer, [(text, None) for text in (row.query, row.positive, *row.negatives)]))
        for row in rows
    ]
    examples = []
    for _, encoded in lengths.kept((row, sum(map(len, texts)), texts) for row, texts in every):
        if sum(map(len, encoded)) > length:
            encoded = [cut(one, length // len(encoded)) for one in encoded]
        tokens = np.concatenate([one.ids for one in encoded])
        targets = np.full(len(tokens), IGNORED, np.int64)
        targets[0] = 0
        parts = np.repeat(np.arange(len(encoded)), [len(one) for one in encoded])
        examples.append(Example(tokens, targets, parts))
    return examples


def match_loss(model: Any, batch: Batch, pooling: str, temperature: float) -> Losses:
    """Cross-entropy of each query's own text among all texts of the batch, by cosine / temperature.

    A text equal to the query's own is not held against it, nor is one that belongs to the same query in
    another row.
    """
    texts = Texts.of(batch)
    place = batch.tensor("tokens").device
    group = torch.from_numpy(texts.group).to(place)
    same = group.view(batch.tokens.shape)
    hidden = model.hidden(
        batch.tensor("tokens"),
        torch.from_numpy(texts.positions).to(place),
        (same[:, :, None] == same[:, None, :])[:, None],
    )
    vectors = F.normalize(pool(hidden, group, texts.count, pooling), dim=-1)
    queries = vectors[torch.from_numpy(texts.queries).to(place)]
    candidates = vectors[torch.from_numpy(texts.candidates).to(place)]
    right = torch.from_numpy(texts.right).to(place)
    losses = Losses()
    if not len(queries):  # a row that stands in for none
        losses.add("tokens", (vectors.sum() * 0, None if torch.is_grad_enabled() else 0))
        return losses
    scores = (queries.float() @ candidates.float().mT) / temperature
    scores = scores.masked_fill(torch.from_numpy(texts.excluded).to(place), float("-inf"))
    hits = None if torch.is_grad_enabled() else int((scores.argmax(-1) == right).sum())
    losses.add("tokens", (F.cross_entropy(scores, right, reduction="sum"), hits))
    return losses


@dataclass(frozen=True, eq=False)
class Texts:
    """The single texts of packed rows.

    Attributes:
        positions: (rows, length), from 0 in each text.
        group: (rows · length,) a number for each text, the same at all of its places; below `count`.
        queries: (pairs,) numbers of the queries.
        candidates: (n,) numbers of all texts that are no queries.
        right: (pairs,) where among the candidates a query's own text is.
        excluded: (pairs, n) candidates that are not held against a query.
    """

    positions: np.ndarray
    group: np.ndarray
    count: int
    queries: np.ndarray
    candidates: np.ndarray
    right: np.ndarray
    excluded: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> Texts:
        """Look at the rows of a batch."""
        assert batch.segments is not None
        document, part = batch.document.astype(np.int64), batch.segments.astype(np.int64)
        parts = int(part.max()) + 1
        inside = document * parts + part
        border = np.ones(inside.shape, bool)
        border[:, 1:] = inside[:, 1:] != inside[:, :-1]
        place = np.broadcast_to(np.arange(inside.shape[1]), inside.shape)
        positions = place - np.maximum.accumulate(np.where(border, place, 0), axis=1)
        number = (np.cumsum(border) - 1).reshape(inside.shape)  # texts in the order of the batch
        count = int(number.max()) + 1
        flat_border = np.flatnonzero(border)
        kinds = part.ravel()[flat_border]
        asks = batch.targets.ravel()[flat_border] != IGNORED
        sizes = np.diff(np.append(flat_border, inside.size))
        tokens = batch.tokens.ravel()
        names: dict[bytes, int] = {}
        text = np.array(
            [
                names.setdefault(tokens[start : start + size].tobytes(), len(names))
                for start, size in zip(flat_border.tolist(), sizes.tolist())
            ]
        )
        queries = np.flatnonzero(asks)
        # the query that each text stands behind; what fills a row, and what no query asks for, is none's
        owner = np.where(asks, np.arange(count), -1)
        same_example = (document.ravel()[flat_border][1:] == document.ravel()[flat_border][:-1]) & (
            kinds[1:] > kinds[:-1]
        )
        for index in np.flatnonzero(same_example) + 1:
            owner[index] = owner[index - 1]
        candidates = np.flatnonzero((owner >= 0) & (kinds != _QUERY))
        mine = owner[candidates][None, :] == queries[:, None]
        own = mine & (kinds[candidates] == _POSITIVE)[None, :]
        right = own.argmax(1) if len(candidates) else np.zeros(0, np.int64)
        equal = text[candidates][None, :] == text[candidates][right][:, None]
        belongs = (text[owner[candidates]][None, :] == text[queries][:, None]) & (
            kinds[candidates] == _POSITIVE
        )[None, :]
        return cls(
            positions=positions,
            group=number.ravel(),
            count=count,
            queries=queries,
            candidates=candidates,
            right=right,
            excluded=(equal | belongs) & ~own,
        )
