"""Tasks that write: rows as prompts and targets, what happens to long ones, and the same words in use."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.data.labelled import Question, TextPair
from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.evaluate.scores import ScoreConfig, Scoring
from lexmill.evaluate.task import find_scorer
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.stage import make_lesson
from lexmill.finetune.writing import (
    Asking,
    answer_ids,
    choose_asking,
    fields_of,
    fit_rows,
    prompt_ids,
    prompt_text,
    shortened_prompt,
)
from lexmill.inference.language_model import LanguageModel
from lexmill.model.build import build_model
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.load import load_model
from lexmill.pretrain.shape import ShapeConfig
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer
from lexmill.train.batches import pack
from lexmill.train.examples import IGNORED

FORMS = ("chat", "plain", "t5")


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    """A decoder with a chat template, one without, and an encoder–decoder."""
    made = {}
    for form in FORMS:
        kind = "unigram" if form == "t5" else "bpe"
        options = {"sentinels": 10} if form == "t5" else {}
        tokenizer = train_tokenizer([prose[:60_000]], TokenizerConfig(kind=kind, vocab_size=400, **options))
        if form == "plain":
            settings = {key: value for key, value in tokenizer.settings.items() if key != "chat_template"}
            tokenizer = Tokenizer(tokenizer.json, tokenizer.ids, "", settings=settings)
        family = "t5" if form == "t5" else "llama"
        shape = ShapeConfig(family=family, width=32, layers=1, heads=2, context=128).with_vocabulary(400)
        path = tmp_path_factory.mktemp("models") / form
        network = randomise(build_model(shape), deviation=0.2)
        made[form] = write_model_directory(path, shape, network.weights(), tokenizer)
    return made


def pair(source, *targets, row=1):
    return TextPair(origin=f"rows.jsonl, row {row}", source=source, targets=targets)


def question(text, context, *answers):
    starts = tuple(context.index(answer) for answer in answers)
    return Question(
        origin="rows.jsonl, row 1", question=text, context=context, answers=answers, starts=starts
    )


def write_pairs(path, rows):
    lines = [json.dumps({"source": source, "target": target}) for source, target in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


PAIRS = [(f"She was very glad to see {name} in the {place}.", f"Glad of {name}") for name in ("Anne", "him", "Mary", "her", "Lady Russell") for place in ("room", "morning", "garden", "evening")]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ["summarise", "translate", "qa"])
def test_training_asks_in_the_words_of_use(models, form, task):
    model = models[form]
    row = (
        question("Who was glad?", "Anne was glad.", "Anne")
        if task == "qa"
        else pair("Anne was glad.", "Glad")
    )
    asking = choose_asking(task, model.config, type(row))
    fitted = fit_rows([row], asking, model.tokenizer, model.config, 128, "error")
    used = LanguageModel(load_model(model), model.tokenizer, model.path)
    asked = []

    def write(model, prompts, options, done):
        asked.extend(prompts)
        return [fitted.answers[0][0][:-1]]  # what was to be learned, less the end

    scores = find_scorer(task)[1](used, Scoring([row], ScoreConfig(max_tokens=16), write=write))
    assert asked == fitted.prompts
    expected = row.answers[0] if task == "qa" else row.targets[0]
    assert scores.predictions == [expected] == [scores.examples[0]["given"]]
    best = {"summarise": "rougeL", "translate": "chrf", "qa": "exact"}[task]
    assert scores.metrics[best] == pytest.approx(1 if task == "summarise" else 100)


@pytest.mark.parametrize("form", FORMS)
def test_targets_are_the_answer_and_its_end(models, form, tmp_path):
    model = models[form]
    data = write_pairs(tmp_path / "rows.jsonl", PAIRS)
    config = FinetuneConfig(steps=1, task="summarise", validation_fraction=0.2)
    lesson = make_lesson(config, model, data)
    assert len(lesson.examples(0)) + len(lesson.validation) == len(PAIRS)
    for example in [*lesson.examples(0), *lesson.validation]:
        targets = [token for token in example.targets if token != IGNORED]
        assert targets[-1] in model.tokenizer.ids.stop
        said = model.tokenizer.decode(targets, skip_special=True)
        read = model.tokenizer.decode(example.tokens, skip_special=True)
        assert said.strip().startswith("Glad of") and "She was very glad" in read
        if form == "t5":
            assert example.decoder_tokens[0] == model.config.decoder_start
            assert list(example.decoder_tokens[1:]) == targets[:-1]
            assert "Glad of" not in read
    asked = lesson.facts["asked"]
    assert (asked["read"] == 128) == (form == "t5")
    again = choose_asking(
        "summarise", model.config, TextPair, lineage={"history": [{"task": "summarise", "asked": asked}]}
    )
    assert asdict(again) == asked


@pytest.mark.parametrize("form, task", [*((form, "summarise") for form in FORMS), ("chat", "chat")])
def test_label_smoothing_reaches_the_loss(models, form, task, tmp_path):
    data = write_pairs(tmp_path / "rows.jsonl", PAIRS)
    if task == "chat":
        talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day to you."}]
        data.write_text((json.dumps({"messages": talk}) + "\n") * 4, "utf-8")
    found = []
    for smoothing in (0.0, 0.1):
        config = FinetuneConfig(steps=1, task=task, validation_fraction=0.2, label_smoothing=smoothing)
        lesson = make_lesson(config, models[form], data)
        lengths = {"length": lesson.length, "decoder_length": lesson.decoder_length}
        batch = pack(lesson.examples(0), pad_id=0, **lengths)
        network = load_model(models[form])
        learning = float(lesson.loss(network, batch).sums["tokens"].detach())
        with torch.no_grad():
            found.append((learning, float(lesson.loss(network, batch).sums["tokens"])))
    (plain, measured), (smoothed, also_measured) = found
    assert measured == also_measured == pytest.approx(plain, rel=1e-4)
    assert abs(smoothed - plain) > 1e-3 * plain


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_label_smoothing_is_refused_where_nothing_is_written(task):
    with pytest.raises(ConfigError, match="label_smoothing"):
        FinetuneConfig(steps=1, task=task, label_smoothing=0.1)


def test_each_epoch_learns_another_of_several_answers(models, tmp_path):
    rows = [{"source": "She was glad.", "target": ["one", "two", "three"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    lesson = make_lesson(FinetuneConfig(steps=1, task="translate", validation_fraction=0), models["t5"], path)
    said = [
        models["t5"].tokenizer.decode(lesson.examples(epoch)[0].targets, skip_special=True)
        for epoch in range(4)
    ]
    assert said == ["one", "two", "three", "one"]


def test_a_question_without_an_answer_gets_the_stated_words(models):
    model = models["t5"]
    row = question("Who?", "Nobody was there.")
    asking = choose_asking("qa", model.config, Question, no_answer="not said")
    fitted = fit_rows([row], asking, model.tokenizer, model.config, 128, "error")
    assert model.tokenizer.decode(fitted.answers[0][0], skip_special=True) == "not said"
    used = LanguageModel(load_model(model), model.tokenizer, model.path)
    said = {"Not said.": 100, "Nobody": 0}
    for text, score in said.items():
        ids = model.tokenizer.encode_plain([text])
        scoring = Scoring([row], ScoreConfig(), write=lambda *_, ids=ids: ids, asking=asking)
        assert find_scorer("qa")[1](used, scoring).metrics["exact"] == score


# Rows that are too long


def test_long_rows_are_listed(models):
    rows = [pair("word " * (5 if row % 2 else 300), "target", row=row) for row in range(1, 20)]
    asking = choose_asking("summarise", models["chat"].config, TextPair)
    with pytest.raises(DataError, match=r"9 rows have more than 128 tokens: rows.jsonl, row 2 \(") as caught:
        fit_rows(rows, asking, models["chat"].tokenizer, models["chat"].config, 128, "error")
    assert "and 4 more" in caught.value.message and 'too_long = "cut"' in caught.value.hint
    assert (
        len(fit_rows(rows, asking, models["chat"].tokenizer, models["chat"].config, 128, "drop").prompts)
        == 10
    )
    with pytest.raises(DataError, match=r"what is to be written.*row 1 ") as caught:
        fit_rows(
            [pair("short", "word " * 300)],
            asking,
            models["chat"].tokenizer,
            models["chat"].config,
            128,
            "cut",
        )
    assert '"cut"' not in caught.value.hint


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    source=st.text(min_size=1, max_size=400).filter(str.strip),
    target=st.text(min_size=1, max_size=30).filter(str.strip),
)
def test_cutting_shortens_the_source_and_never_the_target(models, form, source, target):
    model = models[form]
    asking = choose_asking("summarise", model.config, TextPair)
    row = pair(source, target)
    fields = fields_of(row)
    prompt = prompt_ids(asking, model.tokenizer, model.config, fields)
    whole = answer_ids(asking, model.tokenizer, model.config, fields, target, prompt)
    length = max(len(whole) + 60, 90) if form != "t5" else max(len(whole), 30)
    fitted = fit_rows([row], asking, model.tokenizer, model.config, length, "cut")
    ids, (answer,) = fitted.prompts[0], fitted.answers[0]
    assert answer == whole and answer[-1] in model.tokenizer.ids.stop
    assert (len(ids) if form == "t5" else len(ids) + len(answer) - 1) <= length
    room = length if form == "t5" else length + 1 - len(answer)
    if len(prompt) <= room:
        assert ids == prompt and not fitted.cut
    else:
        assert fitted.cut == 1 and len(ids) > room - 12, "not much more is cut than must be"
        kept = model.tokenizer.decode(ids, skip_special=True)
        assert prompt_text(asking, {"source": ""}).strip().split("\n")[0].strip() in kept


def test_of_a_question_the_context_is_cut(models):
    row = question("Who was glad to see Captain Wentworth?", "Anne was glad. " * 60, "Anne")
    asking = choose_asking("qa", models["t5"].config, Question)
    ids = shortened_prompt(asking, models["t5"].tokenizer, models["t5"].config, fields_of(row), 60)
    said = models["t5"].tokenizer.decode(ids, skip_special=True)
    assert len(ids) <= 60 and said.startswith(
        "question: Who was glad to see Captain Wentworth? context: Anne was glad."
    )
    assert shortened_prompt(asking, models["t5"].tokenizer, models["t5"].config, fields_of(row), 5) is None


def test_scoring_has_the_same_choice(models):
    used = LanguageModel(load_model(models["chat"]), models["chat"].tokenizer)
    rows = [pair("word " * 300, "target"), pair("short", "target")]
    scorer = find_scorer("translate")[1]
    with pytest.raises(DataError, match=r"1 rows have more than the 112 tokens") as caught:
        scorer(used, Scoring(rows, ScoreConfig(max_tokens=16)))
    assert "too_long=cut" in caught.value.hint
    cut = scorer(used, Scoring(rows, ScoreConfig(max_tokens=16, too_long="cut")))
    assert cut.rows == 2 and cut.details["source_cut"] == 1
    dropped = scorer(used, Scoring(rows, ScoreConfig(max_tokens=16, too_long="drop")))
    assert dropped.rows == 1 and dropped.details["too_long_left_out"] == 1


# What cannot be


def test_instructions_have_a_place_for_each_field(models):
    with pytest.raises(ConfigError, match="no place for the source"):
        choose_asking("summarise", models["t5"].config, TextPair, instruction="Summarise!")
    with pytest.raises(ConfigError, match="no place for the context"):
        choose_asking("qa", models["t5"].config, Question, instruction="{question}")
    asking = Asking(instruction="{source} {x} {{source}}")
    assert (
        prompt_text(asking, {"source": "{source} {question}"})
        == "{source} {question} {x} {{source} {question}}"
    )


def test_what_does_not_write_is_refused(models, tmp_path):
    data = write_pairs(tmp_path / "rows.jsonl", PAIRS)
    shape = ShapeConfig(family="bert", width=32, layers=1, heads=2, context=64).with_vocabulary(400)
    with pytest.raises(ModelError, match="encoder, which writes no text"):
        choose_asking("summarise", shape, TextPair)
    config = FinetuneConfig(steps=1, task="summarise", text_share=0.2)
    with pytest.raises(ConfigError, match="text_share"):
        make_lesson(config, models["t5"], data)
    config = FinetuneConfig(steps=1, task="summarise", too_long="drop", row_length=8)
    with pytest.raises(DataError, match="no rows to learn from"):
        make_lesson(config, models["chat"], data)
    asking = choose_asking("summarise", models["t5"].config, TextPair)
    with pytest.raises(DataError, match="row 1: the answer is empty"):
        fit_rows(
            [pair("source", "fine", " ")], asking, models["t5"].tokenizer, models["t5"].config, 64, "drop"
        )
    with pytest.raises(DataError, match="row 1: the source is empty"):
        fit_rows([pair("\n", "fine")], asking, models["t5"].tokenizer, models["t5"].config, 64, "drop")


@pytest.mark.parametrize("lineage", [
    {"history": 3}, {"history": [3, {"task": "summarise"}]}, {"history": [{"task": "summarise", "asked": []}]},
    {"history": [{"task": "summarise", "asked": {"instruction": 5}}]},
    {"history": [{"task": "summarise", "asked": {"instruction": "{source}", "read": "long"}}]},
    {"history": [{"task": "qa", "asked": {"instruction": "{source} other"}}]},
])  # fmt: skip
def test_a_lineage_that_says_nothing_sensible_is_passed_over(models, lineage):
    asking = choose_asking("summarise", models["t5"].config, TextPair, lineage=lineage)
    assert asking.instruction == "summarize: {source}"


def test_plain_text_is_mixed_in_and_held_out(models, tmp_path, prose):
    from lexmill.finetune.rows import TaskData

    (tmp_path / "novel.txt").write_text(prose[:100_000], "utf-8")
    data = write_pairs(tmp_path / "rows.jsonl", PAIRS)
    parts = TaskData(path=data, text=tmp_path / "novel.txt", fraction=0.3)
    train, held = (list(parts.texts(split)) for split in ("train", "validation"))
    assert train and held and not set(train) & set(held)
    assert sum(map(len, train)) + sum(map(len, held)) > 99_000
    config = FinetuneConfig(steps=1, task="summarise", text_share=0.5, text=str(tmp_path / "novel.txt"))
    examples = make_lesson(config, models["plain"], data).examples(0)
    counts = [int(np.sum(example.targets != IGNORED)) for example in examples]
    sizes = [len(example.tokens) for example in examples]
    text = sum(size for size, count in zip(sizes, counts) if size == count)
    assert 0.4 < text / sum(sizes) < 0.6
    assert ModelDirectory.open(models["plain"].path).tokenizer.chat_template == ""
