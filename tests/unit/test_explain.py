"""Attention as numbers: tokens and words, views, rollout, a word in several texts."""

import json

import numpy as np
import pytest
from explain_samples import random_weights, sample_map, wordpiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.inference.explain import AttentionMap, attention_map
from lexmill.inference.meaning import word_in_texts
from lexmill.inference.pieces import find_word, grouped, labels, pieces

# ---------------------------------------------------------------- tokens and words


def words_of(tokenizer, text):
    return [word.text for word in grouped(pieces(tokenizer, text), text)[0]]


def test_wordpiece_tokens_belong_to_words():
    found = pieces(wordpiece(), "The riverbank, unbank")
    assert [piece.text for piece in found] == ["[CLS]", "The", "river", "bank", ",", "un", "bank", "[SEP]"]
    assert [piece.word for piece in found] == [0, 1, 2, 2, 3, 4, 4, 5]
    assert [piece.special for piece in found] == [True] + [False] * 6 + [True]
    assert labels(found)[2:4] == ["river", "·bank"]
    assert words_of(wordpiece(), "The riverbank, unbank") == [
        "[CLS]",
        "The",
        "riverbank",
        ",",
        "unbank",
        "[SEP]",
    ]


def test_byte_level_tokens_are_shown_without_their_space(tokenizer):
    text = "The captain of the ship"
    found = pieces(tokenizer, text)
    assert all(piece.text == piece.text.strip() for piece in found)
    assert words_of(tokenizer, text) == text.split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我爱river。", ["我", "爱", "river", "。"]),
        (
            "don't pay 3.14, well-known (yes)—no",
            ["don't", "pay", "3.14", ",", "well-known", "(", "yes", ")—", "no"],
        ),
        ("a\n\nb", ["a", "↵↵", "b"]),
        ("한국 사람", ["한국", "사람"]),
        ("ok 😀", ["ok", "😀"]),
        ("", []),
        ("   ", ["␣␣␣"]),
    ],
)
def test_words_of_many_scripts(tokenizer, text, words):
    assert words_of(tokenizer, text) == words


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_every_token_has_a_word_and_words_keep_their_order(tokenizer, text):
    found = pieces(tokenizer, text)
    numbers = [piece.word for piece in found]
    assert numbers == sorted(numbers) and set(numbers) == set(range(len(set(numbers))))
    words, members = grouped(found, text)
    assert [index for member in members for index in member] == list(range(len(found)))
    assert all(word.text for word in words)


def test_a_special_text_inside_the_text_is_special(tokenizer):
    found = pieces(tokenizer, "yes<|im_end|>no")
    assert [piece.text for piece in found if piece.special] == ["<|im_end|>"]


def test_ids_with_a_start_token_or_without_padding_fit(tokenizer):
    ids = tokenizer.encode("the ship")
    with_start = pieces(tokenizer, "the ship", [0, *ids, 2])
    assert with_start[0].special and with_start[-1].special
    assert with_start[1].text == "the"
    with pytest.raises(DataError, match="not those of the text"):
        pieces(tokenizer, "the ship", [*ids, *ids])


def test_words_are_found_in_any_case_and_across_characters(tokenizer):
    assert len(find_word(pieces(wordpiece(), "The riverbank the"), "THE")) == 2
    assert find_word(pieces(wordpiece(), "The riverbank"), "Riverbank") == [[2, 3]]
    assert find_word(pieces(wordpiece(), "The riverbank"), "bank") == []
    found = pieces(tokenizer, "我去银行")
    place = find_word(found, "银行")[0]
    assert (found[place[0]].start, found[place[-1]].end) == (2, 4)


# ---------------------------------------------------------------- maps and views


def by_hand(weights, kind="encoder"):
    """A map over the words of a small text with weights given as nested lists."""
    text = "the bank river"[: {2: 8, 3: 14}[len(weights[0][0]) - 2]]
    tokenizer = wordpiece()
    return attention_map(tokenizer, text, tokenizer.encode(text), weights, kind)


