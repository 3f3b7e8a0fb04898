"""What several verbs share: option types, progress that fits the output, figures as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lexmill.progress import Progress

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write; whole or not at all.")]
OutOrNone = Annotated[
    Path | None, typer.Option("--out", "-o", help="Where to write; whole or not at all.", show_default=False)
]
Plan = Annotated[
    bool,
    typer.Option("--plan", help="Only say what it will cost: parameters, operations, memory, disk and time."),
]
PlanProcesses = Annotated[
    int | None,
    typer.Option(
        "--processes", metavar="N", min=1, help="With --plan: for so many processes [default: torchrun's]."
    ),
]
Model = Annotated[Path, typer.Argument(help="A model directory or a run directory.", metavar="MODEL")]
AnyModel = Annotated[
    Path, typer.Argument(help="A model directory, a run directory or a GGUF file.", metavar="MODEL")
]
Backend = Annotated[
    str, typer.Option("--backend", help="Who computes: native, lexmill's own engine; torch; or auto.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may repeat.")
]
Form = Annotated[
    str | None,
    typer.Option("--form", help="What the rows look like; recognised by the first ones.", show_default=False),
]

MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="At most so many new tokens.", min=0)]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy: always the likeliest.", min=0)
]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from the k likeliest; 0 for all.", min=0)]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest that together reach p.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop what is less than min-p times as likely as the best.")
]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 makes repetition less likely.")]
Presence = Annotated[
    float, typer.Option("--presence-penalty", help="Above 0 makes what was written less likely.")
]
Frequency = Annotated[
    float, typer.Option("--frequency-penalty", help="The same, for each time that it was written.")
]
JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", help="Write JSON of the schema in this file.", show_default=False),
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", help="Write a text that this expression matches whole.", show_default=False),
]
Grammar = Annotated[
    Path | None,
    typer.Option(
        "--grammar", help="Write a text of the grammar (Lark or GBNF) in this file.", show_default=False
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may repeat.")]


def console(stderr: bool = False) -> Any:
    """A rich console; NO_COLOR and pipes are honoured by rich itself."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=not sys.stdout.isatty())


def make_progress(quiet: bool = False) -> Progress:
    """A live view on a terminal, plain lines in a pipe, nothing with --quiet."""
    from lexmill.progress import SILENT, PlainProgress

    if quiet:
        return SILENT
    if not sys.stderr.isatty():
        return PlainProgress()
    from lexmill.cli.live import LiveProgress

    return LiveProgress(console(stderr=True))


def print_json(value: Any) -> None:
    """Print a value as JSON, for scripts."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def read_form(json_schema: Path | None, regex: str | None, grammar: Path | None) -> dict[str, Any]:
    """What the last three options of sampling ask for, for `generation_config`.

    Raises:
        FileError: a file is missing.
        DataError: it is not UTF-8.
    """
    from lexmill.data.decoding import read_text

    found: dict[str, Any] = {} if regex is None else {"regex": regex}
    for name, path in (("json_schema", json_schema), ("grammar", grammar)):
        if path is not None:
            found[name] = read_text(path)
    return found


def begin_computing() -> None:
    """Settings of a process that is about to compute: threads, and a malloc that keeps its memory."""
    import os

    from lexmill import devices

    os.environ.setdefault("OMP_NUM_THREADS", str(devices.threads()))
    devices.keep_freed_memory()
    devices.wait_briefly()
