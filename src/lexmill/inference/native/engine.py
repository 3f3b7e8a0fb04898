"""The compiled engine behind `interface.Engine`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

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
from lexmill.inference.native.packed import FLOAT16, FLOAT32, load_packed
from lexmill.inference.native.plan import READ, WRITE, Plan, make_plan
from lexmill.inference.native.sources import Source

_LONGEST = 32768  # tokens; longer contexts on request


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
        self.config = source.config
        self.threads = threads or usable_threads()
        self.context = (
            min(context or _LONGEST, self.config.context)
            if self.config.positions != "relative"
            else (context or _LONGEST)
        )
        self.pages = pages or 4 * -(-self.context // BLOCK)
        self.vocab_size = self.config.vocab_size
        self.chunk = CHUNK if self.config.shape == "decoder" else max(CHUNK, self.context)
        self._plan = make_plan(source, self.context)
        self.matrices = load_packed(source, self._plan.matrices, self.threads, keep=keep)
        self._engine = self._open(instruction_set)
        self._memory: dict[int, np.ndarray] = {}
        self._lengths: dict[int, int] = {}

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
            self.pages,
            self.chunk,
            self.context,
            self.config.heads,
            self.config.kv_heads,
            self.config.head_width,
            int(types == {FLOAT32}),
            int(bool(types & {FLOAT32, FLOAT16})),
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
            pages = max(len(self._memory[handle]) for handle in handles)
            table = np.zeros((len(handles), pages), np.int32)
            for row, handle in enumerate(handles):
                table[row, : len(self._memory[handle])] = self._memory[handle]
            values["memory_tables"] = table
            values["memory_lengths"] = np.array([self._lengths[handle] for handle in handles])
        self._run(WRITE, values, wanted, batch.prompt, out)
        return out

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
        if not 0 < count <= self.chunk:
            raise DataError(f"A batch has from 1 to {self.chunk} tokens, not {count}.")
        ids = arrays["ids"]
        assert ids.min() >= 0 and ids.max() < self.vocab_size, "an id outside the vocabulary"
        assert arrays["positions"].max() < self.context, "a position outside the context"
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
        if self._engine:
            library().lexmill_engine_close(self._engine)
            self._engine = 0

    def __del__(self) -> None:
        if getattr(self, "_engine", 0):
            self.close()


def _whole(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.int32)


def _structs(plan: Plan, which: int) -> ctypes.Array[ctypes.Structure]:
    operations = plan.operations[which]
    found = (OperationStruct * max(len(operations), 1))()
    for struct, operation in zip(found, operations):
        for name, value in vars(operation).items():
            setattr(struct, name, (ctypes.c_int64 * 3)(*value) if isinstance(value, tuple) else value)
    return found
