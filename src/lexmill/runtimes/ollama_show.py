"""What an installed model in an Ollama store is: its template, parameters and licences, and what its file says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from lexmill.errors import FormatError, LexmillError
from lexmill.formats.gguf import GGUFFile
from lexmill.progress import SILENT, Progress
from lexmill.runtimes.ollama_manifest import (
    ADAPTER,
    FILE_TYPE_LABELS,
    LICENSE,
    MODEL,
    PARAMS,
    SYSTEM,
    TEMPLATE,
    Layer,
    Manifest,
    human_number,
    strict_json,
)
from lexmill.runtimes.ollama_names import ModelName
from lexmill.runtimes.ollama_store import Store


@dataclass(frozen=True)
class Row:
    """A line of a list of models. `problem` is empty where all blobs are there."""

    name: str
    bytes: int
    modified: str
    parameters: str = ""
    quantisation: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Details:
    """An installed model. Texts come from the store as they are: they may hold anything."""

    name: str
    bytes: int
    modified: str
    model: str  # the path of the GGUF file, "" for a model of another form
    architecture: str
    parameters: str  # how many weights, as Ollama shows it
    quantisation: str
    capability: str  # "completion" or "embedding"
    context: int | None
    width: int | None
    template: str
    system: str
    settings: Mapping[str, Any]
    licences: tuple[str, ...]
    adapters: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The details as plain JSON values."""
        return asdict(self)

    def modelfile(self) -> str:
        """The model in the form of a Modelfile, for reading: as `ollama show --modelfile` prints it."""
        lines = [f"FROM {self.model}", *(f"ADAPTER {path}" for path in self.adapters)]
        if self.template:
            lines.append(f'TEMPLATE """{self.template}"""')
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        for key, value in self.settings.items():
            lines += [
                f"PARAMETER {key} {_value(item)}" for item in (value if isinstance(value, list) else [value])
            ]
        lines += [f'LICENSE """{text}"""' for text in self.licences]
        return "\n".join(lines) + "\n"


def list_models(store: Store) -> list[Row]:
    """Every model of a store. One that is damaged gets a line that says so."""
    return [_row(store, name) for name in store.names()]


def _row(store: Store, name: ModelName) -> Row:
    modified = _modified(store, name)
    try:
        manifest = store.read(name)
        problems = store.problems(manifest)
        config = _object(store, manifest.config)
        size, quantisation = str(config.get("model_type", "")), str(config.get("file_type", ""))
        return Row(str(name), manifest.size, modified, size, quantisation, problems[0] if problems else "")
    except LexmillError as error:
        return Row(str(name), 0, modified, problem=error.message)


def show_model(
    store: Store, name: ModelName, *, hashes: bool = False, progress: Progress = SILENT
) -> Details:
    """Read an installed model.

    Args:
        hashes: read every blob whole and compare it with its name.

    Raises:
        FileError: the store has no such model.
        FormatError: its manifest, or a text that it names, is damaged or hostile.
    """
    name = store.find(name)
    manifest = store.read(name)
    problems = store.problems(manifest, hashes, progress)
    facts = _facts(store, manifest, problems)
    config = _object(store, manifest.config)
    return Details(
        name=str(name),
        bytes=manifest.size,
        modified=_modified(store, name),
        template="".join(_texts(store, manifest, TEMPLATE)[-1:]),  # the last one counts
        system="".join(_texts(store, manifest, SYSTEM)[-1:]),
        settings={
            key: value for layer in manifest.of(PARAMS) for key, value in _object(store, layer).items()
        },
        licences=tuple(_texts(store, manifest, LICENSE)),
        adapters=tuple(str(store.blobs / f"sha256-{layer.sha256}") for layer in manifest.of(ADAPTER)),
        problems=tuple(problems),
        **{
            "model": "",
            "architecture": str(config.get("model_family", "")),
            "parameters": str(config.get("model_type", "")),
            "quantisation": str(config.get("file_type", "")),
            "capability": "completion",
            "context": None,
            "width": None,
            **facts,
        },
    )


def _facts(store: Store, manifest: Manifest, problems: list[str]) -> dict[str, Any]:
    """What the GGUF file says of itself; what stands in the way joins `problems`."""
    layers = manifest.of(MODEL)
    if not layers:
        return {}
    try:
        path = store.blob_path(layers[-1])
    except FormatError:
        return {}  # `problems` says so already
    try:
        with GGUFFile.open(path) as file:
            metadata = file.metadata
            weights = sum(math.prod(info.shape) for info in file.tensors.values())
    except LexmillError as error:
        problems.append(error.message)
        return {"model": str(path)}
    family = str(metadata.get("general.architecture", ""))

    def count(key: str) -> int | None:
        value = metadata.get(f"{family}.{key}")
        return value if isinstance(value, int) else None

    facts = {
        "model": str(path),
        "architecture": family,
        "parameters": human_number(weights),
        # a pooling is how Ollama tells a model that embeds from one that writes
        "capability": "embedding" if f"{family}.pooling_type" in metadata else "completion",
        "context": count("context_length"),
        "width": count("embedding_length"),
    }
    file_type = metadata.get("general.file_type")
    label = FILE_TYPE_LABELS.get(file_type) if isinstance(file_type, int) else None
    return facts | ({"quantisation": label} if label else {})


def _texts(store: Store, manifest: Manifest, media_type: str) -> list[str]:
    return [store.read_blob(layer).decode("utf-8", "replace") for layer in manifest.of(media_type)]


def _object(store: Store, layer: Layer) -> dict[str, Any]:
    where = str(store.blobs / f"sha256-{layer.sha256}")
    values = strict_json(store.read_blob(layer), where)
    if not isinstance(values, dict):
        raise FormatError(f"{where}: this should be a JSON object.", "Install the model again.")
    return values


def _modified(store: Store, name: ModelName) -> str:
    try:
        seconds = store.manifest_path(name).lstat().st_mtime
    except OSError:
        return ""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _value(item: Any) -> str:
    return f'"{item}"' if isinstance(item, str) else str(item)
