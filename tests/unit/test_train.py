"""Training: packing that does not leak, accumulation that changes nothing, resuming that is exact."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lexmill.errors import ConfigError, FileError, TrainingError
from lexmill.model.config import ModelConfig
from lexmill.model.decoder import Decoder
from lexmill.progress import SILENT, Progress
from lexmill.train.batches import Batch, Loader, pack
from lexmill.train.causal import causal_loss
from lexmill.train.config import TrainConfig
from lexmill.train.examples import IGNORED, Example, Examples, choose_of_each, next_token_example, windows
from lexmill.train.loop import Hooks, _Run, train
from lexmill.train.metrics import read_metrics
from lexmill.train.objective import Losses, measure
from lexmill.train.optimizers import orthogonalise
from lexmill.train.packing import best_fit
from lexmill.train.schedule import learning_rate_factor

SHAPE = ModelConfig(
    vocab_size=97, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=64, context=32
)


def documents(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [next_token_example(random.integers(0, 97, length + 1)) for length in lengths]


def model(seed=0):
    decoder = Decoder(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return decoder


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=30))
def test_packing_keeps_every_example_whole(lengths):
    examples = documents(lengths)
    batch = pack(examples, 32, pad_id=0)
    found = []
    for row in range(len(batch.tokens)):
        for number in range(batch.document[row].max() + 1):
            at = batch.document[row] == number
            if at.any() and (batch.targets[row][at] != IGNORED).any():
                assert (batch.positions[row][at] == np.arange(at.sum())).all()
                found.append((tuple(batch.tokens[row][at]), tuple(batch.targets[row][at])))
    assert sorted(found) == sorted((tuple(e.tokens), tuple(e.targets)) for e in examples)
    assert batch.counts["tokens"] == sum(lengths)


def plain_best_fit(sizes, rooms):
    """One after the other, the longest first, each into the fullest row that holds it; what each row holds."""
    rows, held = [], []
    for size, other in sorted(sizes, reverse=True):
        fitting = [row for row, (left, decoder) in enumerate(rows) if left >= size and decoder >= other]
        if fitting:
            row = min(fitting, key=lambda row: rows[row])
        else:
            rows.append(rooms)
            held.append([])
            row = len(rows) - 1
        rows[row] = (rows[row][0] - size, rows[row][1] - other)
        held[row].append((size, other))
    return sorted(held)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 12)), min_size=1, max_size=60),
    decoder=st.booleans(),
)
@example(sizes=[(size, 1) for size in (1, 1, 1, 7, 9, 14, 16, 23, 23)], decoder=False)
def test_rows_are_those_of_plain_best_fit(sizes, decoder):
    if not decoder:
        sizes = [(size, 0) for size, _ in sizes]
    rooms = (24, 12 if decoder else 0)
    first, second = np.array(sizes).T
    row, number, start, decoder_start = best_fit(first, rooms, second if decoder else None)
    held = [[] for _ in range(row.max() + 1)]
    for index in np.lexsort((number, row)):
        members = held[row[index]]
        assert number[index] == len(members)
        assert start[index] == sum(size for size, _ in members)
        assert decoder_start[index] == sum(other for _, other in members)
        members.append(sizes[index])
    for members in held:
        assert all(sum(side) <= room for side, room in zip(zip(*members), rooms))
    assert sorted(held) == plain_best_fit(sizes, rooms)


def test_flat_examples_are_the_same_examples():
    random = np.random.default_rng(0)
    examples = [
        Example(
            random.integers(0, 9, n), random.integers(0, 9, m), np.arange(n) % 2, random.integers(0, 9, m), n % 3, n
        )
        for n, m in ((3, 2), (5, 1), (1, 4))
    ]  # fmt: skip
    flat = Examples.of(examples)
    assert len(flat) == 3 and Examples.of(flat) is flat
    for ours, one in zip([*flat[:2], flat[-1]], examples):
        assert (ours.label, ours.origin) == (one.label, one.origin)
        for name in ("tokens", "targets", "segments", "decoder_tokens"):
            assert (getattr(ours, name) == getattr(one, name)).all()
    with pytest.raises(IndexError):
        flat[3]


def test_of_each_group_exactly_so_many_are_chosen_and_all_equally_often():
    sizes, wanted = np.array([4, 1, 0, 7, 5]), np.array([2, 1, 0, 7, 0])
    random = np.random.default_rng(0)
    hits = np.zeros(sizes.sum())
    for _ in range(3000):
        chosen = choose_of_each(sizes, wanted, random)
        assert np.add.reduceat(chosen, [0, 4, 5, 12]).tolist() == [2, 1, 7, 0]
        hits += chosen
    assert np.abs(hits[:4] / 3000 - 0.5).max() < 0.04


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), length=st.integers(2, 20), data=st.data())
def test_windows_cover_each_document_once(sizes, length, data):
    shift = data.draw(st.integers(0, length - 1))
    document, begin, size = windows(np.array(sizes), length, shift)
    assert (size <= length).all() and (size > 0).all()
    for index, whole in enumerate(sizes):
        own = document == index
        assert begin[own].tolist() == [0, *np.cumsum(size[own])[:-1].tolist()] and size[own].sum() == whole
        if whole > length:
            assert size[own][0] == length - shift


def test_examples_that_do_not_fit_are_refused():
    for lengths in ([33], [0]):
        with pytest.raises(TrainingError, match="Example 0"):
            pack([Example(np.zeros(lengths[0], int), np.zeros(lengths[0], int))], 32, 0)


def mean_loss(model, batches):
    """Mean loss of the next token, and how many there were."""
    found = measure(model, causal_loss, batches)
    return found.loss, found.targets["tokens"]


def test_packed_documents_do_not_see_each_other():
    """The loss of a packed batch is the target-weighted mean over documents computed one by one."""
    examples = documents([5, 9, 17, 30, 3, 22, 11])
    decoder = model()
    packed, targets = mean_loss(decoder, [pack(examples, 32, 0)])
    alone = [mean_loss(decoder, [pack([example], 32, 0)]) for example in examples]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert targets == 97
    assert packed == pytest.approx(expected, abs=2e-6)


def test_smoothed_targets_are_those_of_torch_and_measuring_goes_without():
    batch = pack(documents([5, 9, 17, 30]), 32, 0)

    def of_torch(decoder):
        logits = decoder(batch.tensor("tokens"), batch.row_positions(), batch.mask(causal=True))
        where = {"ignore_index": IGNORED, "reduction": "sum"}
        return F.cross_entropy(logits.mT, batch.tensor("targets"), label_smoothing=0.2, **where)

    smoothed = partial(causal_loss, smoothing=0.2)
    found = []
    for loss in (lambda decoder: smoothed(decoder, batch).sums["tokens"], of_torch):
        decoder = model()
        lost = loss(decoder)
        lost.backward()
        found.append((float(lost.detach()), [parameter.grad for parameter in decoder.parameters()]))
    (ours, own), (theirs, other) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    for one, two in zip(own, other):
        assert (one - two).abs().max() < 1e-5 * max(1.0, float(two.abs().max()))
    plain, measured = (measure(model(), objective, [batch]).loss for objective in (causal_loss, smoothed))
    assert plain == measured != pytest.approx(ours / batch.counts["tokens"], rel=1e-4)


def test_a_leak_would_be_noticed():
    batch = pack(documents([5, 9, 17]), 32, 0)
    leaky = Batch(batch.tokens, batch.targets, batch.positions, np.zeros_like(batch.document))
    decoder = model()
    honest, leaking = (mean_loss(decoder, [one])[0] for one in (batch, leaky))
    assert abs(honest - leaking) > 1e-3


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_gradients_equal_one_big_batch(tmp_path, micro):
    """Rows have unequal numbers of targets; parts must weigh by targets, not equally."""
    examples = documents([5, 30, 17, 28, 31, 9])
    examples[1].targets[2:] = IGNORED
    gradients = []
    for rows in (None, micro):
        decoder = model()
        loader = Loader(lambda epoch: examples, rows=8, length=32, pad_id=0, seed=0)
        run = _Run(
            decoder, causal_loss, loader, TrainConfig(steps=1, rows=8, micro_rows=rows, precision="float32"),
            tmp_path, Hooks(),
        )  # fmt: skip
        run._gradients(loader.next())
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters()])
    for whole, parts in zip(*gradients):
        assert (whole - parts).abs().max() < 1e-6 * max(1.0, float(whole.abs().max()))


def config(**changes):
    values = dict(
        steps=24, rows=2, warmup=3, precision="float32", checkpoint_seconds=0.0, validate_every=5, seed=3
    )
    return TrainConfig(**{**values, **changes})


def run_training(folder, stop_after=None, hooks=None, progress=SILENT, **changes):
    torch.set_num_threads(2)
    decoder = Decoder(SHAPE)
    decoder.initialise(0)
    loader = Loader(
        lambda epoch: documents([20, 31, 7, 15, 30, 26, 12], epoch), rows=2, length=32, pad_id=0, seed=3
    )
    calls = 0

    def objective(model, batch):
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise RuntimeError("killed")
        return causal_loss(model, batch)

    result = train(decoder, objective, loader, config(**changes), folder, hooks=hooks, progress=progress)
    return decoder.weights(), result


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stop", [1, 9, 23])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, optimizer, stop):
    whole, _ = run_training(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(RuntimeError):
        run_training(tmp_path / "killed", stop_after=stop, optimizer=optimizer)
    again, result = run_training(tmp_path / "killed", optimizer=optimizer)
    assert result.steps == 24
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    first, second = (
        (tmp_path / name / "metrics.jsonl").read_text().count("loss") for name in ("whole", "killed")
    )
    assert first == second


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    whole, _ = run_training(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run_training(tmp_path / "killed", stop_after=12)
    newest = sorted((tmp_path / "killed" / "checkpoints").iterdir())[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    again, _ = run_training(tmp_path / "killed")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_budget_in_minutes_ends_in_time_and_is_remembered(tmp_path):
    _, result = run_training(tmp_path, steps=None, minutes=0.02)
    assert result.steps >= 1  # on an idle machine some hundred
    assert result.seconds < 60  # of a budget of 1.2; others may compute here (15 were seen)


def test_training_lowers_the_loss(tmp_path):
    first = documents([20, 31, 7], 1)
    decoder = Decoder(SHAPE)
    decoder.initialise(0)
    before, _ = mean_loss(decoder, [pack(first, 32, 0)])
    loader = Loader(lambda epoch: first, rows=4, length=32, pad_id=0, seed=0)
    train(decoder, causal_loss, loader, config(steps=60), tmp_path)
    after, _ = mean_loss(decoder, [pack(first, 32, 0)])
    assert before == pytest.approx(np.log(97), abs=0.2)
    assert after < 1.0


def test_no_targets_and_endless_nans_are_errors(tmp_path):
    empty = documents([5])
    empty[0].targets[:] = IGNORED
    with pytest.raises(TrainingError, match="no targets"):
        train(
            model(),
            causal_loss,
            Loader(lambda e: empty, rows=1, length=32, pad_id=0, seed=0),
            config(),
            tmp_path,
        )
    loader = Loader(lambda epoch: documents([5]), rows=1, length=32, pad_id=0, seed=0)

    def broken(decoder, batch):
        losses = causal_loss(decoder, batch)
        return Losses({"tokens": losses.sums["tokens"] * float("nan")})

    with pytest.raises(TrainingError, match="10 steps in a row"):
        train(model(), broken, loader, config(), tmp_path / "nan")


def test_orthogonalised_updates_have_singular_values_near_one():
    matrices = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(batch))
        assert values.min() > 0.6 and values.max() < 1.3


def test_schedule_goes_up_along_and_down():
    factors = [learning_rate_factor(step, 100, 10, 0.4) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[59] == 1.0
    assert 0 < factors[99] < 0.05
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_samples_are_made_without_dropout_and_training_goes_on_with_it(tmp_path):
    modes = []
    loader = Loader(lambda epoch: documents([20, 31]), rows=2, length=32, pad_id=0, seed=0)

    def watched(decoder, batch):
        modes.append(("learn", decoder.training))
        return causal_loss(decoder, batch)

    hooks = Hooks(sample=lambda decoder, step: modes.append(("sample", decoder.training)))
    train(model(), watched, loader, config(steps=3, sample_every=1), tmp_path, hooks=hooks)
    assert modes == [("learn", True), ("sample", False)] * 3


class Said(Progress):
    """Remembers what a run tells."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def train_with(objective, folder, examples=None, hooks=None, **changes):
    said = Said()
    decoder = Decoder(SHAPE)
    decoder.initialise(0)
    made = examples or documents([20, 31, 7, 15, 30, 26, 12])
    loader = Loader(lambda epoch: made, rows=2, length=32, pad_id=0, seed=3)
    result = train(decoder, objective, loader, config(**changes), folder, hooks=hooks, progress=said)
    return decoder, result, said.lines


