"""Ollama's manifests: which blobs make a model. Read from files that may be hostile, written as Ollama does.

Formats: Ollama, manifest/*.go and types/model/config.go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexmill.errors import FormatError

MODEL, ADAPTER, PROJECTOR, TEMPLATE, SYSTEM, PARAMS, MESSAGES, LICENSE = (
    f"application/vnd.ollama.image.{kind}"
    for kind in ("model", "adapter", "projector", "template", "system", "params", "messages", "license")
)
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

# Models of thousands of tensor layers have manifests of about a megabyte.
MAX_MANIFEST_BYTES = 4 << 20
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_DAMAGED = "The store is damaged or not to be trusted; remove the model with 'lexmill ollama rm' and install it again."

# general.file_type to the label that Ollama shows (fs/ggml/type.go); it calls 0 "unknown", we call it what it is.
FILE_TYPE_LABELS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


def digest_hex(digest: Any, where: str) -> str:
    """The 64 hexadecimal digits of a digest, once it is sure that it is one: they become part of a path.

    Raises:
        FormatError: it is no SHA-256 digest.
    """
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise FormatError(f"{where}: {str(digest)[:90]!r} is no SHA-256 digest.", _DAMAGED)
    return match[1]


@dataclass(frozen=True)
class Layer:
    """One blob of a model. `sha256` are 64 hexadecimal digits."""

    media_type: str
    sha256: str
    size: int

    @property
    def digest(self) -> str:
        """As manifests spell it."""
        return f"sha256:{self.sha256}"

    def to_json(self) -> dict[str, Any]:
        """The layer as it stands in a manifest."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Manifest:
    """The blobs that make a model: its config, and layers in their order."""

    config: Layer
    layers: tuple[Layer, ...]

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """Every blob that it needs."""
        return (*self.layers, self.config)

    @property
    def size(self) -> int:
        """Bytes of all its blobs."""
        return sum({layer.sha256: layer.size for layer in self.blobs}.values())

    def of(self, media_type: str) -> tuple[Layer, ...]:
        """Its layers of one kind."""
        return tuple(layer for layer in self.layers if layer.media_type == media_type)

    def to_bytes(self) -> bytes:
        """The manifest file."""
        return go_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self.config.to_json(),
                "layers": [layer.to_json() for layer in self.layers],
            }
        )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        FormatError: too long, no JSON, a key twice, or not of a manifest's form; says what.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError(
            f"{where}: a manifest of more than {MAX_MANIFEST_BYTES:,} bytes is not plausible.", _DAMAGED
        )
    values = strict_json(data, where)
    if not isinstance(values, dict) or values.get("schemaVersion") != 2:
        raise FormatError(f"{where}: this is no manifest of version 2.", _DAMAGED)
    layers = values.get("layers")
    if not isinstance(layers, list):
        raise FormatError(f"{where}: 'layers' is not a list.", _DAMAGED)
    return Manifest(
        _parse_layer(values.get("config"), f"{where}: the config"),
        tuple(_parse_layer(layer, f"{where}: layer {number}") for number, layer in enumerate(layers, 1)),
    )


def _parse_layer(value: Any, where: str) -> Layer:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not an object.", _DAMAGED)
    media_type, size = value.get("mediaType"), value.get("size")
    if not isinstance(media_type, str):
        raise FormatError(f"{where}: 'mediaType' is not a text.", _DAMAGED)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise FormatError(f"{where}: the size {str(size)[:40]!r} is not a number of bytes.", _DAMAGED)
    return Layer(media_type, digest_hex(value.get("digest"), where), size)


def strict_json(data: bytes, where: str) -> Any:
    """JSON in which no key stands twice: two readers could take different ones for the true one.

    Raises:
        FormatError: it is not UTF-8, no JSON, nested without end, or has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = next(key for key in values if sum(key == other for other, _ in pairs) > 1)
            raise ValueError(f"the key {twice[:40]!r} stands there twice")
        return values

    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no number in JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise FormatError(f"{where}: this is not the JSON that it should be: {said}.", _DAMAGED) from error


def go_json(value: Any) -> bytes:
    """JSON byte for byte as Go's encoder writes it, so that equal contents get equal digests."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # Go escapes them for HTML's sake
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (text + "\n").encode("utf-8")


def config_json(architecture: str, parameters: int, file_type: int | None, requires: str = "") -> bytes:
    """The config blob of a model in a GGUF file.

    Args:
        architecture: of llama.cpp, e.g. "llama".
        parameters: how many weights it has.
        file_type: `general.file_type` of the file, None where it has none.
        requires: the oldest version of Ollama that can run it; empty for any.
    """
    values: dict[str, Any] = {
        "model_format": "gguf",
        "model_family": architecture,
        "model_families": [architecture],
        "model_type": human_number(parameters),
        "file_type": FILE_TYPE_LABELS.get(-1 if file_type is None else file_type, "unknown"),
    }
    if requires:
        values["requires"] = requires
    return go_json(
        values | {"architecture": "amd64", "os": "linux"}
    )  # the last two mean nothing; all have them


def params_json(parameters: Mapping[str, Any]) -> bytes:
    """The blob of parameters; Go sorts the keys of maps."""
    return go_json({key: parameters[key] for key in sorted(parameters)})


def human_number(count: int) -> str:
    """`134515008` becomes `134.52M`, as Ollama shows numbers of weights."""
    for size, letter, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= size:
            return f"{count // size}{letter}" if count % size == 0 else f"{count / size:.{digits}f}{letter}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)
