"""Whether a model runs in the engine, and how its backend is started; nothing heavy is imported before that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lexmill.errors import ConfigError, ModelError
from lexmill.inference.backend import Backend
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_model import GGUFModel

if TYPE_CHECKING:
    from lexmill.inference.native.sources import Source


def engine_for(
    model: ModelDirectory | GGUFModel,
    backend: str,
    problem: str = "",
    draft: ModelDirectory | GGUFModel | None = None,
) -> Callable[[], Backend] | None:
    """What starts the engine for a model; None where torch computes.

    Args:
        backend: one of `lexmill.inference.backend.BACKENDS`.
        problem: what of the request only torch has.
        draft: a small model that guesses for it.

    Raises:
        ConfigError: the engine was asked for something that only torch has, or torch for a draft.
        ModelError: it was asked for, but is not built.
    """
    if draft is not None and (backend == "torch" or problem):
        raise ConfigError("Only lexmill's own engine takes guesses of another model.", "Leave the draft out.")
    if backend == "torch":
        return None
    if problem:
        if backend == "native":
            raise ConfigError(f"The engine does not run a model with {problem}.", "Take --backend torch.")
        return None
    from lexmill.inference.native.library import available, library

    if backend == "native" or draft is not None:
        library()  # says what is missing
    return (lambda: _open(model, draft)) if available() else None


def _open(model: ModelDirectory | GGUFModel, draft: ModelDirectory | GGUFModel | None) -> Backend:
    from lexmill.inference.native.backend import NativeBackend
    from lexmill.inference.native.engine import NativeEngine

    source, small = _source(model), None
    if draft is not None:
        if draft.config.shape != "decoder" or model.config.shape != "decoder":
            raise ConfigError("Decoders guess for decoders, and for nothing else.")
        if draft.tokenizer.vocabulary != model.tokenizer.vocabulary:
            raise ModelError(
                "The draft has another tokenizer than the model.", "Take a smaller model of its family."
            )
        small = NativeEngine.open(_source(draft))
    return NativeBackend(NativeEngine.open(source), source.float32, draft=small)


def _source(model: ModelDirectory | GGUFModel) -> Source:
    from lexmill.inference.native.sources import DirectorySource, GGUFSource

    if isinstance(model, GGUFModel):
        return GGUFSource(model.file, model.config)
    return DirectorySource(model)
