"""A running Ollama, asked over its HTTP API: files sent, models made, and the questions that `verify` has."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lexmill.errors import ConfigError
from lexmill.files import explain_os_errors
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.llama_cpp_server import RuntimeFailure
from lexmill.runtimes.ollama_names import ModelName

DEFAULT_PORT = 11434
_MAX_LINE = 64 << 20  # of an answer; vectors of a batch are the longest
_START = "Start it with 'ollama serve', or give its address."


def server_address(text: str = "") -> str:
    """The address of a server as a URL.

    Args:
        text: a URL, `host`, `host:port` or `:port`; empty for OLLAMA_HOST, or else this machine's own.

    Raises:
        ConfigError: it is no address.
    """
    text = text or os.environ.get("OLLAMA_HOST", "").strip()
    scheme, found, rest = text.partition("://")
    scheme, rest = (scheme, rest) if found else ("http", text)
    try:
        parts = urllib.parse.urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "127.0.0.1", parts.port
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no address of a server: {error}.", "Give it as http://host:port."
        ) from error
    if scheme not in ("http", "https") or parts.username or parts.query:
        raise ConfigError(f"{text!r} is no address of a server.", "Give it as http://host:port.")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(
            host
        ).is_unspecified:  # 0.0.0.0: what a server listens to, nothing to connect to
            host = "127.0.0.1"
    if port is None:
        port = DEFAULT_PORT if not found else {"http": 80, "https": 443}[scheme]
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"


def ollama_place(text: str) -> tuple[str, str]:
    """Read what `--ollama` is given: a model's name, or a server's address and a name: `http://host:11434/name`.

    Returns:
        The address, "" for Ollama's own default, and the name.

    Raises:
        ConfigError: an address without a name.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        return "", text
    address, _, name = rest.partition("/")
    if not name.strip("/"):
        raise ConfigError(
            f"{text!r} names a server, but no model.", f"Add the model's name: {scheme}://{address}/my-model"
        )
    return f"{scheme}://{address}", name.strip("/")


