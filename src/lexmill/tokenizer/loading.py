"""Reading the tokenizer of a model directory, whoever wrote it and in whichever of its usual forms.

A directory holds tokenizer.json; or, from before there was such a file, `vocab.txt` (WordPiece),
`vocab.json` with `merges.txt` (byte-level BPE), or a SentencePiece model. All become one
tokenizer.json that gives the ids which transformers' `AutoTokenizer` gives for the same directory.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmill.errors import FileError, FormatError
from lexmill.files import explain_os_errors, read_json
from lexmill.formats import sentencepiece
from lexmill.tokenizer import special
from lexmill.tokenizer import transformers_classes as classes
from lexmill.tokenizer.fast import parse
from lexmill.tokenizer.special import SpecialIds

MAX_TOKENIZER_BYTES = 1 << 28
MAX_VOCABULARY = 1 << 24
_SENTENCEPIECE_NAMES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
# Any of these makes a directory one with a tokenizer.
FILE_NAMES = ("tokenizer.json", *_SENTENCEPIECE_NAMES, "vocab.json", "vocab.txt")
_COMPLETE = "Is the folder a complete model directory?"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a directory says of its tokenizer.

    Attributes:
        json: the text of tokenizer.json.
        settings: `tokenizer_config.json`, with the special tokens that other files name.
        generation: `generation_config.json`, or what config.json says instead.
    """

    json: str
    ids: SpecialIds
    chat_template: str
    settings: dict[str, Any]
    generation: dict[str, Any]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read a directory's tokenizer.

    Raises:
        FileError: there is none.
        FormatError: a file is damaged, or names special tokens that do not exist.
    """
    settings = _read_optional(folder / "tokenizer_config.json")
    config = _read_optional(folder / "config.json")
    text, where = _find_vocabulary(folder, settings, config)
    values = _as_object(text, where)
    name = classes.class_used(settings, config)
    changed = classes.rebuilt(name, values, settings)
    fast = parse(text if changed is values else _to_text(changed), where)
    if _add_listed_tokens(fast, folder, settings):
        changed = json.loads(fast.to_str())
    vocabulary = fast.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise FormatError(f"{where}: the vocabulary is empty.", _COMPLETE)
    if max(vocabulary.values()) >= MAX_VOCABULARY:  # arrays are made of this size
        raise FormatError(f"{where}: the id {max(vocabulary.values()):,} is not plausible.", _COMPLETE)
    settings = _with_special_tokens(folder, settings, name, vocabulary)
    if not (folder / "tokenizer.json").exists():  # whose post-processor stands, whatever the settings say
        changed = classes.added_bos_eos(changed, settings, vocabulary)
    changed = _with_added_tokens(changed, settings, vocabulary)
    text = text if changed is values else _to_text(changed)
    settings.setdefault("tokenizer_class", name or "PreTrainedTokenizerFast")
    own = _read_optional(folder / "generation_config.json")
    return TokenizerFiles(
        json=text,
        ids=_special_ids(folder, vocabulary, settings, own or config, changed["model"]),
        chat_template=_read_template(folder, settings),
        settings=settings,
        generation=own,
    )


def _find_vocabulary(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a tokenizer.json, read or made of older files, and the file that it comes from."""
    path = folder / "tokenizer.json"
    if path.exists():
        return _read_text(path, "tokenizer file"), str(path)
    model = next((folder / name for name in _SENTENCEPIECE_NAMES if (folder / name).is_file()), None)
    if model is not None:
        name = classes.class_used(settings, config)
        return _to_text(_from_sentencepiece(model, settings, name)), str(model)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _to_text(_from_merges(folder)), str(folder / "vocab.json")
    if (folder / "vocab.txt").is_file():
        return _to_text(_from_word_list(folder / "vocab.txt", settings)), str(folder / "vocab.txt")
    raise FileError(f"{path}: there is no such tokenizer file.", _COMPLETE)


