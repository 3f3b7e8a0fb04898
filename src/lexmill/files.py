"""Files that are either whole or absent: atomic writes, content hashes, locks, and clear errors.

Whatever lexmill writes appears under its final name in one rename, after its bytes are on the
disk. A process killed at any instant leaves only names that begin with `.` and end in `.partial`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lexmill.errors import FileError, FormatError

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def explain_os_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into `FileError`s that say what to do.

    Args:
        path: what was being read or written.
        doing: how to say it, e.g. "write".
    """
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "Free some disk space or choose another folder with --out, then run the same command again.",
            errno.EDQUOT: "Your disk quota is used up; free some space or choose another folder with --out.",
            errno.EACCES: "Check the permissions of that path, or choose another folder with --out.",
            errno.EPERM: "Check the permissions of that path, or choose another folder with --out.",
            errno.EROFS: "That file system is read-only; choose another folder with --out.",
            errno.ENOENT: "Check the spelling of the path.",
            errno.ENOTDIR: "A file stands where a folder is needed; move it or choose another folder.",
            errno.EISDIR: "A folder stands where a file is needed; move it or choose another name.",
            errno.EFBIG: "The file would be larger than the system allows; check ulimit -f or choose another folder with --out.",
            errno.EEXIST: "Move what stands there or choose another name.",
        }
        if error.errno not in hints:
            raise
        raise FileError(f"Cannot {doing} {path}: {os.strerror(error.errno)}.", hints[error.errno]) from error


def partial_name(path: Path) -> Path:
    """A fresh hidden name beside `path`, on the same file system, for work that is not finished."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an error.

    Args:
        path: the final name; missing parent folders are made.
        mode: "wb" for bytes or "w" for UTF-8 text with `\\n` line ends.

    Raises:
        FileError: no space, no permission, or a folder in the way. Nothing is left behind.
    """
    path = Path(path)
    partial = partial_name(path)
    with explain_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
            with open(partial, mode, **text) as file:  # type: ignore[call-overload]
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically, keys in the order given."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path | str, values: Iterable[Any]) -> None:
    """Write values as JSON, one a line, atomically."""
    with atomic_write(path, "w") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_json(path: Path | str, what: str = "JSON file") -> Any:
    """Read a JSON file.

    Raises:
        FileError: it cannot be opened.
        FormatError: it is not UTF-8 or not JSON; says the line.
    """
    path = Path(path)
    with explain_os_errors(path, "read"):
        raw = path.read_bytes()
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: this {what} is not valid UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path}, line {error.lineno}: this {what} is not valid JSON: {error.msg}.",
            "It may be cut off; make it again or copy it again from its source.",
        ) from error
    except RecursionError as error:
        raise FormatError(f"{path}: this {what} is nested too deeply.") from error


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Fill a folder that replaces `path` only when the block ends without an error.

    Yields:
        A hidden folder beside `path` to write into.
    """
    path = Path(path)
    partial = partial_name(path)
    with explain_os_errors(path, "write"):
        partial.mkdir(parents=True)
        try:
            yield partial
            replace_path(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_path(source: Path, destination: Path) -> None:
    """Move a file or folder over another one. The old one is gone only after the new one stands."""
    if destination.is_dir() and not destination.is_symlink():
        old = partial_name(destination)
        os.replace(destination, old)
        os.replace(source, destination)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, destination)


def remove_partials(folder: Path) -> None:
    """Delete what killed processes left in `folder` and below. Call it only while holding its lock."""
    for path in sorted(folder.rglob(f".*{PARTIAL_SUFFIX}")):  # a list first: folders go while it is walked
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with explain_os_errors(Path(path), "read"), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_kept_copy(path: Path | str) -> bool:
    """Whether a file only repeats a model beside it in a form that starts faster; it comes and goes at any time."""
    return str(path).endswith((".packed", ".gguf.tokenizer"))


def sha256_json(value: Any) -> str:
    """The SHA-256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def require_file(path: Path | str, what: str, hint: str = "Check the spelling of the path.") -> Path:
    """`path` if it is a regular file.

    Raises:
        FileError: it is missing, or is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder, not a {what}.", hint)
    if not path.is_file():
        raise FileError(f"{path}: there is no such {what}.", hint)
    return path


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        FileError: the file system that will hold `folder` has less than `needed_bytes` left.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise FileError(
            f"{what} needs about {needed_bytes / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB left.",
            "Free some disk space or choose another folder with --out.",
        )


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold `path` as a lock for the length of the block; the system frees it when the process dies.

    Raises:
        FileError: another process holds it.
    """
    with explain_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    with file:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no lock rather than no lexmill
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(
                f"Another process is already working on {what}.",
                "Wait for it to end, or choose another folder with --out.",
            ) from error
        yield
