"""Scores of embeddings: is the text that belongs to a query among the nearest?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from lexmill.data.labelled import Match
from lexmill.errors import DataError
from lexmill.evaluate.scores import Scoring, TaskScores
from lexmill.inference.language_model import LanguageModel

_RECALL_AT = (1, 5, 10)
_AT = 10
_PART = 256  # texts between two movements of the progress bar


def embed_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Each query is looked for among all texts of all rows, negatives too, by cosine. See `retrieval_scores`.

    Raises:
        DataError: no rows.
    """
    rows = [cast(Match, row) for row in scoring.rows]
    if not rows:
        raise DataError("There are no queries to score.")
    queries = list(dict.fromkeys(row.query for row in rows))
    texts = list(dict.fromkeys(text for row in rows for text in (row.positive, *row.negatives)))
    number = {text: index for index, text in enumerate(texts)}
    belongs: dict[str, set[int]] = {query: set() for query in queries}
    for row in rows:
        belongs[row.query].add(number[row.positive])
    parts = []
    every = queries + texts
    with scoring.progress.task("embedding", len(every), "texts") as task:
        for start in range(0, len(every), _PART):
            some = every[start : start + _PART]
            parts.append(model.embed(some, normalise=True, too_long="cut"))
            task.advance(len(some))
    vectors = np.concatenate(parts)
    scores = vectors[: len(queries)] @ vectors[len(queries) :].T
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :_AT]
    return TaskScores(
        task="embed",
        metrics=retrieval_scores(nearest, [belongs[query] for query in queries]),
        rows=len(rows),
        details={"queries": len(queries), "texts": len(texts), "pooling": model.pooling},
        examples=[
            {
                "question": query,
                "expected": texts[min(belongs[query])],
                "given": texts[int(found[0])],
            }
            for query, found in list(zip(queries, nearest))[: scoring.config.examples]
        ],
        predictions=[
            {"query": query, "nearest": [texts[int(index)] for index in found]}
            for query, found in zip(queries, nearest)
        ],
    )


def retrieval_scores(nearest: np.ndarray, belongs: Sequence[set[int]]) -> dict[str, float]:
    """Means over all queries (Manning et al. 2008, "Introduction to Information Retrieval", chapter 8).

    nDCG@10 with gains of 0 and 1 (Järvelin & Kekäläinen 2002): 1 / log2(rank + 1) summed, over what the best order
    would give. MRR@10: 1 / the rank of the first that belongs, 0 beyond 10. Recall@k: the share of those that
    belong among the first k.

    Args:
        nearest: (queries, up to 10) texts by rank.
        belongs: of each query its texts.
    """
    hits = np.array([[int(index) in right for index in row] for row, right in zip(nearest, belongs)], bool)
    sizes = np.array([len(right) for right in belongs])
    discount = 1 / np.log2(np.arange(2, _AT + 2))
    gains = (hits * discount[: hits.shape[1]]).sum(1)
    ideal = np.array([discount[: min(size, _AT)].sum() for size in sizes])
    first = np.where(hits.any(1), hits.argmax(1) + 1, np.inf)
    found = {f"ndcg_{_AT}": gains / ideal, f"mrr_{_AT}": 1 / first}
    found |= {f"recall_{k}": hits[:, :k].sum(1) / sizes for k in _RECALL_AT}
    return {name: round(float(values.mean()), 5) for name, values in found.items()}
