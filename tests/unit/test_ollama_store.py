"""Ollama stores: names, manifests that may be hostile, installing, listing, removing."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_reader import everything, open_model

from lexmill.errors import ConfigError, FileError, FormatError, LexmillError
from lexmill.formats.blocks import BLOCK_TYPES
from lexmill.formats.gguf import string, u32, write_gguf
from lexmill.runtimes.ollama_manifest import (
    MAX_MANIFEST_BYTES,
    PARAMS,
    TEMPLATE,
    Layer,
    Manifest,
    config_json,
    go_json,
    human_number,
    parse_manifest,
)
from lexmill.runtimes.ollama_names import ModelName, as_spelled
from lexmill.runtimes.ollama_show import list_models, show_model
from lexmill.runtimes.ollama_store import Store, default_store

HEX = "0123456789abcdef" * 4


# Names


@pytest.mark.parametrize(
    "text,parts",
    [
        ("m", ("registry.ollama.ai", "library", "m", "latest")),
        ("m:7b", ("registry.ollama.ai", "library", "m", "7b")),
        ("someone/m", ("registry.ollama.ai", "someone", "m", "latest")),
        ("host:5000/a_b/M-1.x:t.1", ("host:5000", "a_b", "M-1.x", "t.1")),
        ("https://host/n/m", ("host", "n", "m", "latest")),
        ("_m", ("registry.ollama.ai", "library", "_m", "latest")),
        ("m" * 80, ("registry.ollama.ai", "library", "m" * 80, "latest")),
    ],
)
def test_names(text, parts):
    name = ModelName.parse(text)
    assert name.path.parts == parts
    assert ModelName.parse(str(name)) == name and ModelName.from_path(name.path) == name


@pytest.mark.parametrize(
    "text",
    ["", ":", "m:", ":t", "/m", "a//m", "a/b/c/m", "..", "../m", "m/..", "m/../x", "a.b/m", ".m", "-m", "m:-t", "m m", "m\0",
     "m\n", "é", "m@sha", "m:a/b", "C:\\m", "m" * 81, "a:b/m", "h/n/m:" + "t" * 81, "~/m", "m:..", "host/./m"],
)  # fmt: skip
def test_names_that_ollama_refuses(text):
    with pytest.raises(ConfigError):
        ModelName.parse(text)


@given(st.text(max_size=40) | st.text("ab./:-_@~\\\0 ", max_size=12))
def test_no_name_leads_out_of_the_store(text):
    try:
        name = ModelName.parse(text)
    except ConfigError:
        return
    path = PurePosixPath("/store/manifests") / name.path
    assert len(path.parts) == 7 and ".." not in path.parts and not any(c in text for c in "\\\0~")


def test_names_are_spelled_as_before():
    old = ModelName.parse("Someone/Model:Tag")
    assert as_spelled(ModelName.parse("someone/model:tag"), [old]) == old
    assert as_spelled(ModelName.parse("someone/model:other"), [old]).path.parts[1:] == (
        "Someone",
        "Model",
        "other",
    )


# Manifests


def test_json_is_gos():
    assert go_json({"a": ["<é&>", "\u2028", "/\t\x01"]}) == (
        b'{"a":["\\u003c\xc3\xa9\\u0026\\u003e","\\u2028","/\\t\\u0001"]}\n'
    )
    assert config_json("llama", 1_500_000, 7) == (
        b'{"model_format":"gguf","model_family":"llama","model_families":["llama"],"model_type":"1.50M",'
        b'"file_type":"Q8_0","architecture":"amd64","os":"linux"}\n'
    )


@pytest.mark.parametrize(
    "count,text",
    [(999, "999"), (1_000, "1K"), (999_999, "1000K"), (10**6, "1M"), (134_515_008, "134.52M"), (7 * 10**9, "7B"), (1_235_814_400, "1.2B")],
)  # fmt: skip
def test_human_numbers(count, text):
    assert human_number(count) == text


LAYER = {"mediaType": TEMPLATE, "digest": f"sha256:{HEX}", "size": 3}
GOOD = {"schemaVersion": 2, "mediaType": "x", "config": LAYER, "layers": [LAYER]}


def manifest_bytes(**changes):
    return json.dumps({**GOOD, **changes}).encode()


HOSTILE = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b"\xff{}",
    "a list": b"[]",
    "another version": manifest_bytes(schemaVersion=1),
    "no layers": manifest_bytes(layers=None),
    "layers that are none": manifest_bytes(layers=[3]),
    "no config": manifest_bytes(config=None),
    "a path as digest": manifest_bytes(config={**LAYER, "digest": "sha256:../../../../etc/passwd"}),
    "a digest and more": manifest_bytes(config={**LAYER, "digest": f"sha256:{HEX}/../x"}),
    "a digest and a line": manifest_bytes(config={**LAYER, "digest": f"sha256:{HEX}\n"}),
    "a short digest": manifest_bytes(config={**LAYER, "digest": "sha256:abc"}),
    "another hash": manifest_bytes(config={**LAYER, "digest": f"sha512:{HEX}"}),
    "a digest that is a number": manifest_bytes(config={**LAYER, "digest": 5}),
    "a negative size": manifest_bytes(layers=[{**LAYER, "size": -1}]),
    "a size that is true": manifest_bytes(layers=[{**LAYER, "size": True}]),
    "a broken size": manifest_bytes(layers=[{**LAYER, "size": 1.5}]),
    "a giant size": manifest_bytes(layers=[{**LAYER, "size": 1 << 63}]),
    "a size of a million digits": b'{"schemaVersion":2,"layers":[],"config":{"size":'
    + b"9" * 1_000_000
    + b"}}",
    "a key twice": b'{"schemaVersion":2,' + manifest_bytes()[1:],
    "a key twice inside": manifest_bytes().replace(b'"size"', b'"size":1,"size"', 1),
    "NaN": manifest_bytes().replace(b'"size": 3', b'"size": NaN', 1),
    "deep": b'{"schemaVersion":2,"layers":' + b"[" * 100_000,
    "huge": b" " * (MAX_MANIFEST_BYTES + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path, name):
    with pytest.raises(FormatError):
        parse_manifest(HOSTILE[name], "m")
    path = tmp_path / "manifests/registry.ollama.ai/library/bad/latest"
    path.parent.mkdir(parents=True)
    path.write_bytes(HOSTILE[name])
    store = Store(tmp_path)
    assert [row.name for row in list_models(store) if row.problem] == ["bad:latest"]
    with pytest.raises(FormatError):
        show_model(store, ModelName.parse("bad"))
    assert "cannot be read" in store.remove(ModelName.parse("bad")).kept and not store.names()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(f"sha256:{HEX}"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["digest", "size", "mediaType"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_manifest_or_refused(data):
    with pytest.raises(FormatError):
        parse_manifest(data, "m")


@settings(max_examples=300)
@given(
    st.sampled_from(["schemaVersion", "config", "layers"]),
    st.sampled_from(["mediaType", "digest", "size"]),
    JSON,
)
def test_manifests_with_one_thing_changed(key, field, value):
    changed = {**LAYER, field: value}
    values = {**GOOD, key: {"schemaVersion": value, "config": changed, "layers": [LAYER, changed]}[key]}
    try:
        manifest = parse_manifest(json.dumps(values).encode(), "m")
    except FormatError:
        return
    for layer in manifest.blobs:  # what was let through is safe to use
        assert len(layer.sha256) == 64 and set(layer.sha256) <= set("0123456789abcdef")
        assert isinstance(layer.media_type, str) and type(layer.size) is int and 0 <= layer.size < 1 << 63


@settings(max_examples=200)
@given(st.integers(0, len(manifest_bytes()) - 1), st.binary(min_size=1, max_size=4))
def test_manifests_with_bytes_changed(at, inserted):
    data = manifest_bytes()
    for changed in (
        data[:at] + inserted + data[at:],
        data[:at] + inserted + data[at + len(inserted) :],
        data[:at],
    ):
        with contextlib.suppress(FormatError):
            parse_manifest(changed, "m")


def test_a_manifest_comes_back():
    layer = Layer(TEMPLATE, HEX, 5)
    manifest = Manifest(Layer("c", HEX[::-1], 2), (layer, layer))
    assert parse_manifest(manifest.to_bytes(), "m") == manifest and manifest.size == 7


# Stores


@pytest.fixture
def gguf(tmp_path):
    def make(name, value=1.0):
        path = tmp_path / f"{name}.gguf"
        data = np.full(32, value, np.float32)
        metadata = {
            "general.architecture": string("llama"),
            "general.file_type": u32(0),
            "llama.context_length": u32(64),
        }
        write_gguf(path, metadata, [("w", (32,), BLOCK_TYPES["F32"], lambda: data)])
        return path

    return make


def put(store, name, file, texts=((TEMPLATE, b"{{ .Prompt }}"),), **more):
    return store.install(
        ModelName.parse(name), file, list(texts), lambda _: config_json("llama", 32, 0), **more
    )


def test_install_show_list_remove(tmp_path, gguf):
    store = Store(tmp_path / "store")
    file = gguf("a")
    put(store, "one", file, [(TEMPLATE, b"T"), (PARAMS, b'{"num_ctx":64,"stop":["x"]}\n')])
    found = open_model(store.root, "one")
    assert found["model"].read_bytes() == file.read_bytes() and found["kinds"] == [
        "model",
        "template",
        "params",
    ]
    details = show_model(store, ModelName.parse("ONE"), hashes=True)
    assert (details.architecture, details.parameters, details.quantisation) == ("llama", "32", "F32")
    assert (details.template, details.settings, details.context) == ("T", {"num_ctx": 64, "stop": ["x"]}, 64)
    assert details.capability == "completion" and not details.problems
    assert 'PARAMETER stop "x"' in details.modelfile()
    assert [row.name for row in list_models(store)] == ["one:latest"]
    done = store.remove(ModelName.parse("one"))
    assert done.blobs == 4 and not done.kept and everything(store.root) == set()
    assert sorted(path.name for path in store.root.iterdir()) == [".lexmill.lock", "blobs", "manifests"]


def test_blobs_are_shared_and_removed_with_their_last_model(tmp_path, gguf):
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    before = {path: path.stat().st_ino for path in store.blobs.iterdir()}
    put(store, "two", gguf("a"), [(TEMPLATE, b"another")])
    assert all(path.stat().st_ino == number for path, number in before.items()), "an equal blob is kept"
    assert store.remove(ModelName.parse("one")).blobs == 1  # the template alone was its own
    assert show_model(store, ModelName.parse("two"), hashes=True).problems == ()
    assert store.remove(ModelName.parse("two")).blobs == 3 and everything(store.root) == set()


def test_a_model_is_replaced_and_its_old_blobs_go(tmp_path, gguf):
    store = Store(tmp_path / "store")
    put(store, "Model:V1", gguf("a"))
    assert put(store, "model:v1", gguf("b", 2.0)).path.parts[2:] == ("Model", "V1")
    assert len(store.names()) == 1 and len(list(store.blobs.iterdir())) == 3
    assert open_model(store.root, "Model:V1")["model"].read_bytes() == gguf("b", 2.0).read_bytes()


def test_a_damaged_blob_is_written_anew(tmp_path, gguf):
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    blob = open_model(store.root, "one")["model"]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert "does not hold" in show_model(store, ModelName.parse("one"), hashes=True).problems[0]
    put(store, "two", gguf("a"))
    assert show_model(store, ModelName.parse("one"), hashes=True).problems == ()


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "folder", "link"])
def test_damaged_layers_are_told(tmp_path, gguf, damage):
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    blob = open_model(store.root, "one")["model"]
    data = blob.read_bytes()
    blob.unlink()
    if damage == "folder":
        blob.mkdir()
    elif damage == "link":
        (tmp_path / "secret").write_bytes(data)
        blob.symlink_to(tmp_path / "secret")
    elif damage != "missing":
        blob.write_bytes(data[:-1] if damage == "cut" else data + b"x")
    row = list_models(store)[0]
    assert blob.name in row.problem
    assert show_model(store, ModelName.parse("one")).problems
    store.remove(ModelName.parse("one"))
    assert damage != "link" or (tmp_path / "secret").read_bytes() == data


def test_texts_that_are_not_what_they_say(tmp_path, gguf):
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    blob = next(path for path in store.blobs.iterdir() if path.read_bytes() == b"{{ .Prompt }}")
    blob.write_bytes(b"{{ .Pr0mpt }}")
    with pytest.raises(FormatError, match="does not hold"):
        show_model(store, ModelName.parse("one"))


def test_links_lead_nowhere(tmp_path, gguf):
    outside = Store(tmp_path / "outside")
    put(outside, "one", gguf("a"))
    for part in ("manifests", "blobs"):
        store = Store(tmp_path / part)
        put(store, "one", gguf("a"))
        os.rename(store.root / part, store.root / "real")
        (store.root / part).symlink_to(outside.root / part)
        with pytest.raises(FormatError, match="is a link"):
            put(store, "two", gguf("b", 2.0))
        with pytest.raises(LexmillError, match="is a link"):
            show_model(store, ModelName.parse("one"))
    inner = Store(tmp_path / "inner")
    put(inner, "one", gguf("a"))
    (inner.manifests / "registry.ollama.ai" / "evil").symlink_to(
        outside.manifests / "registry.ollama.ai" / "library"
    )
    assert [str(name) for name in inner.names()] == ["one:latest"]
    with pytest.raises(FormatError, match="is a link"):
        put(inner, "evil/one", gguf("b", 2.0))
    assert show_model(outside, ModelName.parse("one"), hashes=True).problems == ()


def test_a_damaged_neighbour_keeps_its_blobs(tmp_path, gguf):
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    put(store, "two", gguf("a"), [(TEMPLATE, b"two")])
    store.manifest_path(ModelName.parse("two")).write_bytes(b"{")
    done = store.remove(ModelName.parse("one"))
    assert done.blobs == 0 and "two:latest" in done.kept and len(list(store.blobs.iterdir())) == 4


def test_what_is_not_there(tmp_path):
    store = Store(tmp_path / "none")
    assert list_models(store) == [] and not store.root.exists()
    for ask in (store.remove, store.read, lambda name: show_model(store, name)):
        with pytest.raises(FileError, match="no model 'm:latest'"):
            ask(ModelName.parse("m"))
    assert not store.root.exists()


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert default_store() == tmp_path
    monkeypatch.delenv("OLLAMA_MODELS")
    assert default_store() == Path.home() / ".ollama" / "models"


def test_no_space(tmp_path, gguf, monkeypatch):
    store, file = Store(tmp_path / "store"), gguf("a")
    put(store, "one", file)
    before = everything(store.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(FileError, match="left"):
        put(store, "two", gguf("b", 2.0))
    assert everything(store.root) == before


def test_what_fails_on_the_way_leaves_nothing(tmp_path, gguf):
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    before = everything(store.root)

    def half(path):
        path.write_bytes(b"GGUF half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(store, "two", half)
    assert everything(store.root) == before


KILLED = """
import sys, time
from pathlib import Path
from lexmill.runtimes.ollama_names import ModelName
from lexmill.runtimes.ollama_store import Store

