"""An adapter and its base as one plain model directory, and what that costs in precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import ConfigError, ModelError
from lexmill.formats.safetensors import from_bfloat16
from lexmill.model.adapter import MergedWeights
from lexmill.model.adapter_files import AdapterDirectory
from lexmill.model.directory import ModelDirectory, convert, write_model_directory
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.huggingface import check_target, publish
from lexmill.runtimes.import_model import DTYPES


@dataclass(frozen=True)
class Merged:
    """A merged model, and what rounding did to it.

    Attributes:
        model: the new directory.
        dtypes: how changed weights are stored now.
        largest_error: of a stored weight, by its exact value.
        lost: the rounding of changed weights, as a share of what the adapter changed in them: root mean
            squares. Near 0 nothing is lost; near 1 the adapter is as good as gone.
        quantised: the type in which the base was kept while the adapter learned; "" for float32.
        as_trained: whether what those bits said was merged into, and not the base's own weights.
    """

    model: ModelDirectory
    dtypes: tuple[str, ...]
    largest_error: float
    lost: float
    quantised: str
    as_trained: bool

    def said(self) -> list[str]:
        """For a reader."""
        types = " and ".join(self.dtypes) or "nothing"
        lines = [
            f"weights are stored as {types}: rounding took {100 * self.lost:.2g} % of the adapter's change "
            f"(root mean square; the largest error of a weight is {self.largest_error:.2g})"
        ]
        if self.quantised:
            which = "what they said" if self.as_trained else "the base's own weights"
            lines.append(
                f"the adapter learned on a base kept in {self.quantised}; it was merged into {which}"
                + ("" if self.as_trained else f" (--as-trained takes what the {self.quantised} weights said)")
            )
        return lines


def merge_adapter(
    adapter: AdapterDirectory | Path | str,
    out: Path | str,
    *,
    dtype: str = "auto",
    as_trained: bool = False,
    progress: Progress = SILENT,
) -> Merged:
    """Write the base with an adapter in it as a plain model directory, whole or not at all.

    All else is the base's, byte for byte. In float32 the logits are those of the unmerged model within 1e-5.

    Args:
        dtype: how to store weights: "auto" as the base's are, which rounds where they have 16 bits; or "f32",
            "f16", "bf16".
        as_trained: merge into what the base's weights were while the adapter learned, if they were quantised.

    Raises:
        ConfigError: an unknown dtype.
        ModelError: `as_trained` for an adapter whose base was not quantised.
        FileError: no space, or something else at `out`.
    """
    if dtype.lower() not in DTYPES:
        raise ConfigError(f"There is no dtype '{dtype}'.", f"Take one of {', '.join(DTYPES)}.")
    adapter = adapter if isinstance(adapter, AdapterDirectory) else AdapterDirectory.open(adapter)
    if as_trained and not adapter.quantised:
        raise ModelError(
            f"{adapter.path}: the base was not quantised while this adapter learned.",
            "Leave --as-trained out.",
        )
    out = Path(out)
    check_target(adapter.base.path, out)
    base, kind = adapter.base, DTYPES[dtype.lower()]
    lineage: dict[str, Any] = {**base.lineage, **adapter.lineage, "merged": {"dtype": kind or "as the base"}}
    lineage.pop("adapter", None)
    with progress.task("merging", base.config.parameters, "weights") as task:
        weights = _Watched(adapter, adapter.merged(as_trained), kind, task)
        if base.begun:  # the adapter brings a head that the base's files have no place for
            dtypes = {own: kind or base.weight_dtype(own) for own in weights}
            model = write_model_directory(
                out, base.config, weights, base.tokenizer, lineage, dtypes=dtypes, pooling=base.pooling
            )
        else:
            model = publish(base, out, lineage=lineage, dtype=kind, changed=weights)
    return Merged(
        model, tuple(sorted(weights.dtypes)), weights.largest, weights.lost, adapter.quantised, as_trained
    )


class _Watched(Mapping[str, np.ndarray]):
    """Merged weights as they are written, and what storing them loses."""

    def __init__(self, adapter: AdapterDirectory, weights: MergedWeights, dtype: str, task: Task) -> None:
        self._adapter, self._weights, self._dtype, self._task = adapter, weights, dtype, task
        self.dtypes: set[str] = set()
        self.largest = self._errors = self._changes = 0.0

    @property
    def lost(self) -> float:
        return float(np.sqrt(self._errors / self._changes)) if self._changes else 0.0

    def __getitem__(self, own: str) -> np.ndarray:
        weight, change = self._weights[own], self._weights.change(own)
        self._task.advance(weight.size)
        if change is not None:
            dtype = self._dtype or self._adapter.base.weight_dtype(own)
            stored = convert(weight, dtype)
            back = from_bfloat16(stored) if dtype == "BF16" else stored.astype(np.float32)
            # in float64: the sum itself is rounded too
            error = np.abs(back - (self._weights.base(own).astype(np.float64) + change))
            self.dtypes.add(dtype)
            self.largest = max(self.largest, float(error.max()))
            self._errors += float(np.square(error).sum())
            self._changes += float(np.square(change, dtype=np.float64).sum())
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
