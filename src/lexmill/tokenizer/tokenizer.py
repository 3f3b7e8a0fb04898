"""A tokenizer as models use it: text to ids and back, special ids, and chat rendering."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import DataError, FormatError, ModelError
from lexmill.files import atomic_write, write_json
from lexmill.tokenizer import special
from lexmill.tokenizer.chat import render_chat
from lexmill.tokenizer.fast import panics_as_errors, parse, refuse_surrogates
from lexmill.tokenizer.loading import read_tokenizer_files
from lexmill.tokenizer.special import SpecialIds
from lexmill.tokenizer.streaming import StreamDecoder, text_grows

_CANNOT = "The tokenizer cannot encode this text"


class Tokenizer:
    """Encodes and decodes with the rules of one `tokenizer.json`.

    Make one with `Tokenizer.load(folder)`, or `lexmill.tokenizer.training.train_tokenizer`.

    Attributes:
        json: the text of `tokenizer.json`, exactly as it is saved.
        ids: the special ids that every runtime must agree on.
        chat_template: Jinja source, or "" when the model does not chat.
        settings: what `save` writes to `tokenizer_config.json`.
        generation: what `save` adds to `generation_config.json`.
    """

    def __init__(
        self,
        json: str,
        ids: SpecialIds | None = None,
        chat_template: str = special.CHAT_TEMPLATE,
        *,
        settings: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.json = json
        self._fast = parse(json)
        self.vocabulary: dict[str, int] = self._fast.get_vocab(with_added_tokens=True)
        if ids is None:
            missing = [token for token in special.SPECIAL_TOKENS if token not in self.vocabulary]
            if missing:
                raise FormatError(f"The tokenizer lacks the special token {missing[0]}.")
            ids = special.own_special_ids(self.vocabulary)
        self.ids = ids
        self.chat_template = chat_template
        self.settings = dict(special.tokenizer_config() if settings is None else settings)
        self.generation = dict(generation or {})

    @functools.cached_property
    def kind(self) -> str:
        """ "bpe", "wordpiece", "unigram", "wordlevel", or "characters" for one character a token."""
        model = str(self._values["model"].get("type") or type(self._fast.model).__name__).lower()
        ordinary = [text for text in self.vocabulary if text not in self._added]
        return "characters" if model == "wordlevel" and all(len(text) == 1 for text in ordinary) else model

    @property
    def fast(self) -> Any:
        """The tokenizer of the package tokenizers."""
        return self._fast

    @functools.cached_property
    def frames_pairs(self) -> bool:
        """Whether its own template frames texts and pairs of them."""
        return _has_template(self._values.get("post_processor"))

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        return loads(self.json)

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
        json, values = self.json, self._values
        if self.kind == "unigram":
            # There special tokens are pieces too, with the best of scores. A name with a space in it
            # is found in no text, since spaces are written as another letter.
            names = {text: f"\x00 {text}" for text in self.special_texts}
            rows = [[names.get(text, text), score] for text, score in values["model"]["vocab"]]
            added = [
                token | {"content": names.get(token["content"], token["content"])}
                for token in values.get("added_tokens") or []
            ]
            json = dumps(values | {"model": values["model"] | {"vocab": rows}, "added_tokens": added})
        other = parse(json)
        other.encode_special_tokens = True
        return other

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Text to ids, as transformers' `tokenizer.encode(text)` gives them, with [CLS], [SEP] or </s>.

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
        return self._encode(self._fast if special else self._literal, texts, frame=True)

    def encode_plain(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The ids of many texts and nothing around them: no [CLS], [SEP] or </s>.

        Args:
            texts: raw documents, as a rule.
            special: as in `encode`, but off unless asked for.
        """
        return self._encode(self._fast if special else self._literal, texts, frame=False)

    def encode_pair(self, first: str, second: str, *, special: bool = True) -> tuple[list[int], list[int]]:
        """Two texts as one row of ids, and for each id its segment (0 or 1).

        The tokenizer's own template decides; one that has none for pairs gets `[CLS] A [SEP] B [SEP]`.

        Raises:
            ModelError: it has neither such a template nor [CLS] and [SEP].
        """
        if self.frames_pairs:
            refuse_surrogates([first, second])
            with panics_as_errors(_CANNOT):
                encoding = (self._fast if special else self._literal).encode(first, second)
            return encoding.ids, encoding.type_ids
        cls, sep = self.require_separators()
        one, two = self.encode_plain([first, second], special=special)
        return [cls, *one, sep, *two, sep], [0] * (len(one) + 2) + [1] * (len(two) + 1)

    def encode_with_offsets(
        self, text: str, *, frame: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (start, end) of the characters of `text` that it stands for."""
        refuse_surrogates([text])
        with panics_as_errors(_CANNOT):
            encoding = self._fast.encode(text, add_special_tokens=frame)
        return encoding.ids, encoding.offsets

    def _encode(self, fast: Any, texts: Sequence[str], *, frame: bool) -> list[list[int]]:
        refuse_surrogates(texts)
        with panics_as_errors(_CANNOT):
            return [one.ids for one in fast.encode_batch_fast(list(texts), add_special_tokens=frame)]

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """(vocab_size,) bool: the token goes on with the word of the token before it.

        `##x` in WordPiece; no leading `▁` or (byte-level) whitespace elsewhere. Special tokens,
        and all tokens of a vocabulary that has no such mark, begin a word.
        """
        found = np.zeros(self.vocab_size, bool)
        model = self._values["model"]
        marks: tuple[str, ...] = ()
        if self.kind == "wordpiece":
            prefix = model.get("continuing_subword_prefix") or "##"
        elif self._byte_level:
            marks = ("Ġ", "Ċ", "ĉ", "č")  # space, line feed, tab, carriage return
        elif any(text.startswith("▁") for text in self.vocabulary):
            marks = ("▁",)
        else:
            return found
        for text, token in self.vocabulary.items():
            if text not in self.special_texts and text != model.get("unk_token"):
                found[token] = not text.startswith(marks) if marks else text.startswith(prefix)
        if self.ids.unk is not None:
            found[self.ids.unk] = False
        return found

    def require_mask(self) -> int:
        """The id of [MASK].

        Raises:
            ModelError: there is none.
        """
        if self.ids.mask is None:
            raise ModelError(
                "This tokenizer has no [MASK] token, which masked language modelling needs.",
                "Train one with: lexmill tokenizer train --kind wordpiece",
            )
        return self.ids.mask

    def require_separators(self) -> tuple[int, int]:
        """The ids of [CLS] and [SEP].

        Raises:
            ModelError: one is missing.
        """
        if self.ids.cls is None or self.ids.sep is None:
            raise ModelError(
                f"This tokenizer has no {'[CLS]' if self.ids.cls is None else '[SEP]'} token, "
                "which encoders and pairs of texts need.",
                "Train one with: lexmill tokenizer train --kind wordpiece",
            )
        return self.ids.cls, self.ids.sep

    def require_sentinels(self, count: int = 1) -> tuple[int, ...]:
        """The ids of <extra_id_0>, <extra_id_1>, ...

        Raises:
            ModelError: there are fewer than `count`.
        """
        if len(self.ids.sentinels) < count:
            have = f"{len(self.ids.sentinels)} sentinels" if self.ids.sentinels else "no sentinels"
            raise ModelError(
                f"This tokenizer has {have} (<extra_id_0>, ...); span corruption needs {count:,}.",
                f"Train one with: lexmill tokenizer train --kind unigram --sentinels {max(count, 100)}",
            )
        return self.ids.sentinels

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Ids to text. Bytes that are no UTF-8 become U+FFFD."""
        ids = [self._checked(token) for token in ids]
        with panics_as_errors("The tokenizer cannot decode these ids"):
            return self._fast.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token: int) -> str:
        """The token's own spelling in the vocabulary (byte-level letters and all)."""
        return self._fast.id_to_token(self._checked(token)) or ""

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that is fed one id at a time and never gives half a character."""
        return StreamDecoder(self, skip_special=skip_special)

    @functools.cached_property
    def text_grows(self) -> bool:
        """Whether another id only adds to the text of those before it."""
        return text_grows(self._values.get("decoder"))

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
        if any(letter not in letters for letter in text):  # an added token, as decoders take it
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
        """Write the tokenizer's files into `folder`, for transformers 4 and 5 alike.

        What a loaded tokenizer's own settings said is kept.

        Args:
            context: how many tokens the model takes, when there is a model.
        """
        folder = Path(folder)
        with atomic_write(folder / "tokenizer.json", "w") as file:
            file.write(self.json)
        settings = dict(self.settings)
        if context is not None:
            settings["model_max_length"] = context
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        else:
            settings.pop("chat_template", None)
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "special_tokens_map.json", special.special_tokens_map(settings))
        if self.ids.stop or self.generation:
            write_json(
                folder / "generation_config.json", special.generation_config(self.ids) | self.generation
            )
        template = folder / "chat_template.jinja"
        if self.chat_template:
            with atomic_write(template, "w") as file:
                file.write(self.chat_template)
        else:
            template.unlink(missing_ok=True)
        if self.kind == "wordpiece":  # tools from before tokenizer.json look for it
            by_id = sorted(self._fast.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
            if [token for _, token in by_id] == list(range(len(by_id))):
                with atomic_write(folder / "vocab.txt", "w") as file:
                    file.writelines(f"{text}\n" for text, _ in by_id)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a model directory, or of a folder that `save` wrote.

        It gives the ids that transformers' `AutoTokenizer` gives for the same directory, also where
        that holds one of the older forms instead of tokenizer.json.

        Raises:
            FileError: there is no tokenizer.
            FormatError: a file is damaged, or names special tokens that do not exist.
        """
        files = read_tokenizer_files(Path(folder))
        return cls(
            files.json, files.ids, files.chat_template, settings=files.settings, generation=files.generation
        )


def _has_template(processor: Any) -> bool:
    if not isinstance(processor, Mapping):
        return False
    if processor.get("type") == "Sequence":
        return any(_has_template(part) for part in processor.get("processors") or [])
    return processor.get("type") in ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


@functools.lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable letter (GPT-2); this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + index): byte for index, byte in enumerate(rest)}
