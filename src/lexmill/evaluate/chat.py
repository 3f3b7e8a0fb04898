"""Scores of chat: how well the replies of conversations are predicted, and how many come out exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lexmill.data.labelled import Conversation, Message
from lexmill.evaluate.loss import mean_loss
from lexmill.evaluate.scores import Scoring, TaskScores
from lexmill.finetune.chat import to_examples
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.together import write_ids


def chat_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Loss and accuracy of the replies' tokens with the true reply so far given; exact first replies.

    Raises:
        DataError: no reply fits the model's context.
    """
    config = scoring.config
    talks = [cast(Conversation, row).messages for row in scoring.rows]
    found = mean_loss(model, to_examples(talks, model.tokenizer, model.config.context))
    asked, prompts = [], []
    for pair in map(first_exchange, talks):
        ids = model.tokenizer.encode(model.render_chat(pair[0])) if pair else []
        if pair and len(ids) < model.config.context:
            asked.append(pair)
            prompts.append(ids)
    with scoring.progress.task("answering", len(asked), "conversations") as task:
        written = write_ids(model, prompts, **config.options, done=task.advance)
    given = [model.tokenizer.decode(ids, skip_special=True) for ids in written]
    right = sum(said.strip() == reply.strip() for said, (_, reply) in zip(given, asked, strict=True))
    return TaskScores(
        task="chat",
        metrics={
            "loss": round(found.loss, 5),
            "token_accuracy": round(found.accuracies["tokens"], 5),
            "exact": round(right / max(len(asked), 1), 5),
        },
        rows=len(talks),
        details={"targets": found.targets["tokens"], "answered": len(asked)},
        examples=[
            {"question": messages[-1]["content"], "expected": reply, "given": said}
            for (messages, reply), said in list(zip(asked, given, strict=True))[: config.examples]
        ],
        predictions=given,
    )


def first_exchange(messages: Sequence[Message]) -> tuple[list[Message], str] | None:
    """The messages before the first reply, and that reply."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index:
            return list(messages[:index]), message["content"]
    return None
