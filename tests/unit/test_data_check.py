"""`lexmill data check`: everything that is wrong with a file at once, and rows exactly as the model will see them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import lexmill

from lexmill.data.check import check_rows, normalised
from lexmill.data.labelled import Conversation, LabelledText, Question, RowSettings
from lexmill.errors import ConfigError, ModelError
from lexmill.finetune.check import KINDS_OF_TASKS, Lengths, _histogram, sketcher
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.stage import TASKS, make_lesson
from lexmill.model.directory import ModelDirectory


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return path


def talk(asked: str, said: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def test_every_bad_row_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    bad = [{"messages": []}, '{"messages": ', {"text": "a", "label": "b"}, {"other": 1}]
    path = write(tmp_path / "rows.jsonl", talk("a", "b"), *bad * 5, talk("c", "d"))
    report = check_rows(path, shown=3)
    assert (report.rows, report.bad, len(report.errors)) == (2, 20, 3)
    assert report.forms == {"messages": 7, "text-label": 5, "": 5}
    assert [error.split(":")[0] for error in report.errors] == [f"{path}, {place}" for place in ("row 2", "line 3", "row 4")]  # fmt: skip


def test_repeated_rows_by_their_nearest_likeness(tmp_path: Path) -> None:
    rows = [talk("Who is he?", "A captain."), talk("Who is he?", "A captain."), talk("who is he", "A  captain!"), talk("Who is he??", "A cook."), talk("And she?", "A captain.")]  # fmt: skip
    found = check_rows(write(tmp_path / "a.jsonl", *rows)).duplicates
    assert (found.exact, found.near, found.prompt) == (1, 1, 1)
    assert [(one.split(", ")[-1], other.split(", ")[-1], how) for one, other, how in found.shown] == [
        ("row 2", "row 1", "exact"),
        ("row 3", "row 1", "near"),
        ("row 4", "row 1", "prompt"),
    ]


def test_leaks_against_another_file(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *[talk(f"question {n}", f"answer {n}") for n in range(20)])
    held = [talk("question 3", "answer 3"), talk("Question 4!", "answer 4"), talk("question 5", "other"), talk("new", "x")]  # fmt: skip
    report = check_rows(write(tmp_path / "test.jsonl", *held), against=train)
    assert (report.leakage.exact, report.leakage.near, report.leakage.prompt) == (1, 1, 1)
    assert str(train) in report.compared and report.duplicates.rows == 0


def test_leaks_between_the_splits_that_training_would_make(tmp_path: Path) -> None:
    rows = [talk(f"question {n % 50}{'!' * (n // 50)}", "the same") for n in range(200)]
    path = write(tmp_path / "a.jsonl", *rows)
    report = check_rows(path, fraction=0.2)
    assert report.duplicates.near == 150 and report.leakage.rows == 0, "spelled otherwise, and never parted"
    assert check_rows(path, fraction=0.0).compared == ""


def test_contexts_are_shared(tmp_path: Path) -> None:
    def asked(question: str) -> dict:
        return {
            "question": question,
            "context": "Bath is old.",
            "answers": {"text": ["Bath"], "answer_start": [0]},
        }

    train = write(tmp_path / "train.jsonl", asked("What?"))
    report = check_rows(write(tmp_path / "test.jsonl", asked("Which?")), kind=Question, against=train)
    assert (report.leakage.rows, report.leakage.context) == (0, 1)


def test_labels_and_contradictions(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "good" if n % 4 else "bad"} for n in range(12)]
    rows.append({"text": "Text 1!", "label": "bad"})
    report = check_rows(write(tmp_path / "a.jsonl", *rows), RowSettings(), LabelledText)
    assert report.labels == {"good": 9, "bad": 4}
    assert report.contradictions == 1


def test_normalised() -> None:
    assert normalised("Ｈello,  World!\n") == normalised("hello world") == "hello world"
    assert normalised("?!") == "?!" and normalised("你好。") == "你好"


@pytest.fixture(scope="module")
def model(model_path) -> ModelDirectory:
    return ModelDirectory.open(model_path)


def test_targets_are_marked_as_training_has_them(tmp_path: Path, model) -> None:
    config = FinetuneConfig(task="chat", steps=1, validation_fraction=0.0)
    path = write(tmp_path / "a.jsonl", talk("Who is he?", "A captain."))
    (example,) = make_lesson(config, model, path).examples(0)
    seen: list = []
    check_rows(path, see=seen.append)
    sketch = sketcher("chat", model, config)(seen[0])
    assert (sketch.examples[0].tokens == example.tokens).all()
    assert (sketch.examples[0].targets == example.targets).all()
    ((name, pieces),) = sketch.parts()
    assert name == "" and [text for text, target in pieces if target] == ["A captain.<|im_end|>"]
    assert "".join(text for text, _ in pieces) == model.tokenizer.render_chat(seen[0].messages, add_generation_prompt=False).rstrip("\n")  # fmt: skip


ROWS = {
    "chat": talk("a", "b"),
    "prefer": {"prompt": "Who?", "chosen": "He.", "rejected": "She."},
    "summarise": {"source": "A long text.", "target": "Short."},
    "translate": {"source": "A text.", "target": "Ein Text."},
    "qa": {
        "question": "What?",
        "context": "Bath is old.",
        "answers": {"text": ["Bath"], "answer_start": [0]},
    },
}


@pytest.mark.parametrize("task", ROWS)
def test_every_task_of_a_decoder_shows_its_targets(tmp_path: Path, model, task) -> None:
    seen: list = []
    path = write(tmp_path / "a.jsonl", ROWS[task])
    check_rows(path, kind=KINDS_OF_TASKS[task], see=seen.append)
    config = FinetuneConfig(task=task, steps=1, validation_fraction=0.0)
    sketch = sketcher(task, model, config)(seen[0])
    marked = [
        text.removesuffix("<|im_end|>") for _, pieces in sketch.parts() for text, target in pieces if target
    ]
    expected = {"chat": ["b"], "prefer": ["He.", "She."], "summarise": ["Short."], "translate": ["Ein Text."], "qa": ["Bath"]}  # fmt: skip
    assert [text.strip() for text in marked] == expected[task]
    learned = make_lesson(config, model, path).examples(0)
    assert [one.tokens.tolist() for one in learned] == [one.tokens.tolist() for one in sketch.examples]
    assert [one.targets.tolist() for one in learned] == [one.targets.tolist() for one in sketch.examples]


def test_all_tasks_can_be_checked() -> None:
    assert set(KINDS_OF_TASKS) == set(TASKS)


def test_lengths_and_what_would_not_fit(tmp_path: Path, model) -> None:
    chance = random.Random(1)
    rows = [talk("a " * chance.randrange(1, 20), "b") for _ in range(50)]
    rows += [talk("a " * 100, "b"), talk("a", "b " * 100)]
    lengths = Lengths("chat", model, FinetuneConfig(task="chat", steps=1, row_length=60), shown=5)
    check_rows(write(tmp_path / "a.jsonl", *rows), kind=Conversation, see=lengths.see)
    report = lengths.report()
    assert (report.rows, report.too_long, report.without_targets) == (52, 2, 1)
    assert [origin.split(", ")[-1] for origin, _ in report.shown] == ["row 51", "row 52"]
    assert all(size > 100 for _, size in report.shown) and report.tokens["longest"] == max(size for _, size in report.shown)  # fmt: skip
    assert sum(count for _, _, count in report.histogram) == 52
    assert 0 < report.targets < 0.5


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [1, 2], list(range(1, 400)), [3] * 99 + [10_000]])
def test_histograms_hold_every_row_once(sizes: list) -> None:
    bars = _histogram(sizes)
    assert sum(count for _, _, count in bars) == len(sizes)
    for low, high, count in bars:
        assert sum(low <= size <= high for size in sizes) == count
    assert len(bars) <= 14


def test_what_a_model_cannot_do_is_refused(model) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'prefer'"):
        sketcher("prefers", model, FinetuneConfig(steps=1))
    with pytest.raises(ModelError, match="needs an encoder"):
        sketcher("classify", model, FinetuneConfig(steps=1))


def test_the_command(tmp_path: Path, model_path) -> None:
    rows = [talk("Who is he?", "A captain."), talk("Who is he?", "A captain."), talk("Where?", "In Bath.")]
    path = write(tmp_path / "rows.jsonl", *rows)
    good = lexmill("data", "check", path, "--task", "chat", "--model", model_path, "--examples", "1")
    assert good.returncode == 0, good.stderr
    for part in ("form 'messages'", "3 rows that can be used, 0 bad", "1 the same", "row 2 = row 1", "⟦A captain.<|im_end|>⟧", "all fit"):  # fmt: skip
        assert part in good.stdout, good.stdout
    write(path, *rows, talk("a", ""))
    bad = lexmill("data", "check", path, "--task", "chat", "--json")
    report = json.loads(bad.stdout)
    assert bad.returncode == 1 and report["bad"] == 1
    assert "the assistant's reply is empty" in report["errors"][0]
    wrong = lexmill("data", "check", path, "--task", "classify")
    assert wrong.returncode == 2 and "the task needs texts with a label" in wrong.stderr
