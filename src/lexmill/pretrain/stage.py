"""The pretraining stage: documents and a tokenizer in, a model directory out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from lexmill.data.documents import Document, read_documents
from lexmill.data.shards import TokenShard, write_token_shard
from lexmill.errors import ConfigError, DataError
from lexmill.files import write_json
from lexmill.model.config import ModelConfig
from lexmill.model.decoder import Decoder
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Example, Loader, fixed_batches, next_token_example
from lexmill.train.causal import causal_loss
from lexmill.train.loop import Hooks, TrainConfig, TrainResult, mean_loss, train
from lexmill.train.metrics import write_samples

# (model, tokenizer, prompt) -> the text that the model puts behind the prompt
Sampler = Callable[[nn.Module, Tokenizer, str], str]


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """The model's shape as a recipe states it; the vocabulary comes from the tokenizer."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # as many as heads when not given
    mlp_width: int | None = None  # three times the width when not given
    context: int = 256
    rope_theta: float = 10000.0
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    def with_vocabulary(self, vocab_size: int) -> ModelConfig:
        """The complete configuration."""
        if self.width % self.heads:
            raise ConfigError(f"'width' ({self.width}) must be a multiple of 'heads' ({self.heads}).")
        return ModelConfig(
            vocab_size=vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_width=self.width // self.heads,
            mlp_width=self.mlp_width or 3 * self.width,
            context=self.context,
            rope_theta=self.rope_theta,
            tied=self.tied,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """The `[pretrain]` table of a recipe."""

    model: ShapeConfig = field(default_factory=ShapeConfig)
    row_length: int | None = None  # tokens in a training row; the model's context when not given
    prompts: tuple[str, ...] = ("It is a truth",)  # for samples as training goes on
    validation_tokens: int = 32768  # at most so many in each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.with_vocabulary(512)  # a shape that cannot be is refused now, not after preparing data
        if self.row_length is not None and not 2 <= self.row_length <= self.model.context:
            raise ConfigError(f"'row_length' must lie between 2 and the context ({self.model.context}).")


def tokenize_documents(
    documents: Path, tokenizer: Tokenizer, out: Path, *, progress: Progress = SILENT
) -> dict[str, TokenShard]:
    """Turn the text documents of both splits into token shards `out/train` and `out/validation`.

    The texts of special tokens inside a document stay ordinary text.

    Raises:
        DataError: a split has no text documents.
    """
    shards = {}
    for split in ("train", "validation"):
        texts = (
            document for document in read_documents(documents / f"{split}.parquet") if document.kind == "text"
        )
        with progress.task(f"tokenizing {split}", None, "documents") as task:

            def encoded(texts: Iterator[Document] = texts, task=task) -> Iterator[tuple[list[int], int]]:
                for document in texts:
                    task.advance()
                    text = document.text or ""
                    yield tokenizer.encode(text, special=False), len(text.encode("utf-8"))

            shards[split] = write_token_shard(
                out / split,
                encoded(),
                vocab_size=tokenizer.vocab_size,
                tokenizer_sha256=tokenizer.sha256,
            )
    if shards["train"].tokens == 0:
        raise DataError(
            f"{documents}: there are no text documents to pretrain on.", "Add a source of kind 'text'."
        )
    return shards


def cut_documents(shard: TokenShard, length: int, end_of_text: int, shift: float = 0.0) -> list[Example]:
    """Each document between two end-of-text tokens, cut into examples of at most `length` tokens.

    Args:
        shift: in [0, 1): where the first cut lies, as a part of `length`; another value an epoch
            shows the model other beginnings.
    """
    examples = []
    for index in range(len(shard)):
        ids = np.concatenate([[end_of_text], shard[index].astype(np.int64), [end_of_text]])
        first = length - int(shift * length) if len(ids) > length + 1 else length
        starts = [0, *range(first, len(ids) - 1, length)]
        for start, end in zip(starts, [*starts[1:], len(ids) - 1]):
            examples.append(next_token_example(ids[start : end + 1]))
    return examples


def pretrain(
    config: PretrainConfig,
    documents: Path,
    tokenizer: Tokenizer,
    out: Path,
    *,
    sample: Sampler | None = None,
    lineage: dict | None = None,
    progress: Progress = SILENT,
) -> tuple[ModelDirectory, TrainResult]:
    """Train a decoder from nothing and write `out/model`.

    `out` also receives token shards, `metrics.jsonl`, `samples.jsonl` and, while it lasts,
    checkpoints from which the same call goes on.

    Args:
        documents: the folder that `prepare` wrote.
        sample: continues a prompt; called for each of `config.prompts` as training goes on.

    Raises:
        DataError: no text.
        TrainingError: training diverged.
    """
    shards = tokenize_documents(documents, tokenizer, out / "tokens", progress=progress)
    shape = config.model.with_vocabulary(tokenizer.vocab_size)
    length = config.row_length or shape.context
    end_of_text = tokenizer.ids.bos
    pad = tokenizer.ids.pad
    if end_of_text is None or pad is None:
        raise DataError(
            "The tokenizer has no end-of-text or no padding token.", "Train one with 'lexmill tokenizer'."
        )

    def examples(epoch: int) -> list[Example]:
        shift = float(np.random.default_rng([config.seed, epoch, 1]).random()) if epoch else 0.0
        return cut_documents(shards["train"], length, end_of_text, shift)

    model = Decoder(shape)
    model.initialise(config.seed)
    progress.say(
        f"  {shape.parameters:,} parameters ({shape.family} shape: {shape.layers} layers, width {shape.width}), "
        f"{shards['train'].tokens:,} training tokens"
    )
    validation = fixed_batches(
        cut_documents(shards["validation"], length, end_of_text), rows=config.rows, length=length, pad_id=pad
    )[: max(1, config.validation_tokens // (config.rows * length))]

    def validate(model: nn.Module) -> dict[str, float]:
        return {"validation_loss": round(mean_loss(model, causal_loss, validation)[0], 5)}

    def show_samples(model: nn.Module, step: int) -> None:
        if sample is None:
            return
        said = [(prompt, sample(model, tokenizer, prompt)) for prompt in config.prompts]
        write_samples(out / "samples.jsonl", step, said)
        for prompt, text in said:
            progress.say(f"    {prompt}|{' '.join(text.split())[:90]}")

    result = train(
        model,
        causal_loss,
        Loader(examples, rows=config.rows, length=length, pad_id=pad, seed=config.seed),
        config,
        out,
        label="pretraining",
        hooks=Hooks(validate=validate if validation else None, sample=show_samples if sample else None),
        progress=progress,
    )
    history = {
        "stage": "pretrain",
        "objective": "causal",
        "steps": result.steps,
        "tokens": result.tokens,
        "precision": result.precision,
        "tokenizer_sha256": tokenizer.sha256,
    }
    directory = write_model_directory(
        out / "model", shape, model.weights(), tokenizer, {**(lineage or {}), "history": [history]}
    )
    write_json(out / "result.json", {**vars(result), "parameters": shape.parameters})
    return directory, result
