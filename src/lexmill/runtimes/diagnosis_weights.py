"""Which mistake turns a model's weights into those of a GGUF file, in words.

Each weight that is not the model's is tried against the ways in which converters go wrong: rows not
reordered, a matrix transposed, the weight of another place, scales that left their blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lexmill.formats.gguf import GGUFFile
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_rope import ROPE_FREQS, divisors_differ
from lexmill.model.gguf_shapes import held_weights, permute_rope, read_weight, weight_in_gguf
from lexmill.model.names import WeightName
from lexmill.runtimes.llama_cpp import tensor_error

_BLOCK = 32  # weights under one scale, in the types that scale blocks


class _Places:
    """The first row of each of a model's weights, by its name in the file; read once, when first asked for."""

    def __init__(self, model: ModelDirectory) -> None:
        self._model = model

    @functools.cached_property
    def _rows(self) -> list[tuple[WeightName, tuple[int, ...], np.ndarray]]:
        found = ((name, weight_in_gguf(self._model, name)) for name in held_weights(self._model.config))
        return [(name, weight.shape, np.atleast_2d(weight)[0].copy()) for name, weight in found]

    def alike(self, tensor: np.ndarray) -> Iterator[WeightName]:
        """The weights of a tensor's shape whose first rows point where its own does."""
        first = np.atleast_2d(tensor)[0]
        for name, shape, row in self._rows:
            if shape == tensor.shape and row @ first > 0.9 * np.linalg.norm(row) * np.linalg.norm(first):
                yield name


class _Wrong(NamedTuple):
    """A tensor that is not the model's weight.

    Attributes:
        name: of the weight.
        found: what the file holds, float32.
        weight: what it should hold; of the same shape, unless a symptom says otherwise.
        type: of the tensor, "Q8_0" and so on.
        places: where else in the model it may come from.
    """

    name: WeightName
    found: np.ndarray
    weight: np.ndarray
    type: str
    model: ModelDirectory
    places: _Places

    def holds(self, weight: np.ndarray) -> bool:
        """Whether the tensor is this, but for the rounding of its type."""
        if weight.shape != self.found.shape:
            return False
        return tensor_error(self.found, np.ascontiguousarray(weight), self.type) <= 1


def weight_causes(file: GGUFFile, model: ModelDirectory) -> Iterator[str]:
    """One sentence a mistake, with the tensors that show it.

    Raises:
        FormatError: a tensor of a type that cannot be read.
    """
    tensors: dict[str, list[str]] = {}  # by sentence
    held, places = held_weights(model.config), _Places(model)
    for name in held:
        sentence = _cause(file, model, name, places)
        if sentence:
            tensors.setdefault(sentence, []).append(name.gguf)
    extra = file.tensors.keys() - {name.gguf for name in held} - {ROPE_FREQS}
    if differs := divisors_differ(file, model.config):
        tensors.setdefault("Rotary positions are not scaled as the model's", []).append(differs)
    if extra:
        tensors.setdefault("The file has tensors that the model has not", []).extend(sorted(extra))
    if sum(map(len, tensors.values())) == len(held) and set(tensors) <= {_OTHER}:
        yield "Not one weight is the model's: the file was made of another model, or of another checkpoint."
        return
    for sentence, names in tensors.items():
        more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
        yield f"{sentence}: {', '.join(names[:2])}{more}."


_OTHER = "Weights are not the model's, and no known mistake makes them so"


def _cause(file: GGUFFile, model: ModelDirectory, name: WeightName, places: _Places) -> str:
    """What is wrong with one weight; "" where nothing is."""
    weight = weight_in_gguf(model, name)
    info = file.tensors.get(name.gguf)
    if info is None:
        return _missing(name)
    if info.shape != name.whole_shape(weight.shape):
        return _misshapen(info.shape, name.whole_shape(weight.shape))
    wrong = _Wrong(name, read_weight(file, name), weight, info.type.name, model, places)
    if wrong.holds(weight):
        return ""
    for symptom in _SYMPTOMS:
        sentence = symptom(wrong)
        if sentence:
            return sentence
    return _OTHER


def _missing(name: WeightName) -> str:
    if name.gguf == "output.weight":
        return (
            "The head is untied, but was written as tied: without its projection "
            "llama.cpp takes the embedding in its place"
        )
    if name.gguf.endswith(".bias"):
        return "Biases were left out"
    return "Tensors are missing"


def _misshapen(found: tuple[int, ...], meant: tuple[int, ...]) -> str:
    if found == meant[::-1]:
        return f"Matrices are transposed, {found} instead of {meant}"
    if found[1:] == meant[1:]:
        what = "padded to" if found[0] > meant[0] else "cut to"
        return f"Rows were {what} {found[0]:,} instead of {meant[0]:,}, as if for another size of vocabulary"
    return f"Tensors have the shape {found} instead of {meant}"


