"""`lexmill explain` as pages: attention that one can explore, and a word's vectors across texts.

Both are single HTML files that load nothing from the network; see `lexmill.page`.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from lexmill.inference.explain import AttentionMap
from lexmill.inference.meaning import WordInTexts
from lexmill.inference.pieces import Piece, grouped
from lexmill.page import asset, escaped, page

PRECISE_WEIGHTS = 1 << 19  # up to so many weights take 16 bits each, more take 8
NAMES = {"encoder": "Encoder", "decoder": "Decoder", "cross": "Decoder to encoder"}


def attention_page(
    attention: AttentionMap,
    *,
    part: str | None = None,
    word: str | None = None,
    view: str = "mean",
    layer: int | None = None,
    head: int | None = None,
    special: bool = False,
    tokens: bool = False,
    model: str = "",
) -> str:
    """A page on which to see where each word looks.

    Its size is about 2.7 bytes a weight (layers x heads x queries x keys) up to half a million
    weights, 1.4 bytes above, and 40 KB beside that.

    Args:
        attention: the map, of tokens, not of words.
        part, word, view, layer, head, special, tokens: what is shown first; all can be changed on the page
            and stand in its address, so that a view can be shared.
        model: the model's name, to be shown.
    """
    data = {
        "maps": [_map_data(one) for one in attention.maps],
        "start": {
            "part": part or attention.kind,
            "word": word,
            "view": "mean" if view == "head" else view,
            "layer": layer or 0,
            "head": head or 0,
            "special": special,
            "tokens": tokens,
        },
    }
    of_model = f" by {model}" if model else ""
    return page(
        title=f"Where each word looks: {_shortened(attention.text)}",
        styles=[asset("lexmill.inference", "explain.css")],
        body=asset("lexmill.inference", "explain.html").replace("{model}", escaped(of_model)),
        data=("attention-data", data),
        scripts=[
            asset("lexmill.inference", "attention_data.js"),
            asset("lexmill.inference", "attention_page.js"),
        ],
    )


def _map_data(attention: AttentionMap) -> dict[str, Any]:
    count = attention.weights.size
    bits = 16 if count <= PRECISE_WEIGHTS else 8
    same = attention.keys == attention.queries
    return {
        "kind": attention.kind,
        "name": NAMES[attention.kind],
        "layers": attention.layers,
        "heads": attention.heads,
        "queries": _side(attention.queries, attention.text),
        "keys": None if same else _side(attention.keys, attention.key_text),
        "bits": bits,
        "weights": _packed(attention.weights, bits),
        "rollout": None if attention.kind == "cross" else _packed(attention.rollout(), bits),
    }


def _side(parts: tuple[Piece, ...], text: str) -> dict[str, Any]:
    words, members = grouped(parts, text)
    return {
        "text": text,
        "tokens": [piece.text for piece in parts],
        "words": [word.text for word in words],
        "word": [number for number, member in enumerate(members) for _ in member],
        "special": [int(piece.special) for piece in parts],
    }


def _packed(weights: np.ndarray, bits: int) -> str:
    """Base64 of little-endian integers: w = q / 65535, or w = (q / 255)^2, which spares the small weights."""
    clipped = np.clip(weights, 0, 1)
    if bits == 16:
        whole = np.round(clipped * 65535).astype("<u2")
    else:
        whole = np.round(np.sqrt(clipped) * 255).astype("u1")
    return base64.b64encode(whole.tobytes()).decode()


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


# ---------------------------------------------------------------- one word in several texts


def word_page(found: WordInTexts, model: str = "") -> str:
    """A page that shows how a word's vectors drift apart from layer to layer."""
    last = len(found.similarity) - 1
    of_model = f" by {escaped(model)}" if model else ""
    texts = "".join(f"<li>{escaped(text)}</li>" for text in found.texts)
    body = f"""<header><p class="eyebrow">One word, several texts{of_model}</p>
<h1>“{escaped(found.word)}”</h1><ol class="texts">{texts}</ol>
<p class="answer">{_word_answer(found)}</p></header>
<main><h2>Layer by layer</h2>
<figure>{_word_chart(found)}
<figcaption>Cosine of the word's vectors: 1 is the same direction, 0 is unrelated. Layer 0 is the embedding,
layer {last} the output. Dashed: the mean of two different words, one from each text.</figcaption></figure>
<div class="scroll" role="region" tabindex="0" aria-label="Cosines by layer">{_word_table(found)}</div>
<p class="note">A word's vector is the mean of its tokens' vectors. A cosine has no meaning by itself: compare it with
the dashed line, and with texts in which the word means the same.</p></main>
<footer>Written by lexmill. This page loads nothing from the network.</footer>"""
    return page(
        title=f"“{found.word}” in {len(found.texts)} texts",
        styles=[asset("lexmill.inference", "explain.css")],
        body=body,
    )


