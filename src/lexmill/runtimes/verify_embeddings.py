"""What `verify` asks llama.cpp of an encoder: ids and embeddings. It has no place for an encoder's heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lexmill.inference.language_model import POOLING, LanguageModel
from lexmill.inference.torch_backend import hidden_rows
from lexmill.runtimes.llama_cpp_server import LlamaCpp
from lexmill.runtimes.verify_cases import TEXTS, usable_texts
from lexmill.runtimes.verify_checks import same_ids
from lexmill.runtimes.verify_report import Check
from lexmill.runtimes.verify_rounding import Rounded
from lexmill.runtimes.verify_stress import Stress
from lexmill.runtimes.verify_wordpiece import LlamaWordPiece

# The largest of 1 - cosine where the noise of a file cannot be measured: of a file that does not hold the model,
# and in Ollama. MiniLM (6 layers) has 2.5e-6 in F32 and F16, 1.5e-5 in BF16, 0.8e-3 to 1.3e-3 in quantised types.
EMBEDDING_TOLERANCES = {
    **{"f32": 1e-5, "f16": 1e-5, "bf16": 1e-4},
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), 2e-3),
    **dict.fromkeys(("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"), 3e-3),
}
_GELU = 1e-5  # llama.cpp computes GELU in its tanh form by a table in half precision, whatever the model says
_POOLED = {
    "mean": "means of the last hidden states",
    "cls": "last hidden states of the first token",
    "last": "last hidden states of the last token",
    "max": "maxima of the last hidden states",
}


def compare_embeddings(
    name: str, runtime: LlamaCpp, model: LanguageModel, type: str | None, rounded: Rounded | None
) -> Iterator[Check]:
    """Both checks.

    Args:
        model: runs the weights of the file.
        type: of the file; it decides the tolerance where no noise is measured.
        rounded: rounds activations as llama.cpp does with these weights: twice what that costs is allowed.
    """
    tokenizer = model.tokenizer
    limit = LlamaWordPiece(tokenizer)
    check = same_ids(name, {text: tokenizer.encode(text) for text in TEXTS}, runtime.tokenize, limit)
    yield Stress(tokenizer).added_to(check, runtime.tokenize, limit)
    yield same_embeddings(name, runtime.embed, model, type, rounded)


def same_embeddings(
    name: str,
    embed: Callable[[list[int]], np.ndarray],
    model: LanguageModel,
    type: str | None,
    rounded: Rounded | None,
) -> Check:
    """The second: the angle between two vectors of a text; other arguments as in `compare_embeddings`.

    Args:
        embed: what the runtime makes of a text's ids, (width,).
    """
    texts = usable_texts(model.tokenizer, model.config.context)
    apart, noise = [], []
    for ids in texts.values():
        ours = _vector(model, ids)
        apart.append(_between(ours, embed(ids)))
        if rounded is not None and rounded.names:
            with rounded:
                noise.append(_between(ours, _vector(model, ids)))
    detail = f"{len(apart)} texts, {_POOLED[model.pooling]}: 1 - cosine at most {max(apart):.2g}"
    tolerance = EMBEDDING_TOLERANCES.get(type or "")
    if rounded is not None and noise:
        tolerance = 2 * max(noise) + _GELU
        detail += (
            f"; within lexmill, rounding activations to {' and '.join(rounded.names)} costs {max(noise):.2g}, "
            "and twice that is allowed"
        )
    if tolerance is None:
        detail += "; no tolerance is stated for this type of file"
        return Check(name, "embeddings", None, detail=detail)
    figure = float(np.max(apart))
    return Check(name, "embeddings", bool(figure <= tolerance), figure, tolerance, detail)


def _vector(model: LanguageModel, ids: list[int]) -> np.ndarray:
    return POOLING[model.pooling](hidden_rows(model.network, [ids])[0]).astype(np.float64)


def _between(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - cosine."""
    return float(1 - ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
