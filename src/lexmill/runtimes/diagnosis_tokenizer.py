"""What in a GGUF file's tokenizer, special ids and chat template is not the model's, in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lexmill.errors import LexmillError
from lexmill.formats.gguf import GGUFFile, Value
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.gguf_kept import same_value
from lexmill.runtimes.gguf_tokenizer import tokenizer_metadata
from lexmill.runtimes.verify_report import short
from lexmill.tokenizer.gguf_pre_tokenizers import PRE_TOKENIZERS
from lexmill.tokenizer.gguf_vocabulary import END_TEXTS, MIDDLE_TEXTS

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_KINDS = {
    1: "an ordinary token",
    2: "unknown",
    3: "a control token",
    4: "a user's token",
    5: "unused",
    6: "a byte",
}


class _Both(NamedTuple):
    """What a file says, what an export of the model would, and the ids that end a text for the model."""

    found: Mapping[str, Any]
    meant: Mapping[str, Value]
    stop: Collection[int]

    def differ(self, key: str) -> bool:
        """Whether both speak of a key and not with one voice."""
        return key in self.found and key in self.meant and not same_value(self.meant[key], self.found[key])


def tokenizer_causes(file: GGUFFile, model: ModelDirectory) -> Iterator[tuple[str, str]]:
    """(kind, sentence); the kinds are "ids", "ends", "vocabulary" and "template"."""
    try:
        meant = tokenizer_metadata(model.tokenizer, model.config.vocab_size, str(model.path))
    except LexmillError as error:
        yield "ids", f"llama.cpp has no form for the model's tokenizer: {error.message}"
        return
    both = _Both(file.metadata, meant, model.tokenizer.ids.stop)
    for kind, symptom in _SYMPTOMS:
        for sentence in symptom(both):
            yield kind, sentence


def _algorithm(both: _Both) -> Iterator[str]:
    key = _PREFIX + "model"
    if both.differ(key):
        yield f"The tokenizer is of another kind: {key} is '{both.found[key]}', the model's '{both.meant[key].value}'."


def _pre_tokenizer(both: _Both) -> Iterator[str]:
    key = _PREFIX + "pre"
    if key not in both.meant:
        return
    found, meant = both.found.get(key), both.meant[key].value
    if found is None:
        yield f"The file names no pre-tokenizer ({key}), so llama.cpp takes its default; the model's is '{meant}'."
    elif found != meant and PRE_TOKENIZERS.get(found) != PRE_TOKENIZERS.get(meant):
        yield f"The pre-tokenizer has the wrong name: {key} is '{found}', the model's is '{meant}'."


def _tokens(both: _Both) -> Iterator[str]:
    key = _PREFIX + "tokens"
    found, meant = both.found.get(key), both.meant[key].value
    if not isinstance(found, list):
        yield f"The file has no list of tokens ({key})."
        return
    if len(found) != len(meant):
        padding = "padded" if len(found) > len(meant) else "cut off"
        yield f"The vocabulary is {padding}: {len(found):,} tokens in the file, {len(meant):,} in the model."
    at = _first_difference(found, meant)
    if at < min(len(found), len(meant)):
        same = sorted(found) == sorted(meant)
        yield (
            f"The tokens are {'in another order' if same else 'not the same'}: token {at} is {short(found[at])}, "
            f"in the model {short(meant[at])}."
        )


def _token_types(both: _Both) -> Iterator[str]:
    key = _PREFIX + "token_type"
    if key not in both.meant or key not in both.found:
        return
    found, meant = list(both.found[key]), both.meant[key].value
    at = _first_difference(found, meant)
    if at < min(len(found), len(meant)):
        text, (is_, was) = both.meant[_PREFIX + "tokens"].value[at], (found[at], meant[at])
        yield (
            f"Token {at} ({short(text)}) is marked as {_KINDS.get(is_, is_)}, in the model it is "
            f"{_KINDS.get(was, was)}: its text is recognised otherwise."
        )


def _merges(both: _Both) -> Iterator[str]:
    key = _PREFIX + "merges"
    if key not in both.meant:
        return
    found, meant = both.found.get(key), both.meant[key].value
    if not isinstance(found, list):
        yield f"The file has no merges ({key})."
        return
    at = _first_difference(found, meant)
    if at == len(found) == len(meant):
        return
    theirs, ours = (short(merges[at]) if at < len(merges) else "none" for merges in (found, meant))
    what = "swapped" if sorted(found) == sorted(meant) else "not the model's"
    counts = "" if len(found) == len(meant) else f" ({len(found):,} instead of {len(meant):,})"
    yield f"The merges are {what}{counts}: merge {at} is {theirs}, in the model {ours}."


def _scores(both: _Both) -> Iterator[str]:
    key = _PREFIX + "scores"
    if both.differ(key):
        yield f"The scores of the tokens ({key}) are not the model's."


_FRAME = {"add_bos_token": "BOS", "add_eos_token": "EOS", "add_sep_token": "separator"}


def _frame(both: _Both) -> Iterator[str]:
    """What llama.cpp puts around each text."""
    for name, token in _FRAME.items():
        key = _PREFIX + name
        if key not in both.meant:
            continue
        meant, found = both.meant[key].value, both.found.get(key)
        if found is None:
            form = PRE_TOKENIZERS.get(str(both.found.get(_PREFIX + "pre")))
            found = form.add_bos if form and name == "add_bos_token" else meant
        if found and not meant:
            yield f"An extra {token} is put to each text: the file has {key} = true, the model adds none."
        elif meant and not found:
            yield f"The {token} is missing from each text: the file does not set {key}, the model adds one."


def _switches(both: _Both) -> Iterator[str]:
    """How a text is changed before it is cut."""
    for key, meant in both.meant.items():
        name = key.removeprefix(_PREFIX)
        if name.startswith(("normalizer.", "add_space", "remove_extra", "precompiled")) and both.differ(key):
            values = "is not the model's"
            if not meant.items:
                values = f"is {both.found[key]}, the model has {meant.value}"
            yield f"Texts are normalised otherwise: {key} {values}."


def _special_ids(*names: str) -> Callable[[_Both], Iterator[str]]:
    def symptom(both: _Both) -> Iterator[str]:
        texts = both.meant[_PREFIX + "tokens"].value
        for name in names:
            key = f"{_PREFIX}{name}_token_id"
            if both.differ(key):
                found, meant = int(both.found[key]), both.meant[key].value
                inside = short(texts[found]) if found < len(texts) else "outside the vocabulary"
                yield (
                    f"The {_NAMES.get(name, name)} id is wrong: {key} is {found} ({inside}), the model has {meant} "
                    f"({short(texts[meant])})."
                )
            elif (
                key in both.meant and key not in both.found and texts[both.meant[key].value] not in END_TEXTS
            ):
                yield f"The {_NAMES.get(name, name)} id is missing: the file has no {key}."

    return symptom


_NAMES = {"bos": "BOS", "eos": "EOS", "eot": "end-of-turn", "eom": "end-of-message", "seperator": "separator"}


def _ends_by_text(both: _Both) -> Iterator[str]:
    texts = both.meant[_PREFIX + "tokens"].value
    others = {text: at for at, text in enumerate(texts) if at not in both.stop}
    fixed = [text for text in others if text in END_TEXTS]
    marks = {
        name: text
        for name, known in MIDDLE_TEXTS.items()
        for text in known
        if text in others and f"{_PREFIX}{name}_token_id" not in both.found
    }
    if fixed or marks:
        named = " and ".join(map(short, [*fixed, *marks.values()]))
        mend = (
            ""
            if fixed or not marks.keys() <= _mended(both)
            else ". Export the model again: lexmill prevents it"
        )
        yield (
            f"llama.cpp ends a text at {named} because of what the token is called, whatever "
            f"the file says; for the model it ends none{mend}."
        )


def _mended(both: _Both) -> set[str]:
    """The marks that an export gives another id."""
    return {name for name in MIDDLE_TEXTS if f"{_PREFIX}{name}_token_id" in both.meant}


def _template(both: _Both) -> Iterator[str]:
    meant = both.meant[_TEMPLATE].value if _TEMPLATE in both.meant else ""
    found = str(both.found.get(_TEMPLATE, ""))
    if not meant or found == meant:
        return
    if not found:
        yield "The chat template is missing from the file."
    elif "add_generation_prompt" in meant and "add_generation_prompt" not in found:
        yield (
            "The chat template lacks the generation prompt: nothing opens the assistant's turn "
            "(the template never asks for add_generation_prompt)."
        )
    elif _without_newlines(found) == _without_newlines(meant):
        fewer = _newlines(found) < _newlines(meant)
        yield (
            f"A newline is {'missing from' if fewer else 'too many in'} the chat template, "
            f"{_where(found, meant)}."
        )
    else:
        yield f"The chat template is another one, {_where(found, meant)}."


def _newlines(template: str) -> int:
    return template.count("\n") + template.count("\\n")


def _without_newlines(template: str) -> str:
    return template.replace("\\n", "").replace("\n", "").replace(" + ''", "")


def _where(found: str, meant: str) -> str:
    at = _first_difference(found, meant)
    begin = max(0, at - 12)
    return f"first at character {at}: {short(found[begin : at + 25])}, in the model {short(meant[begin : at + 25])}"


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first place where two rows differ; the length of the shorter one where it begins the other."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


_SYMPTOMS: tuple[tuple[str, Callable[[_Both], Iterator[str]]], ...] = (
    ("vocabulary", _algorithm),
    ("vocabulary", _tokens),
    ("vocabulary", _token_types),
    ("ids", _merges),
    ("ids", _scores),
    ("ids", _pre_tokenizer),
    ("ids", _frame),
    ("ids", _switches),
    ("ids", _special_ids("bos", "cls", "seperator", "unknown")),
    ("ends", _special_ids("eos", "eot", "eom")),
    ("ends", _ends_by_text),
    ("template", _template),
)
