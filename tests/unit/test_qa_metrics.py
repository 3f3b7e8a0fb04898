"""Exact match and F1: by hand, by an independent implementation, and thresholds by trying all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import ConfigError
from lexmill.evaluate.qa_metrics import (
    answer_scores,
    best_threshold,
    chinese_pieces,
    each_score,
    normalise_english,
)


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in the  Eiffel-Tower", ["Eiffel Tower"], 0, 0),  # the hyphen is dropped, not a border
        ("the old Eiffel Tower", ["Eiffel Tower", "old tower"], 0, 0.8),
        ("a b b c", ["b b d"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("an", ["the"], 1, 1),  # an answer of articles alone is no answer
        ("Café", ["café"], 1, 1),
    ],
)
def test_english_answers_are_scored_as_squad_does(said, right, exact, f1):
    found = each_score([said], [right], "en")
    assert found[0][0] == exact and found[1][0] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("《红楼梦》", ["红楼梦"], 1, 1),
        ("他在北京大学", ["北京大学"], 0, 2 * (4 / 6) * 1 / (4 / 6 + 1)),
        ("北大", ["北京大学"], 0, 2 * 0.5 * 0.25 / 0.75),  # one run of one character, not two
        ("2008年8月8日", ["2008年"], 0, 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("上海", ["北京", "上海市"], 0, 0.8),
        ("Windows 系统", ["windows系统"], 0, 1),  # exact match keeps the space, segments do not
        ("什么", ["别的"], 0, 0),
    ],
)
def test_chinese_answers_are_scored_as_cmrc_does(said, right, exact, f1):
    pytest.importorskip("nltk")
    found = each_score([said], [right], "zh")
    assert found[0][0] == exact and found[1][0] == pytest.approx(f1)


def test_english_inside_chinese_is_cut_as_nltk_cuts_it():
    pytest.importorskip("nltk")
    # marks go without parting what stands beside them, as in the official script
    assert chinese_pieces("版本3.5%的Word（Office）") == ["版", "本", "3.5", "%", "的", "wordoffice"]
    # the entry "……" of the official list equals no single character
    assert chinese_pieces("好……") == ["好", "……"]


def test_english_scores_agree_with_another_implementation():
    mlqa = pytest.importorskip("lm_eval.tasks.mlqa.utils")
    said = ["The  cat, sat.", "on a mat", "", "mat mat", "an apple a day", "U.S.A. army"]
    right = [["cat sat"], ["the mats", "on mat"], ["x"], ["mat"], ["apple day today"], ["usa Army"]]
    exact, f1 = each_score(said, right, "en")
    for index, (mine, golds) in enumerate(zip(said, right)):
        theirs = [mlqa.f1_score(mine, gold, "en") for gold in golds] if mine else [0]
        assert f1[index] == pytest.approx(max(theirs))
        assert exact[index] == max(mlqa.exact_match_score(mine, gold, "en") for gold in golds)


def test_scores_are_told_apart_by_whether_there_is_an_answer():
    found = answer_scores(["x", "", "", "y"], [["x"], ["x"], [], []])
    assert found == {
        "exact": 50.0,
        "f1": 50.0,
        "answerable_exact": 50.0,
        "answerable_f1": 50.0,
        "unanswerable_exact": 50.0,
    }
    assert answer_scores(["x"], [["x"]]) == {"exact": 100.0, "f1": 100.0}
    with pytest.raises(ConfigError, match="klingon"):
        answer_scores(["x"], [["x"]], "klingon")


def test_the_language_follows_from_the_answers():
    # "auto" takes Chinese rules: the F1 is that of characters
    assert answer_scores(["北大"], [["北京大学"]])["f1"] == pytest.approx(33.3333)
    assert answer_scores(["北大"], [["北京大学"]], "en")["f1"] == 0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_normalising_twice_is_normalising_once_and_any_text_equals_itself(text):
    once = normalise_english(text)
    # an article may come to stand alone when what is beside it goes, but never a second time
    assert normalise_english(once) == once or set(once.split()) != set(normalise_english(once).split())
    assert each_score([text], [[text]], "en")[1][0] == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])),
        min_size=1,
        max_size=12,
    )
)
def test_no_other_threshold_scores_more(rows):
    null, answered, silent = (np.array(column, float) for column in zip(*rows))
    found = best_threshold(null, answered, silent)

    def total(threshold):
        return np.where(null > threshold, silent, answered).sum()

    every = [-10.0, *(null + 0.25), *(null - 0.25), np.inf]
    assert total(found) == pytest.approx(max(total(one) for one in every))
