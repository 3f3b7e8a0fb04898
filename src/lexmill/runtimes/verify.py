"""The proof that transformers and llama.cpp give the answers that lexmill gives, on the finished files.

lexmill is the reference. Each runtime is asked the same questions through its own public interface.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lexmill.errors import LexmillError, MissingPackageError
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.sampling import log_softmax
from lexmill.model.directory import ModelDirectory
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.llama_cpp import FILE_TYPES, file_weights, setting_differences, weight_error
from lexmill.runtimes.llama_cpp_server import LlamaCpp
from lexmill.runtimes.verify_cases import DEFAULT_PROMPTS
from lexmill.runtimes.verify_checks import TOLERANCES, Comparison, Runtime, Tolerance, mean_divergence
from lexmill.runtimes.verify_report import Check, VerifyReport

if TYPE_CHECKING:
    from lexmill.runtimes.verify_reference import Reference

__all__ = ["DEFAULT_PROMPTS", "TOLERANCES", "Check", "VerifyReport", "verify"]

_SMALL = 50_000_000  # weights; below, more threads cost more in waiting than they bring


def verify(
    model: Path | str,
    ggufs: Sequence[Path | str] = (),
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    tokens: int = 64,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare what transformers and llama.cpp make of a model with what lexmill makes of it.

    Args:
        model: the model directory.
        ggufs: GGUF files made of it.
        prompts: texts to continue.
        tokens: how many to generate for each prompt.

    Returns:
        A record a runtime and check: token ids, round trip, chat template, stop tokens, weights
        (of GGUF files), logits and greedy continuations. A runtime that breaks down fails; one
        that is not installed is not checked.

    Raises:
        FileError, FormatError, ModelError: the model itself cannot be loaded by lexmill.
    """
    from lexmill.inference.language_model import load
    from lexmill.runtimes.verify_reference import Reference

    directory = ModelDirectory.open(model)
    with progress.task("verify", 7 + 8 * len(ggufs), "checks") as task:
        task.advance(0, "lexmill")
        reference = Reference(load(directory.path), directory, prompts, tokens)
        task.advance(1)
        opened = _transformers(directory)
        checks = list(_compare("transformers", opened, reference, TOLERANCES["transformers"], task))
        for path in map(Path, ggufs):
            checks += _check_gguf(path, reference, task)
    return VerifyReport(str(directory.path), _environment(), tuple(checks))


def _compare(
    name: str,
    opened: contextlib.AbstractContextManager[Runtime],
    reference: Reference,
    tolerance: Tolerance | None,
    task: Task,
) -> Iterator[Check]:
    """All checks of one runtime. Whatever it throws is its failure, never ours."""
    task.advance(0, name)
    try:
        with opened as runtime:
            for check in Comparison(name, runtime, reference, tolerance).all():
                task.advance(1, f"{name}: {check.check}")
                yield check
    except MissingPackageError as error:
        yield Check(name, "all", None, detail=str(error))
    except Exception as error:
        yield Check(name, "runs", False, detail=f"{type(error).__name__}: {error}"[:500])


def _check_gguf(path: Path, reference: Reference, task: Task) -> Iterator[Check]:
    name = f"llama.cpp {path.name}"
    try:
        with GGUFFile.open(path) as file:
            number = file.metadata.get("general.file_type")
            type = next((type for type, known in FILE_TYPES.items() if known == number), None)
            name = f"llama.cpp {type or path.stem}"
            check, own = _weights_check(name, file, reference, type)
            yield check
    except LexmillError as error:
        yield Check(name, "weights", False, detail=str(error))
        return
    task.advance(1)
    yield from _compare(name, _llama_cpp(path, reference), own, TOLERANCES[type] if type else None, task)


def _weights_check(
    runtime: str, file: GGUFFile, reference: Reference, type: str | None
) -> tuple[Check, Reference]:
    """Whether a file holds the model, and lexmill running what it holds.

    A file that does not hold the model is compared with the model itself: two that agree on something
    else prove nothing.
    """
    directory = reference.directory
    error, tensor = weight_error(file, directory)
    wrong = setting_differences(file, directory)
    detail = "; ".join([*wrong, f"largest error, as a multiple of the type's own rounding: {tensor}"])
    if not error <= 1 or wrong:
        return Check(runtime, "weights", False, error, 1, detail), reference
    if error == 0 and type == "f32":
        return Check(runtime, "weights", True, error, 1, "every weight is the model's own"), reference
    own = reference.with_weights(file_weights(file, directory), type or "")
    cost = mean_divergence(reference.logprobs, own.logprobs)
    detail += f"; what rounding the weights costs: mean KL {cost:.2g} nats"
    return Check(runtime, "weights", True, error, 1, detail), own


@contextlib.contextmanager
def _llama_cpp(path: Path, reference: Reference) -> Iterator[Runtime]:
    config = reference.directory.config
    threads = 1 if config.parameters < _SMALL else 4
    context = min(config.context, max(512, reference.longest + 8))
    with LlamaCpp(path, threads=threads, context=context) as runtime:
        yield runtime


@contextlib.contextmanager
def _transformers(directory: ModelDirectory) -> Iterator[Runtime]:
    for package in ("transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "to compare with transformers", "runtimes")
    with _quiet_transformers():
        yield _Transformers(directory)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class _Transformers:
    """transformers with the model directory as anyone would load it, in float32."""

    def __init__(self, directory: ModelDirectory) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = str(directory.path)
        self._torch = torch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32
        ).eval()

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def logprobs(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
        with self._torch.inference_mode():
            rows = [self._model(self._torch.tensor([list(ids)])).logits[0, -1] for ids in prompts]
        return log_softmax(self._torch.stack(rows).float().numpy())

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        found = self._generate(ids, max_tokens)
        return found[:-1] if found and found[-1] in self._stops else found

    def ends_at(self, token: int, before: Sequence[int]) -> bool:
        def only(_: Any, scores: Any) -> Any:
            forced = self._torch.full_like(scores, -1e9)
            forced[:, token] = 0
            return forced

        from transformers import LogitsProcessorList

        return len(self._generate(before, 2, logits_processor=LogitsProcessorList([only]))) == 1

    def declared_ids(self) -> list[int]:
        config = self._model.generation_config
        found = [*self._stops, config.bos_token_id, config.pad_token_id]
        return [token for token in found if token is not None]

    @property
    def _stops(self) -> list[int]:
        listed = self._model.generation_config.eos_token_id
        return listed if isinstance(listed, list) else [] if listed is None else [listed]

    def _generate(self, ids: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
        prompt = self._torch.tensor([list(ids)])
        options = {"max_new_tokens": max_tokens, "do_sample": False, **more}
        if self._model.generation_config.pad_token_id is None:
            options["pad_token_id"] = 0  # one prompt has no padding; this only stops a warning
        with self._torch.inference_mode():
            output = self._model.generate(prompt, attention_mask=self._torch.ones_like(prompt), **options)
        return output[0, len(ids) :].tolist()


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("lexmill", "numpy", "tokenizers", "torch", "transformers", "xllamacpp"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
