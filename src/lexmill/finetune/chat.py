"""Chat as a fine-tuning task: conversations to tokens, with the loss on the assistant's turns only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lexmill.errors import DataError
from lexmill.tokenizer.special import END_OF_TURN
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.examples import Example, next_token_example


def chat_example(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> Example:
    """One conversation as the model will see it, by the model's own chat template.

    Targets are each assistant turn and the token that ends it, so that the model learns to stop.
    The whole text is encoded at once: ids are those of generation, not of glued pieces.

    Raises:
        DataError: no assistant turn, or a template that rewrites earlier turns.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
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
