"""Scores of what a model writes: summaries, translations, answers. All rows are written side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from lexmill.data.labelled import Question, Row, TextPair
from lexmill.errors import DataError
from lexmill.evaluate.qa_metrics import answer_scores, normalise_english
from lexmill.evaluate.scores import ScoreConfig, Scoring, TaskScores
from lexmill.evaluate.text_metrics import bleu, first_sentence, length_statistics, rouge
from lexmill.finetune.writing import (
    Asking,
    answers_of,
    choose_asking,
    fields_of,
    prompt_ids,
    prompt_text,
    shortened_prompt,
)
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.together import write_ids

_NAMED = 5  # rows that an error lists


@dataclass(frozen=True)
class Written:
    """What a model made of rows.

    Attributes:
        rows: those that were asked, all but what was dropped.
        given: of each the text.
        details: how it was asked.
    """

    rows: list[Row]
    given: list[str]
    asking: Asking
    details: dict[str, Any]

    def examples(self, count: int) -> list[dict[str, str]]:
        """The first rows as texts."""
        return [
            {
                "question": prompt_text(self.asking, fields_of(row)),
                "expected": answers_of(row, self.asking)[0],
                "given": said,
            }
            for row, said in list(zip(self.rows, self.given, strict=True))[:count]
        ]


def summary_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """ROUGE, with that of each text's first sentence beside it.

    Raises:
        DataError: rows too long for the model, where that is not to be mended; lists them.
        ModelError: a model that does not write.
    """
    found = write_rows("summarise", model, scoring, TextPair)
    pairs = [cast(TextPair, row) for row in found.rows]
    references = [row.targets for row in pairs]
    metrics, how = rouge(found.given, references)
    baseline, _ = rouge([first_sentence(row.source) for row in pairs], references)
    best_first = {"rougeL": metrics.pop("rougeL"), **metrics}
    return _scores("summarise", found, scoring, best_first, how | {"first_sentence": baseline}, references)


def translation_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """BLEU and chrF with sacrebleu's signatures. Raises as `summary_scores`."""
    found = write_rows("translate", model, scoring, TextPair)
    references = [cast(TextPair, row).targets for row in found.rows]
    metrics, how = bleu(found.given, references)
    return _scores("translate", found, scoring, metrics, how, references)


def written_answer_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Exact match and F1 as SQuAD's or CMRC's script. Raises as `summary_scores`.

    The words that stand for "no answer" count as no answer.
    """
    found = write_rows("qa", model, scoring, Question)
    nothing = normalise_english(found.asking.no_answer)
    said = ["" if normalise_english(text) == nothing else text for text in found.given]
    right = [cast(Question, row).answers for row in found.rows]
    scores = answer_scores(said, right, scoring.config.language)
    metrics = {"f1": scores.pop("f1"), **scores}
    references = [answers or ("",) for answers in right]
    return _scores("qa", found, scoring, metrics, {"no_answer": sum(not text for text in said)}, references)


def write_rows(task: str, model: LanguageModel, scoring: Scoring, kind: type[Row]) -> Written:
    """Put each row to a model as in its training, and collect what it writes.

    Raises:
        DataError: nothing to ask, or rows that are too long.
    """
    config = scoring.config
    asking = scoring.asking or choose_asking(
        task, model.config, kind, lineage=model.lineage, instruction=config.instruction
    )
    rows, prompts, cut = fitting_prompts(model, asking, scoring.rows, config.max_tokens, config.too_long)
    if not rows:
        raise DataError("There are no rows to score.", "Are all of them too long?")
    write = scoring.write or write_together
    with scoring.progress.task("writing", len(rows), "rows") as task_view:
        ids = write(model, prompts, config.options, task_view.advance)
    tokenizer = model.tokenizer
    given = [tokenizer.decode(one, skip_special=True).strip() for one in ids]
    details: dict[str, Any] = {"instruction": asking.instruction}
    unfinished = sum(len(one) >= config.max_tokens for one in ids)
    dropped = len(scoring.rows) - len(rows)
    for name, count in (("source_cut", cut), ("too_long_left_out", dropped), ("unfinished", unfinished)):
        if count:
            details[name] = count
    return Written(rows, given, asking, details)


def write_texts(task: str, model: LanguageModel, texts: Sequence[str], config: ScoreConfig) -> list[str]:
    """What a model makes of each text, asked as in its training for "summarise" or "translate".

    Raises:
        DataError: a text is too long for the model.
        ModelError: a model that does not write.
    """
    rows = [
        TextPair(origin=f"text {number:,}", source=text, targets=("",))
        for number, text in enumerate(texts, 1)
    ]
    return write_rows(task, model, Scoring(rows, config), TextPair).given


def write_answer(model: LanguageModel, question: str, context: str, config: ScoreConfig) -> str:
    """The answer that a decoder or encoder–decoder writes to a question about a text. Raises as `write_texts`."""
    row = Question(origin="the question", question=question, context=context, answers=(), starts=())
    return write_rows("qa", model, Scoring([row], config), Question).given[0]


def write_together(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: dict[str, Any], done: Any
) -> list[list[int]]:
    """The writer of models in torch; others are handed in by `Scoring.write`."""
    return write_ids(model, prompts, **options, done=done)


def fitting_prompts(
    model: LanguageModel, asking: Asking, rows: Sequence[Row], max_tokens: int, too_long: str
) -> tuple[list[Row], list[list[int]], int]:
    """Rows and their prompts, of which a model can read all, and how many were cut.

    An encoder reads as much as in its training. A decoder's context must hold the answer too: `max_tokens`, or
    a quarter of the context where that is less.

    Raises:
        DataError: some are too long, and nothing was chosen for them.
    """
    shape, tokenizer = model.config, model.tokenizer
    if shape.shape == "encoder_decoder":
        room = asking.read or shape.context
    else:
        room = shape.context - min(max_tokens, shape.context // 4)
    kept: list[Row] = []
    prompts: list[list[int]] = []
    long: list[str] = []
    cut = 0
    for row in rows:
        fields = fields_of(row)
        ids: list[int] | None = prompt_ids(asking, tokenizer, shape, fields)
        assert ids is not None
        if len(ids) > room:
            if too_long == "drop":
                continue
            size = len(ids)
            ids = shortened_prompt(asking, tokenizer, shape, fields, room) if too_long == "cut" else None
            if ids is None:
                long.append(f"{row.origin} ({size:,} tokens)")
                continue
            cut += 1
        kept.append(row)
        prompts.append(ids)
    if long:
        more = f" and {len(long) - _NAMED:,} more" if len(long) > _NAMED else ""
        raise DataError(
            f"{len(long):,} rows have more than the {room:,} tokens that the model can read"
            f"{'' if shape.shape == 'encoder_decoder' else f' if it is to write {shape.context - room:,}'}: "
            f"{', '.join(long[:_NAMED])}{more}.",
            "Set too_long=cut (shortens the source) or too_long=drop (leaves them out).",
        )
    return kept, prompts, cut


def _scores(
    task: str,
    found: Written,
    scoring: Scoring,
    metrics: dict[str, float],
    details: dict[str, Any],
    references: Sequence[Sequence[str]],
) -> TaskScores:
    return TaskScores(
        task=task,
        metrics=metrics,
        rows=len(found.rows),
        details={**found.details, **details, "length": length_statistics(found.given, references)},
        examples=found.examples(scoring.config.examples),
        predictions=found.given,
    )