def _rows_of_heads(wrong: _Wrong) -> str:
    """llama.cpp's `llama` wants the rows of queries and keys in another order; its other architectures do not."""
    config, own = wrong.model.config, wrong.model.weight(wrong.name.own)
    if not wrong.name.rope:
        return ""
    heads = config.heads if wrong.name.rope == "q" else config.kv_heads
    if config.family == "llama" and wrong.holds(own):
        return "Rows of queries and keys are not permuted for llama.cpp's rotary positions"
    if wrong.holds(permute_rope(wrong.weight, heads)):
        again = "twice " if config.family == "llama" else ""
        return f"Rows of queries and keys are permuted {again}for rotary positions that do not want it"
    grouped = config.family == "llama" and wrong.name.rope == "k" and config.heads != config.kv_heads
    if grouped and len(own) % (2 * config.heads) == 0 and wrong.holds(permute_rope(own, config.heads)):
        return "Rows of keys are permuted as if there were as many key heads as query heads"
    return ""


def _transposed(wrong: _Wrong) -> str:
    if wrong.weight.ndim != 2:
        return ""
    # of a matrix that is not square only the sizes are right, and what lies in memory is the transpose
    turned = wrong.weight.T.reshape(wrong.weight.shape)
    return "Matrices are transposed" if wrong.holds(turned) else ""


def _other_place(wrong: _Wrong) -> str:
    """Layers in another order, gate and up in each other's place, the embedding as the head."""
    for name in wrong.places.alike(wrong.found):
        if name.gguf != wrong.name.gguf and wrong.holds(weight_in_gguf(wrong.model, name)):
            return f"Weights are in each other's place: {wrong.name.gguf} holds {name.gguf}"
    return ""


def _shifted(wrong: _Wrong) -> str:
    """Some families keep their norms as what is added to one."""
    for sign in (1, -1):
        if wrong.weight.ndim == 1 and wrong.holds(wrong.weight + np.float32(sign)):
            return (
                f"Norms are one too {'large' if sign > 0 else 'small'}, as in families that add one to them"
            )
    return ""


def _rounded_before(wrong: _Wrong) -> str:
    if wrong.type not in ("F32", "F16"):
        return ""
    low = wrong.found.view(np.uint32) & 0xFFFF
    if not low.any() and tensor_error(wrong.found, wrong.weight, "BF16") <= 2:  # cut off or rounded
        return f"Weights were rounded to BF16 before they became {wrong.type}"
    if wrong.type == "F32" and tensor_error(wrong.found, wrong.weight, "F16") <= 1:
        return "Weights were rounded to F16 before they became F32"
    return ""


def _scales(wrong: _Wrong) -> str:
    """Blocks that are the model's but for one factor each."""
    if wrong.weight.size % _BLOCK or wrong.weight.ndim != 2 or wrong.weight.shape[-1] % _BLOCK:
        return ""
    found, meant = (values.reshape(-1, _BLOCK).astype(np.float64) for values in (wrong.found, wrong.weight))
    norms = np.linalg.norm(found, axis=1), np.linalg.norm(meant, axis=1)
    cosines = (found * meant).sum(1) / np.maximum(norms[0] * norms[1], 1e-30)
    empty = (norms[0] == 0) | (norms[1] == 0)
    if (np.abs(cosines[~empty]) < 0.98).any() or not (~empty).any():
        return ""
    factors = norms[0][~empty] / norms[1][~empty] * np.sign(cosines[~empty])
    off = np.abs(factors - 1) > 0.02
    if off.mean() > 0.9 and np.ptp(factors) < 0.02 * abs(np.median(factors)):
        return f"Weights are multiplied with {np.median(factors):.4g}"
    if not off.any():
        return ""
    largest = [np.sort(np.abs(values).max(1)) for values in (found, meant)]
    shuffled = np.allclose(largest[0], largest[1], rtol=0.05)
    return f"The scales of quantised blocks are {'shuffled' if shuffled else 'wrong'}"


def _cut(wrong: _Wrong) -> str:
    found, weight = wrong.found.reshape(-1), wrong.weight.reshape(-1)
    end = int(np.flatnonzero(found)[-1]) + 1 if found.any() else 0
    if weight[end:].any() and len(found) - end >= _BLOCK:
        return f"Tensors are cut off and filled with zeros, the first from place {end:,} of {len(found):,}"
    return ""


def _few(wrong: _Wrong) -> str:
    """A damaged file: next to all is right."""
    error = np.abs(wrong.found - wrong.weight)
    allowed = 0.02 * np.abs(wrong.weight).max() if wrong.type != "F32" else 0.0
    off = np.argwhere(~(error <= allowed))
    if 0 < len(off) <= max(1, wrong.weight.size // 20):
        at = ", ".join(map(str, off[0]))
        return f"Single weights are damaged, {len(off):,} of {wrong.weight.size:,}, the first at [{at}]"
    return ""


_SYMPTOMS: tuple[Callable[[_Wrong], str], ...] = (
    _rows_of_heads,
    _transposed,
    _other_place,
    _shifted,
    _rounded_before,
    _cut,
    _few,
    _scales,
)
