"""Training WordPiece as BERT has it (Devlin et al. 2019): words, and `##` before what continues one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lexmill.tokenizer import special
from lexmill.tokenizer.alphabet import count_letters, rare_letters, translated
from lexmill.tokenizer.fast import parse
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.transformers_classes import bert_template

# llama.cpp has no limit; `tokenizers` makes longer words unknown.
_LONGEST_WORD = 100_000

# Two steps that BERT's normaliser lacks and llama.cpp's has. To BERT these three characters are
# control characters, which vanish, and to llama.cpp spaces.
SPACES_FIRST = {"type": "Replace", "pattern": {"Regex": "[\\x0B\\x0C\\x{85}]"}, "content": " "}
# Of the marks BERT strips those that take no room (Mn), and llama.cpp all.
MARKS_LAST = {"type": "Replace", "pattern": {"Regex": "\\p{M}"}, "content": ""}


def normalizer(lowercase: bool, strip_accents: bool | None = None) -> dict[str, Any]:
    """What happens to text before it is cut into words, as in tokenizer.json.

    Args:
        strip_accents: if not given, as `lowercase`.
    """
    strip = lowercase if strip_accents is None else strip_accents
    own = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": strip,
        "lowercase": lowercase,
    }
    return {"type": "Sequence", "normalizers": [SPACES_FIRST, own, *([MARKS_LAST] if strip else [])]}


def train_wordpiece(texts: Iterable[str], size: int, min_frequency: int, lowercase: bool) -> Tokenizer:
    """A WordPiece tokenizer of at most `size` tokens.

    Chinese characters stand alone, control characters vanish, and accents are stripped where text
    is lowercased, as in BERT.

    Args:
        texts: read twice.
    """
    from tokenizers import models, trainers

    names = list(special.WORDPIECE_TOKENS.values())

    def train(first: list[str], size: int, rare: dict[int, str]) -> dict[str, int]:
        fast = prepared()
        fast.model = models.WordPiece(unk_token=names[1])
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            limit_alphabet=1 << 21,
            special_tokens=first,
            show_progress=False,
        )
        fast.train_from_iterator(translated(texts, rare), trainer)
        return fast.get_vocab(with_added_tokens=True)

    def prepared() -> Any:
        return parse(
            json.dumps(_tokenizer_json({name: token for token, name in enumerate(names)}, lowercase))
        )

    # The trainer numbers the letters that continue words as it meets them in a hash table, that is
    # in another order each time, and pairs of equal frequency are merged in the order of these
    # numbers. Given in order beforehand, they make the same texts the same vocabulary.
    found = train(names, len(names), {})
    letters = sorted(text for text in found if text.startswith("##") and len(text) == 3)
    rare: dict[int, str] = {}
    if len(found) > size * 4 // 5:  # rare letters are left out for the sake of longer pieces
        counts, spelled = count_letters(texts), prepared().normalizer.normalize_str
        rare = rare_letters(counts, size * 2 // 5, spelled)  # each may come with and without ##
        letters = sorted(set(letters) & set(train(names, len(names), rare)))
    vocabulary = train([*names, *letters], size, rare)
    if rare and len(vocabulary) < size:  # there are no such pieces: letters, then
        limit = size - len(names) - len(letters)
        more = train([*names, *letters], size, rare_letters(counts, limit, spelled))
        while len(more) > size:  # some of the letters that joined continue words too
            limit -= len(more) - size
            more = train([*names, *letters], size, rare_letters(counts, limit, spelled))
        vocabulary = more
    return Tokenizer(
        json.dumps(_tokenizer_json(vocabulary, lowercase), ensure_ascii=False),
        special.wordpiece_ids(),
        "",
        settings=special.wordpiece_config(lowercase),
    )


def _tokenizer_json(vocabulary: dict[str, int], lowercase: bool) -> dict[str, Any]:
    names = special.WORDPIECE_TOKENS
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[text], "content": text, **flags} for text in names.values()],
        "normalizer": normalizer(lowercase),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": bert_template(
            names["cls_token"],
            names["sep_token"],
            vocabulary[names["cls_token"]],
            vocabulary[names["sep_token"]],
        ),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": names["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        },
    }
