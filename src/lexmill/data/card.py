"""The data card: what a prepared folder holds, from where and under which licence, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.data.documents import Document

EXCERPT = 240  # characters
MOST_FILES = 50
CLEANED = (
    "- **Cleaned**: Unicode normal form C, `\\n` line ends, no control characters, no trailing spaces, "
    "at most one blank line in a row."
)


def data_card(manifest: Mapping[str, Any], train: Sequence[Document]) -> str:
    """A Markdown page made from a manifest and three of the training documents; no times, no paths of a machine."""
    config = manifest["config"]
    lines = ["# Data card", "", *_counts(manifest["counts"]), "", "## Where it comes from", ""]
    lines += ["| file | bytes | documents | kept | licence |", "|---|---:|---:|---:|---|"]
    files = manifest["files"]
    for file in files[:MOST_FILES]:
        lines.append(
            f"| {_cell(file['path'])} | {file['bytes']:,} | {file['documents']:,} | {file['kept']:,} | "
            f"{_cell(file['license'] or 'not stated')} |"
        )
    if len(files) > MOST_FILES:
        lines.append(f"\n{len(files) - MOST_FILES:,} more files are listed in `manifest.json`.")
    lines += ["", "## How it was made", ""]
    lines += [
        CLEANED,
        *[f"- **Divided**: {_rule(source)}" for source in config["sources"]],
        f"- **Dropped**: {_dropped(manifest['dropped'])}. Exact duplicates are found by the SHA-256 of the cleaned "
        "content; the first one stays.",
        f"- **Split**: {config['validation_fraction']:.1%} validation by the hash of each document, seed "
        f"{config['seed']}, each kind by itself; chats that open with the same question are in the same split.",
        "",
        "`manifest.json` traces every row to its raw file through the column `source`.",
    ]
    lines += ["", "## Excerpts", ""]
    for place in sorted({0, len(train) // 2, len(train) - 1} if train else ()):
        lines += [
            f"`{train[place].source}`",
            "",
            *(f"> {line}".rstrip() for line in _excerpt(train[place])),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _counts(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    rows = ["| split | kind | documents | characters | bytes |", "|---|---|---:|---:|---:|"]
    for split, kinds in counts.items():
        for kind, count in kinds.items():
            if count["documents"]:
                figures = " | ".join(f"{count[key]:,}" for key in ("documents", "characters", "bytes"))
                rows.append(f"| {split} | {kind} | {figures} |")
    return rows


def _rule(source: Mapping[str, Any]) -> str:
    if source["kind"] == "chat":
        rule = "each row is a conversation"
    elif source["split"] == "file":
        rule = "each file or row is a document"
    elif source["split"] == "blank-lines":
        rule = "each paragraph is a document"
    else:
        rule = f"a document begins at each line that matches `{source['split']}`"
    return f"`{source['path']}`: {rule}" + ("; hard-wrapped lines were joined." if source["unwrap"] else ".")


def _dropped(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in dropped.items()) or "nothing"


def _excerpt(document: Document) -> list[str]:
    if document.messages is not None:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in document.messages)
    else:
        text = document.text or ""
    return (text[:EXCERPT].rstrip() + " ..." if len(text) > EXCERPT else text).split("\n")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
