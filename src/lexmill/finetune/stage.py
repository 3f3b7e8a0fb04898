"""The fine-tuning stage: a model directory and labelled documents in, a model directory out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from lexmill.data.documents import read_documents
from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.files import write_json
from lexmill.finetune.chat import chat_example, fit
from lexmill.model.build import build_model
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Loader, fixed_batches
from lexmill.train.causal import causal_loss
from lexmill.train.config import TrainConfig
from lexmill.train.examples import Example, next_token_example
from lexmill.train.loop import Hooks, TrainResult, train
from lexmill.train.metrics import write_samples
from lexmill.train.objective import measure
from lexmill.train.processes import Processes

# (model, tokenizer, question) -> the reply
Replier = Callable[[nn.Module, Tokenizer, str], str]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The `[finetune]` table of a recipe."""

    prompts: tuple[str, ...] = ("Hello",)  # questions whose answers are shown as training goes on
    join: int = 1  # up to so many conversations, drawn anew each epoch, become one of several turns
    text_share: float = (
        0.0  # share of the examples' tokens that are plain text, so that writing is not forgotten
    )
    row_length: int | None = None  # tokens in a training row; the model's context when not given

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join < 1:
            raise ConfigError("'join' must be at least 1.")
        if not 0 <= self.text_share < 1:
            raise ConfigError("'text_share' must lie in [0, 1).")


Conversation = list[dict[str, str]]


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a Parquet file of documents.

    Raises:
        DataError: there are none.
    """
    found = [
        [dict(message) for message in document.messages or ()]
        for document in read_documents(path)
        if document.kind == "chat"
    ]
    if not found:
        raise DataError(f"{path}: there are no conversations to learn from.", "Add a source of kind 'chat'.")
    return found


def join_conversations(
    conversations: list[Conversation], most: int, random: np.random.Generator
) -> list[Conversation]:
    """Lay up to `most` conversations one behind the other, drawn at random; each is used once.

    A model that has only seen single questions loses its way in a talk of several turns. What
    begins with a system message stays alone.
    """
    joined: list[Conversation] = []
    room = 0
    for index in random.permutation(len(conversations)):
        conversation = conversations[index]
        alone = conversation[0]["role"] == "system"
        if room > 0 and not alone:
            joined[-1] = joined[-1] + conversation
            room -= 1
        else:
            joined.append(list(conversation))
            room = 0 if alone else int(random.integers(0, most))
    return joined


def to_examples(conversations: list[Conversation], tokenizer: Tokenizer, length: int) -> list[Example]:
    """Conversations as examples of at most `length` tokens; one whose replies are all cut off is left out."""
    fitted = (fit(chat_example(conversation, tokenizer), length) for conversation in conversations)
    return [example for example in fitted if example is not None]


class Replay:
    """Pieces of the training text, to be mixed in."""

    def __init__(self, path: Path, tokenizer: Tokenizer, length: int) -> None:
        self._length = length
        texts = [document.text or "" for document in read_documents(path) if document.kind == "text"]
        ids = (np.array(one, np.int64) for one in tokenizer.encode_batch(texts, special=False))
        self._ids = [one for one in ids if len(one) > 1]

    def draw(self, tokens: int, random: np.random.Generator) -> list[Example]:
        """Pieces of about so many tokens in all; none when there is no text."""
        pieces: list[Example] = []
        while tokens > 0 and self._ids:
            ids = self._ids[int(random.integers(len(self._ids)))]
            start = int(random.integers(max(len(ids) - self._length, 1)))
            pieces.append(next_token_example(ids[start : start + self._length + 1]))
            tokens -= len(pieces[-1].tokens)
        return pieces


def finetune(
    config: FinetuneConfig,
    base: ModelDirectory,
    documents: Path,
    out: Path,
    *,
    reply: Replier | None = None,
    progress: Progress = SILENT,
) -> tuple[ModelDirectory, TrainResult]:
    """Teach `base` to answer, and write `out/model`. The same call goes on from its checkpoints.

    Args:
        documents: the folder that `prepare` wrote; its rows of kind "chat" are used.
        reply: answers a question; called for each of `config.prompts` as training goes on.

    Raises:
        DataError: no conversations.
    """
    if base.config.shape != "decoder":
        raise ModelError(
            f"{base.path}: fine-tuning for chat needs a decoder; this model has the shape '{base.config.shape}'."
        )
    processes = Processes.join(config.device)
    if not processes.first:
        progress = SILENT
    tokenizer = base.tokenizer
    length = config.row_length or base.config.context
    pad = tokenizer.ids.pad if tokenizer.ids.pad is not None else 0
    conversations = read_conversations(documents / "train.parquet")
    replay = Replay(documents / "train.parquet", tokenizer, length) if config.text_share else None
    held_out = fixed_batches(
        to_examples(read_conversations(documents / "validation.parquet"), tokenizer, length),
        rows=config.rows,
        length=length,
        pad_id=pad,
    )

    def examples(epoch: int) -> list[Example]:
        random = np.random.default_rng([config.seed, epoch, 2])
        chats = to_examples(join_conversations(conversations, config.join, random), tokenizer, length)
        tokens = sum(len(example.tokens) for example in chats)
        share = config.text_share
        return chats + (replay.draw(round(tokens * share / (1 - share)), random) if replay else [])

    model = build_model(base.config)
    model.load_weights(base.weights())
    progress.say(f"  {len(conversations):,} conversations")

    on_device = [batch.to(processes.device) for batch in held_out]

    def validate(model: nn.Module) -> dict[str, float]:
        return measure(model, causal_loss, on_device).figures("validation")

    def show_replies(model: nn.Module, step: int) -> None:
        if reply is None:
            return
        said = [(prompt, reply(model, tokenizer, prompt)) for prompt in config.prompts]
        if processes.first:
            write_samples(out / "samples.jsonl", step, said)
        for prompt, text in said:
            progress.say(f"    {prompt} > {' '.join(text.split())[:90]}")

    result = train(
        model,
        causal_loss,
        Loader(examples, rows=config.rows, length=length, pad_id=pad, seed=config.seed),
        config,
        out,
        label="fine-tuning",
        hooks=Hooks(validate=validate, sample=show_replies if reply else None),
        progress=progress,
        processes=processes,
    )
    history = {"stage": "finetune", "task": "chat", "steps": result.steps, "tokens": result.tokens}
    lineage = {**base.lineage, "history": [*base.lineage.get("history", []), history]}
    weights = model.weights()
    with processes.first_alone():
        if processes.first:
            write_model_directory(out / "model", base.config, weights, tokenizer, lineage)
            write_json(out / "result.json", vars(result))
    return ModelDirectory.open(out / "model"), result
