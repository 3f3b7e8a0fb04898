"""What a fine-tuning will cost, before anything is written."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from lexmill.data.documents import read_documents
from lexmill.finetune.chat import chat_example
from lexmill.finetune.stage import FinetuneConfig
from lexmill.model.config import ModelConfig
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.causal import causal_loss
from lexmill.train.cost import Row
from lexmill.train.examples import IGNORED
from lexmill.train.forecast import CALIBRATION_SECONDS, Data, Forecast, forecast

_SAMPLE = 200  # conversations that are tokenized


def plan_finetuning(
    config: FinetuneConfig,
    shape: ModelConfig,
    *,
    documents: Path | None = None,
    tokenizer: Tokenizer | None = None,
    world: int = 1,
    seconds: float = CALIBRATION_SECONDS,
) -> Forecast:
    """Say what `finetune` with these settings will cost for a model of this shape.

    Without documents and tokenizer every token counts as a target: more work for the head than
    there will be.
    """
    length = config.row_length or shape.context
    row, data = Row(length, length), None
    if documents is not None and tokenizer is not None:
        row, data = _look_at(documents / "train.parquet", tokenizer, config, length)
    return forecast(config, shape, causal_loss, row, data=data, world=world, seconds=seconds)


def _look_at(
    path: Path, tokenizer: Tokenizer, config: FinetuneConfig, length: int
) -> tuple[Row, Data | None]:
    """What rows hold, and how many tokens there are, by the first conversations."""
    chats = (document for document in read_documents(path) if document.kind == "chat")
    sample = [
        chat_example([dict(message) for message in document.messages or ()], tokenizer)
        for document in itertools.islice(chats, _SAMPLE)
    ]
    if not sample:
        return Row(length, length), None
    count = len(sample) + sum(1 for _ in chats)
    tokens = sum(len(example.tokens) for example in sample)
    targets = sum(int(np.sum(example.targets != IGNORED)) for example in sample)
    replies = targets / tokens * (1 - config.text_share) + config.text_share
    joined = tokens / len(sample) * (1 + config.join) / 2  # 1 to `join` conversations in a row of turns
    every = round(tokens / len(sample) * count / (1 - config.text_share))
    row = Row(length, replies * length, documents=max(1.0, length / joined))
    return row, Data(every, count, exact=count <= _SAMPLE and not config.text_share)
