"""A model ready to use: text in, text out. This is what `lexmill.load` gives."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lexmill.config import suggest
from lexmill.errors import ConfigError, DataError, FileError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.backend import Backend, check_backend
from lexmill.inference.beams import Hypothesis, beam_search
from lexmill.inference.filling import Filler
from lexmill.inference.generation import GenerationConfig, Step, generation_config
from lexmill.inference.native.opening import engine_for
from lexmill.inference.task_heads import TaskHeads
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_config import pooling_of
from lexmill.model.gguf_model import GGUFModel
from lexmill.model.sentence_files import read_pooling
from lexmill.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lexmill.inference.explain import AttentionMap


class LanguageModel(TaskHeads, Filler):
    """A Transformer of any shape with its tokenizer.

    Attributes:
        config: its shape.
        path: the model directory or the GGUF file, None for a model that is still in training.
        lineage: what `lexmill.json` says of its making.

    Args:
        network: the Transformer in torch, or a function that makes it when something first asks for it.
        tokenizer: its own, or a function that reads it.
        backend: who computes, or a function that starts it at the first question; torch where not given.
        config: needed where `network` is a function.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Tokenizer | Callable[[], Tokenizer] | None,
        path: Path | None = None,
        lineage: Mapping[str, Any] | None = None,
        *,
        backend: Callable[[], Backend] | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self._network, self._backend, self._lock = network, backend, threading.Lock()
        self._opened: Backend | None = None
        self._tokenizer = tokenizer
        self.config: ModelConfig = network.config if config is None else config
        self.path = path
        self.lineage = dict(lineage or {})

    @functools.cached_property
    def network(self) -> Any:
        """The Transformer itself, in torch; a model that runs in the engine is read once more for it."""
        return self._network() if inspect.isfunction(self._network) else self._network

    @property
    def backend(self) -> Backend:
        """Who computes; started when it is first asked for."""
        with self._lock:
            if self._opened is None and self._backend is not None:
                self._opened = self._backend()
            elif self._opened is None:
                from lexmill.inference.torch_backend import TorchBackend

                self._opened = TorchBackend(self.network)
            return self._opened

    def _start(self) -> None:
        """Let an engine start while something else is read; what goes wrong is said to who asks for it."""
        if self._opened is None and self._backend is not None:

            def start() -> None:
                with contextlib.suppress(Exception):
                    assert self.backend

            threading.Thread(target=start, daemon=True).start()

    @property
    def tokenizer(self) -> Tokenizer:
        """`encode(text) -> list[int]`, `decode(ids) -> str`.

        Raises:
            FileError: the model directory has none.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.path or Path("."))
        elif not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = self._tokenizer()
        return self._tokenizer

    def close(self) -> None:
        """Free an engine; a model in torch goes with its last reference."""
        if self._opened is not None:
            self._opened.close()

    def logits(self, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> np.ndarray:
        """Logits at each position, float32: (len(ids), vocab_size).

        Of a decoder for what follows; of an encoder those of its masked-language-modelling head; of
        an encoder–decoder, (len(decoder_ids), vocab_size), for what follows each of `decoder_ids`.

        Raises:
            DataError: no ids, or one outside the vocabulary.
            ModelError: more ids than the context holds, or a model without such a head.
        """
        if (decoder_ids is not None) != (self.config.shape == "encoder_decoder"):
            raise ModelError(
                "An encoder–decoder needs 'decoder_ids', what it has written so far."
                if decoder_ids is None
                else f"'decoder_ids' fit an encoder–decoder only; this model is {self.kind}."
            )
        if self.config.shape == "encoder" and not self.config.mlm:
            raise ModelError(
                "This encoder has no masked-language-modelling head, so it gives no logits.",
                "'embed' and 'attention' work on it.",
            )
        checked = None if decoder_ids is None else self._checked(decoder_ids)
        return self.backend.all_logits(self._checked(ids), checked)

    @functools.cached_property
    def pooling(self) -> str:
        """How an encoder was made to pool, by its sentence-transformers files; "mean" where nothing is said."""
        if self.path is None:
            return "mean"
        if self.path.is_file():
            with GGUFFile.open(self.path) as file:
                return pooling_of(file)
        return read_pooling(self.path) or "mean"

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: str | None = None,
        normalise: bool = False,
        rows: int = 16,
        too_long: Literal["error", "cut"] = "error",
    ) -> np.ndarray:
        """A vector for each text: (len(texts), width), float32; for a single text (width,).

        Args:
            pooling: "mean" of the last hidden states, "cls" (the first), "last", or "max" of each coordinate;
                if not given, the model's own (see `pooling`).
            normalise: make every vector one long, so that products are cosines.
            rows: texts computed at once.
            too_long: what happens to a text that the context does not hold; "cut" drops its end.

        Raises:
            DataError: an empty text.
            ModelError: a text that is too long.
        """
        pooling = pooling or self.pooling
        if pooling not in POOLING:
            raise ConfigError(f"There is no pooling '{pooling}'.", suggest(pooling, POOLING))
        single = isinstance(texts, str)
        batch: list[str] = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._encode_all(batch)
        if too_long == "cut":
            limit = self.config.context
            encoded = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in encoded]
        encoded = [self._checked(ids, f"Text {number}") for number, ids in enumerate(encoded, 1)]
        vectors = np.zeros((len(batch), self.config.width), np.float32)
        order = sorted(range(len(batch)), key=lambda index: len(encoded[index]))  # like lengths together
        for start in range(0, len(order), rows):
            members = order[start : start + rows]
            for index, hidden in zip(members, self.backend.hidden_rows([encoded[i] for i in members])):
                vectors[index] = POOLING[pooling](hidden)
        if normalise:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors[0] if single else vectors

    def hidden_states(self, text: str) -> np.ndarray:
        """The residual stream before the first layer and behind each: (layers + 1, tokens, width), float32."""
        from lexmill.inference.torch_backend import look_inside

        return look_inside(self.network, self._checked(self.tokenizer.encode(text)))["hidden"]

    def attention(self, text: str, target: str | None = None) -> AttentionMap:
        """Where each token looks, in every layer and head.

        Args:
            target: what an encoder–decoder writes; then `more` of the map are the decoder's own
                attention and where it looks in `text`.
        """
        from lexmill.inference.explain import attention_map
        from lexmill.inference.torch_backend import look_inside

        if target is not None and self.config.shape != "encoder_decoder":
            self._require("encoder_decoder", "a second text")
        ids = self._checked(self.tokenizer.encode(text))
        if target is None:
            kind: Literal["encoder", "decoder"] = "decoder" if self.config.shape == "decoder" else "encoder"
            return attention_map(self.tokenizer, text, ids, look_inside(self.network, ids)["attention"], kind)
        read = self._checked([self.config.decoder_start, *self.tokenizer.encode(target)], "The target")
        seen = look_inside(self.network, ids, read)
        decoder = attention_map(self.tokenizer, target, read, seen["decoder_attention"], "decoder")
        cross = attention_map(
            self.tokenizer, target, read, seen["cross"], "cross", key_text=text, key_ids=ids
        )
        return attention_map(self.tokenizer, text, ids, seen["attention"], more=[decoder, cross])

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, by the model's chat template."""
        return self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)

    def stream_ids(self, ids: Sequence[int], config: GenerationConfig | None = None) -> Iterator[Step]:
        """Generate behind `ids` a step at a time; an empty prompt begins a new document."""
        config = config or GenerationConfig()
        if self.config.shape == "encoder":
            self._require("decoder", "generation")
        if self.config.shape == "encoder_decoder":
            start, read = [self.config.decoder_start], self._checked(ids)
            yield from self.backend.write(self.tokenizer, start, config, read)
            return
        if not len(ids):
            if self.tokenizer.ids.bos is None:
                raise DataError("The prompt is empty, and this model has no token that begins a text.")
            ids = [self.tokenizer.ids.bos]
        if len(ids) >= self.config.context:
            raise ModelError(
                f"The prompt has {len(ids):,} tokens, but the model's context is {self.config.context:,}.",
                "Shorten the prompt.",
            )
        yield from self.backend.write(self.tokenizer, self._checked(ids), config)

    def stream(self, prompt: str, config: GenerationConfig | None = None) -> Iterator[Step]:
        """Generate behind a text, a step at a time."""
        self._start()
        return self.stream_ids(self.tokenizer.encode(prompt), config)

    def generate(self, prompt: str, **options: Any) -> str:
        """The text that follows `prompt`, greedy unless asked otherwise.

        Args:
            options: `max_tokens`, `stop` (texts), `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `seed`, and one of
                `json_schema`, `regex` and `grammar`; see `GenerationConfig` and `SamplingConfig`. Or `beams`,
                with `max_tokens` and `length_penalty`; see `beam_ids`.
        """
        if "beams" in options:
            best = self.beam_ids(self.tokenizer.encode(prompt), **options)[0]
            return self.tokenizer.decode(best.ids, skip_special=True)
        return "".join(step.text for step in self.stream(prompt, generation_config(**options)))

    def beam_ids(
        self,
        ids: Sequence[int],
        *,
        beams: int = 4,
        max_tokens: int = 256,
        length_penalty: float = 1.0,
        stop: Sequence[int] = (),
    ) -> list[Hypothesis]:
        """The best continuations that beam search finds, best first; see `beam_search`.

        Args:
            stop: ids that end a text beside the tokenizer's own.
        """
        if self.config.shape == "encoder":
            self._require("decoder", "generation")
        ids, two = self._checked(ids), self.config.shape == "encoder_decoder"
        with self.backend.rows([ids] if two else None) as session:
            return beam_search(
                session,
                [self.config.decoder_start] if two else ids,
                [*self.tokenizer.ids.stop, *stop],
                beams=beams,
                max_tokens=max_tokens,
                length_penalty=length_penalty,
            )

    def generate_ids(self, ids: Sequence[int], **options: Any) -> list[int]:
        """The ids that follow `ids`, greedy unless asked otherwise; the id that ends the text is left out."""
        steps = self.stream_ids(ids, generation_config(**options))
        return [step.token for step in steps if step.token is not None]

    def chat(self, messages: Any, **options: Any) -> str:
        """The assistant's reply to a conversation: a list of {"role": …, "content": …}."""
        return "".join(step.text for step in self.stream_chat(messages, generation_config(**options)))

    def stream_chat(self, messages: Any, config: GenerationConfig | None = None) -> Iterator[Step]:
        """The assistant's reply, a step at a time."""
        self._start()
        return self.stream(self.render_chat(messages), config)

    @property
    def kind(self) -> str:
        """What shape it is, in words."""
        return {"decoder": "a decoder", "encoder": "an encoder", "encoder_decoder": "an encoder–decoder"}[
            self.config.shape
        ]

    def _require(self, shape: str, what: str) -> None:
        if self.config.shape != shape:
            fits = {
                "decoder": "a decoder or an encoder–decoder",
                "encoder": "an encoder",
                "encoder_decoder": "an encoder–decoder",
            }
            raise ModelError(f"This model is {self.kind}; {what} needs {fits[shape]}.")

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise DataError(f"Text {number} is empty.")
        return self.tokenizer.encode_batch(texts)

    def _checked(self, ids: Iterable[int], what: str = "The text") -> list[int]:
        ids = [int(token) for token in ids]
        if not ids:
            raise DataError("There are no token ids.")
        if len(ids) > self.config.context and self.config.positions != "relative":
            raise ModelError(
                f"{what} has {len(ids):,} tokens, which do not fit in the model's context of "
                f"{self.config.context:,}.",
                "Shorten it, or split it into parts.",
            )
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise DataError(f"Token id {token} is outside the vocabulary of {self.config.vocab_size:,}.")
        return ids


