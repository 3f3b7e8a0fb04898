"""Chat templates for Ollama: a Go template for a model's Jinja template, learnt by asking and then proven.

Most chat templates write each turn as some text, the content, and some more text. What stands between
contents is found by rendering conversations of known contents; the Go template made of it counts only if
it renders what the Jinja template renders for a battery of conversations. No list of models is kept.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lexmill.errors import DataError
from lexmill.messages import ROLES
from lexmill.tokenizer.special import CHAT_TEMPLATE, GO_TEMPLATE
from lexmill.tokenizer.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

_START, _REPLY = "start", "reply"  # stand for roles, before the first turn and where the reply begins

# What fills the battery's turns. Each must come out as it went in, its spaces included.
_CONTENTS = (
    "Hello",
    "",
    "  spaces around  ",
    "\nlines\n\nand lines\n",
    "{{ .Content }} {{- end }} {% if x %}",
    "<|im_end|>\n<|im_start|>system\nObey </s> [INST] <b>&amp;</b>",
    "\"double\" 'single' `back` \\ \\n %s",
    "naïve 中文 العربية 👩‍🚀 \u00a0\u2028",
)


def collate(messages: Messages) -> list[dict[str, str]]:
    """The conversation that Ollama's templates see: turns of one role in a row become one, with a blank line.

    Tool messages stay apart. No template can undo this (Ollama, template/template.go, collate).
    """
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"] != "tool":
            collated[-1]["content"] += "\n\n" + message["content"]
        else:
            collated.append({"role": message["role"], "content": message["content"]})
    return collated


@dataclass(frozen=True)
class Turns:
    """How a chat template writes conversations.

    Attributes:
        system_first: what begins a text whose first turn is a system prompt.
        other_first: what begins any other; a default system prompt stands here.
        before, after: what surrounds a turn's content, by role; a role that is missing is not written.
        group: what surrounds a run of tool messages.
        reply: what opens the reply.
    """

    system_first: str
    other_first: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    reply: str
    group: tuple[str, str] = field(default=("", ""))

    def render(self, messages: Messages) -> str:
        """The prompt of a conversation in which no two turns in a row but tools' have the same role."""
        texts = [self.system_first if messages[0]["role"] == "system" else self.other_first]
        opening, closing = self.group
        in_group = False
        for message in messages:
            role = message["role"]
            if in_group != (role == "tool"):
                texts.append(closing if in_group else opening)
                in_group = not in_group
            if role in self.before:
                texts += [self.before[role], message["content"], self.after[role]]
        return "".join([*texts, closing if in_group else "", self.reply])

    def go(self) -> str:
        """The same as a template for Ollama."""
        begin, each, first, end = _literal(self.other_first), ".Messages", "", ""
        if self.system_first != self.other_first:
            begin, each = "", "$i, $_ := .Messages"
            first = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_literal(self.other_first)}{{{{ end }}}}'
            if self.system_first:
                with_system = _literal(self.system_first)
                first = f'{{{{ if and (eq $i 0) (eq .Role "system") }}}}{with_system}{{{{ end }}}}{first}'
        if self.group != ("", ""):
            opening, closing = map(_literal, self.group)
            begin += "{{ $tools := false }}"
            first += (
                f'{{{{ if ne $tools (eq .Role "tool") }}}}{{{{ if $tools }}}}{closing}{{{{ else }}}}{opening}'
                '{{ end }}{{ $tools = eq .Role "tool" }}{{ end }}'
            )
            end = f"{{{{ if $tools }}}}{closing}{{{{ end }}}}"
        opens = f"{begin}{{{{ range {each} }}}}" if begin else f"{{{{- range {each} }}}}"
        return f"{opens}{first}{self._go_turn()}{{{{ end }}}}{end}{_literal(self.reply)}"

    def _go_turn(self) -> str:
        pattern = self._pattern()
        if pattern is not None:
            start, middle, after = pattern
            return f"{_literal(start)}{{{{ .Role }}}}{_literal(middle)}{{{{ .Content }}}}{_literal(after)}"
        branches = [
            f'{{{{ {"if" if at == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.after[role])}"
            for at, role in enumerate(self.before)
        ]
        return "".join(branches) + "{{ end }}"

    def _pattern(self) -> tuple[str, str, str] | None:
        """What stands before the role's name, between it and the content, and after, if all roles agree."""
        if set(self.before) != set(ROLES) or len(set(self.after.values())) != 1:
            return None
        start, found, middle = self.before["user"].partition("user")
        if found and all(text == start + role + middle for role, text in self.before.items()):
            return start, middle, self.after["user"]
        return None


def _literal(text: str) -> str:
    """Text in a Go template; braces go into a string, so that none of them opens an action."""
    if "{" not in text:
        return text
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


@dataclass(frozen=True)
class GoForm:
    """A Go template that was found for a model, or the reason why there is none."""

    template: str = ""
    refusal: str = ""


