"""What `verify` asks a running Ollama: prompts, counts of tokens, and greedy answers, over its HTTP API.

Ollama tells texts and no ids. Where a text differs from lexmill's it is followed token by token: it may part
from lexmill's only where lexmill itself finds the two next tokens as good as equally likely.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lexmill.formats.gguf import GGUFFile
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.llama_cpp import FILE_TYPES, export_gguf, file_weights
from lexmill.runtimes.llama_cpp_server import RuntimeFailure
from lexmill.runtimes.ollama_api import OllamaServer
from lexmill.runtimes.verify_cases import CONVERSATIONS, usable_texts
from lexmill.runtimes.verify_embeddings import EMBEDDING_TOLERANCES
from lexmill.runtimes.verify_report import Check, counted, short
from lexmill.runtimes.verify_wordpiece import LlamaWordPiece

if TYPE_CHECKING:
    from lexmill.inference.language_model import LanguageModel
    from lexmill.runtimes.verify_reference import Reference

# Ollama keeps keys and values in half precision and uses flash attention where it can, and nothing in its API
# changes that. Where llama.cpp rounds activations too, their rounding turns on such small differences. So two tokens
# may change places whose log-probabilities lexmill keeps this far apart. Measured with SmolLM2-135M in llama.cpp, its
# default settings against exact ones, as the largest change of a gap among the 20 best at 21 positions:
# 0.014 (f32), 0.038 (f16), 0.14 (bf16), 1.0 (q8_0).
TIES = {"f32": 0.02, "f16": 0.05, "bf16": 0.2, "q8_0": 1.2}
_PROBABLE = 20  # tokens that are looked at where a text parts from lexmill's


class OllamaComparison:
    """A model in a running Ollama against lexmill's; each method is one check.

    Args:
        told: the model's name in Ollama.
        reference: lexmill running the weights of the file's type.
        type: of the GGUF file, one of FILE_TYPES; "" for any other.
    """

    def __init__(
        self,
        name: str,
        server: OllamaServer,
        told: str,
        directory: ModelDirectory,
        reference: Reference,
        type: str,
    ) -> None:
        self.name, self.server, self.told = name, server, told
        self.reference, self.type = reference, type
        self.tokenizer, self.context = directory.tokenizer, directory.config.context
        self.system = str(server.show(told).get("system") or "")
        bos = self.tokenizer.ids.bos
        self._bos = self.tokenizer.token_text(bos) if self.tokenizer.ids.add_bos and bos is not None else ""

    def all(self) -> Iterator[Check]:
        """Every check, cheap ones first."""
        for check in (self.template, self.tokens, self.chat_tokens, self.greedy, self.chat):
            yield check()

    def template(self) -> Check:
        """The prompts of conversations, byte for byte. Only Ollama that can show them is asked."""
        chats = list(self._chats())
        if not chats:
            return Check(self.name, "chat template", None, detail="the model has no chat template")
        answers = [self.server.prompt(self.told, messages) for messages, _ in chats]
        if any(answer is None for answer in answers):
            detail = f"Ollama {self.server.version()} does not show its prompts; 'chat tokens' counts them"
            return Check(self.name, "chat template", None, detail=detail)
        cases = (
            (messages, text, str(answer).removeprefix(self._bos))
            for (messages, text), answer in zip(chats, answers, strict=True)
        )
        return counted(self.name, "chat template", cases, "conversations")

    def tokens(self) -> Check:
        """How many tokens texts are, without a template."""
        texts = usable_texts(self.tokenizer, self.context - 2)
        cases = (
            (text, len(ids), self.server.generate(self.told, text, 1, self.context).get("prompt_eval_count"))
            for text, ids in texts.items()
        )
        return counted(self.name, "tokens", cases, "counts of texts")

    def chat_tokens(self) -> Check:
        """How many tokens conversations are."""
        cases = (
            (
                messages,
                len(ids),
                self.server.chat(self.told, messages, 1, self.context).get("prompt_eval_count"),
            )
            for messages, text in self._chats()
            if len(ids := self.tokenizer.encode(text)) < self.context - 1
        )
        return counted(self.name, "chat tokens", cases, "counts of conversations")

    def greedy(self) -> Check:
        """Greedy continuations of raw prompts."""
        bos = len(self.reference.bos)
        cases = []
        for ids, limit, expected in self.reference.greedy:
            prompt = self.tokenizer.decode(ids[bos:])
            if self.tokenizer.encode(prompt) == ids:  # a prompt goes over as a text
                answer = self.server.generate(self.told, prompt, limit, self.context)
                cases.append((ids, limit, expected, str(answer.get("response", ""))))
        return self._texts("greedy", cases)

    def chat(self) -> Check:
        """Greedy replies in conversations."""
        cases = []
        for messages, text in list(self._chats())[:4]:
            ids = self.tokenizer.encode(text)
            limit = min(self.reference.length, self.context - len(ids) - 1)
            if limit > 0:
                answer = self.server.chat(self.told, messages, limit, self.context).get("message")
                expected = self.reference.model.generate_ids(ids, max_tokens=limit)
                content = answer.get("content", "") if isinstance(answer, dict) else ""
                cases.append((ids, limit, expected, str(content)))
        return self._texts("chat", cases)

    def _chats(self) -> Iterator[tuple[list[dict[str, str]], str]]:
        """Conversations, and the prompt that each should become; a BOS that llama.cpp adds is not in it."""
        known = {str(messages): text for messages, text in self.reference.chats}
        for messages in map(list, CONVERSATIONS):
            told = messages
            if self.system and messages[0]["role"] != "system":
                told = [{"role": "system", "content": self.system}, *messages]
            if str(messages) in known:
                text = known[str(messages)] if told is messages else self.tokenizer.render_chat(told)
                yield messages, text.removeprefix(self._bos)

    def _texts(self, check: str, cases: Sequence[tuple[list[int], int, list[int], str]]) -> Check:
        """Compare answers with lexmill's continuations: (prompt, limit, continuation, answer) each."""
        tie = TIES.get(self.type)
        if not cases:
            return Check(self.name, check, None, detail="the model has no prompts to ask for")
        if tie is None:
            return Check(self.name, check, None, detail="no tolerance is stated for this type of file")
        same = tied = wrong = 0
        largest, first = 0.0, ""
        for ids, limit, expected, answer in cases:
            ours = self._text(ids, expected)
            if ours == _plain(answer):
                same += 1
                continue
            gaps = self._follow(ids, limit, _plain(answer), tie)
            if gaps is None:
                wrong += 1
                first = (
                    first
                    or f"; after {short(self.tokenizer.decode(ids))}: lexmill {short(ours)}, here {short(answer)}"
                )
            else:
                tied, largest = tied + len(gaps), max(largest, *gaps, 0.0)
        detail = f"{same} of {len(cases)} texts identical"
        if tied:
            detail += (
                f", {len(cases) - same - wrong} but for ties: {tied} {'token' if tied == 1 else 'tokens'} where "
                f"lexmill's gap is at most {largest:.2g} (allowed {tie:g})"
            )
        return Check(self.name, check, wrong == 0, wrong, 0, detail + first, ties=tied)

    def _text(self, ids: list[int], answer: Sequence[int]) -> str:
        """What an answer adds to the text of its prompt, half a character at its end left out."""
        before = self.tokenizer.decode(ids, skip_special=True)
        return _plain(self.tokenizer.decode([*ids, *answer], skip_special=True)[len(before) :])

    def _follow(self, ids: list[int], limit: int, text: str, tie: float) -> list[float] | None:
        """Write `text` with tokens that lexmill likes best, or nearly: the gaps where it took another.

        Returns:
            None where it cannot be written so.
        """
        written: list[int] = []
        gaps: list[float] = []
        stop = set(self.tokenizer.ids.stop)
        for _ in range(limit):
            row = self.reference.row([*ids, *written])
            likely = [int(token) for token in np.argsort(-row)[:_PROBABLE]]
            ended = self._text(ids, written) == text
            fits = (
                token
                for token in likely
                if (ended if token in stop else text.startswith(self._text(ids, [*written, token])))
            )
            token = next(fits, None)
            if token is None or row[likely[0]] - row[token] > tie:
                return None
            if token != likely[0]:
                gaps.append(float(row[likely[0]] - row[token]))
            if token in stop:
                return gaps
            written.append(token)
        return gaps if self._text(ids, written) == text else None


