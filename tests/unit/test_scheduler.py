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
from lexmill.inference.native.engine import NativeEngine
from lexmill.inference.native.interface import BLOCK, CHUNK, Batch
from lexmill.inference.native.library import available
from lexmill.inference.native.scheduler import Limits, Scheduler
from lexmill.inference.native.sources import DirectorySource
from lexmill.inference.native.speculation import DraftModel, PromptLookup
from lexmill.inference.sampling import SamplingConfig
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, ModelConfig
from lexmill.model.directory import write_model_directory
from lexmill.model.load import load_model

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


def directory_of(folder, tokenizer, **flags):
    config = ModelConfig(**{**SHAPE, **flags})
    weights = randomise(build_model(config), deviation=0.3).weights()
    return write_model_directory(folder, config, weights, tokenizer)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    two = {**FAMILIES["t5"], "kv_heads": 4, "decoder_layers": 2, "decoder_start": 3}
    return {
        "decoder": directory_of(folder / "decoder", tokenizer),
        "small": directory_of(folder / "small", tokenizer, layers=1),
        "writer": directory_of(folder / "writer", tokenizer, **two),
    }


@pytest.fixture(scope="module", params=["slow", "native"])
def opened(request, directories):
    """A function that opens an engine for the model of a name: the slow one of the tests, or the real one."""
    if request.param == "native":
        if not available():
            pytest.skip("the engine is not built here")
        return lambda name, pages: NativeEngine.open(
            DirectorySource(directories[name]), pages=pages, threads=1, keep=False
        )
    networks = {}

    def slow(name, pages):
        if name not in networks:
            networks[name] = load_model(directories[name])
        return SlowEngine(networks[name], pages)

    return slow


@pytest.fixture(scope="module")
def counting(opened):
    """The same with a list of (tokens, prompt) of each batch."""

    def get(name, pages=64):
        engine, batches = opened(name, pages), []
        forward = engine.forward
        engine.forward = lambda batch: batches.append((len(batch.tokens), batch.prompt)) or forward(batch)
        return engine, batches

    return get


def alone(engine, tokenizer, prompt, config, source=None):
    """What is written without any schedule: the prompt as one given text, then token by token."""
    writing, done = Writing(tokenizer, prompt, config, CONTEXT), 0
    memory = None if source is None else np.array(engine.remember([source]), np.int32)
    while not writing.ended:
        end = len(writing.ids)
        for start in range(done, end, CHUNK):
            stop = min(start + CHUNK, end)
            batch = Batch(
                tokens=np.array(writing.ids[start:stop], np.int32),
                positions=np.arange(start, stop, dtype=np.int32),
                rows=np.zeros(stop - start, np.int32),
                tables=np.arange(engine.pages, dtype=np.int32)[None],
                wanted=np.array([stop - start - 1], np.int32),
                prompt=done == 0,
                memory=memory,
            )
            logits = engine.forward(batch)[0]
        done = end
        writing.take(logits)
    if memory is not None:
        engine.forget(memory.tolist())
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
def test_no_schedule_changes_what_is_written(opened, tokenizer, requests, pages, rows, drafter):
    engine, plain = opened("decoder", pages), opened("decoder", 64)
    draft = DraftModel(opened("small", 20))
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
        expected = alone(plain, tokenizer, prompt, config)
        assert found[number] == (expected if cancel is None else expected[: len(found[number])])
    scheduler.close()
    assert scheduler.store.available == pages  # none is lost
    assert draft.store.available == 20


