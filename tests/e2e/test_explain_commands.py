"""`lexmill explain` as a user runs it, on a tiny decoder with random weights."""

import json

import pytest
from conftest import lexmill

from lexmill.inference.language_model import LanguageModel

pytestmark = pytest.mark.skipif(
    not (hasattr(LanguageModel, "attention") and hasattr(LanguageModel, "hidden_states")),
    reason="the model does not hand out its attention",
)
TEXT = "The bank of the river"


def test_attention_in_all_its_forms(model_path, tmp_path):
    page, picture, drawing = tmp_path / "a" / "page.html", tmp_path / "p.png", tmp_path / "p.svg"
    done = lexmill(
        "explain", "attention", model_path, TEXT, "--word", "bank", "--json",
        "--html", page, "--png", picture, "--svg", drawing,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["kind"], value["layers"], value["heads"]) == ("decoder", 2, 4)
    assert [word["text"] for word in value["queries"]] == TEXT.split()
    assert sum(look["weight"] for look in value["looks"][0]["at"]) == pytest.approx(1, abs=1e-4)
    assert value["looks"][0]["at"][0]["text"] in ("The", "bank")  # a causal model sees nothing behind
    assert "The bank of the river" in page.read_text("utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG") and b"<svg" in drawing.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_attention_on_a_terminal_and_in_a_pipe(model_path):
    done = lexmill("explain", "attention", model_path, TEXT)
    assert done.returncode == 0, done.stderr
    assert "looks most at" in done.stdout and "Rows look at columns" in done.stdout
    assert "\x1b" not in done.stdout
    done = lexmill("explain", "attention", model_path, TEXT, "--word", "river", "--layer", "2", "--head", "1")
    assert "Shown: layer 2, head 1." in done.stdout and "strongest head" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "3"], "no layer 3: this model has 2 layers"),
        (["--layer", "1", "--head", "5"], "no head 5: this model has 4 heads"),
        (["--head", "1"], "needs --layer and --head"),
        (["--layer", "top"], "is no layer"),
        (["--word", "ship"], "'ship' is not in the text"),
        (["--part", "cross"], "no cross attention"),
    ],
)
def test_what_cannot_be_explained_is_said(model_path, options, message):
    done = lexmill("explain", "attention", model_path, TEXT, *options)
    assert done.returncode == 2 and message in done.stderr.replace("\n", " "), done.stderr
    assert "Traceback" not in done.stderr


def test_a_word_in_two_texts(model_path, tmp_path):
    texts = ["the bank of the river", "the bank lent money"]
    page = tmp_path / "word.html"
    done = lexmill("explain", "word", model_path, "bank", *texts, "--json", "--html", page)
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert len(layers) == 3
    # a causal model reads "the bank" alike in both, whatever follows
    assert all(layer["similarity"][0][1] == pytest.approx(1, abs=1e-4) for layer in layers)
    assert "the bank lent money" in page.read_text("utf-8")
    done = lexmill("explain", "word", model_path, "bank", texts[0], "the money")
    assert done.returncode == 2 and "text 2" in done.stderr
