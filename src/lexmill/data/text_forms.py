"""Forms of rows that are texts: SQuAD's questions, source and target, text and label, query and positive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.data.fields import Fields
from lexmill.data.labelled import LabelledText, Match, Question, TextPair
from lexmill.errors import DataError
from lexmill.messages import kind_of

_ANSWERS = '"answers" are {"text": [...], "answer_start": [...]} or a list of {"text", "answer_start"}.'


def question(fields: Fields) -> Question:
    """SQuAD 1.1 and 2.0, CMRC 2018: answers are found at their places in the context, or there is none."""
    context, asked = fields.text("context"), fields.text("question")
    found = [] if fields.get("is_impossible") is True else _answers(fields)
    if not found and fields.get("is_impossible") is False:
        raise fields.error(
            "answers", 'is empty, and "is_impossible" is false', "Give the answer, or take the row out."
        )
    starts = [_start(fields, context, text, start) for text, start in found]
    return Question(
        origin=fields.where,
        question=asked,
        context=context,
        answers=tuple(text for text, _ in found),
        starts=tuple(starts),
        id=str(fields.get("id") or ""),
    )


def _answers(fields: Fields) -> list[tuple[str, int]]:
    """Texts and starts, however they are written."""
    value = fields.get("answers")
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, (list, tuple)) or not isinstance(starts, (list, tuple)):
            raise fields.error("answers", 'does not hold the lists "text" and "answer_start"', _ANSWERS)
        if len(texts) != len(starts):
            raise fields.error("answers", f"has {len(texts):,} texts, but {len(starts):,} starts", _ANSWERS)
        pairs = list(zip(texts, starts))
    elif isinstance(value, (list, tuple)):
        if not all(isinstance(one, Mapping) for one in value):
            raise fields.error("answers", "is not a list of objects", _ANSWERS)
        pairs = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        raise fields.error("answers", f"is {kind_of(value)}", _ANSWERS)
    for text, start in pairs:
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
            raise fields.error("answers", "holds an answer without a text or a start", _ANSWERS)
        if not text.strip():
            raise fields.error("answers", "holds an empty answer", "Fill it, or take the row out.")
    return pairs


def _start(fields: Fields, context: str, text: str, start: int) -> int:
    """Where an answer begins; where that is not where the row says, by `wrong_starts`."""
    if start >= 0 and context.startswith(text, start):
        return start
    places = []
    place = context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    if fields.settings.wrong_starts == "mend":
        fields.drop("wrong places of answers")
        return min(places, key=lambda found: abs(found - start), default=-1)
    short = text if len(text) <= 40 else text[:39] + "…"
    there = f"it begins at {', '.join(f'{found:,}' for found in places[:3])}" if places else "it is not in it"
    raise DataError(
        f'{fields.where}: the answer "{short}" does not stand at character {start:,} of its context; {there}.',
        'Mend the row, or set wrong_starts = "mend": then the nearest place counts, and answers that are nowhere '
        "count for scores only.",
    )


def text_pair(fields: Fields) -> TextPair:
    """{"source", "target"}; a list of targets holds references, of which each is right."""
    targets = fields.texts("target")
    if not targets:
        raise fields.error("target", "is empty", "Fill it, or take the row out.")
    return TextPair(origin=fields.where, source=fields.text("source"), targets=targets)


def labelled_text(fields: Fields) -> LabelledText:
    """{"text", "label"}, with a second text beside the first if there is one. Whole numbers are labels too."""
    return LabelledText(
        origin=fields.where, text=fields.text("text"), second=_second(fields), label=_label(fields)
    )


def _second(fields: Fields) -> str | None:
    return None if fields.get("second") is None else fields.text("second")


def _label(fields: Fields) -> str:
    label: Any = fields.get("label")
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, int):
        return str(label)
    if isinstance(label, float):
        raise fields.error("label", f"is the number {label}", "Labels are names or whole numbers.")
    return fields.text("label").strip()


def match(fields: Fields) -> Match:
    """{"query", "positive"} with "negatives", one or a list; "anchor", "pos" and "neg" are the same."""
    positives = fields.texts("positive")
    if len(positives) != 1:
        raise fields.error(
            "positive", f"holds {len(positives):,} texts", "A row has one positive: make a row of each."
        )
    negatives = fields.texts("negatives")
    if positives[0] in negatives:
        raise fields.error("negatives", "holds the positive itself", "Take it out of the negatives.")
    return Match(origin=fields.where, query=fields.text("query"), positive=positives[0], negatives=negatives)
