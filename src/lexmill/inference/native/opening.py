"""Whether a model runs in the engine, and how its backend is started; nothing heavy is imported before that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lexmill.errors import ConfigError
from lexmill.inference.backend import Backend
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_model import GGUFModel

if TYPE_CHECKING:
    from lexmill.inference.native.sources import Source


def engine_for(
    model: ModelDirectory | GGUFModel, backend: str, problem: str = ""
) -> Callable[[], Backend] | None:
    """What starts the engine for a model; None where torch computes.

    Args:
        backend: one of `lexmill.inference.backend.BACKENDS`.
        problem: what of the request only torch has.

    Raises:
        ConfigError: the engine was asked for something that only torch has.
        ModelError: it was asked for, but is not built.
    """
    if backend == "torch":
        return None
    if problem:
        if backend == "native":
            raise ConfigError(f"The engine does not run a model with {problem}.", "Take --backend torch.")
        return None
    from lexmill.inference.native.library import available, library

    if backend == "native":
        library()  # says what is missing
    return (lambda: _open(model)) if available() else None


def _open(model: ModelDirectory | GGUFModel) -> Backend:
    from lexmill.inference.native.backend import NativeBackend
    from lexmill.inference.native.engine import NativeEngine
    from lexmill.inference.native.sources import DirectorySource, GGUFSource

    source: Source
    if isinstance(model, GGUFModel):
        source = GGUFSource(model.file, model.config)
    else:
        source = DirectorySource(model)
    return NativeBackend(NativeEngine.open(source), source.float32)
