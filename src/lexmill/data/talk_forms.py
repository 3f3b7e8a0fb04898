"""Forms of rows that are talk: OpenAI's messages, Alpaca, ShareGPT, prompt and completion, chosen and rejected."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.data.fields import Fields
from lexmill.data.labelled import Conversation, Message, Preference, TextPair
from lexmill.errors import DataError
from lexmill.messages import check_messages, kind_of

_OTHER_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's newest and oldest names
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_ORDER = (
    "A conversation may begin with one system message; then users and the assistant take turns, and what tools "
    "say stands behind the assistant's message that asked them."
)
_MAY_FOLLOW = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def conversation(fields: Fields) -> Conversation:
    """{"messages": [{"role", "content"}, …]} as OpenAI's interfaces have them."""
    messages = _messages(fields, fields.get("messages"), "messages")
    return Conversation(origin=fields.where, messages=_with_targets(fields, messages))


def sharegpt(fields: Fields) -> Conversation:
    """{"conversations": [{"from": "human", "value": …}, …]}, with a "system" beside it if there is one."""
    turns = fields.get("conversations")
    if not isinstance(turns, (list, tuple)):
        raise fields.error("conversations", f"is {kind_of(turns)}, not a list")
    renamed = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            role = turn["from"]
            role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
            rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
            turn = {"role": role, "content": turn.get("value"), **rest}
        renamed.append(turn)
    messages = _system(fields) + _messages(fields, renamed, "conversations")
    return Conversation(origin=fields.where, messages=_with_targets(fields, messages))


def alpaca(fields: Fields) -> Conversation:
    """{"instruction", "input", "output"}, with "system" and "history" (pairs of question and reply) if given.

    The input stands under the instruction, with an empty line between.
    """
    asked = fields.text("instruction")
    more = fields.text_or_none("input")
    messages = _system(fields)
    for number, turn in enumerate(fields.get("history") or (), 1):
        if not (
            isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(said, str) for said in turn)
        ):
            raise fields.error("history", f"has an entry, number {number:,}, that is no pair of two strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": f"{asked}\n\n{more}" if more else asked})
    messages.append({"role": "assistant", "content": fields.text("output")})
    return Conversation(origin=fields.where, messages=_with_targets(fields, messages))


def completed_prompt(fields: Fields) -> Conversation:
    """{"prompt", "completion"}, strings or lists of messages; of lists only the completion is learned."""
    messages = _prompt(fields)
    completion = fields.get("completion")
    if isinstance(completion, (list, tuple)):
        added = _messages(fields, completion, "completion")
    else:
        added = [{"role": "assistant", "content": fields.text("completion")}]
    messages = [
        {**message, "weight": "0"} if message["role"] == "assistant" else message for message in messages
    ] + added
    return Conversation(origin=fields.where, messages=_with_targets(fields, messages))


def prompt_pair(fields: Fields) -> TextPair:
    """{"prompt", "completion"} as a text and what is to be written of it."""
    return TextPair(origin=fields.where, source=fields.text("prompt"), targets=(fields.text("completion"),))


def preference(fields: Fields) -> Preference:
    """{"prompt", "chosen", "rejected"}: strings or lists of messages.

    Without a prompt both are whole conversations with a common beginning: lists, or one text with
    "Human:" and "Assistant:" as Anthropic's HH-RLHF has them.
    """
    chosen, rejected = (_reply(fields, name) for name in ("chosen", "rejected"))
    prompt = _prompt(fields) if fields.get("prompt") is not None else _system(fields)
    if len(chosen) > 1 or len(rejected) > 1:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))
        common = [message for message, _ in same]
        if len(chosen) != len(common) + 1 or len(rejected) != len(common) + 1:
            raise DataError(
                f"{fields.where}: the chosen and the rejected conversation differ before their last message.",
                "Both are the same conversation but for the last reply.",
            )
        # a prompt beside whole conversations says again how they begin
        prompt, chosen, rejected = common, chosen[-1:], rejected[-1:]
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply or reply[-1]["role"] != "assistant":
            raise fields.error(name, "does not end with a message of the assistant")
        _with_targets(fields, prompt + reply)
    if chosen[0]["content"] == rejected[0]["content"]:
        raise DataError(
            f"{fields.where}: the chosen and the rejected reply are the same.", "Take the row out."
        )
    return Preference(
        origin=fields.where,
        messages=tuple(prompt),
        chosen=chosen[0]["content"],
        rejected=rejected[0]["content"],
    )