def find_go_template(tokenizer: Tokenizer) -> GoForm:
    """Find a Go template that renders what a tokenizer's Jinja template renders, in every shape of conversation.

    A BOS that the tokenizer adds itself is left out: llama.cpp adds it too, and it would stand there twice.
    """
    source = tokenizer.chat_template
    if not source:
        return GoForm(refusal="no chat template")
    if source == CHAT_TEMPLATE:
        return GoForm(GO_TEMPLATE)
    if "strftime" in source:
        return GoForm(refusal="a chat template of its own, which asks for the date")
    bos = tokenizer.ids.bos
    added = tokenizer.token_text(bos) if tokenizer.ids.add_bos and bos is not None else ""

    def render(messages: Messages) -> str | None:
        try:
            return tokenizer.render_chat([dict(message) for message in messages]).removeprefix(added)
        except DataError:  # the template refuses such a conversation; there is nothing to be equal to
            return None

    # of several divisions that say the same, one that does not cut a special token in two
    whole = ("\n", *tokenizer.special_texts)
    ways = sorted(
        _learn(render), key=lambda turns: bool(turns.other_first) and not turns.other_first.endswith(whole)
    )
    refusal = "a chat template of its own, which does more than put texts around contents"
    for turns in ways:
        different = next(_differences(turns, render), None)
        if different is None:
            return GoForm(turns.go())
        roles = ", ".join(message["role"] for message in different)
        refusal = f"a chat template of its own, and no Go template was found that writes the turns {roles} as it does"
    return GoForm(refusal=refusal)


def _differences(turns: Turns, render: Callable[[Messages], str | None]) -> Iterator[Messages]:
    """Conversations of the battery that come out differently."""
    for messages in battery():
        expected = render(messages)
        if expected is not None and turns.render(messages) != expected:
            yield messages


def battery() -> Iterator[list[dict[str, str]]]:
    """Every order of up to four roles that Ollama can hand to a template, each with two sets of contents."""
    contents = itertools.cycle(_CONTENTS)
    for length in range(1, 5):
        for roles in itertools.product(ROLES, repeat=length):
            if any(left == right != "tool" for left, right in itertools.pairwise(roles)):
                continue
            for _ in range(2):
                yield [{"role": role, "content": next(contents)} for role in roles]
                next(contents)  # so that a role meets other contents in the next conversation


def _learn(render: Callable[[Messages], str | None]) -> Iterator[Turns]:
    """Ways to divide what stands between contents into what follows one and what precedes the next."""
    gaps = _gaps(render)
    try:
        to_user, to_assistant = gaps[_START, "user"], gaps["user", "assistant"]
        asks, asks_again = gaps["user", _REPLY], gaps["assistant", _REPLY]
        back = gaps["assistant", "user"]
    except KeyError:
        return
    for size in range(len(asks) + 1):
        after_user = asks[:size]
        if not to_assistant.startswith(after_user):
            return
        reply, assistant = asks[size:], to_assistant[size:]
        after_assistant = _without_end(asks_again, reply)
        user = _without_start(back, after_assistant)
        first = _without_end(to_user, user)
        if first is None or user is None or after_assistant is None:
            continue
        before = {"user": user, "assistant": assistant}
        after = {"user": after_user, "assistant": after_assistant}
        system_first = _add_system(gaps, before, after)
        group = _add_tools(gaps, before, after)
        if system_first is not None and group is not None:
            order = {role: before[role] for role in ROLES if role in before}
            yield Turns(system_first, first, order, after, reply, group)


def _add_system(
    gaps: Mapping[tuple[str, str], str], before: dict[str, str], after: dict[str, str]
) -> str | None:
    """Learn how system turns are written; gives what begins a text with one, None where it does not fit."""
    if (_START, "system") not in gaps or ("system", "user") not in gaps:
        return ""
    begins, later = gaps[_START, "system"], gaps.get(("user", "system"))
    system = begins if later is None else _without_start(later, after["user"])
    ends = _without_end(gaps["system", "user"], before["user"])
    if system is None or ends is None:
        return None
    before["system"], after["system"] = system, ends
    return _without_end(begins, system)


def _add_tools(
    gaps: Mapping[tuple[str, str], str], before: dict[str, str], after: dict[str, str]
) -> tuple[str, str] | None:
    """Learn how tools' answers are written; gives what surrounds a run of them, None where it does not fit."""
    if any(pair not in gaps for pair in (("user", "tool"), ("tool", "assistant"), ("tool", "tool"))):
        return "", ""
    opens = _without_start(gaps["user", "tool"], after["user"])
    closes = _without_end(gaps["tool", "assistant"], before["assistant"])
    between = gaps["tool", "tool"]
    if opens is None or closes is None:
        return None
    for size in range(len(between) + 1):
        ends, begins = between[:size], between[size:]
        if closes.startswith(ends) and opens.endswith(begins):
            before["tool"], after["tool"] = begins, ends
            return opens[: len(opens) - len(begins)], closes[size:]
    return None


_PROBES = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("user", "system", "user"),
    ("user", "tool", "assistant"),
    ("user", "tool", "tool", "assistant"),
)


def _gaps(render: Callable[[Messages], str | None]) -> dict[tuple[str, str], str]:
    """What stands between the contents of two roles, wherever a conversation with both is rendered whole."""
    found: dict[tuple[str, str], str] = {}
    for roles in _PROBES:
        marks = [f"Qz{number}xW" for number in range(len(roles))]
        text = render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        if text is None or any(text.count(mark) != 1 for mark in marks):
            continue
        pairs = itertools.pairwise((_START, *roles, _REPLY))
        for pair, mark in zip(pairs, [*marks, ""], strict=True):
            between, _, text = text.partition(mark) if mark else (text, "", "")
            found.setdefault(pair, between)
    return found


def _without_end(text: str, end: str | None) -> str | None:
    return text[: len(text) - len(end)] if end is not None and text.endswith(end) else None


def _without_start(text: str, start: str | None) -> str | None:
    return text[len(start) :] if start is not None and text.startswith(start) else None
