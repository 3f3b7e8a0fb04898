"""One side of `bench/inference.py` in a process of its own: it holds a model, waits, and times what it is asked for.

Requests and answers are lines of JSON on stdin and stdout. Waiting is a blocking read, so that a side that is not
asked takes no processor's time. What a task is, is the same on every side: `read` a prompt up to the logits of its
last token; `write` one token a step behind nothing; `together` the same in 8 texts of 32 tokens; `embed` texts of
mixed lengths. Tokens are random: no computation depends on them, but caches of prompts would (OpenVINO keeps one).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCES, BEHIND = 8, 32
ROOM = 2048
CLOCK: list[Callable[[], float]] = [time.perf_counter]  # what a request is timed with


class Native:
    """lexmill's engine."""

    def __init__(self, model: str, threads: int, instruction_set: str = "") -> None:
        from lexmill.inference.native.engine import NativeEngine
        from lexmill.inference.native.library import instruction_set as found
        from lexmill.inference.native.speed import Runs, open_source

        held = {"instruction_set": instruction_set} if instruction_set else {}
        self.engine = NativeEngine.open(open_source(Path(model)), threads=threads, context=ROOM, **held)
        self.version = (
            f"lexmill {version('lexmill')} ({found(instruction_set) if instruction_set else found()})"
        )
        self.alone = Runs(self.engine)
        self.all = Runs(self.engine, sequences=SEQUENCES)

    def read(self, count: int) -> None:
        self.alone.read(count)

    def write(self, count: int) -> None:
        self.alone.write(count)

    def before_together(self, count: int) -> None:
        self.all.read(BEHIND)

    def together(self, count: int) -> None:
        self.all.write(count, behind=BEHIND)

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        return np.stack([rows.mean(0) for rows in self.engine.hidden(texts)])


class _Params(ctypes.Structure):
    """Any of llama.cpp's parameter structs, passed by value: room for all, only the first fields are touched."""

    _fields_ = [("words", ctypes.c_int32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *(
            (name, ctypes.POINTER(kind))
            for name, kind in (
                ("token", ctypes.c_int32),
                ("embd", ctypes.c_float),
                ("pos", ctypes.c_int32),
                ("n_seq_id", ctypes.c_int32),
                ("seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("logits", ctypes.c_int8),
            )
        ),
    ]


# Where llama_context_params has its fields, in words, and what its defaults must be for that to be true.
_PLACES = {"n_ctx": 0, "n_batch": 1, "n_ubatch": 2, "n_seq_max": 3, "pooling": 11, "flash": 13}
_DEFAULTS = {0: 512, 1: 2048, 2: 512, 3: 1, 10: -1, 11: -1, 12: -1, 13: -1}


class LlamaCpp:
    """llama.cpp's library, from the folder where a native build put it. `flash`: 1 on, 0 off, -1 its own choice."""

    def __init__(self, model: str, threads: int, library: str, flash: int = 1, pooled: bool = False) -> None:
        for name in ("ggml-base", "ggml-cpu", "ggml"):  # from the same folder, whatever the linker would find
            ctypes.CDLL(str(Path(library) / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
        self.lib = lib = ctypes.CDLL(str(Path(library) / "libllama.so"))
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        for name, result, arguments in (
            ("llama_model_default_params", _Params, []),
            ("llama_context_default_params", _Params, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]),
            ("llama_init_from_model", pointer, [pointer, _Params]),
            ("llama_set_n_threads", None, [pointer, number, number]),
            ("llama_set_embeddings", None, [pointer, ctypes.c_bool]),
            ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", number, [pointer]),
            ("llama_model_n_embd", number, [pointer]),
            ("llama_batch_init", _Batch, [number] * 3),
            ("llama_decode", number, [pointer, _Batch]),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
            ("llama_get_embeddings_seq", ctypes.POINTER(ctypes.c_float), [pointer, number]),
            ("llama_get_memory", pointer, [pointer]),
            ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
            ("llama_log_set", None, [pointer, pointer]),
        ):
            call = getattr(lib, name)
            call.restype, call.argtypes = result, arguments
        self.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
        lib.llama_log_set(ctypes.cast(self.silent, pointer), None)
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        if any(params.words[place] != value for place, value in _DEFAULTS.items()):
            raise SystemExit("This libllama lays its parameters out otherwise; adapt _PLACES.")
        size = ROOM if pooled else 512  # an encoder's texts must lie in one physical batch
        values = {"n_ctx": ROOM, "n_batch": ROOM, "n_ubatch": size, "n_seq_max": SEQUENCES, "flash": flash}
        if pooled:
            values |= {"pooling": 1, "n_seq_max": 64, "n_ctx": 64 * 512}
        contexts = []
        for sequences in (1, SEQUENCES) if not pooled else (values["n_seq_max"],):
            for name, value in (values | {"n_seq_max": sequences}).items():
                params.words[_PLACES[name]] = value
            contexts.append(lib.llama_init_from_model(self.model, params))
            lib.llama_set_n_threads(contexts[-1], threads, threads)
            lib.llama_set_embeddings(contexts[-1], pooled)
        self.alone, self.all = contexts[0], contexts[-1]
        self.batch = lib.llama_batch_init(ROOM, 0, 1)
        self.words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.width = lib.llama_model_n_embd(self.model)
        self.random = np.random.default_rng(0)
        self.version = f"llama.cpp at {library}, flash attention {flash}"

    def decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows: token, place, sequence, whether its logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        failed = self.lib.llama_decode(context, batch)
        if failed:
            raise RuntimeError(f"llama_decode says {failed}")

    def _clear(self, context: Any) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), False)

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self.random.integers(0, self.words, count)]

    def before_read(self, count: int) -> None:
        self._clear(self.alone)

    def read(self, count: int) -> None:
        ids = self._tokens(count)
        self.decode(self.alone, [(token, i, 0, i == count - 1) for i, token in enumerate(ids)])
        self.lib.llama_get_logits_ith(self.alone, count - 1)

    before_write = before_read

    def write(self, count: int) -> None:
        for step, token in enumerate(self._tokens(count)):
            self.decode(self.alone, [(token, step, 0, True)])
            self.lib.llama_get_logits_ith(self.alone, 0)

    def before_together(self, count: int) -> None:
        self._clear(self.all)
        rows = [
            (t, i, s, i == BEHIND - 1) for s in range(SEQUENCES) for i, t in enumerate(self._tokens(BEHIND))
        ]
        self.decode(self.all, rows)

    def together(self, count: int) -> None:
        for step in range(count):
            ids = self._tokens(SEQUENCES)
            self.decode(self.all, [(token, BEHIND + step, s, True) for s, token in enumerate(ids)])
            self.lib.llama_get_logits_ith(self.all, 0)

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        found: list[np.ndarray] = []
        waiting: list[list[int]] = []
        for text in [*texts, []]:
            if waiting and (not text or sum(map(len, waiting)) + len(text) > ROOM or len(waiting) == 64):
                self._clear(self.all)
                self.decode(
                    self.all, [(t, i, s, True) for s, row in enumerate(waiting) for i, t in enumerate(row)]
                )
                for sequence in range(len(waiting)):
                    vector = self.lib.llama_get_embeddings_seq(self.all, sequence)
                    found.append(np.ctypeslib.as_array(vector, (self.width,)).copy())
                waiting = []
            waiting.append(text)
        return np.stack(found)


