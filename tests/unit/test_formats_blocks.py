"""Block types against gguf-py, whose Q8_0 is proven byte-equal to ggml's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexmill.errors import ConfigError, FormatError
from lexmill.formats.blocks import BLOCK_TYPES, ENCODERS, block_type, decode, encode

gguf = pytest.importorskip("gguf")
REALISTIC = st.floats(-60000, 60000, width=32)


def theirs(kind):
    return gguf.GGMLQuantizationType[kind]


def test_sizes_are_ggmls():
    for name, kind in BLOCK_TYPES.items():
        if name != "Q8_1":  # never stored; gguf-py counts an older form of it
            assert (kind.block_size, kind.block_bytes) == gguf.GGML_QUANT_SIZES[theirs(name)]
        assert (
            kind.id == theirs(name).value and block_type(kind.id) is kind and block_type(name.lower()) is kind
        )
    assert block_type("Q3") is None and block_type(4) is None


@pytest.mark.parametrize("name", ENCODERS)
@settings(deadline=None, max_examples=80)
@given(values=hnp.arrays("float32", (3, 64), elements=REALISTIC))
def test_bytes_are_gguf_pys(name, values):
    kind = BLOCK_TYPES[name]
    ours = encode(values, kind)
    expected = gguf.quants.quantize(values, theirs(name))
    assert ours.tobytes() == expected.tobytes()
    back = gguf.quants.dequantize(expected, theirs(name))
    np.testing.assert_array_equal(decode(ours, kind, values.shape), back)


def test_large_arrays_are_encoded_in_parts():
    values = np.random.default_rng(0).standard_normal((3, 1 << 19), np.float32)
    assert (
        encode(values, BLOCK_TYPES["Q8_0"]).tobytes()
        == gguf.quants.quantize(values, theirs("Q8_0")).tobytes()
    )


def test_halves_round_away_from_zero():
    block = np.zeros(32, np.float32)
    block[:5] = [127, 0.5, -0.5, 1.5, -2.5]
    assert encode(block, BLOCK_TYPES["Q8_0"])[2:7].view(np.int8).tolist() == [127, 1, -1, 2, -3]


@pytest.mark.parametrize(
    "name,value", [("F16", 65520), ("BF16", 3.4e38), ("Q8_0", 65520 * 127), ("F32", np.nan)]
)
def test_weights_out_of_range_are_refused(name, value):
    with pytest.raises(FormatError, match="weight"):
        encode(np.full(32, value, np.float32), BLOCK_TYPES[name])


def test_tiny_weights_become_zero():
    data = encode(np.full(32, 1e-44, np.float32), BLOCK_TYPES["Q8_0"])
    assert not decode(data, BLOCK_TYPES["Q8_0"], (32,)).any()


def test_wrong_sizes_and_types_are_refused():
    with pytest.raises(FormatError, match="do not divide"):
        encode(np.zeros(33), BLOCK_TYPES["Q8_0"])
    with pytest.raises(ConfigError, match="Q4_K"):
        encode(np.zeros(256), BLOCK_TYPES["Q4_K"])
    with pytest.raises(FormatError, match="Q4_K"):
        decode(np.zeros(144, np.uint8), BLOCK_TYPES["Q4_K"], (256,))
    with pytest.raises(FormatError, match="no F32 tensor"):
        decode(np.zeros(7, np.uint8), BLOCK_TYPES["F32"], (2,))