def test_pages_run_out_and_all_is_written_all_the_same(counting, opened, tokenizer):
    engine, batches = counting("decoder", CONTEXT // BLOCK + 1)
    plain = opened("decoder", 64)
    scheduler = Scheduler(engine)
    config = GenerationConfig(max_tokens=120)
    asked = [list(range(10 * number + 5, 10 * number + 65)) for number in range(5)]
    texts = [scheduler.submit(tokenizer, prompt, config) for prompt in asked]
    found = [ids_of(text) for text in texts]
    assert found == [alone(plain, tokenizer, prompt, config) for prompt in asked]
    computed = sum(tokens for tokens, _ in batches)
    assert computed > sum(map(len, asked)) + sum(map(len, found))  # some of it twice


def test_encoder_decoders_write_from_what_they_read(opened, tokenizer):
    engine, plain = opened("writer", 24), opened("writer", 64)
    scheduler = Scheduler(engine)
    config = GenerationConfig(max_tokens=40)
    sources = [[7, 8, 9], list(range(30, 80)), [7, 8, 9, 10]]
    texts = [scheduler.submit(tokenizer, [3], config, source=source) for source in sources]
    found = [ids_of(text) for text in texts]
    assert found == [alone(plain, tokenizer, [3], config, source=source) for source in sources]
    assert len({tuple(one) for one in found}) > 1
    assert not getattr(engine, "read", None)  # all is forgotten


def test_a_known_beginning_is_not_computed_again(counting, tokenizer):
    engine, batches = counting("decoder")
    scheduler = Scheduler(engine)
    config, prompt = GenerationConfig(max_tokens=3), list(range(10, 110))
    first = ids_of(scheduler.submit(tokenizer, prompt, config))
    batches.clear()
    assert ids_of(scheduler.submit(tokenizer, prompt, config)) == first
    assert batches[0][0] == 100 % BLOCK
    # two that come together read one beginning between them
    batches.clear()
    texts = [scheduler.submit(tokenizer, [*range(400, 500), *range(280), last], config) for last in (1, 2)]
    for text in texts:
        ids_of(text)
    assert sum(tokens for tokens, prompt in batches if prompt) < 1.5 * 381


def test_what_was_written_is_computed_anew_when_it_is_given(opened, tokenizer):
    scheduler, plain = Scheduler(opened("decoder", 64)), opened("decoder", 64)
    config = GenerationConfig(max_tokens=70)
    for first in range(20, 100):  # one that does not end before it fills whole pages
        prompt = list(range(first, first + 40))
        prompt += ids_of(scheduler.submit(tokenizer, prompt, config))
        if len(prompt) > 2 * BLOCK + 8:
            break
    assert len(prompt) > 2 * BLOCK + 8
    prompt += [7, 8]
    assert ids_of(scheduler.submit(tokenizer, prompt, config)) == alone(plain, tokenizer, prompt, config)


def test_a_long_prompt_does_not_hold_up_those_who_write(counting, opened, tokenizer):
    engine, batches = counting("decoder", 80)
    scheduler = Scheduler(engine, drafter=None)
    one = scheduler.submit(tokenizer, [5, 6], GenerationConfig(max_tokens=50))
    next(one)
    long = scheduler.submit(tokenizer, [1] * 390, GenerationConfig(max_tokens=2))
    before = len(batches)
    for _ in range(4):
        next(one)
    kinds = [prompt for _, prompt in batches[before:]]
    assert kinds.count(False) >= 3 and max(tokens for tokens, _ in batches) <= CHUNK
    plain = opened("decoder", 64)
    assert ids_of(long) == alone(plain, tokenizer, [1] * 390, GenerationConfig(max_tokens=2))


def test_guesses_save_steps_where_a_text_repeats_itself(counting, opened, tokenizer):
    config, plain, steps, tokens = GenerationConfig(max_tokens=150), opened("decoder", 64), {}, {}
    itself = DraftModel(opened("decoder", 64)).of_text  # guesses that are nearly always right
    for drafter in (None, PromptLookup, itself):
        engine, batches = counting("decoder")
        scheduler = Scheduler(engine, drafter=drafter)
        scheduler.pace.measured = lambda tokens, seconds: None  # the seconds of so small a model say nothing
        for first in range(40, 240, 20):
            prompt = [*range(first, first + 4)] * 8
            written = ids_of(scheduler.submit(tokenizer, prompt, config))
            assert written == alone(plain, tokenizer, prompt, config)
            tokens[drafter] = tokens.get(drafter, 0) + len(written)
        steps[drafter] = len(batches)
    assert tokens[None] == tokens[PromptLookup] > 300
    assert steps[PromptLookup] < 0.97 * steps[None]
    assert steps[itself] < 0.5 * steps[None]


def test_many_threads_get_what_each_alone_would(opened, tokenizer):
    scheduler, plain = Scheduler(opened("decoder", 40)), opened("decoder", 64)
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
        assert ids == alone(plain, tokenizer, asked[number], config)
    with scheduler.exclusive():
        scheduler._drop_cancelled()
        assert scheduler.store.available == 40


def test_limits_are_said(opened, tokenizer):
    scheduler = Scheduler(opened("decoder", 4), Limits(waiting=2))
    with pytest.raises(ModelError, match="room for 128"):
        scheduler.submit(tokenizer, [5] * 128, GenerationConfig())
    texts = [scheduler.submit(tokenizer, [5], GenerationConfig(max_tokens=2)) for _ in range(2)]
    with pytest.raises(ModelError, match="wait already"):
        scheduler.submit(tokenizer, [5], GenerationConfig())
    assert [len(ids_of(text)) <= 2 for text in texts] == [True, True]
    full = list(scheduler.submit(tokenizer, [5] * 120, GenerationConfig(max_tokens=100)))
    assert full[-1].reason in ("context", "end")


def test_a_broken_engine_ends_all_texts_and_says_why(opened, tokenizer):
    engine = opened("decoder", 64)
    scheduler = Scheduler(engine)
    texts = [scheduler.submit(tokenizer, [5, 6], GenerationConfig(max_tokens=20)) for _ in range(2)]
    next(texts[0])
    engine.forward = lambda batch: (_ for _ in ()).throw(RuntimeError("no more"))
    for text in texts:
        with pytest.raises(RuntimeError, match="no more"):
            list(text)
    assert scheduler.store.available == engine.pages
