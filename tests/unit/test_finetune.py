"""Chat fine-tuning: which tokens are targets, which rows are held out, and what a run will cost."""

import json

import numpy as np
import pytest

from lexmill.config import apply_overrides, from_mapping
from lexmill.data.labelled import Conversation
from lexmill.errors import ConfigError, DataError, FileError
from lexmill.finetune.chat import Replay, chat_example, fit, join_conversations
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.plan import plan_finetuning
from lexmill.finetune.rows import TaskData
from lexmill.finetune.stage import make_lesson
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_model
from lexmill.model.directory import ModelDirectory
from lexmill.model.lora import begin_adapter
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
    replay = Replay(TaskData(path=documents).texts("train"), tokenizer, 64)
    pieces = replay.draw(1000, np.random.default_rng(0))
    assert 1000 <= sum(len(piece.tokens) for piece in pieces) < 1064
    assert all(len(piece.tokens) <= 64 for piece in pieces)
    assert replay.draw(0, np.random.default_rng(0)) == []


# Rows of a file


def talks(path, count):
    rows = [
        {"messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": "a"}]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def messages(data, split):
    return [json.dumps(row.messages) for row in data.rows(split, Conversation)]


def test_a_file_is_split_by_content(tmp_path):
    path = talks(tmp_path / "talks.jsonl", 200)
    parts = {
        split: messages(TaskData(path=path, fraction=0.2, seed=7), split) for split in ("train", "validation")
    }
    assert not set(parts["train"]) & set(parts["validation"]) and sum(map(len, parts.values())) == 200
    assert 20 < len(parts["validation"]) < 60
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n", "utf-8")
    assert messages(TaskData(path=path, fraction=0.2, seed=7), "train") == parts["train"][::-1]
    assert not messages(TaskData(path=path, fraction=0.0, seed=7), "validation")


def test_a_file_of_its_own_is_held_out(tmp_path, documents):
    path, held = talks(tmp_path / "talks.jsonl", 9), talks(tmp_path / "held.jsonl", 4)
    assert len(messages(TaskData(path=path, held_out=held), "train")) == 9
    assert len(messages(TaskData(path=path, held_out=held), "validation")) == 4
    assert messages(TaskData(path=documents), "train") and list(TaskData(path=documents).texts("train"))
    with pytest.raises(FileError, match="no such data"):
        messages(TaskData(path=tmp_path / "nowhere"), "train")


@pytest.mark.parametrize("lora", [None, LoraConfig()], ids=["whole", "adapter"])
def test_what_is_not_said_is_chosen(lora):
    chosen = FinetuneConfig(steps=1, lora=lora)
    assert chosen.optimizer == ("adamw" if lora else "muon") and chosen.learning_rate > 0
    told = FinetuneConfig(steps=1, lora=lora, optimizer="muon", learning_rate=0.25)
    assert (told.optimizer, told.learning_rate) == ("muon", 0.25)


def test_settings_of_an_adapter_come_from_a_table():
    table = apply_overrides({"steps": 1, "lora": {}}, ["lora.rank=4", "lora.rank_pattern.q_proj=2"])
    config = from_mapping(FinetuneConfig, table, "finetune")
    assert config.lora.rank == 4 and config.lora.rank_pattern == {"q_proj": 2}
    with pytest.raises(ConfigError, match="Did you mean 'rank'"):
        from_mapping(FinetuneConfig, {"steps": 1, "lora": {"rnk": 4}}, "finetune")


def test_a_plan_counts_what_learns(model_path):
    shape = ModelDirectory.open(model_path).config
    settings = {"steps": 10, "rows": 4, "row_length": 64}
    loras = (None, LoraConfig(rank=4), LoraConfig(rank=4, quantise="q4_1"))
    plans = [plan_finetuning(FinetuneConfig(**settings, lora=lora), shape, seconds=0) for lora in loras]
    whole, adapter, quantised = plans
    assert whole.learning == whole.parameters.total > 4 * adapter.learning
    assert adapter.memory.gradients == 4 * adapter.learning and adapter.checkpoint == 12 * adapter.learning
    model = build_model(shape)
    made = begin_adapter(model, LoraConfig(rank=4), 0)
    assert adapter.learning == made.parameters
    assert quantised.memory.weights < adapter.memory.weights
    assert adapter.step_flops < whole.step_flops
    again = FinetuneConfig(**settings, lora=LoraConfig(rank=4), gradient_checkpointing=True)
    assert plan_finetuning(again, shape, seconds=0).memory.step < adapter.memory.step


def test_conversations_that_are_too_long_are_the_user_s_choice(tmp_path, model_path):
    base = ModelDirectory.open(model_path)
    replies = ["short", "long " * 80, "short again"]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": reply}]} for reply in replies]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")

    def lesson(choice):
        return make_lesson(
            FinetuneConfig(steps=1, validation_fraction=0.0, row_length=64, too_long=choice), base, path
        )

    with pytest.raises(
        DataError, match=r"1 rows are longer than the 64 tokens of a training row: .*row 2 \(\d+ tok"
    ):
        lesson("error")
    assert len(lesson("drop").examples(0)) == 2 and "1 rows are left out" in lesson("drop").told
    assert max(len(example.tokens) for example in lesson("cut").examples(0)) == 64
