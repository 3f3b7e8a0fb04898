"""Block types against gguf-py, whose 32-weight blocks are proven byte-equal to ggml's (tests/parity)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexmill.errors import ConfigError, FormatError
from lexmill.formats import blocks
from lexmill.formats.blocks import BLOCK_TYPES, DECODERS, ENCODERS, block_type, decode, encode

gguf = pytest.importorskip("gguf")
# ggml's cast to integers is undefined where 1 / scale overflows, so tiny weights are none here
REALISTIC = st.floats(-60000, 60000, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)
SEARCHED = [name for name in ENCODERS if name.endswith("_K")]
EXACT = [name for name in ENCODERS if name not in SEARCHED]


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


@pytest.mark.parametrize("name", EXACT)
@settings(deadline=None, max_examples=80)
@given(values=hnp.arrays("float32", (3, 64), elements=REALISTIC))
def test_bytes_are_gguf_pys(name, values):
    kind = BLOCK_TYPES[name]
    ours = encode(values, kind)
    expected = gguf.quants.quantize(values, theirs(name))
    assert ours.tobytes() == expected.tobytes()
    back = gguf.quants.dequantize(expected, theirs(name))
    np.testing.assert_array_equal(decode(ours, kind, values.shape), back)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "F32"])
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1 << 32), blocks=st.integers(1, 9))
def test_any_bytes_decode_as_gguf_py_decodes_them(name, seed, blocks):
    """Bit for bit, also where a scale is infinite or no number."""
    kind = BLOCK_TYPES[name]
    data = np.random.default_rng(seed).integers(0, 256, (blocks, kind.block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        ours = decode(data.reshape(-1), kind, (blocks, kind.block_size))
        expected = gguf.quants.dequantize(data, theirs(name))
    both_nan = np.isnan(ours) & np.isnan(expected)
    assert ((ours.view(np.uint32) == expected.view(np.uint32)) | both_nan).all()


@pytest.mark.parametrize("name", SEARCHED)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 32),
    decades=st.integers(0, 9),
    size=st.integers(-9, 3),
    kept=st.integers(0, 256),
    weighted=st.booleans(),
)
def test_searched_types_stay_within_their_steps(name, seed, decades, size, kept, weighted):
    """Whatever the weights, without importance none moves by more than two steps of the widest part."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 256)) * 10 ** (size + decades * rng.uniform(-1, 0, (2, 256)))
    values = (values * (rng.permutation(256) < kept)).astype(np.float32)
    importance = (rng.uniform(0, 1, 256) ** 9).astype(np.float32) if weighted else None
    kind = BLOCK_TYPES[name]
    with np.errstate(all="raise", under="ignore"):
        back = decode(encode(values, kind, importance), kind, values.shape)
    assert np.isfinite(back).all()
    steps = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[name]
    if importance is None:
        widest = 2 * np.abs(values).max(axis=1, keepdims=True)
        assert (np.abs(back - values) <= 2 * widest / steps + 1e-7).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", *SEARCHED])
def test_importance_lowers_the_error_where_it_matters(name):
    rng, kind = np.random.default_rng(1), BLOCK_TYPES[name]
    values = rng.standard_t(5, (64, 512)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)

    def error(given):
        return ((decode(encode(values, kind, given), kind, values.shape) - values) ** 2 * importance).mean()

    assert error(importance) < 0.95 * error(None)
    assert error(importance * 2**20) == error(importance)  # only ratios count
    assert (encode(values, kind, np.zeros(512, np.float32)) == encode(values, kind, np.ones(512))).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_large_arrays_are_encoded_in_parts(name, monkeypatch):
    values, kind = np.random.default_rng(0).standard_normal((300, 1536), np.float32), BLOCK_TYPES[name]
    importance = None if name == "Q8_0" else np.linspace(0, 1, 1536, dtype=np.float32)
    rows = np.concatenate([encode(row, kind, importance) for row in values])
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert encode(values, kind, importance).tobytes() == rows.tobytes()
    monkeypatch.setattr(blocks, "_CHUNK", 1)
    assert encode(values, kind, importance).tobytes() == rows.tobytes()


def test_halves_round_away_from_zero():
    block = np.zeros(32, np.float32)
    block[:5] = [127, 0.5, -0.5, 1.5, -2.5]
    assert encode(block, BLOCK_TYPES["Q8_0"])[2:7].view(np.int8).tolist() == [127, 1, -1, 2, -3]


@pytest.mark.parametrize(
    "name,value",
    [
        ("F16", 65520),
        ("BF16", 3.4e38),
        ("F32", np.nan),
        ("Q8_0", 65520 * 127),
        ("Q4_0", -65520 * 8.5),
        ("Q5_1", 65520 * 32),
        *((name, 3e38) for name in SEARCHED),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_weights_out_of_range_are_refused(name, value):
    values = np.full(256, value, np.float32)
    values[::2] = 0
    with pytest.raises(FormatError, match="eight"):
        encode(values, BLOCK_TYPES[name])


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.startswith("Q")])
def test_zeros_and_tiny_weights_become_zero(name):
    for value in (0, 1e-44):
        data = encode(np.full((2, 256), value, np.float32), BLOCK_TYPES[name])
        assert not decode(data, BLOCK_TYPES[name], (2, 256)).any()


def test_wrong_sizes_and_types_are_refused():
    q8, q4_k, q8_k = BLOCK_TYPES["Q8_0"], BLOCK_TYPES["Q4_K"], BLOCK_TYPES["Q8_K"]
    with pytest.raises(FormatError, match="do not divide"):
        encode(np.zeros(33), q8)
    with pytest.raises(ConfigError, match="Q8_K"):
        encode(np.zeros(256), q8_k)
    with pytest.raises(FormatError, match="Q8_K"):
        decode(np.zeros(292, np.uint8), q8_k, (256,))
    with pytest.raises(FormatError, match="no F32 tensor"):
        decode(np.zeros(7, np.uint8), BLOCK_TYPES["F32"], (2,))
    with pytest.raises(FormatError, match="no Q4_K tensor"):
        decode(np.zeros(143, np.uint8), q4_k, (256,))
    for importance, message in [
        (np.ones(255), "255 columns"),
        (np.full(256, np.nan), "not a number"),
        (np.full(256, -1.0), "negative"),
    ]:
        with pytest.raises(FormatError, match=message):
            encode(np.zeros((2, 256)), q4_k, importance)
