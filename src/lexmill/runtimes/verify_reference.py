"""lexmill's own answers to what `verify` asks: of the model, and of a GGUF file's weights.

A file of lower precision holds other weights than the model. What they change is the file's, and what
llama.cpp makes of them is llama.cpp's: so a file is compared with lexmill running that file's weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from lexmill.errors import DataError
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.sampling import log_softmax
from lexmill.model.decoder import Decoder
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.verify_cases import CONVERSATIONS, TEXTS
from lexmill.runtimes.verify_stress import Stress

_SPECIAL = 64  # texts of special tokens that are tried; some models have hundreds that are alike
_EVERY = 16  # tokens of a continuation between two positions whose log-probabilities are compared


class Reference:
    """lexmill's own answers, each found once.

    Attributes:
        stress: generated texts and their ids.
        plain: texts of special tokens to their ids as ordinary text.
        positions: texts as ids; the log-probabilities of what follows each are compared.
        logprobs: (positions, vocabulary), lexmill's.
        rounded_logprobs: the same with each product's activations rounded; None where nothing rounds.
        greedy: (ids, limit, continuation) of each prompt.
        length: of the continuations, in tokens, where the context has room.
        rounding: the type to which the runtime rounds activations; "" for none.
    """

    def __init__(
        self, model: LanguageModel, directory: ModelDirectory, prompts: Sequence[str], tokens: int
    ) -> None:
        self.model, self.directory, self.tokenizer = model, directory, directory.tokenizer
        self.vocabulary, self.context = directory.config.vocab_size, directory.config.context
        self.bos = self.tokenizer.encode("")
        self.ids = {text: self.tokenizer.encode(text) for text in TEXTS}
        self.stress = Stress(self.tokenizer)
        self.plain = dict(self._plain())
        self.texts = {text: self.tokenizer.decode(ids[len(self.bos) :]) for text, ids in self.ids.items()}
        self.chats = list(self._chats())
        asked = [self.tokenizer.encode(prompt) for prompt in prompts]
        if self.chats:
            asked.append(self.tokenizer.encode(self.chats[0][1]))
        self.prompts = [ids for ids in asked if 0 < len(ids) < self.context - 1]
        self.longest = max((len(ids) for ids in self.prompts), default=0) + tokens
        self.rounding = ""
        self.rounded_logprobs: np.ndarray | None = None
        self.length = tokens
        self._rounded = Rounded({}, None)
        self.greedy = self._continued()
        self.positions = [ids[:end] for ids in self.prompts for end in sorted({1, (len(ids) + 1) // 2})]
        self.positions += [
            ids + answer[:end] for ids, _, answer in self.greedy for end in range(0, len(answer) + 1, _EVERY)
        ]
        self.logprobs = np.stack([self.row(ids) for ids in self.positions])

    def with_weights(self, weights: Mapping[str, np.ndarray], types: Mapping[str, str]) -> Reference:
        """The same questions answered by the same model with other weights.

        Args:
            weights: every weight by lexmill's name.
            types: the type that a weight has in the file, "Q8_0" and so on, by the same names; it decides how
                the runtime rounds what that weight is multiplied with.
        """
        decoder = Decoder(self.directory.config)
        decoder.load_weights(weights)
        other = copy.copy(self)
        other.model = LanguageModel(decoder.eval(), self.tokenizer)
        other.greedy = other._continued()
        other.logprobs = np.stack([other.row(ids) for ids in self.positions])
        other._rounded = rounded_activations(decoder, types)
        other.rounding = " and ".join(sorted({rounding.name for rounding in other._rounded.kinds}))
        if other.rounding:
            other.rounded_logprobs = np.stack([other.row(ids, rounded=True) for ids in self.positions])
        return other

    def row(self, ids: Sequence[int], rounded: bool = False) -> np.ndarray:
        """Log-probabilities of what follows `ids`: (vocabulary,)."""
        return self._rows(ids, rounded)[-1]

    def _rows(self, ids: Sequence[int], rounded: bool) -> np.ndarray:
        with self._rounded if rounded else contextlib.nullcontext():
            return log_softmax(self.model.logits(ids))

    def _continued(self) -> list[tuple[list[int], int, list[int]]]:
        # the last position of the context stays free: runtimes count it differently
        return [
            (ids, limit, self.model.generate_ids(ids, max_tokens=limit))
            for ids in self.prompts
            for limit in [min(self.length, self.context - len(ids) - 1)]
        ]

    def _plain(self) -> Iterator[tuple[str, list[int]]]:
        """What a user might write to be taken for the system: texts of special tokens, as ordinary text."""
        special = sorted(self.tokenizer.special_texts)[:_SPECIAL]
        texts = [text for token in special for text in (token, f"a{token}b", f" {token}\n{token}")]
        texts += [text for text in TEXTS if any(token in text for token in special)]
        yield from zip(texts, self.tokenizer.encode_plain(texts), strict=True)

    def _chats(self) -> Iterator[tuple[list[dict[str, str]], str]]:
        if not self.tokenizer.chat_template:
            return
        for messages in CONVERSATIONS:
            with contextlib.suppress(DataError):  # a template may refuse some, e.g. a system message
                yield list(messages), self.tokenizer.render_chat(list(messages))

    def choice_gaps(self, ids: list[int], chosen: list[int], limit: int, rounded: bool = False) -> np.ndarray:
        """How far below lexmill's first choice each chosen token lies, given all that came before it."""
        rows = self._rows(ids + chosen, rounded)[len(ids) - 1 :]
        gaps = rows.max(-1)[: len(chosen)] - rows[np.arange(len(chosen)), chosen]
        if len(chosen) < limit:  # it ended here: the best of the tokens that end a text was chosen
            gaps = np.append(gaps, rows[-1].max() - rows[-1][list(self.tokenizer.ids.stop)].max())
        return gaps


