"""Tasks that write, as a user does them: train, score before and after, and score the same model elsewhere."""

import json

import pytest
from conftest import lexmill

NAMES = (
    "Anne",
    "Mary",
    "Louisa",
    "Henrietta",
    "Elizabeth",
    "Captain Wentworth",
    "Sir Walter",
    "Lady Russell",
)
PLACES = ("Lyme", "Bath", "the garden", "the room", "Uppercross", "Kellynch")
SMALL = (
    "--set",
    "rows=4",
    "--set",
    "row_length=96",
    "--set",
    "precision=float32",
    "--set",
    "score_tokens=12",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    made = [
        {"source": f"{name} was seen in {place}.", "target": f"{name}: {place}"}
        for name in NAMES
        for place in PLACES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


@pytest.fixture(scope="module")
def t5_path(tmp_path_factory, prose):
    from conftest import randomise

    from lexmill.model.build import build_model
    from lexmill.model.directory import write_model_directory
    from lexmill.pretrain.shape import ShapeConfig
    from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

    tokenizer = train_tokenizer(
        [prose[:60_000]], TokenizerConfig(kind="unigram", vocab_size=400, sentinels=8)
    )
    shape = ShapeConfig(family="t5", width=32, layers=1, heads=2, context=128).with_vocabulary(400)
    path = tmp_path_factory.mktemp("t5") / "model"
    write_model_directory(path, shape, randomise(build_model(shape), deviation=0.2).weights(), tokenizer)
    return path


def predictions(model, rows, out, *more):
    done = lexmill(
        "evaluate", model, "--task", "summarise", "--data", rows, "--limit", 6, "--max-tokens", 12, "--json",
        "--predictions", out, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["details"]["instruction"] == "Say who and where: {source}", "asked as in training"
    return [json.loads(line)["prediction"] for line in out.read_text("utf-8").splitlines()]


def test_a_decoder_is_scored_before_and_after_and_in_every_runtime(model_path, rows, tmp_path):
    pytest.importorskip("xllamacpp")
    adapter = tmp_path / "adapter"
    (tmp_path / "novel.txt").write_text(
        "\n\n".join(f"She went to {place} with {name}." for name in NAMES for place in PLACES) * 4, "utf-8"
    )
    done = lexmill(
        "finetune", model_path, "--task", "summarise", "--data", rows, "--out", adapter, "--lora", "--steps", 6, *SMALL,
        "--set", "instruction=Say who and where: {source}", "--set", "validation_fraction=0.2",
        "--set", "stop_metric=rougeL", "--set", "validate_every=2", "--set", f"text={tmp_path / 'novel.txt'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "summarise rougeL" in done.stdout
        and "text bits per byte" in done.stdout
        and "expected" in done.stdout
    )
    scores = json.loads((adapter / "scores.json").read_text("utf-8"))
    assert set(scores["summarise"]) == set(scores["text"]) == {"before", "after"}
    example = scores["examples"][0]
    assert example["question"].startswith("Say who and where: ") and {"expected", "before", "after"} <= set(
        example
    )
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text("utf-8").splitlines()]
    measured = {line["step"]: line["validation_rougeL"] for line in lines if "validation_rougeL" in line}
    result = json.loads((adapter / "result.json").read_text("utf-8"))
    assert list(measured) == [2, 4, 6] and result["metric"] == "rougeL"
    assert result["best"] == max(measured.values()) == measured[result["best_step"]]
    assert lexmill("merge", adapter, "--out", tmp_path / "merged", "--quiet").returncode == 0
    gguf = tmp_path / "model.gguf"
    assert lexmill("export", "gguf", tmp_path / "merged", "--out", gguf, "--type", "f32").returncode == 0
    own = predictions(adapter, rows, tmp_path / "own.jsonl")
    for backend in ("auto", "llama_cpp", "torch"):
        assert predictions(gguf, rows, tmp_path / f"{backend}.jsonl", "--backend", backend) == own
    assert predictions(tmp_path / "merged", rows, tmp_path / "hf.jsonl", "--backend", "transformers") == own
    scored = ("evaluate", gguf, "--task", "summarise", "--data", rows)
    refused = lexmill(*scored, "--backend", "transformers")
    assert refused.returncode == 2 and "lexmill import" in refused.stderr
    refused = lexmill(*scored, "--backend", "llama_cpp", "--beams", 2)
    assert refused.returncode == 2 and "no beam search" in refused.stderr


def test_an_adapter_of_an_encoder_decoder_learns_to_translate(t5_path, rows, tmp_path):
    out = tmp_path / "adapter"
    done = lexmill(
        "finetune", t5_path, "--task", "translate", "--data", rows, "--out", out, "--lora", "--steps", 8, *SMALL,
        "--json", "--no-score",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "scores" not in json.loads(done.stdout) and not (out / "scores.json").exists()
    settings = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    losses = [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0]
    found = lexmill(
        "evaluate",
        out,
        "--task",
        "translate",
        "--data",
        rows,
        "--limit",
        4,
        "--beams",
        3,
        "--max-tokens",
        8,
        "--json",
    )
    assert found.returncode == 0, found.stderr
    details = json.loads(found.stdout)["details"]
    assert details["instruction"] == "translate: {source}" and "version:" in details["bleu_signature"]
    planned = lexmill(
        "finetune", t5_path, "--task", "translate", "--data", rows, "--steps", 8, "--plan", "--json"
    )
    assert planned.returncode == 0, planned.stderr


def test_long_rows_are_refused_before_anything_is_written(model_path, rows, tmp_path):
    done = lexmill(
        "finetune", model_path, "--task", "summarise", "--data", rows, "--out", tmp_path / "out", "--steps", 2,
        "--set", "row_length=16",
    )  # fmt: skip
    assert done.returncode == 2 and "more than 16 tokens" in done.stderr and "too_long" in done.stderr
    assert not list(tmp_path.glob("out/*"))