def _plain(text: str) -> str:
    """A text whose bytes that are no character are told apart neither by their number nor at its end."""
    return re.sub("\ufffd+", "\ufffd", text).rstrip("\ufffd")


def compare_ollama(
    name: str,
    server: OllamaServer,
    told: str,
    directory: ModelDirectory,
    model: LanguageModel,
    reference: Reference | None,
) -> Iterator[Check]:
    """All checks of a model in a running Ollama.

    A file of lower precision holds other weights than the model. lexmill then runs what its own file of that
    type would hold.

    Raises:
        RuntimeFailure: the server is not there, does not know the model, or breaks off.
    """
    type = file_type(server.show(told))
    if directory.config.shape == "encoder":
        yield from _compare_vectors(name, server, told, model, type)
        return
    if reference is None:
        raise RuntimeFailure(f"{directory.path}: a model without a tokenizer cannot be asked over texts.")
    if type not in ("", "f32"):
        with tempfile.TemporaryDirectory() as folder:
            path = export_gguf(directory, Path(folder) / "model.gguf", type)
            with GGUFFile.open(path) as file:
                reference = reference.with_weights(file_weights(file, directory), {}, {})
    yield from OllamaComparison(name, server, told, directory, reference, type).all()


def file_type(shown: dict[str, Any]) -> str:
    """The type of a model's GGUF file, one of FILE_TYPES or "", from what `/api/show` says."""
    info = shown.get("model_info")
    number = info.get("general.file_type") if isinstance(info, dict) else None
    return next((type for type, known in FILE_TYPES.items() if known == number), "")


