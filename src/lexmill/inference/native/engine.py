"""The compiled engine behind `interface.Engine`."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from lexmill.devices import threads as usable_threads
from lexmill.errors import DataError, ModelError
from lexmill.inference.native.interface import BLOCK, CHUNK, Batch
from lexmill.inference.native.library import (
    INSTRUCTION_SETS,
    BatchStruct,
    MatrixStruct,
    OperationStruct,
    PlanStruct,
    library,
)
from lexmill.inference.native.packed import BFLOAT16, FLOAT16, FLOAT32, load_packed
from lexmill.inference.native.plan import READ, WRITE, Plan, make_plan
from lexmill.inference.native.sources import Source

_LONGEST = 32768  # tokens; longer contexts on request
_UNBOUNDED = 2048  # tokens of a text, where positions set no limit
_TEXTS = 64  # that are read at once, at most


class NativeEngine:
    """See `interface.Engine`."""

    def __init__(
        self,
        source: Source,
        *,
        threads: int | None = None,
        context: int | None = None,
        pages: int | None = None,
        instruction_set: str = INSTRUCTION_SETS[-1],
        keep: bool = True,
    ) -> None:
        self.config = config = source.config
        self.threads = threads or usable_threads()
        longest = max(config.context, _UNBOUNDED) if config.positions == "relative" else config.context
        self.context = min(context or _LONGEST, longest)
        self.vocab_size = config.vocab_size
        # a text that is read as a whole is one batch
        self.batch_tokens = CHUNK if config.shape == "decoder" else max(CHUNK, self.context)
        writes = config.shape != "encoder"
        self.pages = (pages or 4 * -(-self.context // BLOCK)) if writes else 0
        longest_batch = max(self.batch_tokens, self.context)
        reading = (-(-longest_batch // BLOCK) + _TEXTS) * (4 if config.shape == "encoder_decoder" else 1)
        self._free = list(range(self.pages, self.pages + reading))
        self._all_pages = self.pages + len(self._free)
        self._plan = make_plan(source, self.context)
        self.matrices = load_packed(source, self._plan.matrices, self.threads, keep=keep)
        self._engine = self._open(instruction_set)
        self._finish = weakref.finalize(self, library().lexmill_engine_close, self._engine)
        self._memory: dict[int, np.ndarray] = {}  # the pages of each text that was read and kept
        self._lengths: dict[int, int] = {}
        self._handles = itertools.count()

    @classmethod
    def open(cls, source: Source, **options: object) -> NativeEngine:
        """Lower a model, lay out its weights (or map them from the file that keeps them), start the threads.

        Args:
            threads: as many as the computer has cores where not given.
            context: the longest text; the model's, at most 32,768, where not given.
            pages: of keys and values; four contexts where not given.
            instruction_set: hold it down, for tests.
            keep: write the file of laid-out weights.

        Raises:
            ModelError: the engine was not built, or does not hold this model; not enough memory.
        """
        return cls(source, **options)  # type: ignore[arg-type]

    def _open(self, instruction_set: str) -> int:
        plan = self._plan
        types = {matrix.type for matrix, name in zip(self.matrices, plan.matrices) if ".blocks." in name}
        arrays = [
            (MatrixStruct * len(self.matrices))(*(matrix.struct() for matrix in self.matrices)),
            (ctypes.c_void_p * len(plan.vectors))(*(vector.ctypes.data for vector in plan.vectors)),
            (ctypes.c_int64 * len(plan.vectors))(*(vector.size for vector in plan.vectors)),
            (ctypes.c_int64 * len(plan.buffers))(*plan.buffers),
            *(_structs(plan, which) for which in (READ, WRITE)),
        ]
        addresses = [ctypes.addressof(array) for array in arrays]
        struct = PlanStruct(
            len(self.matrices),
            len(plan.vectors),
            len(plan.buffers),
            (ctypes.c_int64 * 2)(*(len(each) for each in plan.operations)),
            max(plan.slots, 1),
            self._all_pages,
            self.batch_tokens,
            self.context,
            self.config.heads,
            self.config.kv_heads,
            self.config.head_width,
            int(types == {FLOAT32}),
            _parts(types),
            *addresses[:4],
            (ctypes.c_void_p * 2)(*addresses[4:]),
        )
        found = library().lexmill_engine_open(
            ctypes.addressof(struct), self.threads, INSTRUCTION_SETS.index(instruction_set)
        )
        if not found:
            raise ModelError(
                "There is not enough memory for this model.", "Ask for fewer pages, or a smaller context."
            )
        return int(found)

    def forward(self, batch: Batch) -> np.ndarray:
        """See `interface.Engine.forward`."""
        wanted = _whole(batch.wanted)
        out = np.empty((len(wanted), self.vocab_size), np.float32)
        values = {
            "ids": batch.tokens,
            "positions": batch.positions,
            "row": batch.rows,
            "tables": batch.tables,
        }
        if batch.memory is not None:
            handles = batch.memory.tolist()
            values["memory_tables"] = _table([self._memory[handle] for handle in handles])
            values["memory_lengths"] = np.array([self._lengths[handle] for handle in handles])
        self._run(WRITE, values, wanted, batch.prompt, out)
        return out

    def hidden(
        self, texts: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> list[np.ndarray]:
        """See `interface.Engine.hidden`."""
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(texts)
        for group in self._groups(texts):
            handles, hidden = self._read(
                [texts[index] for index in group], segments and [segments[index] for index in group]
            )
            self.forget(handles)
            ends = np.cumsum([len(texts[index]) for index in group])[:-1]
            for index, rows in zip(group, np.split(hidden, ends)):
                found[index] = rows
        return found

    def remember(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """See `interface.Engine.remember`."""
        handles = [0] * len(texts)
        for group in self._groups(texts):
            for index, handle in zip(group, self._read([texts[index] for index in group], None)[0]):
                handles[index] = handle
        return handles

    def forget(self, handles: Sequence[int]) -> None:
        """See `interface.Engine.forget`."""
        for handle in handles:
            self._free.extend(self._memory.pop(handle).tolist())
            del self._lengths[handle]

    def _groups(self, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Which texts are read together: in order, as many as a batch holds."""
        group: list[int] = []
        tokens = 0
        for index, text in enumerate(texts):
            if not 0 < len(text) <= self.context:
                raise DataError(f"A text has from 1 to {self.context:,} tokens, not {len(text):,}.")
            if group and (tokens + len(text) > self.batch_tokens or len(group) == _TEXTS):
                yield group
                group, tokens = [], 0
            group.append(index)
            tokens += len(text)
        if group:
            yield group

    def _read(
        self, texts: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None
    ) -> tuple[list[int], np.ndarray]:
        """Read a batch of whole texts: a handle of each, and the hidden states of all, (tokens, width)."""
        lengths = [len(text) for text in texts]
        counts = [-(-length // BLOCK) for length in lengths]
        if sum(counts) > len(self._free):
            raise ModelError("There is no room for so many texts at once.", "Ask for fewer.")
        handles = [next(self._handles) for _ in texts]
        for handle, count, length in zip(handles, counts, lengths):
            self._memory[handle] = np.array([self._free.pop() for _ in range(count)], np.int32)
            self._lengths[handle] = length
        table = _table([self._memory[handle] for handle in handles])
        tokens = {
            "ids": np.concatenate(texts),
            "positions": np.concatenate([np.arange(length) for length in lengths]),
            "row": np.repeat(np.arange(len(texts)), lengths),
        }
        if segments is not None:
            tokens["segments"] = np.concatenate(segments)
        whole = {
            "tables": table,
            "lengths": np.array(lengths),
            "memory_tables": table,
            "memory_lengths": np.array(lengths),
        }
        hidden = np.empty((sum(lengths), self.config.width), np.float32)
        for start in range(0, len(hidden), self.batch_tokens):  # a decoder may read a text in pieces
            part = slice(start, start + self.batch_tokens)
            values = {name: array[part] for name, array in tokens.items()} | whole
            self._run(READ, values, np.empty(0, np.int32), True, None)
            rows = hidden[part]
            library().lexmill_engine_read(
                self._engine, self._plan.stream, len(rows), self.config.width, rows.ctypes.data
            )
        return handles, hidden

    def _run(
        self,
        which: int,
        values: dict[str, np.ndarray],
        wanted: np.ndarray,
        prompt: bool,
        out: np.ndarray | None,
    ) -> None:
        arrays = {name: _whole(value) for name, value in values.items()}
        count = arrays["ids"].size
        if not 0 < count <= self.batch_tokens:
            raise DataError(f"A batch has from 1 to {self.batch_tokens} tokens, not {count}.")
        ids = arrays["ids"]
        assert ids.min() >= 0 and ids.max() < self.vocab_size, "an id outside the vocabulary"
        assert arrays["positions"].max() < self.context, "a position outside the context"
        rows, tables = arrays["row"], arrays["tables"]
        assert rows.min() >= 0 and rows.max() < len(tables) and tables.max() < self._all_pages
        assert not wanted.size or (wanted.min() >= 0 and wanted.max() < count)
        arrays["wanted_tokens"] = wanted
        struct = BatchStruct(
            tokens=count,
            wanted=wanted.size,
            rows=len(arrays["tables"]) if "tables" in arrays else 0,
            pages=arrays["tables"].shape[1] if "tables" in arrays else 0,
            memory_pages=arrays["memory_tables"].shape[1] if "memory_tables" in arrays else 0,
            prompt=int(prompt),
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        failed = library().lexmill_engine_run(
            self._engine, which, ctypes.addressof(struct), None if out is None else out.ctypes.data
        )
        if failed:
            raise ModelError("There is not enough memory for this batch.", "Ask for fewer texts at once.")

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `interface.Engine.copy_pages`."""
        for source, to in pairs:
            assert 0 <= source < self.pages and 0 <= to < self.pages
            library().lexmill_engine_copy_page(self._engine, source, to)

    def close(self) -> None:
        """See `interface.Engine.close`."""
        self._finish()


def _parts(types: set[int]) -> int:
    """As sums of how many numbers in bfloat16 the queries and keys of prompts are multiplied; 0: in float32.

    With weights of 8 or 4 bits their rounding is lost in that of the activations; with weights in bfloat16 it would
    be a third of all there is (docs/decisions.md).
    """
    if types & {FLOAT32, FLOAT16}:
        return 0
    return 2 if BFLOAT16 in types else 1


def _table(pages: Sequence[np.ndarray]) -> np.ndarray:
    """The pages of each text side by side, (texts, most pages)."""
    table = np.zeros((len(pages), max(map(len, pages))), np.int32)
    for row, one in zip(table, pages):
        row[: len(one)] = one
    return table


def _whole(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.int32)


def _structs(plan: Plan, which: int) -> ctypes.Array[ctypes.Structure]:
    operations = plan.operations[which]
    found = (OperationStruct * max(len(operations), 1))()
    for struct, operation in zip(found, operations):
        for name, value in vars(operation).items():
            setattr(struct, name, (ctypes.c_int64 * 3)(*value) if isinstance(value, tuple) else value)
    return found
