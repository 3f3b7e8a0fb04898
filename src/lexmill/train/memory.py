"""What to change when a step of training does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lexmill.errors import TrainingError


@contextlib.contextmanager
def explain_no_memory(rows: int, length: int) -> Iterator[None]:
    """Turn "no memory", in torch's several wordings, into an error that says what to do.

    Args:
        rows: that are computed at once, each of `length` tokens.

    Raises:
        TrainingError: there was not enough memory inside the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # on a CPU torch knows no kind of its own for it
        full = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        if not full and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"Out of memory in a step: {rows} rows of {length} tokens at once are too much.",
            f"Set micro_rows = {max(1, rows // 2)} (the result stays the same, a step takes a little longer), "
            "a smaller row_length, or a smaller model. 'lexmill pretrain --plan' tells what a run needs.",
        ) from error
