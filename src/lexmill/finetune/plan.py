"""What a fine-tuning will cost, before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmill.data.labelled import Conversation, LabelledText, Match, Question
from lexmill.finetune.chat import chat_example
from lexmill.finetune.classify import label_examples
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.embed import match_examples
from lexmill.finetune.extractive import span_examples
from lexmill.finetune.rows import TRAIN, TaskData
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_model
from lexmill.model.config import ModelConfig
from lexmill.model.lora import add_adapter, begin_adapter
from lexmill.model.quantised import build_quantised
from lexmill.model.transformer import Transformer
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch
from lexmill.train.causal import causal_loss
from lexmill.train.cost import Row, adapter_cost
from lexmill.train.examples import IGNORED
from lexmill.train.forecast import CALIBRATION_SECONDS, Data, Forecast, forecast
from lexmill.train.objective import Losses
from lexmill.train.pooling import read_rows

_SAMPLE = 200  # conversations that are tokenized


def plan_finetuning(
    config: FinetuneConfig,
    shape: ModelConfig,
    *,
    data: Path | None = None,
    validation: Path | None = None,
    tokenizer: Tokenizer | None = None,
    world: int = 1,
    seconds: float = CALIBRATION_SECONDS,
) -> Forecast:
    """Say what `finetune` with these settings will cost for a model of this shape.

    Without data and tokenizer every token counts as a target: more work for the head than
    there will be.
    """
    length = config.length(shape)
    row, found = Row(length, length), None
    judges = shape.shape == "encoder"
    if judges:
        row = Row(length, 0.0)
    if data is not None and tokenizer is not None:
        rows = TaskData(
            path=data,
            held_out=validation,
            fraction=config.validation_fraction,
            seed=config.seed,
            settings=config,
        )
        if judges:
            row, found = _look_at_texts(rows, tokenizer, config, length)
        else:
            row, found = _look_at(rows.rows(TRAIN, Conversation), tokenizer, config, length)
    lora = config.lora
    return forecast(
        config,
        shape,
        _reading if judges else causal_loss,
        row,
        data=found,
        world=world,
        seconds=seconds,
        adapter=adapter_cost(shape, lora) if lora else None,
        build=partial(_any_weights, shape, lora) if lora else None,
    )


def _any_weights(shape: ModelConfig, lora: LoraConfig) -> Transformer:
    """A model with an adapter as the run has it, of weights that mean nothing."""
    model = build_model(shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02)
    if lora.quantise:
        model, _ = build_quantised(shape, model.weights(), lora.quantise)
    add_adapter(model, begin_adapter(model, lora, seed=0))
    return model


def _reading(model: Any, batch: Batch) -> Losses:
    """What an encoder's tasks cost: reading. Their heads are a few columns at a few places."""
    losses = Losses()
    losses.add("tokens", (read_rows(model, batch).float().square().sum(), None))
    return losses


def _look_at_texts(
    data: TaskData, tokenizer: Tokenizer, config: FinetuneConfig, length: int
) -> tuple[Row, Data | None]:
    """The same for an encoder's tasks."""
    if config.task == "classify":
        texts = list(data.rows(TRAIN, LabelledText))
        labels = sorted({text.label for text in texts})
        examples = label_examples(texts[:_SAMPLE], tokenizer, labels, length)
        rows = len(texts)
    elif config.task == "embed":
        matches = list(data.rows(TRAIN, Match))
        examples = match_examples(matches[:_SAMPLE], tokenizer, length)
        rows = len(matches)
    else:
        questions = list(data.rows(TRAIN, Question))
        window = min(config.window, length)
        examples = span_examples(
            questions[:_SAMPLE], tokenizer, window, min(config.overlap, window // 2)
        ).examples
        rows = len(questions)
    tokens = sum(len(example.tokens) for example in examples)
    if not tokens:
        return Row(length, 0.0), None
    row = Row(length, 0.0, documents=max(1.0, length * len(examples) / tokens))
    seen = min(rows, _SAMPLE)
    return row, Data(round(tokens * rows / seen), rows, exact=rows <= _SAMPLE)


def _look_at(
    chats: Iterator[Conversation], tokenizer: Tokenizer, config: FinetuneConfig, length: int
) -> tuple[Row, Data | None]:
    """What rows hold, and how many tokens there are, by the first conversations."""
    sample = [chat_example(chat.messages, tokenizer) for chat in itertools.islice(chats, _SAMPLE)]
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
