"""What is compared of several runs: their curves, their figures, and the settings in which they differ."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexmill.config import read_toml
from lexmill.errors import FileError, LexmillError
from lexmill.files import explain_os_errors, read_json
from lexmill.recipe.markup import as_dict, is_finite
from lexmill.recipe.report_data import Stage
from lexmill.train.metrics import read_metrics

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}
METRICS = "metrics.jsonl"
_NOT_COMPARED = ("track",)  # who watched is no difference


@dataclass
class Training(Stage):
    """One training of one run: its metrics, and what it was told.

    Attributes:
        folder: where its metrics lie.
        facts: `training.json`: parameters, precision, settings; empty for runs made before there was one.
        record: the figures that a finished step remembered.
        going: whether its step has not ended.
    """

    folder: Path = Path()
    facts: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    going: bool = False

    def table(self) -> dict[str, Any]:
        """Its row in the table of runs; None for what is not known."""
        last = {name: next(reversed(self.series(name).values()), None) for name in ("tokens", "seconds")}
        losses, speeds = self.series("validation_loss"), sorted(self.series("tokens_per_second").values())
        best = min(losses, key=lambda step: losses[step], default=None)
        return {
            "parameters": self.facts.get("parameters", self.record.get("parameters")),
            "steps": max(self.series("tokens"), default=None),
            **last,
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
            "last_validation_loss": next(reversed(losses.values()), None),
            "best_validation_loss": None if best is None else losses[best],
            "best_step": best,
            **{
                f"last_{name}": next(reversed(self.series(name).values()))
                for name in self.accuracies
                if self.series(name)
            },
            "precision": self.facts.get("precision", self.record.get("precision")),
            "in_progress": self.going,
        }

    @property
    def accuracies(self) -> list[str]:
        """The names of its validation accuracies."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        return [name for name in names if name.startswith("validation_") and name.endswith("_accuracy")]

    def marks(self) -> Iterator[dict[str, Any]]:
        """Its spikes and skipped steps: step, kind, loss (None if it was no number), numbers of documents."""
        skipped = set()
        for line in self.metrics:
            step = line.get("step")
            if not isinstance(step, int):
                continue
            if "spike" in line or "skipped" in line:
                loss = line.get("spike")
                documents = [one for one in line.get("documents") or () if isinstance(one, int)]
                kind = "spike" if "spike" in line else "skipped"
                skipped |= {step} if kind == "skipped" else set()
                yield {"step": step, "kind": kind, "loss": loss if is_finite(loss) else None, "documents": documents}  # fmt: skip
            elif step not in skipped and any(
                name in line and not is_finite(line[name]) for name in ("loss", "gradient_norm")
            ):  # before skipped steps had lines of their own
                yield {"step": step, "kind": "skipped", "loss": None, "documents": []}


@dataclass
class ComparedRun:
    """A run as the comparison sees it.

    Attributes:
        name: short, and no other run of the comparison has it.
        path: as it was given.
        trainings: by stage, "pretrain" or "finetune".
        settings: by dotted path, as they are compared.
        complete: those tables of `settings` that also hold what was left at its default.
    """

    name: str
    path: Path
    trainings: dict[str, Training]
    settings: dict[str, Any]
    complete: frozenset[str]


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read run directories, and folders that hold `metrics.jsonl` themselves.

    Raises:
        FileError: a folder that is missing, has no metrics, or is given twice.
    """
    seen: dict[Path, Path] = {}
    found: list[dict[str, Training]] = []
    for path in paths:
        trainings = _trainings(path)
        for training in trainings.values():
            if (place := training.folder.resolve()) in seen:
                raise FileError(
                    f"{path}: this run is given twice (also as {seen[place]}).", "Name each run once."
                )
            seen[place] = path
        found.append(trainings)
    names = short_names(paths)
    return [_run(name, path, trainings) for name, path, trainings in zip(names, paths, found)]


def _trainings(path: Path) -> dict[str, Training]:
    """The trainings of a run, by stage."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "there is no such folder"
        raise FileError(
            f"{path}: {what}.",
            "Name run directories, or folders that 'lexmill pretrain' or 'finetune' wrote.",
        )
    found: dict[str, Training] = {}
    if (path / METRICS).is_file():
        stage, going = _stage_of(path), not (path / "model").is_dir()
        found[stage] = _read_training(stage, path, going)
    else:
        for stage in STAGES:
            # the work folder is there only while a step runs, or waits to be gone on with
            places = [(path / ".work" / stage / stage, True), (path / stage, False)]
            for place, going in places:
                if (place / METRICS).is_file():
                    found[stage] = _read_training(stage, place, going)
                    if found[stage].metrics:
                        break
    if not found:
        raise FileError(
            f"{path}: there is no {METRICS} in it, nor in its pretrain/ or finetune/.",
            "Name run directories, or folders that 'lexmill pretrain' or 'finetune' wrote.",
        )
    if not any(training.series("loss") for training in found.values()):
        raise FileError(f"{path}: its {METRICS} holds no step yet.", "Wait until training has begun.")
    return found


