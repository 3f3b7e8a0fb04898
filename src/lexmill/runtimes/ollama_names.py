"""Names of models in Ollama: `[host/][namespace/]model[:tag]`, and what may stand in each part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from lexmill.errors import ConfigError

DEFAULT_HOST = "registry.ollama.ai"  # a folder's name in a store, and nothing that we connect to
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

# Ollama, types/model/name.go: the first character of a part is a letter, a digit or "_".
_PARTS = {
    "host": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"),
    "namespace": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"),
    "model": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"),
    "tag": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"),
}
_FORM = "A name is like my-model, my-model:v2 or someone/my-model:v2; letters, digits, '-', '_' and '.'."


@dataclass(frozen=True, order=True)
class ModelName:
    """A complete name, every part of it valid: safe to make a path of."""

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        for part, form in _PARTS.items():
            value = getattr(self, part)
            if not form.fullmatch(value):
                said = f"the {part} {value[:90]!r} is not allowed" if value else f"the {part} is missing"
                raise ConfigError(f"This is no name of a model in Ollama: {said}.", _FORM)

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read a name as Ollama does; what is left out becomes its default.

        Raises:
            ConfigError: it is not valid; says which part.
        """
        tag = DEFAULT_TAG
        if text.rfind(":") > text.rfind("/"):  # a colon further left belongs to a host's port
            text, _, tag = text.rpartition(":")
        parts = text.rsplit("/", 2)
        host, namespace = [DEFAULT_HOST, DEFAULT_NAMESPACE][: 3 - len(parts)] + parts[:-1]
        return cls(host.partition("://")[2] or host, namespace, parts[-1], tag)

    @classmethod
    def from_path(cls, path: PurePosixPath) -> ModelName:
        """The name whose manifest lies at `host/namespace/model/tag` under a store's manifests.

        Raises:
            ConfigError: another number of parts, or one that is not valid.
        """
        if len(path.parts) != 4:
            raise ConfigError(f"{path} is not a path of the form host/namespace/model/tag.", _FORM)
        return cls(*path.parts)

    @property
    def path(self) -> PurePosixPath:
        """Where its manifest lies under a store's manifests."""
        return PurePosixPath(self.host, self.namespace, self.model, self.tag)

    @property
    def folded(self) -> ModelName:
        """The same in lower case; Ollama takes two names that are equal so for one."""
        return ModelName(*(part.lower() for part in self.path.parts))

    def __str__(self) -> str:
        shortest = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{shortest}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{shortest}"
        return shortest


def as_spelled(name: ModelName, existing: list[ModelName]) -> ModelName:
    """`name` with each part spelled as in a name that a store has already, where only the case differs.

    Ollama does the same before it writes, part by part (server/routes.go, getExistingName).
    """
    parts = [
        next((old for old in (other.path.parts[at] for other in sorted(existing)) if _same(old, part)), part)
        for at, part in enumerate(name.path.parts)
    ]
    return ModelName(*parts)


def _same(left: str, right: str) -> bool:
    return left.lower() == right.lower()
