"""Collects an importance matrix: runs a model over text and adds up the squares of what each matrix is multiplied with.

A column of a matrix that always meets small numbers may be stored badly; one that meets large ones
may not. What llama.cpp collects (tools/imatrix) is collected here: the matrices of all blocks, and the
output projection where it is not the embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lexmill.errors import DataError
from lexmill.formats.imatrix import Entry, ImportanceMatrix
from lexmill.inference.language_model import LanguageModel
from lexmill.model.attention import Attention
from lexmill.model.names import weight_names
from lexmill.progress import SILENT, Progress

_OUTPUT = "output.weight"


def collect_importance(
    model: LanguageModel,
    text: str,
    *,
    chunk_size: int = 512,
    chunks: int | None = None,
    dataset: str = "",
    progress: Progress = SILENT,
) -> ImportanceMatrix:
    """Run a decoder over a text in chunks that know nothing of each other.

    Args:
        model: a decoder.
        text: cut into chunks of `chunk_size` tokens; what is left over is not used. Each begins with the
            token that the tokenizer puts before a text, in place of its first one, as in llama.cpp.
        chunk_size: tokens; at most the model's context.
        chunks: how many at most.
        dataset: what the matrix shall call the text.

    Raises:
        DataError: the model is no decoder, the text fills no chunk, or an activation is not finite.
    """
    if model.config.shape != "decoder":
        raise DataError(
            f"An importance matrix is collected from decoders, not from models of the shape '{model.config.shape}'."
        )
    chunk_size = min(chunk_size, model.config.context)
    ids = model.tokenizer.encode(text, special=False)
    begin = model.tokenizer.encode("")
    count = min(len(ids) // chunk_size, chunks if chunks is not None else len(ids))
    if count < 1:
        raise DataError(
            f"The text has {len(ids):,} tokens: too few for a chunk of {chunk_size:,}.",
            "Take more text, or smaller chunks.",
        )
    sums = _Sums()
    with (
        progress.task("collecting importance", count * chunk_size, "tokens") as task,
        torch.inference_mode(),
        _listening(model.network, sums),
    ):
        for start in range(0, count * chunk_size, chunk_size):
            part = begin + ids[start + len(begin) : start + chunk_size]
            model.network(torch.tensor([part], device=next(model.network.parameters()).device))
            task.advance(chunk_size)
    return ImportanceMatrix(sums.entries(), count, chunk_size, (dataset,) if dataset else ())


class _Sums:
    """Sums of squares in float64, by the names of GGUF files."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, names: Sequence[str], x: Tensor) -> None:
        """Count `x` of shape (…, columns), for all of these matrices."""
        rows = x.reshape(-1, x.shape[-1])
        squares = rows.float().square().sum(0).double()
        for name in names:
            self._squares[name] = self._squares.get(name, 0) + squares
            self._counts[name] = self._counts.get(name, 0) + len(rows)

    def entries(self) -> dict[str, Entry]:
        """What was added up.

        Raises:
            DataError: a sum is not finite.
        """
        found = {}
        for name, squares in self._squares.items():
            numbers = squares.cpu().numpy().astype(np.float32)[None]
            if not np.isfinite(numbers).all():
                raise DataError(
                    f"What '{name}' is multiplied with is not finite.",
                    "The model is damaged; lexmill verify tells more.",
                )
            found[name] = Entry(numbers, np.array([self._counts[name]], np.float32))
        return found


@contextlib.contextmanager
def _listening(network: nn.Module, sums: _Sums) -> Iterator[None]:
    """While the block runs, every matrix of `network` adds what it meets to `sums`."""
    config: Any = network.config
    names = {name.own: name.gguf for name in weight_names(config) if name.gguf}

    def gguf(module: str) -> str:
        return names.get(f"{module}.weight", "")

    def listen(module: nn.Module, matrices: list[str]) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: sums.add(matrices, inputs[0]))

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            # queries, keys and values are one product there, so that the layers themselves are never called
            handles.append(listen(module, [gguf(f"{name}.{part}") for part in "qkv"]))
        elif isinstance(module, nn.Linear) and gguf(name) not in ("", _OUTPUT):
            handles.append(listen(module, [gguf(name)]))
    if not config.tied:
        last = network.get_submodule("decoder.norm")
        handles.append(last.register_forward_hook(lambda _, __, x: sums.add([_OUTPUT], x)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
