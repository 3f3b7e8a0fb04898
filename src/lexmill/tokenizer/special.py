"""The one source of what every runtime must agree on: special tokens, stop rules, the chat template.

The Hugging Face files, the GGUF metadata, the Modelfile and generation itself derive from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = "<|endoftext|>"  # separates documents; ends a text
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"  # ends a reply
PAD = "<|pad|>"  # fills rows; never a target and never the end of anything

# The order is that of the ids, from 0. None of these texts may be one that llama.cpp gives a
# meaning of its own ([PAD], <eos>, …), apart from the three that mean there what they mean here.
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD)

ROLES = ("system", "user", "assistant", "tool")

# ChatML in its plain form, without a default system prompt and without filters: each of those is
# a place where the Jinja engines of transformers and llama.cpp and Ollama's Go templates differ.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same text in Ollama's Go template language.
GO_TEMPLATE = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n"
    "{{ .Content }}<|im_end|>\n"
    "{{ end }}<|im_start|>assistant\n"
)

# What ends generation as text, for runtimes that look for strings.
STOP_STRINGS = (END_OF_TURN, START_OF_TURN, END_OF_TEXT)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids that a model's runtimes must agree on.

    `stop` are all ids that end generation. lexmill's own models never add a BOS, but `bos` is a
    real id all the same: it begins a document in training, and an empty prompt in generation.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    stop: tuple[int, ...]
    add_bos: bool = False


def own_special_ids(vocabulary: Mapping[str, int]) -> SpecialIds:
    """The special ids of a tokenizer that lexmill trained."""
    return SpecialIds(
        bos=vocabulary[END_OF_TEXT],
        eos=vocabulary[END_OF_TURN],
        pad=vocabulary[PAD],
        stop=(vocabulary[END_OF_TURN], vocabulary[END_OF_TEXT]),
    )


def tokenizer_config(context: int | None = None) -> dict[str, Any]:
    """`tokenizer_config.json` for transformers 4 and 5, the template included (some readers look only here)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": context or 1_000_000,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }


def special_tokens_map() -> dict[str, str]:
    """`special_tokens_map.json`, which transformers 4 reads."""
    return {"bos_token": END_OF_TEXT, "eos_token": END_OF_TURN, "pad_token": PAD}


def generation_config(ids: SpecialIds) -> dict[str, Any]:
    """`generation_config.json`: every id that may end a text, greedy unless asked otherwise."""
    values: dict[str, Any] = {"do_sample": False, "eos_token_id": list(ids.stop)}
    if ids.bos is not None:
        values["bos_token_id"] = ids.bos
    if ids.pad is not None:
        values["pad_token_id"] = ids.pad
    return values
