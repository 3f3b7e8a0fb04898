"""Scores of preferences: how often a model prefers the chosen reply more than its reference does, and by how much."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from lexmill.data.labelled import Preference
from lexmill.errors import DataError
from lexmill.evaluate.scores import Scoring, TaskScores
from lexmill.finetune.prefer import Reference, adapter_off, pair_examples, pairs_of, reply_logprobs
from lexmill.inference.language_model import LanguageModel, load
from lexmill.model.lora import LoraLinear
from lexmill.train.batches import Batch, fixed_batches

_ROWS, _LENGTH = 4, 512  # computed at once, where pairs are no longer


def prefer_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Win rate and margin against the reference (an adapter's base, or `config.reference`), and perplexities.

    "win_rate": in how many pairs the log-ratio of model to reference is larger for the chosen reply than for the
    rejected one: the implicit reward of DPO. "margin": the mean difference of these log-ratios, in nats. "preferred":
    in how many pairs a token of the chosen reply is on average more probable than one of the rejected, whatever the
    reference. "chosen_perplexity" shows whether the replies themselves stay probable.

    Raises:
        DataError: no pairs, or one that is longer than the context.
        ModelError, FileError: a reference that cannot be opened.
    """
    config, rows = scoring.config, [cast(Preference, row) for row in scoring.rows]
    examples, left_out = pair_examples(rows, model.tokenizer, model.config.context, config.too_long)
    if not examples:
        raise DataError("There are no pairs of replies to score.")
    length = max(_LENGTH, *(len(example.tokens) for example in examples))
    batches = fixed_batches(examples, rows=_ROWS, length=length, pad_id=model.tokenizer.ids.pad or 0)
    known = _reference(model, config.reference)
    learned, reference = np.zeros((2, len(rows), 2), np.float64)
    tokens = np.ones((len(rows), 2), np.float64)
    with scoring.progress.task("comparing replies", len(batches), "batches") as task:
        for batch in batches:
            at = _numbers(batch)
            learned[at], tokens[at] = _logprobs(model.network, batch)
            if known:
                reference[at] = known(model.network, batch)[pairs_of(batch)].cpu().numpy()
            task.advance()
    kept = np.array([example.origin for example in examples])
    scores = _scores(
        [rows[place] for place in kept],
        learned[kept],
        reference[kept] if known else None,
        tokens[kept],
        config.examples,
        left_out,
    )
    given: list[Any] = [None] * len(rows)
    for place, margin in zip(kept, scores.predictions):
        given[place] = margin
    return replace(scores, predictions=given)


def _reference(model: LanguageModel, path: str) -> Reference | None:
    """Who says how probable replies were before; None where that is not known."""
    if any(isinstance(layer, LoraLinear) for layer in model.network.modules()):
        return adapter_off
    if not path:
        return None
    other = load(path).network

    def ask(_: Any, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return reply_logprobs(other, batch)[0]

    return ask


def _scores(
    rows: list[Preference],
    learned: np.ndarray,
    reference: np.ndarray | None,
    tokens: np.ndarray,
    examples: int,
    left_out: int,
) -> TaskScores:
    each = learned / tokens
    metrics: dict[str, float] = {}
    margins = (learned[:, 0] - learned[:, 1]) if reference is None else np.zeros(0)
    if reference is not None:
        rewards = learned - reference
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = {"win_rate": float((margins > 0).mean()), "margin": float(margins.mean())}
    metrics["preferred"] = float((each[:, 0] > each[:, 1]).mean())
    for index, name in enumerate(("chosen", "rejected")):
        metrics[f"{name}_perplexity"] = _perplexity(learned[:, index], tokens[:, index])
    if reference is not None:
        metrics["reference_chosen_perplexity"] = _perplexity(reference[:, 0], tokens[:, 0])
    return TaskScores(
        task="prefer",
        metrics={name: round(value, 5) for name, value in metrics.items()},
        rows=len(learned),
        details={
            "compared_with": "nothing: give --set reference=MODEL" if reference is None else "the reference",
            **({"left_out": left_out} if left_out else {}),
        },
        examples=[
            {
                "question": row.messages[-1]["content"],
                "expected": row.chosen,
                "rejected": row.rejected,
                "margin": f"{margin:.3f}",
            }
            for row, margin in list(zip(rows, margins))[:examples]
        ],
        predictions=[round(float(margin), 5) for margin in margins],
    )


def _perplexity(logprobs: np.ndarray, tokens: np.ndarray) -> float:
    return math.exp(min(-float(logprobs.sum() / tokens.sum()), 700.0))


def _logprobs(network: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and numbers of tokens of the pairs of a batch, both (pairs, 2)."""
    network.eval()
    with torch.no_grad():
        found, tokens = reply_logprobs(network, batch)
    there = pairs_of(batch)
    return found[there].cpu().numpy(), tokens[there].cpu().numpy()


def _numbers(batch: Batch) -> np.ndarray:
    """The examples that the pairs of a batch are, in the order of `pairs_of`."""
    assert batch.origins is not None
    return batch.origins[batch.origins >= 0]
