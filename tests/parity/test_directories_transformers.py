"""Model directories in the hands of others: transformers' pipelines and classes, GGUF files in transformers, sentence-transformers."""

import importlib.util
import json

import numpy as np
import pytest
from made_models import model_maker

from lexmill.inference.language_model import load
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS
from lexmill.runtimes.llama_cpp import export_gguf

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SHAPE = dict(
    vocab_size=500, width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=96, context=128
)
HEADS = dict(mlm=True, mlm_bias=True, pooler=True, nsp=True)
MODELS = {
    "llama": ("bpe", {"kv_heads": 2}),
    "qwen2": ("bpe", {**FAMILIES["qwen2"], "rope_theta": 1e6}),
    "qwen3": ("bpe", {**FAMILIES["qwen3"]}),
    # transformers reads no head width from a Qwen3 GGUF file and takes 128, that of all of Qwen's own
    "qwen3 of 128": ("bpe", {**FAMILIES["qwen3"], "head_width": 128, "heads": 2, "kv_heads": 1}),
    "bert": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"], **HEADS}),
    "bert without heads": ("wordpiece", {**FAMILIES["bert"], **FAMILY_DEFAULTS["bert"]}),
    "modernbert": (
        "wordpiece",
        {
            **FAMILIES["modernbert"],
            **FAMILY_DEFAULTS["modernbert"],
            "mlm": True,
            "layers": 4,
            "local_window": 8,
        },
    ),
    "t5": ("unigram", {**FAMILIES["t5"], **FAMILY_DEFAULTS["t5"], "decoder_layers": 2, "tied": False}),
}
TEXTS = ["It is a truth universally acknowledged", "the sea", "He said: no."]


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    return model_maker(tmp_path_factory.mktemp("models"), prose, SHAPE, MODELS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_text_generation(models, name):
    """The pipeline takes a plain text, and a conversation, which it renders with the model's template."""
    model = load(models(name).path)
    pipe = transformers.pipeline("text-generation", str(models(name).path))
    text = "It is a truth"
    said = pipe(text, max_new_tokens=10, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said == model.generate(text, max_tokens=10)
    messages = [{"role": "user", "content": "Who are you?"}]
    said = pipe(messages, max_new_tokens=10, do_sample=False)[0]["generated_text"][-1]
    assert said == {"role": "assistant", "content": model.chat(messages, max_tokens=10)}


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_fill_mask(models, name):
    directory = models(name)
    mask = directory.tokenizer.token_text(directory.tokenizer.ids.mask)
    text = f"It is a {mask} universally acknowledged"
    rows = transformers.pipeline("fill-mask", str(directory.path))(text, top_k=5)
    own = load(directory.path).fill_mask(text, top=5)
    assert [row["token"] for row in rows] == [filling.token for filling in own]
    np.testing.assert_allclose(
        [row["score"] for row in rows], [filling.probability for filling in own], rtol=1e-3
    )


@pytest.mark.parametrize("name", ["bert", "bert without heads", "modernbert"])
def test_feature_extraction(models, name):
    pipe = transformers.pipeline("feature-extraction", str(models(name).path))
    own = load(models(name).path).embed(TEXTS)
    for text, vector in zip(TEXTS, own):
        np.testing.assert_allclose(np.array(pipe(text)[0]).mean(0), vector, atol=2e-5)


def test_t5_writes(models):
    """transformers 5 has no pipeline for two-sided models; their classes do it."""
    path = models("t5").path
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("It is a truth", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8)[0]
    own = load(path).generate("It is a truth", max_tokens=8)
    assert tokenizer.decode(written, skip_special_tokens=True) == own


CLASSES = {
    "llama": ["AutoModel", "AutoModelForCausalLM"],
    "qwen2": ["AutoModel", "AutoModelForCausalLM"],
    "qwen3": ["AutoModel", "AutoModelForCausalLM"],
    "bert": [
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForNextSentencePrediction",
        "AutoModelForPreTraining",
    ],
    "bert without heads": ["AutoModel"],
    "modernbert": ["AutoModel", "AutoModelForMaskedLM"],
    "t5": ["AutoModel", "AutoModelForSeq2SeqLM"],
}


@pytest.mark.parametrize("name,auto", [(name, auto) for name, autos in CLASSES.items() for auto in autos])
def test_classes_find_every_weight(models, name, auto):
    """None is missing and made up at random; those of heads that the class lacks may be left over."""
    path = models(name).path
    _, report = getattr(transformers, auto).from_pretrained(path, output_loading_info=True)
    missing = {key for key in report["missing_keys"] if "pooler" not in key or name == "bert"}
    assert not missing and not report["mismatched_keys"]
    if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForPreTraining"):
        assert not report["unexpected_keys"]


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3 of 128"])
def test_transformers_reads_our_gguf(models, tmp_path, name, type):
    """`from_pretrained(folder, gguf_file=...)`: its own reader, its own names of weights, its own tokenizer."""
    pytest.importorskip("accelerate")  # transformers reads no GGUF file without it
    export_gguf(models(name), tmp_path / "model.gguf", type)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    own = load(models(name).path)
    ids = own.tokenizer.encode(TEXTS[0])
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).numpy()
    expected = transformers.AutoModelForCausalLM.from_pretrained(models(name).path)
    with torch.no_grad():
        logits = torch.log_softmax(expected(torch.tensor([ids])).logits[0, -1], -1).numpy()
    tolerance = {"f32": 1e-4, "f16": 2e-2, "q8_0": 0.3}[type]
    assert np.abs(theirs - logits).max() < tolerance
    if type == "f32":
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert [tokenizer(text).input_ids for text in TEXTS] == [own.tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("name", ["bert", "bert without heads", "modernbert"])
def test_sentence_files_mean_what_lexmill_computes(models, name):
    """Read as sentence-transformers reads them: modules in order, the pooling that is switched on, the length."""
    folder = models(name).path
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling"]
    assert modules[0]["path"] == "" and modules[1]["path"] == "1_Pooling"
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 64
    assert [key for key, value in pooling.items() if key.startswith("pooling_mode") and value] == [
        "pooling_mode_mean_tokens"
    ]
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert limit == models(name).config.context
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    vectors = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(vectors, load(folder).embed(TEXTS), atol=2e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
@pytest.mark.parametrize("name", ["bert", "bert without heads", "modernbert"])
def test_sentence_transformers(models, name):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(models(name).path), device="cpu")
    assert theirs.max_seq_length == models(name).config.context
    own = load(models(name).path)
    np.testing.assert_allclose(theirs.encode(TEXTS), own.embed(TEXTS), atol=2e-5)
