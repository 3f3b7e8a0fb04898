"""The compiled choice of the next token against what NumPy says is meant."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lexmill.errors import ModelError
from lexmill.inference.native.choosing import CHOOSE
from lexmill.inference.sampling import SamplingConfig, choose, choose_in_numpy, distribution, penalise

built = pytest.mark.skipif(CHOOSE is None, reason="the engine is not built here")
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
        "top_k": st.integers(0, 40),
        "top_p": st.sampled_from([0.05, 0.3, 0.8, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -0.2]),
    },
)


def masked(bits):
    return np.packbits(np.pad(bits, (0, -len(bits) % 32)), bitorder="little").view("<u4").astype(np.uint32)


@built
@settings(max_examples=300, deadline=None)
@given(
    options=OPTIONS,
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 90),
    uniform=st.floats(0, 1, exclude_max=True),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    rounded=st.booleans(),
    mask=st.booleans(),
    best=st.integers(0, 8),
)
def test_both_choose_the_same(options, seed, size, uniform, spread, rounded, mask, best):
    random = np.random.default_rng(seed)
    logits = (spread * random.standard_normal(size)).astype(np.float32)
    if rounded:  # many equal ones
        logits = np.round(logits)
    logits[random.random(size) < 0.1] = -np.inf
    seen = random.integers(0, size, random.integers(0, 20)).tolist()
    prompt = int(random.integers(0, len(seen) + 1))
    allowed = masked(random.random(size) < 0.5) if mask else None
    config = SamplingConfig(**options)
    asked = (logits, seen, prompt, config, uniform, allowed, best)
    expected, found = choose_in_numpy(*asked), CHOOSE(*asked)
    if expected.token >= 0 and config.temperature:
        bits = np.unpackbits(allowed.view(np.uint8), count=size, bitorder="little") if mask else np.ones(size)
        changed = np.where(bits, penalise(logits, seen, prompt, config), -np.inf)
        ends = np.cumsum(distribution(changed, config))
        assume(np.abs(ends - uniform).min() > 1e-9)  # a draw on the border of two tokens
        ranked = -np.sort(-distribution(changed, replace(config, top_p=1.0, min_p=0.0)))
        assume(np.abs(np.cumsum(ranked) - config.top_p).min() > 1e-9 or config.top_p == 1)  # likewise
        assume(np.abs(ranked - config.min_p * ranked[0]).min() > 1e-12 or not config.min_p)
    assert found.token == expected.token
    if expected.token >= 0:
        assert [one for one, _ in found.best] == [one for one, _ in expected.best]
        assert [value for _, value in found.best] == pytest.approx(
            [value for _, value in expected.best], abs=1e-9
        )
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-9) or not best


@pytest.mark.parametrize("call", [choose_in_numpy, pytest.param(CHOOSE, marks=built)])
def test_what_cannot_be_chosen_is_said(call):
    config, logits = SamplingConfig(), np.zeros(40, np.float32)
    assert call(logits, [], 0, config, 0.0, np.zeros(2, np.uint32), 0).token == -1
    for wrong in (np.nan, np.inf):
        broken = logits.copy()
        broken[17] = wrong
        assert call(broken, [], 0, config, 0.0, None, 0).token == -2
        assert call(broken, [], 0, SamplingConfig(temperature=1.0), 0.5, None, 3).token == -2
    assert call(np.full(3, -np.inf, np.float32), [], 0, config, 0.0, None, 0).token == -2


def test_a_mask_holds_whatever_the_logits_say():
    random, logits = np.random.default_rng(0), np.arange(70, dtype=np.float32)
    allowed = masked(np.arange(70) == 3)
    for temperature in (0.0, 1.0):
        config = SamplingConfig(temperature=temperature)
        assert choose(logits, [], config, random, allowed=allowed).token == 3
    with pytest.raises(ValueError, match="allowed"):
        choose(logits, [], SamplingConfig(), random, allowed=np.zeros(3, np.uint32))
    with pytest.raises(ModelError, match="no numbers"):
        choose(logits * np.nan, [], SamplingConfig(), random)


@built
def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=0.8, top_k=6, top_p=0.9, min_p=0.05)
    logits = np.random.default_rng(3).standard_normal(50).astype(np.float32)
    places = (np.arange(5000) + 0.5) / 5000
    draws = [CHOOSE(logits, [], 0, config, place, None, 0).token for place in places]
    assert np.bincount(draws, minlength=50) / 5000 == pytest.approx(distribution(logits, config), abs=1e-3)
