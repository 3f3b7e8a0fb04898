"""The whole of data preparation: raw files in, documents for training and validation out, with a manifest and a card."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lexmill.data.card import data_card
from lexmill.data.cleaning import normalise, unwrap_paragraphs
from lexmill.data.deduplicate import ExactDuplicates
from lexmill.data.documents import KINDS, Document, document_id, write_documents
from lexmill.data.folders import find_inputs, find_root, refuse_foreign_folder
from lexmill.data.readers import RawDocument, read_raw
from lexmill.data.splitting import assign_split, compile_rule, split_documents, split_position, words_of
from lexmill.errors import ConfigError, DataError
from lexmill.files import atomic_directory, atomic_write, sha256_file, write_json
from lexmill.progress import SILENT, Progress, Task

SPLITS = ("train", "validation")
FILES = ("train.parquet", "validation.parquet", "manifest.json", "card.md")
FORMAT = "lexmill-documents"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One kind of raw input.

    Args:
        path: a file, a folder or a glob pattern, relative to the recipe's folder.
        split: "file", "blank-lines", or an expression for the first line of each document (`split_documents`).
        unwrap: join hard-wrapped lines (`unwrap_paragraphs`).
        license: what the owner says, for rows that do not say it.
        language: likewise.
        kind: "text" or "chat".
        column: the field of CSV, JSONL and Parquet rows that holds the text.
    """

    path: str
    split: str = "file"
    unwrap: bool = False
    license: str = ""
    language: str = ""
    kind: str = "text"
    column: str = "text"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f'{self.path}: kind is {self.kind!r}, not "text" or "chat".')
        if self.kind == "chat" and (self.split != "file" or self.unwrap):
            raise ConfigError(
                f'{self.path}: "split" and "unwrap" are for texts, but kind is "chat".', "Leave them out."
            )
        compile_rule(self.split)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare and how.

    Args:
        sources: where raw files lie.
        validation_fraction: the expected share of documents (of chats: of first questions) for
            validation, in [0, 1).
        validation: "documents" holds out whole documents, drawn by their hash; "end" holds out the end
            of each text, for texts that are one long document.
        seed: another seed gives another split.
        min_characters: shorter texts are dropped.
        root: the folder that relative paths start from, itself relative to the recipe's folder or, if
            there is none, to the current one. The recipe's folder when not given.
    """

    sources: tuple[SourceConfig, ...]
    root: str = ""
    validation_fraction: float = 0.05
    validation: Literal["documents", "end"] = "documents"
    seed: int = 0
    min_characters: int = 1

    def __post_init__(self) -> None:
        if self.validation == "end" and any(source.kind == "chat" for source in self.sources):
            raise ConfigError(
                "validation = 'end' cuts texts in two, but there are chats.", "Use validation = 'documents'."
            )
        if not self.sources:
            raise ConfigError(
                "There are no sources to prepare.", "Name at least one file, folder or pattern."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction is {self.validation_fraction}, not in [0, 1).",
                "0.05 keeps one in twenty.",
            )

    def base(self, recipe: Path) -> Path:
        """The folder that the sources' paths start from.

        Raises:
            DataError: `root` is no folder.
        """
        found = find_root(self.root, recipe)
        if found is None:
            candidates = [recipe / self.root, Path(self.root)] if self.root else [recipe]
            raise DataError(
                f"There is no folder {' or '.join(map(str, candidates))} with the recipe's data.",
                "Say where it lies: --set prepare.root=FOLDER. The recipe's first lines tell what it needs.",
            )
        return found


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What `prepare` wrote.

    `counts["train"]["text"]` has the keys documents, characters and bytes (UTF-8; of a chat: of the
    contents of its messages); `dropped` counts documents by the reason.
    """

    folder: Path
    counts: dict[str, dict[str, dict[str, int]]]
    dropped: dict[str, int]
    files: int

    def documents(self, split: str) -> int:
        """How many documents a split has, of all kinds."""
        return sum(counts["documents"] for counts in self.counts[split].values())


@dataclass
class _Gathered:
    """What reading has found so far. Held in memory: a split needs to see all documents of its kind."""

    kept: list[Document] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    duplicates: ExactDuplicates = field(default_factory=ExactDuplicates)