def slow(path):
    with open(path, "wb") as file:
        while True:
            file.write(b"x" * 1000)
            file.flush()
            print("writing", flush=True)
            time.sleep(0.01)

Store(sys.argv[1]).install(ModelName.parse("two"), slow, [], lambda _: b"{}")
"""


def test_killed(tmp_path, gguf):
    """Nothing stands under a final name, a second process waits its turn, and the next install clears up."""
    store = Store(tmp_path / "store")
    put(store, "one", gguf("a"))
    before = everything(store.root)
    process = subprocess.Popen([sys.executable, "-c", KILLED, store.root], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline()
        with pytest.raises(FileError, match="already working"):
            put(store, "three", gguf("a"))
        process.kill()
    time.sleep(0.05)
    left = everything(store.root) - before
    assert left and all(Path(name).name.startswith(".") and name.startswith("blobs/") for name in left)
    assert [row.name for row in list_models(store)] == ["one:latest"]
    put(store, "three", gguf("a"))
    assert not any(Path(name).name.startswith(".") for name in everything(store.root))


def test_nothing_hidden_lies_among_the_manifests(tmp_path, gguf, monkeypatch):
    """Ollama takes every file at a manifest's depth for one and complains of names that are none."""
    store, seen = Store(tmp_path / "store"), []
    replace = os.replace

    def watch(source, target):
        seen.extend(path for path in store.manifests.rglob("*") if path.name.startswith("."))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    put(store, "one", gguf("a"))
    assert not seen and store.manifest_path(ModelName.parse("one")).is_file()
