"""Seconds to make and pack one epoch of a corpus of many short documents, on one thread.

72,000 synthetic documents of 52 tokens on average in sentences of about 14, rows of 128 tokens; every
objective, several epochs each, the median of each part.

    python bench/loading.py
    python bench/loading.py --epochs 9 --documents 200000
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from lexmill import devices

VOCABULARY, SPECIAL, SEPARATOR, LENGTH = 4800, 110, 3, 128


class Tokenizer:
    """What making examples asks of one."""

    class ids:
        stop = (1,)

    def __init__(self):
        self.vocabulary = {f"word {index}": index for index in range(VOCABULARY)}
        self.special_texts = frozenset(f"word {index}" for index in range(SPECIAL))

    def require_separators(self):
        return 2, SEPARATOR

    def require_mask(self):
        return 4

    def require_sentinels(self, count=1):
        return tuple(range(5, 5 + count))


def write_corpus(folder: Path, documents: int):
    """Token shards of ids and of what continues a word."""
    from lexmill.data.shards import write_token_shard

    random = np.random.default_rng(0)
    texts, flags = [], []
    for _ in range(documents):
        size = max(4, int(random.gamma(2.0, 26)))
        ids = random.integers(SPECIAL, VOCABULARY, size)
        ids[np.arange(1, size - 1)[random.random(size - 2) < 1 / 14]] = SEPARATOR
        continues = (random.random(size) < 0.3) & (ids != SEPARATOR)
        continues[0] = False
        continues[1:] &= ids[:-1] != SEPARATOR
        texts.append((ids, size))
        flags.append((continues.astype(int), 0))
    about = {"vocab_size": VOCABULARY, "tokenizer_sha256": "none"}
    return write_token_shard(folder / "ids", texts, **about), write_token_shard(
        folder / "words", flags, **about
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=72_000)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    devices.keep_freed_memory()
    from lexmill.pretrain.lessons import cut_documents
    from lexmill.pretrain.masked import MaskingConfig, masked_examples
    from lexmill.pretrain.sentences import Sentences
    from lexmill.pretrain.spans import SpanConfig, plan_rows, span_examples
    from lexmill.train.batches import pack

    tokenizer, spans = Tokenizer(), SpanConfig()
    with tempfile.TemporaryDirectory() as folder:
        ids, words = write_corpus(Path(folder), arguments.documents)
        sentences = Sentences(ids, words, SEPARATOR)
        makers = {
            "masked words and pairs": lambda seed: masked_examples(
                sentences, tokenizer, MaskingConfig(), LENGTH, seed
            ),
            "whole words and pairs": lambda seed: masked_examples(
                sentences, tokenizer, MaskingConfig(whole_words=True), LENGTH, seed
            ),
            "span corruption": lambda seed: span_examples(ids, tokenizer, spans, LENGTH, 0, seed),
            "next token": lambda seed: cut_documents(ids, LENGTH, SEPARATOR, 0.3),
        }
        print(f"{ids.tokens:,} tokens in {len(ids):,} documents, {devices.this_machine().cpu_class}")
        for name, make in makers.items():
            written = plan_rows(LENGTH, spans).written if name == "span corruption" else 0
            made, packed = [], []
            for epoch in range(arguments.epochs):
                begin = time.perf_counter()
                examples = make((0, epoch, 1))
                middle = time.perf_counter()
                rows = pack(examples, LENGTH, 0, written)
                made.append(middle - begin)
                packed.append(time.perf_counter() - middle)
            both = statistics.median(map(sum, zip(made, packed)))
            print(
                f"{name:<23} examples {statistics.median(made):.2f} s, rows {statistics.median(packed):.2f} s, "
                f"together {both:.2f} s: {len(examples):,} examples in {len(rows.tokens):,} rows"
            )


if __name__ == "__main__":
    main()