class IkLlama:
    """The ik-llama-cpp-python wheel; flash attention forced on and weights repacked, which was its best."""

    def __init__(self, model: str, threads: int) -> None:
        self.api = importlib.import_module("ik_llama_cpp._ctypes_api")
        inner = importlib.import_module("ik_llama_cpp._internals")
        self.single, self.several = inner.make_batch_single, inner.make_batch_range
        params = self.api.llama_model_default_params()
        params.repack_tensors = True
        self.model = self.api.llama_model_load_from_file(model.encode(), params)
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = ROOM, ROOM, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn = True
        self.context = self.api.llama_init_from_model(self.model, settings)
        self.random = np.random.default_rng(0)
        self.version = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"

    def before_read(self, count: int) -> None:
        self.api.llama_kv_cache_clear(self.context)

    def read(self, count: int) -> None:
        ids = [int(token) for token in self.random.integers(5, 30000, count)]
        if self.api.llama_decode(self.context, self.several(ids, pos_start=0)):
            raise RuntimeError("llama_decode failed")
        self.api.llama_get_logits_ith(self.context, -1)

    before_write = before_read

    def write(self, count: int) -> None:
        for step in range(count):
            if self.api.llama_decode(self.context, self.single(int(self.random.integers(5, 30000)), step)):
                raise RuntimeError("llama_decode failed")
            self.api.llama_get_logits_ith(self.context, -1)


def _difference(run: Callable[[int], Any], count: int) -> float:
    """Seconds of `count` steps behind the first: of a run that writes one token, and one that writes them too."""
    start = CLOCK[0]()
    run(1)
    first = CLOCK[0]()
    run(count + 1)
    return CLOCK[0]() - first - (first - start)


