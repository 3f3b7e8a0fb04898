"""The recipe: one TOML file that says how a model is made, with a table for each step."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmill.config import apply_overrides, from_mapping, read_toml, suggest
from lexmill.errors import ConfigError, FileError

# Each step's table, and where its dataclass lives. Imported only for steps that must run:
# planning starts without torch.
STEPS: dict[str, str] = {
    "prepare": "lexmill.data.prepare:PrepareConfig",
    "rows": "lexmill.recipe.task_steps:RowsConfig",
    "tokenizer": "lexmill.tokenizer.training:TokenizerConfig",
    "base": "lexmill.recipe.task_steps:BaseConfig",
    "pretrain": "lexmill.pretrain.stage:PretrainConfig",
    "finetune": "lexmill.finetune.stage:FinetuneConfig",
    "evaluate": "lexmill.evaluate.stage:EvaluateConfig",
    "export": "lexmill.recipe.steps:ExportConfig",
    "verify": "lexmill.recipe.steps:VerifyConfig",
    "report": "lexmill.recipe.steps:ReportConfig",
}
# Steps that a recipe has only where it names them: labelled rows, and a model that it does not pretrain.
_NAMED_ONLY = ("rows", "base")
DEFAULT_STEPS = tuple(step for step in STEPS if step not in _NAMED_ONLY)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as read: its name, the folder that its paths start from, its steps and their tables."""

    name: str
    description: str
    base: Path
    tables: dict[str, dict[str, Any]]
    steps: tuple[str, ...] = DEFAULT_STEPS

    def table(self, step: str) -> Any:
        """The step's configuration, checked.

        Raises:
            ConfigError: an unknown key, a value of another type or out of range.
        """
        module, _, name = STEPS[step].partition(":")
        return from_mapping(getattr(importlib.import_module(module), name), self.tables[step], step)

    def check(self) -> None:
        """Check every table, so that a mistake in the last step does not show after the first."""
        for step in self.steps:
            self.table(step)


def read_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `pretrain.steps=200`.

    Raises:
        FileError: there is no such file.
        ConfigError: it is no TOML, or has a table that is no step.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: there is no such recipe.", "Try recipes/quickstart.toml.")
    values = apply_overrides(read_toml(path), overrides)
    name, description = values.pop("name", path.stem), values.pop("description", "")
    steps = _chosen_steps(values.pop("steps", list(DEFAULT_STEPS)), path)
    for key, value in values.items():
        if key not in STEPS:
            raise ConfigError(f"{path}: unknown table '{key}'.", suggest(key, STEPS))
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path}: '{key}' should be a table of settings.", f"Write [{key}] on a line of its own."
            )
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{path}: 'name' must be a plain word; it names the run's folder.")
    return Recipe(
        name=name,
        description=str(description),
        base=path.parent,
        tables={step: values.get(step, {}) for step in STEPS},
        steps=steps,
    )


# What a step cannot do without: one of these.
_NEEDED = {
    "rows": ("finetune",),
    "tokenizer": ("prepare", "rows"),
    "pretrain": ("tokenizer",),
    "finetune": ("pretrain", "base"),
    "evaluate": ("pretrain", "base"),
    "export": ("pretrain", "base"),
    "verify": ("export",),
}


def _chosen_steps(steps: Any, path: Path) -> tuple[str, ...]:
    """The steps of a recipe, in their order; all of them when it names none."""
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ConfigError(f"{path}: 'steps' should be a list of names.", f"Steps are {', '.join(STEPS)}.")
    for step in steps:
        if step not in STEPS:
            raise ConfigError(f"{path}: there is no step '{step}'.", suggest(step, STEPS))
        needed = "' or '".join(_NEEDED.get(step, ()))
        if step in _NEEDED and not set(_NEEDED[step]) & set(steps):
            raise ConfigError(f"{path}: the step '{step}' needs the step '{needed}'.")
    if "base" in steps and "pretrain" in steps:
        raise ConfigError(f"{path}: a model comes from the step 'base' or from 'pretrain', not from both.")
    return tuple(step for step in STEPS if step in steps)


def to_toml(recipe: Recipe) -> str:
    """The recipe with all overrides, as TOML: written beside what it made."""
    lines = [f"name = {_toml(recipe.name)}", f"description = {_toml(recipe.description)}"]
    lines += [f"steps = {_toml(recipe.steps)}"]
    for step, table in recipe.tables.items():
        lines += ["", f"[{step}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return str(value)
