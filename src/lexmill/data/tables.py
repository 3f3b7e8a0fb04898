"""Files of rows to raw values: JSONL, JSON, CSV, TSV, Parquet, and pairs of text files. What the values mean is said elsewhere."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lexmill.data.decoding import raw_suffix, read_lines
from lexmill.data.documents import read_parquet_batches
from lexmill.errors import DataError, FileError
from lexmill.messages import kind_of

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FIELD_LIMIT = 64 << 20  # characters in a CSV field; Python's own limit of 131,072 is less than a book
JSON_LIMIT = 1 << 30  # characters of a JSON file, which is read as a whole and takes several times that
_PAIR = re.compile(r"\{([^{},/]+),([^{},/]+)\}")

Reject = Callable[[DataError], None]
Header = Callable[[list[str], str], None]


@dataclass(frozen=True)
class RawRow:
    """The values of one row, `row` counted from 1 (a line of JSONL, a record under the header of CSV).

    `where` is its place in words: "a.csv, line 3".
    """

    values: dict[str, Any]
    row: int
    where: str


def is_pair(path: Path) -> bool:
    """Whether a path names two text files whose lines belong together: "train.{en,de}.gz"."""
    return len(_PAIR.findall(str(path))) == 1


def pair_of(path: Path) -> tuple[Path, Path]:
    """The two files that such a path names."""
    first, second = (_PAIR.sub(lambda found, n=number: found[n], str(path)) for number in (1, 2))  # type: ignore[misc]
    return Path(first), Path(second)


def read_table(path: Path, *, header: Header | None = None, reject: Reject | None = None) -> Iterator[RawRow]:
    """The rows of a file in their order.

    Args:
        path: `.jsonl`/`.ndjson` (an object a line), `.json` (a list of objects, alone or as "data"; SQuAD's
            articles become a row a question), `.csv`, `.tsv`, `.parquet`; all but the last may be compressed.
            Or two text files by braces, "train.{en,de}.gz": each line a row of "source" and "target".
        header: is given the names of the columns of CSV and Parquet files and the place where they stand;
            may raise.
        reject: is given the error of each row that cannot be read, and reading goes on; raised when not given.

    Raises:
        FileError: it cannot be opened.
        DataError: unknown suffix, empty, binary, not UTF-8, or a row that cannot be read; says which.
        FormatError: a damaged Parquet file.
    """

    def refuse(error: DataError) -> None:
        if reject is None:
            raise error
        reject(error)

    if is_pair(path):
        return _read_pair(path)
    readers: dict[str, Callable[[Path], Iterator[RawRow]]] = {
        ".jsonl": partial(_read_jsonl, refuse=refuse),
        ".ndjson": partial(_read_jsonl, refuse=refuse),
        ".json": partial(_read_json, refuse=refuse),
        ".csv": partial(_read_csv, header=header, refuse=refuse),
        ".tsv": partial(_read_csv, header=header, refuse=refuse),
        ".parquet": partial(_read_parquet, header=header),
    }
    reader = readers.get(raw_suffix(path))
    if reader is None and path.is_dir():
        raise FileError(f"{path}: this is a folder, not a file of rows.", "Give one of its files.")
    if reader is None:
        raise DataError(
            f"{path}: files of rows do not have the suffix '{path.suffix}'.",
            f"Supported are {', '.join(TABLES)}, and two text files as 'train.{{en,de}}'.",
        )
    return reader(path)


def count_rows(path: Path) -> int | None:
    """About how many rows a file has, for a progress bar; None where that is not known before it is read."""
    if is_pair(path):
        return count_rows_of_lines(pair_of(path)[0])
    suffix = raw_suffix(path)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    return None if suffix == ".json" else count_rows_of_lines(path)


def count_rows_of_lines(path: Path) -> int:
    """Lines of a text file."""
    return sum(1 for _ in read_lines(path))


def _read_jsonl(path: Path, refuse: Reject) -> Iterator[RawRow]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number:,}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            refuse(
                DataError(
                    f"{path}, line {number:,}: broken JSON at column {error.colno:,}: {error.msg}.",
                    'Each line is one JSON object, such as {"text": "..."}.',
                )
            )
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            refuse(DataError(f"{path}, line {number:,}: this JSON cannot be read ({error})."))
        else:
            if isinstance(values, dict):
                yield RawRow(values, number, where)
            else:
                refuse(
                    DataError(
                        f"{where}: it is {kind_of(values)}, not an object.", "Each line is one JSON object."
                    )
                )


def _read_json(path: Path, refuse: Reject) -> Iterator[RawRow]:
    parts, size = [], 0
    for line in read_lines(path):
        size += len(line)
        if size > JSON_LIMIT:
            raise DataError(
                f"{path}: a JSON file is read as a whole, and this one is larger than 2^30 characters.",
                "Write it as JSONL, an object a line, which is read row by row.",
            )
        parts.append(line)
    try:
        content = json.loads("".join(parts))
    except json.JSONDecodeError as error:
        lines = " If each line is an object of its own, name the file .jsonl." if error.lineno > 1 else ""
        raise DataError(
            f"{path}, line {error.lineno:,}: broken JSON at column {error.colno:,}: {error.msg}.",
            "The file is one JSON list of objects." + lines,
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: this JSON cannot be read ({error}).") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f'{path}: it is {kind_of(content)} and no list of rows, nor does it hold one as "data".',
            'Rows look like [{"text": "..."}, ...].',
        )
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        yield from _squad_rows(path, rows, refuse)
        return
    for number, values in enumerate(rows, 1):
        where = f"{path}, row {number:,}"
        if isinstance(values, dict):
            yield RawRow(values, number, where)
        else:
            refuse(DataError(f"{where}: it is {kind_of(values)}, not an object."))


def _squad_rows(path: Path, articles: list[Any], refuse: Reject) -> Iterator[RawRow]:
    """A row a question of SQuAD's articles > paragraphs > qas (Rajpurkar et al. 2016, 2018)."""
    row = 0
    for number, article in enumerate(articles, 1):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            refuse(DataError(f'{path}, article {number:,}: it has no list "paragraphs".'))
            continue
        for place, paragraph in enumerate(paragraphs, 1):
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                refuse(DataError(f'{path}, article {number:,}, paragraph {place:,}: it has no list "qas".'))
                continue
            for question in questions:
                row += 1
                where = f"{path}, row {row:,}"
                if not isinstance(question, dict):
                    refuse(DataError(f"{where}: the question is {kind_of(question)}, not an object."))
                    continue
                where += f" (question {question['id']})" if question.get("id") else ""
                shared = {"title": article.get("title"), "context": paragraph.get("context")}
                yield RawRow({**shared, **question}, row, where)


