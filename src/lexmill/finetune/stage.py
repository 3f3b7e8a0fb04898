"""The fine-tuning stage: a model directory and labelled rows in; a model directory, or an adapter, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lexmill.data.labelled import Row
from lexmill.devices import process_count
from lexmill.errors import DataError
from lexmill.files import write_json
from lexmill.finetune.answer import answer_lesson
from lexmill.finetune.chat import chat_lesson
from lexmill.finetune.classify import classify_lesson
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.embed import embed_lesson
from lexmill.finetune.extractive import extractive_lesson
from lexmill.finetune.lesson import Lesson, TaskMaker
from lexmill.finetune.prefer import prefer_lesson
from lexmill.finetune.rows import TaskData
from lexmill.finetune.summarise import summarise_lesson
from lexmill.finetune.translate import translate_lesson
from lexmill.model.adapter import Adapter, LoraConfig
from lexmill.model.adapter_files import AdapterDirectory, write_adapter
from lexmill.model.build import build_loaded
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.heads import head_modules
from lexmill.model.lora import add_adapter, begin_adapter, frozen_matrices, read_adapter
from lexmill.model.quantised import build_quantised
from lexmill.model.transformer import Transformer
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Loader, fixed_batches
from lexmill.train.loop import Hooks, TrainResult, train
from lexmill.train.metrics import write_samples
from lexmill.train.objective import measure
from lexmill.train.precision import choose_precision
from lexmill.train.processes import Processes, find_device

__all__ = ["FinetuneConfig", "finetune", "make_lesson", "task_data"]

# (model, tokenizer, question) -> the reply
Replier = Callable[[nn.Module, Tokenizer, str], str]
# (model) -> figures of the task by name, as they are on some validation rows
Scorer = Callable[[nn.Module], dict[str, float]]

# (task, model, tokenizer, what its lesson fitted, held-out rows) -> the same, tuned on the task's own score
Tuner = Callable[[str, nn.Module, Tokenizer, dict[str, Any], Sequence[Row]], dict[str, Any]]


def qa_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """An encoder learns to find answers, other models to write them."""
    make = extractive_lesson if model.config.shape == "encoder" else answer_lesson
    return make(config, model, data)


# A new task: a file with a function that makes its lesson, its name here and in `FinetuneConfig.task`.
TASKS: dict[str, TaskMaker] = {
    "chat": chat_lesson,
    "classify": classify_lesson,
    "embed": embed_lesson,
    "prefer": prefer_lesson,
    "qa": qa_lesson,
    "summarise": summarise_lesson,
    "translate": translate_lesson,
}


def make_lesson(
    config: FinetuneConfig, base: ModelDirectory, data: Path, validation: Path | None = None
) -> Lesson:
    """What `finetune` will learn.

    Raises:
        DataError, ModelError: data or a model that do not fit the task.
    """
    lesson = TASKS[config.task](config, base, task_data(config, data, validation))
    if (config.patience or config.stop_metric) and not lesson.validation:
        raise DataError(
            "Nothing is held out, so that training cannot stop early or keep the best.",
            "Name rows with --validation, or set validation_fraction above 0.",
        )
    return lesson


def task_data(config: FinetuneConfig, data: Path, validation: Path | None = None) -> TaskData:
    """Where the rows of a run come from."""
    return TaskData(
        path=data,
        held_out=validation,
        fraction=config.validation_fraction,
        seed=config.seed,
        settings=config,
        text=Path(config.text) if config.text else None,
    )


def finetune(
    config: FinetuneConfig,
    base: ModelDirectory,
    data: Path,
    out: Path,
    *,
    validation: Path | None = None,
    reply: Replier | None = None,
    score: Scorer | None = None,
    tune: Tuner | None = None,
    lesson: Lesson | None = None,
    progress: Progress = SILENT,
) -> tuple[ModelDirectory | AdapterDirectory, TrainResult]:
    """Teach `base` a task. The same call goes on from its checkpoints.

    Args:
        data: the folder that `prepare` wrote, or a file of rows.
        out: gets `model/`, or with `config.lora` the adapter's own files; and what training leaves.
        validation: a file of rows to measure on; else a part of the data.
        reply: answers a question; called for each of `config.prompts` as training for chat goes on.
        score: gives what `config.stop_metric` may name; called at each validation.
        lesson: what `make_lesson` made of the same, where that was needed before.
        tune: chooses on held-out rows what a task leaves open (`lexmill.evaluate.tuning.tune`).

    Returns:
        The model, or with `config.lora` the adapter.

    Raises:
        DataError: nothing to learn from.
        ModelError: a model that does not fit the task.
        ConfigError: an adapter of modules that the model does not have.
    """
    processes = Processes.join(config.device, deterministic=config.deterministic)
    if not processes.first:
        progress = SILENT
    lesson = lesson or make_lesson(config, base, data, validation)
    base = lesson.base or base
    form = task_data(config, data).form
    progress.say(f"  {lesson.told}" + (f", rows of the form '{form}'" if form else ""))
    model, adapter = learning_model(config, base, progress)
    if lesson.begin:
        lesson.begin(model.to(processes.device), config.micro_rows or config.rows, progress)
    lengths = {"length": lesson.length, "decoder_length": lesson.decoder_length}
    rows = {"rows": config.rows, "pad_id": lesson.pad, **lengths}
    held_out = fixed_batches(lesson.validation, **rows) if lesson.validation else []
    on_device = [batch.to(processes.device) for batch in held_out]

    def validate(model: nn.Module) -> dict[str, float]:
        figures = measure(model, lesson.loss, on_device).figures("validation")
        figures = {name.replace("tokens", lesson.targets): value for name, value in figures.items()}
        if score is not None:
            model.eval()
            figures |= {f"validation_{name}": value for name, value in score(model).items()}
            model.train()
        return figures

    def show_replies(model: nn.Module, step: int) -> None:
        if reply is None:
            return
        said = [(prompt, reply(model, base.tokenizer, prompt)) for prompt in config.prompts]
        if processes.first:
            write_samples(out / "samples.jsonl", step, said)
        for prompt, text in said:
            progress.say(f"    {prompt} > {' '.join(text.split())[:90]}")

    result = train(
        model,
        lesson.loss,
        Loader(lesson.examples, seed=config.seed, **rows),
        config,
        out,
        label="fine-tuning",
        hooks=Hooks(
            validate=validate if on_device else None,
            sample=show_replies if reply and config.task == "chat" else None,
        ),
        progress=progress,
        processes=processes,
    )
    history = {
        "stage": "finetune",
        "task": config.task,
        "steps": result.steps,
        "tokens": result.tokens,
        **lesson.facts,
    }
    fitted: dict[str, Any] = {}
    if lesson.after:
        whole = _in_one_piece(model, adapter, base, config, processes)
        fitted = lesson.after(whole)
        if tune and lesson.held_out:
            fitted = tune(config.task, whole, base.tokenizer, fitted, lesson.held_out)
    return _finished(model, adapter, base, out, processes, history, fitted, result), result


def _in_one_piece(
    model: Transformer,
    adapter: Adapter | None,
    base: ModelDirectory,
    config: FinetuneConfig,
    processes: Processes,
) -> Transformer:
    """The model, or where it is spread over processes a copy of all of it; all of them call this."""
    if not (processes.group and config.sharding == "shard"):
        return model
    copy = build_loaded(base.config, base.weights_on_demand() if adapter else model.weights())
    if adapter is not None:
        add_adapter(copy, read_adapter(model, adapter))
    return copy.eval().to(processes.device)


def learning_model(
    config: FinetuneConfig, base: ModelDirectory, progress: Progress = SILENT
) -> tuple[Transformer, Adapter | None]:
    """The model as it learns: all of it, or frozen with an adapter in it."""
    lora, weights = config.lora, base.weights_on_demand()
    if lora is None:
        return build_loaded(base.config, weights), None
    if base.config.shape == "encoder":  # as PEFT does: a task's head is trained in full
        saved = dict.fromkeys((*lora.modules_to_save, *head_modules(base)))
        lora = replace(lora, modules_to_save=tuple(saved))
    return adapted_model(config, lora, base.config, weights, progress)


def adapted_model(
    config: FinetuneConfig,
    lora: LoraConfig,
    shape: ModelConfig,
    weights: Mapping[str, np.ndarray],
    progress: Progress = SILENT,
) -> tuple[Transformer, Adapter]:
    """A frozen model with an adapter that changes nothing yet."""
    if lora.quantise:
        model, whole = build_quantised(shape, weights, lora.quantise)
        if whole:
            progress.say(f"  {len(whole)} layers stay float32: their rows do not divide into blocks")
    else:
        model = build_loaded(shape, weights, in_bfloat16=kept_in_bfloat16(config, lora, shape))
    adapter = begin_adapter(model, lora, config.seed)
    add_adapter(model, adapter)
    kept = f", the base in {lora.quantise}" if lora.quantise else ""
    progress.say(
        f"  an adapter of {adapter.parameters:,} weights for {shape.parameters:,} "
        f"({len(adapter.changes)} layers, rank {lora.rank}{kept})"
    )
    return model, adapter


def kept_in_bfloat16(config: FinetuneConfig, lora: LoraConfig, shape: ModelConfig) -> frozenset[str]:
    """Our names of the weights that lie in memory as products on a CPU read them: no conversion a step."""
    place = find_device(config.device).type
    spread = process_count() > 1 and config.sharding == "shard"  # FSDP wants one format for all of a block
    if lora.quantise or place != "cpu" or spread or choose_precision(config.precision, place) != "bfloat16":
        return frozenset()
    return frozen_matrices(lora, shape)


def _finished(
    model: Transformer,
    adapter: Adapter | None,
    base: ModelDirectory,
    out: Path,
    processes: Processes,
    history: dict[str, Any],
    fitted: dict[str, Any],
    result: TrainResult,
) -> ModelDirectory | AdapterDirectory:
    """Write what was learned, and open it."""
    kept = {name: value for name, value in base.lineage.items() if name != "calibration"}
    lineage = {**kept, **fitted, "history": [*base.lineage.get("history", []), history]}
    learned = read_adapter(model, adapter) if adapter is not None else None
    weights = model.weights() if learned is None else {}
    with processes.first_alone():
        if processes.first:
            if learned is not None:
                write_adapter(out, learned, base, lineage)
            else:
                write_model_directory(
                    out / "model", base.config, weights, base.tokenizer, lineage, pooling=base.pooling
                )
            write_json(out / "result.json", vars(result))
    if learned is not None:
        return AdapterDirectory.open(out, base)
    return ModelDirectory.open(out / "model")
