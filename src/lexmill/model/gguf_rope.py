"""How a GGUF file says that rotary positions are scaled, both ways.

Linear scaling and YaRN are settings. Llama 3.1's is a tensor of divisors, from which what made it has to be
found again. Keys and what stands where they are missing: llama.cpp, src/llama-model.cpp, src/llama-context.cpp.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from lexmill.errors import ConfigError, FormatError, ModelError
from lexmill.formats.gguf import GGUFFile, Value, f32, string, u32
from lexmill.model.config import ModelConfig
from lexmill.model.gguf_keys import HINT, Keys, tidy
from lexmill.model.rope_scaling import RopeScaling, yarn_magnitude

ROPE_FREQS = "rope_freqs.weight"
SCALING_KEYS = (
    "rope.scale_linear",
    *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "attn_factor")),
)
# What these say is what holds without them. llama.cpp does not read YaRN's own ones for the families known here,
# so that with other values it would not be clear what a file means.
NEUTRAL: dict[str, Collection[str | float]] = {
    "rope.scaling.type": ("none", "linear", ""),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
}
# Divisors of one kind may be computed in several ways: a few units in the last place of float32.
_CLOSE = 1e-5
_LLAMA3 = (1.0, 4.0, 8192)  # of every model that Meta published


def is_neutral(key: str, value: object) -> bool:
    """Whether a key of rotary scaling leaves positions as they are."""
    name = "rope." + key.partition(".rope.")[2]
    return isinstance(value, (str, int, float)) and value in NEUTRAL.get(name, (value,))


def scaling_metadata(scaling: RopeScaling | None) -> dict[str, Value]:
    """The settings of a scaling, without the architecture before them."""
    if scaling is None or scaling.kind == "llama3":
        return {}
    found = {"rope.scaling.type": string(scaling.kind), "rope.scaling.factor": f32(scaling.factor)}
    if scaling.kind == "yarn":
        found["rope.scaling.original_context_length"] = u32(scaling.original_context)
        if scaling.attention is not None:  # llama.cpp takes the paper's and multiplies it with this
            found["rope.scaling.attn_factor"] = f32(scaling.attention / yarn_magnitude(scaling.factor))
    return found


def frequency_divisors(config: ModelConfig) -> np.ndarray | None:
    """By what llama.cpp divides each pair's frequency: (head_width / 2,) float32; None where there is no need."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    return _divisors(config.rope_scaling, config.head_width, config.rope_theta)


def _divisors(scaling: RopeScaling, head_width: int, theta: float) -> np.ndarray:
    periods = theta ** (np.arange(0, head_width, 2) / head_width)
    return (1 / periods / scaling.frequencies(periods, theta)).astype(np.float32)


def divisors_differ(file: GGUFFile, config: ModelConfig) -> str:
    """What is wrong with a file's divisors; "" where they are the model's."""
    meant, there = frequency_divisors(config), ROPE_FREQS in file.tensors
    if meant is None:
        wrong = there and not np.array_equal(file.read(ROPE_FREQS), np.ones_like(file.read(ROPE_FREQS)))
        return f"{ROPE_FREQS}, of which the model has none" if wrong else ""
    if not there or file.tensors[ROPE_FREQS].shape != meant.shape:
        return f"{ROPE_FREQS} is missing or has another shape"
    return "" if np.allclose(file.read(ROPE_FREQS), meant, rtol=_CLOSE, atol=0) else ROPE_FREQS


def scaling_from_gguf(file: GGUFFile, keys: Keys, head_width: int) -> RopeScaling | None:
    """How a file scales rotary positions; None where it does not.

    Raises:
        ModelError: in a way that lexmill does not have.
        FormatError: a setting makes no sense.
    """
    kind = keys.find("rope.scaling.type")
    kind = "linear" if kind is None else kind or "none"  # llama.cpp's default
    factor = keys.real("rope.scaling.factor", 0.0) or keys.real("rope.scale_linear", 0.0) or 1.0
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    problems = {
        f"rotary scaling of the kind '{str(kind)[:60]}'": kind not in ("none", "linear", "yarn"),
        "scaled scores without YaRN": kind != "yarn" and attention != 1,
    }
    for problem, present in problems.items():
        if present:
            raise ModelError(f"{file.path}: {problem} is not supported.", HINT)
    try:
        if kind == "yarn":
            found: RopeScaling | None = _yarn(keys, factor, attention)
        else:
            found = RopeScaling(kind="linear", factor=factor) if kind == "linear" and factor != 1 else None
        return _with_divisors(file, keys, head_width, found)
    except ConfigError as error:
        raise ModelError(f"{file.path}: {error.message}", error.hint) from error


def _yarn(keys: Keys, factor: float, attention: float) -> RopeScaling:
    own = float(f"{attention * yarn_magnitude(factor):.6g}")  # float32 holds the quotient
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=keys.whole("rope.scaling.original_context_length", keys.whole("context_length")),
        attention=None if attention == 1 else own,
    )


def _with_divisors(
    file: GGUFFile, keys: Keys, head_width: int, scaling: RopeScaling | None
) -> RopeScaling | None:
    if ROPE_FREQS not in file.tensors:
        return scaling
    shape, expected = file.tensors[ROPE_FREQS].shape, (head_width // 2,)
    if shape != expected:
        raise FormatError(f"{file.path}: '{ROPE_FREQS}' has the shape {shape} instead of {expected}.")
    divisors = file.read(ROPE_FREQS).astype(np.float64)
    if (divisors == 1).all():
        return scaling
    theta = keys.real("rope.freq_base", 10000.0)
    found = None
    if scaling is None and keys.prefix == "llama" and (divisors >= 1).all() and theta > 1:
        found = _llama3(divisors, theta)
    if found is None:
        raise ModelError(
            f"{file.path}: rotary positions divided by '{ROPE_FREQS}' in another way than Llama 3.1's are not "
            "supported.",
            HINT,
        )
    return found


def _llama3(divisors: np.ndarray, theta: float) -> RopeScaling | None:
    """The scaling that has these divisors; None if there is none.

    Only ratios of its three numbers show in them: where they are not Meta's own, the slow end of the ramp
    is taken for one turn. With fewer than two pairs on the ramp they are guessed, and must fit all the same.
    """
    factor, head_width = float(divisors.max()), 2 * len(divisors)
    turns = 1 / (2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors)))  # a token
    on_ramp = (divisors > 1 + _CLOSE) & (divisors < factor * (1 - _CLOSE))
    candidates = [_LLAMA3]
    if on_ramp.sum() >= 2:
        share = (1 / divisors[on_ramp] - 1 / factor) / (1 - 1 / factor)
        steep, end = np.polyfit(turns[on_ramp], share, 1)
        if steep > 0 and end < 0:
            candidates.append((1.0, round(1 - 1 / end, 3), round(-steep / end)))
    else:
        candidates += [(1.0, 4.0, 1 << power) for power in range(3, 24)]
    for low, high, context in candidates:
        if high <= low or context < 1:
            continue
        found = RopeScaling(
            kind="llama3", factor=tidy(factor), low_turns=low, high_turns=high, original_context=context
        )
        if np.allclose(_divisors(found, head_width, theta), divisors, rtol=_CLOSE, atol=0):
            return found
    return None