def test_rollout_by_hand():
    first = [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    second = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    rolled = by_hand([[first], [second]]).rollout()
    # A1' row "the" = [0, .75, .25, 0]; A2' row "bank" = [0, .5, .5, 0]; product: .5 * A1'[the] + .5 * A1'[bank]
    np.testing.assert_allclose(rolled[1], [0, 0.75, 0.25, 0])
    np.testing.assert_allclose(rolled[2], [0, 0.375, 0.625, 0])


def test_rollout_is_that_of_the_paper():
    attention = sample_map(layers=4, heads=3)
    expected = np.eye(len(attention.queries))
    for layer in attention.weights.astype(np.float64):
        mixed = layer.mean(axis=0) + np.eye(len(expected))
        mixed /= mixed.sum(axis=-1, keepdims=True)
        expected = mixed @ expected
    np.testing.assert_allclose(attention.rollout(), expected, atol=1e-6)
    np.testing.assert_allclose(attention.rollout().sum(-1), 1, atol=1e-5)


def test_rollout_of_a_causal_map_stays_causal(tokenizer):
    ids = tokenizer.encode("the ship was lost")
    attention = attention_map(
        tokenizer, "the ship was lost", ids, random_weights(2, 2, len(ids), causal=True), "decoder"
    )
    assert not np.triu(attention.rollout(), 1).any()


def test_words_add_keys_and_average_queries():
    tokenizer = wordpiece()
    ids = tokenizer.encode("The riverbank")
    weights = random_weights(2, 3, len(ids))
    words = attention_map(tokenizer, "The riverbank", ids, weights).words()
    assert [word.text for word in words.queries] == ["[CLS]", "The", "riverbank", "[SEP]"]
    assert words.queries[2].ids == tuple(ids[2:4])
    both = weights[:, :, 2:4]
    np.testing.assert_allclose(words.weights[:, :, 2, 2], both[..., 2:4].sum(-1).mean(-1), atol=1e-6)
    np.testing.assert_allclose(words.weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(words.rollout().sum(-1), 1, atol=1e-5)


def test_special_tokens_are_hidden_after_averaging():
    one = [[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    two = [[1, 0, 0, 0], [0, 0.2, 0.8, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    attention = by_hand([[one, two]])
    view = attention.view()
    np.testing.assert_allclose(view.weights[0], [0.15 / 0.55, 0.4 / 0.55], atol=1e-6)
    np.testing.assert_allclose(view.hidden, [0.45, 0.5], atol=1e-6)
    assert view.query_labels == ["the", "bank"]
    shown = attention.view(special=True)
    np.testing.assert_allclose(shown.weights, attention.mean())
    assert shown.key_labels == ["[CLS]", "the", "bank", "[SEP]"]
    # a head whose word looks at special tokens only has nothing left to scale
    assert attention.view("head", layer=1, head=2).weights[1].tolist() == [0, 0]


def test_strongest_head():
    attention = sample_map(layers=3, heads=4)
    layer, head, weight = attention.strongest_head(1, 2)
    assert weight == attention.weights[:, :, 1, 2].max() == attention.mean(layer, head)[1, 2]
    assert attention.strongest()[1, 2] == weight


def test_looks_are_ranked():
    looks = by_hand([[[[1, 0, 0, 0, 0], [0, 0.2, 0.5, 0.3, 0], *np.eye(5)[2:]]]]).looks("The")
    assert [look.text for look in looks] == ["bank", "river", "the"]
    assert looks[0].weight == pytest.approx(0.5)


def test_a_map_survives_json():
    attention = sample_map()
    for one in (attention, attention.words()):
        again = AttentionMap.from_json(json.loads(json.dumps(one.to_json())))
        np.testing.assert_allclose(again.weights, one.weights, atol=1e-6)
        np.testing.assert_allclose(again.rollout(), one.rollout(), atol=1e-6)
        assert (again.queries, again.keys, again.kind) == (one.queries, one.keys, one.kind)


def test_cross_attention_has_two_texts():
    tokenizer = wordpiece()
    source, target = "the bank river", "bank"
    ids, other = tokenizer.encode(source), tokenizer.encode(target)
    cross = attention_map(
        tokenizer,
        target,
        other,
        random_weights(1, 2, len(other), len(ids)),
        "cross",
        key_text=source,
        key_ids=ids,
    )
    encoder = attention_map(tokenizer, source, ids, random_weights(1, 2, len(ids)), more=[cross])
    assert encoder.part("cross") is cross
    assert encoder.words().part("cross").view().weights.shape == (1, 3)
    assert AttentionMap.from_json(encoder.to_json()).part("cross").key_text == source
    with pytest.raises(ModelError, match="cross-attention joins two"):
        cross.rollout()
    with pytest.raises(ModelError, match="no decoder attention"):
        encoder.part("decoder")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {"layer": 3}, "no layer 3: this model has 2 layers"),
        ("head", {"layer": 1, "head": 0}, "no head 0: this model has 3 heads"),
        ("head", {"head": 1}, "needs --layer and --head"),
        ("rollout", {"layer": 1}, "goes through all layers"),
        ("strongest", {"head": 1}, "leave out --head"),
        ("flow", {}, "no view 'flow'"),
    ],
)
def test_views_that_cannot_be(name, options, message):
    with pytest.raises(ConfigError, match=message):
        sample_map(layers=2, heads=3).view(name, **options)


def test_words_that_are_not_there():
    with pytest.raises(DataError, match=r"'ship' is not in the text.*the, bank"):
        sample_map().looks("ship")
    with pytest.raises(ConfigError, match="special token"):
        sample_map().looks("[CLS]")


@pytest.mark.parametrize(
    "weights", [np.ones((1, 2, 3)), np.ones((1, 1, 5, 5)), np.full((1, 1, 5, 5), np.nan)]
)
def test_weights_that_are_no_attention(weights):
    tokenizer = wordpiece()
    with pytest.raises(ValueError):
        attention_map(tokenizer, "the bank river", tokenizer.encode("the bank river"), weights)


def test_a_text_of_special_tokens_only_shows_them():
    tokenizer = wordpiece()
    assert attention_map(
        tokenizer, "", tokenizer.encode(""), random_weights(1, 1, 2)
    ).view().weights.shape == (2, 2)


# ---------------------------------------------------------------- one word in several texts


def test_a_word_s_vectors_are_the_mean_of_its_tokens():
    tokenizer = wordpiece()
    texts = ["the riverbank", "riverbank the bank"]
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(3, len(tokenizer.encode(text)), 8)) for text in texts]
    found = word_in_texts(tokenizer, "Riverbank", texts, hidden)
    a, b = hidden[0][:, 2:4].mean(1), hidden[1][:, 1:3].mean(1)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(found.similarity[:, 0, 1], cosine, atol=1e-5)
    np.testing.assert_allclose(found.similarity[:, 0, 0], 1, atol=1e-5)
    # the only pair of different other words is "the" in the first text and "bank" in the second
    the, bank = hidden[0][:, 1], hidden[1][:, 4]
    expected = (the * bank).sum(-1) / np.linalg.norm(the, axis=-1) / np.linalg.norm(bank, axis=-1)
    np.testing.assert_allclose(found.baseline, expected, atol=1e-5)
    assert json.loads(json.dumps(found.to_json()))["layers"][2]["similarity"][0][1] == pytest.approx(
        cosine[2], abs=1e-5
    )


def test_a_text_without_the_word_is_named():
    with pytest.raises(DataError, match="not in text 2, 'the river'"):
        word_in_texts(wordpiece(), "bank", ["the bank", "the river"], [])
    with pytest.raises(ConfigError, match="two texts"):
        word_in_texts(wordpiece(), "bank", ["the bank"], [])
    with pytest.raises(DataError, match="empty"):
        word_in_texts(wordpiece(), " ", ["the bank", "the bank"], [])


def test_without_other_words_there_is_no_baseline():
    found = word_in_texts(wordpiece(), "bank", ["bank", "bank"], [np.ones((2, 3, 4))] * 2)
    assert np.isnan(found.baseline).all()
    assert found.to_json()["layers"][0]["other_words"] is None
