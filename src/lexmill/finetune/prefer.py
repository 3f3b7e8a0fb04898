"""Preferences as a fine-tuning task: direct preference optimisation (DPO) from chosen and rejected replies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.data.labelled import Preference
from lexmill.errors import DataError, ModelError
from lexmill.finetune.chat import chat_example
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TRAIN, VALIDATION, TaskData
from lexmill.model.directory import ModelDirectory
from lexmill.model.lora import without_adapter
from lexmill.progress import Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch, fixed_batches
from lexmill.train.causal import counted
from lexmill.train.cross_entropy import linear_token_losses
from lexmill.train.examples import IGNORED, Example
from lexmill.train.objective import Losses
from lexmill.train.precision import autocast, choose_precision

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # segments of a pair
_NAMED = 5  # rows that a message names

# (model, batch) -> the reference's log-probabilities of both replies of each pair, as `reply_logprobs` gives them
Reference = Callable[[Any, Batch], Tensor]


def prefer_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Each epoch all pairs. The reference is the model that training begins with.

    With an adapter it is the same model with the adapter switched off, asked batch by batch. Without one (or where
    modules are trained whole) its log-probabilities of all pairs are computed once, before training.

    Raises:
        DataError: no pairs, or some that do not fit a row.
        ModelError: the model is no decoder, or has no chat template.
    """
    if model.config.shape != "decoder":
        raise ModelError(
            f"{model.path}: preferences are between replies, which a decoder gives; this model has the shape "
            f"'{model.config.shape}'."
        )
    if not model.tokenizer.chat_template:
        raise ModelError(
            f"{model.path}: this model has no chat template, so a conversation cannot be written for it.",
            "Put chat_template.jinja into the directory: the template of a model that it descends from.",
        )
    length = config.length(model.config)
    rows = data.rows(TRAIN, Preference)
    pairs, left_out = pair_examples(rows, model.tokenizer, length, config.too_long)
    if not pairs:
        raise DataError(
            "There are no pairs of replies to learn from.", 'Rows with "chosen" and "rejected" are.'
        )
    held_out = itertools.islice(data.rows(VALIDATION, Preference), config.validation_rows)
    first = len(pairs) + left_out
    validation, also = pair_examples(held_out, model.tokenizer, length, config.too_long, first=first)
    pad = model.tokenizer.ids.pad if model.tokenizer.ids.pad is not None else 0
    known = KnownReference(first + len(validation) + also)
    switched = config.lora is not None and not config.lora.modules_to_save

    def begin(network: Any, rows: int, progress: Progress) -> None:
        device = next(network.parameters()).device.type
        # training computes in its own number format, validation in float32: each is compared with its like
        for some, precision in ((pairs, choose_precision(config.precision, device)), (validation, "float32")):
            batches = fixed_batches(some, rows=rows, length=length, pad_id=pad) if some else []
            with autocast(precision, device):
                known.learn(network, batches, progress)

    return Lesson(
        PreferenceLoss(adapter_off if switched else known, config.beta, config.label_smoothing),
        lambda epoch: pairs,
        validation,
        length,
        pad,
        f"{len(pairs):,} pairs of replies"
        + (f"; {left_out:,} are too long and left out" if left_out else ""),
        facts={"pairs": len(pairs), "left_out": left_out, "beta": config.beta},
        begin=None if switched else begin,
    )


def pair_examples(
    rows: Iterable[Preference], tokenizer: Tokenizer, length: int, too_long: str = "error", first: int = 0
) -> tuple[list[Example], int]:
    """One example a pair, `origin` being its number among the rows, from `first` on; and how many were left out.

    Args:
        length: tokens that the prompt and both replies may have together.
        too_long: "error", "drop", or "cut", which takes as many tokens from the end of the longer reply, then of both.

    Raises:
        DataError: pairs that are too long, where that is an error or nothing of a reply would be left.
    """
    made: list[Example] = []
    long: list[str] = []
    left_out = 0
    for number, row in enumerate(rows, first):
        try:
            pair = pair_example(row, tokenizer)
        except DataError as error:
            raise DataError(f"{row.origin}: {error.message}", error.hint) from error
        size = len(pair.tokens)
        if size > length and too_long == "cut":
            pair = _cut(pair, length)
        if len(pair.tokens) <= length:
            made.append(Example(pair.tokens, pair.targets, pair.segments, label=1, origin=number))
        elif too_long == "drop":
            left_out += 1
        else:
            long.append(f"{row.origin} ({size:,} tokens)")
    if long:
        more = f" and {len(long) - _NAMED:,} more" if len(long) > _NAMED else ""
        cut = "" if too_long == "cut" else 'too_long = "cut" (shortens the replies), '
        raise DataError(
            f"{len(long):,} pairs have more than {length:,} tokens, both replies together: "
            f"{', '.join(long[:_NAMED])}{more}.",
            f'Set {cut}too_long = "drop" (leaves them out), or a larger row_length.',
        )
    return made, left_out


