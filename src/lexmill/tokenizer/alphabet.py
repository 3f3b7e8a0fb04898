"""The letters of a corpus, when a vocabulary has no room for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator


def count_letters(texts: Iterable[str]) -> Counter[str]:
    """How often each character occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return counts


def rare_letters(
    counts: Counter[str], limit: int, spelled: Callable[[str], str] = lambda letter: letter
) -> dict[int, str]:
    """A table for `str.translate` that makes spaces of all but the `limit` commonest letters.

    Of equally common ones those with the smaller code points are kept, so that the same texts keep the
    same letters.

    Args:
        spelled: what the tokenizer's normaliser makes of a character; its letters are what counts.
    """
    spellings = {letter: spelled(letter).strip() for letter in counts}
    sums: Counter[str] = Counter()
    for letter, spelling in spellings.items():
        for part in spelling:
            sums[part] += counts[letter]
    kept = {letter for letter, _ in sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:limit]}
    return {ord(letter): " " for letter, spelling in spellings.items() if not kept.issuperset(spelling)}


def translated(texts: Iterable[str], table: dict[int, str]) -> Iterator[str]:
    """The texts without the letters of `rare_letters`."""
    for text in texts:
        yield text.translate(table) if table else text
