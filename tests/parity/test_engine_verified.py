"""`verify` with lexmill's own engine as one more runtime: it passes where it should, and sees a wrong weight."""

import numpy as np
import pytest

from lexmill.inference.language_model import load
from lexmill.inference.native.library import available
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.runtimes.llama_cpp import export_gguf
from lexmill.runtimes.verify import DEFAULT_PROMPTS, _asked_of_file, _Held, _Own
from lexmill.runtimes.verify_engine import compare_engine, open_engine, reference_of_directory

pytestmark = pytest.mark.skipif(not available(), reason="the engine is not built here")


@pytest.fixture(scope="module")
def own(model_path):
    directory = ModelDirectory.open(model_path)
    return _Own(load(model_path, backend="torch"), directory, DEFAULT_PROMPTS[:1], 12)


def stored_as(own, folder, dtype, weights=None):
    directory = own.directory
    weights = directory.weights() if weights is None else weights
    return write_model_directory(
        folder, directory.config, weights, directory.tokenizer, dtypes=dict.fromkeys(weights, dtype)
    )


def checks(own, path, reference, tolerance):
    with open_engine(path) as runtime:
        return list(compare_engine("engine", runtime, reference, tolerance))


@pytest.mark.parametrize("dtype", ["F32", pytest.param("BF16", marks=pytest.mark.slow), "F16"])
def test_model_directories_agree(own, tmp_path, dtype):
    directory = stored_as(own, tmp_path / "model", dtype)
    reference, tolerance = reference_of_directory(own.reference, directory)
    assert tolerance.kind == ("max" if dtype == "F32" else "KL")
    found = checks(own, directory.path, reference, tolerance)
    assert [check.check for check in found] == ["prompt logits", "logits", "greedy"]
    assert all(check.passed for check in found), found


@pytest.mark.parametrize(
    "type",
    [pytest.param("f32", marks=pytest.mark.slow), "q8_0", pytest.param("q4_0", marks=pytest.mark.slow)],
)
def test_files_agree(own, tmp_path, type):
    from lexmill.formats.gguf import GGUFFile

    path = export_gguf(own.directory, tmp_path / "model.gguf", type)
    with GGUFFile.open(path) as file:
        held = None if type == "f32" else _Held.read(file, own.directory)
        asked = _asked_of_file(own, path, held, type)[2]
    with open_engine(path) as runtime:
        found = list(asked("engine", runtime))
    assert all(check.passed for check in found), found


def test_a_wrong_weight_is_seen(own, tmp_path):
    weights = own.directory.weights()
    own_name = "decoder.blocks.1.mlp.down.weight"
    changed = {**weights, own_name: weights[own_name] + np.float32(0.02)}
    directory = stored_as(own, tmp_path / "model", "F32", changed)
    reference, tolerance = reference_of_directory(own.reference, own.directory)
    found = checks(own, directory.path, reference, tolerance)
    assert not found[0].passed