POOLING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.max(0),
}


def find_model(path: Path | str) -> Path:
    """The model directory that `path` means: itself, or the final model of a run directory.

    Raises:
        FileError: it is neither.
        ModelError: it is an adapter.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"{path}: there is no such model.", "Give a model directory or a run directory.")
    candidates = [path, path / "model", path / "finetune" / "model", path / "pretrain" / "model"]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    from lexmill.model.adapter_files import is_adapter

    if is_adapter(path):
        raise ModelError(
            f"{path} holds an adapter, and this needs a whole model.",
            f"Make one: lexmill merge {path} --out MODEL",
        )
    raise FileError(
        f"{path} is neither a model directory (it has no config.json) nor a finished run.",
        "Give a model directory or a run directory such as runs/quickstart.",
    )


def load(
    path: Path | str,
    *,
    base: Path | str | None = None,
    quantise: str = "",
    backend: str = "auto",
    draft: Path | str | None = None,
) -> LanguageModel:
    """Load a model directory, the final model of a run directory, an adapter on its base, or a GGUF file.

    Args:
        base: the model of an adapter, if not the one that it names.
        quantise: "q8_0", "q4_1" or "q4_0" keeps the matrices in 8 or 4 bits: less memory, slower, not quite
            the same answers. In torch only: the engine takes a file that is quantised.
        backend: "native" is lexmill's own engine, "torch" is torch; "auto" is the engine where it is built
            and holds the model.
        draft: a small model with the same tokenizer, a directory or a GGUF file, which guesses ahead in the
            engine. The text stays the same.

    Raises:
        FileError, FormatError, ModelError: the model is incomplete, damaged or not supported, or asked of a
            backend that does not have it.
        ConfigError: there is no such backend, or it does not do what else was asked.
    """
    from lexmill.model.adapter_files import AdapterDirectory, is_adapter

    check_backend(backend)
    small = None if draft is None else _open_draft(Path(draft))
    if _is_gguf(Path(path)):
        if quantise or base is not None:
            raise ConfigError(f"{path} is a GGUF file, which is quantised already and has no base.")
        return _load_gguf(Path(path), backend, small)
    adapter = None
    if is_adapter(path):
        opened = AdapterDirectory.open(path, find_model(base) if base is not None else None)
        directory, adapter, lineage = opened.base, opened.adapter, opened.lineage
    else:
        directory = ModelDirectory.open(find_model(path))
        lineage = directory.lineage

    def network() -> Any:
        from lexmill.model.load import load_model

        return load_model(directory, adapter, quantise)

    tokenizer = directory.tokenizer if directory.has_tokenizer else None
    problem = "an adapter" if adapter is not None else f"quantise='{quantise}'" if quantise else ""
    engine = engine_for(directory, backend, problem, small)
    return LanguageModel(
        network if engine else network(),
        tokenizer,
        directory.path,
        lineage,
        backend=engine,
        config=directory.config,
    )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _open_draft(path: Path) -> ModelDirectory | GGUFModel:
    return GGUFModel(GGUFFile.open(path)) if _is_gguf(path) else ModelDirectory.open(find_model(path))


def _load_gguf(path: Path, backend: str, draft: ModelDirectory | GGUFModel | None) -> LanguageModel:
    model = GGUFModel(GGUFFile.open(path))  # stays open: weights are read from it when they are asked for

    def network() -> Any:
        from lexmill.model.build import build_loaded

        network = build_loaded(model.config, model.weights)
        return network.eval()

    engine = engine_for(model, backend, "", draft)
    return LanguageModel(
        network if engine else network(),
        lambda: model.kept_tokenizer,
        path,
        model.lineage,
        backend=engine,
        config=model.config,
    )
