"""Direct preference optimisation: its loss and gradients against the formula, its reference, and a model that learns."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lexmill

from lexmill.data.labelled import Preference
from lexmill.errors import DataError
from lexmill.evaluate.scores import ScoreConfig
from lexmill.evaluate.task import score_task
from lexmill.finetune.chat import chat_example
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.prefer import (
    KnownReference,
    PreferenceLoss,
    adapter_off,
    pair_example,
    pair_examples,
    pairs_of,
    reply_logprobs,
)
from lexmill.finetune.stage import finetune
from lexmill.inference.language_model import load
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_loaded
from lexmill.model.directory import ModelDirectory
from lexmill.model.lora import LoraLinear, add_adapter, begin_adapter, without_adapter
from lexmill.progress import SILENT, Progress
from lexmill.train.batches import pack
from lexmill.train.cross_entropy import linear_cross_entropy, linear_token_losses
from lexmill.train.examples import IGNORED
from lexmill.train.parallel import own_parts
from lexmill.train.processes import Processes

BETA = 0.3
WORDS = ["sea", "town", "walk", "captain", "letter", "sister", "house", "morning", "friend", "carriage"]


def row(asked: str, chosen: str, rejected: str, *before: tuple[str, str]) -> Preference:
    messages = [{"role": role, "content": said} for role, said in before]
    messages.append({"role": "user", "content": asked})
    return Preference(origin="rows.jsonl, row 1", messages=tuple(messages), chosen=chosen, rejected=rejected)


ROWS = [
    row("Who is he?", "A captain.", "I will not say it."),
    row("Where?", "In Bath, near the sea.", "Bath."),
    row("And then?", "They walk.", "They walked away.", ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello.")),
    row("Same start?", "Yes, it is so", "Yes, it is not so"),
    row("Why?", "x", "y"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(model_path):
    return ModelDirectory.open(model_path)


def network(base, lora: LoraConfig | None = None, noise: float = 0.0):
    model = build_loaded(base.config, base.weights_on_demand())
    if lora:
        add_adapter(model, begin_adapter(model, lora, seed=0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def plain_logprobs(model, rows, tokenizer):
    """Each reply by itself, from whole logits: (pairs, 2)."""
    found = []
    for one in rows:
        before = [dict(message, weight="0") if message["role"] == "assistant" else message for message in one.messages]  # fmt: skip
        for reply in (one.chosen, one.rejected):
            example = chat_example([*before, {"role": "assistant", "content": reply}], tokenizer)
            logits = model(torch.from_numpy(example.tokens)[None])[0]
            targets = torch.from_numpy(example.targets)
            counts = targets != IGNORED
            picked = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
            found.append(picked[counts].sum())
    return torch.stack(found).view(-1, 2)


def formula(learned, known, smoothing):
    """The sigmoid loss of TRL's DPOTrainer, with its label smoothing."""
    ratios = (learned[:, 0] - learned[:, 1]) - (known[:, 0] - known[:, 1])
    return (-F.logsigmoid(BETA * ratios) * (1 - smoothing) - F.logsigmoid(-BETA * ratios) * smoothing).sum()


def gradients(model):
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("length", [128, 400])  # pairs alone and together in a row
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_the_formula(base, tokenizer, length, lora, smoothing) -> None:
    # a context of 128: no pair is longer, and rows of 400 hold several
    examples, _ = pair_examples(ROWS, tokenizer, 128)
    batch = pack(examples, length, 0)
    model = network(base, lora, noise=0.05)
    before = network(base)
    with torch.no_grad():
        known = plain_logprobs(before, ROWS, tokenizer)
    if lora:
        reference = adapter_off
    else:
        reference = KnownReference(len(ROWS))
        reference.learn(before, [batch], SILENT)
    losses = PreferenceLoss(reference, BETA, smoothing)(model, batch)
    losses.sums["pairs"].backward()
    ours = gradients(model)
    model.zero_grad()
    expected = formula(plain_logprobs(model, ROWS, tokenizer), known, smoothing)
    expected.backward()
    theirs = gradients(model)
    assert abs(float(losses.sums["pairs"].detach() - expected.detach())) < 1e-4
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=2e-4 * float(gradient.abs().max()) + 1e-6), name


def test_a_pair_shares_its_prompt_and_its_replies_do_not_see_each_other(base, tokenizer) -> None:
    example = pair_example(ROWS[1], tokenizer)
    sizes = np.bincount(example.segments)
    whole = [chat_example([*ROWS[1].messages, {"role": "assistant", "content": reply}], tokenizer) for reply in (ROWS[1].chosen, ROWS[1].rejected)]  # fmt: skip
    assert sizes[0] > 5 and len(example.tokens) == sum(len(one.tokens) for one in whole) - sizes[0]
    model = network(base)
    other = pair_example(replace(ROWS[1], chosen="Something else, and longer than it was before."), tokenizer)
    with torch.no_grad():
        found = [
            reply_logprobs(model, pack([replace_label(one)], 128, 0))[0][0, 1] for one in (example, other)
        ]
    assert abs(float(found[0] - found[1])) < 1e-4