def prepare(
    config: PrepareConfig, out: Path, base: Path = Path("."), progress: Progress = SILENT
) -> PrepareResult:
    """Read, clean, split and deduplicate raw files into the folder `out`.

    Args:
        config: sources and rules.
        out: gets `train.parquet`, `validation.parquet`, `manifest.json` and `card.md`, all at once
            when all is done; the same inputs give the same bytes. An older such folder is replaced.
        base: the folder that the sources' paths start from.
        progress: told of files and documents.

    Raises:
        ConfigError: a rule that cannot be used.
        DataError: raw data that cannot be used (says where), or too little for a validation split.
        FileError: no space, no permission, or `out` holds other things.
    """
    out, base = Path(out), Path(base)
    refuse_foreign_folder(out, FILES)
    gathered = _gather(config, base, progress)
    if config.validation == "end":
        splits = split_at_end(gathered.kept, config.validation_fraction)
    else:
        splits = split_by_kind(gathered.kept, config.seed, config.validation_fraction)
    counts = {name: _count(splits[name]) for name in SPLITS}
    dropped = dict(sorted(Counter(entry["reason"] for entry in gathered.dropped).items()))
    manifest = {
        "format": FORMAT,
        "version": 1,
        "config": _portable_config(config, base),
        "counts": counts,
        "dropped": dropped,
        "files": gathered.files,
        "duplicates": [asdict(duplicate) for duplicate in gathered.duplicates.found],
        "dropped_documents": [entry for entry in gathered.dropped if entry["reason"] != "duplicate"],
    }
    with atomic_directory(out) as partial:
        for name in SPLITS:
            write_documents(partial / f"{name}.parquet", splits[name])
        manifest["outputs"] = {f"{name}.parquet": sha256_file(partial / f"{name}.parquet") for name in SPLITS}
        write_json(partial / "manifest.json", manifest)
        with atomic_write(partial / "card.md", "w") as file:
            file.write(data_card(manifest, splits["train"]))
    return PrepareResult(folder=out, counts=counts, dropped=dropped, files=len(gathered.files))


def split_by_kind(
    documents: Iterable[Document], seed: int, validation_fraction: float
) -> dict[str, list[Document]]:
    """Divide documents, each kind by itself, so that no group (`group_key`) is in both splits.

    Raises:
        DataError: a kind has too few documents for two splits.
    """
    documents = list(documents)
    chosen: dict[str, str] = {}
    for kind in KINDS:
        keys = sorted({group_key(document) for document in documents if document.kind == kind})
        chosen |= _assign_groups(keys, kind, seed, validation_fraction)
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        splits[chosen[group_key(document)]].append(document)
    return splits


def split_at_end(documents: Iterable[Document], validation_fraction: float) -> dict[str, list[Document]]:
    """Cut each text in two: its first characters for training, the last `validation_fraction` for validation.

    A text too short for two parts stays whole, for training.
    """
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        text = document.text or ""
        cut = round(len(text) * (1 - validation_fraction))
        parts = {"train": text[:cut], "validation": text[cut:]}
        if not all(parts.values()):
            parts = {"train": text}
        for name, part in parts.items():
            splits[name].append(replace(document, id=document_id(part, None), text=part))
    return splits


def group_key(document: Document) -> str:
    """What must not be in both splits: a text itself, or all chats that open with the same question.

    Questions are compared in lower case without punctuation.
    """
    for message in document.messages or ():
        if message["role"] == "user":
            question = words_of(message["content"])
            return "question:" + hashlib.sha256(question.encode("utf-8")).hexdigest()
    return f"{document.kind}:{document.id}"


def _assign_groups(keys: list[str], kind: str, seed: int, fraction: float) -> dict[str, str]:
    chosen = {key: assign_split(key, seed, fraction) for key in keys}
    if not keys or fraction == 0:
        return chosen
    if len(keys) == 1:
        what = "document" if kind == "text" else "chat (or one opening question)"
        raise DataError(
            f'There is only one {what} of kind "{kind}", too few for training and validation.',
            'Add documents, give the source a "split" rule that divides it, or set validation_fraction = 0.',
        )
    ordered = sorted(keys, key=lambda key: split_position(key, seed))
    # The order of hashes decides here too, so the guarantee does not depend on the order of files.
    chosen[ordered[0]] = "validation"
    chosen[ordered[-1]] = "train"
    return chosen


def _gather(config: PrepareConfig, base: Path, progress: Progress) -> _Gathered:
    gathered = _Gathered()
    inputs = [(source, path) for source in config.sources for path in find_inputs([source.path], base)]
    seen: dict[Path, SourceConfig] = {}
    for source, path in inputs:
        if path in seen:
            raise ConfigError(
                f"{_relative(path, base)} belongs to two sources: {seen[path].path} and {source.path}.",
                "Narrow one of the paths; a file is prepared by one rule.",
            )
        seen[path] = source
    megabytes = sum(path.stat().st_size for _, path in inputs) / 1e6
    matched: Counter[SourceConfig] = Counter()
    with progress.task("preparing documents", megabytes, "MB") as task:
        for source, path in inputs:
            matched[source] += _gather_file(source, path, config, base, gathered, task)
            task.advance(path.stat().st_size / 1e6, f"{len(gathered.kept):,} documents")
    for source in config.sources:
        if compile_rule(source.split) is not None and not matched[source]:
            raise DataError(
                f"{source.path}: the split rule {source.split!r} matches no line of any file.",
                "Look at the first line of a chapter and mend the expression, or leave the rule out.",
            )
    if not gathered.kept:
        raise DataError("No document is left: all were dropped.", "Lower min_characters, or add data.")
    return gathered


