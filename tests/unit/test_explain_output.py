"""Pages and pictures of attention: safe with any text, true to the numbers, working in a browser."""

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from explain_samples import random_weights, sample_map, wordpiece

from lexmill.errors import MissingPackageError
from lexmill.inference.explain import attention_map
from lexmill.inference.explain_page import attention_page, word_page
from lexmill.inference.explain_plot import plot_grid, plot_view
from lexmill.inference.meaning import word_in_texts

HOSTILE = "the </script><script>alert(1)</script><img src=x onerror=alert(2)> bank \u2028 &amp; '\""


class Tags(html.parser.HTMLParser):
    """The tags of a page, and the content of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)


def unpacked(map_data, name="weights"):
    raw = base64.b64decode(map_data[name])
    if map_data["bits"] == 16:
        return np.frombuffer(raw, "<u2") / 65535
    return (np.frombuffer(raw, "u1") / 255) ** 2


def test_no_text_can_break_out_of_the_page():
    page = attention_page(sample_map(HOSTILE), word=HOSTILE, model="<b>model</b>")
    tags = Tags(page)
    assert [tag for tag, _ in tags.tags].count("script") == 3
    assert not any(tag == "img" for tag, _ in tags.tags)
    assert not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    assert "<b>model</b>" not in page and "alert(1)" in page
    assert json.loads(tags.scripts[0])["maps"][0]["queries"]["text"] == HOSTILE


def test_no_word_can_break_out_of_its_page():
    tokenizer = wordpiece()
    ids = tokenizer.encode(HOSTILE)
    found = word_in_texts(tokenizer, "bank", [HOSTILE, HOSTILE], [np.ones((2, len(ids), 4))] * 2)
    tags = Tags(word_page(dataclasses.replace(found, word=HOSTILE), "<i>"))
    assert not {"script", "img", "i"} & {tag for tag, _ in tags.tags}


def test_nothing_is_loaded_from_anywhere():
    tags = Tags(page := attention_page(sample_map()))
    assert not any("src" in attributes or tag in ("link", "iframe") for tag, attributes in tags.tags)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src 'none'" in html.unescape(page)


@pytest.mark.parametrize(("layers", "heads", "words", "bits"), [(2, 3, 3, 16), (12, 12, 126, 8)])
def test_the_page_holds_the_numbers(layers, heads, words, bits):
    attention = sample_map(" ".join(["bank"] * words), layers, heads)
    page = attention_page(attention)
    held = json.loads(Tags(page).scripts[0])["maps"][0]
    assert held["bits"] == bits
    tolerance = 1e-5 if bits == 16 else 0.004
    np.testing.assert_allclose(unpacked(held), attention.weights.ravel(), atol=tolerance)
    np.testing.assert_allclose(unpacked(held, "rollout"), attention.rollout().ravel(), atol=tolerance)
    assert len(page) < (100_000 if bits == 16 else 3_400_000)


# ---------------------------------------------------------------- pictures


def test_pictures_are_of_their_kind_and_repeatable():
    pytest.importorskip("matplotlib")
    view = sample_map().words().view()
    svg, warning = plot_view(view, "svg", "a $caption_{$ & <b>", marked=[1])
    assert svg.startswith(b"<?xml") and not warning
    assert svg == plot_view(view, "svg", "a $caption_{$ & <b>", marked=[1])[0]
    png, _ = plot_view(view, "png")
    assert png.startswith(b"\x89PNG")
    assert plot_grid(sample_map(), "png", "caption")[0].startswith(b"\x89PNG")


def test_letters_without_a_font_are_said():
    pytest.importorskip("matplotlib")
    _, warning = plot_view(sample_map().view(), "svg", "\U000f1234")
    assert "No installed font has" in warning or sys.platform != "linux"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"lexmill\[plots\]"):
        plot_view(sample_map().view(), "svg")


# ---------------------------------------------------------------- in a browser


def in_browser(tmp_path, page, address):
    """The page's document after its scripts have run, at `address` (#…)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed")
    file = tmp_path / "page.html"
    file.write_text(page, "utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri() + address], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def answer(document):
    found = re.search(r'<p class="answer"[^>]*>(.*?)</p>', document, re.S)
    return html.unescape(re.sub(r"<[^>]*>", "", found[1])).replace("\u00a0", " ")


def percent(weight):
    return f"{100 * weight:.0f} %" if weight >= 0.0995 else f"{100 * weight:.1f} %"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "view"),
    [
        ("#word=bank", {}),
        ("#word=bank&layer=2&head=3", {"name": "head", "layer": 2, "head": 3}),
        ("#word=bank&layer=1", {"layer": 1}),
        ("#word=bank&view=rollout", {"name": "rollout"}),
        ("#word=bank&view=strongest", {"name": "strongest"}),
        ("#word=bank&special=1", {"special": True}),
    ],
)
def test_the_browser_says_what_python_says(tmp_path, address, view):
    attention = sample_map("the bank un riverbank lent money")
    looks = attention.words().looks("bank", **view)
    document = in_browser(tmp_path, attention_page(attention), address)
    names = ["itself" if look.text == "bank" else look.text.join("“”") for look in looks[:2]]
    names = [name.strip("“”") if name.startswith("“[") else name for name in names]
    expected = f"“bank” looks most at {names[0]} ({percent(looks[0].weight)}), then at {names[1]} ({percent(looks[1].weight)})."
    assert answer(document) == expected
    assert document.count("<canvas") == 6


@pytest.mark.slow
def test_the_browser_shows_two_texts_and_hostile_ones(tmp_path):
    tokenizer = wordpiece()
    ids, other = tokenizer.encode(HOSTILE), tokenizer.encode("lent money")
    cross = attention_map(
        tokenizer,
        "lent money",
        other,
        random_weights(2, 2, len(other), len(ids)),
        "cross",
        key_text=HOSTILE,
        key_ids=ids,
    )
    encoder = attention_map(tokenizer, HOSTILE, ids, random_weights(2, 2, len(ids)), more=[cross])
    document = in_browser(tmp_path, attention_page(encoder, part="cross", word="money"), "")
    look = encoder.words().part("cross").looks("money")[0]
    assert answer(document).startswith(f"“money” looks most at “{look.text}” ({percent(look.weight)})")
    assert "<img" not in document
    assert "alert(1)" in html.unescape(in_browser(tmp_path, attention_page(encoder), "#part=encoder"))
