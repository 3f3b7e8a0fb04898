"""Question answering by an encoder as a fine-tuning task: where in the context the answer begins and ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexmill.data.labelled import Question
from lexmill.errors import ConfigError, DataError
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TRAIN, VALIDATION, TaskData
from lexmill.model.directory import ModelDirectory
from lexmill.model.heads import with_span
from lexmill.tokenizer.pairs import encode_pairs, tokens_of, windows
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch
from lexmill.train.examples import IGNORED, Example
from lexmill.train.objective import Losses
from lexmill.train.pooling import group_log_softmax, groups, read_rows


def extractive_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Finding answers. Contexts longer than `window` become several examples, most of which say "not here".

    Raises:
        ConfigError: `label_smoothing`, which is for what is written.
        DataError: no questions, or no answer stands where its row says.
        ModelError: the model is no encoder.
    """
    if config.label_smoothing:
        raise ConfigError("'label_smoothing' is for models that write their answers.", "Leave it out.")
    base = with_span(model, config.seed)
    length = config.length(base.config)
    window = min(config.window, length)
    overlap = min(config.overlap, window // 2)  # of a model with a small context
    tokenizer = base.tokenizer
    questions = list(data.rows(TRAIN, Question))
    if not questions:
        raise DataError("There are no questions to learn from.", "Rows of SQuAD's form are.")
    held_out = list(itertools.islice(data.rows(VALIDATION, Question), config.validation_rows))
    learned = span_examples(questions, tokenizer, window, overlap)
    validation = span_examples(held_out, tokenizer, window, overlap)
    unanswerable = sum(not one.answers for one in questions)
    settings: dict[str, Any] = {
        "task": "qa",
        "window": window,
        "overlap": overlap,
        # a model that has never seen a question without an answer always answers
        "null_threshold": 0.0 if unanswerable else None,
    }
    return Lesson(
        span_loss,
        lambda epoch: learned.examples,
        validation.examples,
        length,
        tokenizer.ids.pad or 0,
        f"{len(questions):,} questions, {unanswerable:,} without an answer, in {len(learned.examples):,} windows"
        + learned.told(),
        facts={
            "questions": len(questions),
            "unanswerable": unanswerable,
            "windows": len(learned.examples),
            "inexact": learned.inexact,
        },
        base=base,
        after=lambda network: {"calibration": settings},
        targets="borders",
        held_out=held_out,
    )


@dataclass(frozen=True)
class SpanExamples:
    """Windows of questions.

    Attributes:
        inexact: answers that no tokens stand for exactly; the smallest ones that hold them are learned.
        lost: answers that are not in the context as their rows say; learned as "no answer" in no window.
    """

    examples: list[Example]
    inexact: int
    lost: int

    def told(self) -> str:
        """For a reader, as the end of a sentence."""
        parts = []
        if self.inexact:
            parts.append(f"{self.inexact:,} answers begin or end inside a token")
        if self.lost:
            parts.append(f"{self.lost:,} questions are left out: the answer does not stand in the context")
        return "".join(f"; {part}" for part in parts)


def span_examples(
    questions: Sequence[Question], tokenizer: Tokenizer, window: int, overlap: int
) -> SpanExamples:
    """Windows with the places where the first answer begins and ends; 0, the first token, where it is not inside.

    The first two tokens of an example carry them as targets, counted from the example's own beginning.
    """
    examples: list[Example] = []
    inexact = lost = 0
    encoded = encode_pairs(tokenizer, [(one.question, one.context) for one in questions])
    for number, (question, pair) in enumerate(zip(questions, encoded)):
        place = _characters(question)
        if place is None:
            lost += 1
            continue
        begin, end = place
        found = []
        for piece in windows(pair, question.context, window, overlap):
            tokens = tokens_of(piece, begin, end)
            targets = np.full(len(piece), IGNORED, np.int64)
            targets[:2] = tokens[:2] if tokens else (0, 0)
            examples.append(Example(piece.ids, targets, piece.segments, origin=number))
            if tokens:
                found.append(tokens[2])
        inexact += bool(found) and not any(found)
    return SpanExamples(examples, inexact, lost)


def _characters(question: Question) -> tuple[int, int] | None:
    """Where the first answer stands, without spaces around it; (0, 0) where there is none, None where it is wrong."""
    if not question.answers:
        return 0, 0
    text, start = question.answers[0], question.starts[0] if question.starts else -1
    if start < 0 or question.context[start : start + len(text)] != text or not text.strip():
        return None
    begin = start + len(text) - len(text.lstrip())
    return begin, begin + len(text.strip())


def span_loss(model: Any, batch: Batch) -> Losses:
    """Cross-entropy of where the answer begins, and of where it ends, among all tokens of an example."""
    logprobs, targets = span_logprobs(model, batch)
    losses = Losses()
    right = None
    if not torch.is_grad_enabled() and len(targets):
        right = int(targets.best.sum())
    losses.add("tokens", (-targets.gather(logprobs).sum(), right))
    return losses


@dataclass(frozen=True)
class Borders:
    """Where the answers of a batch begin and end, as places in the flat batch; all (examples,).

    Attributes:
        begin, end: the places.
        best: (examples, 2) whether each is the likeliest of its example; without gradients only.
    """

    begin: Tensor
    end: Tensor
    best: Tensor

    def __len__(self) -> int:
        return len(self.begin)

    def gather(self, logprobs: Tensor) -> Tensor:
        """Their log-probabilities, (examples, 2)."""
        return torch.stack([logprobs[self.begin, 0], logprobs[self.end, 1]], -1)


def span_logprobs(model: Any, batch: Batch) -> tuple[Tensor, Borders]:
    """Log-probabilities of beginnings and ends among the tokens of each example, (places, 2), and the right ones."""
    logits = model.span_logits(read_rows(model, batch)).flatten(0, 1)
    group, count = groups(batch.tensor("document"))
    logprobs = group_log_softmax(logits, group, count)
    targets = batch.tensor("targets").flatten()
    marks = (targets != IGNORED).nonzero()[:, 0]
    first = marks[0::2]  # the marks of an example stand side by side
    begin, end = first + targets[first], first + targets[first + 1]
    best = torch.zeros(len(first), 2, dtype=torch.bool, device=logits.device)
    if not torch.is_grad_enabled():
        index = group[:, None].expand_as(logprobs)
        highest = logprobs.new_full((count, 2), float("-inf")).scatter_reduce(0, index, logprobs, "amax")
        mine = torch.stack([logprobs[begin, 0], logprobs[end, 1]], -1)
        best = mine >= highest[group[first]]
    return logprobs, Borders(begin, end, best)
