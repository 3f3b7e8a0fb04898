"""`lexmill verify`: do all runtimes give the same answers?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import Json, Model, Quiet, begin_computing, console, make_progress, print_json


def verify(
    model: Model,
    gguf: Annotated[
        list[Path] | None, typer.Option("--gguf", help="A GGUF file of the model; may repeat.")
    ] = None,
    ollama: Annotated[
        str,
        typer.Option(
            "--ollama", metavar="NAME|URL", help="Ask a running Ollama too: NAME, or http://host:port/NAME."
        ),
    ] = "",
    llama_server: Annotated[
        Path | None,
        typer.Option(
            "--llama-server", help="Run GGUF files in this llama-server, not in the xllamacpp wheel."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the greedy continuations.", min=1)] = 64,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the checks to this JSON file.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Known limits of a runtime count as differences.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check token ids, logits, written text and embeddings against transformers and llama.cpp.

    Exit code 0: all equal, but for ties and known limits of a runtime, which are told. 1: a difference.
    2: something could not be checked.
    """
    begin_computing()
    from lexmill.inference.language_model import find_model
    from lexmill.runtimes.verify import verify as run_verify

    path = find_model(model)
    files = gguf if gguf else sorted((path.parent / "export").glob("*.gguf"))
    report = run_verify(
        path,
        files,
        tokens=tokens,
        ollama=ollama,
        llama_server=llama_server,
        progress=make_progress(quiet or json),
    )
    if out:
        report.write(out)
    if json:
        print_json(report.to_json())
    else:
        show_checks(report.to_json(), console())
    raise typer.Exit(1 if strict and report.limited else report.exit_code)


def show_checks(report: dict[str, Any], screen: Any) -> None:
    """Print one row a check and one column a runtime, lexmill's engine apart; details of what is not plainly equal, and causes, follow."""
    from rich.table import Table
    from rich.text import Text

    checks: list[dict[str, Any]] = report["checks"]
    words: dict[Any, tuple[str, str]] = {
        True: ("equal", "green"),
        False: ("DIFFERENT", "bold red"),
        None: ("not checked", "yellow"),
    }
    ours = [check for check in checks if check["runtime"].split()[0] == "engine"]
    parts = (
        ("the same answers as lexmill?", [check for check in checks if check not in ours]),
        ("and in lexmill's own engine?", ours),
    )
    for title, part in parts:
        if not part:
            continue
        table = Table(title=title, title_justify="left")
        table.add_column("check", no_wrap=True)
        runtimes = list(dict.fromkeys(check["runtime"] for check in part))
        for runtime in runtimes:
            heading = (
                runtime.removeprefix("engine ").replace("engine", "the model") if part is ours else runtime
            )
            table.add_column(heading, overflow="fold", no_wrap=" " not in runtime)
        for name in dict.fromkeys(check["check"] for check in part):
            cells = []
            for runtime in runtimes:
                found = [check for check in part if check["runtime"] == runtime and check["check"] == name]
                if not found:
                    cells.append(Text("-"))
                    continue
                word, style = ("limit", "yellow") if _limits(found[0]) else words[found[0]["passed"]]
                cells.append(Text(word + ("*" if _with_ties(found[0]) else ""), style))
            table.add_row(name, *cells)
        screen.print(table)
    screen.print("Figures, tolerances and details are in the JSON and in the report.", style="dim")
    for check in checks:
        if _with_ties(check):
            screen.print(Text(f"* {check['runtime']}, {check['check']}: {check['detail']}"))
        elif check["passed"] is not True:
            state = words[check["passed"]][0]
            screen.print(Text(f"{check['runtime']}, {check['check']}: {state}. {check['detail']}"))
        elif _limits(check):
            screen.print(
                Text(f"{check['runtime']}, {check['check']}: equal but for limits. {check['detail']}")
            )
        for limit in _limits(check):
            screen.print(Text(f"Limit of the runtime, which no file changes: {limit}.", "yellow"))
    for diagnosis in report.get("diagnoses", []):
        screen.print(Text(f"Likely cause, {diagnosis['runtime']}: {diagnosis['cause']}", "bold"))


def _with_ties(check: dict[str, Any]) -> bool:
    """Whether a check passed only because the runtime's rounding explains the texts that differ."""
    return check["passed"] is True and bool(check.get("ties"))


def _limits(check: dict[str, Any]) -> list[str]:
    """What the runtime does otherwise by its own rules, where the check passed up to that."""
    return list(check.get("limits") or []) if check["passed"] is True else []
