"""Continuous batching: no schedule changes what is written. Random ones, with pages running out on the way."""

import threading

import numpy as np
import pytest
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_engine import SlowEngine

from lexmill.errors import ModelError
from lexmill.inference.generation import GenerationConfig, Writing
from lexmill.inference.native.interface import BLOCK, CHUNK, Batch
from lexmill.inference.native.scheduler import Limits, Scheduler
from lexmill.inference.native.speculation import DraftModel, PromptLookup
from lexmill.inference.sampling import SamplingConfig
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, ModelConfig

VOCABULARY, CONTEXT = 512, 400
SHAPE = {
    "vocab_size": VOCABULARY,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "mlp_width": 48,
    "context": CONTEXT,
}


@pytest.fixture(scope="module")
def network():
    return randomise(build_model(ModelConfig(**SHAPE)), deviation=0.3).eval()


@pytest.fixture(scope="module")
def writer():
    shape = {**SHAPE, **FAMILIES["t5"], "kv_heads": 4, "decoder_layers": 2, "decoder_start": 3}
    return randomise(build_model(ModelConfig(**shape)), deviation=0.3).eval()


@pytest.fixture(scope="module")
def small():
    return randomise(build_model(ModelConfig(**{**SHAPE, "layers": 1})), deviation=0.3).eval()


def alone(network, tokenizer, prompt, config, context=CONTEXT, source=None):
    """What is written without any schedule: the prompt as one given text, then token by token."""
    engine = SlowEngine(network, 64)
    writing, done = Writing(tokenizer, prompt, config, context), 0
    memory = None if source is None else np.array(engine.remember([source]), np.int32)
    while not writing.ended:
        end = len(writing.ids)
        for start in range(done, end, CHUNK):
            stop = min(start + CHUNK, end)
            batch = Batch(
                tokens=np.array(writing.ids[start:stop], np.int32),
                positions=np.arange(start, stop, dtype=np.int32),
                rows=np.zeros(stop - start, np.int32),
                tables=np.arange(64, dtype=np.int32)[None],
                wanted=np.array([stop - start - 1], np.int32),
                prompt=done == 0,
                memory=memory,
            )
            logits = engine.forward(batch)[0]
        done = end
        writing.take(logits)
    return writing.ids[len(prompt) :]


def ids_of(text):
    return [step.token for step in text if step.token is not None]


@st.composite
def prompts(draw):
    """Some begin alike, some repeat themselves."""
    begin = draw(st.sampled_from([[], [9] * 40, list(range(100, 200)), list(range(100, 165))]))
    run = draw(st.lists(st.integers(5, 300), min_size=1, max_size=6))
    return begin + run * draw(st.integers(1, 20))


REQUEST = st.tuples(
    prompts(),
    st.integers(0, 60),  # tokens
    st.sampled_from([0.0, 0.0, 0.8]),
    st.integers(0, 12),  # steps before it comes
    st.sampled_from([None, None, None, 0, 3, 20]),  # tokens after which it is cancelled
)


@settings(max_examples=20, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=6),
    pages=st.integers(CONTEXT // BLOCK + 1, 40),
    rows=st.integers(1, 8),
    drafter=st.sampled_from(["none", "lookup", "model"]),
)
def test_no_schedule_changes_what_is_written(network, small, tokenizer, requests, pages, rows, drafter):
    engine = SlowEngine(network, pages)
    draft = DraftModel(SlowEngine(small, 20))
    makers = {"none": None, "lookup": PromptLookup, "model": draft.of_text}
    scheduler = Scheduler(engine, Limits(rows=rows), drafter=makers[drafter])
    coming = sorted(enumerate(requests), key=lambda one: one[1][3])
    found, going, step = {}, {}, 0
    while coming or going:
        while coming and coming[0][1][3] <= step:
            number, (prompt, most, temperature, _, cancel) = coming.pop(0)
            config = GenerationConfig(
                max_tokens=most, sampling=SamplingConfig(temperature=temperature, seed=number)
            )
            going[number] = (scheduler.submit(tokenizer, prompt, config), cancel)
            found[number] = []
        for number, (text, cancel) in list(going.items()):
            if cancel is not None and len(found[number]) >= cancel:
                text.cancel()
                del going[number]
                continue
            following = next(text, None)
            if following is None:
                del going[number]
            elif following.token is not None:
                found[number].append(following.token)
        step += 1
    for number, (prompt, most, temperature, _, cancel) in enumerate(requests):
        config = GenerationConfig(
            max_tokens=most, sampling=SamplingConfig(temperature=temperature, seed=number)
        )
        expected = alone(network, tokenizer, prompt, config)
        assert found[number] == (expected if cancel is None else expected[: len(found[number])])
    scheduler.close()
    assert scheduler.store.available == pages  # none is lost
    assert draft.store.available == 20


