"""Importance matrices in both forms, and files that are damaged."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import FormatError
from lexmill.formats.blocks import BLOCK_TYPES
from lexmill.formats.gguf import TensorToWrite, string, write_gguf
from lexmill.formats.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix

gguf = pytest.importorskip("gguf")


def made():
    rng = np.random.default_rng(0)
    return ImportanceMatrix(
        {
            "blk.0.ffn_down.weight": Entry(rng.random((1, 64), np.float32) * 100, np.float32([1024])),
            "blk.0.attn_q.weight": Entry(rng.random((1, 32), np.float32), np.float32([1024])),
            "blk.1.ffn_up_exps.weight": Entry(rng.random((3, 32), np.float32), np.float32([512, 0, 7])),
        },
        chunks=2,
        chunk_size=512,
        datasets=("a.txt", "some text.txt"),
    )


def test_gguf_form_comes_back_and_gguf_py_reads_it(tmp_path):
    matrix, path = made(), tmp_path / "m.gguf"
    write_imatrix(path, matrix)
    back = read_imatrix(path)
    assert (back.chunks, back.chunk_size, back.datasets) == (2, 512, matrix.datasets)
    assert back.entries.keys() == matrix.entries.keys()
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == list(matrix.datasets)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for name, entry in matrix.entries.items():
        np.testing.assert_array_equal(back.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(back.entries[name].counts, entry.counts)
        experts, columns = entry.sums.shape
        # llama.cpp: sizes (columns, experts) and (1, experts), fastest first
        assert theirs[f"{name}.in_sum2"].shape.tolist() == [columns, experts]
        assert theirs[f"{name}.counts"].shape.tolist() == [1, experts]
        np.testing.assert_array_equal(theirs[f"{name}.in_sum2"].data.reshape(entry.sums.shape), entry.sums)


def test_old_form_keeps_the_means(tmp_path):
    matrix, path = made(), tmp_path / "m.dat"
    write_imatrix(path, matrix)
    back = read_imatrix(path)
    assert back.chunks == 2 and back.datasets == ("some text.txt",)
    for name in ("blk.0.ffn_down.weight", "blk.0.attn_q.weight"):
        columns = matrix.entries[name].sums.shape[1]
        np.testing.assert_allclose(
            back.importance(name, columns), matrix.importance(name, columns), rtol=1e-6
        )
    # its layout, read by hand as imatrix.cpp reads it
    data = path.read_bytes()
    entries, length = struct.unpack_from("<ii", data)
    assert (entries, data[8 : 8 + length]) == (3, b"blk.0.attn_q.weight")
    calls, values = struct.unpack_from("<ii", data, 8 + length)
    assert (calls, values) == (2, 32)


def test_importance_of_a_name(tmp_path):
    matrix = made()
    np.testing.assert_allclose(
        matrix.importance("blk.0.attn_q.weight", 32), matrix.entries["blk.0.attn_q.weight"].sums[0] / 1024
    )
    assert matrix.importance("blk.9.attn_q.weight", 32) is None
    assert (
        matrix.entries["blk.1.ffn_up_exps.weight"].importance()[1] == 1
    ).all()  # an expert that met nothing
    for name, columns in [("blk.0.attn_q.weight", 64), ("blk.1.ffn_up_exps.weight", 32)]:
        with pytest.raises(FormatError, match="another model"):
            matrix.importance(name, columns)


def in_gguf(path, tensors, kind="imatrix"):
    rows = [
        TensorToWrite(name, data.shape, BLOCK_TYPES["F32"], lambda data=data: data)
        for name, data in ((name, np.asarray(data, "<f4")) for name, data in tensors.items())
    ]
    write_gguf(path, {"general.type": string(kind)}, rows)


@pytest.mark.parametrize(
    "tensors,message",
    [
        ({}, "no entries"),
        ({"something": [1]}, "no entries"),
        ({"a.in_sum2": [1, 2]}, "without counts"),
        ({"a.counts": [1]}, "without counts"),
        ({"a.in_sum2": [1, 2, 3], "a.counts": [1, 2]}, "3 sums for 2 counts"),
        ({"a.in_sum2": [1, np.nan], "a.counts": [1]}, "not finite"),
        ({"a.in_sum2": [1, -1], "a.counts": [1]}, "negative"),
        ({"a.in_sum2": [1, 1], "a.counts": [np.inf]}, "not finite"),
    ],
)
def test_gguf_files_that_make_no_sense(tmp_path, tensors, message):
    in_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(FormatError, match=message):
        read_imatrix(tmp_path / "m.gguf")


def test_a_model_is_no_importance_matrix(tmp_path):
    in_gguf(tmp_path / "m.gguf", {"a.in_sum2": [1], "a.counts": [1]}, kind="model")
    with pytest.raises(FormatError, match="type 'model'"):
        read_imatrix(tmp_path / "m.gguf")


def old(name=b"abc", calls=1, values=2, data=b"\0\0\x80?" * 2, entries=1, end=b""):
    return struct.pack("<ii", entries, len(name)) + name + struct.pack("<ii", calls, values) + data + end


@pytest.mark.parametrize(
    "data,message",
    [
        (b"", "cut off"),
        (struct.pack("<i", 0), "no entries"),
        (struct.pack("<i", -1), "number of entries"),
        (struct.pack("<i", 2**30) + bytes(40), "number of entries"),
        (old(values=2**31 - 1), "but 8 are left"),
        (old(values=-5), "number of values"),
        (old(calls=0), "is empty"),
        (old(name=b""), "is empty"),
        (old(name=b"\xff\xfe"), "UTF-8"),
        (old(data=b"\0\0\xc0\x7f" * 2), "not finite"),
        (old(entries=2, end=old()[4:]), "there twice"),
        (old(end=struct.pack("<ii", 3, 100)), "but 0 are left"),
    ],
)
def test_old_files_that_make_no_sense(tmp_path, data, message):
    (tmp_path / "m.dat").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_imatrix(tmp_path / "m.dat")


def test_old_files_may_end_behind_the_entries(tmp_path):
    (tmp_path / "m.dat").write_bytes(old())
    assert read_imatrix(tmp_path / "m.dat").importance("abc", 2).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, name, data):
    """Bytes changed, cut off or added anywhere: an error that says so, or numbers that are finite."""
    folder = tmp_path_factory.getbasetemp()
    write_imatrix(folder / name, made())
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # where lengths lie, at the beginning, more often than among the numbers
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(400, len(content) - 1)))
        change = data.draw(st.sampled_from(["byte", "word", "cut"]))
        if change == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif change == "word":
            content[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4)]))
        else:
            del content[max(at, 1) :]
    damaged = folder / f"damaged-{name}"
    damaged.write_bytes(bytes(content))
    try:
        matrix = read_imatrix(damaged)
    except FormatError:
        return
    assert matrix.entries
    for entry in matrix.entries.values():
        assert np.isfinite(entry.importance()).all() and (entry.importance() >= 0).all()
