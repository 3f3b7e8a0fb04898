"""Tasks whose answer is written (summaries, translations, answers): how a row is put to a model, and learned.

Training, scoring and use ask in the very same words: `prompt_ids` is the only place where they are made. An
encoder–decoder reads them and writes the answer. A decoder with a chat template gets them as a user's message
and replies; one without reads them, a separator, and goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from lexmill.data.labelled import Question, Row, TextPair
from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.finetune.chat import Replay
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TRAIN, VALIDATION, RowKind, TaskData
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.causal import causal_loss, sequence_loss
from lexmill.train.examples import Example, next_token_example

# What may stand in an instruction, by the kind of row; the first is what may be shortened.
FIELDS: dict[type[Row], tuple[str, ...]] = {TextPair: ("source",), Question: ("context", "question")}

# The words of each task where nothing else is said: for an encoder–decoder (T5's own), and for a decoder.
INSTRUCTIONS = {
    "summarise": ("summarize: {source}", "Summarise this text:\n\n{source}"),
    "translate": ("translate: {source}", "Translate this text:\n\n{source}"),
    "qa": (
        "question: {question} context: {context}",
        "{context}\n\nAnswer this question by what the text says: {question}",
    ),
}
_NAMED = 5  # rows that an error lists


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rows are put to a model; kept in its `lexmill.json`.

    Attributes:
        instruction: with the names of a row's fields in braces.
        separator: between it and the answer, for a decoder without a chat template.
        no_answer: what is written where the context does not answer.
        read: tokens that an encoder read at most in training; None where it is not known.
    """

    instruction: str
    separator: str = "\n\n"
    no_answer: str = "no answer"
    read: int | None = None


def choose_asking(
    task: str,
    shape: ModelConfig,
    kind: type[Row],
    *,
    lineage: Mapping[str, Any] | None = None,
    instruction: str = "",
    separator: str | None = None,
    no_answer: str = "",
) -> Asking:
    """How a model is asked: as it is said here, else as it was in its training, else by the task's own words.

    Raises:
        ConfigError: an instruction that leaves out a field of the rows.
        ModelError: a model that writes nothing.
    """
    if shape.shape == "encoder":
        raise ModelError("This model is an encoder, which writes no text.", "Take a decoder or T5.")
    asking = _asked(task, lineage or {}) or Asking(instruction=INSTRUCTIONS[task][shape.shape == "decoder"])
    said = {"instruction": instruction, "no_answer": no_answer}
    if separator is not None:
        asking = replace(asking, separator=separator)
    asking = replace(asking, **{name: value for name, value in said.items() if value})  # type: ignore[arg-type]
    for name in FIELDS[kind]:
        if f"{{{name}}}" not in asking.instruction:
            raise ConfigError(
                f"The instruction {asking.instruction!r} has no place for the {name}.",
                f'Put {{{name}}} where it belongs, as in "{INSTRUCTIONS[task][1]}".',
            )
    return asking


def asking_of(config: FinetuneConfig, shape: ModelConfig, kind: type[Row]) -> Asking:
    """How a run asks. Raises as `choose_asking`."""
    asking = choose_asking(
        config.task,
        shape,
        kind,
        instruction=config.instruction,
        separator=config.separator,
        no_answer=config.no_answer,
    )
    two = shape.shape == "encoder_decoder"
    return replace(asking, read=config.length(shape)) if two else asking


def asked_words(task: str, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that asks in the words of an earlier one."""
    asked = _asked(task, lineage)
    names = ("instruction", "separator", "no_answer")
    return {name: getattr(asked, name) for name in names} if asked else {}


def _asked(task: str, lineage: Mapping[str, Any]) -> Asking | None:
    """What the newest training for this task noted."""
    history = lineage.get("history")
    for entry in reversed(history if isinstance(history, list) else []):
        asked = entry.get("asked") if isinstance(entry, Mapping) and entry.get("task") == task else None
        if isinstance(asked, Mapping) and isinstance(asked.get("instruction"), str):
            known = {name: asked[name] for name in Asking.__dataclass_fields__ if name in asked}
            texts = ("instruction", "separator", "no_answer")
            if all(isinstance(known.get(name, ""), str) for name in texts) and isinstance(
                known.get("read"), (int, type(None))
            ):
                return Asking(**known)
    return None


def fields_of(row: Row) -> dict[str, str]:
    """What of a row the model is told."""
    if isinstance(row, Question):
        return {"context": row.context, "question": row.question}
    assert isinstance(row, TextPair)
    return {"source": row.source}


def answers_of(row: Row, asking: Asking) -> tuple[str, ...]:
    """What may be written: all that count as right."""
    if isinstance(row, Question):
        return row.answers or (asking.no_answer,)
    assert isinstance(row, TextPair)
    return row.targets


def prompt_text(asking: Asking, fields: Mapping[str, str]) -> str:
    """The instruction with a row in it. Braces in the row stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), asking.instruction)