def _read_csv(path: Path, header: Header | None, refuse: Reject) -> Iterator[RawRow]:
    if csv.field_size_limit() < FIELD_LIMIT:
        csv.field_size_limit(FIELD_LIMIT)
    delimiter = "\t" if raw_suffix(path) == ".tsv" else ","
    rows = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    try:
        names = next((row for row in rows if any(cell.strip() for cell in row)), None)
        if names is None:
            raise DataError(f"{path}: this file holds only white space.", "Remove it, or put rows into it.")
        names = [name.strip() for name in names]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f'{path}, line 1: two columns are named "{twice}".', "Rename or remove one of them."
            )
        if header:
            header(names, f"{path}, line 1")
        number = 0
        for cells in rows:
            if not cells:
                continue
            number += 1
            where = f"{path}, line {rows.line_num:,}"
            if len(cells) == len(names):
                yield RawRow(dict(zip(names, cells, strict=True)), number, where)
            else:
                refuse(
                    DataError(
                        f"{where}: this row has {len(cells):,} fields, but the header has {len(names):,}.",
                        'Fields that contain the separator or a line end stand in double quotes ("...").',
                    )
                )
    except csv.Error as error:
        refuse(
            DataError(
                f"{path}, line {rows.line_num:,}: broken CSV: {error}.",
                'A quote inside a quoted field is written twice (""), and every quoted field is closed.',
            )
        )


def _read_parquet(path: Path, header: Header | None) -> Iterator[RawRow]:
    number = 0
    for batch in read_parquet_batches(path):
        if header and batch and not number:
            header(list(batch[0]), str(path))
        for values in batch:
            number += 1
            yield RawRow(values, number, f"{path}, row {number:,}")


def _read_pair(path: Path) -> Iterator[RawRow]:
    first, second = pair_of(path)
    both = itertools.zip_longest(read_lines(first), read_lines(second))
    for number, (source, target) in enumerate(both, 1):
        if source is None or target is None:
            short, long = (first, second) if source is None else (second, first)
            raise DataError(
                f"{short}: it ends after line {number - 1:,}, but {long} goes on.",
                "Line n of one file belongs to line n of the other.",
            )
        values = {"source": source.rstrip("\r\n"), "target": target.rstrip("\r\n")}
        yield RawRow(values, number, f"{path}, line {number:,}")
