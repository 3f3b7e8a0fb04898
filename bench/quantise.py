"""Size, perplexity and divergence of quantised files, by lexmill's quantiser and by llama.cpp's, in one table.

Both sides quantise the same float32 weights to the same types (which tensor gets which is llama.cpp's
choice on both; ggml's quantiser is called through the xllamacpp wheel), so that sizes are equal. Both
are then run by lexmill's float32 network, so that only the quantiser differs: perplexity over the second
half of chunks of 512 tokens, as llama.cpp's own tool counts, and the mean KL divergence from the
unquantised model at the same positions. Seconds are for quantising all matrices, on as many threads as
OMP_NUM_THREADS says.

    python bench/quantise.py MODEL --data wikitext-2/test.txt --types q4_k_m q6_k
    python bench/quantise.py MODEL --data wikitext-2/test.txt --imatrix imatrix.gguf --llama-cpp q4_k_m
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for `llama_library`

CHUNK = 512


class Score(NamedTuple):
    perplexity: float
    divergence: float  # mean, nats
    worst: float  # 99.9 % of positions diverge less


def ggml_encode(weight, kind, importance, lib, threads):
    """The bytes that ggml's quantiser gives, rows shared among threads."""
    quantise = lib.ggml_quantize_chunk
    weight = np.ascontiguousarray(weight, np.float32)
    rows, columns = weight.shape
    out = np.empty(kind.byte_size(weight.shape), np.uint8)
    factors = None if importance is None else np.ascontiguousarray(importance, np.float32)
    at = factors.ctypes.data if factors is not None else None
    step = -(-rows // threads)

    def part(first):
        quantise(
            kind.id,
            weight.ctypes.data,
            out.ctypes.data,
            first * columns,
            min(step, rows - first),
            columns,
            at,
        )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, rows, step)))
    return out


