"""Training a unigram vocabulary as T5 has it (Kudo 2018; Raffel et al. 2020): pieces with scores, and sentinels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from lexmill.tokenizer import special
from lexmill.tokenizer.alphabet import count_letters, rare_letters, translated
from lexmill.tokenizer.fast import parse
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.tokenizer.transformers_classes import end_template, metaspace

SPACE = "▁"


def train_unigram(texts: Iterable[str], size: int, sentinels: int) -> Tokenizer:
    """A unigram tokenizer of at most `size` tokens, the sentinels among them.

    Text is cut at whitespace of any kind, and runs of it count as one space, as in T5. There is no
    other normalisation (T5 itself has NFKC): llama.cpp gives the same ids without any.
    Characters beyond half of the vocabulary, the rarest ones, become unknown.

    Args:
        texts: read twice.
    """
    from tokenizers import models, trainers

    names = list(special.UNIGRAM_TOKENS.values())
    limit = size - sentinels
    counts = count_letters(texts)

    def train(letters: int) -> list[list[Any]]:
        fast = parse(json.dumps(_tokenizer_json([[name, 0.0] for name in names])))
        fast.model = models.Unigram()
        trainer = trainers.UnigramTrainer(
            vocab_size=limit, special_tokens=names, unk_token="<unk>", show_progress=False
        )
        fast.train_from_iterator(translated(texts, rare_letters(counts, letters)), trainer)
        return _rows(json.loads(fast.to_str())["model"]["vocab"], names, counts)

    rows = train(limit // 2)
    if len(rows) < limit and len(counts) > limit // 2:  # there are no longer pieces: letters, then
        rows = train(limit - len(names) - 1)
    # The highest ids, the first sentinel the very last, as in T5.
    rows += [[special.sentinel(number), 0.0] for number in reversed(range(sentinels))]
    text = json.dumps(_tokenizer_json(rows), ensure_ascii=False)
    ids = special.unigram_ids({row[0]: token for token, row in enumerate(rows)})
    return Tokenizer(text, ids, "", settings=special.unigram_config(sentinels))


def _rows(trained: list[list[Any]], names: list[str], counts: Counter[str]) -> list[list[Any]]:
    """The pieces, the likeliest first, with scores that a second training gives again and float32 can hold.

    The trainer adds in several threads, so that the last digits of its sums differ from run to run;
    and the letters that it would have dropped it puts back with the lowest score and 0.0001 more for
    each, in the order of a hash table. Here they come in the order of their frequency.
    """
    scores = {text: round(score, 5) for text, score in trained if text not in names}
    # a space alone must be known: without it an unknown character would take its space along
    scores.setdefault(SPACE, min(scores.values(), default=-1.0))
    lowest = min(scores.values())
    highest = lowest + 0.0001 * (sum(len(text) == 1 for text in scores) + 1)
    put_back = [text for text, score in scores.items() if len(text) == 1 and score <= highest]
    for rank, text in enumerate(sorted(put_back, key=lambda letter: (counts[letter], letter))):
        scores[text] = lowest + 0.0001 * rank
    pieces = [(text, float(np.float32(score))) for text, score in scores.items()]
    pieces.sort(key=lambda piece: (-piece[1], piece[0]))
    return [[name, 0.0] for name in names] + [list(piece) for piece in pieces]


def _tokenizer_json(rows: list[list[Any]]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = [*special.UNIGRAM_TOKENS.values()]
    end = special.UNIGRAM_TOKENS["eos_token"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, **flags}
            for token, (text, _) in enumerate(rows)
            if text in names or special.is_sentinel(text)
        ],
        # in a text the letter for a space counts as one: llama.cpp could not tell them apart
        "normalizer": {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace()]},
        "post_processor": end_template(end, names.index(end)),
        "decoder": metaspace(),
        "model": {
            "type": "Unigram",
            "unk_id": names.index(special.UNIGRAM_TOKENS["unk_token"]),
            "vocab": rows,
            "byte_fallback": False,
        },
    }
