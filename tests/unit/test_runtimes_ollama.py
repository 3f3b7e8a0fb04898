"""The Modelfile, read back by a parser of its documented grammar."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import ConfigError, FileError, ModelError
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.names import weight_shapes
from lexmill.runtimes.ollama import write_modelfile
from lexmill.tokenizer.special import GO_TEMPLATE, STOP_STRINGS
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

NAMES = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "LICENSE", "ADAPTER", "MESSAGE"}


def parse_modelfile(text):
    """Commands of a Modelfile as (name, value) pairs."""
    commands, rest = [], text
    while rest := rest.lstrip(" \t\n"):
        if rest[0] == "#":
            rest = rest.partition("\n")[2]
            continue
        name, value = re.match(r"([A-Za-z]+)[ \t]+", rest), ""
        assert name and name[1].upper() in NAMES, rest[:40]
        rest = rest[name.end() :]
        if name[1].upper() == "PARAMETER":
            key = re.match(r"(\w+)[ \t]+", rest)
            rest, value = rest[key.end() :], f"{key[1]} "
        if rest.startswith('"""'):  # ends at the first line whose end is three quotes
            end = re.compile(r'"""[ \t]*(\n|$)').search(rest, 3)
            assert end, "unterminated"
            value, rest = value + rest[3 : end.start()], rest[end.end() :]
        elif rest.startswith('"'):
            end = re.compile(r'"[ \t]*(\n|$)').search(rest, 1)
            assert end, "unterminated"
            value, rest = value + rest[1 : end.start()], rest[end.end() :]
        else:
            line, _, rest = rest.partition("\n")
            value += line.strip()
        commands.append((name[1].upper(), value))
    return commands


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["", " ", "\n", "{{ .Role }}", "{{ end }}", "<|im_end|>", "{% x %}", '"""', "\\", "  a\n\n"]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], TokenizerConfig(vocab_size=262))
    config = ModelConfig(
        vocab_size=262, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=8, context=96
    )
    weights = {name: np.zeros(shape, np.float32) for name, shape in weight_shapes(config).items()}
    folder = tmp_path_factory.mktemp("models") / "toy"
    return write_model_directory(folder, config, weights, tokenizer, {"license": 'say "MIT"'})


def write(model, folder, gguf="model-q8_0.gguf", **more):
    (folder / gguf).parent.mkdir(exist_ok=True)
    (folder / gguf).write_bytes(b"GGUF")
    return parse_modelfile(write_modelfile(model, folder / gguf, folder / "Modelfile", **more).read_text())


def test_modelfile(tmp_path, model):
    commands = write(model, tmp_path, system='Be "brief".\n# no comment\nBe "kind"')
    assert commands == [
        ("FROM", "./model-q8_0.gguf"),
        ("TEMPLATE", GO_TEMPLATE),
        *(("PARAMETER", f"stop {text}") for text in STOP_STRINGS),
        ("PARAMETER", "num_ctx 96"),
        ("SYSTEM", 'Be "brief".\n# no comment\nBe "kind"'),
        ("LICENSE", 'say "MIT"'),
    ]


@settings(deadline=None, max_examples=50)
@given(system=TEXT)
def test_any_system_prompt_comes_back_or_is_refused(tmp_path_factory, model, system):
    folder = tmp_path_factory.mktemp("m")
    try:
        commands = dict(write(model, folder, system=system))
    except ConfigError:
        assert '"""' in system or not all(c.isprintable() or c in "\n\t" for c in system)
        return
    assert commands.get("SYSTEM", "") == system


@pytest.mark.parametrize(
    "name,expected", [("a b/m.gguf", "./a b/m.gguf"), (".hidden.gguf", "./.hidden.gguf")]
)
def test_paths(tmp_path, model, name, expected):
    assert write(model, tmp_path, name)[0] == ("FROM", expected)


def test_path_beside_the_folder_of_the_modelfile(tmp_path, model):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    out = write_modelfile(model, tmp_path / "m.gguf", tmp_path / "sub" / "Modelfile")
    assert parse_modelfile(out.read_text())[0] == ("FROM", "../m.gguf")


def test_what_cannot_be_written_is_refused(tmp_path, model):
    with pytest.raises(FileError, match="no such GGUF"):
        write_modelfile(model, tmp_path / "m.gguf", tmp_path / "Modelfile")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(model, tmp_path, 'a"b.gguf')
    folder = tmp_path / "other"
    folder.mkdir()
    for path in model.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match=r"template of its own.*--no-template"):
        write(ModelDirectory.open(folder), tmp_path)
    assert not (tmp_path / "Modelfile").exists()


@pytest.mark.parametrize("character", ["\u200d", "\u00a0", "\u3000", "\x1b", "\r"])
def test_what_ollamas_parser_drops_is_refused(tmp_path, model, character):
    """It keeps printable characters only (strconv.IsPrint), also between quotes."""
    with pytest.raises(ConfigError, match=rf"U\+{ord(character):04X}"):
        write(model, tmp_path, system=f"a{character}b")
    assert write(model, tmp_path, system="a\tb 中文 é 🙂")
