"""What a task gives the fine-tuning stage: each task is one file with a function that makes a `Lesson`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lexmill.data.labelled import Row
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.rows import TaskData
from lexmill.model.directory import ModelDirectory
from lexmill.progress import Progress
from lexmill.train.examples import Example
from lexmill.train.objective import Objective


@dataclass(frozen=True)
class Lesson:
    """What is learned, in numbers.

    Attributes:
        loss: the objective; its sums name the metrics that `metrics.jsonl` and the live view show.
        examples: those of an epoch: tokens, and targets that are `IGNORED` where the loss does not count.
        validation: held out, at most `validation_rows` of them; may be empty.
        length: tokens of a row; `decoder_length` of what an encoder–decoder writes.
        pad: fills rows.
        told: what there is to learn from, for a reader: "3,121 conversations".
        facts: for the lineage.
        base: the model with the head that the task needs; None where the given one has all.
        begin: looks at the model as it is before training, where the objective needs that: (model, rows that are
            computed at once, progress).
        after: what is fitted on held-out rows when training is done, for `lexmill.json`: (model) -> facts.
        targets: what is predicted, as metrics are named.
        held_out: the rows of `validation`, where something is tuned on the task's own score.
    """

    loss: Objective
    examples: Callable[[int], Sequence[Example]]
    validation: Sequence[Example]
    length: int
    pad: int
    told: str
    decoder_length: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    base: ModelDirectory | None = None
    begin: Callable[[Any, int, Progress], None] | None = None
    after: Callable[[Any], dict[str, Any]] | None = None
    targets: str = "tokens"
    held_out: Sequence[Row] = ()


# (settings, the model that learns, its data) -> what it learns
TaskMaker = Callable[[FinetuneConfig, ModelDirectory, TaskData], Lesson]
