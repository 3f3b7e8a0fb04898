"""`metrics.jsonl`: one JSON object a line, whole even after a run was killed and went on.

Whoever else wants a run's figures as they come (the terminal, trackers) listens to this log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexmill.files import atomic_write, explain_os_errors


class MetricsLog:
    """Appends figures; after a resume the lines of steps that will be done again are dropped."""

    def __init__(self, path: Path | None) -> None:
        self.path = path  # None: nothing is written, as in all processes of a run but the first
        self._file: Any = None
        self._flushed = time.perf_counter()
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # each is called with every line

    def resume(self, step: int) -> None:
        """Keep the lines up to `step` and open the file for more."""
        if self.path is None:
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step] if step else []
        with atomic_write(self.path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        with explain_os_errors(self.path, "write"):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **figures: Any) -> None:
        """Append one line; it reaches the disk within a second or so."""
        if self.path is None:
            return
        with explain_os_errors(self.path, "write"):
            self._file.write(json.dumps(figures) + "\n")
            if time.perf_counter() - self._flushed > 1:
                self.flush()
        for listener in self.listeners:
            listener(figures)

    def flush(self) -> None:
        """Hand all lines to the system."""
        if self._file is not None:
            self._file.flush()
        self._flushed = time.perf_counter()

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; one that was cut off is passed over."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


def write_samples(path: Path, step: int, samples: Sequence[tuple[str, str]]) -> None:
    """Append what a model wrote at `step` to a JSONL file, one (prompt, text) a line.

    Lines of this step or later are replaced: they come from before a resume.
    """
    lines = [line for line in read_metrics(path) if line.get("step", 0) < step]
    lines += [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples]
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
