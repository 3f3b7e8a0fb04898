"""How near the answers of lexmill's engine and of llama.cpp are to float32's, for each type of weights, in one table.

The reference is torch in float32 on the numbers that the same file holds, so that only the computing differs, not the
quantiser. Both runtimes read the same tokens in two ways: as a prompt, and one after the other as when they write
(the engine's answers do not depend on how many tokens it is given at once, so it takes those in batches too). Means
over all positions of chunks of WikiText-2: the KL divergence of the answers from the reference's, and how often the
likeliest token is the same. Fails if the engine is farther from the reference than llama.cpp in the same way.

    python bench/agreement.py smol-Q4_0.gguf smol-Q8_0.gguf --data wikitext-2/test.txt --library llama.cpp/build/bin
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from inference_sides import LlamaCpp

import lexmill
from lexmill.inference.native.engine import NativeEngine
from lexmill.inference.native.interface import BLOCK, Batch
from lexmill.inference.native.interface import CHUNK as STEP
from lexmill.inference.native.speed import open_source

CHUNK = 512
# By chance alone the two differ so much: divergences of the two ways of one runtime do, too.
ALLOWED = 1.1
Logits = Callable[[Sequence[int]], np.ndarray]


class Score(NamedTuple):
    divergence: float  # mean, nats
    worst: float  # 99 % of positions diverge less
    agreement: float  # share of positions with the same likeliest token


def chunks_of(model: Any, text: str, count: int) -> list[list[int]]:
    ids = model.tokenizer.encode(text, special=False)
    return [ids[start : start + CHUNK] for start in range(0, min(count * CHUNK, len(ids) - CHUNK), CHUNK)]


def of_engine(engine: NativeEngine, prompt: bool) -> Logits:
    tables = np.arange(CHUNK // BLOCK, dtype=np.int32)[None]

    def logits(ids: Sequence[int]) -> np.ndarray:
        found = []
        for start in range(0, len(ids), STEP):
            part = np.array(ids[start : start + STEP], np.int32)
            places = np.arange(start, start + part.size, dtype=np.int32)
            rows, wanted = np.zeros(part.size, np.int32), np.arange(part.size, dtype=np.int32)
            found.append(engine.forward(Batch(part, places, rows, tables, wanted, prompt)))
        return np.concatenate(found)

    return logits


def of_llama_cpp(side: LlamaCpp, prompt: bool) -> Logits:
    def parts(ids: Sequence[int]) -> Iterator[np.ndarray]:
        side.before_read(0)
        step = CHUNK if prompt else 1
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            side.decode(side.alone, [(token, start + i, 0, True) for i, token in enumerate(part)])
            for i in range(len(part)):
                yield np.ctypeslib.as_array(
                    side.lib.llama_get_logits_ith(side.alone, i), (side.words,)
                ).copy()

    return lambda ids: np.stack(list(parts(ids)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def divergences(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Of each position, from logarithms of probabilities and logits."""
    return (np.exp(reference) * (reference - log_softmax(logits))).sum(-1, dtype=np.float64)


def score(file: str, data: Path, chunks: int, library: str) -> dict[str, Score]:
    model = lexmill.load(file, backend="torch")
    engine = NativeEngine.open(open_source(Path(file)), threads=1, context=CHUNK, pages=CHUNK // BLOCK)
    # llama.cpp shapes a thread's tiles once and relies on that: no other library may compute in its thread
    alone = ThreadPoolExecutor(1)
    peer = alone.submit(LlamaCpp, file, 1, library).result()

    def theirs(prompt: bool) -> Logits:
        logits = of_llama_cpp(peer, prompt)
        return lambda ids: alone.submit(logits, ids).result()

    sides = {
        "lexmill, prompt": of_engine(engine, True),
        "llama.cpp, prompt": theirs(True),
        "lexmill, writing": of_engine(engine, False),
        "llama.cpp, writing": theirs(False),
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    same: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for ids in chunks_of(model, data.read_text(encoding="utf-8"), chunks):
        reference = log_softmax(model.logits(ids))
        for name, logits in sides.items():
            answer = logits(ids)
            found[name].append(divergences(reference, answer))
            same[name].append(reference.argmax(-1) == answer.argmax(-1))
    engine.close()
    scores = {}
    for name in sides:
        each = np.concatenate(found[name])
        scores[name] = Score(
            float(each.mean()), float(np.quantile(each, 0.99)), float(np.concatenate(same[name]).mean())
        )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="GGUF files")
    parser.add_argument(
        "--data", type=Path, required=True, help="a plain text, such as WikiText-2's test part"
    )
    parser.add_argument("--chunks", type=int, default=8, help=f"of {CHUNK} tokens")
    parser.add_argument(
        "--library", default=os.environ.get("LEXMILL_LLAMA_BIN", ""), help="llama.cpp's bin folder"
    )
    parser.add_argument("--json", type=Path, help="add the figures to this file of JSON lines")
    arguments = parser.parse_args()
    print("| file | who | mean KL, nats | 99 % below | same likeliest token |\n|---|---|---:|---:|---:|")
    farther = []
    for file in arguments.files:
        scores = score(file, arguments.data, arguments.chunks, arguments.library)
        for name, (divergence, worst, agreement) in scores.items():
            print(
                f"| {Path(file).name} | {name} | {divergence:.2e} | {worst:.2e} | {agreement:.2%} |",
                flush=True,
            )
        for way in ("prompt", "writing"):
            ours, theirs = scores[f"lexmill, {way}"], scores[f"llama.cpp, {way}"]
            if ours.divergence > ALLOWED * theirs.divergence:
                farther.append(f"{Path(file).name}, {way}")
        if arguments.json:
            with open(arguments.json, "a") as out:
                out.write(
                    json.dumps({"file": file, **{name: s._asdict() for name, s in scores.items()}}) + "\n"
                )
    if farther:
        sys.exit(f"farther from float32 than llama.cpp: {'; '.join(farther)}")


if __name__ == "__main__":
    main()