def replace_label(example):
    return replace(example, label=1, origin=0)


def test_figures_tell_margin_and_accuracy(base, tokenizer) -> None:
    examples, _ = pair_examples(ROWS, tokenizer, 128)
    batch = pack(examples, 256, 0)
    model = network(base, LoraConfig(rank=4), noise=0.05)
    with torch.no_grad():
        losses = PreferenceLoss(adapter_off, BETA)(model, batch)
        learned = plain_logprobs(model, ROWS, tokenizer)
        with without_adapter(model):
            known = plain_logprobs(model, ROWS, tokenizer)
    rewards = BETA * (learned - known)
    margins = rewards[:, 0] - rewards[:, 1]
    assert losses.right["pairs"] == int((margins > 0).sum())
    assert losses.figures["margin"][0] == pytest.approx(float(margins.sum()), abs=1e-4)
    assert losses.figures["chosen_reward"][0] == pytest.approx(float(rewards[:, 0].sum()), abs=1e-4)
    tokens = losses.figures["chosen_logprob"][1] + losses.figures["rejected_logprob"][1]
    assert tokens == batch.counts["tokens"]
    assert batch.counts["pairs"] == len(ROWS)


def test_a_fresh_adapter_changes_nothing_so_the_loss_is_log_2(base, tokenizer) -> None:
    examples, _ = pair_examples(ROWS, tokenizer, 128)
    model = network(base, LoraConfig(rank=4, dropout=0.5))
    model.train()
    with torch.no_grad():
        model.eval()
        losses = PreferenceLoss(adapter_off, BETA)(model, pack(examples, 128, 0))
    assert float(losses.sums["pairs"]) / len(ROWS) == pytest.approx(np.log(2), abs=1e-6)


def test_the_reference_is_asked_without_dropout_and_training_goes_on(base, tokenizer) -> None:
    examples, _ = pair_examples(ROWS, tokenizer, 128)
    batch = pack(examples, 128, 0)
    model = network(base, LoraConfig(rank=4, dropout=0.5), noise=0.05)
    model.train()
    first, second = adapter_off(model, batch), adapter_off(model, batch)
    assert torch.equal(first, second) and model.training
    assert not any(module.off for module in model.modules() if isinstance(module, LoraLinear))
    plain = network(base)
    with torch.no_grad():
        assert torch.allclose(first, reply_logprobs(plain, batch)[0], atol=1e-4)


def test_a_row_that_only_stands_in_counts_nothing(base, tokenizer) -> None:
    examples, _ = pair_examples(ROWS[:2], tokenizer, 128)
    batch = pack(examples, max(len(one.tokens) for one in examples) + 1, 0)
    assert len(batch.tokens) == 2
    whole = PreferenceLoss(lambda model, batch: torch.zeros(len(reply_logprobs(model, batch)[0]), 2), BETA)
    model = network(base)
    total = float(whole(model, batch).sums["pairs"].detach())
    parts = [own_parts(batch, Processes(rank=rank, world=3), None)[0] for rank in range(3)]
    assert [len(pairs_of(part)) for part in parts] == [1, 1, 0]
    assert sum(float(whole(model, part).sums["pairs"].detach()) for part in parts) == pytest.approx(
        total, rel=1e-5
    )


def test_token_losses_are_cross_entropy_place_by_place() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2100, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (2100,))
    targets[::7] = IGNORED
    scales = torch.rand(2100)
    ours = linear_token_losses(hidden, targets, weight)
    (ours * scales).sum().backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    theirs = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="none")
    (theirs * scales).sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(found[0], hidden.grad, atol=1e-5) and torch.allclose(
        found[1], weight.grad, atol=1e-3
    )
    frozen = weight.detach()
    hidden.grad = None
    (linear_token_losses(hidden, targets, frozen) * scales).sum().backward()
    assert torch.allclose(hidden.grad, found[0], atol=1e-5)
    assert float(ours.detach().sum()) == pytest.approx(
        float(linear_cross_entropy(hidden, targets, weight)[0].detach()), rel=1e-5
    )


def test_long_pairs_are_refused_left_out_or_cut(tokenizer) -> None:
    long = [ROWS[0], replace(ROWS[1], chosen="a very long reply " * 40, origin="rows.jsonl, row 7")]
    with pytest.raises(
        DataError, match=r"1 pairs have more than 80 tokens.*rows.jsonl, row 7 \(\d+ tokens\)"
    ):
        pair_examples(long, tokenizer, 80)
    kept, left_out = pair_examples(long, tokenizer, 80, "drop")
    assert (len(kept), left_out) == (1, 1)
    cut, _ = pair_examples(long, tokenizer, 80, "cut")
    assert len(cut[1].tokens) == 80
    whole = pair_example(long[1], tokenizer)
    rejected = whole.segments == 2
    assert list(cut[1].tokens[cut[1].segments == 2]) == list(whole.tokens[rejected]), (
        "the shorter reply stays"
    )
    both, _ = pair_examples([replace(long[1], rejected="another long one " * 40)], tokenizer, 80, "cut")
    assert len(both[0].tokens) <= 80 and np.ptp(np.bincount(both[0].segments)[1:]) == 0
    with pytest.raises(DataError, match="1 pairs have more than 10 tokens"):
        pair_examples(long[:1], tokenizer, 10, "cut")


