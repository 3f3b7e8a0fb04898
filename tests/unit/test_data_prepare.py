"""Preparation as a whole: on the shipped corpora, and on small inputs made to go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lexmill.data import prepare as prepare_module
from lexmill.data.documents import Document, read_documents
from lexmill.data.prepare import FILES, PrepareConfig, PrepareResult, SourceConfig, group_key, prepare
from lexmill.errors import ConfigError, DataError, FileError
from lexmill.files import sha256_file

CORPORA = Path(__file__).parents[2] / "corpora"
CHAPTER = r"^(VOLUME|CHAPTER|Chapter) ([0-9]+|[IVXLC]+)$"
SHIPPED = PrepareConfig(
    sources=(
        SourceConfig(path="austen", split=CHAPTER, unwrap=True, license="public domain", language="en"),
        SourceConfig(path="dialogues", license="BSD-3-Clause", language="en", kind="chat"),
    )
)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> PrepareResult:
    return prepare(SHIPPED, tmp_path_factory.mktemp("data") / "out", CORPORA)


def load(result: PrepareResult) -> tuple[list[Document], list[Document]]:
    train, validation = (
        list(read_documents(result.folder / f"{name}.parquet")) for name in ("train", "validation")
    )
    return train, validation


def test_shipped_corpora(shipped: PrepareResult) -> None:
    train, validation = load(shipped)
    assert (
        shipped.counts["train"]["text"]["documents"] + shipped.counts["validation"]["text"]["documents"]
        == 270
    )
    assert shipped.counts["train"]["text"]["bytes"] > 3_800_000
    assert shipped.counts["train"]["chat"]["documents"] > 500
    assert shipped.counts["validation"]["text"]["documents"] >= 8
    assert shipped.counts["validation"]["chat"]["documents"] >= 20
    assert shipped.documents("train") == len(train) and shipped.documents("validation") == len(validation)
    assert sorted(path.name for path in shipped.folder.iterdir()) == sorted(FILES)
    emma = next(document for document in train + validation if document.source == "austen/Emma.txt#1")
    assert "handsome, clever, and rich, with a comfortable home and happy disposition" in (emma.text or "")
    assert (emma.license, emma.language) == ("public domain", "en")


def test_no_document_and_no_opening_question_is_in_both_splits(shipped: PrepareResult) -> None:
    train, validation = load(shipped)
    assert not {d.id for d in train} & {d.id for d in validation}
    assert not {group_key(d) for d in train} & {group_key(d) for d in validation}
    assert len({d.id for d in train + validation}) == len(train) + len(validation)


def test_the_manifest_traces_every_row(shipped: PrepareResult) -> None:
    manifest = json.loads((shipped.folder / "manifest.json").read_text(encoding="utf-8"))
    train, validation = load(shipped)
    rows = Counter(document.source.partition("#")[0] for document in train + validation)
    assert rows == {file["path"]: file["kept"] for file in manifest["files"]}
    for file in manifest["files"]:
        assert file["sha256"] == sha256_file(CORPORA / file["path"])
        assert file["bytes"] == (CORPORA / file["path"]).stat().st_size
    assert manifest["outputs"]["train.parquet"] == sha256_file(shipped.folder / "train.parquet")
    card = (shipped.folder / "card.md").read_text(encoding="utf-8")
    assert "austen/Emma.txt" in card and "BSD-3-Clause" in card and "## Excerpts" in card
    assert str(CORPORA) not in card + json.dumps(manifest)


def test_a_second_run_gives_the_same_bytes(shipped: PrepareResult, tmp_path: Path) -> None:
    again = prepare(SHIPPED, tmp_path / "other", CORPORA)
    for name in FILES:
        assert (again.folder / name).read_bytes() == (shipped.folder / name).read_bytes()
    prepare(SHIPPED, tmp_path / "other", CORPORA)  # over itself
    assert (again.folder / "card.md").read_bytes() == (shipped.folder / "card.md").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def chats(*pairs: tuple[str, str]) -> str:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs
    ]
    return "\n".join(json.dumps(row) for row in rows)


def run(
    folder: Path, *, out: str = "out", fraction: float = 0.5, minimum: int = 1, **source: object
) -> PrepareResult:
    config = PrepareConfig(
        sources=(SourceConfig(**source),),  # type: ignore[arg-type]
        validation_fraction=fraction,
        min_characters=minimum,
    )
    return prepare(config, folder / out, folder)


def test_duplicates_and_short_documents_are_dropped_and_recorded(tmp_path: Path) -> None:
    texts = ["alpha one", "beta two", "alpha  one"[:6] + "one ", "x", "alpha one\r\n", "", "gamma three"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    result = run(tmp_path, path="a.jsonl", minimum=3)
    assert result.dropped == {"duplicate": 2, "empty": 1, "shorter than min_characters": 1}
    assert result.documents("train") + result.documents("validation") == 3
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [(d["source"], d["same_as"]) for d in manifest["duplicates"]] == [
        ("a.jsonl#3", "a.jsonl#1"),
        ("a.jsonl#5", "a.jsonl#1"),
    ]
    (file,) = manifest["files"]
    assert (file["rows"], file["documents"], file["kept"]) == (7, 7, 3)


def test_chats_are_cleaned_and_kept_together_by_question(tmp_path: Path) -> None:
    pairs = [(f"What is {n}?", f"answer {n}\r\n ") for n in range(20)] + [
        (f"what is {n}", f"other {n}") for n in range(20)
    ]
    (tmp_path / "a.jsonl").write_text(chats(*pairs, ("hello", " \n"), ("What is 1? ", "answer 1")))
    result = run(tmp_path, path="a.jsonl", kind="chat")
    train, validation = load(result)
    assert result.dropped == {"a message is empty": 1, "duplicate": 1}
    assert len(train) + len(validation) == 40 and train and validation
    assert not {group_key(d) for d in train} & {group_key(d) for d in validation}
    assert all(m["content"] == m["content"].strip() for d in train for m in d.messages or ())


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_two_documents_are_enough_for_two_splits(tmp_path: Path, fraction: float) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    result = run(tmp_path, path="*.txt", fraction=fraction)
    assert (result.documents("train"), result.documents("validation")) == (1, 1)


def test_one_document_is_too_few_unless_no_validation_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(
        DataError, match=r'only one document of kind "text".*"split" rule.*validation_fraction = 0'
    ):
        run(tmp_path, path="a.txt")
    result = run(tmp_path, path="a.txt", fraction=0.0)
    assert (result.documents("train"), result.documents("validation")) == (1, 0)
    assert list(read_documents(tmp_path / "out" / "validation.parquet")) == []


def test_what_cannot_be_prepared_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "c.jsonl").write_text(chats(("a", "b")))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"none: nothing matches this path"):
        run(tmp_path, path="none")
    with pytest.raises(DataError, match=r"c\.jsonl#1: a source of kind \"text\" needs"):
        run(tmp_path, path="c.jsonl")
    with pytest.raises(DataError, match=r"t\.jsonl#1: a source of kind \"chat\" needs"):
        run(tmp_path, path="t.jsonl", kind="chat")
    with pytest.raises(DataError, match="matches no line of any file"):
        run(tmp_path, path="a.txt", split="^CHAPTER")
    with pytest.raises(DataError, match="No document is left"):
        run(tmp_path, path="a.txt", minimum=100)
    with pytest.raises(ConfigError, match="is not a regular expression"):
        run(tmp_path, path="a.txt", split="(")
    with pytest.raises(ConfigError, match="kind is 'song'"):
        run(tmp_path, path="a.txt", kind="song")
    with pytest.raises(ConfigError, match="not in \\[0, 1\\)"):
        run(tmp_path, path="a.txt", fraction=1.0)
    with pytest.raises(ConfigError, match="no sources"):
        PrepareConfig(sources=())
    twice = PrepareConfig(sources=(SourceConfig(path="a.txt"), SourceConfig(path="*.txt")))
    with pytest.raises(ConfigError, match=r"a\.txt belongs to two sources: a\.txt and \*\.txt"):
        prepare(twice, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "data_card", interrupt)  # the last thing that is written
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, path="*.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    run(tmp_path, path="*.txt")
    assert (tmp_path / "out" / "card.md").is_file()


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="A file stands where a folder is needed"):
        run(tmp_path, path="?.txt", out="file/out")
    with pytest.raises(FileError, match="a file stands where the output folder is needed"):
        run(tmp_path, path="?.txt", out="file")
    with pytest.raises(FileError, match=r"holds 'a\.txt', which lexmill did not write there"):
        run(tmp_path, path="?.txt", out=".")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_importing_the_room_is_light() -> None:
    code = "import lexmill.data.prepare, sys; print([m for m in ('pyarrow', 'resiliparse', 'markdown_it', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_end_of_each_text_can_be_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(1000)).strip()
    (tmp_path / "one.txt").write_text(text, "utf-8")
    (tmp_path / "tiny.txt").write_text("x", "utf-8")
    config = PrepareConfig(sources=(SourceConfig(path="*.txt"),), validation="end", validation_fraction=0.1)
    train, validation = load(prepare(config, tmp_path / "out", tmp_path))
    cut = round(0.9 * len(text))
    assert [one.text for one in train] == [text[:cut], "x"]  # what is too short for two parts is learned from
    assert [one.text for one in validation] == [text[cut:]]
    assert len({one.id for one in (*train, *validation)}) == 3


def test_chats_have_no_end_to_hold_out() -> None:
    with pytest.raises(ConfigError, match="there are chats"):
        PrepareConfig(sources=(SourceConfig(path="x", kind="chat"),), validation="end")
