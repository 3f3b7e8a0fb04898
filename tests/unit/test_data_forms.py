"""Every form of labelled rows is recognised and read, and every row that cannot be used is named with its cure."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexmill.config import from_mapping
from lexmill.data.forms import FORMS, RowFile, group_id, read_rows
from lexmill.data.labelled import (
    Columns,
    Conversation,
    LabelledText,
    Match,
    Preference,
    Question,
    RowSettings,
    TextPair,
)
from lexmill.errors import ConfigError, DataError
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.rows import TaskData

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
ASKED = [USER, REPLY]
CONTEXT = "Anne lives in Bath. Bath is old."


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def one(folder: Path, row: object, kind=None, **how):
    path = write(folder, row)
    (found,) = read_rows(path, RowSettings(**how), kind)
    assert found.origin.startswith(f"{path}, row 1")
    return found


def error_of(folder: Path, *rows: object, kind=None, name: str = "rows.jsonl", **how) -> str:
    path = write(folder, *rows, name=name)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, RowSettings(**how), kind))
    return str(caught.value).replace(f"{folder}/", "")


CONVERSATIONS = [
    ("messages", {"messages": ASKED}, ASKED),
    (
        "messages",
        {
            "messages": [{"role": "developer", "content": "Be kind."}, USER, {**REPLY, "weight": 1}],
            "tools": [],
        },
        [{"role": "system", "content": "Be kind."}, USER, REPLY],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                REPLY,
            ]
        },
        ASKED,
    ),
    (
        "messages",
        {"messages": [USER, REPLY, {"role": "tool", "content": "4", "tool_call_id": "x"}, REPLY]},
        [USER, REPLY, {"role": "tool", "content": "4"}, REPLY],
    ),
    (
        "messages",
        {"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]},
        [USER, {**REPLY, "weight": "0"}, USER, REPLY],
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, ASKED),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["Hi", "Hello."]]},
        [
            {"role": "system", "content": "S"},
            *ASKED,
            {"role": "user", "content": "Add\n\n1 2"},
            {"role": "assistant", "content": "3"},
        ],
    ),
    (
        "alpaca",  # Dolly's names
        {"instruction": "Add", "context": "1 2", "response": "3", "category": "x"},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
            "system": "S",
        },
        [{"role": "system", "content": "S"}, *ASKED],
    ),
    ("prompt-completion", {"prompt": "Hi", "completion": "Hello."}, ASKED),
    ("prompt-completion", {"question": "Hi", "answer": "Hello."}, ASKED),
    (
        "prompt-completion",
        {"prompt": [*ASKED, USER], "completion": [REPLY]},
        [USER, {**REPLY, "weight": "0"}, USER, REPLY],
    ),
]


@pytest.mark.parametrize(("form", "row", "messages"), CONVERSATIONS)
def test_forms_of_talk(tmp_path: Path, form: str, row: dict, messages: list) -> None:
    found = one(tmp_path, row, Conversation)
    assert list(found.messages) == messages
    assert RowFile(tmp_path / "rows.jsonl").recognise().name == form


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}, ([USER], "Hello.", "What?")),
        (
            {
                "prompt": [*ASKED, USER],
                "chosen": [REPLY],
                "rejected": [{"role": "assistant", "content": "What?"}],
            },
            ([*ASKED, USER], "Hello.", "What?"),
        ),
        (
            {"chosen": ASKED, "rejected": [USER, {"role": "assistant", "content": "What?"}]},
            ([USER], "Hello.", "What?"),
        ),
        (  # UltraFeedback: the prompt, and whole conversations that say it again
            {
                "prompt": "Hi",
                "chosen": ASKED,
                "rejected": [USER, {"role": "assistant", "content": "What?"}],
                "messages": ASKED,
            },
            ([USER], "Hello.", "What?"),
        ),
        (  # HH-RLHF
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Hi\n\nAssistant: Hello.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Hi\n\nAssistant: What?",
            },
            ([*ASKED, USER], "Hello.", "What?"),
        ),
    ],
)
def test_preferences(tmp_path: Path, row: dict, expected: tuple) -> None:
    found = one(tmp_path, row, Preference)
    assert (list(found.messages), found.chosen, found.rejected) == expected
    talk = one(tmp_path, {key: value for key, value in row.items() if key != "messages"}, Conversation)
    assert talk.messages[-1] == REPLY
    assert all(
        message.get("weight") == "0" for message in talk.messages[:-1] if message["role"] == "assistant"
    )


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ({"text": ["Bath", "in Bath"], "answer_start": [14, 11]}, (14, 11)),
        ([{"text": "Bath", "answer_start": 20}], (20,)),
        ({"text": [], "answer_start": []}, ()),
        ([], ()),
    ],
)
def test_flat_questions(tmp_path: Path, answers: object, starts: tuple) -> None:
    found = one(tmp_path, {"id": 7, "question": "Where?", "context": CONTEXT, "answers": answers})
    assert isinstance(found, Question)
    assert (found.starts, found.id) == (starts, "7")
    assert all(
        CONTEXT.startswith(text, start) for text, start in zip(found.answers, found.starts, strict=True)
    )


def squad(*questions: dict) -> str:
    return json.dumps(
        {
            "version": "2",
            "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}],
        }
    )


def test_squad_files(tmp_path: Path) -> None:
    path = tmp_path / "squad.json.xz"
    answered = {
        "id": "a",
        "question": "Where?",
        "answers": [{"text": "Bath", "answer_start": 14}],
        "is_impossible": False,
    }
    plausible = [{"text": "Bath", "answer_start": 14}]
    unanswered = {
        "id": "b",
        "question": "Why?",
        "answers": [],
        "plausible_answers": plausible,
        "is_impossible": True,
    }
    path.write_bytes(lzma.compress(squad(answered, unanswered).encode()))
    file = RowFile(path, kind=Question)
    first, second = file.rows()
    assert (first.answers, first.starts, second.answers) == (("Bath",), (14,), ())
    assert first.origin == f"{path}, row 1 (question a)"
    assert file.dropped['column "plausible_answers"'] == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"source": "a", "target": "b"}, ("a", ("b",))),
        ({"source": "a", "targets": ["b", "c"]}, ("a", ("b", "c"))),
        ({"document": "a", "summary": "b", "id": 1}, ("a", ("b",))),
        ({"article": "a", "highlights": "b"}, ("a", ("b",))),
        ({"translation": {"en": "a", "de": "b"}}, ("a", ("b",))),
        ({"prompt": "a", "completion": "b"}, ("a", ("b",))),
    ],
)
def test_pairs(tmp_path: Path, row: dict, expected: tuple) -> None:
    found = one(tmp_path, row, TextPair)
    assert (found.source, found.targets) == expected


def test_translations_keep_the_order_of_the_first_row_or_the_one_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, {"translation": {"en": "a", "de": "b"}}, {"translation": {"de": "d", "en": "c"}})
    assert [row.source for row in read_rows(path)] == ["a", "c"]
    said = RowSettings(columns=Columns(source="de", target="en"))
    assert [row.source for row in read_rows(path, said)] == ["b", "d"]


def test_two_text_files(tmp_path: Path) -> None:
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"eins\nzwei\n"))
    path = tmp_path / "train.{de,en}.gz"
    assert [(row.source, row.targets) for row in read_rows(path)] == [("eins", ("one",)), ("zwei", ("two",))]
    assert len(list(TaskData(path=path, fraction=0.0).rows("train", TextPair))) == 2
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"eins\n"))
    with pytest.raises(DataError, match=r"train.de.gz: it ends after line 1, but .*train.en.gz goes on"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "label": 3}, ("a", None, "3")),
        ({"text": "a", "label": "good"}, ("a", None, "good")),
        ({"text": "a", "label": False}, ("a", None, "false")),
        ({"premise": "a", "hypothesis": "b", "label": 0}, ("a", "b", "0")),
        ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 5}, ("a", "b", "1")),
    ],
)
def test_labels(tmp_path: Path, row: dict, expected: tuple) -> None:
    found = one(tmp_path, row, LabelledText)
    assert (found.text, found.second, found.label) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "a", "positive": "b"}, ("a", "b", ())),
        ({"anchor": "a", "positive": "b", "negative": "c"}, ("a", "b", ("c",))),
        ({"query": "a", "pos": ["b"], "neg": ["c", "d"]}, ("a", "b", ("c", "d"))),
    ],
)
def test_matches(tmp_path: Path, row: dict, expected: tuple) -> None:
    found = one(tmp_path, row, Match)
    assert (found.query, found.positive, found.negatives) == expected


def table(rows: list[dict], delimiter: str) -> str:
    """Rows as CSV, with JSON in cells that are no strings."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        cells = {key: one if isinstance(one, str) else json.dumps(one) for key, one in row.items()}
        writer.writerow(cells)
    return out.getvalue()


