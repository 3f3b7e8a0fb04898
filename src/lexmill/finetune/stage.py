"""The fine-tuning stage: a model directory and labelled documents in, a model directory out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lexmill.data.documents import read_documents
from lexmill.errors import DataError
from lexmill.files import write_json
from lexmill.finetune.chat import chat_example, fit
from lexmill.model.decoder import Decoder
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Example, Loader, fixed_batches
from lexmill.train.causal import causal_loss
from lexmill.train.loop import Hooks, TrainConfig, TrainResult, mean_loss, train

# (model, tokenizer, question) -> the reply
Replier = Callable[[nn.Module, Tokenizer, str], str]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The `[finetune]` table of a recipe."""

    prompts: tuple[str, ...] = ("Hello",)  # questions whose answers are shown as training goes on
    row_length: int | None = None  # tokens in a training row; the model's context when not given


def chat_examples(path: Path, tokenizer: Tokenizer, length: int) -> list[Example]:
    """The conversations of a Parquet file of documents, as examples no longer than `length`.

    Raises:
        DataError: there are none.
    """
    examples = []
    for document in read_documents(path):
        if document.kind == "chat":
            example = fit(chat_example(document.messages or (), tokenizer), length)
            if example is not None:
                examples.append(example)
    if not examples:
        raise DataError(f"{path}: there are no conversations to learn from.", "Add a source of kind 'chat'.")
    return examples


def finetune(
    config: FinetuneConfig,
    base: ModelDirectory,
    documents: Path,
    out: Path,
    *,
    reply: Replier | None = None,
    progress: Progress = SILENT,
) -> tuple[ModelDirectory, TrainResult]:
    """Teach `base` to answer, and write `out/model`. The same call goes on from its checkpoints.

    Args:
        documents: the folder that `prepare` wrote; its rows of kind "chat" are used.
        reply: answers a question; called for each of `config.prompts` as training goes on.

    Raises:
        DataError: no conversations.
    """
    tokenizer = base.tokenizer
    length = config.row_length or base.config.context
    pad = tokenizer.ids.pad if tokenizer.ids.pad is not None else 0
    examples = chat_examples(documents / "train.parquet", tokenizer, length)
    held_out = fixed_batches(
        chat_examples(documents / "validation.parquet", tokenizer, length),
        rows=config.rows,
        length=length,
        pad_id=pad,
    )
    model = Decoder(base.config)
    model.load_weights(base.weights())
    progress.say(
        f"  {len(examples):,} conversations, {sum((e.targets >= 0).sum() for e in examples):,} target tokens"
    )

    def validate(model: nn.Module) -> dict[str, float]:
        return {"validation_loss": round(mean_loss(model, causal_loss, held_out)[0], 5)}

    samples = out / "samples.jsonl"

    def show_replies(model: nn.Module, step: int) -> None:
        lines = (
            []
            if not samples.exists()
            else [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
        )
        lines = [line for line in lines if line["step"] < step]
        for prompt in config.prompts:
            text = reply(model, tokenizer, prompt) if reply else ""
            lines.append({"step": step, "prompt": prompt, "text": text})
            progress.say(f"    {prompt} > {' '.join(text.split())[:90]}")
        samples.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")

    result = train(
        model,
        causal_loss,
        Loader(lambda epoch: examples, rows=config.rows, length=length, pad_id=pad, seed=config.seed),
        config,
        out,
        label="fine-tuning",
        hooks=Hooks(validate=validate, sample=show_replies if reply else None),
        progress=progress,
    )
    history = {"stage": "finetune", "task": "chat", "steps": result.steps, "tokens": result.tokens}
    lineage = {**base.lineage, "history": [*base.lineage.get("history", []), history]}
    directory = write_model_directory(out / "model", base.config, model.weights(), tokenizer, lineage)
    write_json(out / "result.json", vars(result))
    return directory, result
