"""Recipes for tasks: rows are checked, a model is brought or made, and what comes out can do the task."""

import json

import pytest

import lexmill
from lexmill.errors import ConfigError, DataError, FileError
from lexmill.recipe import run as recipe_run
from lexmill.recipe.config import DEFAULT_STEPS, read_recipe
from lexmill.recipe.plan import make_plan

# one token each, so that a model of any seed soon learns what tells the labels apart
WORDS = {"red": "红", "green": "绿", "blue": "蓝"}


def labelled(path, count, start=0):
    rows = []
    for number in range(start, start + count):
        label = list(WORDS)[number % 3]
        word = WORDS[label]
        rows.append({"text": f"{word} looks like this number {number}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


CLASSIFY = """
name = "colours"
steps = ["rows", "tokenizer", "base", "finetune", "evaluate", "export", "report"]
[rows]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"
[tokenizer]
kind = "wordpiece"
vocab_size = 64
[base.model]
family = "bert"
width = 32
layers = 1
heads = 2
context = 64
[finetune]
task = "classify"
steps = 60
rows = 4
learning_rate = 0.01
matrix_learning_rate = 0.02
score_rows = 5
[evaluate]
[export]
types = []
[report]
"""


@pytest.fixture
def folder(tmp_path):
    labelled(tmp_path / "train.jsonl", 180)
    labelled(tmp_path / "validation.jsonl", 9, 1000)
    labelled(tmp_path / "test.jsonl", 18, 2000)
    (tmp_path / "colours.toml").write_text(CLASSIFY, "utf-8")
    return tmp_path


def test_a_classifier_from_rows_alone(folder):
    out = folder / "run"
    recipe_run.run(folder / "colours.toml", out)
    found = json.loads((out / "evaluate/scores.json").read_text("utf-8"))
    assert found["rows"] == 18 and found["task"]["after"]["accuracy"] > 0.9
    assert "before" not in found["task"]  # a model without a head cannot be scored
    checked = json.loads((out / "rows/rows.json").read_text("utf-8"))
    assert {split: checked[split]["rows"] for split in checked} == {"train": 180, "validation": 9, "test": 18}
    (said,) = lexmill.load(out).classify(["绿 looks like this number 7"])
    assert max(said, key=said.get) == "green"
    lineage = json.loads((out / "model/lexmill.json").read_text("utf-8"))
    assert lineage["scores"]["task"]["after"] == found["task"]["after"]
    assert not any(one.reason for one in recipe_run.run(folder / "colours.toml", out)), (
        "nothing is left to do"
    )
    labelled(folder / "test.jsonl", 21, 2000)
    again = {one.step for one in recipe_run.run(folder / "colours.toml", out) if one.reason}
    assert "rows" in again and "evaluate" in again


def test_without_test_rows_the_held_out_ones_are_scored(folder):
    overrides = ("rows.test=''", "rows.validation=''", "finetune.validation_fraction=0.2", "finetune.steps=2")
    recipe_run.run(folder / "colours.toml", folder / "run", overrides=overrides)
    found = json.loads((folder / "run/evaluate/scores.json").read_text("utf-8"))
    assert 10 < found["rows"] < 80


def test_bad_rows_are_named_before_anything_is_learned(folder):
    with open(folder / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "", "label": "red"}\n')
    with pytest.raises(DataError, match=r"1 rows cannot be used.*row 181"):
        recipe_run.run(folder / "colours.toml", folder / "run")
    assert not (folder / "run/tokenizer").exists()
    recipe_run.run(
        folder / "colours.toml", folder / "run", overrides=("finetune.bad_rows=skip", "finetune.steps=2")
    )


def test_a_base_is_opened_or_imported(folder, tmp_path):
    recipe_run.run(folder / "colours.toml", folder / "first", overrides=("finetune.steps=2",))
    text = CLASSIFY.replace('"tokenizer", ', "")
    begin, end = text.index("[base.model]"), text.index("[finetune]")
    again = tmp_path / "again.toml"
    again.write_text(text[:begin] + '[base]\npath = "first/base/model"\n' + text[end:], "utf-8")
    recipe_run.run(again, folder / "second", overrides=("finetune.steps=2",))
    weights = [folder / name / "finetune/model/model.safetensors" for name in ("first", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # what the engine keeps beside a model is neither a change of it nor an output
    (folder / "first/base/model/model.packed").write_bytes(b"made to start faster")
    plan = make_plan(read_recipe(again, ("finetune.steps=2",)), folder / "second")
    assert [one.step for one in plan if one.reason] == []


def test_what_a_recipe_lacks_is_said(folder):
    def read(**changes):
        text = CLASSIFY
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        path = folder / "other.toml"
        path.write_text(text, "utf-8")
        return read_recipe(path)

    with pytest.raises(ConfigError, match="needs the step 'pretrain' or 'base'"):
        read(base=('"base", ', ""))
    with pytest.raises(ConfigError, match="not from both"):
        read(both=('"base", ', '"base", "pretrain", '))
    with pytest.raises(ConfigError, match="either a 'path' or a shape"):
        read(path=("[base.model]", '[base]\npath = "x"\n[base.model]')).check()
    with pytest.raises(FileError, match="there is no such folder"):
        recipe_run.run(folder / "colours.toml", folder / "run", overrides=("rows.root=nowhere",))
    assert "rows" not in DEFAULT_STEPS and "base" not in DEFAULT_STEPS