def _gather_file(
    source: SourceConfig, path: Path, config: PrepareConfig, base: Path, gathered: _Gathered, task: Task
) -> int:
    """Add one file's documents; returns how many lines matched the split rule."""
    name = _relative(path, base)
    pattern = compile_rule(source.split)
    matches = rows = found = kept = 0
    dropped: Counter[str] = Counter()
    for raw in read_raw(path, license=source.license, language=source.language, column=source.column):
        rows += 1
        if pattern is not None:
            matches += sum(1 for line in (raw.text or "").splitlines() if pattern.search(line))
        for document in _documents(raw, source, name):
            found += 1
            reason = _reason_to_drop(document, config, gathered.duplicates)
            if reason:
                dropped[reason] += 1
                gathered.dropped.append({"source": document.source, "reason": reason})
            else:
                kept += 1
                gathered.kept.append(document)
        if rows % 1000 == 0:
            task.advance(0, f"{len(gathered.kept):,} documents")
    gathered.files.append(
        {
            "path": name,
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "license": source.license,
            "language": source.language,
            "rows": rows,
            "documents": found,
            "kept": kept,
            "dropped": dict(sorted(dropped.items())),
        }
    )
    return matches


def _documents(raw: RawDocument, source: SourceConfig, name: str) -> Iterator[Document]:
    place = f"{name}#{raw.row}" if raw.row is not None else name
    if source.kind == "chat":
        if raw.messages is None:
            raise DataError(
                f'{place}: a source of kind "chat" needs the field "messages".',
                'Set kind = "text" for this source, or give it conversations.',
            )
        messages = tuple({"role": m["role"], "content": normalise(m["content"])} for m in raw.messages)
        yield _document(None, messages, place, raw)
        return
    if raw.text is None:
        raise DataError(
            f'{place}: a source of kind "text" needs the field "text", but this row has only "messages".',
            'Set kind = "chat" for this source.',
        )
    pieces = split_documents(normalise(raw.text), source.split) or [""]
    for number, piece in enumerate(pieces, 1):
        text = normalise(unwrap_paragraphs(piece)) if source.unwrap else piece
        numbered = (
            f"{name}#{number}" if raw.row is None else place if len(pieces) == 1 else f"{place}.{number}"
        )
        yield _document(text, None, numbered, raw)


def _document(text: str | None, messages: Any, place: str, raw: RawDocument) -> Document:
    return Document(
        id=document_id(text, messages),
        text=text,
        messages=messages,
        kind="text" if messages is None else "chat",
        source=place,
        language=raw.language,
        license=raw.license,
        # Surrogates can come in through JSON escapes; Parquet holds UTF-8 only.
        meta={normalise(key): normalise(value) for key, value in raw.meta.items()},
    )


def _reason_to_drop(document: Document, config: PrepareConfig, duplicates: ExactDuplicates) -> str:
    if document.messages is not None:
        if not all(message["content"] for message in document.messages):
            return "a message is empty"
        if not any(message["role"] == "assistant" for message in document.messages):
            return "no message by the assistant"
    elif len(document.text or "") < max(config.min_characters, 1):
        return "shorter than min_characters" if document.text else "empty"
    return "" if duplicates.is_new(document) else "duplicate"


def _count(documents: list[Document]) -> dict[str, dict[str, int]]:
    counts = {}
    for kind in KINDS:
        texts = [_plain(document) for document in documents if document.kind == kind]
        counts[kind] = {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "bytes": sum(len(text.encode("utf-8")) for text in texts),
        }
    return counts


def _plain(document: Document) -> str:
    if document.messages is None:
        return document.text or ""
    return "".join(message["content"] for message in document.messages)


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def _portable_config(config: PrepareConfig, base: Path) -> dict[str, Any]:
    """The configuration without absolute paths, so that it reads the same on every machine."""
    values = asdict(config)
    for source in values["sources"]:
        if os.path.isabs(source["path"]):
            source["path"] = _relative(Path(source["path"]), base)
    values["sources"] = list(values["sources"])
    return values
