"""What scoring a task takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lexmill.data.labelled import Row, RowSettings
from lexmill.errors import ConfigError
from lexmill.finetune.writing import Asking
from lexmill.inference.language_model import LanguageModel
from lexmill.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(RowSettings):
    """How a model is asked, and how the rows are read."""

    limit: int | None = None  # rows at most, the first ones
    max_tokens: int = 256  # of what is written
    beams: int = 1  # above 1: beam search
    length_penalty: float = 1.0  # of beam search
    examples: int = 10  # kept for a reader
    reference: str = ""  # prefer: the model that training began with; an adapter's is its base
    language: str = "auto"  # of answers: "en" is scored as SQuAD, "zh" as CMRC 2018; auto: as they look
    too_long: Literal["error", "cut", "drop"] = "error"  # rows that the model cannot read whole
    instruction: str = ""  # of tasks that write, if not the words of the model's training

    @property
    def options(self) -> dict[str, Any]:
        """Those of writing."""
        return {"beams": self.beams, "max_tokens": self.max_tokens, "length_penalty": self.length_penalty}

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1.")


# (model, prompts as ids, options of `write_ids`, is told how many more are done) -> what is written
Writer = Callable[
    [LanguageModel, Sequence[Sequence[int]], dict[str, Any], Callable[[int], None]], list[list[int]]
]


@dataclass(frozen=True)
class Scoring:
    """What is asked: rows of the task's kind, and how.

    Attributes:
        write: who writes, if not the model itself: another runtime.
        asking: in which words, if not those of the model's training.
    """

    rows: Sequence[Row]
    config: ScoreConfig = field(default_factory=ScoreConfig)
    progress: Progress = SILENT
    write: Writer | None = None
    asking: Asking | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What came out.

    Attributes:
        metrics: by name; the first is the one by which models of this task are compared. Shares lie in
            [0, 1], unless the official script gives percent (BLEU, chrF, SQuAD's exact match and F1).
        rows: how many were scored.
        details: what is no single number: a confusion matrix, sacrebleu's signature.
        examples: the first rows, as texts: what was asked, expected and given.
        predictions: for every row, in order.
    """

    task: str
    metrics: dict[str, float]
    rows: int
    details: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    predictions: list[Any] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All but the predictions, for `--json` and scores.json."""
        return {
            "task": self.task,
            "rows": self.rows,
            "metrics": self.metrics,
            "details": self.details,
            "examples": self.examples,
        }
