"""The evaluation stage: figures of a model on held-out documents, optionally beside those of its base."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.data.documents import Document, read_documents
from lexmill.errors import DataError
from lexmill.evaluate.chat import first_exchange
from lexmill.evaluate.gaps import FillCase, fill_scores, pretraining_scores
from lexmill.evaluate.loss import mean_loss
from lexmill.evaluate.scores import ScoreConfig
from lexmill.finetune.chat import to_examples
from lexmill.inference.language_model import LanguageModel
from lexmill.progress import SILENT, Progress
from lexmill.train.examples import Example, next_token_example


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The `[evaluate]` table of a recipe."""

    text_tokens: int = 65536  # of held-out text, at most
    rows: int = 16
    replies: int = 100  # conversations answered in full, at most, held-out and seen ones each
    reply_tokens: int = 48
    examples: int = 12  # question-and-answer pairs kept for the report
    task: ScoreConfig = field(default_factory=ScoreConfig)  # of a recipe with the step `rows`
    fill: tuple[FillCase, ...] = ()  # sentences with a gap, and what should be among the best fillings


def evaluate(
    config: EvaluateConfig,
    model: LanguageModel,
    documents: Path,
    *,
    base: LanguageModel | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure `model`, and `base` for comparison, on the documents that `prepare` wrote.

    Returns:
        Of a decoder {"text": {"before"?, "after"}, "replies": {"before"?, "after", "seen_after"}, "examples"}, where
        "text" has the mean loss in nats a token, perplexity, bits per byte; "replies" has the loss and
        accuracy of the next token with the true reply so far given, and the share of replies that greedy
        generation gets exactly right. "seen_after" is measured on conversations of the training split.
        Of an encoder or an encoder–decoder {"pretraining": losses and accuracies of its own objective on
        held-out text, "fill": what it puts into the sentences of `config.fill`}.

    Raises:
        DataError: nothing to measure on.
    """
    if model.config.shape != "decoder":
        with progress.task("evaluating", 2, "measures") as task:
            found = pretraining_scores(model, documents, config.rows, config.text_tokens)
            task.advance()
            return {"pretraining": found, "fill": fill_scores(model, documents, config.fill)}
    held_out = list(read_documents(documents / "validation.parquet"))
    texts = [document for document in held_out if document.kind == "text"]
    chats = [document for document in held_out if document.kind == "chat"]
    seen = [document for document in read_documents(documents / "train.parquet") if document.kind == "chat"]
    if not texts and not chats:
        raise DataError(
            f"{documents}: there is nothing held out to measure on.", "Set validation_fraction above 0."
        )
    models = ([("before", base)] if base else []) + [("after", model)]
    scores: dict[str, Any] = {"text": {}, "replies": {}, "examples": []}
    with progress.task("evaluating", 3 * len(models), "measures") as task:
        for name, one in models:
            if texts:
                scores["text"][name] = text_scores(one, [document.text or "" for document in texts], config)
            task.advance()
            if chats and one.tokenizer.chat_template:
                scores["replies"][name] = reply_scores(one, chats, config)
                task.advance()
                if name == "after" and seen:
                    scores["replies"]["seen_after"] = reply_scores(one, seen[: config.replies], config)
            task.advance()
    scores["examples"] = _examples(models, chats, seen, config)
    return scores


def text_scores(
    model: LanguageModel, texts: Iterable[str], config: EvaluateConfig, length: int | None = None
) -> dict[str, float]:
    """Loss on held-out text; every token but a text's first is predicted once.

    Args:
        length: tokens of a row; the model's context when not given.
    """
    tokenizer, length = model.tokenizer, length or model.config.context
    examples: list[Example] = []
    size = tokens = 0
    begin = [] if tokenizer.ids.bos is None else [tokenizer.ids.bos]
    for text in texts:
        if tokens >= config.text_tokens:
            break
        ids = np.array(begin + tokenizer.encode(text, special=False), np.int64)
        for start in range(0, len(ids) - 1, length):
            if tokens >= config.text_tokens:
                break
            piece = ids[start : start + length + 1]
            examples.append(next_token_example(piece))
            tokens += len(piece) - 1
            # what the targets of this piece stand for, so that nats and bytes belong together
            size += len(tokenizer.decode(piece[1:].tolist()).encode("utf-8"))
    found = mean_loss(model, examples, config.rows)
    loss, targets = found.loss, found.targets["tokens"]
    return {
        "loss": round(loss, 5),
        "perplexity": round(math.exp(min(loss, 700)), 4),
        "bits_per_byte": round(loss * targets / math.log(2) / max(size, 1), 5),
        "targets": targets,
    }


def reply_scores(model: LanguageModel, documents: list[Document], config: EvaluateConfig) -> dict[str, float]:
    """How well the replies of conversations are predicted, and how many come out exactly."""
    length = model.config.context
    talks = [document.messages or () for document in documents]
    found = mean_loss(model, to_examples(talks, model.tokenizer, length), config.rows)
    asked = [pair for pair in map(first_exchange, talks[: config.replies]) if pair]
    exact = sum(
        model.chat(messages, max_tokens=config.reply_tokens).strip() == reply.strip()
        for messages, reply in asked
    )
    return {
        "loss": round(found.loss, 5),
        "token_accuracy": round(found.accuracies["tokens"], 5),
        "exact": round(exact / max(len(asked), 1), 5),
        "conversations": len(asked),
        "targets": found.targets["tokens"],
    }


def _examples(
    models: list[tuple[str, Any]], chats: list[Document], seen: list[Document], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Questions with the expected and the given answers: half from training, half held out."""
    half = config.examples // 2
    found = []
    for split, documents in (("training", seen[: config.examples - half]), ("held out", chats[:half])):
        for document in documents:
            exchange = first_exchange(document.messages or ())
            if exchange:
                answers = {
                    name: model.chat(exchange[0], max_tokens=config.reply_tokens) for name, model in models
                }
                question = exchange[0][-1]["content"]
                found.append({"split": split, "question": question, "expected": exchange[1], **answers})
    return found
