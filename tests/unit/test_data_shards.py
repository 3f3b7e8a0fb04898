"""Token shards: what is written is read back, and every kind of damage is found on opening."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.data.shards import TokenShard, write_token_shard
from lexmill.errors import DataError, FileError, FormatError

DOCUMENTS = [([1, 2, 3], 10), (np.array([65535], np.uint16), 4), ([], 0), ([0, 7], 3)]


def shard(folder: Path, vocab_size: int = 65536) -> TokenShard:
    return write_token_shard(
        folder, DOCUMENTS, vocab_size=vocab_size, tokenizer_sha256="ab", created_from="x"
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99_999))), st.sampled_from([100_000, 1 << 20]))
def test_round_trip(documents: list[list[int]], vocab_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = write_token_shard(
            Path(folder) / "s",
            ((ids, len(ids)) for ids in documents),
            vocab_size=vocab_size,
            tokenizer_sha256="",
        )
        assert [document.tolist() for document in made] == documents
        assert (len(made), made.tokens, made.bytes) == (len(documents), sum(map(len, documents)), made.tokens)
        made.check_ids()


def test_what_a_shard_says(tmp_path: Path) -> None:
    made = shard(tmp_path / "s")
    assert (len(made), made.tokens, made.bytes, made.vocab_size, made.tokenizer_sha256) == (
        4,
        6,
        17,
        65536,
        "ab",
    )
    assert made.ids.dtype == np.dtype("<u2") and isinstance(made.ids, np.memmap)
    assert made[-1].tolist() == [0, 7] and made[2].tolist() == []
    with pytest.raises(IndexError):
        made[4]
    with pytest.raises(ValueError, match="read-only"):
        made[0][0] = 1
    assert shard(tmp_path / "t", 65537).ids.dtype == np.dtype("<u4")
    again = shard(tmp_path / "s")
    assert all((again.folder / name).is_file() for name in ("tokens.bin", "offsets.bin", "header.json"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 10], "Document 2: token id 10 is outside the vocabulary of 10"),
        ([-1], "token id -1 is outside"),
        ([1.5], "not a flat list of integers"),
        ([[1, 2]], "not a flat list of integers"),
        ([1 << 70], "Document 2"),
    ],
)
def test_bad_ids_are_named_and_leave_nothing(tmp_path: Path, ids: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_token_shard(tmp_path / "s", [([1], 1), (ids, 1)], vocab_size=10, tokenizer_sha256="")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_shard(tmp_path: Path) -> None:
    shard(tmp_path / "s")

    def documents() -> Iterator[tuple[list[int], int]]:
        yield [1], 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_shard(tmp_path / "s", documents(), vocab_size=10, tokenizer_sha256="")
    assert TokenShard.open(tmp_path / "s").tokens == 6
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def change_header(folder: Path, **values: object) -> None:
    path = folder / "header.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_offsets(folder: Path, *offsets: int) -> None:
    (folder / "offsets.bin").write_bytes(np.array(offsets, "<i8").tobytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokens.bin").unlink(), "has no tokens.bin"),
        (lambda folder: (folder / "offsets.bin").unlink(), "has no offsets.bin"),
        (lambda folder: (folder / "header.json").unlink(), "has no header.json"),
        (lambda folder: (folder / "header.json").write_text('{"a": '), "not valid JSON"),
        (lambda folder: (folder / "header.json").write_text("[]"), "this is no token shard"),
        (lambda folder: change_header(folder, format="other"), "this is no token shard"),
        (lambda folder: change_header(folder, version=2), "version 2 is not 1"),
        (lambda folder: change_header(folder, dtype="float"), "\"dtype\" is 'float'"),
        (lambda folder: change_header(folder, dtype=[]), '"dtype" is'),
        (lambda folder: change_header(folder, tokens=-1), '"tokens" is -1, not a count'),
        (lambda folder: change_header(folder, tokens=True), '"tokens" is True, not a count'),
        (lambda folder: change_header(folder, documents="4"), "\"documents\" is '4', not a count"),
        (lambda folder: change_header(folder, bytes=None), '"bytes" is None'),
        (lambda folder: change_header(folder, tokenizer_sha256=None), '"tokenizer_sha256" is missing'),
        (
            lambda folder: change_header(folder, tokens=7),
            "tokens.bin: the file has 12 bytes, but 7 tokens need 14",
        ),
        (
            lambda folder: change_header(folder, documents=3),
            "offsets.bin: the file has 40 bytes, but 4 offsets need 32",
        ),
        (lambda folder: (folder / "tokens.bin").write_bytes(b"123"), "cut off"),
        (lambda folder: change_offsets(folder, 1, 3, 4, 4, 6), "offsets run from 1 to 6"),
        (lambda folder: change_offsets(folder, 0, 3, 4, 4, 5), "offsets run from 0 to 5"),
        (lambda folder: change_offsets(folder, 0, 4, 3, 4, 6), "document 2 ends before it begins"),
        (lambda folder: change_offsets(folder, 0, 99, 3, 4, 6), "document 2 ends before it begins"),
    ],
)
def test_damage_is_found_on_opening(tmp_path: Path, damage, message: str) -> None:
    folder = shard(tmp_path / "s").folder
    damage(folder)
    with pytest.raises(FormatError) as caught:
        TokenShard.open(folder)
    assert message in str(caught.value)


def test_ids_beyond_the_vocabulary_are_found_on_demand(tmp_path: Path) -> None:
    folder = shard(tmp_path / "s").folder
    change_header(folder, vocab_size=8)
    with pytest.raises(FormatError, match="document 2: id 65,535 is not below the vocabulary size 8"):
        TokenShard.open(folder).check_ids()


def test_no_shard_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such token shard"):
        TokenShard.open(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileError, match=r"holds 'thesis\.txt', which lexmill did not write"):
        shard(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="a file stands where"):
        shard(tmp_path / "file")
    with pytest.raises(FileError, match="Cannot write"):
        shard(tmp_path / "file" / "below")
