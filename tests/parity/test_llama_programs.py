"""llama.cpp's own programs: its server instead of the wheel, and importance matrices in both directions.

LEXMILL_LLAMA_BIN is a folder with llama-server, llama-quantize and llama-imatrix, built from llama.cpp's source.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import lexmill
from made_models import model_maker
from test_runtimes_agree import hide

from lexmill.errors import FileError
from lexmill.evaluate.importance import collect_importance
from lexmill.formats.gguf import GGUFFile
from lexmill.formats.imatrix import read_imatrix, write_imatrix
from lexmill.inference.language_model import load
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS
from lexmill.runtimes.llama_cpp import LlamaCpp, RuntimeFailure, export_gguf
from lexmill.runtimes.verify import verify

FOLDER = os.environ.get("LEXMILL_LLAMA_BIN", "")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="LEXMILL_LLAMA_BIN names no folder with llama.cpp's own programs"
)
SHAPE = dict(
    vocab_size=520, width=256, layers=8, heads=4, kv_heads=4, head_width=64, mlp_width=512, context=128
)
KINDS = {
    "llama": ("bpe", {"kv_heads": 2}),
    "untied": ("bpe", {"tied": False}),
    "qwen3": ("bpe", {**FAMILIES["qwen3"]}),
    "bert": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}),
    "modernbert": (
        "wordpiece",
        {**FAMILIES["modernbert"], **FAMILY_DEFAULTS["modernbert"], "local_window": 8},
    ),
    "t5": ("unigram", {**FAMILIES["t5"], **FAMILY_DEFAULTS["t5"], "decoder_layers": 8, "tied": False}),
}


def program(name):
    return Path(FOLDER) / name


def run(name, *arguments):
    done = subprocess.run(
        [program(name), *map(str, arguments)], capture_output=True, text=True, errors="replace", timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("models"), prose, SHAPE, KINDS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "modernbert"])
def test_verify_by_a_server_of_ones_own(tmp_path, models, name, monkeypatch):
    """Given, and found on the path where the wheel is missing; every check is made and passes."""
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "16")  # nothing of the user's own may reach it
    model = models(name)
    file = export_gguf(model, tmp_path / "m.gguf", "f32")
    given = verify(model.path, [file], tokens=8, llama_server=program("llama-server"))
    assert given.exit_code == 0, given.table_rows()
    assert "llama-server" in given.environment
    hide(monkeypatch, "xllamacpp", "transformers")
    monkeypatch.setenv("PATH", FOLDER)
    found = verify(model.path, [file], tokens=8)
    assert [check.check for check in found.checks if check.runtime == "llama.cpp f32" and check.passed] == [
        check.check for check in given.checks if check.runtime == "llama.cpp f32"
    ]


def test_the_command_takes_a_server(tmp_path, models):
    model = models("llama")
    file = export_gguf(model, tmp_path / "m.gguf", "f32")
    options = ["--gguf", file, "--tokens", 4, "--quiet", "--llama-server"]
    done = lexmill("verify", model.path, *options, program("llama-server"))
    assert done.returncode == 0, done.stdout + done.stderr
    done = lexmill("verify", model.path, *options, tmp_path / "none")
    assert done.returncode == 2 and "no program" in done.stderr


def test_what_a_server_cannot_load_is_said(tmp_path, models):
    file = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(RuntimeFailure, match=r"does not load this file.*ended with code"):
        LlamaCpp(file, server=program("llama-server")).__enter__()
    with pytest.raises(FileError, match="no program"):
        LlamaCpp(file, server=tmp_path / "m.gguf")
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\nexit 3\n")
    stub.chmod(0o755)
    with pytest.raises(RuntimeFailure, match="ended with code 3"):
        LlamaCpp(file, server=stub).__enter__()


def servers(file):
    """Running servers that have a file loaded."""
    found = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    return [
        line for line in found.splitlines() if str(file) in line and line.split()[0].endswith("llama-server")
    ]


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps to look for processes with")
def test_no_server_outlives_us(tmp_path, models):
    file = export_gguf(models("llama"), tmp_path / "m.gguf", "f32")
    with LlamaCpp(file, server=program("llama-server")):
        assert servers(file)
    assert not servers(file)
    code = "import sys, time; from lexmill.runtimes.llama_cpp import LlamaCpp\n"
    code += "with LlamaCpp(sys.argv[1], server=sys.argv[2]): print('up', flush=True); time.sleep(60)"
    asked = [sys.executable, "-c", code, file, program("llama-server")]
    with subprocess.Popen(asked, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"up\n" and servers(file)
        child.kill()
    deadline = time.monotonic() + 10
    while servers(file) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not servers(file)


def read_types(path):
    with GGUFFile.open(path) as file:
        return {name: info.type.name for name, info in file.tensors.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory, prose):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose[:12_000], "utf-8")
    return path


@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.parametrize("name", ["llama", "untied", "qwen3"])
def test_llama_quantize_takes_our_matrices(tmp_path, models, text, name, form):
    """Both forms; and it then chooses the types that we choose."""
    model = models(name)
    matrix = collect_importance(load(model.path), text.read_text(), chunk_size=128, chunks=4, dataset="prose")
    write_imatrix(tmp_path / f"imatrix.{form}", matrix)
    file = export_gguf(model, tmp_path / "f32.gguf", "f32")
    for mix in ("q4_0", "q4_k_m"):
        said = run(
            "llama-quantize",
            "--imatrix",
            tmp_path / f"imatrix.{form}",
            file,
            tmp_path / "theirs.gguf",
            mix,
            1,
        )
        assert f"have importance matrix data with {len(matrix.entries)} entries" in said, said
        # llama-imatrix collects nothing for an embedding either
        assert set(re.findall(r"did not find weights for (\S+)", said)) <= {"token_embd.weight"}
        ours = export_gguf(model, tmp_path / "ours.gguf", mix, importance=tmp_path / f"imatrix.{form}")
        assert read_types(tmp_path / "theirs.gguf") == read_types(ours)
        plain = tmp_path / "plain.gguf"
        run("llama-quantize", file, plain, mix, 1)
        with GGUFFile.open(plain) as without, GGUFFile.open(tmp_path / "theirs.gguf") as found:
            assert found.metadata["quantize.imatrix.entries_count"] == len(matrix.entries)
            name_of = "blk.3.ffn_down.weight"
            assert not np.array_equal(without.raw(name_of), found.raw(name_of))


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_we_take_the_matrices_of_llama_imatrix(tmp_path, models, text, form):
    """And what it collects is what we collect: the same chunks, the same sums."""
    model = models("untied")
    file = export_gguf(model, tmp_path / "f32.gguf", "f32")
    out = tmp_path / f"theirs.{form}"
    options = ["-c", 128, "--chunks", 4, "-t", 1, "-fa", "off", "-ngl", 0, "--output-format", form]
    run("llama-imatrix", "-m", file, "-f", text, "-o", out, "--process-output", *options)
    found = read_imatrix(out)
    own = collect_importance(load(model.path), text.read_text(), chunk_size=128, chunks=4)
    assert found.chunks == 4 and found.entries.keys() == own.entries.keys()
    for name, entry in own.entries.items():
        columns = entry.sums.shape[-1]
        np.testing.assert_allclose(
            found.importance(name, columns), own.importance(name, columns), rtol=2e-2, err_msg=name
        )
    ours = export_gguf(model, tmp_path / "ours.gguf", "q4_k_m", importance=out)
    with GGUFFile.open(ours) as quantised:
        assert quantised.metadata["quantize.imatrix.entries_count"] == len(own.entries)


@pytest.mark.parametrize("name", KINDS)
def test_llama_quantize_chooses_our_types(tmp_path, models, name):
    model = models(name)
    file = export_gguf(model, tmp_path / "f32.gguf", "f32")
    for mix in ("q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s"):
        run("llama-quantize", file, tmp_path / "theirs.gguf", mix, 1)
        assert read_types(tmp_path / "theirs.gguf") == read_types(
            export_gguf(model, tmp_path / "ours.gguf", mix)
        ), mix