def chosen_conversation(fields: Fields) -> Conversation:
    """Of a preference, the conversation with the chosen reply, which alone is learned."""
    row = preference(fields)
    before = [
        {**message, "weight": "0"} if message["role"] == "assistant" else message for message in row.messages
    ]
    return Conversation(origin=row.origin, messages=(*before, {"role": "assistant", "content": row.chosen}))


def _reply(fields: Fields, name: str) -> list[Message]:
    value = fields.get(name)
    if isinstance(value, (list, tuple)):
        return _messages(fields, value, name)
    text = fields.text(name)
    if fields.get("prompt") is None:
        return _human_assistant(fields, name, text)
    return [{"role": "assistant", "content": text}]


def _human_assistant(fields: Fields, name: str, text: str) -> list[Message]:
    """ "\\n\\nHuman: …\\n\\nAssistant: …" as messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 3 or parts[0].strip():
        raise fields.error(
            name,
            'is a text without a "prompt" beside it, and does not begin with "Human:"',
            'Give "prompt" too, or whole conversations.',
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]


def _prompt(fields: Fields) -> list[Message]:
    prompt = fields.get("prompt")
    if isinstance(prompt, (list, tuple)):
        return _system(fields) + _messages(fields, prompt, "prompt")
    return [*_system(fields), {"role": "user", "content": fields.text("prompt")}]


def _system(fields: Fields) -> list[Message]:
    system = fields.text_or_none("system")
    return [{"role": "system", "content": system}] if system else []


def _messages(fields: Fields, value: Any, name: str) -> list[Message]:
    """A list of messages with role and content; further keys are left out, and that is noted."""
    where = fields.where if name == "messages" else f'{fields.where}, "{fields.called(name)}"'
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = [
            _plain(fields, message, f"{where}, message {number:,}") for number, message in enumerate(value, 1)
        ]
    kept: list[Message] = []
    for number, message in enumerate(check_messages(value, where), 1):
        one = {"role": message["role"], "content": message["content"]}
        for key, extra in message.items():
            if key == "weight" and extra in (0, 1) and message["role"] == "assistant":
                if extra == 0:
                    one["weight"] = "0"
            elif key == "weight" and extra is not None:
                raise DataError(
                    f"{where}, message {number:,}: its weight is {extra!r}.",
                    "0 and 1 are understood, of the assistant's messages.",
                )
            elif key not in one and extra not in (None, "", [], {}):
                fields.drop(f'"{key}" of messages')
        kept.append(one)
    return kept


def _plain(fields: Fields, message: Any, where: str) -> Any:
    """A message with its role as we call it and its content as one text, if it is nothing but text."""
    if not isinstance(message, Mapping):
        return message
    message = dict(message)
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = _OTHER_ROLES.get(role, role)
    content = message.get("content")
    calls = message.get("tool_calls") or message.get("function_call")
    if calls and not content:
        raise DataError(
            f"{where}: it calls a tool and says nothing, and here a message is its text.",
            "Write the call into the content, as the model's template would, or take the row out.",
        )
    if isinstance(content, (list, tuple)) and content and all(isinstance(part, Mapping) for part in content):
        other = next((part.get("type") for part in content if part.get("type") != "text"), None)
        if other is not None:
            raise DataError(f'{where}: it holds a part of the type "{other}", and only text can be read.')
        if all(isinstance(part.get("text"), str) for part in content):
            message["content"] = "".join(part["text"] for part in content)
    return message


def _with_targets(fields: Fields, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, if their roles are in order and there is something to learn."""
    before = ""
    learned = False
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in _MAY_FOLLOW[role]:
            place = f"behind one of the role '{before}'" if before else "at the beginning"
            raise DataError(
                f"{fields.where}, message {number:,}: roles out of order, a message of the role '{role}' {place}.",
                _ORDER,
            )
        before = role
        if role == "assistant" and message.get("weight") != "0":
            learned = True
            if not message["content"].strip():
                raise DataError(
                    f"{fields.where}, message {number:,}: the assistant's reply is empty.",
                    "Fill it, or take the row out.",
                )
    if not learned:
        raise DataError(
            f"{fields.where}: there is no reply of the assistant to learn from.", "Take the row out."
        )
    return tuple(messages)
