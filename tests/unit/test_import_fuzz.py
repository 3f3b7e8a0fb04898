"""Hostile models: whatever a file says, an import ends in a model or in an error that a user understands, and leaves nothing.

Each case is a valid file of one family with one to three fields changed: missing, twice, of another type,
empty, negative, huge, cyclic, overlapping, cut off. `make test` runs CASES of each kind, `make test-slow` SLOW_CASES.
What was found on the way is kept in FOUND.
"""

import copy
import json
import math
import resource
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexmill.errors import LexmillError
from lexmill.formats.gguf import GGUFFile
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.model.names import weight_shapes
from lexmill.runtimes.import_model import import_model
from lexmill.runtimes.llama_cpp import export_gguf
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

CASES, SLOW_CASES = 60, 2000
SHAPE = dict(vocab_size=300, width=32, layers=1, heads=2, kv_heads=2, head_width=16, mlp_width=32, context=32)
KINDS = {
    "llama": ("bpe", {}),
    "qwen3": ("bpe", FAMILIES["qwen3"]),
    "bert": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}),
    "t5": ("unigram", {**FAMILIES["t5"], **FAMILY_DEFAULTS["t5"], "decoder_layers": 1, "tied": False}),
}
SCALARS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "B"}
SCALARS |= {"u64": "Q", "i64": "q", "f64": "d"}
CODES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8}
CODES |= {"array": 9, "u64": 10, "i64": 11, "f64": 12}


def quick(cases):
    return settings(
        max_examples=cases,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def valid(tmp_path_factory, prose):
    """A model directory of each family, and its GGUF file taken apart."""
    folder, made, tokenizers = tmp_path_factory.mktemp("valid"), {}, {}

    def get(name):
        if name not in made:
            kind, flags = KINDS[name]
            if kind not in tokenizers:
                options = {"unigram": {"sentinels": 4}, "wordpiece": {"lowercase": True}}.get(kind, {})
                config = TokenizerConfig(kind=kind, vocab_size=290, **options)
                tokenizers[kind] = train_tokenizer([prose[:20_000]], config)
            config = ModelConfig(**{**SHAPE, **flags})
            rng = np.random.default_rng(0)
            weights = {
                own: rng.standard_normal(shape, np.float32) for own, shape in weight_shapes(config).items()
            }
            model = write_model_directory(folder / name, config, weights, tokenizers[kind])
            path = export_gguf(model, folder / f"{name}.gguf", "f16")
            with GGUFFile.open(path) as file:
                keys = [
                    [key, file.types[key], value.tolist() if isinstance(value, np.ndarray) else value]
                    for key, value in file.metadata.items()
                ]
                tensors = [
                    {
                        "name": info.name,
                        "sizes": list(reversed(info.shape)),
                        "type": info.type.id,
                        "shift": 0,
                        "data": file.raw(info.name).tobytes(),
                    }
                    for info in file.tensors.values()
                ]
            made[name] = (model.path, {"keys": keys, "tensors": tensors, "counts": [0, 0], "version": 3})
        return made[name]

    return get


def text_bytes(text):
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def scalar_bytes(type, value):
    if type == "string":
        return text_bytes(value)
    return struct.pack("<" + SCALARS[type], value)


def file_bytes(parts):
    """The bytes of a file, whatever is in its parts: the test's own writer, which checks nothing."""
    keys, tensors = parts["keys"], parts["tensors"]
    more_tensors, more_keys = parts["counts"]
    head = b"GGUF" + struct.pack("<Iqq", parts["version"], len(tensors) + more_tensors, len(keys) + more_keys)
    for key, type, value in keys:
        head += text_bytes(key)
        if type.startswith("array of "):
            item = type.removeprefix("array of ")
            length = value[0] if isinstance(value, tuple) else len(value)
            items = value[1] if isinstance(value, tuple) else value
            head += struct.pack("<IIQ", 9, CODES[item], length)
            head += b"".join(scalar_bytes(item, one) for one in items)
        else:
            head += struct.pack("<I", CODES[type]) + scalar_bytes(type, value)
    offset = 0
    for tensor in tensors:
        head += text_bytes(tensor["name"]) + struct.pack("<I", len(tensor["sizes"]))
        head += struct.pack(f"<{len(tensor['sizes'])}q", *tensor["sizes"])
        head += struct.pack("<iq", tensor["type"], offset + tensor["shift"])
        offset += len(tensor["data"]) + -len(tensor["data"]) % 32
    head += bytes(-len(head) % 32)
    for tensor in tensors:
        head += tensor["data"] + bytes(-len(tensor["data"]) % 32)
    return head


NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 31, 32, 33, 300, 2**16, 2**31 - 1])
REALS = st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-45, 3e38])
WORDS = st.sampled_from(
    ["", "a", "llama", "gpt2", "t5", "bert", "default", "\x00", "▁", "##", "<s>", "é" * 40]
)
VALUES = st.one_of(
    st.tuples(st.just("u32"), NUMBERS),
    st.tuples(st.just("i32"), st.sampled_from([-1, -(2**31), 7])),
    st.tuples(st.just("u64"), st.sampled_from([0, 2**32, 2**64 - 1])),
    st.tuples(st.just("i64"), st.sampled_from([-(2**63), -1, 2**62])),
    st.tuples(st.just("f32"), REALS),
    st.tuples(st.just("bool"), st.integers(0, 1)),
    st.tuples(st.just("string"), WORDS),
    st.tuples(st.just("array of u32"), st.lists(NUMBERS, max_size=3)),
    st.tuples(st.just("array of string"), st.lists(WORDS, max_size=3)),
    st.tuples(st.just("array of f32"), st.lists(REALS, max_size=3)),
    st.tuples(st.just("array of bool"), st.lists(st.integers(0, 1), max_size=3)),
    st.tuples(st.just("array of u8"), st.tuples(st.sampled_from([2**40, 2**63, 2**64 - 1]), st.just([1, 2]))),
)
INSIDE = {
    "string": st.one_of(WORDS, st.text(max_size=4), st.just(b"\xff\xfe")),
    "f32": REALS,
    "i32": st.sampled_from([-1, 0, 2, 3, 4, 5, 6, 7, 2**31 - 1]),
    "u8": st.integers(0, 255),
}