EXAMPLES = [
    {"messages": ASKED},
    {"instruction": "a", "input": "[1]", "output": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Bath"], "answer_start": [14]}},
    {"source": "a", "target": "[b]"},
    {"text": 'a "b"\nc', "label": "x"},
    {"query": "a", "positive": "b", "negatives": ["c", "d"]},
]


@pytest.mark.parametrize("row", EXAMPLES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, row: dict) -> None:
    rows = [row, row]
    jsonl = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "a.csv").write_text(table(rows, ","))
    (tmp_path / "a.tsv").write_text(table(rows, "\t"))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = {}
    for path in sorted(tmp_path.iterdir()):
        found[path.name] = [{**vars(one), "origin": ""} for one in read_rows(path)]
    assert len(found) == 7
    assert all(one == found["a.jsonl"] for one in found.values()), found


def message(role: str, content: object = "x", **more: object) -> dict:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [
        ([{"a": 1, "b": 2}], None, 'rows.jsonl, row 1: its form is not known; its columns are "a", "b". Forms are messages'),
        (
            [{"messages": ASKED}, {"instruction": "a", "output": "b"}],
            None,
            "rows.jsonl, row 2: mixed forms: this row looks like 'alpaca', the first ones like 'messages'.",
        ),
        ([{"text": "a", "label": 1}, {"text": "b"}], None, 'row 2: field "label" is missing. Each row of the form \'text-label\' has "text", "label".'),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], None, 'row 2: field "label" is empty or null.'),
        ([{"text": "a", "label": 1.5}], None, 'field "label" is the number 1.5.'),
        ([{"text": ["a"], "label": 1}], None, 'field "text" is a list, not a string.'),
        ([{"text": " ", "label": 1}], None, 'field "text" is empty.'),
        ([{"source": "a", "target": " "}], None, 'field "target" is empty.'),
        ([{"source": "a", "targets": []}], None, 'field "targets" is empty.'),
        ([{"source": "a", "targets": ["b", ""]}], None, 'field "targets" has an entry, number 2, that is empty.'),
        ([{"instruction": "a", "output": ""}], None, 'field "output" is empty.'),
        ([{"instruction": "a", "response": "  "}], None, 'field "response" is empty.'),
        ([{"instruction": "a", "output": "b", "history": [["a"]]}], None, 'field "history" has an entry, number 1, that is no pair'),
        ([{"messages": [REPLY, USER]}], None, "message 1: roles out of order, a message of the role 'assistant' at the beginning."),
        ([{"messages": [USER, USER, REPLY]}], None, "message 2: roles out of order, a message of the role 'user' behind one of the role 'user'."),
        ([{"messages": [USER, message("system"), REPLY]}], None, "message 2: roles out of order, a message of the role 'system'"),
        ([{"messages": [USER, message("tool"), REPLY]}], None, "message 2: roles out of order, a message of the role 'tool'"),
        ([{"messages": [USER, message("assistant", " ")]}], None, "message 2: the assistant's reply is empty."),
        ([{"messages": [USER]}], None, "row 1: there is no reply of the assistant to learn from."),
        ([{"messages": [USER, {**REPLY, "weight": 0}]}], None, "there is no reply of the assistant to learn from."),
        ([{"messages": [USER, {**REPLY, "weight": 0.5}]}], None, "message 2: its weight is 0.5."),
        ([{"messages": [USER, message("assistant", None, tool_calls=[{"id": 1}])]}], None, "message 2: it calls a tool and says nothing"),
        ([{"messages": [message("user", [{"type": "image_url"}]), REPLY]}], None, 'message 1: it holds a part of the type "image_url"'),
        ([{"messages": [message(["user"]), REPLY]}], None, "message 1: its role ['user'] is unknown."),
        ([{"text": "a \ud800", "label": "b"}], None, "row 1: it holds half a surrogate pair"),
        ([{"messages": [message("usr"), REPLY]}], None, "message 1: its role 'usr' is unknown. Did you mean 'user'?"),
        ([{"conversations": "x"}], None, 'field "conversations" is a string, not a list.'),
        ([{"conversations": [{"from": "alien", "value": "x"}]}], None, "\"conversations\", message 1: its role 'alien' is unknown."),
        ([{"conversations": [{"from": "gpt", "value": "x"}]}], None, "message 1: roles out of order"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], None, "the chosen and the rejected reply are the same."),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], None, 'field "chosen" is empty.'),
        ([{"chosen": "b", "rejected": "c"}], None, 'field "chosen" is a text without a "prompt" beside it'),
        ([{"chosen": ASKED, "rejected": [message("user", "other"), REPLY]}], None, "differ before their last message."),
        ([{"chosen": [USER], "rejected": ASKED}], None, "differ before their last message."),
        ([{"prompt": "a", "chosen": [USER], "rejected": [REPLY]}], None, 'field "chosen" does not end with a message of the assistant.'),
        ([{"query": "a", "pos": ["b", "c"]}], None, 'field "pos" holds 2 texts.'),
        ([{"query": "a", "positive": "b", "negative": "b"}], None, 'field "negative" holds the positive itself.'),
        ([{"question": "q", "context": CONTEXT, "answers": "Bath"}], None, 'field "answers" is a string.'),
        ([{"question": "q", "context": CONTEXT, "answers": [{"text": "Bath"}]}], None, "holds an answer without a text or a start"),
        ([{"question": "q", "context": CONTEXT, "answers": {"text": ["Bath"], "answer_start": []}}], None, "has 1 texts, but 0 starts"),
        ([{"question": "q", "context": CONTEXT, "answers": [], "is_impossible": False}], None, 'is empty, and "is_impossible" is false'),
        (
            [{"question": "q", "context": CONTEXT, "answers": [{"text": "Bath", "answer_start": 13}]}],
            None,
            'the answer "Bath" does not stand at character 13 of its context; it begins at 14, 20.',
        ),
        ([{"question": "q", "context": CONTEXT, "answers": [{"text": "Paris", "answer_start": -1}]}], None, "character -1 of its context; it is not in it."),
        ([{"messages": ASKED}], LabelledText, "rows of the form 'messages' are conversations, but the task needs texts with a label. Forms for it: 'text-label'."),
        ([{"text": "a", "label": "b"}], Conversation, "but the task needs conversations. Forms for it: 'messages', 'chosen-rejected', 'sharegpt', 'alpaca', 'prompt-completion'."),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, rows: list, kind: type | None, expected: str) -> None:
    assert expected in error_of(tmp_path, *rows, kind=kind)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": 1}', "no list of rows"),
        ('"x"', "a.json: it is a string and no list of rows"),
        ('[{"text": "a", "label": 1}, 5]', "a.json, row 2: it is a number, not an object."),
        ('{"text": "a"}\n{"text": "b"}', "a.json, line 2: broken JSON at column 1: Extra data."),
        ("[" * 100_000, "cannot be read"),
        ('{"data": [{"paragraphs": 1}]}', 'a.json, article 1: it has no list "paragraphs".'),
        ('{"data": [{"paragraphs": [{}]}]}', 'a.json, article 1, paragraph 1: it has no list "qas".'),
        (
            '{"data": [{"paragraphs": [{"qas": [1]}]}]}',
            "a.json, row 1: the question is a number, not an object.",
        ),
        ("[]", "a.json: this file holds no rows."),
    ],
)
def test_bad_json_files_are_named(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "a.json"))
    assert expected in str(caught.value)


