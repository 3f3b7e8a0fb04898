"""What the training steps of a recipe will cost, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexmill.errors import ConfigError
from lexmill.recipe.config import Recipe


def plan_costs(recipe: Recipe, run: Path, world: int = 1, seconds: float | None = None) -> dict[str, Any]:
    """A `Forecast` of each training step, by its name.

    Tokens are counted where the run has prepared its data and trained its tokenizer already; else
    the vocabulary is as large as the recipe's tokenizer table says.

    Args:
        run: the run directory, which need not exist.
        world: processes that would train together.
        seconds: for the calibration of a step, about; 0 leaves it out.

    Raises:
        ConfigError: a setting that cannot be, or a recipe that trains nothing.
    """
    from lexmill.finetune.plan import plan_finetuning
    from lexmill.pretrain.plan import plan_pretraining
    from lexmill.tokenizer.tokenizer import Tokenizer

    recipe.check()
    if "pretrain" not in recipe.steps:
        raise ConfigError("This recipe trains no model, so there is nothing to plan.")
    tokenizer = Tokenizer.load(run / "tokenizer") if (run / "tokenizer").is_dir() else None
    documents = run / "prepare" if (run / "prepare" / "train.parquet").is_file() else None
    known: dict[str, Any] = {"documents": documents, "tokenizer": tokenizer, "world": world}
    if seconds is not None:
        known["seconds"] = seconds
    size = tokenizer.vocab_size if tokenizer else recipe.table("tokenizer").vocab_size
    config = recipe.table("pretrain")
    costs = {"pretrain": plan_pretraining(config, vocab_size=size, out=run / "pretrain", **known)}
    if "finetune" in recipe.steps:
        known["data"] = known.pop("documents")
        costs["finetune"] = plan_finetuning(recipe.table("finetune"), config.shape(size), **known)
    return costs
