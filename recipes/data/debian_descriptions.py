"""Descriptions of Debian's packages and their synopses, for recipes/summarise.toml.

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
from collections.abc import Iterator
from pathlib import Path

from splitting import write_splits

SHORTEST = 120  # characters of a description
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"))
    arguments = parser.parse_args()
    # packages of one source begin alike: they must not be parted
    rows = [
        (body[:60], {"source": body, "target": synopsis}) for synopsis, body in descriptions(arguments.lists)
    ]
    if not rows:
        sys.exit(
            f"{arguments.lists}: no descriptions (*_Translation-en*). The head of this script says how to get them."
        )
    write_splits(arguments.out, rows)


if __name__ == "__main__":
    main()
