"""Many texts written side by side: as many tokens a second as a computer can give, and what each alone would get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lexmill.errors import DataError, ModelError
from lexmill.inference.beams import RowsSession, beam_searches
from lexmill.inference.language_model import LanguageModel
from lexmill.model.config import ModelConfig

_CACHE_BYTES = 384 << 20  # of keys and values of the texts that are written at once
_MOST_ROWS = 64


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
    from lexmill.inference.torch_backend import TorchSession

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
    found: list[list[int]] = [[] for _ in prompts]
    for group in group_texts([len(ids) for ids in prompts], shape, beams=beams, max_tokens=max_tokens):
        read = [prompts[text] for text in group]
        session = TorchSession(model.network, sources=read if two else None)
        begun = [[shape.decoder_start]] * len(read) if two else read
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
    lengths: Sequence[int], shape: ModelConfig, *, beams: int, max_tokens: int
) -> Iterator[list[int]]:
    """Which texts are written together: like lengths, the longest first, as many as memory should hold.

    Args:
        lengths: tokens of each prompt.
    """
    two = shape.shape == "encoder_decoder"
    layers = shape.decoder_layers if two else shape.layers
    each = 8 * layers * shape.kv_heads * shape.head_width  # bytes of a token's keys and values
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    while order:
        longest = lengths[order[0]]
        rows = _CACHE_BYTES // max(beams * each * (longest + max_tokens), 1)
        rows = max(1, min(rows, _MOST_ROWS // beams))
        # where a decoder's context may end a text, each must have as much of it as alone
        tight = not two and longest + max_tokens > shape.context
        group = [text for text in order[:rows] if not tight or lengths[text] == longest]
        yield group
        order = order[len(group) :]
