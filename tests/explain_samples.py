"""Small tokenizers and attention maps for the tests of `lexmill explain`."""

import functools

import numpy as np
import tokenizers

from lexmill.inference.explain import attention_map
from lexmill.tokenizer.special import SpecialIds
from lexmill.tokenizer.tokenizer import Tokenizer


@functools.cache
def wordpiece():
    """A tokenizer of BERT's kind with a dozen entries."""
    listed = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "bank",
        "river",
        "##bank",
        "un",
        ",",
        "lent",
        "money",
        "<",
        "/",
        "script",
        ">",
    ]
    made = tokenizers.BertWordPieceTokenizer(
        {word: number for number, word in enumerate(listed)}, lowercase=True
    )
    return Tokenizer(made.to_str(), SpecialIds(bos=None, eos=None, pad=0, stop=()), "")


def random_weights(layers, heads, queries, keys=None, causal=False):
    """Rows of softmax, repeatable."""
    scores = np.random.default_rng(7).normal(scale=2, size=(layers, heads, queries, keys or queries))
    if causal:
        scores = np.where(np.tri(queries, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def sample_map(text="the bank river", layers=2, heads=3):
    """A map with random weights."""
    ids = wordpiece().encode(text)
    return attention_map(wordpiece(), text, ids, random_weights(layers, heads, len(ids)))
