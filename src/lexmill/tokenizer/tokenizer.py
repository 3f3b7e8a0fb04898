"""A tokenizer as models use it: text to ids and back, special ids, and chat rendering."""

from __future__ import annotations

import codecs
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexmill.errors import DataError, FormatError, ModelError
from lexmill.files import atomic_write, explain_os_errors, read_json, require_file, write_json
from lexmill.tokenizer import special
from lexmill.tokenizer.chat import render_chat
from lexmill.tokenizer.special import SpecialIds

MAX_TOKENIZER_BYTES = 1 << 28


class Tokenizer:
    """Encodes and decodes with the rules of one `tokenizer.json`.

    Make one with `Tokenizer.load(folder)`, or `lexmill.tokenizer.training.train_tokenizer`.

    Attributes:
        json: the text of `tokenizer.json`, exactly as it is saved.
        ids: the special ids that every runtime must agree on.
        chat_template: Jinja source, or "" when the model does not chat.
    """

    def __init__(
        self, json: str, ids: SpecialIds | None = None, chat_template: str = special.CHAT_TEMPLATE
    ) -> None:
        self.json = json
        self._fast = _parse(json)
        self.vocabulary: dict[str, int] = self._fast.get_vocab(with_added_tokens=True)
        if ids is None:
            missing = [token for token in special.SPECIAL_TOKENS if token not in self.vocabulary]
            if missing:
                raise FormatError(f"The tokenizer lacks the special token {missing[0]}.")
            ids = special.own_special_ids(self.vocabulary)
        self.ids = ids
        self.chat_template = chat_template

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.vocabulary.values()) + 1

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of `tokenizer.json`; token shards and model directories record it."""
        return hashlib.sha256(self.json.encode("utf-8")).hexdigest()

    @functools.cached_property
    def special_texts(self) -> frozenset[str]:
        """The texts that `encode` turns into one special id each."""
        return frozenset(
            token.content for token in self._fast.get_added_tokens_decoder().values() if token.special
        )

    @functools.cached_property
    def _literal(self) -> Any:
        """The same tokenizer, but the texts of special tokens are ordinary text."""
        other = _parse(self.json)
        other.encode_special_tokens = True
        return other

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Text to ids, as transformers' `tokenizer.encode(text)` gives them.

        Args:
            text: any Unicode text.
            special: turn the texts of special tokens (`<|im_end|>`) into their ids, as every
                runtime does with a rendered prompt. False keeps them ordinary text: use it for
                raw documents.

        Raises:
            DataError: the text holds a lone surrogate, which no UTF-8 can express.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, in parallel."""
        fast = self._fast if special else self._literal
        _refuse_surrogates(texts)
        return [encoding.ids for encoding in fast.encode_batch_fast(list(texts), add_special_tokens=True)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (start, end) of the characters of `text` that it stands for."""
        _refuse_surrogates([text])
        encoding = self._fast.encode(text, add_special_tokens=True)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Ids to text. Bytes that are no UTF-8 become U+FFFD."""
        ids = [self._checked(token) for token in ids]
        return self._fast.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token: int) -> str:
        """The token's own spelling in the vocabulary (byte-level letters and all)."""
        return self._fast.id_to_token(self._checked(token)) or ""

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that is fed one id at a time and never gives half a character."""
        return StreamDecoder(self, skip_special=skip_special)

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, by this model's chat template.

        Raises:
            ModelError: the model has no chat template.
            DataError: malformed messages.
        """
        if not self.chat_template:
            raise ModelError(
                "This model has no chat template.",
                "It was not made for chat; use 'lexmill generate' instead.",
            )
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_texts={
                name: self._fast.id_to_token(token)
                for name, token in (("bos_token", self.ids.bos), ("eos_token", self.ids.eos))
                if token is not None
            },
        )

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of one token of a byte-level vocabulary; None where the vocabulary is of another kind."""
        if not self._byte_level:
            return None
        text = self.token_text(token)
        letters = _byte_letters()
        if text in self._added or any(letter not in letters for letter in text):
            return text.encode("utf-8")
        return bytes(letters[letter] for letter in text)

    @functools.cached_property
    def _added(self) -> frozenset[str]:
        return frozenset(token.content for token in self._fast.get_added_tokens_decoder().values())

    @functools.cached_property
    def _byte_level(self) -> bool:
        return type(self._fast.decoder).__name__ == "ByteLevel"

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise DataError(f"Token id {token} is outside the vocabulary of {self.vocab_size:,}.")
        return int(token)

    def save(self, folder: Path | str, *, context: int | None = None) -> None:
        """Write the tokenizer's files into `folder`, for transformers 4 and 5 alike."""
        folder = Path(folder)
        with atomic_write(folder / "tokenizer.json", "w") as file:
            file.write(self.json)
        write_json(folder / "tokenizer_config.json", special.tokenizer_config(context))
        write_json(folder / "special_tokens_map.json", special.special_tokens_map())
        write_json(folder / "generation_config.json", special.generation_config(self.ids))
        with atomic_write(folder / "chat_template.jinja", "w") as file:
            file.write(self.chat_template)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a model directory, or of a folder that `save` wrote.

        Raises:
            FileError: `tokenizer.json` is missing.
            FormatError: a file is damaged, or names special tokens that do not exist.
        """
        folder = Path(folder)
        path = require_file(
            folder / "tokenizer.json", "tokenizer file", "Is the folder a complete model directory?"
        )
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise FormatError(f"{path} has {path.stat().st_size:,} bytes; more than 2^28 is not plausible.")
        with explain_os_errors(path, "read"):
            raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path} is not valid UTF-8 (byte {error.start}).") from error
        vocabulary = _parse(text, str(path)).get_vocab(with_added_tokens=True)
        settings = _read_optional(folder / "tokenizer_config.json")
        generation = _read_optional(folder / "generation_config.json") or _read_optional(
            folder / "config.json"
        )
        ids = _special_ids(folder, vocabulary, settings, generation)
        template_path = folder / "chat_template.jinja"
        template = settings.get("chat_template") or ""
        if template_path.is_file():
            with explain_os_errors(template_path, "read"):
                template = template_path.read_bytes().decode("utf-8", errors="replace")
        if not isinstance(template, str):
            raise FormatError(f"{folder}: named chat templates are not supported.")
        return cls(text, ids, template)


class StreamDecoder:
    """Turns ids into text as they come.

    `push` returns what can be shown now: text that ends in half a character waits. The pieces
    and `finish` together are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this id completes, possibly empty. An embedding row that pads the vocabulary has none."""
        if token >= self._tokenizer.vocab_size:
            return ""
        if self._skip_special and self._tokenizer.token_text(token) in self._tokenizer.special_texts:
            return ""
        piece = self._tokenizer.token_bytes(token)
        if piece is not None:
            return self._utf8.decode(piece)
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        if text.endswith("\ufffd"):
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new

    def finish(self) -> str:
        """What was held back: U+FFFD for a character whose end never came."""
        if self._ids:
            return self._tokenizer.decode(self._ids, skip_special=self._skip_special)[self._shown :]
        return self._utf8.decode(b"", final=True)


def _parse(json: str, where: str = "tokenizer.json") -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exceptions
        raise FormatError(
            f"{where} is not a tokenizer file: {str(error)[:200]}.", "It may be cut off; copy it again."
        ) from error


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"The text holds a lone surrogate at character {error.start}, which UTF-8 cannot express.",
                "It comes from a wrong decoding; decode the source again, or normalise it.",
            ) from error


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path, "tokenizer setting")
    if not isinstance(value, dict):
        raise FormatError(f"{path} should hold a JSON object.")
    return value


def _special_ids(
    folder: Path, vocabulary: Mapping[str, int], settings: Mapping[str, Any], generation: Mapping[str, Any]
) -> SpecialIds:
    def by_name(key: str) -> int | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is None:
            return None
        if text not in vocabulary:
            raise FormatError(f"{folder}: '{key}' is {text!r}, which is not in the vocabulary.")
        return vocabulary[text]

    bos, eos, pad = by_name("bos_token"), by_name("eos_token"), by_name("pad_token")
    listed = generation.get("eos_token_id")
    stop = listed if isinstance(listed, list) else [listed] if listed is not None else []
    stop = [*stop, *([eos] if eos is not None else [])]
    for token in stop:
        if not isinstance(token, int) or not 0 <= token <= max(vocabulary.values()):
            raise FormatError(f"{folder}: the end-of-text id {token!r} is outside the vocabulary.")
    return SpecialIds(
        bos=bos,
        eos=eos,
        pad=pad,
        stop=tuple(dict.fromkeys(stop)),
        add_bos=bool(settings.get("add_bos_token", False)),
    )


@functools.lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable letter (GPT-2); this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + index): byte for index, byte in enumerate(rest)}
