"""What transformers makes of a directory's tokenizer files, where it does not take tokenizer.json as it is.

`AutoTokenizer` picks a class by `tokenizer_class`, or by the model's type. Most take tokenizer.json
whole. A few build normaliser, pre-tokenizer and decoder themselves, from tokenizer_config.json and
from their own defaults, and take only the vocabulary, the merges and the post-processor of the file.
Read in transformers 5.23: `models/auto/tokenization_auto.py`, `tokenization_utils_tokenizers.py`,
`models/{bert,t5,llama,gpt2}/tokenization_*.py`.

One class is left out on purpose: transformers 5 gives every Qwen2 model an NFC normaliser, which
llama.cpp does not run. There lexmill keeps to tokenizer.json, and `verify` shows the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FAMILIES = {"bert": "BertTokenizer", "t5": "T5Tokenizer", "gpt2": "GPT2Tokenizer"}

# The special tokens that each class has when no file names others.
DEFAULT_TOKENS: dict[str, dict[str, str]] = {
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}


def class_used(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class that `AutoTokenizer` picks, without "Fast"; "" for one that takes tokenizer.json as it is.

    Args:
        settings: `tokenizer_config.json`.
        config: the model's `config.json`.
    """
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    name = named if isinstance(named, str) else _FAMILIES.get(str(config.get("model_type")), "")
    name = name.removesuffix("Fast")
    return name if name in DEFAULT_TOKENS else ""


def rebuilt(name: str, values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json as the class `name` applies it; `values` itself where that changes nothing.

    A tokenizer whose model is of another type than the class's comes back unchanged.
    """
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    build = {
        "BertTokenizer": _bert,
        "T5Tokenizer": _t5,
        "LlamaTokenizer": _llama,
        "GPT2Tokenizer": _gpt2,
    }.get(name)
    changed = build(values, model, settings) if build else None
    if changed is None or changed["model"].get("type") != _type_of(model):
        return values
    return values if changed == values else changed


def _type_of(model: Mapping[str, Any]) -> str:
    """Old files leave the model's type out."""
    kind = model.get("type")
    if isinstance(kind, str):
        return kind
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def _bert(values: dict[str, Any], model: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    name = {key: _text(settings.get(key)) or text for key, text in DEFAULT_TOKENS["BertTokenizer"].items()}
    vocabulary = model.get("vocab") or {}
    return values | {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": bool(settings.get("tokenize_chinese_chars", True)),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": bool(settings.get("do_lower_case", True)),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": bert_template(
            name["cls_token"],
            name["sep_token"],
            vocabulary.get(name["cls_token"], 2),
            vocabulary.get(name["sep_token"], 3),
        ),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": name["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def _t5(values: dict[str, Any], model: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    charsmap = next((part for part in _parts(values) if part.get("type") == "Precompiled"), None)
    end = _text(settings.get("eos_token")) or "</s>"
    texts = [row[0] for row in model.get("vocab") or () if isinstance(row, (list, tuple)) and row]
    return values | {
        "normalizer": charsmap,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace()],
        },
        "post_processor": end_template("</s>", texts.index(end) if end in texts else 1),
        "decoder": metaspace(),
        "model": {"type": "Unigram", "unk_id": 2, "vocab": model.get("vocab"), "byte_fallback": False},
    }


def _llama(
    values: dict[str, Any], model: dict[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    if _has_byte_level(values):  # the class steps aside for Llama 3's form
        return None
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    return values | {
        "normalizer": None,
        "pre_tokenizer": metaspace() | {"prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe(model, fuse_unk=True, byte_fallback=True),
    }


def _gpt2(values: dict[str, Any], model: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return values | {
        "normalizer": None,
        "pre_tokenizer": byte_level(add_prefix_space=bool(settings.get("add_prefix_space"))),
        "decoder": byte_level(),
        "model": bpe(model) | {"continuing_subword_prefix": "", "end_of_word_suffix": ""},
    }


def bert_template(cls: str, sep: str, cls_id: int, sep_id: int) -> dict[str, Any]:
    """`[CLS] A [SEP]`, and `[CLS] A [SEP] B [SEP]` with B and its end in segment 1."""

    def token(text: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": segment}}

    first, second = ({"Sequence": {"id": letter, "type_id": segment}} for segment, letter in enumerate("AB"))
    single = [token(cls, 0), first, token(sep, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second, token(sep, 1)],
        "special_tokens": _template_tokens({cls: cls_id, sep: sep_id}),
    }


def end_template(end: str, end_id: int) -> dict[str, Any]:
    """`A </s>`, and `A </s> B </s>`, all of it segment 0."""
    token = {"SpecialToken": {"id": end, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, token],
        "pair": [first, token, second, token],
        "special_tokens": _template_tokens({end: end_id}),
    }


def added_bos_eos(
    values: dict[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, Any]:
    """tokenizer.json with the template that `add_bos_token` and `add_eos_token` ask for.

    transformers 5 heeds these two only where there is no tokenizer.json on the disk.

    Args:
        ids: the vocabulary.
    """
    if not {"add_bos_token", "add_eos_token"} & settings.keys():
        return values
    bos, eos = (
        _text(settings.get(f"{name}_token")) if settings.get(f"add_{name}_token") else None
        for name in ("bos", "eos")
    )
    bos, eos = bos if bos in ids else None, eos if eos in ids else None
    old = values.get("post_processor")
    if not bos and not eos and (old is None or old.get("type") == "ByteLevel"):
        return values  # which adds nothing either

    return values | {
        "post_processor": frame_template(bos, eos, {text: ids[text] for text in (bos, eos) if text})
    }


def frame_template(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any]:
    """BOS before and EOS behind each text, as far as they are given; of a pair the second is segment 1.

    Args:
        ids: of the two.
    """

    def part(letter: str, segment: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": bos, "type_id": segment}}] if bos else []
        after = [{"SpecialToken": {"id": eos, "type_id": segment}}] if eos else []
        return [*before, {"Sequence": {"id": letter, "type_id": segment}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": _template_tokens(dict(ids)),
    }


def metaspace() -> dict[str, Any]:
    """SentencePiece's way with spaces: `▁` before each word."""
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def byte_level(*, add_prefix_space: bool = True) -> dict[str, Any]:
    """GPT-2's words, spelled in letters that each stand for a byte."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }


def bpe(model: Mapping[str, Any], *, fuse_unk: bool = False, byte_fallback: bool = False) -> dict[str, Any]:
    """A BPE model with the vocabulary and merges of another, and no unknown token."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": model.get("vocab"),
        "merges": model.get("merges") or [],
    }


def _template_tokens(ids: Mapping[str, int]) -> dict[str, Any]:
    return {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in ids.items()}


def _text(value: Any) -> str | None:
    """A token as files name it: a text, or an object with its text in "content"."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) and text else None


def _parts(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    normalizer = values.get("normalizer")
    if not isinstance(normalizer, Mapping):
        return []
    return normalizer.get("normalizers") or [] if normalizer.get("type") == "Sequence" else [normalizer]


def _has_byte_level(values: Mapping[str, Any]) -> bool:
    found = [values.get("pre_tokenizer"), values.get("decoder")]
    while found:
        part = found.pop()
        if isinstance(part, Mapping):
            if part.get("type") == "ByteLevel":
                return True
            found += part.get("pretokenizers") or part.get("decoders") or []
    return False
