"""Tasks of encoders: heads, examples, losses of packed rows, calibration, answers from windows, retrieval."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import model_maker

from lexmill.data.labelled import LabelledText, Match, Question
from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.evaluate.embed import retrieval_scores
from lexmill.finetune.calibration import calibration_error, fit_temperature, softmax
from lexmill.finetune.classify import label_examples, label_loss
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.embed import match_examples, match_loss
from lexmill.finetune.extractive import span_examples, span_loss
from lexmill.finetune.stage import finetune, make_lesson
from lexmill.inference.judging import AnswerSettings, find_answers
from lexmill.inference.language_model import load
from lexmill.model.build import build_loaded
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS
from lexmill.model.directory import ModelDirectory
from lexmill.model.heads import head_modules, with_labels, with_span, without_heads
from lexmill.tokenizer.pairs import SECOND, cut, encode_pairs, tokens_of, windows
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer
from lexmill.train.batches import pack
from lexmill.train.examples import IGNORED

SHAPE = dict(
    vocab_size=520, width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=48, context=128
)
BERT = {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}
MODERN = {**FAMILIES["modernbert"], **FAMILY_DEFAULTS["modernbert"]}
KINDS = {
    "bert": ("wordpiece", {**BERT, "mlm": True, "mlm_bias": True, "pooler": True, "nsp": True}),
    "bare bert": ("wordpiece", BERT),
    "modernbert": ("wordpiece", {**MODERN, "mlm": True, "layers": 3, "local_window": 8}),
    "decoder": ("bpe", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("encoders"), prose, SHAPE, KINDS)


@pytest.fixture(scope="module")
def chinese():
    text = "北京大学在北京。苹果很甜,水果很新鲜。Café résumé 2008年8月8日 naïve e\u0301tude"
    return train_tokenizer([text * 40], TokenizerConfig(kind="wordpiece", vocab_size=64, lowercase=True))


def network(directory):
    model = build_loaded(directory.config, directory.weights_on_demand())
    return model.eval()


# heads


@pytest.mark.parametrize("name", ["bert", "bare bert", "modernbert"])
def test_a_head_begins_on_the_same_body_and_others_go(models, name):
    base = models(name)
    for made in (with_labels(base, ["a", "b", "c"], 1), with_span(base, 1), without_heads(base)):
        config = made.config
        assert not config.mlm and not config.nsp
        weights, old = made.weights(), base.weights()
        shared = [own for own in weights if own in old]
        assert len(shared) > 10 and all(np.array_equal(weights[own], old[own]) for own in shared)
        network(made)
    assert with_labels(base, ["a", "b", "c"]).config.labels == ("a", "b", "c")
    kept = {"bert": "pooler.weight", "modernbert": "transform.dense.weight"}.get(name)
    assert kept is None or kept not in with_labels(base, ["a", "b"]).begun
    assert ("pooler.weight" in with_labels(base, ["a", "b"]).begun) == (name == "bare bert")


def test_a_head_is_drawn_by_its_seed_and_kept_where_it_fits(models, tmp_path):
    first, again, other = (with_labels(models("bert"), ["a", "b"], seed) for seed in (1, 1, 2))
    assert np.array_equal(first.weight("label.weight"), again.weight("label.weight"))
    assert not np.array_equal(first.weight("label.weight"), other.weight("label.weight"))
    assert with_labels(first, ["b"]) is first and with_labels(first, ["b", "x"]) is not first
    spanned = with_span(models("bert"))
    assert with_span(spanned) is spanned
    assert head_modules(first) == ("classifier",) and head_modules(spanned) == ("qa_outputs",)
    assert head_modules(with_labels(models("modernbert"), ["a", "b"])) == (
        "classifier",
        "head.dense",
        "head.norm",
    )
    with pytest.raises(ModelError, match="needs an encoder"):
        with_labels(models("decoder"), ["a", "b"])
    with pytest.raises(ConfigError, match="one task"):
        dataclasses.replace(first.config, mlm=True)
    with pytest.raises(ConfigError, match="twice"):
        dataclasses.replace(first.config, labels=("a", "a"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "a"}}, "twice"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "shape"),
    ],
)
def test_heads_that_are_used_otherwise_are_refused(models, tmp_path, change, said):
    made = train(with_labels(models("bert"), ["a", "b"]), tmp_path)
    values = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ModelError, match=said):
        ModelDirectory.open(made)


def train(directory, folder):
    from lexmill.model.directory import write_model_directory

    return write_model_directory(
        folder / "made", directory.config, directory.weights(), directory.tokenizer
    ).path


# pairs and windows


@pytest.mark.parametrize("name", ["bert", "modernbert", "decoder"])
def test_pairs_have_the_ids_of_encode_pair(models, name):
    tokenizer = models(name).tokenizer
    for first, second in (("She was glad.", "He was not!"), ("x", "  spaces  "), ("a b", "")):
        if name == "decoder":
            with pytest.raises(ModelError):
                encode_pairs(tokenizer, [(first, second)])
            continue
        pair = encode_pairs(tokenizer, [(first, second)])[0]
        assert (pair.ids.tolist(), pair.segments.tolist()) == tokenizer.encode_pair(first, second)
        alone = encode_pairs(tokenizer, [(first, None)])[0]
        assert alone.ids.tolist() == tokenizer.encode(first)


def test_cutting_takes_from_the_longer_text(models):
    tokenizer = models("bert").tokenizer
    pair = encode_pairs(tokenizer, [("she was " * 20, "he")])[0]
    short = cut(pair, 12)
    assert len(short) == 12 and (short.part == SECOND).sum() == (pair.part == SECOND).sum()
    both = cut(encode_pairs(tokenizer, [("she was " * 20, "he is " * 20)])[0], 23)
    assert len(both) == 23 and (both.part == 0).sum() == 10 and (both.part == SECOND).sum() == 10
    assert both.ids[-1] == tokenizer.ids.sep and both.ids[0] == tokenizer.ids.cls
    alone = cut(encode_pairs(tokenizer, [("she was " * 20, None)])[0], 7)
    assert len(alone) == 7 and alone.ids[-1] == tokenizer.ids.sep


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("北京大学在北京。", "北京大学"),
        ("他说2008年8月8日好", "8月8日"),
        ("a café. A re\u0301sume\u0301 here", "re\u0301sume\u0301"),
        ("a café. A re\u0301sume\u0301 here", "café"),
        ("e\u0301tude", "e\u0301tude"),
        ("甜,水果", "甜"),
        ("甜,水果", "水果"),
    ],
)
def test_answers_are_found_by_their_very_characters(chinese, context, answer):
    begin = context.index(answer)
    pair = encode_pairs(chinese, [("在", context)])[0]
    (window,) = windows(pair, context, 64, 8)
    first, last, exact = tokens_of(window, begin, begin + len(answer))
    assert exact and context[window.begins[first] : window.ends[last]] == answer


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_windows_hold_every_token_once_and_the_overlap_twice(chinese, data):
    context = data.draw(st.text("北京苹果 e\u0301éaA2008年。,", min_size=1, max_size=60))
    length, overlap = data.draw(st.integers(8, 30)), data.draw(st.integers(0, 12))
    pair = encode_pairs(chinese, [("在北", context)])[0]
    found = windows(pair, context, length, overlap)
    assert all(len(window) <= length for window in found)
    inside = pair.ids[pair.part == SECOND]
    room = length - (len(pair) - len(inside))
    pieces = [window.ids[window.part == SECOND] for window in found]
    step = max(room - overlap, 1)
    for number, piece in enumerate(pieces):
        assert np.array_equal(piece, inside[number * step : number * step + room])
    assert sum(len(piece) for piece in pieces) >= len(inside)
    # whatever tokens a span begins and ends with is found again, exactly, where a window holds both
    window = data.draw(st.sampled_from(found))
    places = np.flatnonzero((window.part == SECOND) & (window.ends > window.begins))
    if len(places):
        one = data.draw(st.integers(0, len(places) - 1))
        two = data.draw(st.integers(one, len(places) - 1))
        begin, end = int(window.begins[places[one]]), int(window.ends[places[two]])
        assert not context[begin].isspace() and not context[end - 1].isspace()
        assert tokens_of(window, begin, end) == (places[one], places[two], True)


def test_answers_inside_a_token_and_wrong_places_are_told(models):
    tokenizer = models("bert").tokenizer
    context = "Captain Wentworth smiled at her."
    rows = [
        Question(origin="1", question="Who?", context=context, answers=("Wentworth",), starts=(8,)),
        Question(origin="2", question="Who?", context=context, answers=("entwort",), starts=(9,)),
        Question(origin="3", question="Who?", context=context, answers=("Wentworth",), starts=(3,)),
        Question(origin="4", question="Who?", context=context, answers=("Wentworth",), starts=(-1,)),
        Question(origin="5", question="Who?", context=context, answers=(), starts=()),
    ]
    found = span_examples(rows, tokenizer, 64, 8)
    assert (found.inexact, found.lost, len(found.examples)) == (1, 2, 3)
    assert "1 answers begin or end inside a token" in found.told() and "2 questions" in found.told()
    first, _, none = found.examples
    begin, end = first.targets[:2]
    assert tokenizer.decode(first.tokens[begin : end + 1].tolist()).replace(" ", "") == "wentworth"
    assert none.targets[:2].tolist() == [0, 0] and (none.targets[2:] == IGNORED).all()


# losses of packed rows


def texts(count=9, seed=3):
    random = np.random.default_rng(seed)
    words = [
        "she",
        "was",
        "glad",
        "to",
        "see",
        "him",
        "and",
        "they",
        "walked",
        "the",
        "sea",
        "with",
        "captain",
    ]
    return [" ".join(random.choice(words, random.integers(2, 14))) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "pooling"), [("bert", "cls"), ("modernbert", "cls"), ("modernbert", "mean")]
)
def test_labels_of_packed_texts_are_those_of_each_alone(models, name, pooling):
    base = with_labels(models(name), ["a", "b", "c"], 4)
    if pooling == "mean":
        base = base.with_config(dataclasses.replace(base.config, label_pooling="mean"), base.begun)
    model = network(base)
    rows = [
        LabelledText(origin=str(index), text=text, second=second, label="abc"[index % 3])
        for index, (text, second) in enumerate(zip(texts(), [None, *texts(8, 5)]))
    ]
    examples = label_examples(rows, base.tokenizer, base.config.labels, 60)
    packed = pack(examples, 60, 0)
    assert len(packed.tokens) < len(rows)
    with torch.no_grad():
        together = label_loss(model, packed)
        expected = total = 0
        for example in examples:
            hidden = model.hidden(
                torch.tensor(example.tokens[None]), segments=torch.tensor(example.segments[None])
            )
            summary = hidden[:, 0] if pooling == "cls" else hidden.mean(1)
            logits = model.label_logits(summary)
            expected += F.cross_entropy(logits, torch.tensor(example.targets[:1]))
            total += int(logits.argmax() == example.targets[0])
    assert float(together.sums["tokens"]) == pytest.approx(float(expected), rel=1e-5)
    assert together.right["tokens"] == total
    assert packed.counts["tokens"] == len(rows)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_answers_of_packed_windows_are_those_of_each_alone(models, name):
    base = with_span(models(name), 4)
    model = network(base)
    rows = [
        Question(
            origin="",
            question="who was glad",
            context=text,
            answers=(text.split()[1],) if index % 3 else (),
            starts=(text.index(" ") + 1,) if index % 3 else (),
        )
        for index, text in enumerate(texts())
    ]
    examples = span_examples(rows, base.tokenizer, 30, 4).examples
    packed = pack(examples, 80, 0)
    assert packed.counts["tokens"] == 2 * len(examples)
    with torch.no_grad():
        together = span_loss(model, packed)
        expected = right = 0
        for example in examples:
            hidden = model.hidden(
                torch.tensor(example.tokens[None]), segments=torch.tensor(example.segments[None])
            )
            logits = model.span_logits(hidden)[0].T
            targets = torch.tensor(example.targets[:2])
            expected += F.cross_entropy(logits, targets, reduction="sum")
            right += int((logits.argmax(-1) == targets).sum())
    assert float(together.sums["tokens"]) == pytest.approx(float(expected), rel=1e-5)
    assert together.right["tokens"] == right


def matches():
    one, two, three, four, five = texts(5, 8)
    return [
        Match(origin="", query=one, positive=two),
        Match(origin="", query=three, positive=four, negatives=(five, two)),
        Match(origin="", query=five, positive=two),  # the same text belongs to two queries
        Match(origin="", query=three, positive=one),  # and two texts belong to one query
        Match(
            origin="", query=four, positive=three, negatives=(three,)
        ),  # a negative that is the text itself
    ]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_matches_are_told_from_all_texts_of_a_batch_but_from_those_that_belong(models, pooling):
    base = without_heads(models("bare bert"))
    model, rows = network(base), matches()
    examples = match_examples(rows, base.tokenizer, 60)
    packed = pack(examples, 100, 0)
    with torch.no_grad():
        found = match_loss(model, packed, pooling, 0.1)
        pools = {
            "mean": lambda x: x.mean(0),
            "cls": lambda x: x[0],
            "max": lambda x: x.amax(0),
            "last": lambda x: x[-1],
        }

        def vector(text):
            hidden = model.hidden(torch.tensor([base.tokenizer.encode(text)]))[0]
            return F.normalize(pools[pooling](hidden), dim=0)

        candidates = [(row, row.positive, True) for row in rows]
        candidates += [(row, negative, False) for row in rows for negative in row.negatives]
        expected = 0
        for row in rows:
            scores, right = [], None
            for owner, text, positive in candidates:
                own = owner is row and positive
                belongs = positive and owner.query == row.query
                if not own and (text == row.positive or belongs):
                    continue
                right = len(scores) if own else right
                scores.append(vector(row.query) @ vector(text) / 0.1)
            expected += F.cross_entropy(torch.stack(scores)[None], torch.tensor([right]), reduction="sum")
    assert float(found.sums["tokens"]) == pytest.approx(float(expected), rel=1e-4)
    assert packed.counts["tokens"] == len(rows) and 0 <= found.right["tokens"] <= len(rows)


def test_a_row_that_stands_in_teaches_nothing(models):
    base = models("bare bert")
    examples = match_examples(matches(), base.tokenizer, 60)
    packed = pack(examples, 100, 0)
    packed.targets[:] = IGNORED
    model = network(without_heads(base))
    losses = match_loss(model, packed, "mean", 0.1)
    losses.sums["tokens"].backward()
    assert float(losses.sums["tokens"].detach()) == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    spans = span_examples(
        [Question(origin="", question="who", context="she was", answers=(), starts=())], base.tokenizer, 20, 4
    ).examples
    packed = pack(spans, 40, 0)
    packed.targets[:] = IGNORED
    assert not span_loss(network(with_span(base)), packed).sums["tokens"].detach().any()


# calibration


def test_the_temperature_of_overconfident_logits_is_found():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 5)) * 2
    labels = np.array([random.choice(5, p=row) for row in softmax(logits)])
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(logits / 4, labels) == pytest.approx(0.25, rel=0.05)
    before = calibration_error(softmax(3 * logits), labels)
    assert before > 0.1 > 0.03 > calibration_error(softmax(3 * logits, 3.0), labels)
    # nothing but right answers: as sure as the bounds allow
    assert fit_temperature(logits, logits.argmax(-1)) == 0.05


def test_the_calibration_error_is_that_of_the_paper_by_hand():
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    # the bins of 0.9, 0.6 and 0.8: |0.9 - 0.5|, |0.6 - 1|, |0.8 - 1|
    expected = 0.5 * 0.4 + 0.25 * 0.4 + 0.25 * 0.2
    assert calibration_error(shares, np.array([0, 1, 0, 1])) == pytest.approx(expected)


# answers


def test_answers_are_the_best_spans_of_all_windows(models):
    tokenizer = models("bert").tokenizer
    context = " ".join(texts(6, 11)) + " Anne Elliot walked by the sea"
    wanted = context.index("Anne"), context.rindex(" walked")

    def compute(null):
        def head(pairs):
            rows = []
            for pair in pairs:
                logits = np.zeros((len(pair), 2))
                logits[0] = null / 2
                for place in np.flatnonzero(pair.part == SECOND):
                    if pair.begins[place] == wanted[0]:
                        logits[place, 0] = 5
                    if pair.ends[place] == wanted[1]:
                        logits[place, 1] = 4
                rows.append(logits)
            return rows

        return head

    question = [("who walked", context)]
    for window, overlap in ((24, 8), (40, 0), (128, 32)):
        told = AnswerSettings(window=window, overlap=overlap, null_threshold=0.0)
        found = find_answers(tokenizer, question, told, compute(null=2))[0]
        assert (found.text, found.start, found.end) == ("Anne Elliot", *wanted)
        assert found.null_score == -7
        silent = find_answers(tokenizer, question, told, compute(null=12))[0]
        assert (silent.text, silent.candidate, silent.null_score) == ("", "Anne Elliot", 3)
        told = dataclasses.replace(told, null_threshold=None)
        assert find_answers(tokenizer, question, told, compute(null=12))[0].text == "Anne Elliot"
    with pytest.raises(DataError, match="context of question 1 is empty"):
        find_answers(tokenizer, [("who", " ")], told, compute(0))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, AnswerSettings(window=128, overlap=64, null_threshold=0.0)),
        (
            {"window": 40, "overlap": 90, "null_threshold": None},
            AnswerSettings(window=40, overlap=20, null_threshold=None),
        ),
        (
            {"window": -3, "overlap": "x", "null_threshold": "y"},
            AnswerSettings(window=128, overlap=64, null_threshold=None),
        ),
        (
            {"window": 10**9, "null_threshold": 1.5},
            AnswerSettings(window=128, overlap=64, null_threshold=1.5),
        ),
    ],
)
def test_settings_from_files_are_kept_within_bounds(said, expected):
    assert AnswerSettings.of({"calibration": {"task": "qa", **said}}, 128) == expected


def test_answers_and_labels_do_not_depend_on_what_is_asked_beside_them(models, tmp_path):
    base = models("modernbert")
    asked = list(zip(texts(7, 1), texts(7, 2)))
    spanned = load(train(with_span(base, 3), tmp_path))
    together = spanned.answers(asked, rows=3)
    for question, answer in zip(asked, together):
        alone = spanned.answer(*question)
        assert (alone.text, alone.start) == (answer.text, answer.start)
        assert alone.probability == pytest.approx(answer.probability, rel=1e-4)
        assert question[1][alone.start : alone.end] == alone.text
    with pytest.raises(ModelError, match="no head that tells labels apart"):
        spanned.classify("x")
    labelled = load(train(with_labels(base, ["good", "bad"], 3), tmp_path / "two"))
    first = labelled.classify(*map(list, zip(*asked)), rows=3)
    for pair, labels in zip(asked, first):
        assert list(labels.values()) == sorted(labels.values(), reverse=True)
        assert sum(labels.values()) == pytest.approx(1)
        assert labelled.classify(*pair)[0] == pytest.approx(labels, rel=1e-4)
    for wrong, said in ((["a", " "], "Text 2 is empty"), (["a"] * 2, "second")):
        with pytest.raises(DataError, match=said):
            labelled.classify(wrong, ["b"] if said == "second" else None)
    with pytest.raises(ModelError, match="finds answers"):
        labelled.answer("q", "c")


# retrieval


def test_retrieval_scores_by_hand():
    nearest = np.array([[3, 1, 2], [0, 1, 2], [2, 0, 1]])
    found = retrieval_scores(nearest, [{1}, {0, 2}, {7}])
    assert found["recall_1"] == pytest.approx((0 + 0.5 + 0) / 3, abs=1e-5)
    assert found["recall_5"] == pytest.approx((1 + 1 + 0) / 3, abs=1e-5)
    assert found["mrr_10"] == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-5)
    ideal = 1 + 1 / np.log2(3)
    assert found["ndcg_10"] == pytest.approx((1 / np.log2(3) + (1 + 0.5) / ideal + 0) / 3, abs=1e-5)


# lessons


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_label_smoothing_is_refused_where_answers_are_found(models, tmp_path):
    rows = [
        {"id": "1", "question": "who", "context": "anne", "answers": {"text": ["anne"], "answer_start": [0]}}
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    settings = {"task": "qa", "steps": 1, "validation_fraction": 0.0}
    make_lesson(FinetuneConfig(**settings), models("bare bert"), data)
    with pytest.raises(ConfigError, match="label_smoothing"):
        make_lesson(FinetuneConfig(**settings, label_smoothing=0.1), models("bare bert"), data)


def test_labels_unseen_in_training_are_refused_with_their_rows(models, tmp_path):
    data = write(tmp_path / "train.jsonl", [{"text": f"a {i}", "label": "xy"[i % 2]} for i in range(8)])
    other = write(tmp_path / "more.jsonl", [{"text": "b", "label": "x"}, {"text": "c", "label": "z"}])
    config = FinetuneConfig(task="classify", steps=1)
    with pytest.raises(DataError, match=r"'z' \(.*more.jsonl, row 2\)"):
        make_lesson(config, models("bert"), data, other)
    same = write(tmp_path / "same.jsonl", [{"text": f"a {i}", "label": "x"} for i in range(8)])
    with pytest.raises(DataError, match="same label"):
        make_lesson(config, models("bert"), same, same)
    with pytest.raises(ModelError, match="needs an encoder"):
        make_lesson(config, models("decoder"), data)
    lesson = make_lesson(config, models("bert"), data, data)
    assert "x 50 %, y 50 %" in lesson.told and lesson.base.config.labels == ("x", "y")


def test_numbers_as_labels_are_in_their_order(models, tmp_path):
    data = write(tmp_path / "train.jsonl", [{"text": f"a {i}", "label": i} for i in range(11)])
    lesson = make_lesson(FinetuneConfig(task="classify", steps=1), models("bert"), data, data)
    assert lesson.base.config.labels == tuple(str(i) for i in range(11))


def test_a_classifier_learns_is_calibrated_and_goes_on(models, tmp_path):
    words = {"sea": ["ship", "sailor", "captain"], "house": ["mother", "father", "sister"]}
    rows = [
        {"text": f"{words[label][i % 3]} {text}", "label": label}
        for i, text in enumerate(texts(60, 9))
        for label in words
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    config = FinetuneConfig(
        task="classify", steps=60, rows=4, row_length=64, learning_rate=0.002, validation_fraction=0.3
    )
    made, result = finetune(config, models("bare bert"), data, tmp_path / "out")
    assert result.loss < 0.6
    model = load(made.path)
    assert model.lineage["calibration"]["rows"] > 10 and 0 < model.lineage["calibration"]["temperature"] < 20
    assert next(iter(model.classify("captain and sailor on a ship")[0])) == "sea"
    logits = model.label_logits([("mother", None)])
    cooled = softmax(logits, model.lineage["calibration"]["temperature"])[0]
    assert model.classify("mother")[0]["house"] == pytest.approx(cooled[0], rel=1e-6)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text("utf-8")
    assert "validation_labels_accuracy" in lines
    again = make_lesson(config, made, data)
    assert again.base is made  # the head is kept


def test_an_answering_encoder_learns_to_find_and_to_be_silent(models, tmp_path):
    from lexmill.evaluate.scores import ScoreConfig
    from lexmill.evaluate.task import score_task
    from lexmill.evaluate.tuning import tune

    rows = []
    for index, text in enumerate(texts(60, 21)):
        there = index % 4 != 0
        context = f"{text} captain {'anne' if index % 2 else 'mary'} smiled" if there else text
        answers = {"text": [], "answer_start": []}
        if there:
            answer = "anne" if index % 2 else "mary"
            answers = {"text": [answer], "answer_start": [context.rindex("captain") + 8]}
        rows.append({"id": str(index), "question": "which captain", "context": context, "answers": answers})
    data = write(tmp_path / "rows.jsonl", rows)
    config = FinetuneConfig(
        task="qa", steps=40, rows=4, row_length=96, window=48, overlap=8, learning_rate=0.003
    )
    made, _ = finetune(config, models("bare bert"), data, tmp_path / "out", validation=data, tune=tune)
    kept = load(made.path).lineage["calibration"]
    assert (kept["window"], kept["overlap"], kept["rows"]) == (48, 8, 60)
    scores = score_task("qa", load(made.path), data, ScoreConfig())
    assert scores.metrics["f1"] > 60, scores.metrics
    assert scores.metrics["f1"] == pytest.approx(scores.details["F1 with it"], abs=0.01)
    assert made.config.span and not made.config.pooler


def test_embeddings_learn_and_keep_how_they_pool(models, tmp_path):
    from lexmill.evaluate.task import score_task

    pairs = [("ship", "captain"), ("mother", "sister"), ("sea", "sailor"), ("house", "garden")]
    rows = [
        {"query": f"{pairs[i % 4][0]} {one}", "positive": f"{pairs[i % 4][1]} {two}"}
        for i, (one, two) in enumerate(zip(texts(40, 31), texts(40, 32)))
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    before = score_task("embed", load(models("bert").path), data).metrics["ndcg_10"]
    config = FinetuneConfig(task="embed", steps=30, rows=4, row_length=128, learning_rate=0.002)
    made, _ = finetune(config, models("bert"), data, tmp_path / "out")
    after = score_task("embed", load(made.path), data).metrics["ndcg_10"]
    assert after > before + 0.1
    assert made.pooling == models("bert").pooling and not made.config.mlm
    assert json.loads((made.path / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_rows_that_are_too_long_are_listed_cut_or_left_out(models, tmp_path, task):
    rows = [{"text": f"she was {i}", "label": "xy"[i % 2]} for i in range(6)]
    if task == "embed":
        rows = [{"query": f"she {i}", "positive": f"was {i}"} for i in range(6)]
    rows[4] = {name: value if name == "label" else value + " glad" * 40 for name, value in rows[4].items()}
    data = write(tmp_path / "rows.jsonl", rows)
    base = {"task": task, "steps": 1, "row_length": 24, "validation_fraction": 0.0}
    with pytest.raises(DataError, match=r"1 rows are longer.*rows.jsonl, row 5 \(\d+ tokens\)"):
        make_lesson(FinetuneConfig(**base), models("bert"), data)
    cut_down = make_lesson(FinetuneConfig(**base, too_long="cut"), models("bert"), data)
    assert len(cut_down.examples(0)) == 6 and "1 rows are cut to 24 tokens" in cut_down.told
    assert max(len(one.tokens) for one in cut_down.examples(0)) <= 24
    left_out = make_lesson(FinetuneConfig(**base, too_long="drop"), models("bert"), data)
    assert len(left_out.examples(0)) == 5 and "1 rows are left out" in left_out.told


def test_tasks_are_planned_from_their_rows(models, tmp_path):
    from lexmill.finetune.plan import plan_finetuning

    data = write(tmp_path / "rows.jsonl", [{"text": f"she was {i}", "label": i % 2} for i in range(30)])
    base = models("bert")
    config = FinetuneConfig(task="classify", steps=5, rows=2, row_length=32, validation_fraction=0.0)
    found = plan_finetuning(config, base.config, data=data, tokenizer=base.tokenizer, seconds=0.1)
    sizes = [len(base.tokenizer.encode(f"she was {i}")) for i in range(30)]
    assert found.data.tokens == sum(sizes)
