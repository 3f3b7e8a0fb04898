"""Preferred and rejected replies by a rule, for recipes/prefer.toml.

python recipes/data/preferences.py dialogues.jsonl OUT

The rule: a reply that answers and stops is preferred to the same reply followed by one or two replies to other
questions. Both halves begin alike, so that nothing but going on is learned to be wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitting import write_splits


def rows(dialogues: list[list[dict[str, str]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    draw = random.Random(0)
    replies = [messages[-1]["content"] for messages in dialogues]
    for messages in dialogues:
        prompt, reply = messages[:-1], messages[-1]["content"]
        others = [other for other in draw.sample(replies, 3) if other != reply][: draw.randint(1, 2)]
        pair = {"prompt": prompt, "chosen": reply, "rejected": " ".join([reply, *others])}
        yield prompt[-1]["content"], pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    lines = arguments.dialogues.read_text("utf-8").splitlines()
    talks = [json.loads(line)["messages"] for line in lines if line.strip()]
    usual = [talk for talk in talks if len(talk) > 1 and talk[-1]["role"] == "assistant"]
    write_splits(arguments.out, rows(usual), share=0.12)


if __name__ == "__main__":
    main()