class OpenVino:
    """OpenVINO GenAI on the GGUF file itself. A prompt is the time to its first token."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino as ov
        import openvino_genai as genai

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.genai, self.ov = genai, ov
        self.pipeline = genai.LLMPipeline(model, "CPU", **options)
        self.random = np.random.default_rng(0)
        self.version = f"openvino-genai {version('openvino-genai')}"

    def _run(self, count: int, new: int) -> None:
        ids = self.random.integers(5, 30000, (1, count)).astype(np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        self.pipeline.generate(inputs, config)

    def read(self, count: int) -> None:
        self._run(count, 1)

    def write(self, count: int) -> float:
        """Seconds of the steps behind the first, by the difference of two runs."""
        return _difference(lambda new: self._run(4, new), count)


class CTranslate2:
    """CTranslate2, on a directory that its converter made."""

    def __init__(self, model: str, threads: int, kind: str = "int8_float32") -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            model, device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
        )
        self.vocabulary = json.loads((Path(model) / "vocabulary.json").read_text())
        self.random = np.random.default_rng(0)
        self.version = f"ctranslate2 {version('ctranslate2')}, {kind}"

    def _tokens(self, count: int) -> list[str]:
        return [self.vocabulary[int(token)] for token in self.random.integers(5, 30000, count)]

    def _run(self, count: int, new: int, texts: int = 1) -> None:
        self.generator.generate_batch(
            [self._tokens(count) for _ in range(texts)],
            max_length=new, min_length=new, include_prompt_in_result=False, sampling_topk=1,
        )  # fmt: skip

    def read(self, count: int) -> None:
        self._run(count, 1)

    def write(self, count: int) -> float:
        """Seconds of the steps behind the first, by the difference of two runs."""
        return _difference(lambda new: self._run(4, new), count)

    def together(self, count: int) -> float:
        return _difference(lambda new: self._run(BEHIND, new, SEQUENCES), count)


class OnnxGenai:
    """onnxruntime-genai, on a directory that its model builder made."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai as genai

        self.genai = genai
        config = genai.Config(model)
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
        )
        self.model = genai.Model(config)
        self.random = np.random.default_rng(0)
        self.version = f"onnxruntime-genai {version('onnxruntime-genai')}"

    def _begin(self, tokens: int, texts: int, length: int) -> Any:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=length, min_length=length, batch_size=texts, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(self.random.integers(5, 30000, (texts, tokens)).astype(np.int32))
        return generator

    def read(self, count: int) -> None:
        self._begin(count, 1, count + 1).generate_next_token()

    def before_write(self, count: int, texts: int = 1, behind: int = 1) -> None:
        self.generator = self._begin(behind, texts, behind + count + 2)
        self.generator.generate_next_token()

    def write(self, count: int) -> None:
        for _ in range(count):
            self.generator.generate_next_token()

    def before_together(self, count: int) -> None:
        self.before_write(count, SEQUENCES, BEHIND)

    together = write


class Transformers:
    """transformers on torch, `kind` "bfloat16" or "float32"; embeddings as sentence-transformers computes them."""

    def __init__(self, model: str, threads: int, kind: str = "bfloat16", pooled: bool = False) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        opened = transformers.AutoModel if pooled else transformers.AutoModelForCausalLM
        self.torch = torch
        self.model = opened.from_pretrained(model, dtype=getattr(torch, kind)).eval()
        self.version = f"transformers {version('transformers')}, torch {version('torch')}, {kind}"
        self.cache: Any = None

    def _step(self, texts: int, count: int, cache: Any) -> Any:
        with self.torch.inference_mode():
            ids = self.torch.randint(0, self.model.config.vocab_size, (texts, count))
            return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def read(self, count: int) -> None:
        self._step(1, count, None)

    def write(self, count: int) -> None:
        cache = None
        for _ in range(count):
            cache = self._step(1, 1, cache)

    def before_together(self, count: int) -> None:
        self.cache = self._step(SEQUENCES, BEHIND, None)

    def together(self, count: int) -> None:
        for _ in range(count):
            self.cache = self._step(SEQUENCES, 1, self.cache)

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        torch, found = self.torch, [np.empty(0)] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.inference_mode():
            for start in range(0, len(order), 32):
                part = order[start : start + 32]
                longest = max(len(texts[i]) for i in part)
                ids = torch.tensor([texts[i] + [0] * (longest - len(texts[i])) for i in part])
                mask = torch.tensor([[1] * len(texts[i]) + [0] * (longest - len(texts[i])) for i in part])
                states = self.model(ids, attention_mask=mask).last_hidden_state
                means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
                for i, row in zip(part, means.float().numpy()):
                    found[i] = row
        return np.stack(found)


SIDES = {
    "native": Native,
    "llama_cpp": LlamaCpp,
    "ik_llama": IkLlama,
    "openvino": OpenVino,
    "ctranslate2": CTranslate2,
    "onnxruntime_genai": OnnxGenai,
    "transformers": Transformers,
}


def main() -> None:
    """Arguments: the side's name, and its settings as JSON."""
    answers = os.fdopen(os.dup(1), "w")  # libraries print what they like on the other one
    os.dup2(2, 1)
    side = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"version": side.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        task, what = request["task"], request["what"]
        if hasattr(side, f"before_{task}"):
            getattr(side, f"before_{task}")(what)
        CLOCK[0] = time.process_time if request["cpu_time"] else time.perf_counter
        start = CLOCK[0]()
        found = getattr(side, task)(what)
        seconds = CLOCK[0]() - start
        if isinstance(found, float):  # the side knows better
            seconds = found
        vector = found[0].tolist() if isinstance(found, np.ndarray) else None
        print(json.dumps({"seconds": seconds, "vector": vector}), file=answers, flush=True)


if __name__ == "__main__":
    main()
