"""Masked words and next sentences (Devlin et al. 2019, "BERT"): examples for an encoder, and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.errors import ConfigError, DataError
from lexmill.pretrain.sentences import FlatSentences, Sentences
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Batch
from lexmill.train.causal import counted
from lexmill.train.cross_entropy import linear_cross_entropy
from lexmill.train.examples import IGNORED, Examples, begins, choose_of_each, places
from lexmill.train.objective import Losses

FOLLOWS, ELSEWHERE = 0, 1  # what the next-sentence head predicts, as in Hugging Face's BERT


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """What is hidden from the model. Every epoch hides something else."""

    share: float = 0.15  # of the words
    masked: float = 0.8  # of those become [MASK]
    replaced: float = 0.1  # become a random token; the rest stays as it is
    whole_words: bool = False  # hide all pieces of a word together
    chinese_words: bool = False  # with whole_words: Chinese words too, found by the package jieba
    next_sentence: bool = True  # pairs of texts for models with a next-sentence head
    pair_weight: float = 1.0  # of the next-sentence loss in what training lowers

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"'share' must lie in (0, 1), but is {self.share}.")
        if self.masked < 0 or self.replaced < 0 or self.masked + self.replaced > 1:
            raise ConfigError("'masked' and 'replaced' must be shares that together are at most 1.")
        if self.chinese_words and not self.whole_words:
            raise ConfigError("'chinese_words' says what a word is, which matters with 'whole_words' only.")


def masked_loss(model: Any, batch: Batch, pair_weight: float = 1.0) -> Losses:
    """Cross-entropy of the hidden tokens, and of the pairs where the batch has labels."""
    segments = batch.tensor("segments") if batch.segments is not None else None
    hidden = model.hidden(
        batch.tensor("tokens"), batch.row_positions(), batch.mask(causal=False), segments=segments
    )
    losses = Losses()
    # only what counts goes through the head: it is most of the work of a small model
    states, targets = counted(hidden, batch.tensor("targets"))
    losses.add("tokens", linear_cross_entropy(model.mlm(states), targets, model.head_weight, model.mlm.bias))
    if batch.labels is not None and batch.counts["pairs"]:
        first, labels = counted(hidden, batch.tensor("labels"))
        losses.weights["pairs"] = pair_weight
        losses.add(
            "pairs", linear_cross_entropy(model.pooled(first), labels, model.nsp.weight, model.nsp.bias)
        )
    return losses


@dataclass
class _Texts:
    """Texts and pairs of texts before masking: where their parts lie among all tokens; all arrays (texts,).

    Attributes:
        first, first_size: where the first part begins, and how long it is.
        second, second_size: likewise; where there is none its size is 0.
        labels: what the next-sentence head should say.
        origins: the document; of a pair, the first part's.
    """

    first: np.ndarray
    first_size: np.ndarray
    second: np.ndarray
    second_size: np.ndarray
    labels: np.ndarray
    origins: np.ndarray


def masked_examples(
    sentences: Sentences, tokenizer: Tokenizer, config: MaskingConfig, length: int, seed: tuple[int, ...]
) -> Examples:
    """One pass over all documents, cut to texts of at most `length` tokens and freshly masked.

    With `next_sentence`, each text of two sentences or more is cut in two between sentences; of
    half of these pairs the second part is exchanged for one of another document.
    """
    random = np.random.default_rng(seed)
    flat = sentences.flat()
    texts = _cut(flat, length - (3 if config.next_sentence else 2), config.next_sentence, random)
    if config.next_sentence:
        _exchange_seconds(texts, random)
        _fit(texts, length)
    return _mask(flat, texts, tokenizer, config, random)


def _cut(flat: FlatSentences, room: int, pairs: bool, random: np.random.Generator) -> _Texts:
    """Sentences gathered to texts of at most `room` tokens, as pairs where there are two sentences or more."""
    # a sentence longer than a row is cut
    count = -(-flat.sizes // room)
    number = places(np.zeros_like(count), count)
    sizes = np.minimum(room, np.repeat(flat.sizes, count) - number * room)
    documents = np.repeat(flat.documents, count)
    group = _gather(sizes, documents, room)
    begin, end = group[:-1], group[1:]
    places_of = np.append(begins(sizes), sizes.sum())  # where a piece begins among all tokens
    first, stop = places_of[begin], places_of[end]
    cut, labels = end, np.full(len(begin), IGNORED, np.int64)
    if pairs:
        several = end - begin > 1
        cut = np.where(several, begin + random.integers(1, np.maximum(end - begin, 2)), end)
        labels[several] = FOLLOWS
    middle = places_of[cut]
    return _Texts(first, middle - first, middle, stop - middle, labels, documents[begin])


def _gather(sizes: np.ndarray, documents: np.ndarray, room: int) -> np.ndarray:
    """Where each text begins among the pieces, and where the last one ends: as full as `room` allows, in order."""
    ends = np.cumsum(sizes)
    # the first piece behind a text that begins here: too far, or of another document
    far = np.searchsorted(ends, ends - sizes + room, side="right")
    other = np.searchsorted(documents, documents, side="right")
    following = np.minimum(far, other).tolist()
    found = [0]
    while found[-1] < len(sizes):
        found.append(following[found[-1]])
    return np.array(found, np.int64)


def _exchange_seconds(texts: _Texts, random: np.random.Generator) -> None:
    """Give half of the pairs, drawn at random, a second part that comes from another document.

    The parts only change places among each other, so that nothing but the meaning tells true
    pairs from false ones: not the length, and not how often a sentence is seen.
    """
    pairs = np.flatnonzero(texts.labels == FOLLOWS)
    documents = texts.origins
    if len(np.unique(documents[pairs])) < 2:
        raise DataError(
            "Next-sentence prediction needs two documents or more with at least two sentences each.",
            "Split the text into documents, or set masking.next_sentence = false.",
        )
    chosen = random.permutation(pairs)[: len(pairs) // 2]
    givers = random.permutation(chosen)
    for place in np.flatnonzero(documents[chosen] == documents[givers]):
        # trade with a place where neither side would come from its own document
        fits = (documents[givers] != documents[chosen[place]]) & (
            documents[chosen] != documents[givers[place]]
        )
        if not fits.any():
            continue
        other = int(random.choice(np.flatnonzero(fits)))
        givers[place], givers[other] = givers[other], givers[place]
    for place in np.flatnonzero(documents[chosen] == documents[givers]):
        # one document has so many pairs that not all can trade: a part is used twice
        givers[place] = random.choice(pairs[documents[pairs] != documents[chosen[place]]])
    texts.second[chosen], texts.second_size[chosen] = texts.second[givers], texts.second_size[givers]
    texts.labels[chosen] = ELSEWHERE


def _fit(texts: _Texts, length: int) -> None:
    """Cut the longer part at its end until the frame holds both."""
    first, second = texts.first_size, texts.second_size
    room = length - 3
    over = (texts.labels != IGNORED) & (first + second > room)
    # the longer one takes what the shorter one leaves; where both are long, each has half
    half = (room + 1) // 2
    kept = np.where(first > second, np.maximum(room - second, half), np.minimum(first, half))
    texts.first_size = np.where(over, kept, first)
    texts.second_size = np.where(over, room - kept, second)


def _mask(
    flat: FlatSentences,
    texts: _Texts,
    tokenizer: Tokenizer,
    config: MaskingConfig,
    random: np.random.Generator,
) -> Examples:
    """Frame the texts and hide words of them."""
    begin, separator = tokenizer.require_separators()
    paired = texts.labels != IGNORED
    sizes = texts.first_size + texts.second_size + np.where(paired, 3, 2)
    starts = begins(sizes)
    seconds = starts + texts.first_size + 2
    # where each token of a text stands in the frame, and where it comes from
    inside = np.concatenate([places(starts + 1, texts.first_size), places(seconds, texts.second_size)])
    source = np.concatenate([places(texts.first, texts.first_size), places(texts.second, texts.second_size)])
    ids = np.full(sizes.sum(), separator, np.int64)
    ids[starts] = begin
    ids[inside] = flat.ids[source]
    hideable = np.zeros(len(ids), bool)
    hideable[inside] = True
    continues = np.zeros(len(ids), bool)
    if config.whole_words:
        continues[inside] = flat.continues[source]
    segments = None
    if config.next_sentence:
        segments = np.zeros(len(ids), np.int64)
        segments[places(seconds[paired], texts.second_size[paired] + 1)] = 1
    seen, hidden = _hide(ids, hideable, continues, sizes, tokenizer, config, random)
    return Examples(
        seen, sizes, np.where(hidden, ids, IGNORED), texts.labels, texts.origins, segments=segments
    )


def _hide(
    ids: np.ndarray,
    hideable: np.ndarray,
    continues: np.ndarray,
    sizes: np.ndarray,
    tokenizer: Tokenizer,
    config: MaskingConfig,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide `share` of the words of each example, at least one.

    Args:
        ids, hideable, continues: (n,), of all examples; a word begins where a token does not continue one.
        sizes: (examples,) how many tokens are of each.

    Returns:
        The ids as the model sees them, and which places are to be predicted.
    """
    begin = hideable & ~continues  # a part's first token begins a word, whatever its flag says
    begin[1:] |= hideable[1:] & ~hideable[:-1]
    words = np.add.reduceat(begin, begins(sizes), dtype=np.int64) if len(sizes) else sizes
    wanted = np.maximum(1, np.round(config.share * words)).astype(np.int64)
    chosen = choose_of_each(words, np.minimum(wanted, words), random)
    hidden = hideable.copy()
    hidden[hideable] = chosen[np.cumsum(begin)[hideable] - 1]
    place = np.flatnonzero(hidden)
    dice = random.random(len(place))
    seen = ids.copy()
    seen[place[dice < config.masked]] = tokenizer.require_mask()
    other = place[(dice >= config.masked) & (dice < config.masked + config.replaced)]
    seen[other] = random.choice(ordinary_tokens(tokenizer), len(other))
    return seen, hidden


def ordinary_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that are not special."""
    special = {tokenizer.vocabulary[text] for text in tokenizer.special_texts}
    return np.array(sorted(set(tokenizer.vocabulary.values()) - special), np.int64)
