"""The three ways to pretrain, each as a lesson: what a model of which shape sees, and what it must answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.data.documents import find_texts, read_texts
from lexmill.data.shards import TokenShard, write_token_shard
from lexmill.errors import DataError, ModelError
from lexmill.model.config import ModelConfig
from lexmill.pretrain.made import Origin
from lexmill.pretrain.masked import MaskingConfig, masked_examples, masked_loss
from lexmill.pretrain.sentences import Sentences, tokenize_sentences
from lexmill.pretrain.spans import SpanConfig, plan_rows, span_examples
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.causal import causal_loss, sequence_loss
from lexmill.train.examples import IGNORED, Example, Examples, begins, places, windows
from lexmill.train.objective import Objective


@dataclass(frozen=True)
class Lesson:
    """An objective with its examples.

    Attributes:
        loss: of a batch.
        examples: of the training split, by epoch; another epoch has other cuts, masks and gaps.
        validation: examples of the validation split, always the same.
        length: tokens in a row; `decoder_length` those that are written, 0 where nothing is.
        pad: the id that fills rows.
        training_tokens: in the shards.
        facts: for the model's lineage.
    """

    loss: Objective
    examples: Callable[[int], Sequence[Example]]
    validation: Sequence[Example]
    length: int
    pad: int
    training_tokens: int
    decoder_length: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def causal_lesson(
    config: Any, shape: ModelConfig, documents: Path, tokenizer: Tokenizer, out: Path, progress: Progress
) -> Lesson:
    """Predict each next token (decoders)."""
    end_of_text, pad = tokenizer.ids.bos, tokenizer.ids.pad
    if end_of_text is None or pad is None:
        raise ModelError(
            "The tokenizer has no end-of-text or no padding token, which the causal objective needs.",
            "Train one of kind 'bpe' with 'lexmill tokenizer train'.",
        )
    shards = tokenize_documents(documents, tokenizer, out, progress=progress)
    length = config.row_length or shape.context

    def examples(epoch: int) -> Sequence[Example]:
        shift = float(np.random.default_rng([config.seed, epoch, 1]).random()) if epoch else 0.0
        return cut_documents(shards["train"], length, end_of_text, shift)

    return Lesson(
        loss_of(config, shape),
        examples,
        cut_documents(shards["validation"], length, end_of_text),
        length,
        pad,
        shards["train"].tokens,
    )


def masked_lesson(
    config: Any, shape: ModelConfig, documents: Path, tokenizer: Tokenizer, out: Path, progress: Progress
) -> Lesson:
    """Predict hidden words, and whether a text follows another (encoders)."""
    masking: MaskingConfig = config.masking
    tokenizer.require_mask()
    pad = _pad(tokenizer)
    found = tokenize_sentences(
        documents, tokenizer, out, chinese_words=masking.chinese_words, progress=progress
    )
    length = config.row_length or shape.context
    if not shape.nsp:
        masking = replace(masking, next_sentence=False)

    def examples(split: Sentences, *seed: int) -> Sequence[Example]:
        return masked_examples(split, tokenizer, masking, length, (config.seed, *seed))

    return Lesson(
        loss_of(config, shape),
        lambda epoch: examples(found["train"], epoch, 3),
        examples(found["validation"], 0, 4) if len(found["validation"]) else [],
        length,
        pad,
        found["train"].tokens,
        facts={"masking": vars(masking)},
    )


def span_lesson(
    config: Any, shape: ModelConfig, documents: Path, tokenizer: Tokenizer, out: Path, progress: Progress
) -> Lesson:
    """Write what was taken out of a text (encoder–decoders)."""
    spans: SpanConfig = config.spans
    tokenizer.require_sentinels()
    pad = _pad(tokenizer)
    if not tokenizer.ids.stop:
        raise ModelError(
            "The tokenizer has no token that ends a text.", "Train one of kind 'unigram' for T5's shape."
        )
    shards = tokenize_documents(documents, tokenizer, out, progress=progress)
    length = config.row_length or shape.context
    full = plan_rows(length, spans)

    def examples(split: str, *seed: int) -> Sequence[Example]:
        return span_examples(
            shards[split], tokenizer, spans, length, shape.decoder_start, (config.seed, *seed)
        )

    return Lesson(
        loss_of(config, shape),
        lambda epoch: examples("train", epoch, 5),
        examples("validation", 0, 6),
        full.read,
        pad,
        shards["train"].tokens,
        decoder_length=full.written,
        facts={"spans": vars(spans), "rows": {"text": full.raw, "read": full.read, "written": full.written}},
    )


def _pad(tokenizer: Tokenizer) -> int:
    if tokenizer.ids.pad is None:
        raise ModelError("The tokenizer has no padding token, so rows of unequal texts cannot be filled.")
    return tokenizer.ids.pad


LESSONS = {"causal": causal_lesson, "masked": masked_lesson, "span_corruption": span_lesson}

# Which objective fits which shape.
OBJECTIVE_OF = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "span_corruption"}


def loss_of(config: Any, shape: ModelConfig) -> Objective:
    """What a model of this shape lowers in pretraining."""
    losses: dict[str, Objective] = {
        "causal": causal_loss,
        "masked": partial(masked_loss, pair_weight=config.masking.pair_weight),
        "span_corruption": sequence_loss,
    }
    return losses[OBJECTIVE_OF[shape.shape]]


def tokenize_documents(
    documents: Path,
    tokenizer: Tokenizer,
    out: Path,
    *,
    splits: tuple[str, ...] = ("train", "validation"),
    progress: Progress = SILENT,
) -> dict[str, TokenShard]:
    """Turn the text documents of the splits into token shards, `out/train` and `out/validation`.

    The texts of special tokens inside a document stay ordinary text.

    Raises:
        DataError: a split has no text documents.
    """
    origin = Origin(out, documents, tokenizer, splits)
    if origin.is_of_shards():
        return {split: TokenShard.open(out / split) for split in splits}
    origin.forget()
    shards = {}
    for split in splits:
        with progress.task(f"tokenizing {split}", None, "documents") as task:

            def encoded(split: str = split, task: Any = task) -> Any:
                for document in read_texts(documents / f"{split}.parquet"):
                    task.advance()
                    text = document.text or ""
                    yield tokenizer.encode_plain([text])[0], len(text.encode("utf-8"))

            shards[split] = write_token_shard(
                out / split,
                encoded(),
                vocab_size=tokenizer.vocab_size,
                tokenizer_sha256=tokenizer.sha256,
            )
    if shards[splits[0]].tokens == 0:
        raise DataError(
            f"{documents}: there are no text documents to pretrain on.", "Add a source of kind 'text'."
        )
    origin.remember()
    return shards


def name_documents(documents: Path, numbers: Sequence[int]) -> list[str]:
    """Where the texts with these numbers in the training split come from: id and source of each."""
    found = find_texts(documents / "train.parquet", set(numbers))
    return [
        f"{found[number].id} ({found[number].source})" if number in found else str(number)
        for number in numbers
    ]


def cut_documents(shard: TokenShard, length: int, end_of_text: int, shift: float = 0.0) -> Examples:
    """Each document between two end-of-text tokens, cut into examples of at most `length` tokens.

    Args:
        shift: in [0, 1): where the first cut lies, as a part of `length`; another value an epoch
            shows the model other beginnings.
    """
    sizes = np.diff(np.asarray(shard.offsets)) + 1  # predictions: of each token, and of the end
    tokens = np.full(int(sizes.sum()), end_of_text, np.int64)
    targets = tokens.copy()
    starts = begins(sizes)
    tokens[places(starts + 1, sizes - 1)] = shard.ids
    targets[places(starts, sizes - 1)] = shard.ids
    document, _, lengths = windows(sizes, length, int(shift * length))
    return Examples(tokens, lengths, targets, np.full(len(lengths), IGNORED, np.int64), document)
