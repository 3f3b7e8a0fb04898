"""A model for `evaluate --task`, wherever it runs: in lexmill's engine, in torch, in llama.cpp or in transformers.

Prompts are made here in all cases, with the model's own tokenizer and in the words of its training; the other
runtimes get ids and give ids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexmill.config import suggest
from lexmill.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from lexmill.inference.language_model import LanguageModel
    from lexmill.model.directory import ModelDirectory

BACKENDS = ("auto", "native", "torch", "llama_cpp", "transformers")
Writer = Callable[[Any, Sequence[Sequence[int]], dict[str, Any], Callable[[int], None]], list[list[int]]]


def open_for_scoring(path: Path, backend: str = "auto") -> tuple[LanguageModel, Writer | None]:
    """The model, and who writes for it; None where it does so itself.

    Args:
        path: a model directory, a run directory, an adapter, or a GGUF file.
        backend: auto is lexmill's engine where it is built and holds the model; else llama_cpp for a GGUF
            file, torch for everything else.

    Raises:
        ConfigError: there is no such backend, or it does not take such a model.
        FileError, FormatError, ModelError: the model is incomplete, damaged or not supported.
    """
    from lexmill.inference.language_model import LanguageModel, find_model, load
    from lexmill.inference.native.library import available
    from lexmill.model.directory import ModelDirectory

    if backend not in BACKENDS:
        raise ConfigError(f"There is no backend '{backend}'.", suggest(backend, BACKENDS))
    gguf = path.suffix.lower() == ".gguf" and path.is_file()
    if gguf and backend == "transformers":
        raise ConfigError(
            f"{path} is a GGUF file, which does not run in transformers.",
            f"Leave --backend out, or first: lexmill import {path} --out MODEL",
        )
    if gguf and (backend == "llama_cpp" or (backend == "auto" and not available())):
        return _of_gguf(path), _llama_cpp_writer(path)
    if backend in ("auto", "native", "torch"):
        return load(path, backend=backend), None
    directory = ModelDirectory.open(find_model(path))
    model = LanguageModel(_Elsewhere(directory.config), directory.tokenizer, path, directory.lineage)
    return model, _llama_cpp_writer(directory) if backend == "llama_cpp" else _transformers_writer(directory)


class _Elsewhere:
    """Stands for a network that runs in another runtime: its shape is known, nothing else."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        raise ModelError(
            "This task looks at more than what a model writes, which only lexmill itself shows.",
            "Score a model directory with --backend torch; of a GGUF file: lexmill import FILE --out MODEL",
        )


def _of_gguf(path: Path) -> LanguageModel:
    from lexmill.formats.gguf import GGUFFile
    from lexmill.inference.language_model import LanguageModel
    from lexmill.model.gguf_model import GGUFModel

    with GGUFFile.open(path) as file:
        model = GGUFModel(file)
        return LanguageModel(_Elsewhere(model.config), model.tokenizer, path, model.lineage)


def _llama_cpp_writer(source: Path | ModelDirectory) -> Writer:
    def write(
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        options: dict[str, Any],
        done: Callable[[int], None],
    ) -> list[list[int]]:
        from lexmill.devices import threads
        from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf

        if model.config.shape != "decoder":
            raise ConfigError("llama.cpp's server runs decoders only.", "Take --backend torch.")
        if options["beams"] > 1:
            raise ConfigError("llama.cpp has no beam search.", "Leave --beams out, or take --backend torch.")
        longest = max(map(len, prompts)) + options["max_tokens"]
        found = []
        with tempfile.TemporaryDirectory() as folder:
            file = source
            if not isinstance(file, Path):
                file = export_gguf(file, Path(folder) / "model.gguf", "f32")
            context = min(longest + 1, model.config.context)
            with LlamaCpp(file, threads=threads(), context=context, time_limit=600) as runtime:
                for prompt in prompts:
                    room = min(options["max_tokens"], model.config.context - len(prompt))
                    found.append(runtime.greedy(prompt, room))
                    done(1)
        return found

    return write


def _transformers_writer(directory: ModelDirectory) -> Writer:
    def write(
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        options: dict[str, Any],
        done: Callable[[int], None],
    ) -> list[list[int]]:
        from lexmill.runtimes.verify_transformers import open_transformers

        beams = options["beams"]
        if beams > 1 and (model.config.shape == "decoder" or options["length_penalty"] != 1.0):
            raise ConfigError(
                "In transformers beam search is driven for encoder–decoders only, with length_penalty 1.",
                "Take --backend torch.",
            )
        stops, found = set(model.tokenizer.ids.stop), []
        with open_transformers(directory) as runtime:
            for prompt in prompts:
                if beams > 1:
                    ids = runtime.beams(prompt, beams, options["max_tokens"])
                    found.append(ids[:-1] if ids and ids[-1] in stops else ids)
                else:
                    found.append(runtime.greedy(prompt, options["max_tokens"]))
                done(1)
        return found

    return write
