"""Which steps of a recipe are done, and which must run and why. Nothing here imports torch."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lexmill
from lexmill.errors import LexmillError
from lexmill.files import explain_os_errors, read_json, sha256_file, sha256_json
from lexmill.recipe.config import Recipe
from lexmill.recipe.steps import STEP_KINDS, STEP_PACKAGES

RECORD = "step.json"
WORK = ".work"
_WATCHING = ("track",)  # settings that decide nothing: who watches may change while a run goes on
REDO = "redo.json"  # in WORK: the steps that `--from` asked for and that have not run since


@dataclass(frozen=True)
class Planned:
    """One step of a plan. `reason` is "" when it is done."""

    step: str
    parts: dict[str, Any]  # what the result depends on, by name
    reason: str
    record: dict[str, Any]  # what is remembered of its last run; empty if there was none

    @property
    def key(self) -> str:
        """The hash of everything that the result depends on."""
        return sha256_json(self.parts)


def record_path(run: Path, step: str) -> Path:
    """Where a finished step is remembered."""
    return run / step / RECORD


def read_record(run: Path, step: str) -> dict[str, Any]:
    """What is remembered of a step; empty when it never ended."""
    path = record_path(run, step)
    try:
        record = read_json(path, "step record") if path.is_file() else {}
    except LexmillError:
        return {}
    return record if isinstance(record, dict) else {}


def read_redo(run: Path) -> list[str]:
    """The steps that were asked for with `--from` and have not run since: a killed run still owes them."""
    path = run / WORK / REDO
    try:
        steps = read_json(path, "list of steps") if path.is_file() else []
    except LexmillError:
        return []
    return [step for step in steps if step in STEP_KINDS] if isinstance(steps, list) else []


def steps_from(start: str) -> list[str]:
    """A step and all that need it, directly or not, in order."""
    found = [start]
    for step, kind in STEP_KINDS.items():
        if step not in found and any(need in found for need in kind.needs):
            found.append(step)
    return [step for step in STEP_KINDS if step in found]


def make_plan(recipe: Recipe, run: Path, start: str | None = None) -> list[Planned]:
    """Plan all steps in order.

    Args:
        start: this step and all that need it run again, done or not.
    """
    plan: list[Planned] = []
    rerun: set[str] = set()
    asked = {*read_redo(run), *(steps_from(start) if start else ())}
    for step in recipe.steps:
        kind = STEP_KINDS[step]
        record = read_record(run, step)
        parts = {
            "recipe": {key: value for key, value in recipe.tables[step].items() if key not in _WATCHING},
            "code": code_version(kind.rooms),
            "packages": {name: _version(name) for name in STEP_PACKAGES.get(step, ())},
            "inputs": _inputs(recipe, run, step),
        }
        if changed := [need for need in kind.needs if need in rerun]:
            reason = f"needs {', '.join(changed)}, which runs"
        elif step in asked:
            reason = "asked for with --from"
        else:
            reason = _why(record, parts, run)
        if reason:
            rerun.add(step)
        plan.append(Planned(step, parts, reason, record))
    return plan


def _inputs(recipe: Recipe, run: Path, step: str) -> dict[str, str]:
    """The hashes of what a step reads: outputs of earlier steps, or raw files."""
    if step == "prepare":
        return _raw_files(recipe)
    hashes = _named_files(recipe, step) if step in ("rows", "base") else {}
    for need in (need for need in STEP_KINDS[step].needs if need in recipe.steps):
        outputs = read_record(run, need).get("outputs", {})
        hashes |= {path: entry.get("sha256", "") for path, entry in outputs.items() if not _is_log(path)}
    return hashes


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, computed anew only when the file is another one or was written since.

    A run plans before each step, and would otherwise read every finished output each time.
    """
    with explain_os_errors(path, "read"):
        state = path.stat()
    return _hash_of(str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=65536)
def _hash_of(path: str, *state: int) -> str:
    return sha256_file(path)


def _is_log(path: str) -> bool:
    """Files that hold times, or are for those who watch: they differ from run to run and decide nothing."""
    if {"tensorboard", "wandb"} & set(Path(path).parts[:-1]):
        return True
    return Path(path).name in (
        "metrics.jsonl", "result.json", "training.json", "tracking.json", "verify.json", "samples.jsonl",
    )  # fmt: skip


def _raw_files(recipe: Recipe) -> dict[str, str]:
    from lexmill.data.folders import find_inputs

    config = recipe.table("prepare")
    files = find_inputs([source.path for source in config.sources], config.base(recipe.base))
    return {str(path): content_hash(path) for path in files}


def _named_files(recipe: Recipe, step: str) -> dict[str, str]:
    """The files that `[rows]` or `[base]` name, where they are there; the step says what is missing."""
    from lexmill.recipe.task_steps import named_files

    return {str(path): content_hash(path) for path in named_files(recipe, step)}


def _why(record: dict[str, Any], parts: dict[str, Any], run: Path) -> str:
    if not record:
        return "not done yet"
    old = record.get("parts", {})
    if record.get("key") != sha256_json(parts):
        names = {
            "recipe": "the recipe",
            "code": "lexmill's code",
            "packages": "a package",
            "inputs": "its input",
        }
        changed = [said for name, said in names.items() if old.get(name) != parts[name]]
        if parts["recipe"] != old.get("recipe"):
            now, before = parts["recipe"], old.get("recipe") or {}
            keys = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
            return f"the recipe changed: {', '.join(keys)}"
        return f"{' and '.join(changed)} changed"
    for path, entry in record.get("outputs", {}).items():
        if not (run / path).is_file():
            return f"{path} is missing"
        if (run / path).stat().st_size != entry["bytes"] or content_hash(run / path) != entry["sha256"]:
            return f"{path} was changed by somebody"
    return ""


@functools.lru_cache(maxsize=64)
def code_version(rooms: tuple[str, ...]) -> str:
    """The hash of the source of these rooms and modules of lexmill."""
    root = Path(lexmill.__file__).parent
    digest = hashlib.sha256()
    for room in rooms:
        path = root / room.replace(".", "/")
        files = sorted(path.rglob("*")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
