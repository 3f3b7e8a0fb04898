"""The entry point: gathers the verbs, and turns errors that a user can mend into a message and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from lexmill.cli import (
    answer,
    bench,
    chat,
    classify,
    data,
    doctor,
    embed,
    evaluate,
    explain,
    export,
    fill,
    finetune,
    generate,
    imatrix,
    import_model,
    merge,
    next_sentence,
    ollama,
    prepare,
    pretrain,
    push,
    report,
    run,
    tokenizer,
    verify,
    write,
)

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


app.command("run")(_guarded(run.run))
app.command("prepare")(_guarded(prepare.prepare))
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.command("pretrain")(_guarded(pretrain.pretrain))
app.command("finetune")(_guarded(finetune.finetune))
app.command("merge")(_guarded(merge.merge))
app.command("evaluate")(_guarded(evaluate.evaluate))
app.command("generate")(_guarded(generate.generate))
app.command("chat")(_guarded(chat.chat))
app.command("fill")(_guarded(fill.fill))
app.command("next-sentence")(_guarded(next_sentence.next_sentence))
app.command("classify")(_guarded(classify.classify))
app.command("answer")(_guarded(answer.answer))
app.command("translate")(_guarded(write.translate))
app.command("summarise")(_guarded(write.summarise))
app.command("embed")(_guarded(embed.embed))
app.add_typer(explain.app, name="explain")
app.command("import")(_guarded(import_model.import_model))
app.add_typer(export.app, name="export")
app.add_typer(ollama.app, name="ollama")
app.command("imatrix")(_guarded(imatrix.imatrix))
app.command("push")(_guarded(push.push))
app.command("verify")(_guarded(verify.verify))
app.command("report")(_guarded(report.report))
app.command("bench")(_guarded(bench.bench))
app.command("doctor")(_guarded(doctor.doctor))


def _version(asked: bool) -> None:
    if asked:
        from lexmill import __version__

        typer.echo(f"lexmill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_version, is_eager=True
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    from lexmill.errors import LexmillError
    from lexmill.files import explain_os_errors

    try:
        from pathlib import Path

        with explain_os_errors(Path.cwd(), "work in"):
            app()
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
