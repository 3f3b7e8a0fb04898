"""Installed models run: the store's files in llama.cpp, and a server with Ollama's API asked by `verify`."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from conftest import lexmill, randomise
from fake_ollama import FakeOllama
from ollama_chats import Speaker
from ollama_reader import everything, open_model

from lexmill.errors import ConfigError, LexmillError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.inference.language_model import load
from lexmill.messages import ROLES
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.runtimes.llama_cpp import RuntimeFailure, export_gguf
from lexmill.runtimes.ollama import create, install
from lexmill.runtimes.ollama_api import OllamaServer, ollama_place, server_address
from lexmill.runtimes.ollama_names import ModelName
from lexmill.runtimes.ollama_show import list_models
from lexmill.runtimes.ollama_store import Store
from lexmill.runtimes.ollama_templates import find_go_template
from lexmill.runtimes.verify import verify
from lexmill.tokenizer.special import GO_TEMPLATE, STOP_STRINGS
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

M = ModelName.parse("m")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    config = ModelConfig(
        vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=96, context=256
    )
    weights = randomise(build_model(config), deviation=0.12, norms=0.1).weights()
    path = tmp_path_factory.mktemp("models") / "toy"
    return write_model_directory(path, config, weights, tokenizer, {"license": "MIT & <more>"})


@pytest.fixture(scope="module")
def bert(tmp_path_factory, prose):
    tokenizer = train_tokenizer(
        [prose[:60_000]], TokenizerConfig(kind="wordpiece", vocab_size=500, lowercase=True)
    )
    shape = dict(width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128)
    family = {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}
    config = ModelConfig(**{**shape, **family, "vocab_size": 520})
    weights = randomise(build_model(config)).weights()
    return write_model_directory(tmp_path_factory.mktemp("models") / "bert", config, weights, tokenizer)


@pytest.fixture
def ollama(tmp_path):
    with FakeOllama(tmp_path / "served") as server:
        yield server


def results(report):
    return {check.check: check.passed for check in report.checks if check.runtime.startswith("Ollama")}


def ask(model, server, **more):
    return verify(model.path, tokens=12, ollama=f"{server.address}/m", **more)


def test_what_is_installed_is_what_ollama_reads(tmp_path, model):
    store = Store(tmp_path / "store")
    install(model, ModelName.parse("someone/m:v1"), store, type="f32", system='Be\n"brief" 👩‍🚀\u00a0.')
    found = open_model(store.root, "someone/m:v1")
    assert found["kinds"] == ["model", "template", "system", "license", "params"]
    assert found["template"] == GO_TEMPLATE and found["license"] == ["MIT & <more>"]
    assert found["params"] == {"num_ctx": 256, "stop": list(STOP_STRINGS)}
    assert found["system"] == 'Be\n"brief" 👩‍🚀\u00a0.'  # a Modelfile could not say it
    assert found["config"]["file_type"] == "F32" and found["config"]["model_type"].endswith("K")
    assert found["model"].read_bytes() == export_gguf(model, tmp_path / "m.gguf", "f32").read_bytes()
    report = verify(model.path, [found["model"]], tokens=12)
    assert all(check.passed for check in report.checks if "llama.cpp" in check.runtime), report.table_rows()


def test_an_encoder_has_no_template(tmp_path, bert):
    store = Store(tmp_path / "store")
    install(bert, M, store, type="f16")
    found = open_model(store.root, "m")
    assert found["kinds"] == ["model", "params"] and found["embeds"]
    with pytest.raises(ConfigError, match="no system prompt"):
        install(bert, M, store, system="Be brief.")


def test_a_file_of_another_model_is_refused(tmp_path, model, bert):
    store = Store(tmp_path / "store")
    with pytest.raises(ModelError, match="its architecture is bert"):
        install(model, M, store, gguf=export_gguf(bert, tmp_path / "b.gguf", "f16"))
    assert everything(tmp_path / "store") == set()


def test_the_server_makes_it(tmp_path, model, ollama):
    gguf, server = export_gguf(model, tmp_path / "m.gguf", "q8_0"), OllamaServer(ollama.address)
    create(model, M, server, gguf, system="Be brief.")
    found = open_model(ollama.root, "m")
    assert found["kinds"] == ["model", "template", "system", "license", "params"] and len(ollama.uploads) == 1
    create(model, ModelName.parse("other"), server, gguf)
    assert len(ollama.uploads) == 1, "a file that is there is not sent again"
    assert open_model(ollama.root, "other")["model"] == found["model"]
    with pytest.raises(RuntimeFailure, match="no such blob"):  # an error after status 200
        server.create(M, {"files": {"m.gguf": "sha256:" + "0" * 64}})
    with pytest.raises(RuntimeFailure, match="not found"):
        server.show("none")


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_verify_asks_ollama(model, ollama, type):
    install(model, M, Store(ollama.root), type=type)
    report = ask(model, ollama)
    names = ("chat template", "tokens", "chat tokens", "greedy", "chat")
    assert results(report) == dict.fromkeys(names, True), report.table_rows()


def test_verify_knows_a_system_prompt_of_the_model(model, ollama):
    install(model, M, Store(ollama.root), type="f32", system="Be brief.")
    assert set(results(ask(model, ollama)).values()) == {True}


def test_the_template_in_the_gguf_file(model, ollama):
    """Without a Go template llama.cpp renders the Jinja template, as Ollama has it do."""
    install(model, M, Store(ollama.root), type="f32", template=False)
    found = open_model(ollama.root, "m")
    assert "template" not in found and found["config"]["requires"] == "0.30.0"
    assert set(results(ask(model, ollama)).values()) == {True}


def damaged_template(store):
    """The installed model with a template that forgets the line end before the reply."""
    found = open_model(store.root, "m")
    texts = [("application/vnd.ollama.image.template", GO_TEMPLATE[:-1].encode())]
    config = (store.blobs / f"sha256-{store.read(M).config.sha256}").read_bytes()
    copy = found["model"].with_name("copy.gguf")
    copy.write_bytes(found["model"].read_bytes())
    store.install(M, copy, texts, lambda _: config)


@pytest.mark.parametrize("shows_prompts", [True, False])
def test_a_wrong_template_is_caught(tmp_path, model, shows_prompts):
    with FakeOllama(tmp_path / "served", shows_prompts) as ollama:
        install(model, M, Store(ollama.root), type="f32")
        damaged_template(Store(ollama.root))
        report = ask(model, ollama)
    found = results(report)
    assert found["chat template"] is (False if shows_prompts else None) and found["chat tokens"] is False
    assert found["tokens"] and found["greedy"], "raw prompts pass it by"
    assert found["chat"] is False and report.exit_code == 1


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_another_model_s_weights_are_caught(tmp_path, model, ollama, type):
    weights = {name: value.copy() for name, value in model.weights().items()}
    name = next(name for name in weights if name.endswith("mlp.down.weight"))
    weights[name] *= -1
    other = write_model_directory(tmp_path / "other", model.config, weights, model.tokenizer)
    install(other, M, Store(ollama.root), type=type)
    found = results(ask(model, ollama))
    assert found["tokens"] and found["chat template"] and found["greedy"] is False


def test_verify_asks_ollama_for_vectors(bert, ollama):
    install(bert, M, Store(ollama.root), type="f16")
    report = ask(bert, ollama)
    assert results(report) == {"tokens": True, "embeddings": True}, report.table_rows()


def test_vectors_of_another_model_are_caught(tmp_path, bert, ollama):
    weights = {name: value.copy() for name, value in bert.weights().items()}
    weights["embed.weight" if "embed.weight" in weights else next(iter(weights))][:] *= -1
    other = write_model_directory(tmp_path / "other", bert.config, weights, bert.tokenizer)
    install(other, M, Store(ollama.root), type="f16")
    assert results(ask(bert, ollama)) == {"tokens": True, "embeddings": False}


def test_no_server(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report = verify(model.path, tokens=4, ollama=f"http://127.0.0.1:{port}/m")
    assert results(report) == {"runs": False} and "no Ollama answers" in report.checks[-1].detail


@pytest.mark.parametrize(
    "text,address",
    [
        ("", "http://127.0.0.1:11434"),
        ("host", "http://host:11434"),
        (":80", "http://127.0.0.1:80"),
        ("0.0.0.0:5", "http://127.0.0.1:5"),
        ("https://host", "https://host:443"),
        ("http://[::1]:9/api/", "http://[::1]:9/api"),
    ],
)
def test_addresses(monkeypatch, text, address):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert server_address(text) == address
    monkeypatch.setenv("OLLAMA_HOST", text)
    assert server_address() == address


@pytest.mark.parametrize("text", ["ftp://host", "http://host:99999", "http://a@b", "http://[", "host:x"])
def test_addresses_that_are_none(text):
    with pytest.raises(ConfigError):
        server_address(text)


def test_places():
    assert ollama_place("someone/m:v1") == ("", "someone/m:v1")
    assert ollama_place("http://h:1/someone/m:v1") == ("http://h:1", "someone/m:v1")
    with pytest.raises(ConfigError, match="no model"):
        ollama_place("http://h:1/")


def test_the_real_client(tmp_path, model, ollama):
    """Ollama's own Python client sees a model that lexmill installed, and makes one beside it."""
    package = pytest.importorskip("ollama", reason="the package 'ollama' is not installed")
    client = package.Client(host=ollama.address)
    install(model, M, Store(ollama.root), type="f32")
    told = client.generate("m", "Once", raw=True, options={"temperature": 0, "num_predict": 8})
    assert told.response == load(model.path).generate("Once", max_tokens=8, temperature=0)
    digest = client.create_blob(export_gguf(model, tmp_path / "m.gguf", "f32"))
    assert open_model(ollama.root, "m")["model"].name == digest.replace(
        ":", "-"
    )  # exports are the same each time
    client.create("theirs", files={"m.gguf": digest}, template=GO_TEMPLATE, parameters={"num_ctx": 256})
    messages = [{"role": "user", "content": "Hello"}]
    ours, theirs = (
        client.chat(name, messages, options={"temperature": 0, "num_predict": 8}).message.content
        for name in ("m", "theirs")
    )
    assert ours == theirs
    assert [row.name for row in list_models(Store(ollama.root))] == ["m:latest", "theirs:latest"]


