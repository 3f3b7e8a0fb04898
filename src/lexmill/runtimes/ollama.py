"""Models for Ollama: the Modelfile that goes with a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

from lexmill.errors import ConfigError, ModelError
from lexmill.files import atomic_write, require_file
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.model_card import licences
from lexmill.tokenizer.special import CHAT_TEMPLATE, GO_TEMPLATE, STOP_STRINGS


def write_modelfile(
    model: ModelDirectory | Path | str, gguf: Path | str, out: Path | str, system: str = ""
) -> Path:
    """Write the Modelfile for a GGUF file, so that `ollama create NAME -f Modelfile` installs the model.

    Args:
        model: the model directory that the GGUF file was made of, or its path.
        gguf: the GGUF file; the Modelfile names it relative to its own folder.
        out: the Modelfile.
        system: a system prompt for conversations that bring none; empty for none.

    Returns:
        `out`.

    Raises:
        ModelError: the model is no decoder, has no chat template, or one that has no Go form here.
        ConfigError: a text that a Modelfile cannot express.
        FileError: there is no such GGUF file.

    Grammar: Ollama, docs/modelfile.mdx and parser/parser.go.
    """
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    out = Path(out)
    require_decoder(model)
    gguf = require_file(gguf, "GGUF file", "Export one first: lexmill export gguf.")
    if model.tokenizer.chat_template != CHAT_TEMPLATE:
        what = "a chat template of its own" if model.tokenizer.chat_template else "no chat template"
        raise ModelError(
            f"{model.path}: this model has {what}; only lexmill's own has a form in Ollama's Go templates.",
            "Leave the Modelfile out: Ollama reads the chat template in the GGUF file.",
        )
    lines = [
        f"# {_one_line(str(model.lineage.get('name') or model.path.resolve().name))}",
        f"FROM {_path(gguf, out)}",
        "",
        "# The same text as the model's chat_template.jinja, in Go's template language.",
        f"TEMPLATE {_quoted(GO_TEMPLATE)}",
        "",
        *(f"PARAMETER stop {_quoted_line(text)}" for text in STOP_STRINGS),
        f"PARAMETER num_ctx {model.config.context}",
        "# Ollama samples at temperature 0.8 unless told otherwise. For the greedy answers that the other",
        "# runtimes give, ask with temperature 0.",
    ]
    if system:
        lines += ["", f"SYSTEM {_quoted(system)}"]
    for licence in licences(model.lineage):
        lines += ["", f"LICENSE {_quoted(licence)}"]
    with atomic_write(out, "w") as file:
        file.write("\n".join(lines) + "\n")
    return out


def require_decoder(model: ModelDirectory) -> None:
    """Ollama writes text with decoders only.

    Raises:
        ModelError: a model of another shape.
    """
    if model.config.shape != "decoder":
        kind = "an encoder" if model.config.shape == "encoder" else "an encoder–decoder"
        raise ModelError(
            f"{model.path}: this model is {kind} ({model.config.family}); only decoders are exported to Ollama.",
            "It runs in transformers: lexmill export hf.",
        )


def _quoted(text: str) -> str:
    """A value of one or more lines. The parser ends it at the first line that ends in three quotes."""
    if '"""' in text:
        raise ConfigError('A text in a Modelfile cannot hold three double quotes (""") in a row.')
    if "\0" in text or "\r" in text:
        raise ConfigError("A text in a Modelfile cannot hold NUL or carriage-return characters.")
    return f'"""{text}"""'


def _quoted_line(text: str) -> str:
    assert '"' not in text and "\n" not in text, text
    return f'"{text}"'


def _path(gguf: Path, out: Path) -> str:
    try:
        path = Path(os.path.relpath(gguf.resolve(), out.resolve().parent)).as_posix()
    except ValueError:  # another drive
        path = gguf.resolve().as_posix()
    path = path if path.startswith(("../", "/")) else f"./{path}"
    if '"' in path or not path.isprintable():
        raise ConfigError(
            f"The path {path!r} cannot be written in a Modelfile.", "Rename the GGUF file or its folder."
        )
    return _quoted_line(path) if " " in path else path


def _one_line(text: str) -> str:
    return " ".join(text.split())