def _from_word_list(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    lines = _read_text(path, "vocabulary").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {line.rstrip(): number for number, line in enumerate(lines)}
    names = classes.DEFAULT_TOKENS["BertTokenizer"]
    unknown = _content(settings.get("unk_token")) or names["unk_token"]
    if unknown not in vocabulary:
        raise FormatError(
            f"{path}: the token for unknown words, {unknown!r}, is not among its {len(vocabulary):,} lines.",
            "A vocabulary of BERT's form has one token a line. Name the token as 'unk_token' in tokenizer_config.json.",
        )
    values = {**EMPTY, "model": {"type": "WordPiece", "vocab": vocabulary}}
    return classes.rebuilt("BertTokenizer", values, settings)


def _from_merges(folder: Path) -> dict[str, Any]:
    vocabulary = read_json(folder / "vocab.json", "vocabulary")
    if not isinstance(vocabulary, dict) or not all(_is_id(token) for token in vocabulary.values()):
        raise FormatError(f"{folder / 'vocab.json'} should map each token to its id.", _COMPLETE)
    path, merges = folder / "merges.txt", []
    for number, line in enumerate(_read_text(path, "list of merges").split("\n"), 1):
        if line.startswith("#version") or not line:
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise FormatError(f"{path}, line {number}: a merge is two tokens with one space between them.")
        if not {*pair, "".join(pair)} <= vocabulary.keys():
            raise FormatError(
                f"{path}, line {number}: the merge {line!r} makes a token that vocab.json lacks."
            )
        merges.append(pair)
    values = {**EMPTY, "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    return classes.rebuilt("GPT2Tokenizer", values, {})


def _from_sentencepiece(path: Path, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece model: as the class `name` makes it, else as SentencePiece itself acts."""
    model = sentencepiece.read_sentencepiece(path)
    rows: list[tuple[str, float]] = [(piece.text, piece.score) for piece in model.pieces]
    if name == "T5Tokenizer":  # which has sentinels behind the pieces, the last first
        count = settings.get("extra_ids", 100)
        if not isinstance(count, int) or not 0 <= count <= 1 << 16:
            raise FormatError(f"{path.parent}: 'extra_ids' is {count!r}, which is no count of sentinels.")
        rows += [(special.sentinel(number), 0.0) for number in reversed(range(count))]
    if len({text for text, _ in rows}) < len(rows):
        raise FormatError(f"{path}: two pieces have the same text.", _COMPLETE)
    added = [
        added_token(text, token, special=True)
        for token, (text, _) in enumerate(rows)
        if token >= len(model.pieces) or model.pieces[token].type == sentencepiece.CONTROL
    ]
    added += [
        added_token(piece.text, token, special=False)
        for token, piece in enumerate(model.pieces)
        if piece.type == sentencepiece.USER_DEFINED
    ]
    values = {**EMPTY, "added_tokens": sorted(added, key=lambda one: one["id"])}
    prefix = {"prepend_scheme": "always" if model.dummy_prefix else "never"}
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode("ascii")
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.merge_spaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    values["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    values["pre_tokenizer"] = values["decoder"] = classes.metaspace() | prefix
    if model.type == sentencepiece.UNIGRAM:
        values["model"] = {
            "type": "Unigram",
            "unk_id": model.unk_id,
            "vocab": rows,
            "byte_fallback": model.byte_fallback,
        }
    else:
        vocabulary = {text: token for token, (text, _) in enumerate(rows)}
        values["model"] = classes.bpe(
            {"vocab": vocabulary, "merges": merges_of(vocabulary)},
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        ) | {"unk_token": model.pieces[model.unk_id].text}
        values["pre_tokenizer"] = classes.metaspace() | prefix | {"split": False}
    if model.byte_fallback:
        steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else []
        values["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}, *strip]}
    return values


def merges_of(vocabulary: Mapping[str, int]) -> list[list[str]]:
    """All pairs that make a piece, by the piece's rank: SentencePiece stores no merges, only their results.

    Args:
        vocabulary: each piece and its rank, the best 0.
    """
    found = []
    for piece, rank in vocabulary.items():
        for cut in range(1, min(len(piece), 257)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((rank, len(left), len(right), left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _add_listed_tokens(fast: Any, folder: Path, settings: Mapping[str, Any]) -> bool:
    """Add the tokens that stand in `added_tokens_decoder` or in the older added_tokens.json only.

    As in transformers they get the next ids in their order, whatever ids are written there.
    """
    import tokenizers

    listed: dict[int, dict[str, Any]] = {}
    for text, token in _read_optional(folder / "added_tokens.json").items():
        if not _is_id(token):
            raise FormatError(f"{folder / 'added_tokens.json'}: the id of {text!r} is {token!r}.")
        listed[token] = {"content": text}
    for key, value in (settings.get("added_tokens_decoder") or {}).items():
        if not str(key).isdecimal() or not isinstance(value, Mapping) or _content(value) is None:
            raise FormatError(f"{folder}: 'added_tokens_decoder' has an entry {str(key)!r} that is no token.")
        listed[int(key)] = dict(value)
    present = {token.content for token in fast.get_added_tokens_decoder().values()}
    named = {_content(settings.get(key)) for key in special.TOKEN_NAMES}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    missing = [
        tokenizers.AddedToken(
            value["content"],
            **{"normalized": False}
            | {flag: bool(value[flag]) for flag in flags if flag in value}
            | ({"special": True} if value["content"] in named else {}),
        )
        for _, value in sorted(listed.items())
        if value["content"] and value["content"] not in present
    ]
    return bool(missing and fast.add_tokens(missing))


def _with_special_tokens(
    folder: Path, settings: Mapping[str, Any], name: str, vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    """The settings with what special_tokens_map.json and the class itself add to them."""
    filled = dict(settings)
    for key, value in _read_optional(folder / "special_tokens_map.json").items():
        if filled.get(key) is None:
            filled[key] = value
    for key, text in classes.DEFAULT_TOKENS.get(name, {}).items():
        if key not in filled and text in vocabulary:
            filled[key] = text
    for key in special.TOKEN_NAMES:
        named = _content(filled.get(key))
        if named is not None and named not in vocabulary:
            raise FormatError(
                f"{folder}: '{key}' is {named!r}, which is not in the vocabulary.",
                "tokenizer_config.json and the vocabulary come from different models.",
            )
    return filled


def _with_added_tokens(
    values: dict[str, Any], settings: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    """tokenizer.json in which every token that the settings name as special is one.

    transformers makes them so when it loads; a name that no id has is passed over.
    """
    named = [_content(settings.get(key)) for key in special.TOKEN_NAMES]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more = settings.get(key) or []
        more = more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else []
        named += [_content(value) for value in more]
    present = {token.get("content") for token in values.get("added_tokens") or []}
    missing = [text for text in dict.fromkeys(named) if text in vocabulary and text not in present]
    if not missing:
        return values
    added = [added_token(text, vocabulary[text], special=True) for text in missing if text]
    both = [*(values.get("added_tokens") or []), *added]
    return values | {"added_tokens": sorted(both, key=lambda token: token["id"])}


def _special_ids(
    folder: Path,
    vocabulary: Mapping[str, int],
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    model: Mapping[str, Any],
) -> SpecialIds:
    named = {
        own: vocabulary[text]
        for key, own in special.TOKEN_NAMES.items()
        if (text := _content(settings.get(key))) is not None
    }
    for own, texts in {"mask": ("[MASK]", "<mask>"), "cls": ("[CLS]",), "sep": ("[SEP]",)}.items():
        found = [vocabulary[text] for text in texts if text in vocabulary]
        if found and own not in named and model.get("type") == "WordPiece":
            named[own] = found[0]
    if "unk" not in named:
        unknown = model.get("unk_token")
        if isinstance(unknown, str) and unknown in vocabulary:
            named["unk"] = vocabulary[unknown]
        elif isinstance(model.get("unk_id"), int):
            named["unk"] = model["unk_id"]
    listed = generation.get("eos_token_id")
    stop = listed if isinstance(listed, list) else [listed] if listed is not None else []
    stop = [*stop, *([named["eos"]] if "eos" in named else [])]
    for token in stop:
        if not _is_id(token) or token > max(vocabulary.values()):
            raise FormatError(f"{folder}: the end-of-text id {token!r} is outside the vocabulary.")
    return SpecialIds(
        **{own: named.get(own) for own in special.TOKEN_NAMES.values()},
        stop=tuple(dict.fromkeys(stop)),
        add_bos=bool(settings.get("add_bos_token", False)),
        sentinels=special.find_sentinels(vocabulary),
    )


# tokenizer.json without a tokenizer in it
EMPTY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
}


def added_token(text: str, token: int, *, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`; it leaves the text around it alone."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": text, **plain, "special": special}


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _to_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _as_object(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{where} is not a tokenizer file: {str(error)[:200]}.", "It may be cut off; copy it again."
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise FormatError(f"{where} is not a tokenizer file: it has no model.", _COMPLETE)
    return values


def _read_text(path: Path, what: str) -> str:
    with explain_os_errors(path, "read"):
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise FormatError(f"{path} has {size:,} bytes; more than 2^28 is not plausible.")
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: this {what} is not valid UTF-8 (byte {error.start}).") from error


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path, "tokenizer setting")
    if not isinstance(value, dict):
        raise FormatError(f"{path} should hold a JSON object.")
    return value


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    template = settings.get("chat_template") or ""
    if path.is_file():
        with explain_os_errors(path, "read"):
            template = path.read_bytes().decode("utf-8", errors="replace")
    if not isinstance(template, str):
        raise FormatError(f"{folder}: named chat templates are not supported.")
    return template
