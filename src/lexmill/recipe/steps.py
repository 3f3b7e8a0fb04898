"""What each step of a recipe reads, makes and depends on. The stages themselves live in their rooms."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lexmill.files import read_json, write_json
from lexmill.progress import Progress
from lexmill.recipe.config import Recipe


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The `[export]` table: which GGUF types to write, and a system prompt for the Modelfile."""

    types: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0")
    ollama_type: str = "q8_0"
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """The `[verify]` table: how many tokens the greedy continuations have."""

    tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The `[report]` table: nothing to set."""


@dataclass(frozen=True)
class Place:
    """Where a step works.

    `run` is the run directory with the finished steps; `work` is this step's own folder, kept
    from one attempt to the next while its inputs stay the same.
    """

    run: Path
    work: Path
    recipe: Recipe
    progress: Progress
    lineage: dict[str, Any]


@dataclass(frozen=True)
class StepKind:
    """A step: what it depends on and what it publishes.

    Attributes:
        needs: earlier steps whose outputs it reads.
        rooms: packages and modules of lexmill whose code decides its result.
        publish: names in the work folder, and where each goes in the run directory.
        make: does the work; returns figures to remember.
    """

    needs: tuple[str, ...]
    rooms: tuple[str, ...]
    publish: dict[str, str]
    make: Callable[[Place], dict[str, Any]]


def _prepare(place: Place) -> dict[str, Any]:
    from lexmill.data.prepare import prepare

    config = place.recipe.table("prepare")
    result = prepare(config, place.work / "prepare", config.base(place.recipe.base), place.progress)
    figures = {"files": result.files}
    for split, kinds in result.counts.items():
        for kind, counts in kinds.items():
            figures[f"{split} {kind} documents"] = counts["documents"]
            figures[f"{split} {kind} characters"] = counts["characters"]
    return figures


def _rows(place: Place) -> dict[str, Any]:
    from lexmill.recipe.task_steps import check_split

    return check_split(place.recipe, place.work / "rows", place.progress)


def _base(place: Place) -> dict[str, Any]:
    from lexmill.recipe.task_steps import make_base

    return make_base(place.recipe, place.run / "tokenizer", place.work / "base", place.progress)


def document_texts(path: Path) -> Iterator[str]:
    """The texts of documents and the contents of messages, for a tokenizer to be trained on."""
    from lexmill.data.documents import read_documents

    for document in read_documents(path):
        if document.text:
            yield document.text
        for message in document.messages or ():
            yield message["content"]


def _tokenizer(place: Place) -> dict[str, Any]:
    from lexmill.recipe.task_steps import row_texts
    from lexmill.tokenizer.training import bytes_per_token, train_tokenizer

    documents = place.run / "prepare" if "prepare" in place.recipe.steps else None
    texts = document_texts(documents / "train.parquet") if documents else row_texts(place.recipe)
    tokenizer = train_tokenizer(texts, place.recipe.table("tokenizer"), place.progress)
    tokenizer.save(place.work / "tokenizer")
    figures: dict[str, Any] = {"vocabulary": tokenizer.vocab_size}
    if documents:
        held_out = bytes_per_token(tokenizer, document_texts(documents / "validation.parquet"))
        figures["bytes per token (held out)"] = round(held_out, 4)
    return figures


def continue_text(network: Any, tokenizer: Any, prompt: str) -> str:
    """What a model in training makes of a prompt: its continuation, or what it puts into the gap."""
    from lexmill.inference.language_model import LanguageModel

    model = LanguageModel(network, tokenizer)
    if model.config.shape == "encoder":
        return "  ".join(f"{one.text} {one.probability:.2f}" for one in model.fill_mask(prompt))
    if model.config.shape == "encoder_decoder":
        return "  /  ".join(one.text for one in model.fill_spans(prompt, top=3))
    return model.generate(prompt, max_tokens=40, temperature=0.8, top_p=0.95, seed=0)


def answer_question(decoder: Any, tokenizer: Any, question: str) -> str:
    from lexmill.inference.language_model import LanguageModel

    return LanguageModel(decoder, tokenizer).chat([{"role": "user", "content": question}], max_tokens=40)


def _pretrain(place: Place) -> dict[str, Any]:
    from lexmill.pretrain.stage import pretrain
    from lexmill.tokenizer.tokenizer import Tokenizer

    directory, result = pretrain(
        place.recipe.table("pretrain"),
        place.run / "prepare",
        Tokenizer.load(place.run / "tokenizer"),
        place.work / "pretrain",
        sample=continue_text,
        lineage=place.lineage,
        progress=place.progress,
    )
    return {"parameters": directory.config.parameters, **_training_figures(result)}


def _training_figures(result: Any) -> dict[str, Any]:
    from lexmill.devices import peak_memory

    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens per second": round(result.tokens / max(result.seconds, 1e-9)),
        "last loss": round(result.loss, 4),
        "precision": result.precision,
        "steps skipped": result.skipped,
        "training seconds": round(result.seconds, 1),
        "peak megabytes of the process": round(peak_memory() / 1e6),
    }


def _finetune(place: Place) -> dict[str, Any]:
    from lexmill.devices import process_rank
    from lexmill.model.adapter_files import AdapterDirectory
    from lexmill.model.directory import ModelDirectory
    from lexmill.recipe.tuned import finetune_and_score
    from lexmill.runtimes.merge import merge_adapter
    from lexmill.train.processes import Processes

    base = ModelDirectory.open(base_model(place))
    config = place.recipe.table("finetune")
    data, validation = place.run / "prepare", None
    if "rows" in place.recipe.steps:
        data, validation = (
            place.recipe.table("rows").path(split, place.recipe.base) for split in ("train", "validation")
        )
    elif config.task == "chat":  # the step "evaluate" does it, on more rows
        config = dataclasses.replace(config, score=False)
    made, result, scores = finetune_and_score(
        config,
        base,
        data,
        place.work / "finetune",
        validation=validation,
        reply=answer_question,
        progress=place.progress,
    )
    if isinstance(made, AdapterDirectory):  # the steps that follow take a whole model
        with Processes.join().first_alone():
            if not process_rank():
                merge_adapter(made, place.work / "finetune" / "model", dtype="f32")
    return _training_figures(result) | _flat(scores.get(config.task, {}), config.task)


def base_model(place: Place) -> Path:
    """The model directory that fine-tuning begins with."""
    return place.run / ("base" if "base" in place.recipe.steps else "pretrain") / "model"


def trained_model(place: Place) -> Path:
    """The model directory of the last training step of the recipe."""
    return place.run / "finetune" / "model" if "finetune" in place.recipe.steps else base_model(place)


def _evaluate(place: Place) -> dict[str, Any]:
    from lexmill.evaluate.stage import evaluate
    from lexmill.inference.language_model import load
    from lexmill.recipe.task_steps import compare_on_task

    config = place.recipe.table("evaluate")
    base = load(base_model(place)) if "finetune" in place.recipe.steps else None
    if "rows" in place.recipe.steps:
        scores = compare_on_task(place.recipe, config.task, load(trained_model(place)), base, place.progress)
    else:
        scores = evaluate(
            config, load(trained_model(place)), place.run / "prepare", base=base, progress=place.progress
        )
    write_json(place.work / "evaluate" / "scores.json", scores)
    fillings = {f"fill {case['text']}": case["said"] for case in scores.get("fill", ())}
    return fillings | _flat({key: scores[key] for key in SCORES if scores.get(key)})


# Parts of scores.json that are figures.
SCORES = ("text", "replies", "pretraining", "task")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: inner
        for name, part in value.items()
        for key, inner in _flat(part, f"{prefix} {name}".strip()).items()
    }


def _export(place: Place) -> dict[str, Any]:
    from lexmill.model.directory import DATA_CARD, LINEAGE_FILE, ModelDirectory
    from lexmill.runtimes.huggingface import export_huggingface
    from lexmill.runtimes.llama_cpp import export_gguf
    from lexmill.runtimes.ollama import write_modelfile

    config = place.recipe.table("export")
    model = place.work / "model"
    shutil.rmtree(model, ignore_errors=True)
    staged = place.work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(trained_model(place), staged)
    path = place.run / "evaluate" / "scores.json"
    scores = read_json(path) if "evaluate" in place.recipe.steps else {}
    lineage = {
        **ModelDirectory.open(staged).lineage,
        "scores": {key: scores[key] for key in SCORES if scores.get(key)},
    }
    write_json(staged / LINEAGE_FILE, lineage)
    card = place.run / "prepare" / "card.md"
    if card.is_file():
        shutil.copyfile(card, staged / DATA_CARD)
    export_huggingface(staged, model)
    shutil.rmtree(staged)
    directory = ModelDirectory.open(model)
    figures: dict[str, Any] = {}
    (place.work / "export").mkdir(exist_ok=True)
    with place.progress.task("exporting", len(config.types), "files") as task:
        for name in config.types:
            path = place.work / "export" / f"model-{name.lower()}.gguf"
            export_gguf(directory, path, name)
            figures[f"{name.lower()} megabytes"] = round(path.stat().st_size / 1e6, 2)
            task.advance()
    if directory.config.shape == "decoder" and config.types:  # Ollama runs GGUF files only
        chosen = place.work / "export" / f"model-{config.ollama_type.lower()}.gguf"
        write_modelfile(directory, chosen, place.work / "export" / "Modelfile", config.system)
    return figures


def _verify(place: Place) -> dict[str, Any]:
    from lexmill.runtimes.verify import verify

    ggufs = sorted((place.run / "export").glob("model-*.gguf"))
    config = place.recipe.table("verify")
    report = verify(place.run / "model", ggufs, tokens=config.tokens, progress=place.progress)
    report.write(place.work / "verify.json")
    verdicts = [check.passed for check in report.checks]
    return {
        "equal": verdicts.count(True),
        "of these up to ties": sum(1 for check in report.checks if check.passed and check.ties),
        "of these up to limits of a runtime": sum(
            1 for check in report.checks if check.passed and check.limits
        ),
        "different": verdicts.count(False),
        "not checked": verdicts.count(None),
    }


def _report(place: Place) -> dict[str, Any]:
    from lexmill.recipe.report import write_report

    write_json(place.run / "environment.json", environment())
    return {"bytes": write_report(place.run, place.work / "report.html").stat().st_size}


def environment() -> dict[str, Any]:
    """The machine and the versions that a run's figures belong to."""
    from lexmill.devices import this_machine, threads

    machine = this_machine()
    packages = {}
    for name in ("lexmill", "torch", "numpy", "tokenizers", "transformers", "xllamacpp"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "cpu": machine.cpu,
        "cpu_class": machine.cpu_class,
        "cores": machine.cores,
        "threads": threads(),
        "system": machine.system,
        "python": platform.python_version(),
        "packages": packages,
    }


