"""The same encoder learns to answer questions here and with transformers: equal windows, batches, rate and optimiser.

    python bench/question_answering.py MODEL TRAIN.json TEST.json --steps 100

Both sides see the same windows in the same order, `--batch` of them a step, with the head begun by the same weights,
AdamW, a linear warmup and decay, the gradient clipped at 1, and no dropout but the model's own. Scores are SQuAD's; each side's
threshold of "no answer" is the best one for the test rows, so that the comparison is of what was learned. `--seeds`
repeats it. transformers pads each batch to its longest window; lexmill lays windows side by side into rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from lexmill.data.forms import read_rows
from lexmill.data.labelled import Question
from lexmill.evaluate.qa import find_threshold
from lexmill.evaluate.qa_metrics import answer_scores
from lexmill.finetune.extractive import span_examples, span_loss
from lexmill.inference.judging import AnswerSettings, find_answers
from lexmill.inference.torch_backend import head_logits
from lexmill.model.build import build_loaded
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.heads import with_span
from lexmill.train.batches import pack
from lexmill.train.examples import Example
from lexmill.train.precision import autocast, choose_precision

_WARMUP = 0.1  # of the steps


def batches(examples: list[Example], size: int, steps: int, seed: int) -> list[list[Example]]:
    """The windows of each step, epoch after epoch in another order."""
    random = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(random.permutation(len(examples)) for _ in itertools.count())
    return [[examples[next(order)] for _ in range(size)] for _ in range(steps)]


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: up and down in straight lines."""
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


def learn(model, losses, steps: int, rate: float) -> float:
    """Train a torch model; seconds that it took.

    Args:
        losses: gives for each step the mean loss with its gradients attached.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        losses(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    model.eval()
    return seconds


def ours(base: ModelDirectory, steps: list[list[Example]], length: int, rate: float, precision: str):
    """lexmill's side: (model, seconds)."""
    model = build_loaded(base.config, base.weights_on_demand())

    def loss(step: int) -> torch.Tensor:
        batch = pack(steps[step], length, base.tokenizer.ids.pad or 0)
        with autocast(precision, "cpu"):
            return span_loss(model, batch).sums["tokens"] / batch.counts["tokens"]

    return model, learn(model, loss, len(steps), rate)


def theirs(folder: Path, steps: list[list[Example]], rate: float, precision: str):
    """transformers' side: (model, seconds)."""
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(folder)

    def loss(step: int) -> torch.Tensor:
        some = steps[step]
        longest = max(len(one.tokens) for one in some)
        ids, segments, real = (torch.zeros(len(some), longest, dtype=torch.long) for _ in range(3))
        for row, one in enumerate(some):
            ids[row, : len(one.tokens)] = torch.from_numpy(one.tokens)
            segments[row, : len(one.tokens)] = torch.from_numpy(one.segments)
            real[row, : len(one.tokens)] = 1
        with autocast(precision, "cpu"):
            return model(
                input_ids=ids,
                attention_mask=real,
                token_type_ids=segments,
                start_positions=torch.tensor([int(one.targets[0]) for one in some]),
                end_positions=torch.tensor([int(one.targets[1]) for one in some]),
            ).loss

    return model, learn(model, loss, len(steps), rate)


def their_logits(model):
    """transformers' model behind the face that `find_answers` takes."""

    def compute(pairs):
        found = []
        for pair in pairs:
            with torch.inference_mode():
                out = model(
                    input_ids=torch.from_numpy(pair.ids)[None],
                    token_type_ids=torch.from_numpy(pair.segments)[None],
                )
            found.append(torch.stack([out.start_logits[0], out.end_logits[0]], -1).numpy())
        return found

    return compute


def score(base: ModelDirectory, compute, rows: list[Question], window: int, overlap: int) -> dict[str, float]:
    """SQuAD's figures with the best threshold, and those of the questions that have an answer."""
    settings = AnswerSettings(window=window, overlap=overlap, null_threshold=None)
    asked = [(row.question, row.context) for row in rows]
    given = find_answers(base.tokenizer, asked, settings, compute)
    threshold = find_threshold(given, rows, "en")
    said = ["" if one.null_score > threshold else one.candidate for one in given]
    answerable = [index for index, row in enumerate(rows) if row.answers]
    always = answer_scores(
        [given[index].candidate for index in answerable], [rows[index].answers for index in answerable], "en"
    )
    found = answer_scores(said, [row.answers for row in rows], "en")
    return {
        "exact": found["exact"],
        "f1": found["f1"],
        "answerable, always answered, exact": always["exact"],
        "answerable, always answered, f1": always["f1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--window", type=int, default=384)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--work", type=Path, default=Path("bench-qa"))
    parser.add_argument("--only", choices=("lexmill", "transformers"), help="one side, for slow machines")
    parser.add_argument("--answerable", action="store_true", help="leave out questions without an answer")
    options = parser.parse_args()
    precision = choose_precision(options.precision, "cpu")
    train, test = (
        [row for row in read_rows(path, kind=Question) if row.answers or not options.answerable]
        for path in (options.train, options.test)
    )
    found: dict[str, list[dict[str, float]]] = {"lexmill": [], "transformers": [], "before": []}
    for seed in range(options.seeds):
        base = with_span(ModelDirectory.open(options.model), seed)
        folder = options.work / f"begun-{seed}"
        if not folder.exists():
            write_model_directory(folder, base.config, base.weights_on_demand(), base.tokenizer)
        examples = span_examples(train, base.tokenizer, options.window, options.overlap).examples
        steps = batches(examples, options.batch, options.steps, seed)
        both = {
            "lexmill": lambda base=base, steps=steps: ours(
                base, steps, options.window, options.rate, precision
            ),
            "transformers": lambda folder=folder, steps=steps: theirs(folder, steps, options.rate, precision),
        }
        rows = options.window, options.overlap
        if not seed and options.only != "transformers":
            model = build_loaded(base.config, base.weights_on_demand())
            found["before"].append(score(base, lambda pairs, m=model: head_logits(m, pairs), test, *rows))
        for name in [options.only] if options.only else sorted(both, reverse=bool(seed % 2)):
            torch.manual_seed(seed)
            model, seconds = both[name]()
            compute = (
                their_logits(model)
                if name == "transformers"
                else lambda pairs, m=model: head_logits(m, pairs)
            )
            scores = score(base, compute, test, *rows)
            found[name].append({**scores, "seconds a step": seconds / options.steps})
            print(name, seed, json.dumps(found[name][-1]), flush=True)
    print(f"{len(train):,} questions learned, {len(test):,} asked; {options.steps} steps, {precision}")
    for name, runs in found.items():
        for key in runs[0] if runs else ():
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(f"{name:>13}  {key}: {statistics.mean(values):.2f}{spread}")


if __name__ == "__main__":
    main()
