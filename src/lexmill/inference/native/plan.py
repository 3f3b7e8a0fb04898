"""A model as a flat list of operations, which the compiled engine walks through (`native/engine/engine.h`).

Buffers hold (tokens, width) in float32. Reading a text (encoders) and writing one are two lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lexmill.errors import FormatError
from lexmill.inference.native.sources import Source
from lexmill.model.config import ModelConfig
from lexmill.model.names import weight_shapes

EMBED, NORM, LINEAR, STORE, ATTEND = range(5)
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
READ, WRITE = 0, 1  # which list


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation; fields as in `native/engine/engine.h`, −1 where there is none."""

    kind: int
    source: int = -1
    to: int = -1  # -1 in the last operation: what is given back
    matrices: tuple[int, int, int] = (-1, -1, -1)
    biases: tuple[int, int, int] = (-1, -1, -1)
    norm: int = -1
    norm_bias: int = -1
    centred: int = 0
    activation: int = 0
    gated: int = 0
    add: int = 0
    wanted: int = 0  # only of the wanted tokens
    slot: int = 0
    memory: int = 0
    queries: int = 0
    rotary: int = -1
    query_norm: int = -1
    key_norm: int = -1
    causal: int = 0
    window: int = 0
    bias: int = -1
    epsilon: float = 0.0
    scale: float = 1.0


@dataclass
class Plan:
    """Everything that the engine needs beside the weights.

    Attributes:
        matrices: lexmill's names of those that are multiplied or looked up.
        vectors: norms, biases, tables; float32, flat.
        buffers: widths.
        operations: those of reading, those of writing.
        slots: how many layers keep keys and values.
        stream: the buffer in which reading leaves the last hidden states.
    """

    config: ModelConfig
    matrices: list[str] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    operations: tuple[list[Operation], list[Operation]] = field(default_factory=lambda: ([], []))
    slots: int = 0
    stream: int = 0

    def add(self, which: int, kind: int, **values: object) -> None:
        self.operations[which].append(Operation(kind=kind, **values))  # type: ignore[arg-type]

    def buffer(self, width: int) -> int:
        self.buffers.append(width)
        return len(self.buffers) - 1

    def matrix(self, own: str) -> int:
        if own not in self.matrices:
            self.matrices.append(own)
        return self.matrices.index(own)

    def vector(self, values: np.ndarray) -> int:
        self.vectors.append(np.ascontiguousarray(values, np.float32).reshape(-1))
        return len(self.vectors) - 1


def make_plan(source: Source, context: int) -> Plan:
    """Lower a model.

    Args:
        context: the longest text, in tokens; tables of rotary positions are made for it.
    """
    return _Lowering(source, context).plan


