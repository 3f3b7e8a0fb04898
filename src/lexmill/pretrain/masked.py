"""Masked words and next sentences (Devlin et al. 2019, "BERT"): examples for an encoder, and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.errors import ConfigError, DataError
from lexmill.pretrain.sentences import Sentences
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import IGNORED, Batch, Example
from lexmill.train.causal import counted
from lexmill.train.cross_entropy import linear_cross_entropy
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


@dataclass(frozen=True)
class _Text:
    """One text or pair before masking: its ids in the frame, its words, its segments and label."""

    first: np.ndarray
    first_continues: np.ndarray
    second: np.ndarray | None = None
    second_continues: np.ndarray | None = None
    label: int = IGNORED
    origin: int = -1  # the document; of a pair, the first part's


def masked_examples(
    sentences: Sentences, tokenizer: Tokenizer, config: MaskingConfig, length: int, seed: tuple[int, ...]
) -> list[Example]:
    """One pass over all documents, cut to texts of at most `length` tokens and freshly masked.

    With `next_sentence`, each text of two sentences or more is cut in two between sentences; of
    half of these pairs the second part is exchanged for one of another document.
    """
    random = np.random.default_rng(seed)
    texts: list[_Text] = []
    for index in range(len(sentences)):
        texts += _cut_document(sentences[index], index, length, config.next_sentence, random)
    if config.next_sentence:
        _exchange_seconds(texts, random)
    return _mask(texts, tokenizer, config, length, random)


def _cut_document(
    sentences: list[tuple[np.ndarray, np.ndarray]],
    origin: int,
    length: int,
    pairs: bool,
    random: np.random.Generator,
) -> list[_Text]:
    """Sentences gathered to texts that fill a row, as pairs where there are two sentences or more."""
    room = length - (3 if pairs else 2)
    groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
    size = 0
    for ids, continues in sentences:
        for start in range(0, len(ids), room):  # a sentence longer than a row is cut
            piece = ids[start : start + room], continues[start : start + room]
            if groups[-1] and size + len(piece[0]) > room:
                groups.append([])
                size = 0
            groups[-1].append(piece)
            size += len(piece[0])
    texts = []
    for group in groups:
        if len(group) > 1 and pairs:
            cut = int(random.integers(1, len(group)))
            texts.append(_Text(*_join(group[:cut]), *_join(group[cut:]), FOLLOWS, origin))
        elif group:
            texts.append(_Text(*_join(group), origin=origin))
    return texts


def _join(group: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if len(group) == 1:
        return group[0]
    return np.concatenate([ids for ids, _ in group]), np.concatenate([continues for _, continues in group])


def _exchange_seconds(texts: list[_Text], random: np.random.Generator) -> None:
    """Give half of the pairs, drawn at random, a second part that comes from another document.

    The parts only change places among each other, so that nothing but the meaning tells true
    pairs from false ones: not the length, and not how often a sentence is seen.
    """
    pairs = np.array([index for index, text in enumerate(texts) if text.second is not None], np.int64)
    if len({texts[index].origin for index in pairs}) < 2:
        raise DataError(
            "Next-sentence prediction needs two documents or more with at least two sentences each.",
            "Split the text into documents, or set masking.next_sentence = false.",
        )
    chosen = random.permutation(pairs)[: len(pairs) // 2]
    documents = np.array([text.origin for text in texts])
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
    seconds = [(texts[giver].second, texts[giver].second_continues) for giver in givers]
    for index, (second, continues) in zip(chosen, seconds):
        text = texts[index]
        texts[index] = _Text(text.first, text.first_continues, second, continues, ELSEWHERE, text.origin)


def _mask(
    texts: list[_Text], tokenizer: Tokenizer, config: MaskingConfig, length: int, random: np.random.Generator
) -> list[Example]:
    """Frame the texts and hide words of them: all at once, because a pass has many."""
    begin, separator = tokenizer.require_separators()
    frame = np.array([begin]), np.array([separator])
    framed, continues, segments, hideable = [], [], [], []
    for text in texts:
        first, second = _fit(text, length)
        parts = [frame[0], first, frame[1]] + ([second, frame[1]] if second is not None else [])
        framed.append(np.concatenate(parts))
        inner = np.zeros(len(framed[-1]), bool)
        inner[1 : 1 + len(first)] = True
        follow = np.zeros(len(framed[-1]), bool)
        follow[1 : 1 + len(first)] = text.first_continues[: len(first)]
        segment = np.zeros(len(framed[-1]), np.int64)
        if second is not None and text.second_continues is not None:
            start = len(first) + 2
            inner[start : start + len(second)] = True
            follow[start : start + len(second)] = text.second_continues[: len(second)]
            segment[start:] = 1
        continues.append(follow)
        segments.append(segment)
        hideable.append(inner)
    sizes = np.array([len(ids) for ids in framed])
    ids, hidden = _hide(
        np.concatenate(framed),
        np.concatenate(hideable),
        np.concatenate(continues) if config.whole_words else np.zeros(sizes.sum(), bool),
        np.repeat(np.arange(len(sizes)), sizes),
        tokenizer,
        config,
        random,
    )
    targets = np.where(hidden, np.concatenate(framed), IGNORED)
    ends = np.cumsum(sizes)
    return [
        Example(
            ids[start:end],
            targets[start:end],
            segment if config.next_sentence else None,
            label=text.label,
            origin=text.origin,
        )
        for start, end, segment, text in zip(ends - sizes, ends, segments, texts)
    ]


def _fit(text: _Text, length: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Both parts, the longer one cut at its end until the frame holds them."""
    first, second = text.first, text.second
    if second is None:
        return first[: length - 2], None
    over = len(first) + len(second) + 3 - length
    while over > 0:
        if len(first) > len(second):
            take = min(over, max(len(first) - len(second), 1))
            first = first[: len(first) - take]
        else:
            take = min(over, max(len(second) - len(first), 1))
            second = second[: len(second) - take]
        over -= take
    return first, second


def _hide(
    ids: np.ndarray,
    hideable: np.ndarray,
    continues: np.ndarray,
    example: np.ndarray,
    tokenizer: Tokenizer,
    config: MaskingConfig,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide `share` of the words of each example, at least one; all arrays (n,).

    Returns:
        The ids as the model sees them, and which places are to be predicted.
    """
    word = np.cumsum(~(continues & hideable)) - 1
    place = np.flatnonzero(hideable)
    words, where = np.unique(word[place], return_index=True)
    owner = example[place][where]
    # in a random order within each example, the first `share` of its words
    order = np.lexsort((random.random(len(words)), owner))
    _, starts, counts = np.unique(owner[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    wanted = np.maximum(1, np.round(config.share * counts)).astype(np.int64)
    chosen = np.zeros(word.max() + 2 if len(word) else 1, bool)
    chosen[words[order[rank < np.repeat(wanted, counts)]]] = True
    hidden = chosen[word] & hideable
    seen, dice = ids.copy(), random.random(len(ids))
    seen[hidden & (dice < config.masked)] = tokenizer.require_mask()
    other = hidden & (dice >= config.masked) & (dice < config.masked + config.replaced)
    seen[other] = random.choice(ordinary_tokens(tokenizer), int(other.sum()))
    return seen, hidden


def ordinary_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that are not special."""
    special = {tokenizer.vocabulary[text] for text in tokenizer.special_texts}
    return np.array(sorted(set(tokenizer.vocabulary.values()) - special), np.int64)
