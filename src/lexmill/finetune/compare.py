"""What merging an adapter costs: the loss on a task's rows as it was trained, unmerged, and merged."""

from __future__ import annotations

from pathlib import Path

from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.stage import make_lesson
from lexmill.finetune.writing import asked_words
from lexmill.model.adapter import Adapter
from lexmill.model.adapter_files import AdapterDirectory
from lexmill.model.directory import ModelDirectory
from lexmill.model.load import load_model
from lexmill.progress import SILENT, Progress
from lexmill.train.batches import fixed_batches
from lexmill.train.objective import measure

_ROWS = 4  # computed at once


def adapter_losses(
    adapter: AdapterDirectory,
    merged: ModelDirectory,
    data: Path,
    task: str = "chat",
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Mean losses in nats a target, by what was measured: "of the base", "unmerged", "merged", and "as trained".

    Args:
        merged: the model that `lexmill.runtimes.merge` made of it.
        data: a folder that `prepare` wrote, of which the validation split counts; or a file, of which all does.
        task: of the rows.

    Raises:
        DataError, ModelError: as `finetune`.
    """
    config = FinetuneConfig(
        steps=1,
        task=task,  # type: ignore[arg-type]
        validation_rows=1 << 30,
        too_long="cut",
        **asked_words(task, adapter.lineage),
    )
    lesson = make_lesson(config, adapter.base, data, None if data.is_dir() else data)
    batches = fixed_batches(
        lesson.validation,
        rows=_ROWS,
        length=lesson.length,
        decoder_length=lesson.decoder_length,
        pad_id=lesson.pad,
    )
    cases: dict[str, tuple[ModelDirectory, Adapter | None, str]] = {"of the base": (adapter.base, None, "")}
    if adapter.quantised:
        cases[f"as trained, on {adapter.quantised}"] = (adapter.base, adapter.adapter, adapter.quantised)
    cases |= {"unmerged": (adapter.base, adapter.adapter, ""), "merged": (merged, None, "")}
    found = {}
    with progress.task("measuring", len(cases), "models") as task_view:
        for name, case in cases.items():
            found[name] = measure(load_model(*case), lesson.loss, batches).loss
            task_view.advance()
    return found
