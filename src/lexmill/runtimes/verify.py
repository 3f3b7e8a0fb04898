"""The proof that every runtime gives the answers that lexmill gives, on the finished files.

lexmill in torch is the reference; lexmill's own engine is a runtime like transformers and llama.cpp. Each runtime is asked the same questions through its own public interface.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lexmill.errors import LexmillError, MissingPackageError
from lexmill.formats.gguf import GGUFFile
from lexmill.model.directory import ModelDirectory
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.diagnosis import diagnose_file
from lexmill.runtimes.llama_cpp import (
    FILE_TYPES,
    file_offsets,
    file_types,
    file_weights,
    setting_differences,
    weight_error,
)
from lexmill.runtimes.llama_cpp_server import LlamaCpp
from lexmill.runtimes.llama_cpp_start import find_server, version_of
from lexmill.runtimes.ollama_api import OllamaServer, ollama_place
from lexmill.runtimes.verify_cases import DEFAULT_PROMPTS
from lexmill.runtimes.verify_checks import (
    Comparison,
    compare_ids,
)
from lexmill.runtimes.verify_report import Check, Diagnosis, VerifyReport
from lexmill.runtimes.verify_tolerances import TOLERANCES, exact_tolerance, mean_divergence, tolerance_of
from lexmill.runtimes.verify_transformers import open_transformers

if TYPE_CHECKING:
    from lexmill.inference.language_model import LanguageModel
    from lexmill.runtimes.verify_reference import Reference

__all__ = ["DEFAULT_PROMPTS", "TOLERANCES", "Check", "Diagnosis", "VerifyReport", "verify"]

_ONLY_WEIGHTS = (
    "the server of llama.cpp ends its process when it loads an encoder–decoder: only the file's weights and "
    "constants were compared"
)
_Asked = Callable[[str, Any], Iterator[Check]]
_SMALL = 50_000_000  # weights; below, more threads cost more in waiting than they bring


def verify(
    model: Path | str,
    ggufs: Sequence[Path | str] = (),
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    tokens: int = 64,
    ollama: str = "",
    transformers: bool = True,
    engine: bool = True,
    llama_server: Path | str | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare what transformers and llama.cpp make of a model with what lexmill makes of it.

    Args:
        model: the model directory.
        ggufs: GGUF files made of it.
        prompts: texts to continue.
        tokens: how many to generate for each prompt.
        llama_server: run GGUF files in this `llama-server`. None: in the xllamacpp wheel, or without it in a
            `llama-server` on the path.
        ollama: also ask a running Ollama that has the model: its name there, or `http://host:port/name`.
        transformers: ask it too.
        engine: ask lexmill's own engine too, where it is built: the model directory, and each file.

    Returns:
        A record a runtime and check: token ids, round trip, chat template, stop tokens, weights
        (of GGUF files), logits and greedy continuations of a decoder; of an encoder its heads,
        embeddings and what it fills in; of an encoder–decoder beams too. A runtime that breaks down
        fails; one that is not installed is not checked.

    Raises:
        FileError, FormatError, ModelError: the model itself cannot be loaded by lexmill; `llama_server` is no
            program.
    """
    from lexmill.inference.language_model import load

    directory = ModelDirectory.open(model)
    if llama_server is not None:
        find_server(llama_server)
    asked_ollama = ollama_place(ollama) if ollama else None
    from lexmill.inference.native.library import available
    from lexmill.runtimes.verify_engine import open_engine

    with progress.task("verify", 10 + 12 * len(ggufs) + (5 if ollama else 0), "checks") as task:
        task.advance(0, "lexmill")
        own = _Own(load(directory.path, backend="torch"), directory, prompts, tokens)
        task.advance(1)
        checks: list[Check] = []
        if transformers:
            checks += _compare("transformers", open_transformers(directory), own.asked, task)
        own.engine = engine and own.read and available()
        if own.engine:
            checks += _compare("engine", open_engine(directory.path), own.asked_of_engine, task)
        diagnoses: list[Diagnosis] = []
        for path in map(Path, ggufs):
            found = list(_check_gguf(path, own, llama_server, task))
            checks += found
            of_file = found[0].runtime
            if failed := {
                check.check for check in found if check.passed is False and check.runtime == of_file
            }:
                diagnoses += diagnose_file(of_file, path, directory, failed)
        if asked_ollama is not None:
            address, told = asked_ollama
            server = contextlib.nullcontext(OllamaServer(address))
            checks += _compare(f"Ollama {told}", server, partial(own.asked_of_ollama, told), task)
    return VerifyReport(str(directory.path), _environment(llama_server), tuple(checks), tuple(diagnoses))


