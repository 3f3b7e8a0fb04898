"""What a fine-tuning can be told. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lexmill.data.labelled import RowSettings
from lexmill.errors import ConfigError
from lexmill.model.adapter import LoraConfig
from lexmill.model.config import ModelConfig
from lexmill.train.config import LOSS, TrainConfig

_LONGEST_ROW = (
    1024  # tokens of a row where nothing is said; pretrained models have contexts of many thousands
)
_METRIC_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RowSettings, TrainConfig):
    """The `[finetune]` table of a recipe."""

    task: Literal["chat", "classify", "embed", "prefer", "qa", "summarise", "translate"] = "chat"
    lora: LoraConfig | None = None  # train an adapter, not the model
    prompts: tuple[str, ...] = ("Hello",)  # questions whose answers are shown as training goes on
    validation_fraction: float = 0.05  # of the rows of a file, where nothing else is held out
    validation_rows: int = 512  # at most so many examples in each validation
    join: int = 1  # up to so many conversations, drawn anew each epoch, become one of several turns
    text_share: float = (
        0.0  # share of the examples' tokens that are plain text, so that writing is not forgotten
    )
    window: int = 384  # qa by an encoder: tokens of question and context together that are read at once
    overlap: int = 128  # qa by an encoder: tokens of the context that neighbouring windows share
    beta: float = 0.1  # prefer: how dear it is to leave the model that training begins with
    # chat and tasks that write: share of each target that is spread over the vocabulary; prefer: of the pairs that
    # may be the wrong way round
    label_smoothing: float = 0.0
    temperature: float = 0.05  # embed: cosines are divided by it; less makes the nearest texts weigh more
    row_length: int | None = (
        None  # tokens in a training row; when not given the model's context, 1,024 at most
    )
    too_long: Literal["error", "cut", "drop"] = "error"  # rows longer than that: cut the source, or leave out
    # Tasks that write
    instruction: str = ""  # how a row is put to the model: "Summarise: {source}"; "" for the task's own words
    separator: str = "\n\n"  # between it and the answer, where a decoder has no chat template
    no_answer: str = "no answer"  # the answer to a question that its context does not answer
    # Scores of the task
    score: bool = True  # answer validation rows before and after
    score_rows: int = 50  # at most so many
    score_tokens: int = 128  # at most so many are written for each
    metric_rows: int = 0  # rows that are answered at every validation; with a `stop_metric` of the task 64
    text: str = ""  # plain text: for `text_share`, and to measure what is forgotten

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join < 1:
            raise ConfigError("'join' must be at least 1.")
        if not 0 <= self.text_share < 1:
            raise ConfigError("'text_share' must lie in [0, 1).")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError("'validation_fraction' must lie in [0, 1).")
        if self.window < 8 or self.overlap < 0 or self.overlap >= self.window:
            raise ConfigError("'window' must be at least 8, and 'overlap' less than it.")
        if self.beta <= 0:
            raise ConfigError("'beta' must be positive.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError("'label_smoothing' must lie in [0, 0.5).")
        if self.label_smoothing and self.task in ("classify", "embed"):
            raise ConfigError(f"'label_smoothing' is not for the task '{self.task}'.", "Leave it out.")
        if self.temperature <= 0:
            raise ConfigError("'temperature' must be positive.")
        if self.row_length is not None and self.row_length < 4:
            raise ConfigError("'row_length' must be at least 4.")
        if not self.no_answer.strip():
            raise ConfigError("'no_answer' must say something.", 'For example "no answer".')
        for name in ("score_rows", "score_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1.")
        if self.metric_rows < 0:
            raise ConfigError("'metric_rows' must be 0 or more.")
        if not self.metric_rows and self.stop_metric not in ("", LOSS):
            object.__setattr__(self, "metric_rows", _METRIC_ROWS)

    def _chosen(self) -> tuple[str, float]:
        # measured in docs/decisions.md
        if self.task == "prefer":
            return "adamw", 1e-5 if self.lora is None else 3e-4
        return super()._chosen() if self.lora is None else ("adamw", 1e-3)

    def length(self, model: ModelConfig) -> int:
        """Tokens in a training row.

        Raises:
            ConfigError: more than the model's positions reach.
        """
        if self.row_length is None:
            return min(model.context, _LONGEST_ROW)
        if self.row_length > model.context and model.positions != "relative":
            raise ConfigError(
                f"'row_length' ({self.row_length:,}) is more than the model's context ({model.context:,})."
            )
        return self.row_length