class OllamaServer:
    """A server at an address.

    Args:
        address: as for `server_address`.
        time_limit: seconds to wait for each piece of an answer.

    Each method raises RuntimeFailure when the server is not there, refuses, or breaks off.
    """

    def __init__(self, address: str = "", time_limit: float = 300) -> None:
        self.address, self.time_limit = server_address(address), time_limit
        host = urllib.parse.urlsplit(self.address).hostname or ""
        local = host == "localhost"
        with contextlib.suppress(ValueError):
            local = local or ipaddress.ip_address(host).is_loopback
        # a proxy is for other machines
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def version(self) -> str:
        """The server's version."""
        return str(self._ask("api/version").get("version", ""))

    def show(self, model: str) -> dict[str, Any]:
        """What the server says of a model."""
        return self._ask("api/show", {"model": model})

    def upload(self, path: Path, progress: Progress = SILENT) -> str:
        """Send a file unless the server has it; gives its digest."""
        size = path.stat().st_size
        digest = hashlib.sha256()
        with explain_os_errors(path, "read"), open(path, "rb") as file:
            with progress.task(f"hashing {path.name}", size, "bytes") as task:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    task.advance(len(chunk))
            name = f"sha256:{digest.hexdigest()}"
            try:
                with self._open(f"api/blobs/{name}", method="HEAD"):
                    return name
            except _NotFound:
                pass
            file.seek(0)
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            with (
                progress.task(f"sending {path.name}", size, "bytes") as task,
                self._open(f"api/blobs/{name}", _Counted(file, task), headers),
            ):
                return name

    def create(self, name: ModelName, told: Mapping[str, Any], progress: Progress = SILENT) -> None:
        """Make a model of files that the server has. `told` are the other fields of `/api/create`."""
        body = json.dumps({"model": str(name), "stream": True, **told}).encode("utf-8")
        with progress.task(f"creating {name}", None, "steps") as task:
            status = ""
            for line in self._lines("api/create", body):
                status = str(line.get("status", ""))
                task.advance(1, status[:60])
        if status != "success":
            raise RuntimeFailure(
                f"{self.address}: creating '{name}' ended with {status!r}.", "Look into its log."
            )

    def prompt(self, model: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The prompt that the server makes of a conversation; None where it is too old to tell."""
        told = {"model": model, "messages": list(messages), "stream": False, "_debug_render_only": True}
        # a server that does not know the field would write a text instead: let it be a short one
        told["truncate"] = False
        found = self._ask("api/chat", {**told, "options": {"num_predict": 1}}).get("_debug_info")
        return found.get("rendered_template") if isinstance(found, dict) else None

    def generate(self, model: str, prompt: str, max_tokens: int, context: int) -> dict[str, Any]:
        """The greedy continuation of a text as it is, no template about it."""
        told = {"model": model, "prompt": prompt, "raw": True, "stream": False}
        return self._ask("api/generate", {**told, "options": _greedy(max_tokens, context)})

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], max_tokens: int, context: int
    ) -> dict[str, Any]:
        """The greedy reply in a conversation."""
        told = {"model": model, "messages": list(messages), "stream": False, "truncate": False}
        return self._ask("api/chat", {**told, "options": _greedy(max_tokens, context)})

    def embed(self, model: str, texts: Sequence[str]) -> dict[str, Any]:
        """The vectors of texts, each of length one."""
        return self._ask("api/embed", {"model": model, "input": list(texts), "truncate": False})

    def _ask(self, endpoint: str, question: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = None if question is None else json.dumps(question).encode("utf-8")
        return next(self._lines(endpoint, body), {})

    def _lines(self, endpoint: str, body: bytes | None) -> Iterator[dict[str, Any]]:
        """The JSON objects of an answer, one a line. An error may come late, after status 200."""
        with self._open(endpoint, body) as reply:
            while line := self._read(reply, endpoint):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self._failure(
                        endpoint, f"answered something that is not JSON: {line[:80]!r}"
                    ) from error
                if not isinstance(value, dict):
                    raise self._failure(endpoint, f"answered {line[:80]!r}")
                if "error" in value:
                    raise self._failure(endpoint, f"said: {str(value['error'])[:300]}")
                yield value

    def _read(self, reply: IO[bytes], endpoint: str) -> bytes:
        try:
            line = reply.readline(_MAX_LINE)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(endpoint, f"broke off ({error})") from error
        if len(line) == _MAX_LINE:
            raise self._failure(endpoint, "answered without end")
        return line

    @contextlib.contextmanager
    def _open(
        self,
        endpoint: str,
        body: bytes | _Counted | None = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> Iterator[IO[bytes]]:
        request = urllib.request.Request(
            f"{self.address}/{endpoint}",
            body,  # type: ignore[arg-type]
            dict(headers or {"Content-Type": "application/json"}),
            method=method,
        )
        try:
            reply = self._opener.open(request, timeout=self.time_limit)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(4096).decode("utf-8", "replace").strip()
            with contextlib.suppress(ValueError, AttributeError):
                said = str(json.loads(said).get("error", said))
            kind = _NotFound if error.code == 404 else RuntimeFailure
            raise kind(f"{self.address}: /{endpoint} is refused ({error.code}): {said[:300]}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RuntimeFailure(f"{self.address}: no Ollama answers there ({reason}).", _START) from error
        with reply:
            yield reply

    def _failure(self, endpoint: str, what: str) -> RuntimeFailure:
        return RuntimeFailure(f"{self.address}: /{endpoint} {what}.", "Look into the log of Ollama.")


class _NotFound(RuntimeFailure):
    pass


class _Counted:
    """A file that tells how much of it was sent."""

    def __init__(self, file: IO[bytes], task: Task) -> None:
        self._file, self._task = file, task

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._task.advance(len(data))
        return data


def _greedy(max_tokens: int, context: int) -> dict[str, Any]:
    """Options under which an answer depends on the model only."""
    return {
        "temperature": 0,
        "repeat_penalty": 1,
        "seed": 0,
        "num_predict": max_tokens,
        "num_ctx": context,
        "stop": [],
    }
