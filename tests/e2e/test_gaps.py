"""fill, next-sentence and embed as a user meets them, on small models of each shape; wrong input included."""

import json

import numpy as np
import pytest
from conftest import lexmill as command
from conftest import randomise

import lexmill
from lexmill.model.build import build_model
from lexmill.model.directory import write_model_directory
from lexmill.pretrain.shape import ShapeConfig
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer


def make(folder, family, tokenizer, **heads):
    config = ShapeConfig(family=family, width=32, layers=2, heads=2, context=64).with_vocabulary(
        tokenizer.vocab_size, **heads
    )
    write_model_directory(folder, config, randomise(build_model(config)).weights(), tokenizer)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, prose):
    root = tmp_path_factory.mktemp("shapes")
    pieces = train_tokenizer([prose], TokenizerConfig(kind="wordpiece", vocab_size=400, lowercase=True))
    unigram = train_tokenizer([prose], TokenizerConfig(kind="unigram", vocab_size=400, sentinels=8))
    letters = train_tokenizer([prose], TokenizerConfig(vocab_size=400))
    return {
        "bert": make(root / "bert", "bert", pieces, mlm=True, mlm_bias=True, pooler=True, nsp=True),
        "bare": make(root / "bare", "bert", pieces),
        "modern": make(root / "modern", "modernbert", pieces, mlm=True),
        "t5": make(root / "t5", "t5", unigram),
        "llama": make(root / "llama", "llama", letters),
        "odd": make(root / "odd", "modernbert", letters, mlm=True),
    }


def test_fill_gives_probabilities_in_order(models):
    done = command("fill", models["bert"], "She was [MASK] happy.", "--top", 3, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fillings"]
    assert len(found) == 3
    probabilities = [one["probability"] for one in found]
    assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] < 1
    model = lexmill.load(models["bert"])
    ids = model.tokenizer.encode("She was [MASK] happy.")
    row = model.logits(ids)[ids.index(model.tokenizer.ids.mask)]
    assert [one["token"] for one in found] == np.argsort(-row, kind="stable")[:3].tolist()
    assert "[MASK]" not in found[0]["sentence"]
    shown = command("fill", models["modern"], "She was [MASK] happy.")
    assert shown.returncode == 0 and "probability" in shown.stdout


def test_fill_gaps_of_several_words(models):
    done = command("fill", models["t5"], "She was <extra_id_0> happy <extra_id_1> him.", "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fillings"]
    # beams that say the same are one filling, so an untrained model may have fewer than asked for
    assert 1 <= len(found) <= 2 and "<extra_id_" not in found[0]["sentence"]
    assert len({one["text"] for one in found}) == len(found)


def test_next_sentence_and_embed(models, tmp_path):
    done = command("next-sentence", models["bert"], "She came.", "He went.", "--json")
    probability = json.loads(done.stdout)["probability"]
    model = lexmill.load(models["bert"])
    assert probability == pytest.approx(model.next_sentence("She came.", "He went."))
    assert 0 < probability < 1
    for name in ("bert", "bare", "modern", "t5", "llama"):
        done = command("embed", models[name], "She came.", "He went away from her.", "--json")
        assert done.returncode == 0, done.stderr
        vectors = np.array(json.loads(done.stdout)["vectors"])
        assert vectors.shape == (2, 32)
        # texts computed together do not disturb each other
        loaded = lexmill.load(models[name])
        assert np.abs(vectors[0] - loaded.embed("She came.")).max() < 1e-5
    out = tmp_path / "vectors.npy"
    done = command("embed", models["bert"], "a", "b", "--pooling", "cls", "--normalise", "--out", out)
    assert done.returncode == 0
    assert np.allclose(np.linalg.norm(np.load(out), axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fill", "bert", "no gap here"), "0 masks"),
        (("fill", "bert", "[MASK] and [MASK]"), "2 masks"),
        (("fill", "t5", "no gap here"), "no gap"),
        (("fill", "llama", "a [MASK]"), "needs an encoder"),
        (("fill", "bare", "a [MASK]"), "no masked-language-modelling head"),
        (("fill", "odd", "a [MASK]"), "no [MASK]"),
        (("fill", "bert", "word " * 80 + "[MASK]"), "context of 64"),
        (("next-sentence", "bert", "She came.", "  "), "second sentence is empty"),
        (("next-sentence", "bert", "", "She came."), "first sentence is empty"),
        (("next-sentence", "modern", "a", "b"), "no next-sentence head"),
        (("embed", "bert", "a", ""), "Text 2 is empty"),
        (("embed", "bert", "a", "--pooling", "men"), "Did you mean 'mean'"),
        (("generate", "bert", "a"), "needs a decoder"),
        (("chat", "t5"), "no chat template"),
    ],
)
def test_wrong_input_is_said_clearly(models, arguments, said):
    verb, name, *rest = arguments
    done = command(verb, models[name], *rest, text="hello\n")
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr


def test_models_without_a_tokenizer_take_ids(models, tmp_path):
    import shutil

    bare = tmp_path / "ids"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models["bert"] / name, bare / name)
    model = lexmill.load(bare)
    assert model.logits([3, 7, 9]).shape == (3, 400)
    done = command("fill", bare, "a [MASK]")
    assert done.returncode == 2 and "tokenizer.json" in done.stderr


def test_logits_want_what_fits_the_shape(models):
    from lexmill.errors import ModelError

    with pytest.raises(ModelError, match="decoder_ids"):
        lexmill.load(models["t5"]).logits([5, 6])
    assert lexmill.load(models["t5"]).logits([5, 6], [0, 4, 9]).shape == (3, 400)
    with pytest.raises(ModelError, match="fit an encoder–decoder only"):
        lexmill.load(models["llama"]).logits([5, 6], [0])


def test_a_checkpoint_of_another_family_is_refused(models, tmp_path):
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(models["modern"], mixed)
    shutil.copy(models["t5"] / "model.safetensors", mixed / "model.safetensors")
    done = command("embed", mixed, "a")
    assert done.returncode == 2 and "missing" in done.stderr


RECIPE = """
name = "small-bert"
steps = ["prepare", "tokenizer", "pretrain", "evaluate", "export", "verify", "report"]
[prepare]
root = "rows"
validation_fraction = 0.2
sources = [{ path = "*.csv.xz", column = "review" }]
[tokenizer]
kind = "wordpiece"
vocab_size = 200
[pretrain]
steps = 6
rows = 4
prompts = ["it was [MASK] good"]
[pretrain.model]
family = "bert"
width = 32
layers = 1
heads = 2
context = 32
[evaluate]
fill = [{ text = "it was [MASK] good", expect = ["very"], top = 5 }]
[export]
types = []
"""


def test_a_recipe_of_an_encoder(tmp_path, prose):
    import csv
    import io
    import lzma

    rows = [part for part in prose[:40_000].split("\n\n") if len(part) > 60]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", "review"])
    writer.writerows([index % 2, row] for index, row in enumerate(rows))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv.xz").write_bytes(lzma.compress(text.getvalue().encode()))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    out = tmp_path / "run"
    done = command("run", tmp_path / "recipe.toml", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "lexmill fill" in done.stdout and "lexmill chat" not in done.stdout
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    assert scores["pretraining"]["pairs measured"] > 0
    assert scores["fill"][0]["expected"] == ["very"]
    checks = json.loads((out / "verify.json").read_text())["checks"]
    assert checks and all(check["passed"] for check in checks)
    assert (out / "report.html").is_file() and not (out / "finetune").exists()
    again = command("run", tmp_path / "recipe.toml", "--out", out)
    assert "All steps are done" in again.stdout
    # a sentence that stands in the training rows proves nothing
    seen = " ".join(rows[0].split()[:3])
    known = RECIPE.replace(
        'text = "it was [MASK] good", expect = ["very"]', 'text = "[MASK]", expect = ["the"]'
    )
    (tmp_path / "recipe.toml").write_text(known)
    done = command("run", tmp_path / "recipe.toml", "--out", out)
    assert done.returncode == 2 and "holds the sentence" in done.stderr, seen


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('steps = ["prepare", "tokenizer", "pretrain"', 'steps = ["prepare", "pretrain"'), "needs the step 'tokenizer'"),
        (('"verify", "report"]', '"verfy"]'), "Did you mean 'verify'"),
        (('root = "rows"', 'root = "nowhere"'), "prepare.root=FOLDER"),
        (('family = "bert"', 'family = "bart"'), "bart"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_said_clearly(tmp_path, change, said):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv.xz").write_bytes(b"")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace(*change))
    done = command("run", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert done.returncode == 2, done.stdout
    assert said in " ".join(done.stderr.split())