def _stage_of(folder: Path) -> str:
    """Which stage wrote a folder."""
    said = str(_table(folder / "training.json").get("stage", ""))
    if not said:
        history = _table(folder / "model" / "lexmill.json").get("history")
        last = history[-1] if isinstance(history, list) and history else {}
        said = str(as_dict(last).get("stage") or folder.name)
    return "finetune" if said.replace("-", "").startswith("finetun") else "pretrain"


def _read_training(stage: str, folder: Path, going: bool) -> Training:
    with explain_os_errors(folder / METRICS, "read"):
        try:
            lines = list(read_metrics(folder / METRICS))
        except (ValueError, RecursionError):  # ValueError: a number of thousands of digits
            lines = []
    record = as_dict(_table(folder / "step.json").get("figures")) or _table(folder / "result.json")
    return Training(
        stage,
        STAGES[stage],
        lines,
        folder=folder,
        facts=_table(folder / "training.json"),
        record=record,
        going=going,
    )


def _table(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none that can be read."""
    with contextlib.suppress(LexmillError, OSError, ValueError):
        if path.is_file():
            return as_dict(read_json(path))
    return {}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as it takes to tell all apart."""
    parts = [path.absolute().resolve().parts for path in paths]
    lengths = [2 if one[-1] in STAGES and len(one) > 2 else 1 for one in parts]
    while True:
        names = ["/".join(one[-length:]) for one, length in zip(parts, lengths)]
        again = [place for place, name in enumerate(names) if names.count(name) > 1]
        longer = [place for place in again if lengths[place] < len(parts[place])]
        if not longer:
            return names
        for place in longer:
            lengths[place] += 1


def _run(name: str, path: Path, trainings: dict[str, Training]) -> ComparedRun:
    settings: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    with contextlib.suppress(LexmillError, OSError):
        if (path / "recipe.toml").is_file():
            recipe = read_toml(path / "recipe.toml")
    for table, values in recipe.items():
        if isinstance(values, dict):
            settings |= dict(_flat(values, table))
    complete = set()
    for stage, training in trainings.items():
        if told := as_dict(training.facts.get("settings")):
            settings = {key: value for key, value in settings.items() if not key.startswith(f"{stage}.")}
            settings |= dict(_flat(told, stage))
            complete.add(stage)
    return ComparedRun(name, path, trainings, settings, frozenset(complete))


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if key in _NOT_COMPARED:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """The settings in which runs differ: dotted path to the value of each run, None where it does not say.

    A run that names only what its recipe sets is not different from one that names every setting
    just because it leaves a setting out; two recipes are.
    """
    found = {}
    for key in sorted({key for run in runs for key in run.settings}):
        table = key.split(".")[0]
        # a run without this stage has no such setting
        concerned = [run for run in runs if table not in STAGES or table in run.trainings]
        if table not in STAGES:
            concerned = [run for run in runs if any(one.startswith(f"{table}.") for one in run.settings)]
        some_complete = any(table in run.complete for run in concerned)
        said = {
            json.dumps(run.settings.get(key), sort_keys=True, default=str)
            for run in concerned
            if key in run.settings or not some_complete or table in run.complete
        }
        if len(said) > 1:
            found[key] = [run.settings.get(key) for run in runs]
    return found


def comparison(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The tables of the page as plain values: a row for each training of each run, and the differences."""
    rows = [
        {"run": run.name, "folder": str(run.path), "stage": stage, **training.table()}
        for stage in STAGES
        for run in runs
        if (training := run.trainings.get(stage))
    ]
    names = [run.name for run in runs]
    return {
        "runs": rows,
        "differences": {key: dict(zip(names, values)) for key, values in differences(runs).items()},
    }