def change_key(parts, draw):
    keys = parts["keys"]
    at = draw(st.integers(0, len(keys) - 1))
    key, type, value = keys[at]
    way = draw(st.sampled_from(["drop", "twice", "replace", "replace", "inside", "inside", "length", "new"]))
    if way == "drop":
        del keys[at]
    elif way == "twice":
        keys.append([key, *draw(VALUES)])
    elif way == "new":
        prefix = draw(st.sampled_from(["llama.", "bert.", "t5.", "tokenizer.ggml.", "general."]))
        keys.append(
            [prefix + draw(st.sampled_from(["rope.scaling.type", "x", "scores", "merges"])), *draw(VALUES)]
        )
    elif way in ("inside", "length") and type.startswith("array of ") and isinstance(value, list) and value:
        item, value = type.removeprefix("array of "), list(value)
        place = draw(st.integers(0, len(value) - 1))
        if way == "length":
            value = value[:place] if draw(st.booleans()) else value + value[:place]
        elif draw(st.booleans()) or item not in INSIDE:
            value[place] = value[draw(st.integers(0, len(value) - 1))]
        else:
            value[place] = draw(INSIDE[item])
        keys[at] = [key, type, value]
    else:
        keys[at] = [key, *draw(VALUES)]


def change_tensor(parts, draw):
    tensors = parts["tensors"]
    at = draw(st.integers(0, len(tensors) - 1))
    tensor = tensors[at]
    way = draw(st.sampled_from(["drop", "name", "sizes", "axis", "type", "shift", "data", "swap", "new"]))
    if way == "drop":
        del tensors[at]
    elif way == "name":
        tensor["name"] = draw(st.one_of(st.just(tensors[0]["name"]), WORDS, st.just("x" * 64)))
    elif way == "sizes":
        tensor["sizes"] = draw(st.lists(st.sampled_from([-1, 0, 1, 32, 2**31, 2**62, 2**63 - 1]), max_size=5))
    elif way == "axis" and len(tensor["sizes"]) > 1:
        tensor["sizes"].reverse()
    elif way == "type":
        tensor["type"] = draw(st.integers(-1, 45))
    elif way == "shift":
        tensor["shift"] = draw(st.sampled_from([-32, 32, 1, -(2**62), 2**62]))
    elif way == "data":
        kind = draw(st.sampled_from([b"\xff", b"\x00\x7c", b""]))
        tensor["data"] = (kind * len(tensor["data"]))[: len(tensor["data"])]
    elif way == "swap":
        tensors[at], tensors[0] = tensors[0], tensors[at]
    else:
        tensors.append(
            {**tensor, "name": draw(st.sampled_from(["output.weight", "rope_freqs.weight", "cls.weight"]))}
        )


