"""What a pretraining will cost, before anything is written."""

from __future__ import annotations

import itertools
from pathlib import Path

from lexmill.data.documents import read_texts
from lexmill.data.shards import TokenShard
from lexmill.errors import ConfigError, DataError, LexmillError
from lexmill.files import read_json
from lexmill.model.config import ModelConfig
from lexmill.pretrain.lessons import loss_of
from lexmill.pretrain.made import Origin
from lexmill.pretrain.spans import plan_rows
from lexmill.pretrain.stage import PretrainConfig
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.cost import Row
from lexmill.train.forecast import CALIBRATION_SECONDS, Data, Forecast, forecast

_SAMPLE = 300  # documents that are tokenized to estimate how many tokens all have


def plan_pretraining(
    config: PretrainConfig,
    *,
    vocab_size: int | None = None,
    documents: Path | None = None,
    tokenizer: Tokenizer | None = None,
    out: Path | None = None,
    world: int = 1,
    seconds: float = CALIBRATION_SECONDS,
) -> Forecast:
    """Say what `pretrain` with these settings will cost.

    Args:
        vocab_size: the tokenizer's, where there is none yet.
        documents: the folder that `prepare` wrote; with a tokenizer it gives the number of tokens.
        out: where the run would write; token shards that lie there already are counted.
        world: processes that would train together.
        seconds: for the calibration, about; 0 leaves it out.

    Raises:
        ConfigError: neither a tokenizer nor the size of its vocabulary is given.
    """
    size = tokenizer.vocab_size if tokenizer else vocab_size
    if not size:
        raise ConfigError(
            "A plan needs the size of the vocabulary.",
            "Give --tokenizer, or --set vocab_size=N where there is no tokenizer yet.",
        )
    shape = config.shape(size)
    data = count_tokens(documents, tokenizer, out) if documents and tokenizer else None
    mean = data.tokens / max(data.documents, 1) if data else None
    return forecast(
        config,
        shape,
        loss_of(config, shape),
        training_row(config, shape, mean),
        data=data,
        world=world,
        validation_tokens=config.validation_tokens,
        seconds=seconds,
    )


def training_row(config: PretrainConfig, shape: ModelConfig, mean: float | None = None) -> Row:
    """What a packed row of the objective holds.

    Args:
        mean: tokens of a document; two documents a row when not given.
    """
    length = config.row_length or shape.context
    together = max(1.0, length / mean) if mean else 2.0
    if shape.shape == "encoder":
        pairs = together if shape.nsp else 0.0
        return Row(length, config.masking.share * length, documents=together, pairs=pairs)
    if shape.shape == "encoder_decoder":
        plan = plan_rows(length, config.spans)
        return Row(plan.read, plan.written, plan.written, documents=together)
    return Row(length, length, documents=together)


def count_tokens(documents: Path, tokenizer: Tokenizer, out: Path | None = None) -> Data:
    """Tokens of the training split's texts: counted where they lie as token shards, else estimated.

    Raises:
        DataError: there are no text documents.
        FileError: no such folder.
    """
    splits = ("train", "validation")
    if out is not None and (out / "tokens" / "train").is_dir():
        for how in ({}, {"chinese_words": False}, {"chinese_words": True}):
            if Origin(out / "tokens", documents, tokenizer, splits, **how).is_of_shards():
                shard = TokenShard.open(out / "tokens" / "train")
                return Data(shard.tokens, len(shard), exact=True)
    sample = list(itertools.islice(read_texts(documents / "train.parquet"), _SAMPLE + 1))
    if not sample:
        raise DataError(
            f"{documents}: there are no text documents to pretrain on.", "Add a source of kind 'text'."
        )
    texts = [document.text or "" for document in sample]
    tokens = sum(map(len, tokenizer.encode_plain(texts)))
    if len(sample) <= _SAMPLE:
        return Data(tokens, len(texts), exact=True)
    counts = _counts(documents)
    scale = counts.get("characters", 0) / max(sum(map(len, texts)), 1)
    if not scale:  # a folder without the manifest's figures: all texts are counted by their length
        lengths = [len(document.text or "") for document in read_texts(documents / "train.parquet")]
        counts = {"documents": len(lengths)}
        scale = sum(lengths) / max(sum(map(len, texts)), 1)
    return Data(round(tokens * scale), counts["documents"], exact=False)


def _counts(documents: Path) -> dict[str, int]:
    """Documents and characters of the training split, by the manifest."""
    try:
        return read_json(documents / "manifest.json")["counts"]["train"]["text"]
    except (LexmillError, KeyError, TypeError):
        return {}
