"""The safetensors reader and writer against the reference library, and against hostile files."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexmill.errors import FileError, FormatError
from lexmill.formats.safetensors import (
    SafetensorsFile,
    from_bfloat16,
    open_weights,
    to_bfloat16,
)
from lexmill.formats.safetensors_writing import write_safetensors

TYPES = [
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "uint16",
    "uint32",
]
ARRAYS = st.sampled_from(TYPES).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@RELAXED
@given(tensors=st.dictionaries(NAMES, ARRAYS, max_size=5))
def test_library_reads_what_we_write(tmp_path, tensors):
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata={"format": "np"})
    theirs = safetensors.numpy.load((tmp_path / "a.safetensors").read_bytes())
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensors[name]) for name in tensors)


@RELAXED
@given(tensors=st.dictionaries(NAMES, ARRAYS, max_size=5))
def test_we_read_what_the_library_writes(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"x": "y"})
    with SafetensorsFile.open(tmp_path / "a.safetensors") as file:
        assert sorted(file.names()) == sorted(tensors) and file.metadata == {"x": "y"}
        assert all(same(file.array(name), tensors[name]) for name in tensors)


@settings(deadline=None)
@given(hnp.arrays("float32", 9, elements=st.floats(width=32, allow_subnormal=True)))
def test_bfloat16_is_torchs(values):
    torch = pytest.importorskip("torch")
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    ours = from_bfloat16(to_bfloat16(values))
    np.testing.assert_array_equal(ours, theirs.float().numpy())


def test_bfloat16_keeps_every_nan():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)
    assert np.isnan(from_bfloat16(to_bfloat16(bits.view(np.float32)))).all()


def test_float32_converts(tmp_path):
    values = np.array([[1.5, -2.25], [0.125, 3.0]])
    tensors = {
        "half": values.astype(np.float16),
        "brain": to_bfloat16(values),
        "double": values,
        "single": values.astype(np.float32),
        "whole": np.arange(3),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, bfloat16=["brain"])
    with SafetensorsFile.open(tmp_path / "a.safetensors") as file:
        assert file.dtype("brain") == "BF16" and file.metadata == {"format": "pt"}
        for name in ("half", "brain", "double", "single"):
            assert same(file.float32(name), values.astype(np.float32))
        with pytest.raises(FormatError, match="'whole' has the type I64"):
            file.float32("whole")
        with pytest.raises(FormatError, match="no tensor 'other'"):
            file.shape("other")
        assert not file.array("single").flags.writeable
        kept = file.array("single")
    assert kept[0, 0] == 1.5  # a view outlives the file object


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HOSTILE = {
    "empty": b"",
    "short": b"\1\2",
    "header beyond the file": struct.pack("<Q", 50) + b"{}",
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "not UTF-8": raw(b"\xff\xfe"),
    "not JSON": raw(b"{"),
    "a list": raw(b"[]"),
    "deep nesting": raw(b"[" * 100_000),
    "huge number": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "duplicate name": raw(b'{"a": 1, "a": 2}'),
    "metadata numbers": raw({"__metadata__": {"a": 1}}),
    "entry no object": raw({"a": 3}),
    "unknown type": raw({"a": entry("F3")}, bytes(4)),
    "type a list": raw({"a": entry(["F32"])}, bytes(4)),
    "negative size": raw({"a": entry(shape=[-1])}, bytes(4)),
    "boolean size": raw({"a": entry(shape=[True])}, bytes(4)),
    "fraction": raw({"a": entry(shape=[1.0])}, bytes(4)),
    "overflow": raw({"a": entry(shape=[2**33, 2**33], offsets=[0, 0])}),
    "overflow to right size": raw({"a": entry(shape=[2**32 + 1, 2**32], offsets=[0, 2**34])}, bytes(4)),
    "zero among huge": raw({"a": entry(shape=[0, 2**60], offsets=[0, 0])}),
    "many axes": raw({"a": entry(shape=[1] * 40)}, bytes(4)),
    "three offsets": raw({"a": entry(offsets=[0, 4, 8])}, bytes(4)),
    "offsets reversed": raw({"a": entry(offsets=[4, 0])}, bytes(4)),
    "past the end": raw({"a": entry(offsets=[4, 8])}, bytes(4)),
    "wrong byte count": raw({"a": entry(shape=[2])}, bytes(4)),
    "overlap": raw({"a": entry(), "b": entry()}, bytes(4)),
    "gap": raw({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
    "left over": raw({"a": entry()}, bytes(5)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(tmp_path, what):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        SafetensorsFile.open(path)


@RELAXED
@given(data=st.data())
def test_damage_raises_only_format_errors(tmp_path, data):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.arange(6.0), "b": np.ones((2, 3), np.float32)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 200)) % len(content)] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with SafetensorsFile.open(path) as file:
            for name in file.names():
                file.array(name).sum()
    except FormatError:
        pass


def test_writer_refuses_unknown_types_and_leaves_nothing(tmp_path):
    for tensors, brain in [({"a": np.array(["x"])}, ()), ({"a": np.zeros(2, np.float32)}, ("a",))]:
        with pytest.raises(FormatError, match="'a'"):
            write_safetensors(tmp_path / "a.safetensors", tensors, bfloat16=brain)
    assert list(tmp_path.iterdir()) == []


def shards(folder, weight_map):
    write_safetensors(folder / "one.safetensors", {"a": np.zeros(2, np.float32)})
    write_safetensors(folder / "two.safetensors", {"b": np.ones(2, np.float32)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_weights(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with open_weights(tmp_path) as weights:
        assert weights.names() == ["a", "b"] and "b" in weights and "c" not in weights
        assert weights.float32("b").tolist() == [1, 1] and weights.shape("a") == (2,)
        with pytest.raises(FormatError, match="no tensor 'c'"):
            weights.array("c")


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "one.bin", "", ".safetensors", 3, "a/b.safetensors"]
)
def test_shard_names_stay_in_the_folder(tmp_path, name):
    shards(tmp_path, {"a": name})
    with pytest.raises(FormatError, match="not the name of a file"):
        open_weights(tmp_path)


def test_shards_must_agree_with_the_index(tmp_path):
    shards(tmp_path, {"a": "two.safetensors"})
    with pytest.raises(FormatError, match="'a' is not in two"):
        open_weights(tmp_path)
    shards(tmp_path, {"a": "three.safetensors"})
    with pytest.raises(FileError, match="three"):
        open_weights(tmp_path)


def test_single_file(tmp_path):
    with pytest.raises(FileError, match="no such weights file"):
        open_weights(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)})
    with open_weights(tmp_path) as weights:
        assert weights.names() == ["a"]