class Rounding(NamedTuple):
    """How llama.cpp rounds what it multiplies with weights of some type."""

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]


def _to_q8_0(values: torch.Tensor) -> torch.Tensor:
    """As ggml's quantize_row_q8_0 and back; rows that do not divide into blocks are f16, like their weights."""
    if values.shape[-1] % 32:
        return values.half().float()
    blocks = values.reshape(-1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return (torch.round(blocks * inverse) * (largest / 127).half().float()).reshape(values.shape)


def _to_q8_k(values: torch.Tensor) -> torch.Tensor:
    """As ggml's quantize_row_q8_K and back: blocks of 256, whose largest weight becomes -127; a float32 scale."""
    blocks = values.reshape(-1, 256)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(peak != 0, -127 / peak, torch.zeros_like(peak))
    scale = torch.where(peak != 0, 1 / inverse, torch.zeros_like(peak))
    return (torch.round(blocks * inverse) * scale).reshape(values.shape)


_BF16 = Rounding("BF16", lambda values: values.bfloat16().float())
_Q8_0, _Q8_K = Rounding("Q8_0", _to_q8_0), Rounding("Q8_K", _to_q8_k)
# By the type of the weights (ggml-cpu.c, `vec_dot_type`). It rounds for F16 as well, but imitating that brought
# the answers no nearer on a trained model, so nothing is said of it.
ROUNDING = {
    "BF16": _BF16,
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "MXFP4"), _Q8_0),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), _Q8_K),
}


# These meet blocks whose sum is rounded for itself and multiplied with the offsets of the weights: no rounding
# of activations alone does the same, so of a file with such weights nothing is said.
_SUMS_APART = ("Q4_1", "Q5_1")


def rounded_activations(network: torch.nn.Module, types: Mapping[str, str]) -> Rounded:
    """Within this block the input of every product with a weight of `network` is rounded as llama.cpp does.

    Args:
        types: the type of each weight in the file, by lexmill's names. With one that is not imitated
            nothing is rounded.
    """
    if any(kind in _SUMS_APART for kind in types.values()):
        return Rounded({}, None)
    found = {
        id(weight): ROUNDING[types[name]]
        for name, weight in network.named_parameters()
        if types.get(name) in ROUNDING
    }
    query = next((kind for name, kind in types.items() if name.endswith("attention.q.weight")), "")
    return Rounded(found, ROUNDING.get(query))


class Rounded(TorchFunctionMode):
    """Rounds inputs of products by the weight; `other` is for queries, keys and values, which are one product."""

    def __init__(self, by_weight: Mapping[int, Rounding], other: Rounding | None) -> None:
        super().__init__()
        self._by_weight, self._other = by_weight, other
        self.kinds = {*by_weight.values(), *([other] if other else [])}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            whole = isinstance(args[1], torch.nn.Parameter)
            rounding = self._by_weight.get(id(args[1])) if whole else self._other
            if rounding:
                args = (rounding.apply(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))
