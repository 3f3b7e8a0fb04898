"""Two ways to llama.cpp's server: the xllamacpp wheel, or a `llama-server` of the user's own.

Both run in a child process of this Python, told what to load as JSON. It prints the server's address once the
model is loaded, and ends when its stdin closes, so that no server outlives us even when we are killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lexmill.errors import FileError, MissingPackageError

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {module} import {way}; {way}()"
# Flash attention is off and keys and values are float32 wherever answers are compared; weights stay in the
# layout of the file. A llama-server that does not know one of these is older or newer than we know.
_ALWAYS = ("--flash-attn off", "--cache-type-k f32", "--cache-type-v f32", "--parallel 1")
_WHERE_KNOWN = ("--no-warmup", "--no-repack", "--fit off", "--no-ui", "--offline", "--gpu-layers 0")


def find_server(given: Path | str | None) -> Path | None:
    """The `llama-server` to run: the one that is given; where the wheel is missing, one on the path; else None.

    Raises:
        FileError: what is given is no program.
        MissingPackageError: there is neither.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise FileError(f"{given} is no program that can be run.", "Give the path of a llama-server.")
        return Path(found).resolve()
    if importlib.util.find_spec("xllamacpp") is not None:
        return None
    found = shutil.which("llama-server")
    if found is None:
        error = MissingPackageError("xllamacpp", "to run GGUF files in llama.cpp", "runtimes")
        error.hint = f"{error.hint}, or put llama.cpp's llama-server on the path."
        raise error
    return Path(found).resolve()


def version_of(server: Path) -> str:
    """What a `llama-server` says of its version."""
    done = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    return lines[0].removeprefix("version:").strip() if lines else "unknown"


def start(settings: dict[str, Any], server: Path | None, noise: Any) -> subprocess.Popen[bytes]:
    """Start the child process.

    Args:
        settings: path, threads, context, embeddings and adapter, as of `LlamaCpp`.
        server: from `find_server`.
        noise: a file for all that is printed.
    """
    code = _CODE.format(module=__name__, way="serve_by_wheel" if server is None else "serve_by_program")
    settings = settings | {"server": str(server or "")}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code, json.dumps(sys.path), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
    )


def _batch(settings: dict[str, Any]) -> int:
    """What embeds a text reads it at once."""
    return max(512, settings["context"]) if settings["embeddings"] else 512


def serve_by_wheel() -> None:
    """The body of the child process, by the wheel."""
    import xllamacpp

    settings = json.loads(sys.argv[1])
    answer = os.dup(1)
    os.dup2(2, 1)  # what llama.cpp prints goes with its errors
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = settings["context"], 1, 0
    params.n_batch = params.n_ubatch = _batch(settings)
    params.embedding = settings["embeddings"]
    if settings["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["adapter"], 1.0)]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup = params.fit_params = params.ui = False
    params.no_extra_bufts = True  # weights stay in the layout of the file, on every CPU
    params.n_threads_http = 1
    server = xllamacpp.Server(params)
    os.write(answer, (server.listening_address + "\n").encode())
    sys.stdin.buffer.read()
    os._exit(0)


def serve_by_program() -> None:
    """The body of the child process, by a `llama-server`: starts it, waits until it has loaded, ends it."""
    settings = json.loads(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # options could also come by the environment
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}
    server = subprocess.Popen(
        [settings["server"], *_options(settings, port)],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env=environment,
    )

    def end_with_us() -> None:
        sys.stdin.buffer.read()
        server.kill()

    threading.Thread(target=end_with_us, daemon=True).start()
    address = f"http://127.0.0.1:{port}"
    while server.poll() is None and not _answers(address):
        time.sleep(0.02)
    if server.poll() is None:
        os.write(1, f"{address}\n".encode())
    os._exit(abs(server.wait()))


def _options(settings: dict[str, Any], port: int) -> list[str]:
    known = subprocess.run([settings["server"], "--help"], capture_output=True, text=True, check=False).stdout
    wanted = [*_ALWAYS, *(option for option in _WHERE_KNOWN if option.split()[0] in known)]
    batch, threads = str(_batch(settings)), str(settings["threads"])
    return [
        *("--model", settings["path"], "--host", "127.0.0.1", "--port", str(port)),
        *("--ctx-size", str(settings["context"]), "--batch-size", batch, "--ubatch-size", batch),
        *("--threads", threads, "--threads-batch", threads, "--threads-http", "1"),
        *(part for option in wanted for part in option.split()),
        *(["--embeddings"] if settings["embeddings"] else []),
        *(["--lora", settings["adapter"]] if settings["adapter"] else []),
    ]


def _answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (
        contextlib.suppress(OSError, urllib.error.URLError),
        opener.open(f"{address}/health", timeout=5) as reply,
    ):
        return bool(reply.status == 200)
    return False