def prompt_ids(
    asking: Asking, tokenizer: Tokenizer, shape: ModelConfig, fields: Mapping[str, str]
) -> list[int]:
    """What the model reads: in training, in scoring and in use."""
    text, special = _prompt(asking, tokenizer, shape, fields)
    return tokenizer.encode(text, special=special)


def _prompt(
    asking: Asking, tokenizer: Tokenizer, shape: ModelConfig, fields: Mapping[str, str]
) -> tuple[str, bool]:
    """Its text, and whether special tokens are recognised in it, as in any rendered conversation."""
    text = prompt_text(asking, fields)
    if shape.shape == "encoder_decoder":
        return text, False
    if tokenizer.chat_template:
        return tokenizer.render_chat([{"role": "user", "content": text}]), True
    return text + asking.separator, False


def answer_ids(
    asking: Asking,
    tokenizer: Tokenizer,
    shape: ModelConfig,
    fields: Mapping[str, str],
    answer: str,
    prompt: Sequence[int],
) -> list[int]:
    """What the model is to write behind `prompt`, the id that ends it included.

    The ids of prompt and answer encoded as one text, where they begin with those of the prompt. A tokenizer
    may join what stands on both sides of the seam; then the answer is encoded by itself, because in use the
    prompt is all that there is.

    Raises:
        DataError: a chat template that does not build a conversation turn by turn.
        ModelError: the tokenizer has no token that ends a text.
    """
    ends = tokenizer.ids.stop
    if not ends:
        raise ModelError("This tokenizer has no token that ends a text, so that no model can learn to stop.")
    if shape.shape == "encoder_decoder":
        ids = tokenizer.encode(answer, special=False)
        return ids if ids and ids[-1] in ends else [*ids, ends[0]]
    opening, special = _prompt(asking, tokenizer, shape, fields)
    if special:
        talk = [
            {"role": "user", "content": prompt_text(asking, fields)},
            {"role": "assistant", "content": answer},
        ]
        whole = tokenizer.render_chat(talk, add_generation_prompt=False).rstrip("\n")
        if not whole.startswith(opening):
            raise DataError(
                "The chat template does not build a conversation turn by turn, so the reply cannot be told apart."
            )
        answer = whole[len(opening) :]
    ids = tokenizer.encode(opening + answer, special=special)
    if ids[: len(prompt)] == list(prompt):
        ids = ids[len(prompt) :]
    else:
        ids = tokenizer.encode_plain([answer], special=special)[0]
    eos = tokenizer.ids.eos if tokenizer.ids.eos in ends else ends[0]
    assert eos is not None
    return ids if ids and ids[-1] in ends else [*ids, eos]


def shortened_prompt(
    asking: Asking, tokenizer: Tokenizer, shape: ModelConfig, fields: Mapping[str, str], room: int
) -> list[int] | None:
    """The prompt with the end of its source (or context) cut off, so that it has at most `room` tokens.

    None where even without it there are more.
    """
    ids = prompt_ids(asking, tokenizer, shape, fields)
    if len(ids) <= room:
        return ids
    name = next(iter(fields))
    text = fields[name]
    ends = [end for begin, end in tokenizer.encode_with_offsets(text)[1] if end > begin]
    kept = len(ends)
    while len(ids) > room and kept:
        kept = max(kept - (len(ids) - room), 0)
        cut = {**fields, name: text[: ends[kept - 1]].rstrip() if kept else ""}
        ids = prompt_ids(asking, tokenizer, shape, cut)
    return ids if len(ids) <= room else None


@dataclass
class Fitting:
    """Rows as ids, by the user's choice for those that are too long.

    Attributes:
        prompts, answers: of each row that is kept; of the answers all, as ids.
        cut, dropped: how many rows.
    """

    prompts: list[list[int]] = field(default_factory=list)
    answers: list[list[list[int]]] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0


def fit_rows(
    rows: Iterable[Row], asking: Asking, tokenizer: Tokenizer, shape: ModelConfig, length: int, too_long: str
) -> Fitting:
    """Rows as ids of at most `length` tokens: of a decoder prompt and answer together, else each.

    Raises:
        DataError: an empty source or answer; or rows that are too long, where that is an error, or where
            cutting the source is not enough. Lists the first of them.
    """
    fitted = Fitting()
    long: list[str] = []
    count = 0
    for row in rows:
        fields, answers = fields_of(row), answers_of(row, asking)
        empty = [name for name, text in (*fields.items(), ("answer", "".join(answers))) if not text.strip()]
        if empty or not all(answer.strip() for answer in answers):
            raise DataError(
                f"{row.origin}: the {(empty or ['answer'])[0]} is empty.", "Remove the row, or mend it."
            )
        ids = prompt_ids(asking, tokenizer, shape, fields)
        written = [answer_ids(asking, tokenizer, shape, fields, answer, ids) for answer in answers]
        longest = max(map(len, written))
        # the last token of a decoder's row is only predicted
        room = length if shape.shape == "encoder_decoder" else length + 1 - longest
        if len(ids) > room or longest > length:
            if too_long == "drop":
                fitted.dropped += 1
                continue
            shorter = None
            if too_long == "cut" and longest <= length:
                shorter = shortened_prompt(asking, tokenizer, shape, fields, room)
            if shorter is None:
                count += 1
                if count <= _NAMED:
                    long.append(f"{row.origin} ({len(ids):,} + {longest:,} tokens)")
                continue
            ids = shorter
            fitted.cut += 1
        fitted.prompts.append(ids)
        fitted.answers.append(written)
    if count:
        raise _too_long(count, long, length, too_long, shape)
    return fitted


