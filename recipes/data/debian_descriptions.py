"""Descriptions of Debian's packages and their synopses, for recipes/summarise.toml and summarise-t5.toml.

In OUT/first are the same descriptions with their first sentence in place of the synopsis, for first-sentence.toml.

python recipes/data/debian_descriptions.py OUT [--lists FOLDER]

It reads the lists that `apt-get update` fetches (the index states no licence; the texts follow each package's).
Some images switch descriptions off; then fetch lists of your own, without root:

    mkdir -p lists/partial
    printf '#clear Acquire::Languages;\nAcquire::Languages { "en"; };\nDir::State::Lists "%s";\n' "$PWD/lists" > apt.conf
    apt-get -c apt.conf update
    python recipes/data/debian_descriptions.py OUT --lists lists
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from splitting import write_splits

SHORTEST = 120  # characters of a description
LONGEST_SENTENCE = 160
HELPER = "/usr/lib/apt/apt-helper"  # it unpacks whatever apt packs lists with


def descriptions(lists: Path) -> Iterator[tuple[str, str]]:
    """Synopsis and description of each package, each once."""
    seen = set()
    for path in sorted(lists.glob("*_Translation-en*")):
        text = subprocess.run([HELPER, "cat-file", path], capture_output=True, check=True).stdout.decode()
        for entry in text.split("\n\n"):
            found = re.search(r"^Description-en: (.+)\n((?: .*\n?)+)", entry, re.MULTILINE)
            if not found:
                continue
            # a line of " ." parts paragraphs
            paragraphs = re.split(r"^ \.$", found[2], flags=re.MULTILINE)
            body = " ".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()
            if len(body) >= SHORTEST and body not in seen:
                seen.add(body)
                yield found[1].strip(), body


def first_sentences(bodies: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A description's first sentence and the description, where there are more sentences."""
    for body in bodies:
        sentence = re.split(r"(?<=[.!?])\s+", body, maxsplit=1)[0]
        if sentence != body and len(sentence) <= LONGEST_SENTENCE:
            yield sentence, body


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"))
    arguments = parser.parse_args()
    found = list(descriptions(arguments.lists))
    if not found:
        sys.exit(
            f"{arguments.lists}: no descriptions (*_Translation-en*). The head of this script says how to get them."
        )
    first = first_sentences(body for _, body in found)
    for out, pairs in ((arguments.out, found), (arguments.out / "first", first)):
        # packages of one source begin alike: they must not be parted
        write_splits(out, [(body[:60], {"source": body, "target": text}) for text, body in pairs])


if __name__ == "__main__":
    main()
