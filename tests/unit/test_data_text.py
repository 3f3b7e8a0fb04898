"""Cleaning, unwrapping and splitting of texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexmill.data.cleaning import normalise, unwrap_paragraphs
from lexmill.data.splitting import assign_split, split_documents, split_position
from lexmill.errors import ConfigError

ANY = st.text(st.one_of(st.characters(), st.sampled_from("\n\r\t \0\ufeff\ud800\udc00\u0301\u2028_-e\u0085")))


@given(ANY)
def test_normalise_is_idempotent_and_gives_utf8(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once.encode("utf-8").decode("utf-8") == once
    assert "\r" not in once and "\n\n\n" not in once and "\0" not in once


def test_normalise_does_what_it_says() -> None:
    assert normalise("\ufeff a \r\nb\t\rc\x0b\x00d\n\n\n\n\ne\u0301 \ud800 ") == "a\nb\nc\nd\n\né \ufffd"
    assert normalise("e\0\u0301") == "é"


@given(ANY)
def test_unwrap_keeps_every_word(text: str) -> None:
    clean = normalise(text).replace("_", "")
    assert unwrap_paragraphs(clean).split() == clean.split() or "--" in clean


PROSE = """It is a truth universally acknowledged, that a single man in
possession of a good fortune, must be in want of a wife; and so it--
as _they_ say--goes on and on _for some
while_ until the end."""


def test_prose_is_unwrapped_and_verse_is_not() -> None:
    verse = "The woods are green\nand I am seen\nby all."
    items = "- a first item in the list that is very long, longer than fifty\n- a second"
    assert unwrap_paragraphs(f"CHAPTER I\n\n{PROSE}\n\n{verse}\n\n{items}") == (
        "CHAPTER I\n\nIt is a truth universally acknowledged, that a single man in possession of a good fortune, must "
        "be in want of a wife; and so it--as they say--goes on and on for some while until the end."
        f"\n\n{verse}\n\n{items}"
    )
    assert unwrap_paragraphs("snake_case_name and __init__") == "snake_case_name and __init__"


def test_splitting_by_rule() -> None:
    book = "TITLE\n\nVOLUME I\n\nCHAPTER I\n\none\n\nCHAPTER II\n\ntwo\n\nVOLUME II\n\nCHAPTER I\n\nthree\n\nCHAPTER II"
    rule = "^(VOLUME|CHAPTER) [IVX]+$"
    assert split_documents(book, rule) == [
        "TITLE\n\nVOLUME I\n\nCHAPTER I\n\none",
        "CHAPTER II\n\ntwo",
        "VOLUME II\n\nCHAPTER I\n\nthree",
        "CHAPTER II",
    ]
    preface = "a preface " * 30
    assert split_documents(f"{preface}\n{book}", rule)[0] == f"{preface}\nTITLE"
    assert split_documents("no chapter", rule) == ["no chapter"]
    assert split_documents("a\nb\n\nc", "file") == ["a\nb\n\nc"]
    assert split_documents("a\nb\n\nc", "blank-lines") == ["a\nb", "c"]
    assert split_documents("", "file") == split_documents("", rule) == []
    with pytest.raises(ConfigError, match="is not a regular expression"):
        split_documents("a", "(")


@given(ANY, st.sampled_from(["^a", "e", "^$", "blank-lines", "file"]))
def test_splitting_loses_no_word(text: str, rule: str) -> None:
    clean = normalise(text)
    assert " ".join(split_documents(clean, rule)).split() == clean.split()


def test_the_split_depends_on_id_and_seed_alone() -> None:
    ids = [f"{number:016x}" for number in range(4000)]
    chosen = {key for key in ids if assign_split(key, 0, 0.1) == "validation"}
    assert 300 < len(chosen) < 500
    assert chosen != {key for key in ids if assign_split(key, 1, 0.1) == "validation"}
    assert all(assign_split(key, 0, 0) == "train" for key in ids)
    assert 0 <= split_position("a", 0) == split_position("a", 0) < 1
