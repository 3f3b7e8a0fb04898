"""What a fine-tuning will cost, before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmill.data.labelled import Conversation, LabelledText, Match, Preference, Question, TextPair
from lexmill.finetune.chat import chat_example
from lexmill.finetune.classify import label_examples
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.embed import match_examples
from lexmill.finetune.extractive import span_examples
from lexmill.finetune.prefer import pair_example
from lexmill.finetune.rows import TRAIN, TaskData
from lexmill.finetune.stage import adapted_model, kept_in_bfloat16
from lexmill.finetune.writing import INSTRUCTIONS, asking_of, decoder_length, fit_rows
from lexmill.model.config import ModelConfig
from lexmill.model.lora import without_adapter
from lexmill.model.names import weight_shapes
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch
from lexmill.train.causal import causal_loss, sequence_loss
from lexmill.train.cost import Row, adapter_cost
from lexmill.train.examples import IGNORED, Example
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
    judges, two = shape.shape == "encoder", shape.shape == "encoder_decoder"
    if judges:
        row = Row(length, 0.0)
    elif two:
        row = Row(length, length, decoder_length=length)
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
        elif config.task == "prefer":
            pairs = rows.rows(TRAIN, Preference)
            row, found = _look_at((pair_example(pair, tokenizer) for pair in pairs), config, length)
        elif config.task in INSTRUCTIONS:
            row, found = _look_at_writing(rows, tokenizer, config, shape)
        else:
            chats = rows.rows(TRAIN, Conversation)
            row, found = _look_at((chat_example(chat.messages, tokenizer) for chat in chats), config, length)
    lora = config.lora
    compared = config.task == "prefer" and lora is not None
    return forecast(
        config,
        shape,
        _reading if judges else sequence_loss if two else _preferring if compared else causal_loss,
        row,
        data=found,
        world=world,
        seconds=seconds,
        adapter=adapter_cost(shape, lora, kept_in_bfloat16(config, lora, shape)) if lora else None,
        build=(lambda: adapted_model(config, lora, shape, _AnyWeights(shape))[0]) if lora else None,
    )


class _AnyWeights(Mapping[str, np.ndarray]):
    """Weights of a shape that mean nothing."""

    def __init__(self, shape: ModelConfig) -> None:
        self._shapes, self._random = weight_shapes(shape), np.random.default_rng(0)

    def __getitem__(self, own: str) -> np.ndarray:
        size = self._shapes[own]
        return np.ones(size) if len(size) == 1 else 0.02 * self._random.standard_normal(size, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _preferring(model: Any, batch: Batch) -> Losses:
    """What preferences cost with an adapter: the same rows are read once more without it."""
    with torch.no_grad(), without_adapter(model):
        causal_loss(model, batch)
    return causal_loss(model, batch)


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


def _look_at_writing(
    data: TaskData, tokenizer: Tokenizer, config: FinetuneConfig, shape: ModelConfig
) -> tuple[Row, Data | None]:
    """The same for tasks that write."""
    kind: type[Question] | type[TextPair] = Question if config.task == "qa" else TextPair
    rows = list(data.rows(TRAIN, kind))
    length, asking = config.length(shape), asking_of(config, shape, kind)
    fitted = fit_rows(rows[:_SAMPLE], asking, tokenizer, shape, length, config.too_long)
    read = sum(len(ids) for ids in fitted.prompts)
    written = sum(len(answers[0]) for answers in fitted.answers)
    if not read:
        return Row(length, length), None
    count = len(fitted.prompts)
    if shape.shape == "encoder_decoder":
        room = decoder_length([fitted], length)
        share = min(length / read, room / written)  # of the sample, in a row
        row = Row(length, written * share, decoder_length=room, documents=max(1.0, count * share))
        tokens = read + written
    else:
        tokens = read + written - count
        replies = written / tokens * (1 - config.text_share) + config.text_share
        row = Row(length, replies * length, documents=max(1.0, length * count / tokens))
        tokens = round(tokens / (1 - config.text_share))
    seen = min(len(rows), _SAMPLE)
    exact = len(rows) <= _SAMPLE and not config.text_share
    return row, Data(round(tokens * len(rows) / seen), len(rows), exact=exact)


def _look_at(made: Iterator[Example], config: FinetuneConfig, length: int) -> tuple[Row, Data | None]:
    """What rows hold, and how many tokens there are, by the first conversations or pairs of replies."""
    sample = list(itertools.islice(made, _SAMPLE))
    if not sample:
        return Row(length, length), None
    count = len(sample) + sum(1 for _ in made)
    tokens = sum(len(example.tokens) for example in sample)
    targets = sum(int(np.sum(example.targets != IGNORED)) for example in sample)
    replies = targets / tokens * (1 - config.text_share) + config.text_share
    joined = tokens / len(sample) * (1 + config.join) / 2  # 1 to `join` conversations in a row of turns
    every = round(tokens / len(sample) * count / (1 - config.text_share))
    row = Row(length, replies * length, documents=max(1.0, length / joined))
    return row, Data(every, count, exact=count <= _SAMPLE and not config.text_share)