class Evaluator:
    """Scores weights on chunks of a text against the unquantised model, whose answers are kept."""

    def __init__(self, model, text: str, chunks: int) -> None:
        import torch

        self.torch, self.model = torch, model
        begin = model.tokenizer.encode("")
        ids = model.tokenizer.encode(text, special=False)
        starts = range(0, min(chunks * CHUNK, len(ids) - CHUNK), CHUNK)
        self.chunks = [begin + ids[start + len(begin) : start + CHUNK] for start in starts]
        self.reference = [self._logprobs(chunk) for chunk in self.chunks]

    @property
    def positions(self) -> int:
        return sum(len(rows) for rows in self.reference)

    def _logprobs(self, chunk):
        with self.torch.inference_mode():
            logits = self.model.network(self.torch.tensor([chunk]))[0, CHUNK // 2 : -1]
            return logits.log_softmax(-1)

    def score(self, weights=None) -> Score:
        """Of these weights by lexmill's names; of the network as it is where there are none."""
        if weights is not None:
            self.model.network.load_weights(weights)
        loss, divergences = 0.0, []
        for chunk, reference in zip(self.chunks, self.reference, strict=True):
            found = self._logprobs(chunk)
            targets = self.torch.tensor(chunk[CHUNK // 2 + 1 :])[:, None]
            loss -= float(found.gather(1, targets).sum())
            divergences.append((reference.exp() * (reference - found)).sum(-1).numpy())
        every = np.concatenate(divergences)
        return Score(math.exp(loss / self.positions), float(every.mean()), float(np.quantile(every, 0.999)))


def quantise_all(directory, mix, matrix, encode):
    """Every matrix of a model by lexmill's names after `encode` and back, bytes by name, and seconds."""
    from lexmill.formats.blocks import decode
    from lexmill.model.gguf_shapes import held_weights, stays_f32, weight_from_gguf, weight_in_gguf
    from lexmill.model.names import weight_shapes
    from lexmill.runtimes.gguf_mixes import choose_types

    shapes = weight_shapes(directory.config)
    names = [name for name in held_weights(directory.config) if not stays_f32(name, shapes[name.own])]
    matrices = {name.gguf: shapes[name.own] for name in names}
    types = choose_types(mix, matrices, directory.config, importance=matrix is not None)
    weights, encoded, seconds = {}, {}, 0.0
    for name in names:
        kind, weight = types[name.gguf].type, weight_in_gguf(directory, name)
        importance = matrix.importance(name.gguf, weight.shape[-1]) if matrix is not None else None
        begun = time.perf_counter()
        encoded[name.gguf] = encode(weight, kind, importance)
        seconds += time.perf_counter() - begun
        weights[name.own] = weight_from_gguf(
            decode(encoded[name.gguf], kind, weight.shape), directory.config, name
        )
    return weights, encoded, seconds


def in_llama_cpp(path: Path, chunks: list[list[int]]) -> float:
    """The perplexity of a file run by llama.cpp itself, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(path)],
        input=json.dumps(chunks),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def child(path: str) -> None:
    """Read chunks, print the perplexity."""
    from llama_library import Batch, library, load

    lib = library()
    _, context, size = load(lib, path, CHUNK)
    loss, positions = 0.0, 0
    for chunk in json.load(sys.stdin):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        tokens, every = (ctypes.c_int32 * len(chunk))(*chunk), (ctypes.c_int8 * len(chunk))(*[1] * len(chunk))
        assert lib.llama_decode(context, Batch(len(chunk), tokens, None, None, None, None, every)) == 0
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(chunk), size))
        logits = logits[CHUNK // 2 : -1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        targets = np.array(chunk[CHUNK // 2 + 1 :])
        loss -= (logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(-1))).sum()
        positions += len(targets)
    print(math.exp(loss / positions))
    sys.stdout.flush()
    os._exit(0)  # nothing here is worth an orderly end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model directory of a decoder")
    parser.add_argument("--data", type=Path, required=True, help="a text to measure on")
    parser.add_argument("--chunks", type=int, default=24, help="of 512 tokens, at most")
    parser.add_argument("--types", nargs="*", help="all by default")
    parser.add_argument("--imatrix", type=Path, help="quantise with this importance matrix")
    parser.add_argument("--llama-cpp", nargs="*", default=[], help="types to be run by llama.cpp too")
    arguments = parser.parse_args()

    from llama_library import library

    from lexmill.devices import keep_freed_memory, this_machine, threads

    keep_freed_memory()
    from lexmill.formats.blocks import encode
    from lexmill.formats.imatrix import read_imatrix
    from lexmill.inference.language_model import load
    from lexmill.model.directory import ModelDirectory
    from lexmill.runtimes.gguf_mixes import MIXES
    from lexmill.runtimes.llama_cpp import export_gguf

    directory, lib = ModelDirectory.open(arguments.model), library()
    matrix = read_imatrix(arguments.imatrix) if arguments.imatrix else None
    types = arguments.types or [name for name in MIXES if name not in ("f32", "f16", "bf16")]
    evaluator = Evaluator(load(directory.path), arguments.data.read_text("utf-8"), arguments.chunks)
    print(
        f"{directory.path.name}, {arguments.data.name}: {len(evaluator.chunks)} chunks, "
        f"{evaluator.positions:,} positions; {this_machine().cpu_class}, {threads()} threads"
        + (f"; importance: {arguments.imatrix.name}" if matrix else "")
    )
    print("| type | MB | quantiser | perplexity | mean KL | 99.9 % KL | seconds |")
    print("|---|---|---|---|---|---|---|")
    if not arguments.types:
        print(
            f"| f32 | {4 * directory.config.parameters / 1e6:.1f} | | {evaluator.score().perplexity:.4f} | | | |"
        )

    def ggml(weight, kind, importance):
        return ggml_encode(weight, kind, importance, lib, threads())

    kept = {name: directory.weight(name) for name in directory.weights()}
    for mix in types:
        ours, our_bytes, our_seconds = quantise_all(directory, mix, matrix, encode)
        theirs, their_bytes, their_seconds = quantise_all(directory, mix, matrix, ggml)
        size = sum(data.size for data in our_bytes.values()) / 1e6
        same = all(np.array_equal(data, their_bytes[name]) for name, data in our_bytes.items())
        first = evaluator.score(kept | ours)
        second = first if same else evaluator.score(kept | theirs)
        rows = [("lexmill", first, f"{our_seconds:.1f}"), ("llama.cpp", second, f"{their_seconds:.1f}")]
        if same:
            rows = [("both, the same bytes", first, f"{our_seconds:.1f}, {their_seconds:.1f}")]
        for label, score, seconds in rows:
            print(
                f"| {mix} | {size:.1f} | {label} | {score.perplexity:.4f} | {score.divergence:.5f} "
                f"| {score.worst:.3f} | {seconds} |",
                flush=True,
            )
        if mix in arguments.llama_cpp:
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                path = export_gguf(directory, Path(folder) / "m.gguf", mix, importance=matrix)
                seconds = time.perf_counter() - begun
                found = in_llama_cpp(path, evaluator.chunks)
                print(
                    f"{mix} by lexmill, run by llama.cpp: perplexity {found:.4f}; the file "
                    f"({path.stat().st_size / 1e6:.1f} MB) was written in {seconds:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()
