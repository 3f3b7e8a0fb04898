"""Chat fine-tuning: which tokens are targets."""

import numpy as np
import pytest

from lexmill.data.documents import read_documents
from lexmill.errors import DataError
from lexmill.finetune.chat import Replay, chat_example, fit, join_conversations
from lexmill.train.examples import IGNORED


def targets_text(example, tokenizer):
    return tokenizer.decode([token for token in example.targets if token != IGNORED])


def test_targets_are_the_replies_and_their_end(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am Anne."},
        {"role": "user", "content": "And he?"},
        {"role": "assistant", "content": "Captain Wentworth!"},
    ]
    example = chat_example(messages, tokenizer)
    assert targets_text(example, tokenizer) == "I am Anne.<|im_end|>Captain Wentworth!<|im_end|>"
    prompt = tokenizer.encode(tokenizer.render_chat(messages[:2]))
    assert list(example.tokens[: len(prompt)]) == prompt, "training sees the ids that generation will see"


@pytest.mark.parametrize("reply", ["x", "Ünïcödé 你好 🙂", "a\n\nb", "<|im_start|>", "  "])
def test_odd_replies_are_targets_too(tokenizer, reply):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": reply}]
    found = targets_text(chat_example(messages, tokenizer), tokenizer)
    assert found.endswith("<|im_end|>")
    assert found.removesuffix("<|im_end|>").strip() == reply.strip()


def test_conversations_without_a_reply_are_refused(tokenizer):
    with pytest.raises(DataError, match="no assistant message"):
        chat_example([{"role": "user", "content": "q"}], tokenizer)
    with pytest.raises(DataError, match="must begin"):
        chat_example([{"role": "assistant", "content": "q"}], tokenizer)


def test_an_example_cut_before_its_reply_is_dropped(tokenizer):
    messages = [{"role": "user", "content": "a long question " * 20}, {"role": "assistant", "content": "yes"}]
    example = chat_example(messages, tokenizer)
    assert fit(example, 8) is None
    assert fit(example, 1000) is not None


def test_joined_conversations_are_used_once_each():
    def talk(number, system=False):
        start = [{"role": "system", "content": "s"}] if system else []
        return [*start, {"role": "user", "content": str(number)}, {"role": "assistant", "content": "a"}]

    talks = [talk(number, system=number % 5 == 0) for number in range(40)]
    joined = join_conversations(talks, 4, np.random.default_rng(0))
    said = [message["content"] for one in joined for message in one if message["role"] == "user"]
    assert sorted(said, key=int) == [str(number) for number in range(40)]
    assert len(joined) < 40
    assert all(message["role"] != "system" for one in joined for message in one[1:])
    assert max(sum(message["role"] == "user" for message in one) for one in joined) <= 4
    assert join_conversations(talks, 1, np.random.default_rng(0)) != talks  # another order, nothing joined
    assert all(len(one) <= 3 for one in join_conversations(talks, 1, np.random.default_rng(0)))


def test_replay_draws_about_as_much_text_as_asked(documents, tokenizer):
    replay = Replay(read_documents(documents / "train.parquet"), tokenizer, 64)
    pieces = replay.draw(1000, np.random.default_rng(0))
    assert 1000 <= sum(len(piece.tokens) for piece in pieces) < 1064
    assert all(len(piece.tokens) <= 64 for piece in pieces)
    assert replay.draw(0, np.random.default_rng(0)) == []
