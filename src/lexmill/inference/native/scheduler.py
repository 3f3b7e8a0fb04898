"""Many texts in one engine: who comes next, in steps of a few hundred tokens at most (Yu et al. 2022, "Orca").

Prompts are read in chunks between the steps in which all running texts get their next token, so that nobody waits
long. Texts come and go at any time and from any thread. When pages run out, the youngest text gives back its own
and is computed again later. Nothing of this changes a single bit of what is written: see `Batch`.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lexmill.errors import ConfigError, LexmillError, ModelError
from lexmill.inference.generation import GenerationConfig, Step, Writing
from lexmill.inference.native.interface import BLOCK, CHUNK, NO_PAGE, Batch, Engine
from lexmill.inference.native.pages import OutOfPages, PageStore, Table
from lexmill.inference.native.speculation import Drafter, Pace, PromptLookup, Speculation
from lexmill.tokenizer.tokenizer import Tokenizer

_SLACK = (
    3  # pages that stay free for each running text when another one comes, or it would soon have to go again
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a scheduler takes on."""

    rows: int = 64  # texts that are computed at once
    waiting: int = 4096  # texts that wait for their turn

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= CHUNK:
            raise ConfigError(f"'rows' must be from 1 to {CHUNK}, but is {self.rows}.")


@dataclass(frozen=True)
class _Part:
    """Tokens `start` to `end` of a text in one batch, with guesses behind them; `wanted`: logits are asked for."""

    text: Text
    start: int
    end: int
    guesses: Sequence[int] = ()
    wanted: bool = True


