"""The one source of what every runtime must agree on: special tokens, stop rules, the chat template.

The Hugging Face files, the GGUF metadata, the Modelfile and generation itself derive from here.
"""

from __future__ import annotations

import itertools
import re
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

NO_LIMIT = 1_000_000  # stands where a tokenizer has no model yet

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


# An encoder's (Devlin et al. 2019), in the order of their ids. llama.cpp takes a text [PAD] for a
# token of its own only in decoders.
WORDPIECE_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

# An encoder-decoder's (Raffel et al. 2020), in the order of their ids; the sentinels come last of all.
UNIGRAM_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

# What stands for a character that a vocabulary of characters has never seen.
UNKNOWN_CHARACTER = "<|unk|>"

_SENTINEL = re.compile(r"<extra_id_([0-9]{1,6})>")

# The names under which transformers' files know special tokens, and those of `SpecialIds`.
TOKEN_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unk",
    "sep_token": "sep",
    "pad_token": "pad",
    "cls_token": "cls",
    "mask_token": "mask",
}


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids that a model's runtimes must agree on.

    `stop` are all ids that end generation. lexmill's own decoders never add a BOS, but `bos` is a
    real id all the same: it begins a document in training, and an empty prompt in generation.
    `sentinels` mark what span corruption took out: `<extra_id_0>`, `<extra_id_1>`, ... in this order.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    stop: tuple[int, ...]
    add_bos: bool = False
    mask: int | None = None
    cls: int | None = None
    sep: int | None = None
    unk: int | None = None
    sentinels: tuple[int, ...] = ()


def sentinel(number: int) -> str:
    """The text of a sentinel."""
    return f"<extra_id_{number}>"


def is_sentinel(text: str) -> bool:
    """Whether a token's text is that of a sentinel."""
    return _SENTINEL.fullmatch(text) is not None


def find_sentinels(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, ..., up to the first that is missing."""
    numbered = {
        int(match[1]): token for text, token in vocabulary.items() if (match := _SENTINEL.fullmatch(text))
    }
    return tuple(numbered[number] for number in itertools.takewhile(numbered.__contains__, itertools.count()))


def own_special_ids(vocabulary: Mapping[str, int]) -> SpecialIds:
    """The special ids of a decoder's tokenizer that lexmill trained."""
    return SpecialIds(
        bos=vocabulary[END_OF_TEXT],
        eos=vocabulary[END_OF_TURN],
        pad=vocabulary[PAD],
        stop=(vocabulary[END_OF_TURN], vocabulary[END_OF_TEXT]),
        unk=vocabulary.get(UNKNOWN_CHARACTER),
    )


def wordpiece_ids() -> SpecialIds:
    """The special ids of an encoder's tokenizer that lexmill trained."""
    return SpecialIds(bos=None, eos=None, pad=0, stop=(), unk=1, cls=2, sep=3, mask=4)


def unigram_ids(vocabulary: Mapping[str, int]) -> SpecialIds:
    """The special ids of an encoder-decoder's tokenizer that lexmill trained."""
    return SpecialIds(bos=None, eos=1, pad=0, stop=(1,), unk=2, sentinels=find_sentinels(vocabulary))


def tokenizer_config(context: int | None = None) -> dict[str, Any]:
    """`tokenizer_config.json` of a decoder for transformers 4 and 5, the template included (some readers look only here)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": context or NO_LIMIT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }


def wordpiece_config(lowercase: bool) -> dict[str, Any]:
    """`tokenizer_config.json` of an encoder.

    The class is the one that takes tokenizer.json as it is: BertTokenizer builds its own in
    transformers 5, where words of more than 100 characters are unknown. `do_lower_case` and its
    neighbours are for those who name that class themselves.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **WORDPIECE_TOKENS,
        "do_lower_case": lowercase,
        "strip_accents": lowercase,
        "tokenize_chinese_chars": True,
        "model_max_length": NO_LIMIT,
        "clean_up_tokenization_spaces": False,
        # without the middle one transformers 5 leaves it out, and the model sees one segment only
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def unigram_config(sentinels: int) -> dict[str, Any]:
    """`tokenizer_config.json` of an encoder-decoder.

    No `add_eos_token`: where it stands, transformers 5 makes a template of its own.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **UNIGRAM_TOKENS,
        "extra_ids": sentinels,
        "additional_special_tokens": [sentinel(number) for number in range(sentinels)],
        "model_max_length": NO_LIMIT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def special_tokens_map(settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`special_tokens_map.json`, which transformers 4 reads: what `tokenizer_config.json` says of them."""
    settings = tokenizer_config() if settings is None else settings
    names = (*TOKEN_NAMES, "additional_special_tokens", "extra_special_tokens")
    return {name: settings[name] for name in names if settings.get(name)}


def generation_config(ids: SpecialIds) -> dict[str, Any]:
    """`generation_config.json`: every id that may end a text, greedy unless asked otherwise."""
    values: dict[str, Any] = {"do_sample": False, "eos_token_id": list(ids.stop)}
    if ids.bos is not None:
        values["bos_token_id"] = ids.bos
    if ids.pad is not None:
        values["pad_token_id"] = ids.pad
    return values