def test_the_commands(tmp_path, model):
    env = {"OLLAMA_MODELS": str(tmp_path / "store")}
    done = lexmill("export", "ollama", model.path, "--name", "toy", "--quiet", env=env)
    assert done.returncode == 0 and "ollama run toy:latest" in done.stdout, done.stderr
    assert open_model(tmp_path / "store", "toy")["config"]["file_type"] == "Q8_0"
    done = lexmill("ollama", "list", env=env)
    assert done.returncode == 0 and "toy:latest" in done.stdout and "Q8_0" in done.stdout
    done = lexmill("ollama", "show", "toy", "--check", "--store", tmp_path / "store")
    assert done.returncode == 0 and "PARAMETER num_ctx 256" in done.stdout and "<|im_start|>" in done.stdout
    done = lexmill("ollama", "rm", "toy", env=env)
    assert done.returncode == 0 and everything(tmp_path / "store") == set()
    done = lexmill("ollama", "rm", "toy", env=env)
    assert done.returncode == 2 and "no model 'toy:latest'" in done.stderr and "Traceback" not in done.stderr
    done = lexmill("export", "ollama", model.path, "--store", tmp_path / "store")
    assert done.returncode == 2 and "--name" in done.stderr
    done = lexmill("export", "ollama", model.path, "--name", "../x", env=env)
    assert done.returncode == 2 and "no name of a model" in done.stderr


