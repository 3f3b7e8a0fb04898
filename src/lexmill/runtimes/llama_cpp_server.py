"""llama.cpp's server in a child process, and the few questions we ask it; `llama_cpp_start.py` starts it.

In a child, because a file that llama.cpp dislikes may abort its whole process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import LexmillError
from lexmill.files import require_file
from lexmill.formats.gguf import GGUFFile
from lexmill.runtimes.llama_cpp_start import find_server, start
from lexmill.tokenizer.gguf_vocabulary import END_TEXTS, MIDDLE_TEXTS, fills_in_the_middle


class RuntimeFailure(LexmillError):
    """A runtime broke down: it could not load the model, crashed, or did not answer in time."""


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, on the CPU, set for exact comparison. A context manager.

    Flash attention is off and the key-value cache is float32: with llama.cpp's faster defaults the
    log-probabilities of an f32 file already move by about 1e-2.

    Args:
        path: the GGUF file.
        adapter: a GGUF file of an adapter, to be put on the model.
        threads: of llama.cpp.
        context: tokens; 0 for what the model was made for.
        embeddings: for models that embed texts and write none.
        time_limit: seconds for loading, and for each answer.
        server: a `llama-server` to run. None: the xllamacpp wheel, or where it is not installed a
            `llama-server` on the path.

    Raises:
        MissingPackageError: there is neither.
        FileError: there is no such file, or no such server.
        RuntimeFailure: on entering, the model does not load; later, the server dies or hangs.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        adapter: Path | str | None = None,
        threads: int = 2,
        context: int = 0,
        embeddings: bool = False,
        time_limit: float = 60,
        server: Path | str | None = None,
    ) -> None:
        self._server = find_server(server)
        self.path = require_file(path, "GGUF file").resolve()
        self._adapter = str(require_file(adapter, "GGUF file").resolve()) if adapter is not None else ""
        self.threads, self.context, self.time_limit = threads, context, time_limit
        self._embeddings = embeddings
        self._process: subprocess.Popen[bytes] | None = None
        self._failing = False

    def __enter__(self) -> LlamaCpp:
        settings: dict[str, Any] = {"path": str(self.path), "threads": self.threads, "context": self.context}
        settings |= {"embeddings": self._embeddings, "adapter": self._adapter}
        self._noise = tempfile.TemporaryFile()  # closed in _stop
        self._process = start(settings, self._server, self._noise)
        lines: queue.Queue[bytes] = queue.Queue()
        stdout = self._process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        try:
            self._address = lines.get(timeout=self.time_limit).decode().strip()
        except queue.Empty:
            raise self._failure(f"llama.cpp did not load it within {self.time_limit:g} seconds") from None
        except BaseException:
            self._stop()
            raise
        if not self._address:
            raise self._failure("llama.cpp does not load this file")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> tuple[int | None, str]:
        """End the child; gives the code with which it had ended by itself, and what it printed."""
        process, self._process = self._process, None
        if process is None:
            return None, ""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.5 if self._failing else 0)  # a crash shows a moment after the pipe breaks
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10 if self._server else 0)  # it ends its own server when its stdin closes
        process.kill()  # it holds nothing that needs an orderly end
        process.wait()
        with self._noise:
            self._noise.seek(0)
            return code, self._noise.read().decode("utf-8", "replace")

    def _failure(self, what: str) -> RuntimeFailure:
        self._failing = True
        code, noise = self._stop()
        ended = f" (its process ended with code {code})" if code is not None else ""
        telling = [line for line in noise.splitlines() if "error" in line.lower() or "assert" in line.lower()]
        said = f" It said: {telling[0].strip()[:300]}" if telling else ""
        return RuntimeFailure(f"{self.path}: {what}{ended}.{said}", "Export the model again.")

    def _ask(self, endpoint: str, question: dict[str, Any] | None = None) -> Any:
        if self._process is None:
            raise RuntimeFailure(f"{self.path}: llama.cpp is not running.", "Use LlamaCpp in a 'with' block.")
        body = None if question is None else json.dumps(question).encode("utf-8")
        request = urllib.request.Request(
            f"{self._address}/{endpoint}", body, {"Content-Type": "application/json"}
        )
        # no proxy: the address is on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.time_limit) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            detail = error.read()[:300].decode("utf-8", "replace")
            raise RuntimeFailure(f"{self.path}: llama.cpp refuses /{endpoint}: {detail}") from error
        except (OSError, ValueError) as error:
            raise self._failure(f"llama.cpp gave no answer to /{endpoint} ({error})") from error

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, special tokens recognised; a BOS only where the file says so."""
        return self._ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def tokenize_plain(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are not recognised, and nothing around them."""
        return self._ask("tokenize", {"content": text, "add_special": False, "parse_special": False})[
            "tokens"
        ]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens print as themselves."""
        return self._ask("detokenize", {"tokens": list(ids)})["content"]

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that llama.cpp's own template engine makes of a conversation."""
        return self._ask("apply-template", {"messages": list(messages)})["prompt"]

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy continuation of `ids`, without the token that ended it."""
        answer = self._complete(ids, max_tokens)
        # the token that ended it is in the list
        return answer["tokens"][:-1] if answer["stop_type"] == "eos" else answer["tokens"]

    def ends_at(self, token: int, before: Sequence[int]) -> bool:
        """Whether generation ends when it comes to `token`: tried, by forcing it after the ids `before`."""
        return self._complete(before, 2, logit_bias=[[token, 1e6]])["stop_type"] == "eos"

    def declared_ids(self) -> list[int]:
        """The ids to which the file gives a meaning of their own: BOS, EOS, end of turn, padding and so on."""
        with GGUFFile.open(self.path) as file:
            values = {key: value for key, value in file.metadata.items() if key.endswith("_token_id")}
        return [value for key, value in values.items() if key.startswith("tokenizer.ggml.")]

    def fixed_ends(self, texts: Collection[str]) -> frozenset[str]:
        """The texts of tokens that end generation whatever a file says, in a vocabulary of `texts`."""
        middle = [text for known in MIDDLE_TEXTS.values() for text in known]
        return END_TEXTS.union(middle if fills_in_the_middle(texts) else ())

    def logprobs(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
        """The log-probabilities of every next token after each prompt.

        Args:
            prompts: lists of ids, none of them empty.
            vocabulary: how many tokens the model has.

        Returns:
            (prompts, vocabulary) float64, straight from the logits: no sampler touches them.
        """
        rows = np.full((len(prompts), vocabulary), -np.inf)
        for row, prompt in zip(rows, prompts, strict=True):
            # llama.cpp gives no probabilities with a token that is half a character: force a whole one.
            # The bias reaches the sampler only.
            answer = self._complete(prompt, 1, n_probs=vocabulary, logit_bias=[[self._plain_token, 1e6]])
            for item in answer["completion_probabilities"][0]["top_logprobs"]:
                row[item["id"]] = item["logprob"]
        return rows

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """The vector of a text, pooled as the file says and not normalised: (width,)."""
        answer = self._ask("embedding", {"content": list(ids), "embd_normalize": -1})
        return np.array(answer[0]["embedding"][0], np.float64)

    @functools.cached_property
    def _plain_token(self) -> int:
        return self.tokenize("a")[-1]

    def _complete(self, ids: Sequence[int], max_tokens: int, **more: Any) -> Any:
        return self._ask(
            "completion",
            {
                "prompt": list(ids),
                "n_predict": max_tokens,
                "temperature": 0,
                "repeat_penalty": 1,
                "cache_prompt": False,
                "return_tokens": True,
                **more,
            },
        )
