"""The entry point: gathers the verbs, and turns errors that a user can mend into a message and exit code 2."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import typer

# Each verb: a module beside this one, and what of it is the verb, or the group of verbs.
VERBS = {
    "run": "run.run",
    "prepare": "prepare.prepare",
    "tokenizer": "tokenizer.app",
    "data": "data.app",
    "pretrain": "pretrain.pretrain",
    "finetune": "finetune.finetune",
    "merge": "merge.merge",
    "evaluate": "evaluate.evaluate",
    "generate": "generate.generate",
    "chat": "chat.chat",
    "fill": "fill.fill",
    "next-sentence": "next_sentence.next_sentence",
    "classify": "classify.classify",
    "answer": "answer.answer",
    "translate": "write.translate",
    "summarise": "write.summarise",
    "embed": "embed.embed",
    "explain": "explain.app",
    "import": "import_model.import_model",
    "export": "export.app",
    "ollama": "ollama.app",
    "imatrix": "imatrix.imatrix",
    "push": "push.push",
    "verify": "verify.verify",
    "report": "report.report",
    "bench": "bench.bench",
    "doctor": "doctor.doctor",
}


def make_app(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The command line with these verbs."""
    app = typer.Typer(
        name="lexmill",
        no_args_is_help=True,
        rich_markup_mode=None,  # plain help: rich alone would take longer to start than the rest
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=(
            "From raw data to a running language model.\n\n"
            "Begin with: lexmill run recipes/quickstart.toml\n\n"
            "Exit codes: 0 done; 1 verify found a difference, or data check bad rows; 2 something that you can mend; "
            "130 interrupted (the same command goes on)."
        ),
    )
    app.callback()(_options)
    for verb in verbs:
        module, name = VERBS[verb].split(".")
        found = getattr(importlib.import_module(f"lexmill.cli.{module}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb)
        else:
            app.command(verb)(_guarded(found))
    return app


def _guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb, but Ctrl-C says what comes next; typer alone would end without a word."""

    @functools.wraps(verb)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return verb(*arguments, **options)
        except KeyboardInterrupt:
            _complain("Interrupted.", "The same command goes on where it stopped.")
            raise typer.Exit(130) from None

    return guarded


def _version(asked: bool) -> None:
    if asked:
        from lexmill import __version__

        typer.echo(f"lexmill {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_version, is_eager=True
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line: with the verb that is asked for alone, since every other one takes time to describe."""
    from lexmill.errors import LexmillError
    from lexmill.files import explain_os_errors

    try:
        from pathlib import Path

        with explain_os_errors(Path.cwd(), "work in"):
            asked = sys.argv[1:2]
            make_app(asked if asked and asked[0] in VERBS else VERBS)()
    except LexmillError as error:
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except MemoryError:
        _complain("There is not enough memory.", "Lower 'rows' or 'micro_rows', or choose a smaller model.")
        sys.exit(2)


def _complain(message: str, hint: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text("error: ", style="bold red") + Text(message, style="not bold default")
    if hint:
        text += Text(f"\n{hint}", style="not bold cyan")
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


if __name__ == "__main__":
    main()
