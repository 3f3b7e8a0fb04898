"""Preferred and rejected replies by a rule, for recipes/prefer.toml.

python recipes/data/preferences.py dialogues.jsonl OUT

The rule: a reply that asks back is preferred to the same reply without that. The dialogues have no such questions,
so a model learns it from the preferences alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitting import write_splits

BACK = ("What do you think?", "Why do you ask?", "Do you agree?", "What made you think of it?")


def rows(dialogues: list[list[dict[str, str]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    draw = random.Random(0)
    for messages in dialogues:
        prompt, reply = messages[:-1], messages[-1]["content"]
        if not reply.endswith("?"):
            whole = reply if reply.endswith((".", "!")) else f"{reply}."
            yield (
                prompt[-1]["content"],
                {"prompt": prompt, "chosen": f"{whole} {draw.choice(BACK)}", "rejected": whole},
            )


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
