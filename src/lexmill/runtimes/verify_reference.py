"""lexmill's own answers to what `verify` asks: of the model, and of a GGUF file's weights.

A file of lower precision holds other weights than the model. What they change is the file's, and what
llama.cpp makes of them is llama.cpp's: so a file is compared with lexmill running that file's weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lexmill.errors import DataError
from lexmill.inference.language_model import LanguageModel
from lexmill.inference.sampling import log_softmax
from lexmill.model.build import build_loaded
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.verify_cases import CONVERSATIONS, TEXTS
from lexmill.runtimes.verify_rounding import Rounded
from lexmill.runtimes.verify_stress import Stress
from lexmill.runtimes.verify_tolerances import Answers, Noise

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
        spread: the greatest change of a log-probability when the inputs of products move by their last bit.
        noise: what that rounding costs, by lexmill's own account; None where nothing rounds.
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
        self.noise: Noise | None = None
        self.length = tokens
        self._rounded: Rounded | None = None
        self._in_bf16: Rounded | None = None
        self.greedy = self._continued()
        self._texts = [(len(ids), ids + answer) for ids, _, answer in self.greedy]
        self.positions = [ids[:end] for begin, ids in self._texts for end in _ends(begin, ids)]
        self._unrounded = self._answers()
        self.logprobs = self._unrounded.logprobs
        shaken = self._answers(Rounded(model.network, {}, {}).shaken()).logprobs
        self.spread = float(np.abs(self.logprobs - shaken).max())

    def with_weights(
        self,
        weights: Mapping[str, np.ndarray],
        types: Mapping[str, str],
        offsets: Mapping[str, np.ndarray],
    ) -> Reference:
        """The same questions answered by the same model with other weights.

        Args:
            weights: every weight by lexmill's name.
            types: the type that a weight has in the file, "Q8_0" and so on, by the same names; it decides how
                the runtime rounds what that weight is multiplied with.
            offsets: of the weights' blocks, where their type has them: (rows, blocks).
        """
        decoder = build_loaded(self.directory.config, weights)
        other = copy.copy(self)
        other.model = LanguageModel(decoder.eval(), self.tokenizer)
        other.greedy = other._continued()
        other._unrounded = other._answers()
        other.logprobs = other._unrounded.logprobs
        other._rounded = Rounded(decoder, types, offsets)
        other.rounding = " and ".join(other._rounded.names)
        if other.rounding:
            other.noise, rounded = other._noise_of(other._rounded)
            other.rounded_logprobs = rounded.logprobs
            other._in_bf16 = Rounded(decoder, types, offsets, in_bf16=True)
        return other

    def noise_in_bf16(self) -> Noise:
        """What it costs to multiply in bfloat16, in attention too, with weights that are not float32."""
        assert self._in_bf16 is not None
        return self._noise_of(self._in_bf16)[0]

    def _noise_of(self, rounded: Rounded) -> tuple[Noise, Answers]:
        """What a rounding costs, and the answers with it."""
        plain = self._unrounded
        found = self._answers(rounded, plain.best)
        return Noise.between(plain, found, self._answers(rounded.shaken(), plain.best)), found

    def row(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probabilities of what follows `ids`: (vocabulary,)."""
        return self._rows(ids)[-1]

    def _rows(self, ids: Sequence[int], within: Rounded | None = None) -> np.ndarray:
        with within or contextlib.nullcontext():
            return log_softmax(self.model.logits(ids))

    def _answers(self, within: Rounded | None = None, best: np.ndarray | None = None) -> Answers:
        """Every text is read once; `best` as in `Answers`, where it is known already."""
        at_positions, two, pairs, done = [], [], [], 0
        for begin, ids in self._texts:
            rows = self._rows(ids, within)
            at_positions.append(rows[np.array(_ends(begin, ids)) - 1])
            two.append(np.argsort(-rows, -1)[:, :2] if best is None else best[done : done + len(rows)])
            pairs.append(np.take_along_axis(rows, two[-1], -1))
            done += len(rows)
        return Answers(*map(np.concatenate, (at_positions, two, pairs)))

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
        rows = self._rows(ids + chosen, self._rounded if rounded else None)[len(ids) - 1 :]
        gaps = rows.max(-1)[: len(chosen)] - rows[np.arange(len(chosen)), chosen]
        if len(chosen) < limit:  # it ended here: the best of the tokens that end a text was chosen
            gaps = np.append(gaps, rows[-1].max() - rows[-1][list(self.tokenizer.ids.stop)].max())
        return gaps


def _ends(begin: int, ids: Sequence[int]) -> list[int]:
    """Where a text of a prompt, `begin` tokens long, and its continuation is cut off to ask what follows."""
    return sorted({1, (begin + 1) // 2, *range(begin, len(ids) + 1, _EVERY)})
