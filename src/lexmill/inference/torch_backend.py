"""The torch backend: models of the three shapes behind faces of plain lists and NumPy arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.inference.generation import GenerationConfig, Step, generate
from lexmill.model.cache import Cache
from lexmill.model.scope import Record
from lexmill.tokenizer.tokenizer import Tokenizer

_UNLIMITED = 1 << 30  # tokens; relative positions know no end


def _ids(model: Any, values: Any) -> Tensor:
    """Whole numbers where the model computes."""
    return torch.tensor(values, device=next(model.parameters()).device)


class TorchSession:
    """One text being read and continued (`lexmill.inference.generation.Session`), or several side by side.

    Args:
        model: a decoder, or an encoder–decoder.
        source: what an encoder–decoder reads first; it then writes from its start token on.
        sources: the same for several texts.
    """

    def __init__(
        self, model: Any, source: Sequence[int] = (), *, sources: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._model = model
        self._cache = Cache(model.config)
        self._memory: Tensor | None = None
        self._memory_mask: Tensor | None = None
        relative = model.config.positions == "relative"
        self.context = _UNLIMITED if relative else model.config.context
        if model.config.shape == "encoder_decoder":
            tokens, mask = _padded(model, [list(source)] if sources is None else sources)
            self._memory_mask = mask
            with torch.inference_mode():
                self._memory = model.encode(tokens, mask)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read on; returns float32 logits (vocab_size,) for what follows."""
        return self.read_rows([list(ids)])[0]

    def read_rows(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Each text reads on: float32 logits (rows, vocab_size).

        All read as many tokens, but for the first ones of a decoder, its prompts.
        """
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        if min(lengths) < longest:  # on the left, so that all go on from the same place
            assert self._cache.length == 0 and self._memory is None
            padding = _ids(self._model, [longest - length for length in lengths])
            self._cache = Cache(self._model.config, len(rows), padding)
            rows = [[0] * (longest - len(row)) + list(row) for row in rows]
        elif self._cache.length == 0 and len(rows) > 1:
            self._cache = Cache(self._model.config, len(rows))
        tokens = _ids(self._model, rows)
        with torch.inference_mode():
            if self._memory is None:
                hidden = self._model.hidden(tokens, cache=self._cache)
            else:
                hidden = self._model.decode(
                    tokens, self._memory, memory_mask=self._memory_mask, cache=self._cache
                )
            return F.linear(hidden[:, -1], self._model.head_weight).float().cpu().numpy()

    def reorder(self, rows: Sequence[int]) -> None:
        """Text i becomes what text `rows[i]` was; there may be more or fewer than before."""
        index = _ids(self._model, rows)
        self._cache.reorder(index)
        if self._memory is not None:
            self._memory = self._memory[index]
        if self._memory_mask is not None:
            self._memory_mask = self._memory_mask[index]


class TorchBackend:
    """A model in torch (`lexmill.inference.backend.Backend`)."""

    name = "torch"
    room: int | None = None

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def write(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: GenerationConfig,
        source: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        return generate(TorchSession(self.model, source or ()), tokenizer, prompt, config)

    @contextlib.contextmanager
    def rows(self, sources: Sequence[Sequence[int]] | None = None) -> Iterator[TorchSession]:
        yield TorchSession(self.model, sources=sources)

    def all_logits(self, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> np.ndarray:
        return all_logits(self.model, ids, decoder_ids)

    def hidden_rows(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return hidden_rows(self.model, rows)

    def pair_logits(self, ids: Sequence[int], segments: Sequence[int]) -> np.ndarray:
        return pair_logits(self.model, ids, segments)

    def close(self) -> None:
        pass

    def head_logits(self, pairs: Sequence[Any]) -> list[np.ndarray]:
        return head_logits(self.model, pairs)


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Rows filled up behind their ends, and which places are real, (rows, 1, 1, longest); None where all are."""
    longest = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    real = np.zeros((len(rows), longest), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        real[index, : len(row)] = True
    return _ids(model, tokens), None if bool(real.all()) else _ids(model, real)[:, None, None]


def all_logits(model: Any, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> np.ndarray:
    """Logits at every position of one text, float32: (len(ids), vocab_size).

    Of an encoder they are those of its masked-language-modelling head; of an encoder–decoder they
    belong to `decoder_ids`.
    """
    with torch.inference_mode():
        tokens = _ids(model, [list(ids)])
        if decoder_ids is None:
            return model(tokens)[0].float().cpu().numpy()
        return model(tokens, _ids(model, [list(decoder_ids)]))[0].float().cpu().numpy()


def pair_logits(model: Any, ids: Sequence[int], segments: Sequence[int]) -> np.ndarray:
    """The next-sentence head on a pair of texts: [follows, does not follow], float32."""
    with torch.inference_mode():
        hidden = model.hidden(_ids(model, [list(ids)]), segments=_ids(model, [list(segments)]))
        return model.pair_logits(hidden[:, 0])[0].float().cpu().numpy()


def hidden_rows(model: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The last hidden states of several texts at once, each (len(row), width), float32."""
    tokens, mask = _padded(model, rows)
    with torch.inference_mode():
        if model.config.shape == "decoder":
            hidden = model.hidden(tokens)  # what fills a row stands behind it, where nothing looks
        elif model.config.shape == "encoder":
            hidden = model.hidden(tokens, mask=mask)
        else:
            hidden = model.encode(tokens, mask)
    return [hidden[index, : len(row)].float().cpu().numpy() for index, row in enumerate(rows)]


def look_inside(
    model: Any, ids: Sequence[int], decoder_ids: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Hidden states and attention weights of every layer, as arrays.

    Returns:
        "hidden" (layers + 1, n, width) and "attention" (layers, heads, n, n); for an
        encoder–decoder with `decoder_ids` also "decoder_attention" (layers, heads, m, m) and
        "cross" (layers, heads, m, n).
    """
    tokens, first, second = _ids(model, [list(ids)]), Record(), Record()
    with torch.inference_mode():
        if model.config.shape == "encoder_decoder":
            memory = model.encode(tokens, record=first)
            if decoder_ids is not None:
                model.decode(_ids(model, [list(decoder_ids)]), memory, record=second)
        else:
            model.hidden(tokens, record=first)
    parts = {
        "hidden": first.hidden,
        "attention": first.attention,
        "decoder_attention": second.attention,
        "cross": second.cross,
    }
    return {name: torch.cat(found).float().cpu().numpy() for name, found in parts.items() if found}


def head_logits(model: Any, pairs: Sequence[Any]) -> list[np.ndarray]:
    """What the head of an encoder's task says of texts or pairs computed at once (`lexmill.tokenizer.pairs.Pair`).

    Returns:
        Of each pair (labels,), or (tokens, 2) from a head that finds answers; float32.
    """
    longest = max(len(pair) for pair in pairs)
    tokens, segments = np.zeros((2, len(pairs), longest), np.int64)
    real = np.zeros((len(pairs), longest), bool)
    for index, pair in enumerate(pairs):
        tokens[index, : len(pair)], segments[index, : len(pair)] = pair.ids, pair.segments
        real[index, : len(pair)] = True
    mask = None if bool(real.all()) else _ids(model, real)[:, None, None]
    with torch.inference_mode():
        hidden = model.hidden(_ids(model, tokens), mask=mask, segments=_ids(model, segments))
        if model.config.span:
            found = model.span_logits(hidden).float().cpu().numpy()
            return [found[index, : len(pair)] for index, pair in enumerate(pairs)]
        if model.config.label_pooling == "mean":
            weights = _ids(model, real)[..., None].to(hidden.dtype)
            summary = (hidden * weights).sum(1) / weights.sum(1)
        else:
            summary = hidden[:, 0]
        return list(model.label_logits(summary).float().cpu().numpy())