def test_reading_goes_on_behind_bad_rows_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": \n{"text": "a", "label": 1}\n{"text": "", "label": 1}\n5\n{"text": "b", "label": 2}\n'
    )
    bad: list[DataError] = []
    assert [row.text for row in RowFile(path).rows(bad.append)] == ["a", "b"]
    assert [str(error).split(": ")[0].removeprefix(f"{path}, ") for error in bad] == [
        "line 1",
        "row 3",
        "row 4",
    ]
    skipping = RowFile(path, RowSettings(bad_rows="skip"))
    assert len(list(skipping.rows())) == 2
    assert skipping.dropped["rows that cannot be used"] == 3
    with pytest.raises(DataError, match=r'"lexmill data check .*rows.jsonl" lists all such rows'):
        list(read_rows(path))


def test_wrong_starts_are_mended_where_asked(tmp_path: Path) -> None:
    answers = [{"text": "Bath", "answer_start": 21}, {"text": "Paris", "answer_start": 3}]
    found = one(tmp_path, {"question": "q", "context": CONTEXT, "answers": answers}, wrong_starts="mend")
    assert found.starts == (20, -1)


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("cat,label,review\nfruit,1,good\n")
    said = from_mapping(
        FinetuneConfig, {"steps": 1, "columns": {"text": "review", "label": "cat"}}, "finetune"
    )
    (row,) = read_rows(path, said)
    assert (row.text, row.label) == ("good", "fruit")
    with pytest.raises(DataError, match=r'line 2: there is no column "revew". Did you mean \'review\'\?'):
        list(read_rows(path, RowSettings(columns=Columns(text="revew"))))
    with pytest.raises(ConfigError, match=r"unknown key 'txt'\. Did you mean 'text'"):
        from_mapping(RowSettings, {"columns": {"txt": "review"}}, "finetune")
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'"):
        from_mapping(RowSettings, {"form": "alpacca"}, "finetune")


