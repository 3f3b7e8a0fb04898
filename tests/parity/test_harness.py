"""lm-evaluation-harness gets from lexmill's models what it gets from transformers for the same directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (the extra 'harness')")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from made_models import model_maker  # noqa: E402

from lexmill.errors import DataError, ModelError  # noqa: E402
from lexmill.evaluate.harness import HarnessModel  # noqa: E402
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS  # noqa: E402

TASKS = {
    "choose": """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choose.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "roll": """
task: roll
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/roll.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choose.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {max_gen_toks: 12, until: ["\\n"], do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prose):
    made = tmp_path_factory.mktemp("tasks")
    lines = [line for line in prose.splitlines() if len(line) > 60]
    rows = [
        {
            "question": line[:40],
            "choices": [line[40:56], " " + other[:14], other[3:18] + " "],
            "answer": number % 3,
        }
        for number, (line, other) in enumerate(zip(lines[:12], lines[20:32]))
    ]
    (made / "choose.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    # longer than the context, shorter, and with words that are special tokens elsewhere
    texts = [" ".join(lines[:30]), lines[3], "Anne said <b> é 你好."]
    (made / "roll.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    for name, task in TASKS.items():
        (made / f"{name}.yaml").write_text(task.replace("FOLDER", str(made)))
    return made


@pytest.fixture(scope="module")
def both(model_path):
    return HarnessModel(model_path, batch_size=3), HFLM(pretrained=str(model_path), batch_size=3, device="cpu", dtype="float32")  # fmt: skip


def figures(model, folder: Path, name: str, **options):
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return found["results"][name], [sample["resps"] for sample in samples]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_scores_as_with_transformers(folder, both, name) -> None:
    ours, theirs = (figures(model, folder, name) for model in both)
    for metric, value in theirs[0].items():
        if isinstance(value, float):
            assert ours[0][metric] == pytest.approx(value, rel=1e-4), metric
    if name == "write":
        assert ours[1] == theirs[1]
    for one, other in zip(ours[1], theirs[1], strict=True):
        for mine, yours in zip(one, other, strict=True):
            if name == "choose":
                assert float(mine[0][0]) == pytest.approx(float(yours[0][0]), abs=1e-3)
                assert str(mine[0][1]) == str(yours[0][1])


def test_with_few_examples_and_the_chat_template(folder, both) -> None:
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 0}
    ours, theirs = (figures(model, folder, "choose", **options) for model in both)
    assert [sample[0][0][0] for sample in ours[1]] == pytest.approx(
        [float(sample[0][0][0]) for sample in theirs[1]], abs=1e-3
    )
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for generation in (True, False):
        talk = history[:1] if generation else history
        asked = [model.apply_chat_template(talk, add_generation_prompt=generation) for model in both]
        assert asked[0] == asked[1]


@pytest.mark.parametrize("pair", [("", "Anne"), ("Anne ", "lived"), ("a " * 300, "b c")])
def test_hard_pairs(both, pair) -> None:
    request = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)]
    (ours,), (theirs,) = (model.loglikelihood(request) for model in both)
    assert ours[0] == pytest.approx(theirs[0], abs=2e-3)
    assert ours[1] == theirs[1]


def test_a_continuation_longer_than_the_context_is_refused(both) -> None:
    request = [Instance(request_type="loglikelihood", doc={}, arguments=("x", "word " * 200), idx=0)]
    with pytest.raises(DataError, match="but the context holds 128"):
        both[0].loglikelihood(request)


def test_sampling_and_stops(both) -> None:
    model = both[0]
    options = {"until": ["e"], "max_gen_toks": 30, "do_sample": True, "temperature": 0.9, "top_k": 20}
    request = [Instance(request_type="generate_until", doc={}, arguments=("Anne", options), idx=0)]
    assert "e" not in model.generate_until(request)[0]


def test_the_harness_s_own_command_line(folder, model_path) -> None:
    options = ["--model", "lexmill", "--model_args", f"path={model_path}", "--tasks", "choose", "--include_path", str(folder)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lexmill.evaluate.harness", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "|choose|" in done.stdout and "acc_norm" in done.stdout


def test_encoders_are_refused(tmp_path, prose) -> None:
    shape = {"vocab_size": 500, "width": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 16, "mlp_width": 48, "context": 64}  # fmt: skip
    kinds = {"bert": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]})}
    made = model_maker(tmp_path, prose, shape, kinds)("bert")
    with pytest.raises(ModelError, match="asks decoders"):
        HarnessModel(made.path)
