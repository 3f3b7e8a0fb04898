"""How rotary positions stand in `config.json`: their base, and how they are scaled. Both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.errors import ModelError
from lexmill.model.huggingface_values import Values
from lexmill.model.rope_scaling import RopeScaling, yarn_magnitude


def read_theta(reader: Values, rope: Mapping[str, Any]) -> float:
    """The base, of a table or beside it."""
    theta = _base(rope)
    return reader.get("rope_theta", float, 10000.0) if theta is None else theta


def read_plain(reader: Values, rope: Mapping[str, Any]) -> float | None:
    """The base of a table whose positions are not scaled; None where it does not say.

    Raises:
        ModelError: they are scaled.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    reader.refuse({f"rotary scaling of type '{kind}'": kind != "default"})
    return _base(rope)


def _base(rope: Mapping[str, Any]) -> float | None:
    theta = rope.get("rope_theta")
    return float(theta) if _is_number(theta) else None  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_scaling(reader: Values, rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    """Linear, llama3 and yarn; every other kind is an error."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    table = Values(rope, f"{reader.where}, 'rope_parameters'")
    reader.refuse(
        {
            f"rotary scaling of type '{kind}'": kind not in ("linear", "llama3", "yarn"),
            "rotary scaling by a ramp that is not rounded": not table.get("truncate", bool, True),
        }
    )
    values: dict[str, Any] = {"kind": kind, "factor": table.get("factor", float)}
    if kind != "linear":
        values["original_context"] = table.get("original_max_position_embeddings", int, context)
    if kind == "llama3":
        values["low_turns"] = table.get("low_freq_factor", float)
        values["high_turns"] = table.get("high_freq_factor", float)
    if kind == "yarn":
        values["beta_fast"] = table.get("beta_fast", float, 32.0)
        values["beta_slow"] = table.get("beta_slow", float, 1.0)
        values["attention"] = _yarn_attention(table, values["factor"])
    return RopeScaling(**values)


def _yarn_attention(table: Values, factor: float) -> float | None:
    if table.values.get("attention_factor") is not None:
        return table.get("attention_factor", float)
    parts = [table.values.get(key) for key in ("mscale", "mscale_all_dim")]
    if not all(parts):
        return None
    above, below = (1 + part * (yarn_magnitude(factor) - 1) for part in map(_float, parts))
    return above / below


def _float(value: Any) -> float:
    if not _is_number(value):
        raise ModelError(f"'mscale' of YaRN should be a number, but is {value!r}.")
    return float(value)


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The table of rotary parameters, without the base."""
    if scaling is None:
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention is not None:
            values["attention_factor"] = scaling.attention
    return values