def _word_answer(found: WordInTexts) -> str:
    first, last = found.similarity[0], found.similarity[-1]
    name = f"“{escaped(found.word)}”"
    values = sorted((float(last[a, b]), a, b) for a, b in found.pairs)
    low, a, b = values[0]
    if len(values) == 1:
        return (
            f"The two vectors of {name} have a cosine of <b>{first[a, b]:.2f}</b> in the embedding "
            f"and of <b>{low:.2f}</b> in the last layer."
        )
    high, c, d = values[-1]
    return (
        f"In the last layer {name} is least alike in texts {a + 1} and {b + 1} (cosine <b>{low:.2f}</b>), most alike "
        f"in texts {c + 1} and {d + 1} (<b>{high:.2f}</b>). In the embedding these were {first[a, b]:.2f} and {first[c, d]:.2f}."
    )


def _word_table(found: WordInTexts) -> str:
    head = "".join(f'<th scope="col" class="number">texts {a + 1} and {b + 1}</th>' for a, b in found.pairs)
    rows = "".join(
        f'<tr><th scope="row">{layer}{" (embedding)" if layer == 0 else ""}</th>'
        + "".join(f'<td class="number">{matrix[a, b]:.3f}</td>' for a, b in found.pairs)
        + f'<td class="number">{"" if np.isnan(other) else f"{other:.3f}"}</td></tr>'
        for layer, (matrix, other) in enumerate(zip(found.similarity, found.baseline))
    )
    return (
        f'<table class="data"><thead><tr><th scope="col">layer</th>{head}'
        f'<th scope="col" class="number">two different words</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _word_chart(found: WordInTexts) -> str:
    """Cosine by layer as SVG; each line carries its name, so colour is not needed to tell them apart."""
    width, height, left, right, top, bottom = 720, 300, 40, 110, 14, 30
    lines = [(f"{a + 1} and {b + 1}", found.similarity[:, a, b], "line") for a, b in found.pairs]
    if not np.isnan(found.baseline).any():
        lines.append(("other words", found.baseline, "line other"))
    low = min(0.0, *(float(values.min()) for _, values, _ in lines))
    steps = max(len(found.similarity) - 1, 1)

    def x(layer: int) -> float:
        return left + (width - left - right) * layer / steps

    def y(cosine: float) -> float:
        return top + (height - top - bottom) * (1 - cosine) / (1 - low)

    parts = []
    for tick in np.arange(math.ceil(low * 4), 5) / 4:
        parts.append(
            f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/>'
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>'
        )
    parts += [
        f'<text x="{x(layer):.1f}" y="{height - 8}" text-anchor="middle">{layer}</text>'
        for layer in range(0, steps + 1, max(1, steps // 12))
    ]
    taken: list[float] = []
    for name, values, kind in sorted(lines, key=lambda line: float(line[1][-1])):
        points = " ".join(f"{x(layer):.1f},{y(float(value)):.1f}" for layer, value in enumerate(values))
        place = y(float(values[-1])) + 4
        place = min([place, *(one - 15 for one in taken)])  # names do not cover each other
        taken.append(place)
        parts.append(
            f'<polyline class="{kind}" points="{points}"/>'
            f'<text class="name" x="{width - right + 8}" y="{place:.1f}">{name}</text>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Cosine by layer; the numbers are in the table below">{"".join(parts)}</svg>'
    )