_BASE = ("errors", "files", "config", "messages")
_TRAINING = (*_BASE, "tokenizer", "model", "train", "data", "formats")
_RUNTIMES = (*_BASE, "tokenizer", "model", "formats", "inference", "runtimes")

STEP_KINDS: dict[str, StepKind] = {
    "prepare": StepKind((), (*_BASE, "data"), {"prepare": "prepare"}, _prepare),
    "rows": StepKind((), (*_BASE, "data", "recipe.task_steps"), {"rows": "rows"}, _rows),
    "tokenizer": StepKind(("prepare", "rows"), (*_BASE, "tokenizer"), {"tokenizer": "tokenizer"}, _tokenizer),
    "base": StepKind(
        ("tokenizer",),
        (*_BASE, "tokenizer", "model", "formats", "runtimes", "recipe.task_steps"),
        {"base": "base"},
        _base,
    ),
    "pretrain": StepKind(
        ("prepare", "tokenizer"), (*_TRAINING, "pretrain"), {"pretrain": "pretrain"}, _pretrain
    ),
    "finetune": StepKind(
        ("prepare", "rows", "base", "pretrain"), (*_TRAINING, "finetune"), {"finetune": "finetune"}, _finetune
    ),
    "evaluate": StepKind(
        ("prepare", "rows", "base", "pretrain", "finetune"),
        (*_TRAINING, "pretrain", "finetune", "inference", "evaluate", "recipe.task_steps"),
        {"evaluate": "evaluate"},
        _evaluate,
    ),
    "export": StepKind(
        ("base", "pretrain", "finetune", "evaluate"),
        _RUNTIMES,
        {"export": "export", "model": "model"},
        _export,
    ),
    "verify": StepKind(("export",), _RUNTIMES, {"verify.json": "verify.json"}, _verify),
    "report": StepKind(
        ("prepare", "rows", "tokenizer", "base", "pretrain", "finetune", "evaluate", "export", "verify"),
        (
            "page",
            "assets",
            "recipe.report",
            "recipe.report_checks",
            "recipe.report_data",
            "recipe.charts",
            "recipe.markup",
            "recipe.assets",
        ),
        {"report.html": "report.html"},
        _report,
    ),
}

# What a step's result depends on beside lexmill's own code.
STEP_PACKAGES: dict[str, tuple[str, ...]] = {
    "prepare": ("pyarrow", "resiliparse", "markdown-it-py"),
    "tokenizer": ("tokenizers",),
    "base": ("torch", "tokenizers"),
    "pretrain": ("torch", "tokenizers"),
    "finetune": ("torch", "tokenizers"),
    "evaluate": ("torch", "tokenizers"),
    "verify": ("torch", "tokenizers", "transformers", "xllamacpp"),
}