def test_smollm2_s_template():
    path = os.environ.get("LEXMILL_SMOLLM2", "")
    if not Path(path).is_file():
        pytest.skip("LEXMILL_SMOLLM2 does not name the GGUF file of SmolLM2")
    try:
        with GGUFFile.open(path) as file:
            source = file.metadata["tokenizer.chat_template"]
    except LexmillError as error:
        pytest.skip(f"lexmill cannot read this file yet: {error}")
    found = find_go_template(Speaker(source))
    assert "You are a helpful AI assistant named SmolLM" in found.template
    from go_templates import render_as_ollama

    messages = [{"role": role, "content": "x"} for role in ROLES[1:]]
    assert render_as_ollama(found.template, messages) == Speaker(source).render_chat(messages)


def test_a_real_encoder(tmp_path):
    """all-MiniLM-L6-v2, in languages whose words llama.cpp divides as its tokenizer.json says."""
    folder = os.environ.get("LEXMILL_MINILM", "")
    if not Path(folder, "config.json").is_file():
        pytest.skip("LEXMILL_MINILM does not name the folder of all-MiniLM-L6-v2")
    texts = [
        "How many people live in Berlin?",
        "naïve café Zürich",
        "Съешь ещё этих булок",
        "中文没有空格",
        "a, b: c",
    ]
    with FakeOllama(tmp_path / "served") as ollama:
        install(ModelDirectory.open(folder), M, Store(ollama.root), type="f16")
        theirs = OllamaServer(ollama.address).embed("m", texts)["embeddings"]
    ours = load(folder).embed(texts, normalise=True)
    assert np.max(1 - (ours * np.array(theirs)).sum(-1)) < 1e-5