class _Lowering:
    def __init__(self, source: Source, context: int) -> None:
        self.source, self.config, self.context = source, source.config, context
        self.shapes = weight_shapes(self.config)
        self.plan = Plan(self.config)
        config, plan = self.config, self.plan
        query, key = config.heads * config.head_width, config.kv_heads * config.head_width
        self.x = plan.stream = plan.buffer(config.width)
        self.projected = plan.buffer(query + 2 * key)
        self.gathered = plan.buffer(query)
        self.inner = plan.buffer(config.mlp_width)
        self.tables: dict[float, int] = {}
        if config.shape == "decoder":
            self._decoder()
        elif config.shape == "encoder":
            self._encoder()
        else:
            self._encoder_decoder()

    # ---- the three shapes

    def _decoder(self) -> None:
        self._embed(WRITE)
        self._stack(WRITE, "decoder", self.config.layers)
        self.plan.operations[READ].extend(self.plan.operations[WRITE])  # for its hidden states
        self.plan.add(READ, NORM, to=self.x, **self._norm("decoder.norm"))
        self._head(WRITE, "decoder.norm")

    def _encoder(self) -> None:
        config = self.config
        self._embed(READ)
        self.plan.add(READ, NORM, to=self.x, **self._norm("embed_norm"))
        self._stack(READ, "encoder", config.layers)
        if not config.post_norm:
            self.plan.add(READ, NORM, to=self.x, **self._norm("encoder.norm"))

    def _encoder_decoder(self) -> None:
        config, plan = self.config, self.plan
        # the encoder's keys and values are needed for one layer at a time: one slot serves all
        self._embed(READ)
        self._stack(READ, "encoder", config.layers)
        plan.add(READ, NORM, to=self.x, **self._norm("encoder.norm"))
        pairs = plan.buffer(2 * config.kv_heads * config.head_width)
        first = plan.slots
        for layer in range(config.decoder_layers):
            cross = self._linears(*(f"decoder.blocks.{layer}.cross.{part}" for part in "kv"))
            plan.add(READ, LINEAR, source=self.x, to=pairs, **cross)
            plan.add(READ, STORE, source=pairs, slot=first + layer, memory=1)
        plan.slots += config.decoder_layers
        self._embed(WRITE)
        self._stack(WRITE, "decoder", config.decoder_layers, memory=first)
        scale = config.width**-0.5 if config.scale_output else 1.0
        self._head(WRITE, "decoder.norm", scale)

    # ---- their parts

    def _embed(self, which: int) -> None:
        config = self.config
        places = (
            self.plan.matrix("embed.weight"),
            self.plan.matrix("position_embed.weight") if config.positions == "learned" else -1,
            self.plan.matrix("segment_embed.weight") if config.segments else -1,
        )
        self.plan.add(which, EMBED, to=self.x, matrices=places)

    def _head(self, which: int, norm: str, scale: float = 1.0) -> None:
        head = self.plan.matrix("embed.weight" if self.config.tied else "head.weight")
        self.plan.add(
            which, LINEAR, source=self.x, wanted=1, matrices=(head, -1, -1), scale=scale, **self._norm(norm)
        )

    def _stack(self, which: int, side: str, layers: int, memory: int = -1) -> None:
        config, plan = self.config, self.plan
        transient = side == "encoder"
        first = plan.slots
        plan.slots += 1 if transient else layers
        bias = self._relative(side) if config.positions == "relative" else -1
        for layer in range(layers):
            block = f"{side}.blocks.{layer}"
            slot = first if transient else first + layer
            local = config.is_local(layer)
            norm_before = not config.post_norm and not (config.embed_norm and layer == 0)
            common = {
                "slot": slot,
                "causal": int(side == "decoder"),
                "window": config.local_window if local else 0,
                "bias": bias,
                "scale": config.head_width**-0.5 if config.scale_scores else 1.0,
            }
            plan.add(
                which, LINEAR, source=self.x, to=self.projected,
                **self._linears(*(f"{block}.attention.{part}" for part in "qkv")),
                **(self._norm(f"{block}.attention_norm") if norm_before else {}),
            )  # fmt: skip
            plan.add(
                which, STORE, source=self.projected, slot=slot, queries=1, epsilon=config.norm_eps,
                rotary=self._rotary(config.local_theta if local else config.rope_theta),
                **self._head_norms(f"{block}.attention"),
            )  # fmt: skip
            plan.add(which, ATTEND, source=self.projected, to=self.gathered, **common)
            plan.add(
                which,
                LINEAR,
                source=self.gathered,
                to=self.x,
                add=1,
                **self._linears(f"{block}.attention.out"),
            )
            if memory >= 0:
                self._cross(which, block, memory + layer)
            if config.post_norm:
                plan.add(which, NORM, to=self.x, **self._norm(f"{block}.attention_norm"))
            self._mlp(which, block)

    def _cross(self, which: int, block: str, slot: int) -> None:
        plan, config = self.plan, self.config
        plan.add(
            which, LINEAR, source=self.x, to=self.projected, **self._linears(f"{block}.cross.q"),
            **self._norm(f"{block}.cross_norm"),
        )  # fmt: skip
        scale = config.head_width**-0.5 if config.scale_scores else 1.0
        plan.add(which, ATTEND, source=self.projected, to=self.gathered, slot=slot, memory=1, scale=scale)
        plan.add(which, LINEAR, source=self.gathered, to=self.x, add=1, **self._linears(f"{block}.cross.out"))

    def _mlp(self, which: int, block: str) -> None:
        plan, config = self.plan, self.config
        parts = ("gate", "up") if config.gated else ("up",)
        plan.add(
            which, LINEAR, source=self.x, to=self.inner, gated=int(config.gated),
            activation=ACTIVATIONS[config.activation], **self._linears(*(f"{block}.mlp.{part}" for part in parts)),
            **({} if config.post_norm else self._norm(f"{block}.mlp_norm")),
        )  # fmt: skip
        plan.add(which, LINEAR, source=self.inner, to=self.x, add=1, **self._linears(f"{block}.mlp.down"))
        if config.post_norm:
            plan.add(which, NORM, to=self.x, **self._norm(f"{block}.mlp_norm"))

    # ---- weights

    def _linears(self, *owns: str) -> dict[str, tuple[int, ...]]:
        matrices = [self.plan.matrix(f"{own}.weight") for own in owns]
        biases = [self._vector(f"{own}.bias") for own in owns]
        pad = [-1] * (3 - len(owns))
        return {"matrices": (*matrices, *pad), "biases": (*biases, *pad)}

    def _vector(self, own: str) -> int:
        if own not in self.shapes:
            return -1
        values = self.source.float32(own)
        if values.shape != self.shapes[own]:  # the compiled code reads without looking
            raise FormatError(f"The weight '{own}' has the shape {values.shape}, not {self.shapes[own]}.")
        return self.plan.vector(values)

    def _norm(self, own: str) -> dict[str, int | float]:
        return {
            "norm": self._vector(f"{own}.weight"),
            "norm_bias": self._vector(f"{own}.bias"),
            "centred": int(self.config.norm == "layer"),
            "epsilon": self.config.norm_eps,
        }

    def _head_norms(self, attention: str) -> dict[str, int]:
        return {
            "query_norm": self._vector(f"{attention}.q_norm.weight"),
            "key_norm": self._vector(f"{attention}.k_norm.weight"),
        }

    def _rotary(self, theta: float) -> int:
        if self.config.positions != "rotary":
            return -1
        if theta not in self.tables:
            cosines, sines = rotary_tables(
                self.config, theta, self.context, scaled=theta == self.config.rope_theta
            )
            self.tables[theta] = self.plan.vector(cosines)
            self.plan.vector(sines)
        return self.tables[theta]

    def _relative(self, side: str) -> int:
        reach = self.config.relative_distance
        buckets = relative_buckets(
            np.arange(-reach, reach + 1), self.config.relative_buckets, reach, causal=side == "decoder"
        )
        return self.plan.vector(self.source.float32(f"{side}.relative.weight")[buckets].T)


def rotary_tables(
    config: ModelConfig, theta: float, context: int, *, scaled: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, (context, head_width / 2) each, float32; see `model/positions.py`."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    periods = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling if scaled else None
    frequencies = 1 / periods if scaling is None else scaling.frequencies(periods, theta)
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    magnitude = np.float32(1 if scaling is None else scaling.magnitude)
    return np.cos(angles) * magnitude, np.sin(angles) * magnitude


def relative_buckets(offset: np.ndarray, buckets: int, distance: int, *, causal: bool) -> np.ndarray:
    """The bucket of each offset, key minus query; see `model/positions.py`, `relative_bucket`."""
    if causal:
        side, steps = np.zeros_like(offset), np.maximum(-offset, 0)
    else:
        buckets //= 2
        side, steps = (offset > 0) * buckets, np.abs(offset)
    exact = buckets // 2
    grown = (
        np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
        / np.float32(np.log(distance / exact))
        * np.float32(buckets - exact)
    )
    far = np.minimum(exact + grown.astype(np.int64), buckets - 1)
    return side + np.where(steps < exact, steps, far)