def test_scores_of_rows_of_which_some_are_too_long(tmp_path, model_path) -> None:
    write_pairs(tmp_path / "test.jsonl", 4, 1)
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    long = {**json.loads(lines[0]), "chosen": "a very long reply " * 80}
    (tmp_path / "test.jsonl").write_text("\n".join([lines[0], json.dumps(long), *lines[1:]]) + "\n")
    model = load(model_path)
    with pytest.raises(DataError, match="row 2"):
        score_task("prefer", model, tmp_path / "test.jsonl")
    scores = score_task(
        "prefer", model, tmp_path / "test.jsonl", ScoreConfig(too_long="drop", reference=str(model_path))
    )
    assert scores.rows == 4 and scores.metrics["margin"] == 0 and scores.details["left_out"] == 1
    assert scores.predictions == [0.0, None, 0.0, 0.0, 0.0]


def write_pairs(path, count: int, seed: int) -> None:
    """The preferred reply ends with a mark."""
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        said = " ".join(chance.sample(WORDS, 3))
        lines.append(json.dumps({"prompt": " ".join(chance.sample(WORDS, 2)), "chosen": f"{said}!", "rejected": f"{said}."}))  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("lora", [True, False])
def test_a_model_learns_what_is_preferred(tmp_path, base, lora) -> None:
    write_pairs(tmp_path / "train.jsonl", 60, 1)
    write_pairs(tmp_path / "test.jsonl", 20, 2)
    config = FinetuneConfig(
        task="prefer",
        steps=25,
        rows=4,
        precision="float32",
        validate_every=25,
        learning_rate=2e-3,
        optimizer="adamw",
        prompts=(),
        lora=LoraConfig(rank=8) if lora else None,
    )
    made, _ = finetune(
        config, base, tmp_path / "train.jsonl", tmp_path / "out", validation=tmp_path / "test.jsonl"
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_margin" in line][-1]
    assert last["validation_pairs_accuracy"] > 0.9 and last["validation_margin"] > 0.1
    assert last["validation_loss"] < np.log(2)
    how = ScoreConfig(reference="" if lora else str(base.path))
    scores = score_task("prefer", load(made.path), tmp_path / "test.jsonl", how)
    assert scores.metrics["win_rate"] == pytest.approx(last["validation_pairs_accuracy"], abs=0.051)
    assert scores.metrics["margin"] == pytest.approx(last["validation_margin"] / config.beta, rel=0.02)
    assert len(scores.predictions) == 20
    before = score_task("prefer", load(base.path), tmp_path / "test.jsonl")
    assert "win_rate" not in before.metrics and before.metrics["preferred"] <= scores.metrics["preferred"]


def test_other_shapes_and_rows_are_refused(tmp_path, base) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n')
    config = FinetuneConfig(task="prefer", steps=1)
    with pytest.raises(DataError, match="the task needs chosen and rejected replies"):
        finetune(config, base, tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands(tmp_path, model_path) -> None:
    write_pairs(tmp_path / "train.jsonl", 12, 1)
    tuned = lexmill("finetune", model_path, "--task", "prefer", "--data", tmp_path / "train.jsonl", "--validation", tmp_path / "train.jsonl", "--out", tmp_path / "out", "--lora", "--steps", "2", "--set", "rows=2", "--no-score")  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert "12 pairs of replies, rows of the form 'chosen-rejected'" in tuned.stderr
    scored = lexmill("evaluate", tmp_path / "out", "--task", "prefer", "--data", tmp_path / "train.jsonl", "--json", "--limit", "4")  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    found = json.loads(scored.stdout)
    assert found["rows"] == 4 and next(iter(found["metrics"])) == "win_rate"


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_that_broke_off_goes_on_to_the_same_weights(tmp_path, base, lora) -> None:
    write_pairs(tmp_path / "train.jsonl", 20, 1)
    config = FinetuneConfig(
        task="prefer",
        steps=6,
        rows=2,
        precision="float32",
        validate_every=4,
        checkpoint_seconds=0.0,
        lora=LoraConfig(rank=4, dropout=0.1) if lora else None,
    )

    class Broken(Exception):
        pass

    def break_off(model):
        raise Broken

    data, options = tmp_path / "train.jsonl", {"validation": tmp_path / "train.jsonl"}
    whole, _ = finetune(config, base, data, tmp_path / "whole", **options)
    with pytest.raises(Broken):
        finetune(config, base, data, tmp_path / "broken", score=break_off, **options)
    told: list[str] = []
    progress = Progress()
    progress.say = told.append  # type: ignore[method-assign]
    again, result = finetune(config, base, data, tmp_path / "broken", progress=progress, **options)
    assert any(line.startswith("going on from step") for line in told) and result.steps == 6
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (whole.path / name).read_bytes() == (again.path / name).read_bytes()
