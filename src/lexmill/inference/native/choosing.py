"""The compiled choice of the next token (`native/engine/sampling.cpp`); `CHOOSE` is None where it was not built."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.errors import ModelError
from lexmill.inference.native.library import library


class _Choice(ctypes.Structure):
    """`LexmillChoice`."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "allowed", "seen")),
        *((name, c_int64) for name in ("vocabulary", "seen_count", "given")),
        *(
            (name, c_double)
            for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
        ),
        ("top_k", c_int64),
        ("uniform", c_double),
        ("best", c_int64),
        ("best_ids", c_void_p),
        ("best_logprobs", c_void_p),
        ("logprob", c_double),
    )


@dataclass(frozen=True)
class Chosen:
    """The next token; where asked for, its log-probability and the likeliest tokens with theirs."""

    token: int
    logprob: float = 0.0
    best: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Calls the compiled choice."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call = library.lexmill_choose
        self._call.argtypes, self._call.restype = [ctypes.POINTER(_Choice)], c_int64

    def __call__(
        self,
        logits: np.ndarray,
        seen: Sequence[int],
        given: int,
        config: Any,
        uniform: float,
        allowed: np.ndarray | None,
        best: int,
    ) -> Chosen:
        """The next token, or -1 where nothing is allowed, or -2 where a logit is no number.

        Args:
            logits: float32 (vocab_size,).
            seen: the ids of the text so far, `given` of them the prompt's.
            config: `lexmill.inference.sampling.SamplingConfig`.
            uniform: in [0, 1); decides the draw.
            allowed: uint32, a bit a token.
            best: how many of the likeliest to tell.
        """
        logits = np.ascontiguousarray(logits, np.float32)
        size = len(logits)
        ids = np.asarray(seen if config.penalises else (), np.int32)
        assert not len(ids) or (ids.min() >= 0 and ids.max() < size)
        assert allowed is None or (
            allowed.dtype == np.uint32 and allowed.flags.c_contiguous and 32 * allowed.size >= size
        )
        best = min(best, size)
        best_ids, best_logprobs = np.zeros(best, np.int32), np.zeros(best)
        choice = _Choice(
            logits.ctypes.data,
            None if allowed is None else allowed.ctypes.data,
            ids.ctypes.data,
            size,
            len(ids),
            min(given, len(ids)),
            config.temperature,
            config.top_p,
            config.min_p,
            config.repetition_penalty,
            config.presence_penalty,
            config.frequency_penalty,
            config.top_k,
            uniform,
            best,
            best_ids.ctypes.data,
            best_logprobs.ctypes.data,
            0.0,
        )
        token = int(self._call(ctypes.byref(choice)))
        return Chosen(token, choice.logprob, tuple(zip(best_ids.tolist(), best_logprobs.tolist())))


def _load() -> Chooser | None:
    try:
        return Chooser(library())
    except (ModelError, AttributeError):  # not built, or an older one left behind
        return None


CHOOSE = _load()
