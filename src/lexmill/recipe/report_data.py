"""What a run left behind, read leniently for its report."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexmill.errors import LexmillError
from lexmill.files import read_json
from lexmill.recipe import markup
from lexmill.train.metrics import read_metrics

# step, title, what it makes, and where on the page to read more
STEPS = (
    ("prepare", "Prepare", "documents from raw files", "data"),
    ("rows", "Rows", "labelled rows, checked", "finetune"),
    ("tokenizer", "Tokenizer", "a vocabulary", "data"),
    ("base", "Base", "a model to begin with", "finetune"),
    ("pretrain", "Pretrain", "a base model", "pretrain"),
    ("finetune", "Fine-tune", "a model that answers", "finetune"),
    ("evaluate", "Evaluate", "scores", "scores"),
    ("export", "Export", "files for other runtimes", "lineage"),
    ("verify", "Verify", "runtimes compared", "verify"),
)


@dataclass
class Stage:
    """What training left: its curves and its samples."""

    name: str
    title: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> dict[int, float]:
        """The finite values of a figure by step."""
        return {
            line["step"]: line[key]
            for line in self.metrics
            if isinstance(line.get("step"), int) and markup.is_finite(line.get(key))
        }

    @property
    def tokens(self) -> int | None:
        """Tokens seen in the whole of this training."""
        return max((int(tokens) for tokens in self.series("tokens").values()), default=None)


@dataclass
class Run:
    """Everything that the page shows, read leniently."""

    name: str
    recipe: str
    records: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    stages: tuple[Stage, ...]
    scores: dict[str, Any]
    verification: dict[str, Any]
    lineage: dict[str, Any]
    environment: dict[str, Any]
    unreadable: list[str]

    @property
    def steps(self) -> frozenset[str]:
        """The steps that the recipe has; all where its text does not say."""
        found = re.search(r"^steps = \[(.*)\]$", self.recipe, re.MULTILINE)
        named = re.findall(r'"(\w+)"', found.group(1)) if found else []
        return frozenset(named) or frozenset(step for step, *_ in STEPS if step not in ("rows", "base"))

    @classmethod
    def read(cls, run: Path) -> Run:
        """Read a run directory; what is damaged is listed in `unreadable`."""
        unreadable: list[str] = []

        def table(path: str) -> dict[str, Any]:
            if not (run / path).is_file():
                return {}
            try:
                value = read_json(run / path)
            except (LexmillError, OSError, ValueError):
                value = None
            if not isinstance(value, dict):
                unreadable.append(path)
                return {}
            return value

        recipe = run / "recipe.toml"
        try:
            recipe_text = recipe.read_text("utf-8", "replace") if recipe.is_file() else ""
        except OSError:
            recipe_text = ""
            unreadable.append(recipe.name)
        return cls(
            name=run.resolve().name,
            recipe=recipe_text,
            records={step: table(f"{step}/step.json") for step, *_ in STEPS},
            manifest=table("prepare/manifest.json"),
            stages=tuple(
                Stage(step, title, _lines(run / step / "metrics.jsonl"), _lines(run / step / "samples.jsonl"))
                for step, title in (("pretrain", "Pretraining"), ("finetune", "Fine-tuning"))
            ),
            scores=_together(table("finetune/scores.json"), table("evaluate/scores.json")),
            verification=table("verify.json"),
            lineage=table("model/lexmill.json"),
            environment=table("environment.json"),
            unreadable=unreadable,
        )

    def figure(self, step: str, name: str) -> Any:
        """A figure that a step remembered, or None."""
        return markup.as_dict(self.records[step].get("figures")).get(name)

    def seconds(self, step: str) -> float | None:
        """How long a step took."""
        seconds = self.records[step].get("seconds")
        return seconds if markup.is_finite(seconds) else None

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The checks of the runtimes."""
        return markup.as_dicts(self.verification.get("checks"))

    @property
    def diagnoses(self) -> list[dict[str, Any]]:
        """The likely causes of what differs."""
        return markup.as_dicts(self.verification.get("diagnoses"))


def _together(tuned: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """What fine-tuning scored of its task, and what the step "evaluate" did."""
    examples = [*markup.as_dicts(tuned.get("examples")), *markup.as_dicts(scores.get("examples"))]
    return {**tuned, **scores} | ({"examples": examples} if examples else {})


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_metrics(path))
    except (OSError, ValueError, RecursionError):  # ValueError: a number of thousands of digits
        return []