def _too_long(count: int, named: list[str], length: int, too_long: str, shape: ModelConfig) -> DataError:
    more = f" and {count - len(named):,} more" if count > len(named) else ""
    unlimited = shape.positions == "relative"
    room = "" if unlimited else f", up to the model's context of {shape.context:,}"
    cut = 'too_long = "cut" (shortens the source), ' if too_long == "error" else ""
    return DataError(
        f"{count:,} rows have more than {length:,} tokens"
        f"{' in what is to be written' if too_long == 'cut' else ''}: {', '.join(named)}{more}.",
        f'Set {cut}too_long = "drop" (leaves them out), or a larger row_length{room}.',
    )


def writing_lesson(
    config: FinetuneConfig, model: ModelDirectory, data: TaskData, kind: type[RowKind]
) -> Lesson:
    """Each epoch all rows; of several answers to a row another one each epoch; plain text if asked for.

    Raises:
        DataError: no rows, or some that do not fit.
        ModelError: a model that does not write.
    """
    asking = asking_of(config, model.config, kind)
    of_model = model.tokenizer, model.config
    length = config.length(model.config)
    two = model.config.shape == "encoder_decoder"
    if two and config.text_share:
        raise ConfigError(
            "'text_share' mixes in text to go on with, which an encoder–decoder does not do.",
            "Leave it out, or fine-tune a decoder.",
        )
    learned = fit_rows(data.rows(TRAIN, kind), asking, *of_model, length, config.too_long)
    if not learned.prompts:
        raise DataError(
            "There are no rows to learn from.",
            "All were left out: they are too long." if learned.dropped else "Is the file the right one?",
        )
    held_out = _first(data.rows(VALIDATION, kind), config.validation_rows)
    measured = fit_rows(held_out, asking, *of_model, length, config.too_long)
    replay = Replay(data.texts(TRAIN), model.tokenizer, length) if config.text_share else None
    start = model.config.decoder_start

    def examples(epoch: int) -> list[Example]:
        made = made_examples(learned, epoch, start if two else None)
        if replay is None:
            return made
        tokens = sum(len(example.tokens) for example in made)
        random = np.random.default_rng([config.seed, epoch, 2])
        return made + replay.draw(round(tokens * config.text_share / (1 - config.text_share)), random)

    both = [learned, measured]
    told = [f"{sum(getattr(part, name) for part in both):,} {name}" for name in ("cut", "dropped")]
    told = [text for text in told if not text.startswith("0 ")]
    return Lesson(
        partial(sequence_loss if two else causal_loss, smoothing=config.label_smoothing),
        examples,
        made_examples(measured, 0, start if two else None),
        length,
        model.tokenizer.ids.pad if model.tokenizer.ids.pad is not None else 0,
        f"{len(learned.prompts):,} rows" + (f"; too long: {', '.join(told)}" if told else ""),
        decoder_length=decoder_length(both, length) if two else 0,
        facts={
            "rows": len(learned.prompts),
            "asked": asdict(asking),
            "too_long": {"cut": learned.cut, "dropped": learned.dropped},
        },
    )


def _first(rows: Iterable[Row], count: int) -> list[Row]:
    return [row for row, _ in zip(rows, range(count))]


def made_examples(fitted: Fitting, epoch: int, start: int | None) -> list[Example]:
    """One example a row, with the answer whose turn it is.

    Args:
        start: the id that an encoder–decoder's decoder begins with.
    """
    made = []
    for prompt, answers in zip(fitted.prompts, fitted.answers):
        answer = answers[epoch % len(answers)]
        if start is not None:
            targets = np.array(answer, np.int64)
            before = np.array([start, *answer[:-1]], np.int64)
            made.append(Example(np.array(prompt, np.int64), targets, decoder_tokens=before))
        else:
            ids = np.array([*prompt, *answer], np.int64)
            made.append(next_token_example(ids, np.arange(len(ids)) >= len(prompt)))
    return made


def decoder_length(parts: Sequence[Fitting], length: int) -> int:
    """Tokens that a row of an encoder–decoder writes: in the proportion of the data, so that both sides fill."""
    longest = max((len(ids) for part in parts for answers in part.answers for ids in answers), default=1)
    read = sum(len(ids) for ids in parts[0].prompts)
    written = sum(len(answers[0]) for answers in parts[0].answers)
    wanted = max(longest, round(1.05 * length * written / max(read, 1)))
    return -(-wanted // 8) * 8
