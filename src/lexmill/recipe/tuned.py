"""Fine-tuning with its scores: what a model could do before, what it can do after, and what it forgot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lexmill.data.labelled import Row
from lexmill.devices import process_rank
from lexmill.errors import LexmillError, ModelError
from lexmill.files import read_json, sha256_json, write_json
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.rows import VALIDATION
from lexmill.model.adapter_files import AdapterDirectory
from lexmill.model.directory import ModelDirectory
from lexmill.progress import SILENT, Progress

SCORES, _BEFORE = "scores.json", "before.json"
_EXAMPLES = 12
_TEXT_TOKENS, _TEXT_ROW = 16384, 512  # of the text on which forgetting is measured


def finetune_and_score(
    config: FinetuneConfig,
    base: ModelDirectory,
    data: Path,
    out: Path,
    *,
    validation: Path | None = None,
    reply: Any = None,
    progress: Progress = SILENT,
) -> tuple[ModelDirectory | AdapterDirectory, Any, dict[str, Any]]:
    """`finetune`, with the task's scores on validation rows before and after, where `config.score` says so.

    `out/scores.json` gets them. With plain text (`config.text`, or that of a prepared folder) the bits per byte
    of what is held out of it are measured too: what is forgotten.

    Returns:
        The model or adapter, how training went, and the scores: {task: {"before", "after"}, "text"?: {"before",
        "after"}, "examples"}, empty where there is nothing to score.
    """
    from lexmill.evaluate.tuning import tune
    from lexmill.finetune.stage import finetune, make_lesson

    lesson = make_lesson(config, base, data, validation)  # whatever is wrong with the data shows first
    work = _Scores(config, base, data, validation, progress)
    rows = work.rows(config.score_rows) if config.score else []
    first = not process_rank()
    before = _remembered(work, rows, out) if first and config.score else {}
    metric_rows = work.rows(config.metric_rows) if config.metric_rows else []
    made, result = finetune(
        config,
        base,
        data,
        out,
        validation=validation,
        reply=reply,
        score=(lambda network: work.figures(network, metric_rows)) if metric_rows else None,
        tune=tune,
        lesson=lesson,
        progress=progress,
    )
    if not (first and config.score):
        return made, result, {}
    scores = work.compared(before, work.measured(made, rows))
    if scores:
        write_json(out / SCORES, scores)
    return made, result, scores


def _remembered(work: _Scores, rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """The scores of the base: those that an interrupted run has found already, or found now."""
    key, path = work.key(rows), out / _BEFORE
    try:
        known = read_json(path, "scores of the base") if path.is_file() else {}
    except LexmillError:
        known = {}
    if isinstance(known, dict) and known.get("key") == key:
        return known
    found = {"key": key, **work.measured(work.base, rows)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


class _Scores:
    """What is asked of a model before, during and after training, always the same."""

    def __init__(
        self,
        config: FinetuneConfig,
        base: ModelDirectory,
        data: Path,
        validation: Path | None,
        progress: Progress,
    ) -> None:
        from lexmill.evaluate.task import find_scorer
        from lexmill.finetune.stage import task_data

        self.config, self.base, self.progress = config, base, progress
        self.kind, self._scorer = find_scorer(config.task)
        self.data = task_data(config, data, validation)
        self.lineage = _as_will_be(config, base, self.kind)

    def rows(self, count: int) -> list[Row]:
        """The first validation rows."""
        return list(itertools.islice(self.data.rows(VALIDATION, self.kind), count))

    def key(self, rows: Sequence[Row]) -> str:
        """What the scores of the base depend on."""
        config = self.config
        kept = config.lora.quantise if config.lora else ""
        asked = [
            config.task,
            config.score_tokens,
            config.too_long,
            config.text,
            config.seed,
            kept,
            self.lineage,
        ]
        weights = [self.base.path.resolve().as_posix(), self.base.lineage]
        return sha256_json([asked, weights, [repr(row) for row in rows]])

    def measured(self, model: ModelDirectory | AdapterDirectory, rows: Sequence[Row]) -> dict[str, Any]:
        """The scores of a model on disk; nothing of the task where it cannot do it (yet)."""
        from lexmill.inference.language_model import LanguageModel
        from lexmill.model.load import load_model

        adapter = model.adapter if isinstance(model, AdapterDirectory) else None
        directory = model.base if isinstance(model, AdapterDirectory) else model
        lineage = self.lineage if model is self.base else model.lineage
        kept = (
            self.config.lora.quantise if self.config.lora else ""
        )  # as in training: who asked for that has no room
        loaded = LanguageModel(
            load_model(directory, adapter, kept), directory.tokenizer, directory.path, lineage
        )
        found: dict[str, Any] = {}
        if rows:
            try:
                scores = self._score(loaded, rows, self.progress, _EXAMPLES)
                found = scores.as_json()
            except ModelError as error:
                self.progress.say(f"  not scored: {error.message}")
        return found | self._text(loaded)

    def figures(self, network: Any, rows: Sequence[Row]) -> dict[str, float]:
        """The task's figures of a model in training."""
        from lexmill.inference.language_model import LanguageModel

        model = LanguageModel(network, self.base.tokenizer, None, self.lineage)
        return self._score(model, rows, SILENT, 0).metrics

    def compared(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Both side by side."""
        found: dict[str, Any] = {}
        for name, key in ((self.config.task, "metrics"), ("text", "text")):
            sides = {side: one[key] for side, one in (("before", before), ("after", after)) if key in one}
            if sides:
                found[name] = sides
        if "metrics" not in after:
            return found
        examples = []
        earlier = before.get("examples") or [{}] * len(after["examples"])
        for old, new in zip(earlier, after["examples"]):
            one = {"question": new.get("question", ""), "expected": new.get("expected", "")}
            sides = {"before": old.get("given"), "after": new.get("given")}
            examples.append(one | {side: said for side, said in sides.items() if said is not None})
        return found | {"rows": after["rows"], "details": after["details"], "examples": examples}

    def _score(self, model: Any, rows: Sequence[Row], progress: Progress, examples: int) -> Any:
        from lexmill.evaluate.scores import ScoreConfig, Scoring

        # rows that are an error have been refused; what is cut here makes room to answer in a small context
        too_long = "drop" if self.config.too_long == "drop" else "cut"
        settings = ScoreConfig(
            max_tokens=self.config.score_tokens,
            examples=examples,
            too_long=too_long,  # type: ignore[arg-type]
            reference=str(self.base.path),
        )
        return self._scorer(model, Scoring(rows, settings, progress))

    def _text(self, model: Any) -> dict[str, Any]:
        from lexmill.evaluate.stage import EvaluateConfig, text_scores

        if self.base.config.shape != "decoder":
            return {}
        texts = list(itertools.islice(self.data.texts(VALIDATION), 200))
        if not texts:
            return {}
        row = min(self.base.config.context, _TEXT_ROW)
        return {"text": text_scores(model, texts, EvaluateConfig(text_tokens=_TEXT_TOKENS, rows=8), row)}


def _as_will_be(config: FinetuneConfig, base: ModelDirectory, kind: type[Row]) -> dict[str, Any]:
    """The lineage of the base as if it had been trained already, so that it is asked in the same words."""
    from lexmill.finetune.writing import FIELDS, asking_of

    if kind not in FIELDS or base.config.shape == "encoder":
        return base.lineage
    entry = {"task": config.task, "asked": asdict(asking_of(config, base.config, kind))}
    return {**base.lineage, "history": [*base.lineage.get("history", []), entry]}
