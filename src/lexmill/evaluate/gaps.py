"""Figures of models that fill gaps: their own objective on held-out text, and sentences that a recipe names."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lexmill.config import from_mapping
from lexmill.data.documents import read_documents
from lexmill.errors import ConfigError, DataError
from lexmill.inference.filling import Filling
from lexmill.inference.language_model import LanguageModel
from lexmill.pretrain.lessons import tokenize_documents
from lexmill.pretrain.masked import MaskingConfig, masked_examples, masked_loss
from lexmill.pretrain.sentences import tokenize_sentences
from lexmill.pretrain.spans import SpanConfig, plan_rows, span_examples
from lexmill.train.batches import Batch, fixed_batches
from lexmill.train.causal import sequence_loss
from lexmill.train.objective import Objective, measure

_SEED = 20  # other masks than those that training validates on


@dataclass(frozen=True, kw_only=True)
class FillCase:
    """A sentence with a gap. Every text of `expect` should be among the `top` best fillings."""

    text: str
    expect: tuple[str, ...] = ()
    top: int = 5

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError("'top' must be at least 1.")


def pretraining_scores(model: LanguageModel, documents: Path, rows: int, tokens: int) -> dict[str, float]:
    """Losses and accuracies of the model's own objective on at most so many tokens of held-out text.

    Masks and gaps are of the kind that the model's lineage names.
    """
    history = _history(model)
    with tempfile.TemporaryDirectory() as folder:
        if model.config.shape == "encoder":
            batches = _masked_batches(model, documents, Path(folder), history.get("masking", {}), rows)
            objective: Objective = masked_loss
        else:
            batches = _span_batches(model, documents, Path(folder), history.get("spans", {}), rows)
            objective = sequence_loss
        most = max(1, tokens // max(batches[0].size, 1)) if batches else 0
        found = measure(model.network, objective, batches[:most])
    scores: dict[str, float] = {f"{name} loss": round(loss, 5) for name, loss in found.losses.items()}
    scores |= {f"{name} accuracy": round(value, 5) for name, value in found.accuracies.items()}
    return scores | {f"{name} measured": count for name, count in found.targets.items()}


def _masked_batches(
    model: LanguageModel, documents: Path, folder: Path, facts: dict[str, Any], rows: int
) -> list[Batch]:
    masking = from_mapping(MaskingConfig, {**facts, "next_sentence": model.config.nsp}, "masking")
    found = tokenize_sentences(
        documents, model.tokenizer, folder, chinese_words=masking.chinese_words, splits=("validation",)
    )
    length = model.config.context
    examples = masked_examples(found["validation"], model.tokenizer, masking, length, (_SEED,))
    return fixed_batches(examples, rows=rows, length=length, pad_id=model.tokenizer.ids.pad or 0)


def _span_batches(
    model: LanguageModel, documents: Path, folder: Path, facts: dict[str, Any], rows: int
) -> list[Batch]:
    spans = from_mapping(SpanConfig, facts, "spans")
    shards = tokenize_documents(documents, model.tokenizer, folder, splits=("validation",))
    plan = plan_rows(model.config.context, spans)
    examples = span_examples(
        shards["validation"],
        model.tokenizer,
        spans,
        model.config.context,
        model.config.decoder_start,
        (_SEED,),
    )
    return fixed_batches(
        examples,
        rows=rows,
        length=plan.read,
        pad_id=model.tokenizer.ids.pad or 0,
        decoder_length=plan.written,
    )


def _history(model: LanguageModel) -> dict[str, Any]:
    """What the model's lineage says of its pretraining; empty for models made by others."""
    from lexmill.model.directory import ModelDirectory

    stages = ModelDirectory.open(model.path).lineage.get("history", []) if model.path else []
    return next((stage for stage in reversed(stages) if stage.get("stage") == "pretrain"), {})


def fill_scores(model: LanguageModel, documents: Path, cases: Sequence[FillCase]) -> list[dict[str, Any]]:
    """What the model puts into each gap, and whether what was expected is among it.

    Raises:
        DataError: a training document holds one of the sentences: then it proves nothing.
    """
    scores = []
    for case in cases:
        if model.config.shape == "encoder":
            found = model.fill_mask(case.text, case.top)
        else:
            found = model.fill_spans(case.text, top=case.top)
        _check_unseen(model, documents, case, found)
        best = [one.text for one in found]
        places = {text: best.index(text) + 1 if text in best else 0 for text in case.expect}
        missing = [text for text, place in places.items() if not place]
        said = ", ".join(f"{one.text} {one.probability:.2f}" for one in found)
        scores.append(
            {
                "text": case.text,
                "expected": list(case.expect),
                "found": [asdict(one) for one in found],
                "passed": not missing if case.expect else None,
                "said": said + (f" (missing: {', '.join(missing)})" if missing else ""),
            }
        )
    return scores


def _check_unseen(model: LanguageModel, documents: Path, case: FillCase, found: Sequence[Filling]) -> None:
    if model.config.shape == "encoder":
        mask = model.tokenizer.token_text(model.tokenizer.require_mask())
    else:
        mask = model.tokenizer.token_text(model.tokenizer.require_sentinels()[0])
    words = [*case.expect, *(one.text for one in found if model.config.shape == "encoder")]
    filled = {_bare(case.text.replace(mask, word)) for word in words}
    for row, document in enumerate(read_documents(documents / "train.parquet"), 1):
        bare = _bare(document.text or "")
        for sentence in filled:
            if sentence in bare:
                raise DataError(
                    f"{documents / 'train.parquet'}, row {row:,} holds the sentence {sentence!r}, so that it "
                    "shows nothing about what the model understood.",
                    "Choose another sentence in [evaluate] fill.",
                )


def _bare(text: str) -> str:
    """Without white space: Chinese has none, and a mask often stands between spaces."""
    return "".join(text.split())
