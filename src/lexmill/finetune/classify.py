"""Classification as a fine-tuning task: a text, or a pair of texts, and its label, by the first token of an encoder."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.data.labelled import LabelledText
from lexmill.errors import DataError
from lexmill.finetune.calibration import calibrate
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lengths import Lengths
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TRAIN, VALIDATION, TaskData
from lexmill.model.directory import ModelDirectory
from lexmill.model.heads import with_labels
from lexmill.tokenizer.pairs import cut, encode_pairs
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch, fixed_batches
from lexmill.train.causal import counted
from lexmill.train.examples import IGNORED, Example
from lexmill.train.objective import Losses
from lexmill.train.pooling import groups, pool, read_rows

_SHOWN = 5  # rows and labels that a message names


def classify_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Telling labels apart. The model keeps a head that knows all of them, and gets a fresh one otherwise.

    Raises:
        DataError: no rows, only one label, or a held-out label that training does not have.
        ModelError: the model is no encoder.
    """
    rows = list(data.rows(TRAIN, LabelledText))
    if not rows:
        raise DataError("There are no texts with labels to learn from.", 'Rows with "text" and "label" are.')
    found = Counter(row.label for row in rows)
    labels = sorted(found, key=_in_order)
    base = with_labels(model, labels, config.seed)
    if len(base.config.labels) < 2:
        raise DataError(
            f"All {len(rows):,} rows have the same label, '{labels[0]}': there is nothing to tell apart."
        )
    held_out = list(itertools.islice(data.rows(VALIDATION, LabelledText), config.validation_rows))
    check_labels(held_out, base.config.labels, "training")
    length = config.length(base.config)
    tokenizer = base.tokenizer
    pad = tokenizer.ids.pad or 0
    lengths = Lengths(config.too_long, length)
    examples = label_examples(rows, tokenizer, base.config.labels, length, lengths)
    validation = label_examples(
        held_out, tokenizer, base.config.labels, length, Lengths(config.too_long, length)
    )

    def after(network: Any) -> dict[str, Any]:
        if not validation:
            return {}
        batches = fixed_batches(validation, rows=config.rows, length=length, pad_id=pad)
        return {"calibration": {"task": "classify", **calibrate(*_all_logits(network, batches))}}

    return Lesson(
        label_loss,
        lambda epoch: examples,
        validation,
        length,
        pad,
        f"{len(rows):,} texts, {len(labels)} labels: {balance(found)}" + lengths.told(),
        facts={"rows": len(rows), "labels": dict(found), "too_long": lengths.longer},
        base=base,
        after=after,
        targets="labels",
    )


def _in_order(label: str) -> tuple[int, str]:
    """Whole numbers by their value, before all other names."""
    return (int(label), "") if label.isdigit() and label.isascii() and len(label) < 18 else (1 << 62, label)


def balance(found: Counter[str]) -> str:
    """How many rows of which label, in words: "good 60 %, bad 40 %"."""
    total = max(found.total() if hasattr(found, "total") else sum(found.values()), 1)
    parts = [f"{label} {100 * count / total:.3g} %" for label, count in found.most_common(_SHOWN)]
    return ", ".join(parts) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def check_labels(rows: Iterable[LabelledText], labels: Sequence[str], where: str) -> None:
    """Refuse labels that a model does not know.

    Raises:
        DataError: names them with their rows.
    """
    known = set(labels)
    strange = [row for row in rows if row.label not in known]
    if strange:
        named = ", ".join(f"'{row.label}' ({row.origin})" for row in strange[:_SHOWN])
        more = f" and {len(strange) - _SHOWN:,} more rows" if len(strange) > _SHOWN else ""
        raise DataError(
            f"There are labels that were never seen in {where}: {named}{more}.",
            f"Known are {', '.join(list(labels)[:20])}. Add rows of the others to the training data, or take them out.",
        )


def label_examples(
    rows: Sequence[LabelledText],
    tokenizer: Tokenizer,
    labels: Sequence[str],
    length: int,
    lengths: Lengths | None = None,
) -> list[Example]:
    """One example a row of at most `length` tokens, its label's number as the target of the first.

    Args:
        lengths: what happens to longer rows; cut when not given.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    lengths = lengths or Lengths("cut", length)
    encoded = encode_pairs(tokenizer, [(row.text, row.second) for row in rows])
    examples = []
    for row, pair in lengths.kept((row, len(pair), pair) for row, pair in zip(rows, encoded)):
        pair = cut(pair, length)
        targets = np.full(len(pair), IGNORED, np.int64)
        targets[0] = numbers[row.label]
        examples.append(Example(pair.ids, targets, pair.segments))
    return examples


def label_loss(model: Any, batch: Batch) -> Losses:
    """Cross-entropy of each text's label."""
    logits, targets = label_logits(model, batch)
    losses = Losses()
    lost = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    right = None if torch.is_grad_enabled() else int((logits.argmax(-1) == targets).sum())
    losses.add("tokens", (lost, right))
    return losses


def label_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the texts of packed rows, (n, labels), float32, and their labels, (n,); some may be IGNORED."""
    hidden, targets = read_rows(model, batch), batch.tensor("targets")
    if model.config.label_pooling == "mean":
        group, count = groups(batch.tensor("document"))
        at = (targets.flatten() != IGNORED).nonzero()[:, 0]
        summary, targets = pool(hidden, group, count, "mean")[group[at]], targets.flatten()[at]
    else:
        summary, targets = counted(hidden, targets)
    return model.label_logits(summary).float(), targets


def _all_logits(model: Any, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    device = next(model.parameters()).device
    logits, labels = [], []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            found, targets = label_logits(model, batch.to(device))
            counts = targets != IGNORED
            logits.append(found[counts].cpu().numpy())
            labels.append(targets[counts].cpu().numpy())
    return np.concatenate(logits), np.concatenate(labels)
