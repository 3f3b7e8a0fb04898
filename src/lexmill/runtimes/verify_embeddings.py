"""What `verify` asks llama.cpp of an encoder: ids and embeddings. It has no place for an encoder's heads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lexmill.inference.language_model import POOLING, LanguageModel
from lexmill.inference.torch_backend import hidden_rows
from lexmill.runtimes.llama_cpp_server import LlamaCpp
from lexmill.runtimes.verify_cases import TEXTS, usable_texts
from lexmill.runtimes.verify_checks import same_ids
from lexmill.runtimes.verify_report import Check
from lexmill.runtimes.verify_stress import Stress
from lexmill.runtimes.verify_wordpiece import LlamaWordPiece

# The largest of 1 - cosine, against lexmill running the file's own weights. Measured on random models of two
# layers with twice the usual weights: 3e-8 (f32), 4e-8 (f16), 4e-6 (bf16), 3e-5 (q8_0). llama.cpp computes GELU
# in its tanh form by a table in half precision, whatever the model says; deeper models add that up.
# K-quants meet coarser activations (blocks of 256) and get twice what Q8_0 gets.
EMBEDDING_TOLERANCES = {
    **{"f32": 1e-5, "f16": 1e-5, "bf16": 1e-4},
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), 1e-3),
    **dict.fromkeys(("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"), 2e-3),
}
_POOLED = {
    "mean": "means of the last hidden states",
    "cls": "last hidden states of the first token",
    "last": "last hidden states of the last token",
    "max": "maxima of the last hidden states",
}


def compare_embeddings(
    name: str, runtime: LlamaCpp, model: LanguageModel, type: str | None
) -> Iterator[Check]:
    """Both checks; `model` runs the weights of the file, whose type decides the tolerance."""
    tokenizer = model.tokenizer
    limit = LlamaWordPiece(tokenizer)
    check = same_ids(name, {text: tokenizer.encode(text) for text in TEXTS}, runtime.tokenize, limit)
    yield Stress(tokenizer).added_to(check, runtime.tokenize, limit)
    texts = usable_texts(tokenizer, model.config.context)
    apart, pool = [], POOLING[model.pooling]
    for ids in texts.values():
        ours = pool(hidden_rows(model.network, [ids])[0]).astype(np.float64)
        theirs = runtime.embed(ids)
        apart.append(1 - ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
    detail = f"{len(apart)} texts, {_POOLED[model.pooling]}: 1 - cosine at most {max(apart):.2g}"
    tolerance = EMBEDDING_TOLERANCES.get(type or "")
    if tolerance is None:
        detail += "; no tolerance is stated for this type of file"
        yield Check(name, "embeddings", None, detail=detail)
        return
    figure = float(np.max(apart))
    yield Check(name, "embeddings", bool(figure <= tolerance), figure, tolerance, detail)