class _Own:
    """lexmill's side: the model, and what is asked of another runtime about it.

    Attributes:
        engine: whether lexmill's engine is asked.
        reference: of a decoder with a tokenizer, its own answers; None for every other model.
    """

    def __init__(
        self, model: LanguageModel, directory: ModelDirectory, prompts: Sequence[str], tokens: int
    ) -> None:
        from lexmill.runtimes.verify_reference import Reference

        self.model, self.directory, self.tokens = model, directory, tokens
        self.shape = directory.config.shape
        self.read = directory.has_tokenizer
        self.engine = False
        self.reference: Reference | None = None
        if self.shape == "decoder" and self.read:
            self.reference = Reference(model, directory, prompts, tokens)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> LanguageModel:
        """The same model with other weights."""
        from lexmill.inference.language_model import LanguageModel
        from lexmill.model.build import build_loaded

        network = build_loaded(self.directory.config, weights)
        return LanguageModel(network.eval(), self.directory.tokenizer, self.directory.path)

    def asked(self, name: str, runtime: Any) -> Iterator[Check]:
        """The checks of transformers."""
        from lexmill.runtimes.verify_encoder import EncoderComparison
        from lexmill.runtimes.verify_encoder_decoder import EncoderDecoderComparison

        if self.shape == "encoder":
            return EncoderComparison(name, runtime, self.model, self.read).all()
        if self.shape == "encoder_decoder":
            return EncoderDecoderComparison(name, runtime, self.model, self.read, self.tokens).all()
        if self.reference is None:
            return compare_ids(name, runtime, self.model)
        return Comparison(name, runtime, self.reference, exact_tolerance(self.reference.spread)).all()

    def asked_of_engine(self, name: str, runtime: Any) -> Iterator[Check]:
        """The checks of the engine with the model directory."""
        from lexmill.runtimes.verify_engine import (
            compare_engine,
            compare_engine_shape,
            reference_of_directory,
            types_of,
        )

        if self.reference is None:
            types = types_of(self.directory)
            return compare_engine_shape(name, runtime, self.model, types, {}, self.tokens)
        return compare_engine(name, runtime, *reference_of_directory(self.reference, self.directory))

    def asked_of_ollama(self, told: str, name: str, server: OllamaServer) -> Iterator[Check]:
        """The checks of a model in a running Ollama; `told` is its name there."""
        from lexmill.runtimes.verify_ollama import compare_ollama

        return compare_ollama(name, server, told, self.directory, self.model, self.reference)


def _compare(
    name: str,
    opened: contextlib.AbstractContextManager[Any],
    asked: Callable[[str, Any], Iterator[Check]],
    task: Task,
) -> Iterator[Check]:
    """All checks of one runtime. Whatever it throws is its failure, never ours."""
    task.advance(0, name)
    try:
        with opened as runtime:
            for check in asked(name, runtime):
                task.advance(1, f"{name}: {check.check}")
                yield check
    except MissingPackageError as error:
        yield Check(name, "all", None, detail=str(error))
    except Exception as error:
        yield Check(name, "runs", False, detail=f"{type(error).__name__}: {error}"[:500])


def _check_gguf(path: Path, own: _Own, server: Path | str | None, task: Task) -> Iterator[Check]:
    name = f"llama.cpp {path.name}"
    try:
        with GGUFFile.open(path) as file:
            number = file.metadata.get("general.file_type")
            type = next((type for type, known in FILE_TYPES.items() if known == number), None)
            name = f"llama.cpp {type or path.stem}"
            check = _weights_check(name, file, own.directory)
            exact = check.figure == 0 and type == "f32"
            held = _Held.read(file, own.directory) if check.passed and not exact else None
    except LexmillError as error:
        yield Check(name, "weights", False, detail=str(error))
        return
    asked, cost, in_engine = _asked_of_file(own, path, held, type)
    yield replace(check, detail=check.detail + cost)
    task.advance(1)
    if not own.read:
        yield Check(
            name, "runs", None, detail="the model has no tokenizer, without which no file of it is known"
        )
        return
    if own.shape == "encoder_decoder":
        yield Check(name, "runs", None, detail=_ONLY_WEIGHTS)
    else:
        yield from _compare(name, _llama_cpp(path, own, server), asked, task)
    if own.engine:
        from lexmill.runtimes.verify_engine import open_engine

        yield from _compare(f"engine {type or path.stem}", open_engine(path), in_engine, task)


