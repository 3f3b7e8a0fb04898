"""Masked words, next sentences and span corruption: what the examples hold, and that models learn from them."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.data.shards import TokenShard
from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.pretrain.masked import (
    ELSEWHERE,
    FOLLOWS,
    MaskingConfig,
    _cut,
    _fit,
    _Texts,
    masked_examples,
    masked_loss,
    ordinary_tokens,
)
from lexmill.pretrain.sentences import FlatSentences, split_sentences, tokenize_sentences
from lexmill.pretrain.shape import ShapeConfig
from lexmill.pretrain.spans import SpanConfig, corrupt, plan_rows, plan_text
from lexmill.pretrain.stage import PretrainConfig, pretrain
from lexmill.progress import Progress
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer
from lexmill.train.batches import pack
from lexmill.train.cross_entropy import linear_cross_entropy
from lexmill.train.examples import IGNORED


@pytest.fixture(scope="module")
def wordpiece(prose):
    return train_tokenizer([prose], TokenizerConfig(kind="wordpiece", vocab_size=600, lowercase=True))


@pytest.fixture(scope="module")
def unigram(prose):
    return train_tokenizer([prose], TokenizerConfig(kind="unigram", vocab_size=600, sentinels=32))


@pytest.fixture(scope="module")
def sentences(documents, wordpiece, tmp_path_factory):
    return tokenize_sentences(documents, wordpiece, tmp_path_factory.mktemp("tokens"), chinese_words=False)


def test_sentences_of_both_scripts():
    assert split_sentences("He came. She went! “Why?” asked I.\nA new line") == [
        "He came.", "She went!", "“Why?”", "asked I.", "A new line",
    ]  # fmt: skip
    assert split_sentences("很好吃。下次还买！“真的？”是") == ["很好吃。", "下次还买！", "“真的？”", "是"]
    assert split_sentences("  \n ") == []


def test_a_text_of_one_sentence_is_cut_between_its_clauses():
    assert split_sentences("质量不错，快递很快、包装好 下次还买") == [
        "质量不错，",
        "快递很快、",
        "包装好",
        "下次还买",
    ]
    assert split_sentences("3,000 people came, and they left at 10:30") == [
        "3,000 people came,", "and they left at 10:30",
    ]  # fmt: skip
    assert split_sentences("很好，真的。下次还买") == ["很好，真的。", "下次还买"]  # two sentences stay whole


def test_token_shards_are_made_again_only_where_what_they_come_from_changed(
    documents, wordpiece, unigram, tmp_path
):
    from lexmill.pretrain.lessons import tokenize_documents

    def made(tokenizer):
        tokenize_documents(documents, tokenizer, tmp_path / "tokens")
        return (tmp_path / "tokens" / "train" / "tokens.bin").stat().st_mtime_ns

    first = made(wordpiece)
    assert made(wordpiece) == first
    assert made(unigram) != first
    assert made(wordpiece) != first
    # a making that was cut short leaves nothing that says "these are the shards of ..."
    with pytest.raises(RuntimeError, match="killed"):
        tokenize_documents(documents, unigram, tmp_path / "tokens", progress=Killing())
    made(wordpiece)
    assert TokenShard.open(tmp_path / "tokens" / "train").tokenizer_sha256 == wordpiece.sha256


class Killing(Progress):
    """Ends the making of the second split."""

    def task(self, label, total=None, unit="rows"):
        if "validation" in label:
            raise RuntimeError("killed")
        return super().task(label, total, unit)


def test_sentences_come_back_from_disk(sentences, documents, wordpiece):
    from lexmill.data.documents import read_documents

    first = next(d for d in read_documents(documents / "train.parquet") if d.kind == "text")
    expected = wordpiece.encode_plain(split_sentences(first.text))
    assert [ids.tolist() for ids, _ in sentences["train"][0]] == expected
    for ids, continues in sentences["train"][0]:
        assert not continues[0]
        assert (wordpiece.continues_word[ids] == continues)[1:].all()


@pytest.mark.parametrize("whole", [False, True])
def test_masking_hides_the_stated_share_in_the_stated_ways(sentences, wordpiece, whole):
    config = MaskingConfig(whole_words=whole, next_sentence=False)
    examples = masked_examples(sentences["train"], wordpiece, config, 64, (0, 0, 3))
    special = {wordpiece.vocabulary[text] for text in wordpiece.special_texts}
    hidden, kinds, words = 0, Counter(), 0
    for example in examples:
        at = example.targets != IGNORED
        assert at.any(), "each example has a target"
        original = np.where(at, example.targets, example.tokens)
        assert not set(original[at].tolist()) & special
        assert original[0] == wordpiece.ids.cls and original[-1] == wordpiece.ids.sep
        inner = len(original) - 2
        hidden += at.sum()
        words += inner
        if not whole:
            assert at.sum() == max(1, round(0.15 * inner))
        else:
            follows = wordpiece.continues_word[original]
            for place in np.flatnonzero(follows[1:-1]) + 1:
                if place > 1:
                    assert at[place] == at[place - 1], "a word is hidden whole or not at all"
        kinds["mask"] += int((example.tokens[at] == wordpiece.ids.mask).sum())
        kinds["same"] += int((example.tokens[at] == original[at]).sum())
    assert hidden / words == pytest.approx(0.15, abs=0.02)
    assert kinds["mask"] / hidden == pytest.approx(0.8, abs=0.03)
    # a random token may be the very one that stood there
    assert kinds["same"] / hidden == pytest.approx(0.1, abs=0.03)


def test_every_epoch_masks_anew_and_the_same_epoch_alike(sentences, wordpiece):
    config = MaskingConfig(next_sentence=False)
    first, again, other = (
        masked_examples(sentences["train"], wordpiece, config, 64, (0, epoch, 3)) for epoch in (0, 0, 1)
    )
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again))
    assert any(len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(first, other))


def test_pairs_are_half_true_and_false_ones_come_from_other_documents(sentences, wordpiece):
    config = MaskingConfig(share=0.01, masked=0.0, replaced=0.0)  # hides nothing: the text stays readable
    train = sentences["train"]
    examples = masked_examples(train, wordpiece, config, 64, (0, 0, 3))
    whole = [np.concatenate([ids for ids, _ in train[index]]) for index in range(len(train))]
    texts = ["," + ",".join(map(str, ids)) + "," for ids in whole]
    labels = Counter(example.label for example in examples)
    assert labels[FOLLOWS] > 20
    assert abs(labels[FOLLOWS] - labels[ELSEWHERE]) <= 1
    for example in examples:
        if example.label == IGNORED:
            continue
        ends = np.flatnonzero(example.tokens == wordpiece.ids.sep)
        first, second = example.tokens[1 : ends[0]], example.tokens[ends[0] + 1 : ends[1]]
        assert (example.segments == (np.arange(len(example.tokens)) > ends[0])).all()
        both = [
            {index for index, text in enumerate(texts) if "," + ",".join(map(str, part)) + "," in text}
            for part in (first, second)
        ]
        if example.label == FOLLOWS:
            assert both[0] & both[1]
        elif len(first) > 8 and len(second) > 8:  # a short one may stand in two documents
            assert not both[0] & both[1]


def test_flat_sentences_are_those_of_the_documents(sentences):
    for split in sentences.values():
        flat = split.flat()
        expected = [(index, ids, more) for index in range(len(split)) for ids, more in split[index]]
        assert flat.documents.tolist() == [index for index, _, _ in expected]
        assert flat.sizes.tolist() == [len(ids) for _, ids, _ in expected]
        assert (flat.ids == np.concatenate([ids for _, ids, _ in expected])).all()
        assert (flat.continues == np.concatenate([more for _, _, more in expected])).all()


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=8),
    room=st.integers(4, 30),
)
def test_texts_are_as_full_as_the_row_allows(sizes, room):
    """Against a plain loop: sentences in order, a new text where the next one has no room."""
    flat = np.array([size for document in sizes for size in document])
    owner = np.repeat(np.arange(len(sizes)), [len(document) for document in sizes])
    ids = np.arange(flat.sum())
    found = _cut(FlatSentences(ids, np.zeros(len(ids), bool), flat, owner), room, False, None)
    expected, place = [], 0
    for document in sizes:
        texts = [0]
        for size in document:
            for piece in [room] * (size // room) + [size % room] * (size % room > 0):
                if texts[-1] and texts[-1] + piece > room:
                    texts.append(0)
                texts[-1] += piece
        for text in texts:
            expected.append((place, text))
            place += text
    assert list(zip(found.first.tolist(), found.first_size.tolist())) == expected
    assert not found.second_size.any()


@pytest.mark.parametrize("length", [8, 9, 20])
def test_the_longer_part_of_a_pair_is_cut(length):
    both = np.array([(a, b) for a in range(1, 30) for b in range(1, 30)])
    zero, label = np.zeros(len(both), np.int64), np.full(len(both), ELSEWHERE)
    texts = _Texts(zero, both[:, 0].copy(), zero, both[:, 1].copy(), label, zero)
    _fit(texts, length)
    for (a, b), first, second in zip(both.tolist(), texts.first_size.tolist(), texts.second_size.tolist()):
        while a + b > length - 3:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        assert (first, second) == (a, b)


def test_pairs_need_two_documents(sentences, wordpiece):
    class One:
        def flat(self):
            flat = sentences["train"].flat()
            few = int((flat.documents == 0).sum())
            tokens = int(flat.sizes[:few].sum())
            return FlatSentences(
                flat.ids[:tokens], flat.continues[:tokens], flat.sizes[:few], flat.documents[:few]
            )

    with pytest.raises(DataError, match="two documents"):
        masked_examples(One(), wordpiece, MaskingConfig(), 64, (0, 0, 3))


def test_chinese_words_are_hidden_whole(tmp_path):
    jieba = pytest.importorskip("jieba")
    from lexmill.data.prepare import PrepareConfig, SourceConfig, prepare

    text = "我喜欢吃新鲜的苹果和水果，味道非常不错。下次还会继续购买这家的产品。"
    (tmp_path / "a.txt").write_text("\n".join([text] * 12), "utf-8")
    prepare(
        PrepareConfig(sources=(SourceConfig(path="a.txt"),), validation_fraction=0.0),
        tmp_path / "d",
        tmp_path,
    )
    letters = "".join(map(chr, range(0x4E00, 0x4E80)))
    tokenizer = train_tokenizer([text * 5, letters * 2], TokenizerConfig(kind="wordpiece", vocab_size=128))
    found = tokenize_sentences(tmp_path / "d", tokenizer, tmp_path / "t", chinese_words=True)
    continues = found["train"][0][0][1]
    words = []
    for word in jieba.lcut(split_sentences(text)[0]):
        words += [False] + [True] * (len(word) - 1)
    assert continues.tolist() == words


@settings(max_examples=60, deadline=None)
@given(raw=st.integers(2, 300), share=st.floats(0.01, 0.9), mean=st.floats(1, 12), seed=st.integers(0, 1000))
def test_spans_keep_every_token_and_the_planned_lengths(raw, share, mean, seed):
    plan = plan_text(raw, SpanConfig(share=share, mean=mean))
    ids, sentinels = np.arange(1000, 1000 + raw), np.arange(500, 500 + plan.gaps)[::-1].copy()
    # two other texts around it, so that nothing runs over into a neighbour
    others = [
        plan_text(2, SpanConfig(share=share, mean=mean)),
        plan_text(9, SpanConfig(share=share, mean=mean)),
    ]
    plans = [others[0], plan, others[1]]
    texts = np.concatenate([np.full(2, 7), ids, np.full(9, 8)])
    if len(sentinels) < others[1].gaps:
        sentinels = np.arange(500, 500 + others[1].gaps)[::-1].copy()
    raw, removed, gaps = (
        np.array([getattr(one, name) for one in plans]) for name in ("raw", "removed", "gaps")
    )
    examples = corrupt(texts, raw, removed, gaps, sentinels, 1, 0, np.random.default_rng(seed))
    for one, which in zip((examples[0], examples[2]), others):
        assert (len(one.tokens), len(one.targets)) == (which.read, which.written)
    example, sentinels = examples[1], sentinels[: plan.gaps]
    assert len(example.tokens) == plan.read
    assert len(example.targets) == len(example.decoder_tokens) == plan.written
    assert example.tokens[-1] == example.targets[-1] == 1
    assert example.decoder_tokens[0] == 0 and (example.decoder_tokens[1:] == example.targets[:-1]).all()
    gaps = {}
    for token in example.targets[:-1]:
        if token in sentinels:
            gaps[int(token)] = []
            last = int(token)
        else:
            gaps[last].append(int(token))
    assert list(gaps) == sentinels.tolist() and all(gaps.values())
    rebuilt = [part for token in example.tokens[:-1] for part in gaps.get(int(token), [int(token)])]
    assert rebuilt == ids.tolist()


@pytest.mark.parametrize("length", [8, 64, 128, 512])
def test_rows_of_spans_are_full(length):
    plan = plan_rows(length, SpanConfig())
    assert length - 1 <= plan.read <= length
    if length >= 64:
        assert plan.removed / plan.raw == pytest.approx(0.15, abs=0.01)
        assert plan.removed / plan.gaps == pytest.approx(3, abs=0.4)  # whole gaps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [5, 2500])
def test_cross_entropy_in_parts_equals_the_plain_one(bias, rows):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((rows, 12), (31, 12), (31,))
    )
    targets = torch.randint(0, 31, (rows,), generator=generator)
    logits = hidden @ weight.T + (offset if bias else 0)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight, *([offset] if bias else [])])
    ours, none = linear_cross_entropy(hidden, targets, weight, offset if bias else None)
    found = torch.autograd.grad(ours * 0.3, [hidden, weight, *([offset] if bias else [])])
    assert none is None and float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for mine, other in zip(found, expected):
        assert (mine - other).abs().max() < 1e-5 * max(1.0, float(other.abs().max()))
    with torch.no_grad():
        again, right = linear_cross_entropy(hidden, targets, weight, offset if bias else None)
    assert float(again) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert right == int((logits.argmax(-1) == targets).sum())


def shape(family, **changes):
    return ShapeConfig(**{**dict(family=family, width=32, layers=2, heads=2, context=64), **changes})


def test_losses_of_a_packed_masked_batch_are_those_of_its_examples(sentences, wordpiece):
    from lexmill.model.build import build_model
    from lexmill.train.objective import measure

    examples = masked_examples(sentences["train"], wordpiece, MaskingConfig(), 40, (0, 0, 3))[:12]
    config = PretrainConfig(steps=1, model=shape("bert"))
    model = build_model(config.shape(wordpiece.vocab_size))
    model.initialise(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    packed = measure(model, masked_loss, [pack(examples, 64, 0)])
    alone = measure(model, masked_loss, [pack([example], 64, 0) for example in examples])
    assert packed.targets == alone.targets and packed.targets["pairs"] > 0
    for name in ("tokens", "pairs"):
        assert packed.losses[name] == pytest.approx(alone.losses[name], abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_each_shape_learns_and_goes_on_bit_for_bit(family, documents, wordpiece, unigram, tmp_path):
    tokenizer = unigram if family == "t5" else wordpiece
    config = PretrainConfig(
        steps=14,
        rows=4,
        micro_rows=2,
        precision="float32",
        checkpoint_seconds=0.0,
        validate_every=7,
        model=shape(family, dropout=0.1),
    )
    torch.set_num_threads(1)
    whole, result = pretrain(config, documents, tokenizer, tmp_path / "whole")
    assert result.loss < np.log(600) * (1 if family == "t5" else 1.2)

    class Killed(Exception):
        pass

    def kill(model, tokenizer, prompt):
        raise Killed

    with pytest.raises(Killed):
        pretrain(
            PretrainConfig(**{**vars(config), "prompts": ("x",), "sample_every": 5}),
            documents,
            tokenizer,
            tmp_path / "killed",
            sample=kill,
        )
    again, _ = pretrain(config, documents, tokenizer, tmp_path / "killed")
    first, second = whole.weights(), again.weights()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_objectives_that_do_not_fit_are_refused(documents, tokenizer, wordpiece, prose, tmp_path):
    with pytest.raises(ConfigError, match="'causal' does not fit the family 'bert'"):
        PretrainConfig(steps=1, model=shape("bert"), objective="causal")
    with pytest.raises(ConfigError, match="'span_corruption' does not fit"):
        PretrainConfig(steps=1, model=shape("llama"), objective="span_corruption")
    with pytest.raises(ConfigError, match="'decoder_layers' fits"):
        PretrainConfig(steps=1, model=shape("bert", decoder_layers=2))
    with pytest.raises(ConfigError, match="multiple of 'heads'"):
        PretrainConfig(steps=1, model=shape("t5", heads=3))
    with pytest.raises(ModelError, match=r"\[MASK\]"):
        pretrain(PretrainConfig(steps=1, model=shape("bert")), documents, tokenizer, tmp_path / "a")
    with pytest.raises(ModelError, match="sentinel"):
        pretrain(PretrainConfig(steps=1, model=shape("t5")), documents, wordpiece, tmp_path / "b")
    with pytest.raises(ModelError, match="causal"):
        pretrain(PretrainConfig(steps=1, model=shape("llama")), documents, wordpiece, tmp_path / "c")
    few = train_tokenizer([prose], TokenizerConfig(kind="unigram", vocab_size=300, sentinels=2))
    with pytest.raises(ModelError, match="sentinel"):
        pretrain(PretrainConfig(steps=1, model=shape("t5")), documents, few, tmp_path / "d")


def test_random_replacements_are_ordinary_tokens(wordpiece):
    special = {wordpiece.vocabulary[text] for text in wordpiece.special_texts}
    assert not special & set(ordinary_tokens(wordpiece).tolist())
