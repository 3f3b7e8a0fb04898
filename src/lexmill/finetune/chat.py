"""Chat as a fine-tuning task: conversations to tokens, with the loss on the assistant's turns only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from lexmill.data.labelled import Conversation, Message
from lexmill.errors import DataError, ModelError
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lengths import Lengths
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TRAIN, VALIDATION, TaskData
from lexmill.model.directory import ModelDirectory
from lexmill.tokenizer.special import END_OF_TURN
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.causal import causal_loss
from lexmill.train.examples import Example, next_token_example


def chat_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Answering: each epoch all conversations, joined at random, and pieces of plain text if asked for.

    Raises:
        DataError: no conversations, or some that do not fit a row.
        ModelError: the model is no decoder, or has no chat template.
    """
    if model.config.shape != "decoder":
        raise ModelError(
            f"{model.path}: fine-tuning for chat needs a decoder; this model has the shape '{model.config.shape}'."
        )
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise ModelError(
            f"{model.path}: this model has no chat template, so a conversation cannot be written for it.",
            "Put chat_template.jinja into the directory: the template of a model that it descends from.",
        )
    length = config.length(model.config)
    lengths = Lengths(config.too_long, length)
    rows = _measured(data.rows(TRAIN, Conversation), tokenizer)
    conversations = [row.messages for row, _ in lengths.kept(rows)]
    if not conversations:
        raise DataError(
            "There are no conversations to learn from.", 'Rows with "messages" are conversations.'
        )
    replay = Replay(data.texts(TRAIN), tokenizer, length) if config.text_share else None
    first = itertools.islice(data.rows(VALIDATION, Conversation), config.validation_rows)
    held_out = Lengths(config.too_long, length).kept(_measured(first, tokenizer))

    def examples(epoch: int) -> list[Example]:
        random = np.random.default_rng([config.seed, epoch, 2])
        chats = to_examples(join_conversations(conversations, config.join, random), tokenizer, length)
        tokens = sum(len(example.tokens) for example in chats)
        share = config.text_share
        return chats + (replay.draw(round(tokens * share / (1 - share)), random) if replay else [])

    return Lesson(
        partial(causal_loss, smoothing=config.label_smoothing),
        examples,
        to_examples((row.messages for row, _ in held_out), tokenizer, length),
        length,
        tokenizer.ids.pad if tokenizer.ids.pad is not None else 0,
        f"{len(conversations):,} conversations{lengths.told()}",
        facts={"conversations": len(conversations), "too_long": lengths.longer},
    )


def _measured(rows: Iterable[Conversation], tokenizer: Tokenizer) -> Iterator[tuple[Conversation, int, None]]:
    """Conversations with their tokens; one that the template does not write is named."""
    for row in rows:
        try:
            example = chat_example(row.messages, tokenizer)
        except DataError as error:
            raise DataError(f"{row.origin}: {error.message}", error.hint) from error
        yield row, len(example.tokens), None


def chat_example(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> Example:
    """One conversation as the model will see it, by the model's own chat template.

    Targets are each assistant turn and the token that ends it, so that the model learns to stop; but not
    turns of "weight" 0.
    The whole text is encoded at once: ids are those of generation, not of glued pieces.

    Raises:
        DataError: no assistant turn, or a template that rewrites earlier turns.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == "0":
            continue
        opening = tokenizer.render_chat(messages[:index], add_generation_prompt=True) if index else ""
        closing = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
        if not index or not (text.startswith(opening) and text.startswith(closing)):
            raise DataError(
                "The chat template does not build a conversation turn by turn, so the replies cannot be told apart.",
                "A conversation must begin with a user or system message.",
            )
        spans.append((len(opening), len(closing.rstrip("\n"))))
    if not spans:
        raise DataError("The conversation has no assistant message to learn from.")
    ids, offsets = tokenizer.encode_with_offsets(text)
    begins = np.array([begin for begin, _ in offsets])
    ends = np.array([end for _, end in offsets])
    counts = np.zeros(len(ids), bool)
    for start, end in spans:
        counts |= (begins >= start) & (ends <= end) & (ends > begins)
    if tokenizer.chat_template and END_OF_TURN in tokenizer.vocabulary:
        assert counts[np.flatnonzero(counts)[-1]], "the end of a turn is a target"
    return next_token_example(np.array(ids, np.int64), counts)


def fit(example: Example, length: int) -> Example | None:
    """The example cut to `length` tokens; None when no target is left."""
    tokens, targets = example.tokens[:length], example.targets[:length]
    return Example(tokens, targets) if (targets >= 0).any() else None


def join_conversations(
    conversations: Sequence[Sequence[Message]], most: int, random: np.random.Generator
) -> list[list[Message]]:
    """Lay up to `most` conversations one behind the other, drawn at random; each is used once.

    A model that has only seen single questions loses its way in a talk of several turns. What
    begins with a system message stays alone.
    """
    joined: list[list[Message]] = []
    room = 0
    for index in random.permutation(len(conversations)):
        conversation = conversations[index]
        alone = conversation[0]["role"] == "system"
        if room > 0 and not alone:
            joined[-1] += conversation
            room -= 1
        else:
            joined.append(list(conversation))
            room = 0 if alone else int(random.integers(0, most))
    return joined


def to_examples(
    conversations: Iterable[Sequence[Message]], tokenizer: Tokenizer, length: int
) -> list[Example]:
    """Conversations as examples of at most `length` tokens; one whose replies are all cut off is left out."""
    fitted = (fit(chat_example(conversation, tokenizer), length) for conversation in conversations)
    return [example for example in fitted if example is not None]


class Replay:
    """Pieces of the training text, to be mixed in."""

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, length: int) -> None:
        self._length = length
        ids = (np.array(one, np.int64) for one in tokenizer.encode_batch(list(texts), special=False))
        self._ids = [one for one in ids if len(one) > 1]

    def draw(self, tokens: int, random: np.random.Generator) -> list[Example]:
        """Pieces of about so many tokens in all; none when there is no text."""
        pieces: list[Example] = []
        while tokens > 0 and self._ids:
            ids = self._ids[int(random.integers(len(self._ids)))]
            start = int(random.integers(max(len(ids) - self._length, 1)))
            pieces.append(next_token_example(ids[start : start + self._length + 1]))
            tokens -= len(pieces[-1].tokens)
        return pieces
