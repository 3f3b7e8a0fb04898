"""What every training run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lexmill.errors import ConfigError
from lexmill.train.parallel import Sharding
from lexmill.train.trackers import TrackerName, require_trackers

LOSS = "loss"
_FALL = (LOSS, "perplexity", "error", "bits_per_byte")  # figures that end so are better when lower


def lower_is_better(figure: str) -> bool:
    """Whether a figure of this name should fall: losses, perplexities, errors; all others should rise."""
    return figure.endswith(_FALL)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train. Exactly one of `steps`, `tokens`, `minutes` is the budget."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    rows: int = 16  # rows of `context` tokens in a step
    micro_rows: int | None = None  # rows computed at once; all of them when not given
    optimizer: Literal["auto", "muon", "adamw"] = "auto"  # auto: Muon; AdamW for adapters
    learning_rate: float = 0.0  # of AdamW; 0 chooses: 0.003, for adapters 0.001
    matrix_learning_rate: float = 0.02  # of Muon
    weight_decay: float = 0.0
    warmup: int = 10  # steps
    decay: float = 0.4  # fraction of the run, at its end
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validate_every: int = 100  # steps
    sample_every: int = 200  # steps
    checkpoint_seconds: float = 15.0
    keep_last: int = 2  # checkpoints
    keep_best: bool = False  # end with the weights of the best validation, not with the last ones
    stop_metric: str = ""  # what is best: a figure of validations, without "validation_"; "" is the loss
    patience: int = 0  # stop after so many validations in a row without a better one, keep the best; 0: never
    max_skipped: int = 10  # steps in a row without a finite gradient, then training stops
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False  # torch.compile, on GPUs
    deterministic: bool = (
        False  # on GPUs: sums in one order, so that a run has the same bits each time; slower
    )
    gradient_checkpointing: bool = False  # compute each block again on the way back: less memory, more time
    sharding: Sharding = (
        "replicate"  # with several processes: a copy of the model in each, or a part ("shard")
    )
    track: tuple[TrackerName, ...] = ()  # who else gets the figures; each needs the extra of its name

    def __post_init__(self) -> None:
        optimizer, rate = self._chosen()
        if self.optimizer == "auto":
            object.__setattr__(self, "optimizer", optimizer)
        if self.learning_rate == 0:
            object.__setattr__(self, "learning_rate", rate)
        budgets = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise ConfigError(
                f"exactly one of 'steps', 'tokens' and 'minutes' must be set, not {len(budgets)}.",
                "Remove the others, or set one.",
            )
        if getattr(self, budgets[0]) <= 0:
            raise ConfigError(f"'{budgets[0]}' must be positive.")
        for name in ("rows", "validate_every", "sample_every", "keep_last", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1.")
        if self.micro_rows is not None and not 1 <= self.micro_rows <= self.rows:
            raise ConfigError(f"'micro_rows' must lie between 1 and 'rows' ({self.rows}).")
        if self.patience < 0:
            raise ConfigError("'patience' must be 0 (never stop early) or more.")
        if self.patience or self.stop_metric:
            object.__setattr__(self, "keep_best", True)
        if not 0 < self.decay <= 1:
            raise ConfigError("'decay' must lie in (0, 1].")
        require_trackers(self.track)  # a missing package shows now, not after preparing data

    def _chosen(self) -> tuple[str, float]:
        """The optimiser, and AdamW's learning rate, where a run does not say."""
        return "muon", 3e-3
