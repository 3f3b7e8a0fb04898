"""The types that llama.cpp's own `llama_model_quantize` gave the tensors of random models, recorded.

`recorded/gguf-mixes.json`: of each model and mix, each kind of tensor with its types layer by layer.
"""

import json
import re
from pathlib import Path

import pytest

from lexmill.model.config import ModelConfig
from lexmill.model.gguf_shapes import held_weights, stays_f32
from lexmill.model.names import weight_shapes
from lexmill.runtimes.gguf_mixes import MIXES, choose_types

RECORDED = json.loads(Path(__file__).with_name("recorded").joinpath("gguf-mixes.json").read_text("utf-8"))


def in_runs(types):
    """Neighbours that are alike, counted: "Q6_K Q5_K*2"."""
    runs = []
    for one in types:
        if runs and runs[-1][0] == one:
            runs[-1][1] += 1
        else:
            runs.append([one, 1])
    return " ".join(f"{one}*{count}" if count > 1 else one for one, count in runs)


@pytest.mark.parametrize("name", RECORDED)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(name):
    config = ModelConfig(**RECORDED[name]["config"])
    shapes = weight_shapes(config)
    matrices = {
        one.gguf: shapes[one.own] for one in held_weights(config) if not stays_f32(one, shapes[one.own])
    }
    for case, expected in RECORDED[name]["types"].items():
        mix, _, importance = case.partition(" with ")
        chosen = choose_types(mix, matrices, config, importance=bool(importance))
        kinds = {}
        for tensor, choice in chosen.items():
            layer = re.match(r"blk\.(\d+)\.(.*)", tensor)
            kinds.setdefault(layer[2] if layer else tensor, []).append(
                (int(layer[1]) if layer else 0, choice.type.name)
            )
        found = {kind: in_runs(type for _, type in sorted(types)) for kind, types in kinds.items()}
        assert found == expected, case


def test_every_quantised_mix_was_recorded():
    quantised = {mix for mix, (_, default) in MIXES.items() if default not in ("F32", "F16", "BF16")}
    for recorded in RECORDED.values():
        assert {case.partition(" with ")[0] for case in recorded["types"]} == quantised
