"""Translation as a fine-tuning task: a text to the same in another language."""

from __future__ import annotations

from lexmill.data.labelled import TextPair
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TaskData
from lexmill.finetune.writing import writing_lesson
from lexmill.model.directory import ModelDirectory


def translate_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Rows of a source and its translations; see `writing_lesson`.

    A model that has read one language only (an encoder–decoder from scratch) needs no instruction:
    `instruction = "{source}"`.
    """
    return writing_lesson(config, model, data, TextPair)