def test_pages_run_out_and_all_is_written_all_the_same(network, tokenizer):
    engine = SlowEngine(network, CONTEXT // BLOCK + 1)
    scheduler = Scheduler(engine)
    config = GenerationConfig(max_tokens=120)
    asked = [list(range(10 * number + 5, 10 * number + 65)) for number in range(5)]
    texts = [scheduler.submit(tokenizer, prompt, config) for prompt in asked]
    found = [ids_of(text) for text in texts]
    assert found == [alone(network, tokenizer, prompt, config) for prompt in asked]
    computed = sum(tokens for tokens, _, _ in engine.batches)
    assert computed > sum(map(len, asked)) + sum(map(len, found))  # some of it twice


def test_encoder_decoders_write_from_what_they_read(writer, tokenizer):
    engine = SlowEngine(writer, 24)
    scheduler = Scheduler(engine)
    config = GenerationConfig(max_tokens=40)
    sources = [[7, 8, 9], list(range(30, 80)), [7, 8, 9, 10]]
    texts = [scheduler.submit(tokenizer, [3], config, source=source) for source in sources]
    found = [ids_of(text) for text in texts]
    assert found == [alone(writer, tokenizer, [3], config, source=source) for source in sources]
    assert len({tuple(one) for one in found}) > 1
    assert not engine.read  # all is forgotten


def test_a_known_beginning_is_not_computed_again(network, tokenizer):
    engine = SlowEngine(network)
    scheduler = Scheduler(engine)
    config, prompt = GenerationConfig(max_tokens=3), list(range(10, 110))
    first = ids_of(scheduler.submit(tokenizer, prompt, config))
    engine.batches.clear()
    assert ids_of(scheduler.submit(tokenizer, prompt, config)) == first
    assert engine.batches[0][0] == 100 % BLOCK
    # two that come together read one beginning between them
    engine.batches.clear()
    texts = [scheduler.submit(tokenizer, [*range(400, 500), *range(280), last], config) for last in (1, 2)]
    for text in texts:
        ids_of(text)
    assert sum(tokens for tokens, _, prompt in engine.batches if prompt) < 1.5 * 381


def test_what_was_written_is_computed_anew_when_it_is_given(network, tokenizer):
    scheduler = Scheduler(SlowEngine(network))
    config = GenerationConfig(max_tokens=70)
    for first in range(20, 100):  # one that does not end before it fills whole pages
        prompt = list(range(first, first + 40))
        prompt += ids_of(scheduler.submit(tokenizer, prompt, config))
        if len(prompt) > 2 * BLOCK + 8:
            break
    assert len(prompt) > 2 * BLOCK + 8
    prompt += [7, 8]
    assert ids_of(scheduler.submit(tokenizer, prompt, config)) == alone(network, tokenizer, prompt, config)


def test_a_long_prompt_does_not_hold_up_those_who_write(network, tokenizer):
    engine = SlowEngine(network, 80)
    scheduler = Scheduler(engine, drafter=None)
    one = scheduler.submit(tokenizer, [5, 6], GenerationConfig(max_tokens=50))
    next(one)
    long = scheduler.submit(tokenizer, [1] * 390, GenerationConfig(max_tokens=2))
    before = len(engine.batches)
    for _ in range(4):
        next(one)
    kinds = [prompt for _, _, prompt in engine.batches[before:]]
    assert kinds.count(False) >= 3 and max(tokens for tokens, _, _ in engine.batches) <= CHUNK
    assert ids_of(long) == alone(network, tokenizer, [1] * 390, GenerationConfig(max_tokens=2))


def test_guesses_save_steps_where_a_text_repeats_itself(network, tokenizer):
    prompt, config = [40, 41, 42, 43] * 8, GenerationConfig(max_tokens=150)
    steps = {}
    for drafter in (None, PromptLookup):
        engine = SlowEngine(network)
        scheduler = Scheduler(engine, drafter=drafter)
        scheduler.pace.measured = lambda tokens, seconds: None  # this engine's seconds say nothing
        written = ids_of(scheduler.submit(tokenizer, prompt, config))
        assert written == alone(network, tokenizer, prompt, config)
        steps[drafter] = len(engine.batches) / max(len(written), 1)
    assert len(set(written)) < len(written) / 2, "the test's text does not repeat itself"
    assert steps[PromptLookup] < 0.8 * steps[None]


def test_many_threads_get_what_each_alone_would(network, tokenizer):
    scheduler = Scheduler(SlowEngine(network, 40))
    asked = [list(range(20 * number + 5, 20 * number + 45)) for number in range(12)]
    config, found = GenerationConfig(max_tokens=30), {}

    def run(number):
        stream = scheduler.stream(tokenizer, asked[number], config)
        if number % 4 == 3:  # a client that goes away
            next(stream)
            stream.close()
        else:
            found[number] = ids_of(stream)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 9
    for number, ids in found.items():
        assert ids == alone(network, tokenizer, asked[number], config)
    with scheduler.exclusive():
        scheduler._drop_cancelled()
        assert scheduler.store.available == 40


def test_limits_are_said(network, tokenizer):
    scheduler = Scheduler(SlowEngine(network, 4), Limits(waiting=2))
    with pytest.raises(ModelError, match="room for 128"):
        scheduler.submit(tokenizer, [5] * 128, GenerationConfig())
    texts = [scheduler.submit(tokenizer, [5], GenerationConfig(max_tokens=2)) for _ in range(2)]
    with pytest.raises(ModelError, match="wait already"):
        scheduler.submit(tokenizer, [5], GenerationConfig())
    assert [len(ids_of(text)) <= 2 for text in texts] == [True, True]
    full = list(scheduler.submit(tokenizer, [5] * 120, GenerationConfig(max_tokens=100)))
    assert full[-1].reason in ("context", "end")


def test_a_broken_engine_ends_all_texts_and_says_why(network, tokenizer):
    engine = SlowEngine(network)
    scheduler = Scheduler(engine)
    texts = [scheduler.submit(tokenizer, [5, 6], GenerationConfig(max_tokens=20)) for _ in range(2)]
    next(texts[0])
    engine.forward = lambda batch: (_ for _ in ()).throw(RuntimeError("no more"))
    for text in texts:
        with pytest.raises(RuntimeError, match="no more"):
            list(text)
    assert scheduler.store.available == engine.pages