def _compare_vectors(
    name: str, server: OllamaServer, told: str, model: LanguageModel, type: str
) -> Iterator[Check]:
    """Counts of tokens, and vectors by their direction: Ollama makes each of length one."""
    texts = usable_texts(model.tokenizer, model.config.context - 2)
    answers = [server.embed(told, [text]) for text in texts]
    counts = [answer.get("prompt_eval_count") for answer in answers]
    limit = LlamaWordPiece(model.tokenizer)  # Ollama runs llama.cpp
    foretold = [limit.encode(text) for text in texts]
    rows = list(zip(texts.items(), counts, foretold, strict=True))
    limited = [text for (text, ids), count, other in rows if count != len(ids) and count == len(other)]
    cases = ((text, len(ids), count) for (text, ids), count, _ in rows if text not in limited)
    check = counted(name, "tokens", cases, "counts of texts", len(limited))
    yield replace(check, limits=limit.reasons(limited, f"{len(texts)} texts"))
    # a text that is divided otherwise has another vector; `tokens` says so
    same = [at for at, ((_, ids), count, other) in enumerate(rows) if count == len(ids) and other == ids]
    if not same:
        yield Check(name, "embeddings", None, detail="no text has as many tokens here as in lexmill")
        return
    ours = model.embed([list(texts)[at] for at in same], normalise=True).astype(np.float64)
    theirs = np.array([answers[at]["embeddings"][0] for at in same], np.float64)
    if ours.shape != theirs.shape:
        yield Check(
            name, "embeddings", False, detail=f"lexmill gives the shape {ours.shape}, Ollama {theirs.shape}"
        )
        return
    apart = 1 - (ours * theirs).sum(-1) / np.linalg.norm(theirs, axis=-1)
    figure, tolerance = float(np.max(apart)), EMBEDDING_TOLERANCES.get(type)
    detail = f"{len(apart)} texts: 1 - cosine at most {figure:.2g}"
    if tolerance is None:
        yield Check(
            name, "embeddings", None, detail=f"{detail}; no tolerance is stated for this type of file"
        )
    else:
        yield Check(name, "embeddings", bool(figure <= tolerance), figure, tolerance, detail)
