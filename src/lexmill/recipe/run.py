"""Running a recipe: only what must run, each step whole or not at all, going on where it was stopped."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from lexmill.errors import ConfigError, FileError
from lexmill.files import (
    atomic_write,
    exclusive_lock,
    explain_os_errors,
    is_kept_copy,
    remove_partials,
    replace_path,
    write_json,
)
from lexmill.progress import SILENT, Progress, format_duration
from lexmill.recipe import together
from lexmill.recipe.config import Recipe, read_recipe, to_toml
from lexmill.recipe.plan import (
    REDO,
    WORK,
    Planned,
    content_hash,
    make_plan,
    read_record,
    read_redo,
    record_path,
    steps_from,
)
from lexmill.recipe.steps import STEP_KINDS, Place


def run(
    recipe: Recipe | Path | str,
    out: Path | None = None,
    *,
    start: str | None = None,
    overrides: tuple[str, ...] = (),
    progress: Progress = SILENT,
) -> list[Planned]:
    """Run a recipe, or what is left of it.

    Args:
        recipe: a recipe or the path of one.
        out: the run directory; `runs/NAME` when not given.
        start: run this step and all that need it again, even if done. Killed on the way, the next
            call goes on with them, with or without `start`.

    Returns:
        The plan that was carried out. A step whose `reason` is empty was done already. Empty in all
        processes but the first, where torchrun started several.

    Raises:
        LexmillError: whatever a step found wrong. What was finished stays, and the same call goes on.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    folder = run_directory(recipe, out)
    if start is not None and start not in recipe.steps:
        raise ConfigError(f"There is no step '{start}'.", f"Steps are {', '.join(recipe.steps)}.")
    if together.is_follower():
        _compute_settings()
        together.follow(recipe)
        return []
    try:
        return _run(recipe, folder, start, progress)
    finally:
        together.dismiss()


def _run(recipe: Recipe, folder: Path, start: str | None, progress: Progress) -> list[Planned]:
    with exclusive_lock(folder / ".lock", f"the run {folder}"):
        first = make_plan(recipe, folder, start)
        waiting = [planned for planned in first if planned.reason]
        if not waiting:
            return first
        recipe.check()
        _check_writable(folder)
        remove_partials(folder)
        with atomic_write(folder / "recipe.toml", "w") as file:
            file.write(to_toml(recipe))
        _compute_settings()
        if start is not None:  # written down first: killed after this, the run still owes these steps
            _write_redo(
                folder, [step for step in STEP_KINDS if step in {*read_redo(folder), *steps_from(start)}]
            )
        for step in recipe.steps:
            # planned anew: what a step reads is known only when the one before has ended
            planned = next(one for one in make_plan(recipe, folder) if one.step == step)
            if planned.reason:
                _run_step(recipe, folder, planned, progress)
    return first


def _write_redo(folder: Path, steps: list[str]) -> None:
    path = folder / WORK / REDO
    if steps:
        write_json(path, steps)
    else:
        path.unlink(missing_ok=True)


def run_directory(recipe: Recipe, out: Path | None = None) -> Path:
    """Where a recipe's run lies."""
    folder = out or Path("runs") / recipe.name
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file, but a run needs a folder.", "Choose another folder with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not _looks_like_a_run(folder):
        raise FileError(
            f"{folder} holds files that are no run of a recipe.",
            "Choose an empty or a new folder with --out.",
        )
    return folder


def _looks_like_a_run(folder: Path) -> bool:
    return (folder / "recipe.toml").exists() or (folder / ".lock").exists()


def _check_writable(folder: Path) -> None:
    with explain_os_errors(folder, "write into"):
        probe = folder / ".write-test.partial"
        probe.write_bytes(b"x")
        probe.unlink()


def _compute_settings() -> None:
    """Threads and memory of this process, before any step computes."""
    from lexmill import devices

    devices.keep_freed_memory()
    devices.wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("OMP_NUM_THREADS", str(devices.threads()))


def _run_step(recipe: Recipe, folder: Path, planned: Planned, progress: Progress) -> None:
    step, kind = planned.step, STEP_KINDS[planned.step]
    work = _work_folder(folder, planned)
    progress.say(f"{step}: {planned.reason}")
    started = time.perf_counter()
    lineage = {
        "lexmill": planned.parts["code"][:16],
        "recipe": recipe.name,
        "data_sha256": _data_hash(folder),
    }
    place = Place(folder, work, recipe, progress, lineage)
    together.call(step, place)
    figures = kind.make(place)
    seconds = time.perf_counter() - started
    record_path(folder, step).unlink(missing_ok=True)
    outputs: dict[str, Any] = {}
    for name, target in kind.publish.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        replace_path(work / name, folder / target)
        files = [folder / target] if (folder / target).is_file() else sorted((folder / target).rglob("*"))
        for path in files:
            if path.is_file() and not is_kept_copy(path):
                outputs[path.relative_to(folder).as_posix()] = {
                    "sha256": content_hash(path),
                    "bytes": path.stat().st_size,
                }
    write_json(
        record_path(folder, step),
        {
            "step": step,
            "key": planned.key,
            "parts": planned.parts,
            "outputs": outputs,
            "seconds": round(seconds, 2),
            "figures": figures,
        },
    )
    if step in (owed := read_redo(folder)):
        _write_redo(folder, [other for other in owed if other != step])
    shutil.rmtree(work, ignore_errors=True)
    told = ", ".join(f"{name} {_said(value)}" for name, value in list(figures.items())[:6])
    progress.say(f"  done in {format_duration(seconds)}: {told}")


def _said(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _work_folder(folder: Path, planned: Planned) -> Path:
    """The step's own folder; what an attempt with other inputs left there is thrown away."""
    work = folder / WORK / planned.step
    key = work / "key"
    if not key.is_file() or key.read_text("utf-8") != planned.key:
        shutil.rmtree(work, ignore_errors=True)
        with atomic_write(key, "w") as file:
            file.write(planned.key)
    return work


def _data_hash(folder: Path) -> str:
    outputs = read_record(folder, "prepare").get("outputs", {})
    return outputs.get("prepare/train.parquet", {}).get("sha256", "")
