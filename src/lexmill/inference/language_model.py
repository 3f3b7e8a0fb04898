"""A model ready to use: text in, text out. This is what `lexmill.load` gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import DataError, FileError, ModelError
from lexmill.inference.generation import GenerationConfig, Step, generate
from lexmill.inference.sampling import SamplingConfig
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.tokenizer.tokenizer import Tokenizer


class LanguageModel:
    """A decoder with its tokenizer.

    Attributes:
        tokenizer: `encode(text) -> list[int]`, `decode(ids) -> str`.
        config: the model's shape.
        path: the model directory, None for a model that is still in training.
    """

    def __init__(self, decoder: Any, tokenizer: Tokenizer, path: Path | None = None) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.config: ModelConfig = decoder.config
        self.path = path

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits for what follows each position: (len(ids), vocab_size), float32.

        Raises:
            DataError: no ids, or one outside the vocabulary.
            ModelError: more ids than the context holds.
        """
        from lexmill.inference.torch_backend import all_logits

        return all_logits(self.decoder, self._checked(ids))

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, by the model's chat template."""
        return self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)

    def stream_ids(self, ids: Sequence[int], config: GenerationConfig | None = None) -> Iterator[Step]:
        """Generate behind `ids` a step at a time; an empty prompt begins a new document."""
        from lexmill.inference.torch_backend import TorchSession

        config = config or GenerationConfig()
        if not len(ids):
            if self.tokenizer.ids.bos is None:
                raise DataError("The prompt is empty, and this model has no token that begins a text.")
            ids = [self.tokenizer.ids.bos]
        if len(ids) >= self.config.context:
            raise ModelError(
                f"The prompt has {len(ids):,} tokens, but the model's context is {self.config.context:,}.",
                "Shorten the prompt.",
            )
        yield from generate(TorchSession(self.decoder), self.tokenizer, self._checked(ids), config)

    def stream(self, prompt: str, config: GenerationConfig | None = None) -> Iterator[Step]:
        """Generate behind a text, a step at a time."""
        return self.stream_ids(self.tokenizer.encode(prompt), config)

    def generate(self, prompt: str, **options: Any) -> str:
        """The text that follows `prompt`, greedy unless asked otherwise.

        Args:
            options: `max_tokens`, `stop` (texts), `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `seed`; see `GenerationConfig` and `SamplingConfig`.
        """
        return "".join(step.text for step in self.stream(prompt, generation_config(**options)))

    def generate_ids(self, ids: Sequence[int], **options: Any) -> list[int]:
        """The ids that follow `ids`, greedy unless asked otherwise; the id that ends the text is left out."""
        steps = self.stream_ids(ids, generation_config(**options))
        return [step.token for step in steps if step.token is not None]

    def chat(self, messages: Any, **options: Any) -> str:
        """The assistant's reply to a conversation: a list of {"role": …, "content": …}."""
        return "".join(step.text for step in self.stream_chat(messages, generation_config(**options)))

    def stream_chat(self, messages: Any, config: GenerationConfig | None = None) -> Iterator[Step]:
        """The assistant's reply, a step at a time."""
        return self.stream(self.render_chat(messages), config)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(token) for token in ids]
        if not ids:
            raise DataError("There are no token ids.")
        if len(ids) > self.config.context:
            raise ModelError(
                f"{len(ids):,} tokens do not fit in the model's context of {self.config.context:,}."
            )
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise DataError(f"Token id {token} is outside the vocabulary of {self.config.vocab_size:,}.")
        return ids


def generation_config(
    *,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    logprobs: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> GenerationConfig:
    """A `GenerationConfig` from flat options."""
    return GenerationConfig(
        max_tokens=max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        sampling=SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
    )


def find_model(path: Path | str) -> Path:
    """The model directory that `path` means: itself, or the final model of a run directory.

    Raises:
        FileError: it is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"{path}: there is no such model.", "Give a model directory or a run directory.")
    candidates = [path, path / "model", path / "finetune" / "model", path / "pretrain" / "model"]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise FileError(
        f"{path} is neither a model directory (it has no config.json) nor a finished run.",
        "Give a model directory or a run directory such as runs/quickstart.",
    )


def load(path: Path | str) -> LanguageModel:
    """Load a model directory, or the final model of a run directory.

    Raises:
        FileError, FormatError, ModelError: the directory is incomplete, damaged or not supported.
    """
    from lexmill.inference.torch_backend import load_decoder

    directory = ModelDirectory.open(find_model(path))
    return LanguageModel(load_decoder(directory), directory.tokenizer, directory.path)