def _weights_check(runtime: str, file: GGUFFile, directory: ModelDirectory) -> Check:
    """Whether a file holds the model."""
    error, tensor = weight_error(file, directory)
    wrong = setting_differences(file, directory)
    if error == 0 and not wrong:
        return Check(runtime, "weights", True, error, 1, "every weight is the model's own")
    detail = "; ".join([*wrong, f"largest error, as a multiple of the type's own rounding: {tensor}"])
    return Check(runtime, "weights", bool(error <= 1 and not wrong), error, 1, detail)


class _Held(NamedTuple):
    """What a file holds of each weight, by lexmill's names.

    Attributes:
        weights: decoded, float32.
        types: "Q8_0" and so on; they decide how llama.cpp rounds what it multiplies them with.
        offsets: of blocks that have them, (rows, blocks).
    """

    weights: dict[str, np.ndarray]
    types: dict[str, str]
    offsets: dict[str, np.ndarray]

    @classmethod
    def read(cls, file: GGUFFile, model: ModelDirectory) -> _Held:
        return cls(
            file_weights(file, model), file_types(file, model.config), file_offsets(file, model.config)
        )


def _asked_of_file(own: _Own, path: Path, held: _Held | None, type: str | None) -> tuple[_Asked, str, _Asked]:
    """What is asked of llama.cpp running a file, what the detail says of what rounding cost, and what the engine is asked.

    The other side is lexmill running what the file holds, or for None the model's own weights. That
    is also what a file that does not hold the model is compared with: two that agree on something else
    prove nothing.
    """
    from lexmill.runtimes.verify_embeddings import compare_embeddings, same_embeddings
    from lexmill.runtimes.verify_engine import compare_engine, compare_engine_shape

    if own.reference is None:
        from lexmill.runtimes.verify_rounding import Rounded

        if own.shape == "encoder_decoder":  # llama.cpp is not asked
            asked = lambda name, runtime: compare_engine_shape(  # noqa: E731
                name, runtime, *(_loaded(path) if held else (own.model, {}, {})), own.tokens
            )
            return asked, "", asked
        model, types, offsets = own.model, {}, {}
        if held is not None:
            model, types, offsets = own.with_weights(held.weights), held.types, held.offsets
        rounded = Rounded(model.network, types, offsets)
        return (
            lambda name, runtime: compare_embeddings(name, runtime, model, type, rounded),
            "",
            lambda name, runtime: iter([same_embeddings(name, runtime.embed, model, type, rounded)]),
        )
    reference, cost, tolerance = own.reference, "", TOLERANCES.get(type or "")
    if type == "f32":
        tolerance = exact_tolerance(reference.spread)
    if held is not None:
        reference = own.reference.with_weights(*held)
        divergence = mean_divergence(own.reference.logprobs, reference.logprobs)
        cost = f"; what rounding the weights costs: mean KL {divergence:.2g} nats"
        if reference.noise is not None:
            tolerance = tolerance_of(reference.noise)
    return (
        lambda name, runtime: Comparison(name, runtime, reference, tolerance).all(),
        cost,
        lambda name, runtime: compare_engine(name, runtime, reference, tolerance),
    )


def _loaded(path: Path) -> tuple[LanguageModel, dict[str, str], dict[str, np.ndarray]]:
    """An encoder–decoder of a file in torch, the types of its weights and their offsets.

    A file may hold more than the model: T5's first form has its scaled embedding a second time, as the output.
    """
    from lexmill.inference.language_model import load

    model = load(path, backend="torch")
    with GGUFFile.open(path) as file:
        return model, file_types(file, model.config), file_offsets(file, model.config)


@contextlib.contextmanager
def _llama_cpp(path: Path, own: _Own, server: Path | str | None) -> Iterator[LlamaCpp]:
    config, embeds = own.model.config, own.shape == "encoder"
    threads = 1 if config.parameters < _SMALL else 4
    longest = own.reference.longest + 8 if own.reference is not None else 0
    context = config.context if embeds else min(config.context, max(512, longest))
    with LlamaCpp(path, threads=threads, context=context, embeddings=embeds, server=server) as runtime:
        yield runtime


def _environment(llama_server: Path | str | None) -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("lexmill", "numpy", "tokenizers", "torch", "transformers", "xllamacpp"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(LexmillError, OSError, subprocess.SubprocessError):
        if (server := find_server(llama_server)) is not None:
            found["llama-server"] = version_of(server)
    return found
