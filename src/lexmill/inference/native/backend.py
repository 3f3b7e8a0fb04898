"""A model in lexmill's own engine (`lexmill.inference.backend.Backend`). Free of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lexmill.errors import ModelError
from lexmill.inference.generation import GenerationConfig
from lexmill.inference.native.heads import Heads
from lexmill.inference.native.interface import BLOCK, CHUNK, NO_PAGE, Batch, Engine
from lexmill.inference.native.pages import OutOfPages, Table
from lexmill.inference.native.scheduler import Limits, Scheduler, Text
from lexmill.inference.native.speculation import Drafter, DraftModel, PromptLookup
from lexmill.tokenizer.tokenizer import Tokenizer


class NativeBackend:
    """An engine, shared by all who ask.

    Args:
        engine: an open one, which this closes.
        weight: gives a weight by lexmill's name, float32; for the heads of encoders.
        guess: look in the text itself for what may come next.
        draft: the engine of a small model with the same tokenizer, which guesses instead.
    """

    name = "native"

    def __init__(
        self,
        engine: Engine,
        weight: Callable[[str], np.ndarray],
        limits: Limits | None = None,
        *,
        guess: bool = True,
        draft: Engine | None = None,
    ) -> None:
        drafter: Callable[[], Drafter] | None = PromptLookup if guess else None
        if draft is not None:
            if draft.vocab_size != engine.vocab_size:
                raise ModelError(
                    f"The small model has {draft.vocab_size:,} tokens, the model {engine.vocab_size:,}.",
                    "Both must have the same tokenizer.",
                )
            drafter = DraftModel(draft).of_text
        self.engine, self.config, self._draft = engine, engine.config, draft
        self.scheduler = Scheduler(engine, limits, drafter=drafter)
        self.room: int | None = engine.pages * BLOCK
        self.heads = Heads(engine.config, weight)

    def write(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: GenerationConfig,
        source: Sequence[int] | None = None,
    ) -> Text:
        """Begin to write; several texts that were begun are written together, whichever is asked for its steps."""
        return self.scheduler.submit(tokenizer, prompt, config, source=source)

    @contextlib.contextmanager
    def rows(self, sources: Sequence[Sequence[int]] | None = None) -> Iterator[NativeSession]:
        session = NativeSession(self.scheduler, sources)
        try:
            yield session
        finally:
            session.close()

    def all_logits(self, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> np.ndarray:
        if self.config.shape == "encoder":
            return self.heads.masked_logits(self.hidden_rows([ids])[0])
        read = ids if decoder_ids is None else decoder_ids
        with self.rows(None if decoder_ids is None else [ids]) as session:
            return session.read_all(read)

    def hidden_rows(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        with self.scheduler.exclusive():
            return self.engine.hidden(rows)

    def pair_logits(self, ids: Sequence[int], segments: Sequence[int]) -> np.ndarray:
        with self.scheduler.exclusive():
            hidden = self.engine.hidden([ids], [segments])[0]
        return self.heads.pair_logits(hidden[0])

    def head_logits(self, pairs: Sequence[Any]) -> list[np.ndarray]:
        with self.scheduler.exclusive():
            found = self.engine.hidden([pair.ids for pair in pairs], [pair.segments for pair in pairs])
        head = self.heads.span_logits if self.config.span else self.heads.label_logits
        return [head(hidden) for hidden in found]

    def close(self) -> None:
        """Free the engine."""
        self.scheduler.close()
        if self._draft is not None:
            self._draft.close()


class NativeSession:
    """One text being read and continued, or several side by side; see `lexmill.inference.torch_backend.TorchSession`.

    What is read first is the prompt; what comes behind it counts as written by the model.

    Args:
        sources: what an encoder–decoder reads first, for each text.
    """

    def __init__(self, scheduler: Scheduler, sources: Sequence[Sequence[int]] | None = None) -> None:
        self._scheduler, self._engine = scheduler, scheduler.engine
        self.context = scheduler.context
        self._tables: list[Table] = []
        self._lengths: list[int] = []
        self._handles: list[int] = []
        if sources is not None:
            with scheduler.exclusive():
                self._handles = self._engine.remember(sources)
        self._memory = list(self._handles)  # of each text

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read on; returns float32 logits (vocab_size,) for what follows."""
        return self.read_rows([ids])[0]

    def read_rows(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Each text reads on: float32 logits (rows, vocab_size)."""
        return self._read(rows, every=False)

    def read_all(self, ids: Sequence[int]) -> np.ndarray:
        """Read on; float32 logits (len(ids), vocab_size) for what follows each."""
        return self._read([ids], every=True)

    def reorder(self, rows: Sequence[int]) -> None:
        """Text i becomes what text `rows[i]` was; there may be more or fewer than before."""
        with self._scheduler.exclusive():
            tables = [self._tables[row].fork() for row in rows]
            for table in self._tables:
                table.free()
        self._tables, self._lengths = tables, [self._lengths[row] for row in rows]
        if self._memory:
            self._memory = [self._memory[row] for row in rows]

    def close(self) -> None:
        """Give back the pages."""
        with self._scheduler.exclusive():
            for table in self._tables:
                table.free()
            if self._handles:
                self._engine.forget(self._handles)
        self._tables, self._handles = [], []

    def _read(self, rows: Sequence[Sequence[int]], *, every: bool) -> np.ndarray:
        prompt = not self._tables
        if prompt:
            self._tables = [Table(self._scheduler.store) for _ in rows]
            self._lengths = [0] * len(rows)
        for ids, length in zip(rows, self._lengths, strict=True):
            if length + len(ids) > self.context:
                raise ModelError(
                    f"The text would be {length + len(ids):,} tokens long, but there is room for {self.context:,}.",
                    "Shorten the prompt or ask for fewer tokens.",
                )
        found = np.empty((sum(map(len, rows)) if every else len(rows), self._engine.vocab_size), np.float32)
        with self._scheduler.exclusive():
            try:
                for row, ids in enumerate(rows):
                    start = self._lengths[row]
                    self._engine.copy_pages(self._tables[row].reserve(start, start + len(ids)))
            except OutOfPages:
                raise ModelError(
                    "There is no room for the keys and values of so many texts at once.",
                    "Ask for fewer beams or shorter texts, or load the model with more pages.",
                ) from None
            for at, batch in self._batches(rows, prompt, every):
                found[at] = self._engine.forward(batch)
        self._lengths = [length + len(row) for length, row in zip(self._lengths, rows)]
        return found

    def _batches(
        self, rows: Sequence[Sequence[int]], prompt: bool, every: bool
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """The tokens of all texts in batches, and which rows of the result each gives."""
        tokens = np.concatenate([np.asarray(ids, np.int32) for ids in rows])
        owners = np.repeat(np.arange(len(rows), dtype=np.int32), [len(ids) for ids in rows])
        positions = np.concatenate(
            [
                np.arange(start, start + len(ids), dtype=np.int32)
                for start, ids in zip(self._lengths, rows, strict=True)
            ]
        )
        tables = np.full((len(rows), max(len(table.pages) for table in self._tables)), NO_PAGE, np.int32)
        for row, table in enumerate(self._tables):
            tables[row, : len(table.pages)] = table.pages
        last = np.ones(len(tokens), bool) if every else np.append(np.diff(owners) > 0, True)
        asked = np.cumsum(last) - 1  # the row of the result that a token's logits are
        for start in range(0, len(tokens), CHUNK):
            part = slice(start, start + CHUNK)
            wanted = np.flatnonzero(last[part]).astype(np.int32)
            yield (
                asked[part][wanted],
                Batch(
                    tokens=tokens[part],
                    positions=positions[part],
                    rows=owners[part],
                    tables=tables,
                    wanted=wanted,
                    prompt=prompt,
                    memory=np.array(self._memory, np.int32) if self._memory else None,
                ),
            )
