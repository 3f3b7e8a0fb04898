"""Input patterns to files, and the rule that keeps an output folder from replacing what is not ours."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from lexmill.data.decoding import raw_suffix
from lexmill.errors import DataError, FileError
from lexmill.files import PARTIAL_SUFFIX, explain_os_errors

SUPPORTED = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".html", ".htm", ".md")


def find_inputs(patterns: Sequence[str], base: Path) -> list[Path]:
    """The raw files that patterns name, sorted, each once.

    Args:
        patterns: each a file, a folder (searched through, hidden names and unknown suffixes left out)
            or a glob pattern such as `books/**/*.txt`.
        base: the folder that relative patterns start from.

    Raises:
        DataError: a pattern matches nothing, or a folder holds no file that can be read.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = base / pattern
        if path.is_dir():
            matches = _files_below(path)
        elif path.exists():
            matches = [path]
        else:
            # The base may itself contain characters that glob would interpret.
            hits = glob.glob(pattern, root_dir=base, recursive=True)
            matches = [file for hit in hits for file in _expand(base / hit)]
        if not matches:
            what = (
                "this folder holds no file that can be read" if path.is_dir() else "nothing matches this path"
            )
            raise DataError(
                f"{pattern}: {what} (seen from {base}).",
                f"Check its spelling; supported are {', '.join(SUPPORTED)}.",
            )
        found.update(Path(os.path.normpath(match)) for match in matches)
    return sorted(found)


def _expand(path: Path) -> list[Path]:
    return _files_below(path) if path.is_dir() else [path] if raw_suffix(path) in SUPPORTED else []


def _files_below(folder: Path) -> list[Path]:
    with explain_os_errors(folder, "read"):
        return [
            path
            for path in folder.rglob("*")
            if path.is_file()
            and raw_suffix(path) in SUPPORTED
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]


def refuse_foreign_folder(folder: Path, ours: Collection[str]) -> None:
    """Refuse to replace a folder that holds anything but files of these names.

    Raises:
        FileError: it holds other things, or is no folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileError(
            f"{folder}: a file stands where the output folder is needed.",
            "Move it or choose another folder with --out.",
        )
    with explain_os_errors(folder, "read"):
        names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in ours and not name.endswith(PARTIAL_SUFFIX)]
    if foreign:
        raise FileError(
            f"{folder}: this folder holds '{foreign[0]}', which lexmill did not write there; the output would replace "
            "the whole folder.",
            "Choose a new or empty folder with --out.",
        )


def find_root(root: str, recipe: Path) -> Path | None:
    """The folder that a recipe's relative paths start from: `root` from the recipe's folder, or as it stands."""
    candidates = [recipe / root, Path(root)] if root else [recipe]
    return next((folder for folder in candidates if folder.is_dir()), None)
