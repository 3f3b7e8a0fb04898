"""Task heads of encoders in three places: here, in transformers and in PEFT, with the same logits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import randomise
from made_models import model_maker

from lexmill.evaluate.embed import retrieval_scores
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.stage import finetune
from lexmill.inference.language_model import load
from lexmill.model.adapter import LoraConfig
from lexmill.model.build import build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.heads import with_labels, with_span
from lexmill.runtimes.merge import merge_adapter
from lexmill.tokenizer.pairs import encode_pairs

transformers = pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=520, width=64, layers=3, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128
)
BERT = {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}
MODERN = {**FAMILIES["modernbert"], **FAMILY_DEFAULTS["modernbert"]}
KINDS = {
    "bert": ("wordpiece", {**BERT, "mlm": True, "mlm_bias": True, "pooler": True, "nsp": True}),
    "bare bert": ("wordpiece", BERT),
    "modernbert": ("wordpiece", {**MODERN, "mlm": True, "local_window": 8}),
}
LABELS = ("好", "bad", "neither")
AUTO = {"labels": "AutoModelForSequenceClassification", "span": "AutoModelForQuestionAnswering"}
PAIRS = [
    ("She was glad to see him.", "Was she?"),
    ("Who walked to the sea?", "They walked together to the sea, and Anne was with them all the way."),
    ("No.", None),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("encoders"), prose, SHAPE, KINDS)


def headed(base, head):
    return with_labels(base, LABELS, 3) if head == "labels" else with_span(base, 3)


def their_logits(model, pair):
    # PEFT's own face for questions drops the segments on its way to the model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor(pair.ids[None])
    extra = {"token_type_ids": torch.tensor(pair.segments[None])} if model.config.model_type == "bert" else {}
    with torch.no_grad():
        out = model(input_ids=ids, **extra)
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)[0].numpy()
    return out.logits[0].numpy()


def our_logits(model, pairs):
    """Computed together, so that padding is part of what is compared."""
    from lexmill.inference.torch_backend import head_logits

    return head_logits(model.network, pairs)


@pytest.mark.parametrize(
    ("name", "head", "pooling"),
    [(name, head, "cls") for name in KINDS for head in AUTO] + [("modernbert", "labels", "mean")],
)
def test_what_we_write_transformers_opens_with_the_same_logits(models, name, head, pooling, tmp_path):
    made = headed(models(name), head)
    config = made.config
    if pooling == "mean":
        config = dataclasses.replace(config, label_pooling="mean")
    weights = randomise(build_model(config)).weights()
    path = write_model_directory(tmp_path / "made", config, weights, made.tokenizer).path
    theirs, told = getattr(transformers, AUTO[head]).from_pretrained(path, output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]
    if head == "labels":
        assert theirs.config.id2label == dict(enumerate(LABELS))
        assert theirs.config.label2id == {label: index for index, label in enumerate(LABELS)}
    pairs = encode_pairs(made.tokenizer, PAIRS)
    for mine, pair in zip(our_logits(load(path), pairs), pairs):
        expected = their_logits(theirs.eval(), pair)
        assert mine.shape == expected.shape and np.abs(mine - expected).max() < 1e-4
    if head == "labels":
        assert load(path).classify("x")[0].keys() == set(LABELS)


def test_pairs_are_tokenized_as_transformers_does(models):
    base = models("bert")
    theirs = transformers.AutoTokenizer.from_pretrained(base.path)
    for pair, (first, second) in zip(encode_pairs(base.tokenizer, PAIRS), PAIRS):
        found = theirs(first, second) if second is not None else theirs(first)
        assert pair.ids.tolist() == found["input_ids"]
        assert pair.segments.tolist() == found["token_type_ids"]


def rows_of(head, folder):
    words = ["captain", "mother", "sea", "house", "ship"]
    rows = []
    for index in range(40):
        text = f"{words[index % 5]} was {words[index * 7 % 5]} and {words[index * 3 % 5]}"
        if head == "labels":
            rows.append({"text": text, "label": LABELS[index % 3]})
        else:
            rows.append(
                {
                    "question": "who was",
                    "context": text,
                    "answers": {"text": [words[index % 5]], "answer_start": [0]},
                }
            )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("head", ["labels", "span"])
@pytest.mark.parametrize("name", KINDS)
def test_our_adapters_open_in_peft_with_the_same_logits(models, name, head, tmp_path):
    peft = pytest.importorskip("peft")
    config = FinetuneConfig(
        task="classify" if head == "labels" else "qa",
        steps=4,
        rows=4,
        row_length=64,
        window=64,
        overlap=16,
        learning_rate=0.02,
        precision="float32",
        validation_fraction=0.4,
        lora=LoraConfig(rank=4),
    )
    made, _ = finetune(config, models(name), rows_of(head, tmp_path), tmp_path / "adapter")
    settings = json.loads((made.path / "adapter_config.json").read_text())
    assert settings["task_type"] == {"labels": "SEQ_CLS", "span": "QUESTION_ANS"}[head]
    assert {"classifier", "qa_outputs"} & set(settings["modules_to_save"])
    options = {"num_labels": len(LABELS)} if head == "labels" else {}
    base = getattr(transformers, AUTO[head]).from_pretrained(models(name).path, **options)
    theirs = peft.PeftModel.from_pretrained(base, made.path).eval()
    ours = load(made.path)
    pairs = encode_pairs(ours.tokenizer, PAIRS)
    found = our_logits(ours, pairs)
    for mine, pair in zip(found, pairs):
        assert np.abs(mine - their_logits(theirs, pair)).max() < 1e-4
    # merged it is a plain directory, with the head in its place
    merged = merge_adapter(made, tmp_path / "merged", dtype="f32").model
    plain = load(merged.path)
    for mine, other in zip(found, our_logits(plain, pairs)):
        assert np.abs(mine - other).max() < 1e-5
    assert plain.lineage["calibration"] == ours.lineage["calibration"]
    again = getattr(transformers, AUTO[head]).from_pretrained(merged.path).eval()
    assert np.abs(their_logits(again, pairs[0]) - found[0]).max() < 1e-4


@pytest.mark.parametrize("head", ["labels", "span"])
def test_peft_s_adapters_open_here_with_the_same_logits(models, head, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"num_labels": 4} if head == "labels" else {}
    base = getattr(transformers, AUTO[head]).from_pretrained(models("bert").path, **options)
    made = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type={"labels": "SEQ_CLS", "span": "QUESTION_ANS"}[head],
            r=4,
            target_modules=["query", "value"],
        ),
    )
    randomise(made, deviation=0.1)
    made.save_pretrained(tmp_path)
    ours = load(tmp_path)
    # saving an adapter leaves the base as it is on disk: what `randomise` did to it is taken back
    fresh = getattr(transformers, AUTO[head]).from_pretrained(models("bert").path, **options)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    pairs = encode_pairs(ours.tokenizer, PAIRS)
    for mine, pair in zip(our_logits(ours, pairs), pairs):
        assert np.abs(mine - their_logits(theirs, pair)).max() < 1e-4
    if head == "labels":
        assert ours.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_retrieval_scores_are_those_of_sentence_transformers():
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    random = np.random.default_rng(4)
    queries, texts = random.normal(size=(12, 8)), random.normal(size=(30, 8))
    belongs = [set(random.choice(30, random.integers(1, 14), replace=False).tolist()) for _ in range(12)]
    units = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries, texts)]
    nearest = np.argsort(-(units[0] @ units[1].T), axis=1)[:, :10]
    mine = retrieval_scores(nearest, belongs)
    evaluator = evaluation.InformationRetrievalEvaluator(
        {f"q{index}": str(index) for index in range(12)},
        {f"t{index}": str(index) for index in range(30)},
        {f"q{index}": {f"t{text}" for text in right} for index, right in enumerate(belongs)},
        precision_recall_at_k=[1, 5, 10],
        accuracy_at_k=[10],
    )

    scores = units[0] @ units[1].T
    theirs = evaluator.compute_metrics(
        [
            [{"corpus_id": f"t{text}", "score": float(row[text])} for text in found]
            for row, found in zip(scores, nearest)
        ]
    )
    assert mine["ndcg_10"] == pytest.approx(theirs["ndcg@k"][10], abs=1e-5)
    assert mine["mrr_10"] == pytest.approx(theirs["mrr@k"][10], abs=1e-5)
    for k in (1, 5, 10):
        assert mine[f"recall_{k}"] == pytest.approx(theirs["recall@k"][k], abs=1e-5)


@pytest.mark.parametrize(("head", "said"), [("labels", "tells labels apart"), ("span", "finds answers")])
def test_what_gguf_cannot_hold_is_refused(models, head, said, tmp_path):
    from lexmill.errors import ModelError
    from lexmill.runtimes.llama_cpp import export_gguf
    from lexmill.runtimes.model_card import model_card
    from lexmill.runtimes.ollama import write_modelfile

    made = headed(models("bert"), head)
    path = write_model_directory(tmp_path / "made", made.config, made.weights(), made.tokenizer).path
    with pytest.raises(ModelError, match=said):
        export_gguf(path, tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=said):
        write_modelfile(path, "x.gguf", tmp_path / "Modelfile")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["made"]
    card = model_card(ModelDirectory.open(path))
    assert "no place for its head" in card and AUTO[head] in card
