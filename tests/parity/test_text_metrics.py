"""Scores of texts agree with the packages that define them, called as their own users call them."""

import pytest

from lexmill.evaluate.text_metrics import (
    CharacterTokenizer,
    bleu,
    first_sentence,
    in_characters,
    length_statistics,
    rouge,
)

GIVEN = ["The cat sat on the mat. It slept.", "A dog runs", "", "Ein Mann läuft über die Straße."]
REFERENCES = [
    ("The cat lay on the mat. It was asleep.", "On the mat sat a cat."),
    ("A brown dog is running fast.",),
    ("Something.",),
    ("Ein Mann geht über die Straße.", "Ein Mann läuft.", "Er läuft über die Straße."),
]


def test_rouge_is_google_s():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    found, how = rouge(GIVEN, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(right, said)[name].fmeasure for right in references)
            for said, references in zip(GIVEN, REFERENCES)
        ]
        assert found[name] == pytest.approx(sum(best) / len(best), abs=1e-5)
    assert "no stemming" in how["rouge_tokenizer"]


def test_rouge_lsum_takes_sentences_apart():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])
    said, right = "It slept. The cat sat.", "The cat sat. It slept."
    found, _ = rouge([said], [(right,)])
    lines = scorer.score("The cat sat.\nIt slept.", "It slept.\nThe cat sat.")["rougeLsum"].fmeasure
    assert found["rougeLsum"] == pytest.approx(lines, abs=1e-5)
    assert found["rougeLsum"] > found["rougeL"]


def test_chinese_is_scored_by_characters():
    pytest.importorskip("rouge_score")
    found, how = rouge(["今天天气很好"], [("今天天气好",)])
    assert found["rouge1"] == pytest.approx(2 * 5 / 11, abs=1e-5) and "characters" in how["rouge_tokenizer"]
    assert CharacterTokenizer().tokenize("iPhone 15手机ABC好_x, カメラ") == [
        *["iphone", "15", "手", "机", "abc", "好", "x", "カ", "メ", "ラ"]
    ]
    assert in_characters(["中文", "english 中"]) and not in_characters(["中", "b", "c"])


@pytest.mark.parametrize(
    "references", [[(right[0],) for right in REFERENCES], REFERENCES], ids=["one", "several"]
)
def test_bleu_and_chrf_are_sacrebleu_s(references):
    metrics = pytest.importorskip("sacrebleu.metrics")
    most = max(map(len, references))
    columns = [
        [right[place] if place < len(right) else None for right in references] for place in range(most)
    ]
    found, signatures = bleu(GIVEN, references)
    for name, metric in (("bleu", metrics.BLEU()), ("chrf", metrics.CHRF())):
        assert found[name] == pytest.approx(metric.corpus_score(GIVEN, columns).score, abs=1e-4)
        assert signatures[f"{name}_signature"] == str(metric.get_signature())
    assert found["bleu"] > 5


def test_chinese_bleu_uses_sacrebleu_s_chinese_tokenizer():
    sacrebleu = pytest.importorskip("sacrebleu")
    found, signatures = bleu(["今天天气很好啊"], [("今天天气很好",)])
    assert "tok:zh" in signatures["bleu_signature"]
    assert found["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(["今天天气很好啊"], [["今天天气很好"]], tokenize="zh").score, abs=1e-4
    )


def test_lengths_and_first_sentences():
    assert length_statistics(["abc", ""], [("abcd", "x"), ("ab",)]) == {
        "given_characters": 1.5,
        "expected_characters": 3.0,
        "ratio": 0.5,
        "empty": 1,
    }
    assert first_sentence("  One. Two. ") == "One." and first_sentence("今天。明天。") == "今天。"
    assert first_sentence("no stop") == "no stop" and first_sentence(" ") == ""