def test_a_stated_form_is_taken_at_its_word(tmp_path: Path) -> None:
    row = {"messages": ASKED, "text": "a", "label": "b"}
    assert isinstance(one(tmp_path, row), Conversation)
    assert isinstance(one(tmp_path, row, form="text-label"), LabelledText)
    assert isinstance(one(tmp_path, row, LabelledText), LabelledText)
    assert 'field "prompt" is missing' in error_of(tmp_path, row, form="prompt-completion")


def test_every_form_has_its_columns_and_its_name() -> None:
    from typing import get_args

    from lexmill.data.labelled import FormName

    assert {form.name for form in FORMS} == set(get_args(FormName))
    assert {name for form in FORMS for name in (*form.needed, *form.optional)} <= set(vars(Columns())) | {
        "is_impossible"
    }


def test_what_asks_the_same_is_not_parted(tmp_path: Path) -> None:
    def group(**row: object) -> str:
        return group_id(one(tmp_path, row))

    assert group(source="a", target="b") == group(source="a", target="c") != group(source="b", target="b")
    assert group(text="a", label=1) == group(text="a", label=2)
    assert group(prompt="a", chosen="b", rejected="c") == group(prompt="a", chosen="d", rejected="c")
    assert group(query="a", positive="b") == group(query="a", positive="c")
    assert group(text="Good, really!", label=1) == group(text="good  really", label=2)
    assert (
        group(messages=[*ASKED, USER, REPLY])
        == group(messages=ASKED)
        != group(messages=[{**USER, "content": "No"}, REPLY])
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "answer_start"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
COLUMNS = sorted({called for form in FORMS for name, others in {**form.needed, **form.optional}.items() for called in (name, *others)})  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=5), min_size=1, max_size=3))
def test_whatever_rows_hold_it_is_a_row_or_an_error_of_ours(tmp_path: Path, rows: list) -> None:
    path = write(tmp_path, *rows)
    bad: list[DataError] = []
    try:
        good = list(RowFile(path).rows(bad.append))
    except DataError:
        return
    assert len(good) + len(bad) == len(rows)
    for row in good:
        assert group_id(row)