def causal_loss_times(factor, *, at):
    """The causal loss, but `factor` times as large at call number `at`."""
    calls = 0

    def objective(model, batch):
        nonlocal calls
        calls += 1
        losses = causal_loss(model, batch)
        return Losses({"tokens": losses.sums["tokens"] * (factor if calls == at else 1)})

    return objective


def test_one_step_that_is_not_finite_is_skipped_counted_and_told(tmp_path):
    made = [
        next_token_example(example.tokens, origin=number)
        for number, example in enumerate(documents([20, 31, 7]))
    ]
    hooks = Hooks(name_documents=lambda numbers: [f"document-{number}" for number in numbers])
    _, result, said = train_with(causal_loss_times(float("inf"), at=5), tmp_path, made, hooks)
    assert result.skipped == 1 and result.steps == 24
    told = [line for line in said if "not finite, step skipped" in line]
    assert len(told) == 1 and told[0].startswith("step 5:") and "document-" in told[0]


def test_a_loss_that_jumps_is_told_with_its_documents(tmp_path):
    made = [
        next_token_example(example.tokens, origin=40 + number)
        for number, example in enumerate(documents([20, 31]))
    ]
    slow = {"learning_rate": 1e-4, "matrix_learning_rate": 1e-4}
    _, _, said = train_with(causal_loss_times(3, at=70), tmp_path, made, steps=80, **slow)
    told = [line for line in said if "the loss jumped" in line]
    assert len(told) == 1 and "step 70" in told[0] and told[0].endswith("40, 41")
    spikes = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "spike" in line]
    assert [(line["step"], line["documents"]) for line in spikes] == [(70, [40, 41])]


