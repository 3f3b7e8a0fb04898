"""The compiled engine against torch's float32: every family, every type of weights, every instruction set here.

And against itself: within a role (given text, written text) a token's numbers are the same bits whatever the batch,
the chunks, the number of threads and, for 8- and 4-bit weights, the instruction set.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise

from lexmill.formats.blocks import BLOCK_TYPES, decode, encode
from lexmill.inference.native.interface import Batch
from lexmill.inference.native.library import INSTRUCTION_SETS, available, instruction_set
from lexmill.inference.native.sources import Stored
from lexmill.inference.torch_backend import all_logits, hidden_rows
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.rope_scaling import RopeScaling

pytestmark = pytest.mark.skipif(not available(), reason="the engine is not built")
SMALL = dict(vocab_size=99, width=64, layers=3, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128)
CASES = {
    "llama": dict(SMALL, kv_heads=2),
    "llama, odd sizes": dict(SMALL, width=40, heads=5, kv_heads=1, head_width=8, mlp_width=50, tied=False),
    "llama, stretched": dict(SMALL, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "qwen2": dict(SMALL, kv_heads=1),
    "qwen3": dict(SMALL, head_width=24, tied=False),
    "bert": SMALL,
    "modernbert": dict(SMALL, layers=5, local_window=8, global_every=3),
    "t5": dict(SMALL, decoder_layers=2, relative_buckets=8, relative_distance=20),
    "t5, plain": dict(SMALL, decoder_layers=2, gated=False, activation="relu", scale_output=True),
}
HERE = sorted({instruction_set(name) for name in INSTRUCTION_SETS}) if available() else []


class Weights:
    """Random weights, stored in one type where their rows divide into its blocks."""

    def __init__(self, network, kind="F32"):
        self.config, self.files, self.packed = network.config, [], Path("nowhere")
        self._kind, self._weights = BLOCK_TYPES[kind], network.weights()

    def stored(self, own):
        weight = self._weights[own]
        kind = self._kind if weight.ndim == 2 and self._kind.fits(weight.shape) else BLOCK_TYPES["F32"]
        return Stored(kind, encode(weight, kind), weight.shape)

    def float32(self, own):
        return np.asarray(self._weights[own], np.float32)

    def rounded(self, own):
        """What is really stored."""
        stored = self.stored(own)
        return decode(stored.data, stored.type, stored.shape)


def _open(source, **options):
    from lexmill.inference.native.engine import NativeEngine

    options = {"threads": 2, **options}
    return NativeEngine.open(source, keep=False, **options)


def _model(name, **changes):
    family = name.partition(",")[0]
    values = {**FAMILIES[family], **FAMILY_DEFAULTS[family], **CASES[name], **changes}
    return randomise(build_model(ModelConfig(**values))).eval()


def _ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 99, count).astype(np.int32)


def _logits(engine, ids, *, prompt, cuts=(), memory=None, page=0):
    """Of each id, read in pieces."""
    pages = np.arange(page, page + 4, dtype=np.int32)[None]
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)]):
        count = end - start
        batch = Batch(
            tokens=ids[start:end],
            positions=np.arange(start, end),
            rows=np.zeros(count),
            tables=pages,
            wanted=np.arange(count),
            prompt=prompt,
            memory=None if memory is None else np.array([memory]),
        )
        found.append(engine.forward(batch))
    return np.concatenate(found)


def _close(found, expected, bound=5e-5):
    assert np.abs(found - expected).max() < bound * max(1, np.abs(expected).max())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    "name", [name for name in CASES if FAMILIES[name.partition(",")[0]]["shape"] == "decoder"]
)
def test_decoders(name, isa):
    network, ids = _model(name), _ids(70)
    engine = _open(Weights(network), instruction_set=isa)
    expected = all_logits(network, ids)
    for prompt in (True, False):
        _close(_logits(engine, ids, prompt=prompt, cuts=(33, 34)), expected)
    texts = [ids, ids[:5]]
    for found, text in zip(engine.hidden(texts), texts):
        _close(found, hidden_rows(network, [text])[0])


def test_a_long_text_is_read_in_pieces():
    network, ids = _model("llama", context=600), _ids(600)
    _close(_open(Weights(network)).hidden([ids])[0], hidden_rows(network, [ids])[0])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders(name, isa):
    network = _model(name)
    engine = _open(Weights(network), instruction_set=isa)
    texts = [_ids(count, count) for count in (1, 40, 70, 5, 128)]
    for found, text in zip(engine.hidden(texts), texts):
        _close(found, hidden_rows(network, [text])[0])
    if name == "bert":
        segments = np.repeat([0, 1], 35)
        with torch.inference_mode():
            expected = network.hidden(
                torch.tensor(texts[2])[None].long(), segments=torch.tensor(segments)[None]
            )[0]
        _close(engine.hidden([texts[2]], [segments])[0], expected.numpy())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", ["t5", "t5, plain"])
def test_encoder_decoders(name, isa):
    network = _model(name)
    engine = _open(Weights(network), instruction_set=isa)
    texts, written = [_ids(50, 1), _ids(9, 2)], _ids(40, 3)
    handles = engine.remember(texts)
    for text, handle in zip(texts, handles):
        expected = all_logits(network, text, written)
        for prompt in (True, False):
            # T5 does not scale its scores, so that a last bit there weighs more
            _close(_logits(engine, written, prompt=prompt, cuts=(1, 20), memory=handle), expected, 2e-4)
    for found, text in zip(engine.hidden(texts), texts):
        _close(found, hidden_rows(network, [text])[0])
    engine.forget(handles)


def _divergence(expected, found):
    """KL in nats, the mean over positions."""
    one, other = (torch.tensor(x).double().log_softmax(-1) for x in (expected, found))
    return float((one.exp() * (one - other)).sum(-1).mean())


# Weights keep their numbers: what is left is the rounding of what they are multiplied with, to 8 bits or bfloat16, and
# of keys and values to float16. These random networks are far more sensitive than trained ones. Q6_K has a scale for 16
# weights and is rounded anew, to 8 bits with one for 32: about what llama.cpp's rounding of 256 numbers at once costs.
BOUNDS = {"F16": 1e-5, "BF16": 2e-3, "Q6_K": 2e-2}  # else 1.5e-2


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
)
def test_types_of_weights(kind):
    network, ids = _model("llama", width=256, head_width=32, mlp_width=512), _ids(60)
    source = Weights(network, kind)
    rounded = {own: torch.tensor(source.rounded(own)) for own in network.weights()}
    network.load_state_dict({**network.state_dict(), **rounded}, strict=True)
    expected, alike = all_logits(network, ids), {}
    for isa in HERE:
        engine = _open(source, instruction_set=isa)
        for prompt in (True, False):
            found = _logits(engine, ids, prompt=prompt)
            assert _divergence(expected, found) < BOUNDS.get(kind, 1.5e-2)
            assert np.array_equal(found, _logits(engine, ids, prompt=prompt, cuts=(1, 2, 31, 32, 33)))
        alike[isa] = found
    if kind[0] == "Q":  # sums of whole numbers, then the same fused additions; "portable" has none of these
        fused = [found for isa, found in alike.items() if isa != "portable"]
        assert all(np.abs(found - fused[0]).max() < 1e-5 for found in fused)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_a_token_does_not_depend_on_its_company(kind):
    """Texts side by side, in any number of threads, get what each gets alone."""
    source = Weights(_model("llama", width=64, head_width=32), kind)
    texts = [_ids(count, count) for count in (30, 45, 3)]
    engine = _open(source)
    alone = [
        [_logits(engine, text, prompt=prompt, page=4 * row) for row, text in enumerate(texts)]
        for prompt in (True, False)
    ]
    tables = np.arange(12, dtype=np.int32).reshape(3, 4)
    for threads in (1, 2, 5):
        engine = _open(source, threads=threads)
        for prompt in (True, False):
            batch = Batch(
                tokens=np.concatenate(texts),
                positions=np.concatenate([np.arange(len(text)) for text in texts]),
                rows=np.repeat(np.arange(3), [len(text) for text in texts]),
                tables=tables,
                wanted=np.arange(sum(map(len, texts))),
                prompt=prompt,
            )
            assert np.array_equal(engine.forward(batch), np.concatenate(alone[1 - prompt]))
