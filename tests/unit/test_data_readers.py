"""Every raw format is read, and every kind of bad input is named with its place and its cure."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lexmill.data.documents import Document, document_id, read_documents, write_documents
from lexmill.data.readers import RawDocument, find_inputs, read_raw
from lexmill.errors import DataError, FileError, FormatError


def read(folder: Path, name: str, content: bytes | str) -> list[RawDocument]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_raw(path, license="CC0", language="en"))


def message_of(folder: Path, name: str, content: bytes | str, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read(folder, name, content)
    return str(caught.value).replace(f"{folder}/", "")


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "hello")
    return buffer.getvalue()


def chat(*messages: object) -> str:
    return json.dumps({"messages": list(messages)})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "a.txt: this file is empty."),
        ("a.jsonl", b"", "a.jsonl: this file is empty."),
        ("a.csv", b"", "a.csv: this file is empty."),
        ("a.html", b"", "a.html: this file is empty."),
        ("a.txt", b" \n\t\n", "a.txt: this file holds only white space."),
        ("a.md", b" \n", "only white space"),
        ("a.md", b"---\ntitle: x\n---\n", "holds no text"),
        ("a.csv", b" \n", "only white space"),
        ("a.jsonl", b"\n\n", "a.jsonl: this file holds no rows."),
        ("a.csv", b"text\n", "a.csv: this file holds no rows."),
        ("a.html", b"<html><body><script>1</script></body></html>", "shows no text"),
        ("a.txt", zip_bytes(), "a.txt: this is a binary file, not text; it looks like a ZIP archive"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it looks like a PNG image"),
        ("a.txt", b"%PDF-1.7\n1 0 obj\n", "it looks like a PDF document"),
        ("a.txt", gzip.compress(b"hello " * 100), "it looks like a gzip archive"),
        ("a.txt", b"hello\0world", "a.txt: this is a binary file, not text."),
        ("a.txt", b"\x01\x02\x03\x04 ab", "binary file"),
        ("a.jsonl", b"\x1f\x8b\x08\0\0\0", "gzip"),
        (
            "a.txt",
            b"one\ntwo caf\xe9 \n",
            "a.txt, line 2: invalid UTF-8 (byte 0xe9 at offset 11 of the file).",
        ),
        ("a.txt", b"one\ntwo caf\xe9 \n", "iconv -f LATIN1 -t UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "a.jsonl, line 2: invalid UTF-8 (byte 0xff at offset 24",
        ),
        ("a.txt", b"\xff\xfea\0\x00", "a.txt: invalid UTF-16"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: broken JSON at column"),
        ("a.jsonl", "[1]\n", "a.jsonl, row 1: it is a list, not an object."),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: this JSON cannot be read"),
        (
            "corpus.jsonl",
            '{"text": "a"}\n' * 1206 + '{"txt": "a"}\n',
            'corpus.jsonl, row 1,207: field "text" is missing. Each row needs "text" or "messages".',
        ),
        ("a.jsonl", '{"text": null}', 'a.jsonl, row 1: field "text" is null.'),
        ("a.jsonl", '{"text": 5}', 'a.jsonl, row 1: field "text" is a number, not a string.'),
        ("a.jsonl", '{"text": "a", "meta": 5}', 'field "meta" is a number, not an object.'),
        ("a.jsonl", '{"messages": "hi"}', 'a.jsonl, row 1: field "messages" is a string, not a list.'),
        ("a.jsonl", '{"messages": []}', 'field "messages" is an empty conversation.'),
        ("a.jsonl", chat("hi"), "a.jsonl, row 1, message 1: it is a string, not an object."),
        ("a.jsonl", chat({"content": "hi"}), "message 1: its role is missing."),
        (
            "a.jsonl",
            chat({"role": "user", "content": "hi"}, {"role": "asistant", "content": "a"}),
            "a.jsonl, row 1, message 2: its role 'asistant' is unknown. Did you mean 'assistant'?",
        ),
        (
            "a.jsonl",
            chat({"role": "user", "content": ["a"]}),
            "message 1: its content is a list, not a string.",
        ),
        ("a.jsonl", chat({"role": "user"}), "message 1: its content is missing."),
        (
            "a.csv",
            "texts,n\na,1\n",
            'a.csv, line 1: there is no column "text"; the columns are "texts", "n".',
        ),
        ("a.csv", "texts,n\na,1\n", "Did you mean 'texts'?"),
        ("a.csv", "text,text\na,1\n", 'two columns are named "text"'),
        ("a.csv", 'text,n\n"a\nb",1\nc\n', "a.csv, line 4: this row has 1 fields, but the header has 2."),
        ("a.csv", 'text,n\n"a,1\n', "a.csv, line 2: broken CSV"),
        ("a.csv", "messages\nhello\n", 'a.csv, line 2: field "messages" is not JSON'),
        ("a.docx", b"x", "files with the suffix '.docx' cannot be read. Supported are .txt, .md,"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: bytes | str, expected: str) -> None:
    assert expected in message_of(tmp_path, name, content)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such raw file"):
        list(read_raw(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(FileError, match="is a folder"):
        list(read_raw(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    "encoded", ["\ufeffcafé\n".encode(), "\ufeffcafé\n".encode("utf-16-le"), "café\n".encode("utf-16")]
)
def test_byte_order_marks_are_understood(tmp_path: Path, encoded: bytes) -> None:
    assert [raw.text for raw in read(tmp_path, "a.txt", encoded)] == ["café\n"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_rows_with_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    row = '{"text": "é\u2028"}\n{"text": "b"}\n'
    assert [raw.text for raw in read(tmp_path, "a.jsonl", row.encode(encoding))] == ["é\u2028", "b"]
    assert [raw.text for raw in read(tmp_path, "a.csv", "text\né\n".encode(encoding))] == ["é"]


def test_plain_words_that_look_like_magic_are_text(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "RIFF is a format.\n")[0].text == "RIFF is a format.\n"
    assert read(tmp_path, "b.txt", "BZhé\n")[0].text == "BZhé\n"


def test_jsonl_rows_keep_their_other_fields(tmp_path: Path) -> None:
    rows = '{"text": "a", "language": "de", "n": 3, "tag": "x"}\n\n' + chat(
        {"role": "user", "content": "hi", "x": 1}
    )
    first, second = read(tmp_path, "a.jsonl", rows)
    assert (first.text, first.language, first.license, first.row) == ("a", "de", "CC0", 1)
    assert first.meta == {"n": "3", "tag": "x"}
    assert (second.messages, second.row, second.language) == (({"role": "user", "content": "hi"},), 3, "en")


def test_csv_and_tsv(tmp_path: Path) -> None:
    long = "word " * 60_000  # more than Python's own limit for a field
    rows = read(tmp_path, "a.csv", f'\ufeffn,text\n1,"a ""b"",\nc"\n\n2,{long}\n')
    assert [(raw.text, raw.row, raw.meta) for raw in rows] == [
        ('a "b",\nc', 1, {"n": "1"}),
        (long, 2, {"n": "2"}),
    ]
    assert [raw.text for raw in read(tmp_path, "a.tsv", "text\tn\na,b\t1\n")] == ["a,b"]
    cell = '"[{""role"": ""user"", ""content"": ""hi""}]"'
    assert read(tmp_path, "b.csv", f"messages\n{cell}\n")[0].messages == ({"role": "user", "content": "hi"},)


def test_parquet(tmp_path: Path) -> None:
    messages = [None, [{"role": "user", "content": "hi"}]]
    table = pa.table({"text": ["a", None], "messages": messages, "n": [1, 2], "image": [b"x", b"y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = read_raw(tmp_path / "a.parquet")
    assert (first.text, first.row, first.meta) == ("a", 1, {"n": "1"})
    assert second.messages == ({"role": "user", "content": "hi"},)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match='no column "text"; the columns are "body"'):
        list(read_raw(tmp_path / "b.parquet"))


HTML = """<!doctype html><html><head><meta charset="{}"><title>A  page</title></head><body><nav><a href="/">Home</a></nav>
<main><article><h1>Caf\u00e9</h1><p>The first paragraph of the page says something of interest, at length.</p>
<p>The second one goes on about it, so that this is the main part.</p></article></main>
<footer>Imprint</footer></body></html>"""


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1"])
def test_html_keeps_the_main_content_in_its_encoding(tmp_path: Path, charset: str) -> None:
    (raw,) = read(tmp_path, "a.html", HTML.format(charset).encode(charset))
    assert raw.text is not None
    assert raw.text.startswith("Café")
    assert "second one" in raw.text
    assert "Home" not in raw.text and "Imprint" not in raw.text and "<" not in raw.text
    assert raw.meta == {"title": "A page"}


def test_html_without_a_main_part_still_gives_its_text(tmp_path: Path) -> None:
    assert "hello" in (read(tmp_path, "a.htm", b"hello <b>there</b>")[0].text or "")


def test_markdown_becomes_plain_text(tmp_path: Path) -> None:
    page = (
        "---\ntitle: x\n---\n# A *title*\n\nSome **bold**\ntext with [a link](http://example.org) and `code`.\n\n"
        "- one\n- two\n  1. deep\n  2. deeper\n\n```python\nx = 1\n\ny = 2\n```\n\n> said\n\n<div>raw</div>\n\n"
        "![a picture](p.png)\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nEnd.\n"
    )
    assert read(tmp_path, "a.md", page)[0].text == (
        "A title\n\nSome bold text with a link and code.\n\n- one\n- two\n  1. deep\n  2. deeper\n\n"
        "x = 1\n\ny = 2\n\nsaid\n\na picture\n\na\tb\n1\t2\n\nEnd."
    )


def test_inputs_are_found_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "b/.hidden/3.txt", "b/.4.txt", "b/5.png", "a.jsonl", "[x]/6.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    found = [
        str(path.relative_to(tmp_path)) for path in find_inputs(["b", "b/*.txt", "a.jsonl", "[x]"], tmp_path)
    ]
    assert found == sorted(["[x]/6.txt", "a.jsonl", "b/1.md", "b/2.txt"])
    assert len(find_inputs(["**/*.txt"], tmp_path)) == 2
    with pytest.raises(DataError, match=r"c/\*\.txt: nothing matches this path"):
        find_inputs(["b", "c/*.txt"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: this folder holds no file that can be read"):
        find_inputs(["empty"], tmp_path)


def document(text: str, **values: str) -> Document:
    return Document(id=document_id(text, None), text=text, messages=None, kind="text", **values)


def test_documents_survive_parquet_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    talk = Document(
        id=document_id(None, messages), text=None, messages=messages, kind="chat", meta={"b": "1", "a": "2"}
    )
    documents = [document(f"text {number} \u00e9", source=f"a.txt#{number}") for number in range(2500)] + [
        talk
    ]
    assert write_documents(tmp_path / "a" / "x.parquet", documents) == 2501
    write_documents(tmp_path / "b.parquet", iter(documents))
    assert (tmp_path / "a" / "x.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups == 3
    assert list(read_documents(tmp_path / "b.parquet")) == documents
    assert list(read_documents(tmp_path / "a")) == documents


def test_unknown_columns_are_ignored(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.parquet", [document("x")])
    table = pq.read_table(tmp_path / "a.parquet").append_column("images", pa.array([[b"1"]]))
    pq.write_table(table.drop_columns(["license"]), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == [document("x")]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_documents(path, [document("word " * 1000 + str(number)) for number in range(100)])
    whole = path.read_bytes()
    broken = {
        "cut off": whole[: len(whole) // 2],
        "no Parquet": b"hello",
        "empty": b"",
        "zeros": whole[:100] + b"\0" * 200 + whole[300:],
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(FormatError, match="damaged or no Parquet file"):
            list(read_documents(path))
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(FormatError, match="has no column 'id', 'messages', 'kind'; it has 'text'"):
        list(read_documents(path))
    with pytest.raises(FileError, match="no such Parquet file"):
        list(read_documents(tmp_path / "none.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no documents"):
        list(read_documents(tmp_path / "folder"))


def test_documents_that_contradict_their_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_documents(path, [Document(id="1", text="x", messages=None, kind="chat")])
    with pytest.raises(
        FormatError, match='document 1: its kind is "chat" but its column "messages" is empty'
    ):
        list(read_documents(path))
    write_documents(path, [Document(id="1", text="x", messages=None, kind="song")])
    with pytest.raises(FormatError, match="its kind is 'song'"):
        list(read_documents(path))
