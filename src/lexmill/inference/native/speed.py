"""How fast an engine reads a prompt and writes behind it, in the manner of llama.cpp's llama-bench.

Tokens are drawn at random, which no computation depends on. A prompt begins a text; writing begins behind nothing,
one token a step, without sampling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lexmill.formats.gguf import GGUFFile
from lexmill.inference.native.engine import NativeEngine
from lexmill.inference.native.interface import BLOCK, CHUNK, Batch
from lexmill.inference.native.sources import DirectorySource, GGUFSource, Source
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_model import GGUFModel
from lexmill.model.names import weight_names, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of each run; empty where that was not asked for, or the model does not do it."""

    prompt: tuple[float, ...]
    decode: tuple[float, ...]


def open_source(path: Path) -> Source:
    """The weights of a GGUF file or a model directory, for `NativeEngine.open`."""
    if path.is_file():
        model = GGUFModel(GGUFFile.open(path))
        return GGUFSource(model.file, model.config)
    return DirectorySource(ModelDirectory.open(path))


def stored_type(source: Source) -> str:
    """The type in which most of the weights' bytes are stored, such as "Q4_0"."""
    sizes: dict[str, int] = {}
    for name in weight_names(source.config):
        stored = source.stored(name.own)
        sizes[stored.type.name] = sizes.get(stored.type.name, 0) + stored.data.nbytes
    return max(sizes, key=lambda name: sizes[name])


def step_bytes(engine: NativeEngine) -> int:
    """Bytes of weights that a step of one token reads. Of embeddings it reads a row, unless they are the head too."""
    skipped = 0 if engine.config.tied else engine.matrices[0].nbytes
    return sum(matrix.nbytes for matrix in engine.matrices) - skipped


def prompt_operations(config: ModelConfig, tokens: int) -> float:
    """Operations of reading a prompt of a decoder or an encoder, a token: products with weights, and attention.

    A multiplication and an addition are two. Logits are asked for once, so that the head hardly counts.
    """
    shapes = weight_shapes(config)
    weights = sum(
        math.prod(shape) for name, shape in shapes.items() if ".blocks." in name and len(shape) == 2
    )
    head = (
        shapes["head.weight" if not config.tied else "embed.weight"] if config.shape == "decoder" else (0, 0)
    )
    seen = (tokens + 1) / 2 if config.shape == "decoder" else tokens
    attention = 2 * config.layers * config.heads * config.head_width * seen
    return 2 * (weights + math.prod(head) / tokens + attention)


def measure_speed(engine: NativeEngine, prompt: int, generate: int, repeat: int = 5, seed: int = 0) -> Speed:
    """Time a prompt of `prompt` tokens and `generate` steps of one token, `repeat` times each, once before for warmth.

    Encoders read only; an encoder–decoder reads the prompt with its encoder and writes with its decoder.
    """
    reads = Runs(engine, seed)

    def rates(work: Callable[[int], None], tokens: int) -> tuple[float, ...]:
        if tokens < 1:
            return ()
        work(tokens)
        found = []
        for _ in range(repeat):
            start = time.perf_counter()
            work(tokens)
            found.append(tokens / (time.perf_counter() - start))
        return tuple(found)

    writes = engine.config.shape != "encoder"
    return Speed(prompt=rates(reads.read, prompt), decode=rates(reads.write, generate if writes else 0))


class Runs:
    """The work that is timed, on an engine whose pages nobody else uses.

    Args:
        sequences: how many texts are written side by side; each has its own part of the pages.
    """

    def __init__(self, engine: NativeEngine, seed: int = 0, sequences: int = 1) -> None:
        self.engine, self.sequences = engine, sequences
        self._random = np.random.default_rng(seed)
        each = engine.pages // sequences
        self.tables = np.arange(each * sequences, dtype=np.int32).reshape(sequences, each)
        self.room = min(each * BLOCK, engine.context)
        self._memory: np.ndarray | None = None
        if engine.config.shape == "encoder_decoder":
            self._memory = np.array(engine.remember([self.tokens(32)] * sequences), np.int32)

    def tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self.engine.vocab_size, count)]

    def read(self, count: int) -> None:
        """A prompt of `count` tokens in each text, from its beginning; the logits of its last token."""
        shape = self.engine.config.shape
        texts = [self.tokens(count) for _ in range(self.sequences)]
        if shape == "encoder":
            self.engine.hidden(texts)
            return
        if shape == "encoder_decoder":
            self.engine.forget(self.engine.remember(texts))
            return
        for row, text in enumerate(texts):
            for start in range(0, count, CHUNK):
                part = text[start : start + CHUNK]
                last = [len(part) - 1] if start + len(part) == count else []
                self._step(part, range(start, start + len(part)), [row] * len(part), last, prompt=True)

    def write(self, count: int, behind: int = 0) -> None:
        """`count` steps, each of one token in each text, behind `behind` tokens."""
        rows = range(self.sequences)
        for step in range(count):
            places = [behind + step] * self.sequences
            self._step(self.tokens(self.sequences), places, rows, rows, prompt=False)

    def _step(
        self,
        tokens: Sequence[int],
        places: Sequence[int],
        rows: Sequence[int],
        wanted: Sequence[int],
        *,
        prompt: bool,
    ) -> None:
        self.engine.forward(
            Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.array(places, np.int32),
                rows=np.array(rows, np.int32),
                tables=self.tables,
                wanted=np.array(wanted, np.int32),
                prompt=prompt,
                memory=self._memory,
            )
        )
