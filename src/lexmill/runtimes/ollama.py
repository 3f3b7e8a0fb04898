"""Models for Ollama: what one is made of besides its GGUF file, as a Modelfile, in a store, or by a server."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.files import atomic_write, require_file
from lexmill.formats.gguf import GGUFFile
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_shapes import architecture, require_place
from lexmill.progress import SILENT, Progress
from lexmill.runtimes.llama_cpp import export_gguf, setting_differences
from lexmill.runtimes.model_card import licences
from lexmill.runtimes.ollama_manifest import (
    ADAPTER,
    LICENSE,
    PARAMS,
    SYSTEM,
    TEMPLATE,
    config_json,
    params_json,
)
from lexmill.runtimes.ollama_names import ModelName
from lexmill.runtimes.ollama_store import Store
from lexmill.runtimes.ollama_templates import find_go_template
from lexmill.tokenizer.special import CHAT_TEMPLATE, STOP_STRINGS

if TYPE_CHECKING:
    from lexmill.runtimes.ollama_api import OllamaServer

# The first version whose llama.cpp renders the Jinja template in the GGUF file.
_RENDERS_JINJA = "0.30.0"
# server/create.go has refused them since; a store's manifest is not looked at there.
ADAPTERS_UNTIL = "Ollama takes adapters up to version 0.34.0; newer ones need them merged."
# Memory for a context is taken whole when the model loads; above this Ollama chooses by the memory there is.
_MAX_CONTEXT = 8192


@dataclass(frozen=True, kw_only=True)
class OllamaModel:
    """What makes a model in Ollama, besides the GGUF file.

    Attributes:
        name: for a reader.
        template: Go template; empty for models that embed, and where Ollama is to read the GGUF file's.
        system: the prompt of conversations that bring none.
        parameters: by Ollama's names; "stop" is a list.
        licences: texts.
        requires: the oldest version of Ollama that can do it; empty for any.
    """

    name: str
    template: str = ""
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    licences: tuple[str, ...] = ()
    requires: str = ""

    def layers(self) -> list[tuple[str, bytes]]:
        """Media type and bytes of each layer that follows the model's, in Ollama's order (server/create.go)."""
        found = [
            (TEMPLATE, self.template),
            (SYSTEM, self.system),
            *((LICENSE, text) for text in self.licences),
        ]
        layers = [(media_type, text.encode("utf-8")) for media_type, text in found if text]
        return [*layers, (PARAMS, params_json(self.parameters))] if self.parameters else layers

    def modelfile(self, gguf: str, adapter: str = "") -> str:
        """The text of a Modelfile.

        Args:
            gguf: the path of the GGUF file as the Modelfile is to name it.
            adapter: of an adapter's GGUF file.

        Raises:
            ConfigError: a text that a Modelfile cannot express.
        """
        lines = [f"# {_one_line(self.name)}", f"FROM {gguf}"]
        if adapter:
            lines += [f"# {ADAPTERS_UNTIL}", f"ADAPTER {adapter}"]
        if self.template:
            lines += ["", "# The same text as the model's chat template, in Go's template language."]
            lines += [f"TEMPLATE {_quoted(self.template)}"]
        lines.append("")
        lines += [f"PARAMETER stop {_quoted_line(text)}" for text in self.parameters.get("stop", ())]
        lines += [f"PARAMETER {key} {value}" for key, value in self.parameters.items() if key != "stop"]
        if self.template:
            lines += [
                "# Ollama samples at temperature 0.8 unless told otherwise. For the greedy answers that the other",
                "# runtimes give, ask with temperature 0.",
            ]
        if self.system:
            lines += ["", f"SYSTEM {_quoted(self.system)}"]
        for licence in self.licences:
            lines += ["", f"LICENSE {_quoted(licence)}"]
        return "\n".join(lines) + "\n"

    def request(self) -> dict[str, Any]:
        """What `/api/create` is told, besides the name and the files."""
        told = {"template": self.template, "system": self.system, "license": list(self.licences)}
        return {**{key: value for key, value in told.items() if value}, "parameters": dict(self.parameters)}


def describe(model: ModelDirectory | Path | str, system: str = "", template: bool = True) -> OllamaModel:
    """What a model is to be in Ollama.

    Args:
        system: a system prompt for conversations that bring none; empty for none.
        template: find a Go template. Without, Ollama from 0.30 on has llama.cpp render the Jinja template
            that is in the GGUF file.

    Raises:
        ModelError: Ollama cannot run a model of this shape, or its chat template has no Go form.
        ConfigError: a system prompt for a model that takes none.
    """
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    require_shape(model)
    texts = tuple(licences(model.lineage))
    name = str(model.lineage.get("name") or model.path.resolve().name)
    parameters: dict[str, Any] = {}
    if model.config.context <= _MAX_CONTEXT:
        parameters["num_ctx"] = model.config.context
    if model.config.shape == "encoder":
        if system:
            raise ConfigError(
                f"{model.path}: a model that embeds texts takes no system prompt.", "Leave --system out."
            )
        return OllamaModel(name=name, parameters=parameters, licences=texts)
    tokenizer = model.tokenizer
    form = find_go_template(tokenizer) if template else None
    if form is not None and form.refusal:
        hint = "Ollama from 0.30 on renders the template in the GGUF file: install with --store and --no-template."
        if not tokenizer.chat_template:
            hint = "It was not made for chat. Install it with --store and --no-template, and ask Ollama with raw prompts."
        raise ModelError(f"{model.path}: this model has {form.refusal}.", hint)
    if system:
        _require_system(model, system)
    own = tokenizer.chat_template == CHAT_TEMPLATE
    stop = STOP_STRINGS if own else tuple(tokenizer.token_text(token) for token in tokenizer.ids.stop)
    return OllamaModel(
        name=name,
        template=form.template if form else "",
        system=system,
        parameters={"stop": list(stop), **parameters} if stop else parameters,
        licences=texts,
        requires=_RENDERS_JINJA if form is None and tokenizer.chat_template else "",
    )


def require_shape(model: ModelDirectory) -> None:
    """Ollama writes text with decoders and embeds it with BERT.

    Raises:
        ModelError: a model of another shape.
    """
    if model.config.shape == "encoder_decoder":
        raise ModelError(
            f"{model.path}: this model is an encoder–decoder ({model.config.family}); only decoders, and "
            "encoders for embeddings, are exported to Ollama.",
            "It runs in transformers: lexmill export hf.",
        )
    require_place(model.config, str(model.path))


def write_modelfile(
    model: ModelDirectory | Path | str,
    gguf: Path | str,
    out: Path | str,
    system: str = "",
    adapter: Path | str | None = None,
) -> Path:
    """Write the Modelfile for a GGUF file, so that `ollama create NAME -f Modelfile` installs the model.

    Args:
        model: the model directory that the GGUF file was made of, or its path.
        gguf: the GGUF file; the Modelfile names it relative to its own folder.
        out: the Modelfile.
        system: a system prompt for conversations that bring none; empty for none.
        adapter: the GGUF file of an adapter to be put on the model.

    Returns:
        `out`.

    Raises:
        ModelError: as `describe`.
        ConfigError: a text that a Modelfile cannot express.
        FileError: there is no such GGUF file.

    Grammar: Ollama, docs/modelfile.mdx and parser/parser.go.
    """
    out = Path(out)
    described = describe(model, system)
    gguf = require_file(gguf, "GGUF file", "Export one first: lexmill export gguf.")
    extra = _path(require_file(adapter, "GGUF file of an adapter"), out) if adapter is not None else ""
    text = described.modelfile(_path(gguf, out), extra)
    with atomic_write(out, "w") as file:
        file.write(text)
    return out


def install(
    model: ModelDirectory | Path | str,
    name: ModelName,
    store: Store,
    *,
    gguf: Path | None = None,
    type: str = "q8_0",
    system: str = "",
    template: bool = True,
    adapter: Path | None = None,
    progress: Progress = SILENT,
) -> ModelName:
    """Install a model in a store, where a server finds it at once. None needs to run.

    Args:
        gguf: a file of the model that is there already; None to make one of `type`.
        system, template: as for `describe`.
        adapter: the GGUF file of an adapter to be put on the model.

    Returns:
        The name as the store spells it.

    Raises:
        As `describe`, `export_gguf` and `Store.install`.
    """
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    described = describe(model, system, template)
    source: Path | Callable[[Path], object]
    if gguf is not None:
        source = require_file(gguf, "GGUF file")
        require_file_of(model, source)
    else:
        source = partial(export_gguf, model, type=type, progress=progress)
    config = partial(_config, requires=described.requires)
    layers: list[tuple[str, bytes | Path]] = [*described.layers()]
    if adapter is not None:  # right behind the model, as `ollama create` puts it
        layers.insert(0, (ADAPTER, require_file(adapter, "GGUF file of an adapter")))
    return store.install(name, source, layers, config, progress)


def create(
    model: ModelDirectory | Path | str,
    name: ModelName,
    server: OllamaServer,
    gguf: Path,
    *,
    system: str = "",
    adapter: Path | None = None,
    progress: Progress = SILENT,
) -> None:
    """Have a running server install a model: its GGUF file is sent unless it is there already.

    Raises:
        As `describe`; RuntimeFailure: the server refuses or breaks off; says what it said.
    """
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    described = describe(model, system)
    require_file_of(model, require_file(gguf, "GGUF file"))
    told: dict[str, Any] = {"files": {"model.gguf": server.upload(gguf, progress)}}
    if adapter is not None:
        told["adapters"] = {"adapter.gguf": server.upload(adapter, progress)}
    server.create(name, {**told, **described.request()}, progress)


def require_file_of(model: ModelDirectory, gguf: Path) -> None:
    """A GGUF file that says of itself what the model is.

    Raises:
        ModelError: it is the file of another model; names a setting that differs.
    """
    with GGUFFile.open(gguf) as file:
        found = file.metadata.get("general.architecture")
        wrong = [f"its architecture is {found}"] if found != architecture(model.config) else []
        wrong += setting_differences(file, model)
    if wrong:
        raise ModelError(
            f"{gguf} is not a file of {model.path}: {wrong[0]}.", "Make one: lexmill export gguf."
        )


def _config(path: Path, requires: str) -> bytes:
    """The config blob for a GGUF file."""
    with GGUFFile.open(path) as file:
        weights = sum(math.prod(info.shape) for info in file.tensors.values())
        architecture = str(file.metadata.get("general.architecture"))
        return config_json(architecture, weights, file.metadata.get("general.file_type"), requires)


def _require_system(model: ModelDirectory, system: str) -> None:
    """A system prompt that the model's own template writes.

    Raises:
        ConfigError: it refuses or drops one.
    """
    hint = "Leave --system out."
    try:
        system.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("The system prompt is not valid Unicode.", hint) from error
    if not model.tokenizer.chat_template:
        return
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    try:
        written = system in model.tokenizer.render_chat(messages)
    except DataError:
        written = False
    if not written:
        raise ConfigError(f"{model.path}: the chat template of this model takes no system prompt.", hint)


def _quoted(text: str) -> str:
    """A value of one or more lines. The parser ends it at the first line that ends in three quotes.

    It also drops what is not printable, joiners of emoji and no-break spaces among them.
    """
    if '"""' in text:
        raise ConfigError('A text in a Modelfile cannot hold three double quotes (""") in a row.', _ELSEWHERE)
    lost = next(
        (character for character in text if not character.isprintable() and character not in "\n\t"), None
    )
    if lost is not None:
        raise ConfigError(
            f"A text in a Modelfile cannot hold the character U+{ord(lost):04X}; Ollama drops it.", _ELSEWHERE
        )
    return f'"""{text}"""'


_ELSEWHERE = "Install the model with --store or --url, which can, or leave the character out."


def _quoted_line(text: str) -> str:
    if '"' in text or not text.isprintable():
        raise ConfigError(f"A stop string in a Modelfile cannot be {text!r}.", _ELSEWHERE)
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
