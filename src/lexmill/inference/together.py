"""Many texts written side by side: as many tokens a second as a computer can give, and what each alone would get."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lexmill.errors import DataError, ModelError
from lexmill.inference.beams import RowsSession, beam_searches
from lexmill.inference.generation import GenerationConfig
from lexmill.inference.language_model import LanguageModel
from lexmill.model.config import ModelConfig

_CACHE_BYTES = 384 << 20  # of keys and values of the texts that are written at once
_MOST_ROWS = 64
_MOST_BEGUN = 256  # texts that an engine is given at once; it takes as many as it can


def write_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int = 1,
    max_tokens: int = 256,
    length_penalty: float = 1.0,
    done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """What follows each of many prompts, without the id that ends it: what each alone would get, but faster.

    Args:
        beams: above 1 beam search (see `beam_search`), else greedy.
        done: is told how many more are written.

    Raises:
        ModelError: a model that does not write, or a prompt that its context does not hold.
        DataError: a prompt without a token.
    """
    shape, stop = model.config, model.tokenizer.ids.stop
    two = shape.shape == "encoder_decoder"
    if shape.shape == "encoder":
        raise ModelError("This model is an encoder, which writes no text.", "Take a decoder or T5.")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"Prompt {number} has no tokens.")
        if shape.positions != "relative" and len(prompt) >= shape.context:
            raise ModelError(
                f"Prompt {number} has {len(prompt):,} tokens, but the model's context is {shape.context:,}.",
                "Shorten it.",
            )
    if beams == 1 and model.backend.name == "native":
        return _write_in_engine(model, prompts, max_tokens, done)
    found: list[list[int]] = [[] for _ in prompts]
    lengths, room = [len(ids) for ids in prompts], model.backend.room
    for group in group_texts(lengths, shape, beams=beams, max_tokens=max_tokens, room=room):
        read = [prompts[text] for text in group]
        begun = [[shape.decoder_start]] * len(read) if two else read
        with model.backend.rows(read if two else None) as session:
            if beams > 1:
                best = beam_searches(
                    session, begun, stop, beams=beams, max_tokens=max_tokens, length_penalty=length_penalty
                )
                texts = [list(hypotheses[0].ids) for hypotheses in best]
            else:
                texts = write_greedily(session, begun, stop, max_tokens)
        for text, ids in zip(group, texts):
            found[text] = ids
        if done is not None:
            done(len(group))
    return found


def _write_in_engine(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    done: Callable[[int], None] | None,
) -> list[list[int]]:
    """The engine takes in the next text as soon as one ends."""
    found: list[list[int]] = []
    config = GenerationConfig(max_tokens=max_tokens)
    coming, going = iter(prompts), deque[Any]()
    try:
        while len(found) < len(prompts):
            for prompt in itertools.islice(coming, _MOST_BEGUN - len(going)):
                two = model.config.shape == "encoder_decoder"
                going.append(
                    model.backend.write(
                        model.tokenizer,
                        [model.config.decoder_start] if two else prompt,
                        config,
                        prompt if two else None,
                    )
                )
            found.append([step.token for step in going[0] if step.token is not None])
            going.popleft()
            if done is not None:
                done(1)
    finally:
        for text in going:
            text.close()
    return found


def write_greedily(
    session: RowsSession, prompts: Sequence[Sequence[int]], stop: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """The likeliest id after the other behind each prompt, without the one that ends the text.

    Args:
        session: has read nothing yet (of the texts that are written).
        stop: ids that end a text.
    """
    written: list[list[int]] = [[] for _ in prompts]
    max_tokens = min(max_tokens, session.context - max(map(len, prompts)))
    rows = list(range(len(prompts)))  # the texts that the session holds
    going = set(rows)
    read = [list(prompt) for prompt in prompts]
    for length in range(1, max_tokens + 1):
        chosen = session.read_rows(read).argmax(-1).tolist()
        for text, token in zip(rows, chosen):
            if text in going:
                if token in stop:
                    going.discard(text)
                else:
                    written[text].append(token)
        if not going or length == max_tokens:
            break
        if len(going) <= 0.75 * len(rows):  # dropping some means copying the others
            places = [place for place, text in enumerate(rows) if text in going]
            session.reorder(places)
            rows, chosen = [rows[place] for place in places], [chosen[place] for place in places]
        read = [[token] for token in chosen]
    return written


def group_texts(
    lengths: Sequence[int], shape: ModelConfig, *, beams: int, max_tokens: int, room: int | None = None
) -> Iterator[list[int]]:
    """Which texts are written together: like lengths, the longest first, as many as memory should hold.

    Args:
        lengths: tokens of each prompt.
        room: tokens that a backend can hold; None where only memory counts.
    """
    two = shape.shape == "encoder_decoder"
    layers = shape.decoder_layers if two else shape.layers
    each = 8 * layers * shape.kv_heads * shape.head_width  # bytes of a token's keys and values
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    while order:
        longest = lengths[order[0]]
        rows = _CACHE_BYTES // max(beams * each * (longest + max_tokens), 1)
        if room is not None:  # a page more for each text than its tokens take
            rows = min(rows, room // (beams * (longest + max_tokens + 32)))
        rows = max(1, min(rows, _MOST_ROWS // beams))
        # where a decoder's context may end a text, each must have as much of it as alone
        tight = not two and longest + max_tokens > shape.context
        group = [text for text in order[:rows] if not tight or lengths[text] == longest]
        yield group
        order = order[len(group) :]
