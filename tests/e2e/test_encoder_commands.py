"""Tasks of encoders as a user has them: fine-tune, score, ask; what does not fit is refused with exit code 2."""

import json

import pytest
from conftest import lexmill
from made_models import model_maker

from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS

SHAPE = dict(vocab_size=520, width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=48, context=64)
BERT = {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}
SMALL = ("--steps", 12, "--set", "rows=4", "--set", "learning_rate=0.003", "--set", "validation_fraction=0.3")


@pytest.fixture(scope="module")
def base(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("base"), prose, SHAPE, {"bert": ("wordpiece", BERT)})(
        "bert"
    ).path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_classify_from_rows_to_labels(base, tmp_path):
    pytest.importorskip("sklearn")
    rows = [
        {"text": f"the {'ship' if i % 2 else 'house'} was {i}", "label": "sea" if i % 2 else "land"}
        for i in range(40)
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    made = lexmill("finetune", base, "--task", "classify", "--data", data, "--out", tmp_path / "out", *SMALL)
    assert made.returncode == 0, made.stderr
    assert "2 labels" in made.stderr
    model = tmp_path / "out" / "model"
    told = lexmill(
        "evaluate", model, "--task", "classify", "--data", data, "--json", "--predictions", tmp_path / "said"
    )
    assert told.returncode == 0, told.stderr
    scores = json.loads(told.stdout)
    assert scores["rows"] == 40 and scores["metrics"]["accuracy"] > 0.6
    assert sum(map(sum, scores["details"]["confusion"])) == 40
    assert len((tmp_path / "said").read_text("utf-8").splitlines()) == 40
    texts = tmp_path / "texts.txt"
    texts.write_text("the ship\n\nthe house\n", "utf-8")
    found = lexmill("classify", model, "--file", texts, "--json")
    assert [row["text"] for row in json.loads(found.stdout)] == ["the ship", "the house"]
    assert set(json.loads(found.stdout)[0]["labels"]) == {"sea", "land"}
    shown = lexmill("classify", model, "the ship", "--second", "was 1")
    assert shown.returncode == 0 and "probability" in shown.stdout
    for arguments, said in (
        (("classify", model), "no text"),
        (("classify", base, "x"), "no head that tells labels apart"),
        (("classify", model, "a", "--second", "b", "--second", "c"), "second ones"),
        (("answer", model, "who", "--context", "x"), "no head that finds answers"),
        (("export", "gguf", model, "--out", tmp_path / "x.gguf"), "tells labels apart"),
    ):
        done = lexmill(*arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_answer_from_questions_to_words(base, tmp_path):
    rows = []
    for i in range(40):
        context = f"it was {i}. captain {'anne' if i % 2 else 'mary'} smiled"
        found = {"text": ["anne" if i % 2 else "mary"], "answer_start": [context.index("captain") + 8]}
        rows.append({"id": str(i), "question": "which captain", "context": context, "answers": found})
    data = write(tmp_path / "rows.jsonl", rows)
    made = lexmill(
        "finetune", base, "--task", "qa", "--data", data, "--out", tmp_path / "out", "--lora", *SMALL
    )
    assert made.returncode == 0, made.stderr
    adapter = tmp_path / "out"
    told = lexmill("evaluate", adapter, "--task", "qa", "--data", data, "--json", "--set", "language=en")
    assert told.returncode == 0, told.stderr
    assert set(json.loads(told.stdout)["metrics"]) == {"exact", "f1"}
    text = tmp_path / "text.txt"
    text.write_text("The sea. captain anne smiled", "utf-8")
    found = json.loads(lexmill("answer", adapter, "which captain", "--context", text, "--json").stdout)
    assert found["text"] and found["text"] == found["candidate"]  # it never saw a question without an answer
    assert "The sea. captain anne smiled"[found["start"] : found["end"]] == found["text"]
    merged = lexmill("merge", adapter, "--out", tmp_path / "merged", "--json")
    assert merged.returncode == 0, merged.stderr
    again = lexmill("answer", tmp_path / "merged", "which captain", "--context", text, "--json")
    assert json.loads(again.stdout)["text"] == found["text"]


def test_embed_from_pairs_to_ranks(base, tmp_path):
    rows = [{"query": f"ship {i}", "positive": f"captain {i}", "negative": f"house {i}"} for i in range(20)]
    data = write(tmp_path / "rows.jsonl", rows)
    made = lexmill("finetune", base, "--task", "embed", "--data", data, "--out", tmp_path / "out", *SMALL)
    assert made.returncode == 0, made.stderr
    told = lexmill("evaluate", tmp_path / "out" / "model", "--task", "embed", "--data", data, "--json")
    assert told.returncode == 0, told.stderr
    metrics = json.loads(told.stdout)["metrics"]
    assert next(iter(metrics)) == "ndcg_10" and 0 <= metrics["recall_1"] <= metrics["recall_10"] <= 1
