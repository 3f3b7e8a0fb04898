"""Chat fine-tuning: which tokens are targets."""

import pytest

from lexmill.errors import DataError
from lexmill.finetune.chat import chat_example, fit
from lexmill.train.batches import IGNORED


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
