"""How llama.cpp divides a text for BERT, to tell what is its own doing from what a file does wrong.

Its WordPiece is compiled in and differs from `tokenizers` in a few places, which no file can change. The
rules are read off src/llama-vocab.cpp and src/unicode.cpp; the vocabulary here is the model's, never the file's.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator

from lexmill.runtimes.gguf_encoder_tokenizers import bert_normalizer
from lexmill.tokenizer.gguf_vocabulary import WHITESPACE
from lexmill.tokenizer.tokenizer import Tokenizer

# Blocks whose characters stand alone, in llama.cpp as in `tokenizers`.
_ALONE = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_BEGINS = "▁"
_SHOWN = 6  # characters that are named for each rule


class LlamaWordPiece:
    """The ids that llama.cpp gives by its own rules, with the vocabulary of a model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        values = json.loads(tokenizer.json)
        normalizer = bert_normalizer(values)
        self._lowercase = bool(normalizer.get("lowercase", True))
        strip = normalizer.get("strip_accents")
        self._strips = self._lowercase if strip is None else bool(strip)
        self._longest = values["model"].get("max_input_chars_per_word", 100)
        self._special = {text: tokenizer.vocabulary[text] for text in tokenizer.special_texts}
        longest_first = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(longest_first)})")
        self._pieces = {
            text[2:] if text.startswith("##") else _BEGINS + text: token
            for text, token in tokenizer.vocabulary.items()
            if text not in self._special
        }
        self._piece_length = max(map(len, self._pieces))
        self._cls, self._sep = tokenizer.require_separators()
        assert tokenizer.ids.unk is not None  # without one there is no such file
        self._unk = tokenizer.ids.unk

    def encode(self, text: str) -> list[int]:
        """The ids of a text with its frame."""
        ids = [self._cls]
        for part in self._marks.split(text):
            ids += [self._special[part]] if part in self._special else self._of_words(part)
        return [*ids, self._sep]

    def _of_words(self, text: str) -> Iterator[int]:
        for word in self._words(text):
            yield from self._of_word(_BEGINS + word)

    def _of_word(self, word: str) -> list[int]:
        """The longest pieces from the left; a word with a rest that is no piece is unknown as a whole."""
        ids, begin = [], 0
        while begin < len(word):
            for end in range(min(len(word), begin + self._piece_length), begin, -1):
                token = self._pieces.get(word[begin:end])
                if token is not None:
                    ids.append(token)
                    begin = end
                    break
            else:
                return [self._unk]
        return ids

    def _words(self, text: str) -> list[str]:
        words = [""]
        for letter in text:
            if self._strips:  # of what a letter decomposes into, only the first is kept
                letter = unicodedata.normalize("NFD", letter)[0]
            kind = unicodedata.category(letter)
            if letter in WHITESPACE:
                words.append("")
            elif kind[0] == "C" or letter == "\ufffd" or (self._strips and kind[0] == "M"):
                continue
            else:
                written = letter.lower()[0] if self._lowercase else letter
                if kind[0] == "P" or (letter < "\x7f" and kind[0] == "S") or _ALONE.match(letter):
                    words += [written, ""]
                else:
                    words[-1] += written
        return [word for word in words if word]

    def reasons(self, texts: Iterable[str], among: str) -> tuple[str, ...]:
        """Why these texts are divided otherwise: a sentence a rule, with how many texts, and some of the characters.

        Args:
            among: of how many texts these are some, and of what kind: "45 texts".
        """
        counts: dict[str, int] = {}
        letters: dict[str, dict[str, None]] = {}
        for text in texts:
            found = {rule: letter for letter in text if (rule := self._rule(letter))}
            if any(len(word) > self._longest for word in self._words(text)):
                found[f"words of over {self._longest} letters are divided, not unknown"] = ""
            for rule, letter in (found or {"for a reason not known here": ""}).items():
                counts[rule] = counts.get(rule, 0) + 1
                letters.setdefault(rule, {})[letter] = None
        return tuple(
            f"llama.cpp's own WordPiece, in {count} of {among}: {rule}{_named(letters[rule])}"
            for rule, count in counts.items()
        )

    def _rule(self, letter: str) -> str:
        """What llama.cpp does otherwise with one character; "" for nothing."""
        kind = unicodedata.category(letter)
        if letter in "\v\f\x85":
            return "vertical tab, form feed and U+0085 part words like spaces"
        if self._strips and kind in ("Mc", "Me"):
            return "vowel signs and enclosing marks are dropped like accents"
        parts = unicodedata.normalize("NFD", letter)[1:]
        if self._strips and any(unicodedata.category(part) != "Mn" for part in parts):
            return "of a character that decomposes only the first part is kept"
        if self._lowercase and len(letter.lower()) > 1 and not self._strips:
            return "of a small letter written as two only the first is kept"
        return ""


def _named(letters: Iterable[str]) -> str:
    """Some characters, visible: those that stand above others on a circle, those that print nothing by number."""
    shown = [
        ("\u25cc" if unicodedata.category(letter)[0] == "M" else "") + letter
        if letter.isprintable()
        else f"U+{ord(letter):04X}"
        for letter in [*filter(None, letters)][:_SHOWN]
    ]
    return f" ({' '.join(shown)})" if shown else ""