def pair_example(row: Preference, tokenizer: Tokenizer) -> Example:
    """Both replies behind their common prompt, which is computed once.

    `segments` tells the three apart: a reply sees the prompt and itself. Each reply's segment begins with the last
    token of the prompt, which predicts its first one.
    """
    before = [
        {**message, "weight": "0"} if message["role"] == "assistant" else message for message in row.messages
    ]
    chosen, rejected = (
        chat_example([*before, {"role": "assistant", "content": reply}], tokenizer)
        for reply in (row.chosen, row.rejected)
    )
    shared = min(int((one.targets != IGNORED).argmax()) for one in (chosen, rejected))
    differ = np.flatnonzero(chosen.tokens[:shared] != rejected.tokens[:shared])
    shared = int(differ[0]) if len(differ) else shared
    parts = [
        Example(chosen.tokens[:shared], chosen.targets[:shared]),
        Example(chosen.tokens[shared:], chosen.targets[shared:]),
        Example(rejected.tokens[shared:], rejected.targets[shared:]),
    ]
    return _joined(parts)


def _joined(parts: Sequence[Example]) -> Example:
    return Example(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.repeat(np.array([PROMPT, CHOSEN, REJECTED]), [len(part.tokens) for part in parts]),
    )


def _cut(pair: Example, length: int) -> Example:
    """Replies cut at their ends, to the same length where both must be; the pair itself where that leaves no target."""
    assert pair.segments is not None
    parts = [
        Example(pair.tokens[pair.segments == part], pair.targets[pair.segments == part])
        for part in (PROMPT, CHOSEN, REJECTED)
    ]
    room = length - len(parts[PROMPT].tokens)
    sizes = [len(part.tokens) for part in parts[1:]]
    most = max(room - min(sizes), room // 2)
    kept = [parts[PROMPT], *(Example(part.tokens[:most], part.targets[:most]) for part in parts[1:])]
    if most < 1 or not all((part.targets != IGNORED).any() for part in kept[1:]):
        return pair
    return _joined(kept)


@dataclass(frozen=True)
class PreferenceLoss:
    """-log sigmoid(beta · margin) a pair (Rafailov et al. 2023, "Direct Preference Optimization").

    The margin is how much more than the reference the model prefers the chosen reply; a reply's log-probability is
    the sum over its tokens. With `label_smoothing` so many pairs are taken to be the wrong way round (Mitchell 2023,
    "A note on DPO with noisy preferences").
    """

    reference: Reference
    beta: float
    label_smoothing: float = 0.0

    def __call__(self, model: Any, batch: Batch) -> Losses:
        learned, tokens = reply_logprobs(model, batch)
        known = self.reference(model, batch)
        there = pairs_of(batch)
        rewards = self.beta * (learned - known)[there]
        margins = rewards[:, 0] - rewards[:, 1]
        lost = -F.logsigmoid(margins)
        if self.label_smoothing:
            lost = (1 - self.label_smoothing) * lost - self.label_smoothing * F.logsigmoid(-margins)
        losses = Losses()
        telling = not torch.is_grad_enabled()
        losses.add("pairs", (lost.sum(), int((margins > 0).sum()) if telling else None))
        if telling:
            count = len(margins)
            losses.figures["margin"] = float(margins.sum()), count
            for index, name in enumerate(("chosen", "rejected")):
                losses.figures[f"{name}_reward"] = float(rewards[:, index].sum()), count
                total, size = learned[there][:, index].sum(), tokens[there][:, index].sum()
                losses.figures[f"{name}_logprob"] = float(total), int(size)
        return losses


def reply_logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both replies of each pair, and how many tokens they have.

    Returns:
        Both (rows · (most pairs in a row + 1), 2), chosen and rejected, float32; 0 where there is no pair.
    """
    hidden = model.hidden(batch.tensor("tokens"), _positions(batch), _mask(batch))
    states, targets = counted(hidden, batch.tensor("targets"))
    lost = linear_token_losses(states, targets, model.head_weight)
    # the same places as `counted` takes, by the reply that they belong to
    reply = torch.from_numpy(_replies(batch)).to(lost.device)
    reply = counted(reply[..., None], batch.tensor("targets"))[0][:, 0]
    count = len(batch.tokens) * _stride(batch) * 2
    sums = lost.new_zeros(count).index_add(0, reply, -lost)
    sizes = lost.new_zeros(count).index_add(0, reply, (targets != IGNORED).float())
    return sums.view(-1, 2), sizes.view(-1, 2)


def adapter_off(model: Any, batch: Batch) -> Tensor:
    """The reference of a model with an adapter: the same model without it, and without its dropout."""
    learning = model.training
    model.eval()
    with torch.no_grad(), without_adapter(model):
        found, _ = reply_logprobs(model, batch)
    model.train(learning)
    return found


class KnownReference:
    """Log-probabilities of pairs by their numbers, computed before training."""

    def __init__(self, pairs: int) -> None:
        self._known = np.zeros((pairs, 2), np.float32)

    def learn(self, model: Any, batches: Sequence[Batch], progress: Progress) -> None:
        """Ask the model as it is."""
        device = next(model.parameters()).device
        model.eval()
        with torch.no_grad(), progress.task("asking the reference", len(batches), "batches") as task:
            for batch in batches:
                found, _ = reply_logprobs(model, batch.to(device))
                number = self._numbers(batch)
                self._known[number[number >= 0]] = found.cpu().numpy()[number >= 0]
                task.advance()
        model.train()

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        number = self._numbers(batch)
        return torch.from_numpy(self._known[np.maximum(number, 0)]).to(batch.device)

    @staticmethod
    def _numbers(batch: Batch) -> np.ndarray:
        """Of each pair of a batch, as `reply_logprobs` lays them out; -1 where there is none."""
        assert batch.origins is not None
        numbers = np.full((len(batch.tokens), _stride(batch)), -1, np.int64)
        numbers[:, : batch.origins.shape[1]] = batch.origins
        return numbers.reshape(-1)


def _stride(batch: Batch) -> int:
    """Pairs that a row may have, and one for what fills its end."""
    assert batch.origins is not None
    return int(batch.origins.shape[1]) + 1


def _group(batch: Batch) -> np.ndarray:
    """(rows, length): a number for each pair of a batch."""
    return np.arange(len(batch.tokens))[:, None] * _stride(batch) + batch.document


def _replies(batch: Batch) -> np.ndarray:
    """(rows, length): twice the number of the pair, one more for the rejected reply."""
    assert batch.segments is not None
    return (2 * _group(batch) + (batch.segments == REJECTED)).astype(np.int64)


def pairs_of(batch: Batch) -> Tensor:
    """Which of the numbers are pairs; rows that only stand in have none."""
    assert batch.labels is not None
    return torch.from_numpy(_group(batch)[batch.labels != IGNORED].astype(np.int64)).to(batch.device)


def _positions(batch: Batch) -> Tensor:
    """Positions as if each reply stood behind its prompt alone."""
    assert batch.segments is not None
    group = _group(batch)
    chosen = np.bincount(group[batch.segments == CHOSEN], minlength=len(batch.tokens) * _stride(batch))
    positions = batch.positions - np.where(batch.segments == REJECTED, chosen[group], 0)
    return torch.from_numpy(positions.astype(np.int64)).to(batch.device)


def _mask(batch: Batch) -> Tensor:
    """A place sees those before it of its own pair that belong to the prompt or to its own reply."""
    document, segments = batch.tensor("document"), batch.tensor("segments")
    mask = document[:, :, None] == document[:, None, :]
    mask &= (segments[:, None, :] == PROMPT) | (segments[:, None, :] == segments[:, :, None])
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
    return mask[:, None]
