"""The GGUF reader and writer against gguf-py, and against hostile files."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexmill.errors import FormatError
from lexmill.formats.blocks import BLOCK_TYPES, encode
from lexmill.formats.gguf import GGUFFile, TensorToWrite, Value, array, boolean, f32, string, u32, write_gguf

gguf = pytest.importorskip("gguf")
RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

METADATA = {
    "general.architecture": string("llama"),
    "a.count": u32(7),
    "a.epsilon": f32(1e-5),
    "a.flag": boolean(True),
    "a.small": Value("i8", -3),
    "a.large": Value("u64", 2**63),
    "a.double": Value("f64", 0.1),
    "tokens": array("string", ["a", "Ġé", "", "中"]),
    "types": array("i32", [1, -3, 4]),
    "flags": array("bool", [True, False]),
    "none": array("u32", []),
}


def tensors():
    rng = np.random.default_rng(1)
    for name, shape, kind in [
        ("one", (5,), "F32"),
        ("two", (3, 64), "F16"),
        ("three", (2, 3, 32), "Q8_0"),
        ("four", (1, 1, 1, 7), "BF16"),
    ]:
        data = encode(rng.standard_normal(shape, np.float32), BLOCK_TYPES[kind])
        yield TensorToWrite(name, shape, BLOCK_TYPES[kind], lambda data=data: data)


@pytest.mark.parametrize("alignment", [32, 64])
def test_gguf_py_reads_what_we_write(tmp_path, alignment):
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, tensors(), alignment=alignment)
    reader = gguf.GGUFReader(path)
    assert reader.alignment == alignment
    for key, value in METADATA.items():
        expected = pytest.approx(value.value, 1e-7) if value.type == "f32" else value.value
        assert reader.fields[key].contents() == expected
    for theirs, ours in zip(reader.tensors, tensors(), strict=True):
        assert theirs.name == ours.name and theirs.tensor_type.value == ours.type.id
        assert tuple(reversed(theirs.shape.tolist())) == ours.shape
        assert theirs.data.tobytes() == ours.produce().tobytes()


def test_we_read_what_we_write(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, tensors())
    with GGUFFile.open(path) as file:
        assert list(file.metadata) == list(METADATA) and list(file.tensors) == [row.name for row in tensors()]
        assert file.types["types"] == "array of i32" and file.metadata["types"].tolist() == [1, -3, 4]
        assert file.metadata["flags"] == [True, False] and file.metadata["tokens"][3] == "中"
        for row in tensors():
            assert file.raw(row.name).tobytes() == row.produce().tobytes()
            assert file.read(row.name).shape == row.shape and file.tensors[row.name].type is row.type
        with pytest.raises(FormatError, match="no tensor 'five'"):
            file.read("five")


def test_we_read_what_gguf_py_writes(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.real", 0.5)
    writer.add_bool("a.flag", False)
    writer.add_string("a.text", "žluťoučký")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_token_list(["a", "b"])
    weights = np.random.default_rng(2).standard_normal((4, 32), np.float32)
    writer.add_tensor("w", weights)
    quantised = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.metadata["a.count"] == 7 and file.metadata["a.real"] == 0.5
        assert file.metadata["a.flag"] is False and file.metadata["a.text"] == "žluťoučký"
        assert file.metadata["a.numbers"].tolist() == [1, 2, 3]
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
        np.testing.assert_array_equal(file.read("w"), weights)
        expected = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(file.read("q"), expected)


F32 = BLOCK_TYPES["F32"]
FOUR = lambda: bytes(4)  # noqa: E731


@pytest.mark.parametrize(
    "metadata,rows",
    [
        ({"": u32(1)}, []),
        ({"a b": u32(1)}, []),
        ({"é": u32(1)}, []),
        ({"a": u32(-1)}, []),
        ({"a": u32(2**32)}, []),
        ({"a": u32(1.5)}, []),
        ({"a": string(3)}, []),
        ({"a": Value("u3", 3)}, []),
        ({"a": array("string", ["x", None])}, []),
        ({"a": string("\ud800")}, []),
        ({}, [("", (1,), F32, FOUR)]),
        ({}, [("x" * 64, (1,), F32, FOUR)]),
        ({}, [("x", (1,), F32, FOUR), ("x", (1,), F32, FOUR)]),
        ({}, [("x", (), F32, FOUR)]),
        ({}, [("x", (1, 1, 1, 1, 1), F32, FOUR)]),
        ({}, [("x", (0,), F32, bytes)]),
        ({}, [("x", (2,), F32, FOUR)]),
        ({}, [("x", (33,), BLOCK_TYPES["Q8_0"], bytes)]),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path, metadata, rows):
    with pytest.raises(FormatError):
        write_gguf(tmp_path / "a.gguf", metadata, rows)
    assert list(tmp_path.iterdir()) == []


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def info(name=b"x", sizes=(1,), kind=0, offset=0, axes=None):
    axes = len(sizes) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(sizes)}qiQ", axes, *sizes, kind, offset)


def raw(keys=(), infos=(), tail=bytes(96), version=3, tensor_count=None, key_count=None, magic=b"GGUF"):
    counts = [
        len(infos) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    ]
    head = magic + struct.pack("<Iqq", version, *counts) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + tail


def key(name, code, data=b""):
    return text(name) + struct.pack("<I", code) + data


def items(code, count, data=b""):
    return struct.pack("<IQ", code, count) + data


HOSTILE = {
    "empty": b"",
    "cut": raw()[:20],
    "magic": raw(magic=b"GGML"),
    "version 0": raw(version=0),
    "version 1": raw(version=1),
    "version 4": raw(version=4),
    "big-endian": raw(version=3 << 24),
    "many tensors": raw(tensor_count=2**40),
    "negative tensors": raw(tensor_count=-1),
    "many keys": raw(key_count=2**62),
    "negative keys": raw(key_count=-1),
    "key too long": raw([struct.pack("<Q", 2**40)]),
    "key length wraps": raw([struct.pack("<Q", 2**64 - 1)]),
    "empty key": raw([key("", 0, b"\1")]),
    "duplicate key": raw([key("a", 0, b"\1"), key("a", 0, b"\1")]),
    "key not UTF-8": raw([key(b"\xff", 0, b"\1")]),
    "value not UTF-8": raw([key("a", 8, text(b"\xc3"))]),
    "unknown value type": raw([key("a", 13)]),
    "string past the end": raw([key("a", 8, struct.pack("<Q", 200))]),
    "array of arrays": raw([key("a", 9, items(9, 1))]),
    "unknown item type": raw([key("a", 9, items(77, 1))]),
    "many items": raw([key("a", 9, items(0, 2**64 - 1))]),
    "items past the end": raw([key("a", 9, items(12, 2**29))]),
    "strings past the end": raw([key("a", 9, items(8, 2**29))]),
    "alignment 0": raw([key("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 3": raw([key("general.alignment", 4, struct.pack("<I", 24))]),
    "alignment a string": raw([key("general.alignment", 8, text("32"))]),
    "alignment u64": raw([key("general.alignment", 10, struct.pack("<Q", 32))]),
    "empty name": raw(infos=[info(b"")]),
    "long name": raw(infos=[info(b"x" * 64)]),
    "duplicate name": raw(infos=[info(), info(offset=32)]),
    "five axes": raw(infos=[info(sizes=[1] * 5)]),
    "huge axes": raw(infos=[info(axes=2**32 - 1)]),
    "negative size": raw(infos=[info(sizes=[-4])]),
    "product overflow": raw(infos=[info(sizes=[2**32, 2**32])]),
    "product wraps to zero": raw(infos=[info(sizes=[2**62, 4, 4])]),
    "bytes overflow": raw(infos=[info(sizes=[2**62])]),
    "unknown type": raw(infos=[info(kind=4)]),
    "negative type": raw(infos=[info(kind=-1)]),
    "part of a block": raw(infos=[info(sizes=[33], kind=8)]),
    "gap": raw(infos=[info(offset=32)]),
    "overlap": raw(infos=[info(b"x"), info(b"y", offset=0)]),
    "offset unaligned": raw(infos=[info(b"x"), info(b"y", offset=4)]),
    "offset wraps": raw(infos=[info(b"x"), info(b"y", offset=2**64 - 32)]),
    "data cut off": raw(infos=[info(sizes=[25])]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(tmp_path, what):
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(FormatError, match=r"bad\.gguf"):
        GGUFFile.open(path)


def test_the_hostile_table_starts_from_a_good_file(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(raw([key("a", 0, b"\1")], [info(b"x", [24]), info(b"y" * 63, [0], offset=96)]))
    with GGUFFile.open(path) as file:
        assert file.metadata == {"a": 1} and len(file.tensors) == 2


@RELAXED
@given(data=st.data())
def test_damage_raises_only_format_errors(tmp_path, data):
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, tensors())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, 900)) % len(content)] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with GGUFFile.open(path) as file:
            for name in file.tensors:
                file.read(name)
    except FormatError:
        pass
