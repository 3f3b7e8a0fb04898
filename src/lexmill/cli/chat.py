"""`lexmill chat`: talk to a model, with history, several lines, /reset and /save."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import (
    AnyModel,
    Backend,
    Grammar,
    JsonSchema,
    MaxTokens,
    MinP,
    Penalty,
    Regex,
    Seed,
    Temperature,
    TopK,
    TopP,
    begin_computing,
    read_form,
)

_HELP = """\
Enter sends; Alt+Enter (or Esc, then Enter) begins a new line.
/reset        forget the conversation
/save FILE    write the conversation as one line of JSON (a row for fine-tuning)
/help         this text
/exit         leave (also Ctrl-D)
Ctrl-C stops a reply, and clears a line that is being typed."""


def chat(
    model: AnyModel,
    system: Annotated[str, typer.Option("--system", help="A system message to begin with.")] = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    backend: Backend = "auto",
) -> None:
    """Talk to a model. In a pipe, each line of standard input is one message."""
    begin_computing()
    from lexmill.errors import ModelError
    from lexmill.inference.language_model import generation_config, load

    config = generation_config(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        **read_form(json_schema, regex, grammar),
    )
    loaded = load(model, backend=backend)
    if not loaded.tokenizer.chat_template:
        raise ModelError(
            f"{model}: this model has no chat template.",
            "It was not made for chat; use 'lexmill generate' or 'lexmill fill' instead.",
        )
    conversation = Conversation(loaded, config, system)
    if sys.stdin.isatty():
        typer.echo(f"Talking to {model}. /help lists the commands.\n")
    for line in _lines():
        try:
            if not conversation.take(line):
                break
        except KeyboardInterrupt:  # between two tokens, or before the first
            if not sys.stdin.isatty():
                raise
            typer.echo(" (stopped)")


def _lines() -> Any:
    """Messages from a terminal with history and editing, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = PromptSession(history=InMemoryHistory(), key_bindings=keys, multiline=True)
    while True:
        try:
            yield session.prompt("you > ")
        except KeyboardInterrupt:  # clears the line
            if not session.default_buffer.text:
                typer.echo("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            return


class Conversation:
    """The messages so far, and what a line of input does to them."""

    def __init__(self, model: Any, config: Any, system: str) -> None:
        self._model, self._config, self._system = model, config, system
        self.messages: list[dict[str, str]] = []
        self._reset()

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def take(self, line: str) -> bool:
        """Act on one message or command; False ends the chat."""
        command, _, rest = line.strip().partition(" ")
        if not command:
            return True
        if command in ("/exit", "/quit"):
            return False
        if command == "/help":
            typer.echo(_HELP)
        elif command == "/reset":
            self._reset()
            typer.echo("(the conversation is forgotten)")
        elif command == "/save":
            self._save(rest.strip())
        elif command.startswith("/"):
            typer.echo(f"There is no command {command}; /help lists them.")
        else:
            self._answer(line)
        return True

    def _save(self, name: str) -> None:
        import json

        from lexmill.errors import LexmillError
        from lexmill.files import atomic_write

        if not name:
            typer.echo("Say where: /save FILE")
            return
        try:
            with atomic_write(Path(name), "w") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            typer.echo(f"(written to {name})")
        except LexmillError as error:
            typer.echo(str(error))

    def _answer(self, line: str) -> None:
        from lexmill.errors import LexmillError

        self.messages.append({"role": "user", "content": line})
        reply, ended = "", ""
        try:
            self._make_room()
            for step in self._model.stream_chat(self.messages, self._config):
                reply += step.text
                sys.stdout.write(step.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            ended = " (stopped)"
        except LexmillError as error:
            ended = f"\n{error}" if reply else str(error)
        sys.stdout.write(f"{ended}\n")
        if ended and not reply:  # as if it had not been asked
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": reply})

    def _make_room(self) -> None:
        """Drop the oldest turns when the conversation no longer fits, and say so."""
        room = self._model.config.context - min(self._config.max_tokens, self._model.config.context // 2)
        first = 1 if self._system else 0
        dropped = 0
        while len(self.messages) - first > 1:
            if len(self._model.tokenizer.encode(self._model.render_chat(self.messages))) <= room:
                break
            del self.messages[first : first + 2]
            dropped += 2
        if dropped:
            typer.echo(
                f"(the oldest {dropped} messages no longer fit in the model's context and are forgotten)"
            )