class Text:
    """One text being written: an iterator of `Step`s, which ends itself, or by `cancel`."""

    def __init__(
        self, scheduler: Scheduler, number: int, writing: Writing, source: Sequence[int] | None
    ) -> None:
        self.number, self.writing, self.source = number, writing, source  # the lower number is the older text
        self.table = Table(scheduler.store)
        self.done = 0  # tokens whose keys and values are there
        self.memory: int | None = None
        self.speculation: Speculation | None = None
        self.cancelled = False
        self._scheduler = scheduler
        self._steps: deque[Step] = deque()
        self._error: Exception | None = None
        self._closed = False

    @property
    def reads(self) -> bool:
        """Whether its prompt is still being read."""
        return self.done < self.writing.given

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step; whoever waits for it computes meanwhile, for all.

        Raises:
            StopIteration: the text has ended.
            Exception: what the engine raised.
        """
        self._scheduler._work_until(lambda: bool(self._steps or self._closed))
        if self._steps:
            return self._steps.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def cancel(self) -> None:
        """End it where it is. From any thread; a second time does nothing."""
        self._scheduler._cancel(self)

    def push(self, steps: Sequence[Step]) -> None:
        """Hand out what was written."""
        self._steps.extend(steps)

    close = cancel  # what `yield from` calls when its generator is closed

    def finish(self, error: Exception | None = None) -> None:
        """No more steps come."""
        self._error, self._closed = error, True


class Scheduler:
    """Shares an engine among texts. Every public method may be called from any thread.

    Args:
        engine: nobody else uses its pages.
        drafter: makes what guesses ahead for each text; None: nothing does. May be changed between texts.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        drafter: Callable[[], Drafter] | None = PromptLookup,
    ) -> None:
        self.engine, self.limits = engine, limits or Limits()
        self.store, self.pace = PageStore(engine.pages), Pace()
        self.context = min(engine.context, engine.pages * BLOCK)
        self.drafter = drafter
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._busy = False  # somebody computes; only that thread touches what stands below
        self._coming: deque[Text] = deque()  # this, and `cancelled`, are guarded by `_changed`
        self._waiting: list[Text] = []  # the oldest first
        self._running: list[Text] = []  # the oldest first
        self._turn = 0

    def submit(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        source: Sequence[int] | None = None,
    ) -> Text:
        """Begin to write behind a prompt.

        Args:
            prompt: at least one id.
            source: what an encoder–decoder reads first.

        Raises:
            ModelError: the prompt does not fit, or too many texts wait.
            ConfigError, MissingPackageError: see `Writing`.
        """
        if len(prompt) >= self.context:
            raise ModelError(
                f"The prompt has {len(prompt):,} tokens, but there is room for {self.context:,}.",
                "Shorten the prompt.",
            )
        writing = Writing(tokenizer, prompt, config, self.context)
        text = Text(self, next(self._numbers), writing, source)
        with self._changed:
            if len(self._coming) + len(self._waiting) >= self.limits.waiting:
                raise ModelError(f"{self.limits.waiting:,} texts wait already.", "Try again later.")
            self._coming.append(text)
        return text

    def stream(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        source: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """The same as a generator that cancels the text when it is closed."""
        text = self.submit(tokenizer, prompt, config, source=source)
        try:
            yield from text
        finally:
            text.cancel()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """The engine and the pages for oneself, between two steps."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._busy = True
        try:
            yield
        finally:
            self._release()

    def close(self) -> None:
        """End all texts and free the engine."""
        with self.exclusive():
            for text in [*self._take_in(), *self._waiting, *self._running]:
                self._end(text)
            self._waiting, self._running = [], []
            self.engine.close()

    def _work_until(self, ready: Callable[[], bool]) -> None:
        """Compute steps until something is ready, or wait while another thread does."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: ready() or not self._busy)
                if ready():
                    return
                self._busy = True
            try:
                self._step()
            finally:
                self._release()

    def _release(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _cancel(self, text: Text) -> None:
        with self._changed:
            if text._closed or text.cancelled:
                return
            text.cancelled = True
            if self._busy:
                return  # whoever computes sees it
            self._busy = True
        try:
            self._drop_cancelled()
        finally:
            self._release()

    # What follows runs in one thread at a time.

    def _step(self) -> None:
        """One chunk of prompts, then the next token of all running texts."""
        try:
            self._waiting += self._take_in()
            self._drop_cancelled()
            self._admit()
            computed = self._compute(self._prompt_parts(), prompt=True)
            computed += self._compute(self._written_parts(), prompt=False)
            if not computed and self._running:  # others than texts hold the pages
                self._fail(self._running[0], _no_room())
        except Exception as error:  # a broken engine ends all texts, and each of them says why
            for text in [*self._waiting, *self._running]:
                self._end(text, error)
            self._waiting, self._running = [], []

    def _take_in(self) -> list[Text]:
        with self._changed:
            found = list(self._coming)
            self._coming.clear()
        return found

    def _drop_cancelled(self) -> None:
        self._waiting += self._take_in()
        for text in [*self._waiting, *self._running]:
            if text.cancelled:
                self._end(text)
        self._waiting = [text for text in self._waiting if not text._closed]
        self._running = [text for text in self._running if not text._closed]

    def _admit(self) -> None:
        """Let waiting texts in, the oldest first, as far as pages last."""
        while self._waiting and len(self._running) < self.limits.rows:
            text = self._waiting[0]
            ids = text.writing.ids
            if text.writing.ended:  # no token was asked for
                self._waiting.pop(0)
                self._finish(text)
                continue
            if text.source is None:
                text.done = text.table.begin_with(ids[: text.writing.given])
            missing = text.table.missing(text.done, len(ids) + 1)
            problem: LexmillError | None = None
            if missing + _SLACK * len(self._running) > self.store.available:
                problem = _no_room()
            elif text.source is not None and text.memory is None:
                try:
                    text.memory = self.engine.remember([text.source])[0]
                except LexmillError as error:  # no room for what it reads, or a text that does not fit at all
                    problem = error
            if problem is not None:
                text.table.free()
                text.done = 0
                if self._running:
                    return  # others end some time
                self._waiting.pop(0)
                self._end(text, problem)
                continue
            if self.drafter is not None and text.speculation is None:
                text.speculation = Speculation(self.drafter(), self.pace)
            self._waiting.pop(0)
            bisect.insort(self._running, text, key=lambda one: one.number)

    def _prompt_parts(self) -> list[_Part]:
        """A chunk of the prompts that are being read; each text is the first in turn."""
        reading = [text for text in self._running if text.reads]
        self._turn += 1
        first = self._turn % max(len(reading), 1)
        parts: list[_Part] = []
        room = CHUNK
        for text in reading[first:] + reading[:first]:
            if text not in self._running:
                continue  # it gave back its pages
            given = text.writing.given
            if text.source is None and text.done == BLOCK * len(text.table.pages):
                text.done = text.table.begin_with(text.writing.ids[:given]) or text.done  # another read it
            end = min(given, text.done + room)
            if end == text.done or not self._reserve(text, end, parts):
                continue
            room -= end - text.done
            wanted = end == given == len(text.writing.ids)
            parts.append(_Part(text, text.done, end, wanted=wanted))
        return parts

    def _written_parts(self) -> list[_Part]:
        """The last token of each running text with guesses behind it, or what has to be computed again."""
        parts: list[_Part] = []
        writers = [text for text in self._running if not text.reads]
        room = CHUNK - len(writers)  # beside one token for each
        for text in writers:
            if text not in self._running:
                continue  # it gave back its pages
            ids = text.writing.ids
            end = min(len(ids), text.done + 1 + room)
            guesses = self._guesses(text, len(writers), room) if end == len(ids) else []
            if guesses and text.table.missing(text.done, end + len(guesses)) > self.store.available:
                guesses = []
            if self._reserve(text, end + len(guesses), parts):
                room -= end + len(guesses) - text.done - 1
                parts.append(_Part(text, text.done, end, guesses, wanted=end == len(ids)))
        return parts

    def _guesses(self, text: Text, rows: int, room: int) -> list[int]:
        """Up to `room` tokens that may follow; what a form makes certain comes first."""
        writing = text.writing
        most = min(room, writing.room - 1, self.context - len(writing.ids) - 1)
        if most < 1 or text.speculation is None:
            return []
        if writing.constraint is not None:
            forced = writing.constraint.forced()[:most]
            if forced:
                return forced
        found = text.speculation.propose(writing.ids, most, rows)
        if found and writing.constraint is not None:
            found = found[: writing.constraint.fitting(found)]
        return found

    def _reserve(self, text: Text, end: int, parts: Sequence[_Part]) -> bool:
        """Pages for a text up to `end`; younger texts that are not in this batch give back theirs."""
        while True:
            try:
                self.engine.copy_pages(text.table.reserve(text.done, end))
                return True
            except OutOfPages as error:
                self.engine.copy_pages(error.copies)
            taken = {part.text for part in parts}
            younger = [one for one in self._running if one.number > text.number and one not in taken]
            if not younger:
                return False
            self._give_back(younger[-1])

    def _give_back(self, text: Text) -> None:
        """A text waits again, and is computed again when its turn comes."""
        text.table.free()
        text.done = 0
        self._running.remove(text)
        bisect.insort(self._waiting, text, key=lambda one: one.number)

    def _compute(self, parts: Sequence[_Part], *, prompt: bool) -> int:
        """Compute parts of texts in one batch, and take the tokens that follow; how many parts."""
        if not parts:
            return 0
        batch = _batch(parts, prompt)
        begun = time.perf_counter()
        logits = self.engine.forward(batch)
        if not prompt:
            self.pace.measured(len(batch.tokens), time.perf_counter() - begun)
        at = 0
        for part in parts:
            text = part.text
            count = 1 + len(part.guesses) if part.wanted else 0
            text.done = part.end
            if prompt and text.source is None:
                text.table.share(text.writing.ids[: text.writing.given], text.done)
            if part.wanted:
                self._take(part, logits[at : at + count])
            at += count
        return len(parts)

    def _take(self, part: _Part, logits: np.ndarray) -> None:
        """Choose tokens as far as the guesses hold."""
        text, writing, kept = part.text, part.text.writing, 0
        try:
            while True:
                text.push(writing.take(logits[kept]))
                if writing.ended or kept == len(part.guesses) or writing.ids[-1] != part.guesses[kept]:
                    break
                kept += 1
        except Exception as error:  # this text's own, such as a form that cannot go on
            self._fail(text, error)
            return
        text.done = part.end + kept
        if text.speculation and part.guesses:
            text.speculation.learn(kept)
        if writing.ended:
            self._running.remove(text)
            self._finish(text)

    def _finish(self, text: Text) -> None:
        text.push(text.writing.rest())
        self._end(text)

    def _fail(self, text: Text, error: Exception) -> None:
        self._running.remove(text)
        self._end(text, error)

    def _end(self, text: Text, error: Exception | None = None) -> None:
        text.table.free()
        if text.speculation is not None:
            text.speculation.close()
        if text.memory is not None:
            self.engine.forget([text.memory])
            text.memory = None
        text.finish(error)


def _batch(parts: Sequence[_Part], prompt: bool) -> Batch:
    tokens: list[int] = []
    wanted: list[int] = []
    for part in parts:
        tokens += part.text.writing.ids[part.start : part.end]
        if part.wanted:
            wanted += range(len(tokens) - 1, len(tokens) + len(part.guesses))
        tokens += part.guesses
    sizes = [part.end + len(part.guesses) - part.start for part in parts]
    tables = np.full((len(parts), max(len(part.text.table.pages) for part in parts)), NO_PAGE, np.int32)
    for row, part in enumerate(parts):
        tables[row, : len(part.text.table.pages)] = part.text.table.pages
    memory = [part.text.memory for part in parts]
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.concatenate(
            [np.arange(part.start, part.start + size, dtype=np.int32) for part, size in zip(parts, sizes)]
        ),
        rows=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        tables=tables,
        wanted=np.array(wanted, np.int32),
        prompt=prompt,
        memory=None if memory[0] is None else np.array(memory, np.int32),
    )


def _no_room() -> ModelError:
    return ModelError(
        "There is no room for the keys and values of another text.",
        "Wait until others are done, or load the model with more pages.",
    )