def test_the_best_weights_are_kept(tmp_path):
    seen = []

    def validate(model):
        seen.append(model.weights())
        return {"validation_loss": [3.0, 1.0, 2.0, 2.5, 2.6][len(seen) - 1]}

    hooks = Hooks(validate=validate)
    decoder, result, _ = train_with(causal_loss, tmp_path, hooks=hooks, keep_best=True)
    assert (result.best_step, result.best, result.metric) == (10, 1.0, "loss")
    final = decoder.weights()
    assert all(np.array_equal(final[name], seen[1][name]) for name in final)
    assert not np.array_equal(seen[-1]["embed.weight"], final["embed.weight"])


@pytest.mark.parametrize(
    "metric, figures, steps, best",
    [
        ("bleu", [1.0, 3.0, 2.0, 3.0, 9.0], 20, 3.0),  # equal is no better
        ("loss", [3.0, 1.0, 1.5, 1.2, 0.1], 20, 1.0),
        ("loss", [float("nan"), 1.0, 0.5, 0.4, 0.3], 24, 0.3),
        ("bleu", [float("nan"), float("nan"), 3.0, 4.0, 5.0], 10, None),
    ],
)
def test_training_stops_when_validation_gets_no_better(tmp_path, metric, figures, steps, best):
    seen = []

    def validate(model):
        seen.append(model.weights())
        return {f"validation_{metric}": figures[len(seen) - 1], "validation_other": 0.0}

    options = {"patience": 2, "stop_metric": "" if metric == "loss" else metric}
    decoder, result, said = train_with(causal_loss, tmp_path, hooks=Hooks(validate=validate), **options)
    assert (result.steps, result.best, result.stopped_early) == (steps, best, steps < 24)
    assert result.metric == (metric if best else "")
    assert any("so training stops" in line for line in said) == (steps < 24)
    kept = seen[result.best_step // 5 - 1 if result.best_step < 24 else -1] if best else seen[-1]
    final = decoder.weights()
    assert all(np.array_equal(final[name], kept[name]) for name in final)


def test_a_figure_that_validation_does_not_give_is_named(tmp_path):
    hooks = Hooks(validate=lambda model: {"validation_loss": 1.0, "validation_bleu": 0.0})
    with pytest.raises(ConfigError, match=r"'stop_metric' is 'blue'") as caught:
        train_with(causal_loss, tmp_path, hooks=hooks, stop_metric="blue")
    assert "bleu" in caught.value.hint
    with pytest.raises(ConfigError, match="nothing is held out"):
        train_with(causal_loss, tmp_path, patience=1)


def test_only_the_newest_checkpoints_stay(tmp_path):
    def stops(model, batch):
        if len(list((tmp_path / "checkpoints").glob("step-*"))) >= 3:
            raise RuntimeError("enough")
        return causal_loss(model, batch)

    with pytest.raises(RuntimeError, match="enough"):
        train_with(stops, tmp_path, steps=500, keep_last=3)


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(FileError, match="checkpoints"):
        train_with(causal_loss, tmp_path, steps=200)


def test_no_memory_says_what_to_change(tmp_path):
    def greedy(model, batch):
        return Losses({"tokens": torch.empty(1 << 50).sum()})

    with pytest.raises(TrainingError, match="Out of memory in a step: 2 rows of 32") as caught:
        train_with(greedy, tmp_path)
    assert "micro_rows = 1" in caught.value.hint


def test_a_loss_that_jumps_and_stays_is_told_five_times():
    from lexmill.train.watch import LossWatch

    watch = LossWatch()
    assert not any(watch.is_spike(3.0 + 0.01 * (step % 3)) for step in range(60))
    assert watch.is_spike(4.0) and not watch.is_spike(3.0)
    told = [watch.is_spike(5.0) for _ in range(80)]
    assert told == [True] * 5 + [False] * 75
    assert watch.is_spike(6.0)