def change_start(parts, draw):
    if draw(st.booleans()):
        parts["counts"][draw(st.integers(0, 1))] = draw(st.sampled_from([-1, 1, 2**31, 2**62]))
    else:
        parts["version"] = draw(st.sampled_from([0, 1, 2, 4, 2**24, 3 << 24]))


def change_bytes(data, draw):
    at = draw(st.integers(0, len(data) - 1))
    way = draw(st.sampled_from(["none", "none", "none", "none", "cut", "number", "byte"]))
    if way == "cut":
        return data[:at]
    if way == "number":
        number = draw(st.sampled_from([0, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        return data[:at] + struct.pack("<Q", number) + data[at + 8 :]
    if way == "byte":
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return data


def check(source, out):
    """A model, or an error; never anything else, never half a model, never much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        import_model(source, out)
    except LexmillError as error:
        assert error.message and not out.exists()
        assert not [path for path in out.parent.iterdir() if path.name.endswith(".partial")]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "more than 300 MB"


def one_gguf(valid, tmp_path, name, data):
    draw = data.draw
    parts = copy.deepcopy(valid(name)[1])
    for _ in range(draw(st.integers(0, 2))):
        draw(st.sampled_from([change_key, change_key, change_tensor, change_start]))(parts, draw)
        if not parts["keys"] or not parts["tensors"]:
            break
    path = tmp_path / "hostile.gguf"
    path.write_bytes(change_bytes(file_bytes(parts), draw))
    check(path, tmp_path / "out")


@pytest.mark.parametrize("name", KINDS)
def test_the_fuzz_starts_from_good_files(valid, tmp_path, name):
    path = tmp_path / "good.gguf"
    path.write_bytes(file_bytes(valid(name)[1]))
    model = import_model(path, tmp_path / "out")
    assert model.config.family == name


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@quick(CASES)
def test_gguf(valid, tmp_path, name, data):
    one_gguf(valid, tmp_path, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@quick(SLOW_CASES)
def test_gguf_long(valid, tmp_path, name, data):
    one_gguf(valid, tmp_path, name, data)


# Directories: JSON files changed anywhere inside, and the header of the weights.

JUNK = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1,
        2**40,
        2**63,
        1e308,
        math.nan,
        "",
        "x",
        "[UNK]",
        [],
        [[]],
        [1],
        {},
        {"type": "BPE"},
        {"a": {}},
    ]
)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "modules.json")


def change_json(value, draw, depth=0):
    """One place inside a JSON value, chosen anew at each level, becomes something else."""
    if isinstance(value, (dict, list)) and value and (depth == 0 or draw(st.integers(0, 3))):
        if isinstance(value, dict):
            keys = list(value)[:12] + list(value)[-4:]
        else:
            keys = sorted({0, len(value) // 2, len(value) - 1})
        key = draw(st.sampled_from(keys))
        way = draw(st.sampled_from(["go", "go", "go", "drop", "copy"]))
        changed = dict(value) if isinstance(value, dict) else list(value)
        if way == "drop":
            del changed[key]
        elif way == "copy":
            changed[key] = value  # what holds it, once more inside
        else:
            changed[key] = change_json(value[key], draw, depth + 1)
        return changed
    return draw(JUNK)


def change_weights(path, draw):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if draw(st.booleans()):
        header = change_json(json.loads(data[8 : 8 + length]), draw)
        text = json.dumps(header).encode()
        if draw(st.booleans()):
            text = text[:-1] + b"," + text[1:]  # every name twice
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    else:
        claimed = draw(st.sampled_from([0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1]))
        path.write_bytes(struct.pack("<Q", claimed) + data[8:])


def one_directory(valid, tmp_path, name, data):
    draw = data.draw
    folder = tmp_path / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid(name)[0], folder)
    target = draw(st.sampled_from([*FILES, "weights"]))
    if target == "weights":
        change_weights(folder / "model.safetensors", draw)
    elif (folder / target).is_file():
        value = change_json(json.loads((folder / target).read_text("utf-8")), draw)
        (folder / target).write_text(json.dumps(value), "utf-8")
    check(folder, tmp_path / "out")


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@quick(CASES)
def test_directory(valid, tmp_path, name, data):
    one_directory(valid, tmp_path, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@quick(SLOW_CASES)
def test_directory_long(valid, tmp_path, name, data):
    one_directory(valid, tmp_path, name, data)


# What was found by the cases above, and once by reading; each was a hang or a traceback.


def edited(name, change):
    def make(valid, folder):
        parts = copy.deepcopy(valid(name)[1])
        change(parts)
        path = folder / "found.gguf"
        path.write_bytes(file_bytes(parts))
        return path

    return make


def with_key(key, type, value):
    def change(parts):
        parts["keys"] = [row for row in parts["keys"] if row[0] != key] + [[key, type, value]]

    return change


def no_axes(parts):
    parts["tensors"][0] |= {"sizes": [], "type": 8}


def with_json(file, **values):
    def make(valid, folder):
        shutil.copytree(valid("llama")[0], folder / "found")
        path = folder / "found" / file
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
        return folder / "found"

    return make


FOUND = {
    "a list as the architecture": edited("llama", with_key("general.architecture", "array of u32", [1, 2])),
    "an empty list as the name": edited("llama", with_key("general.name", "array of u32", [])),
    "a list as the type": edited("llama", with_key("general.type", "array of u32", [1, 2])),
    "merges that are numbers": edited("llama", with_key("tokenizer.ggml.merges", "array of u32", [1, 2])),
    "2^31 layers": edited("llama", with_key("llama.block_count", "u32", 2**31 - 1)),
    "2^31 layers in the decoder": edited("t5", with_key("t5.decoder_block_count", "u32", 2**31 - 1)),
    "an empty list as the activation": edited("bert", with_key("lexmill.activation", "array of u32", [])),
    "a charsmap that is a number": edited("t5", with_key("tokenizer.ggml.precompiled_charsmap", "u32", 0)),
    "blocks in a tensor without axes": edited("llama", no_axes),
    "2^40 layers in config.json": with_json("config.json", num_hidden_layers=2**40),
    "an object among the ids that end a text": with_json("config.json", eos_token_id=[{}]),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(valid, tmp_path, case):
    source = FOUND[case](valid, tmp_path)
    if case.endswith(
        ("architecture", "the type", "numbers", "layers", "decoder", "axes", "config.json", "a text")
    ):
        with pytest.raises(LexmillError):
            import_model(source, tmp_path / "out")
    check(source, tmp_path / "out")
