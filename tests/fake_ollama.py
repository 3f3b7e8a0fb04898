"""A small server with Ollama's HTTP API: real stores on disk, real llama.cpp behind the answers, no code of lexmill's
but the child process that runs llama.cpp. For tests; Ollama itself is not to be had as a package.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gguf import GGUFReader
from go_templates import render_as_ollama
from ollama_reader import PREFIX, open_model

from lexmill.runtimes.llama_cpp import LlamaCpp


class FakeOllama:
    """Serves the store at `root`. Attributes: address, uploads (digests that came as bodies), version."""

    def __init__(self, root, shows_prompts=True):
        self.root, self.shows_prompts, self.uploads = Path(root), shows_prompts, []
        self.running, self.stack, self.lock = {}, contextlib.ExitStack(), threading.Lock()

    def __enter__(self):
        owner = self

        class Handler(_Handler):
            ollama = owner

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.stack.close()

    def llama(self, model):
        """llama.cpp running a model's blob."""
        path = model["model"]
        if path not in self.running:
            self.running[path] = self.stack.enter_context(
                LlamaCpp(path, embeddings=model["embeds"], context=0)
            )
        return self.running[path]

    def prompt(self, model, messages):
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        if messages[0]["role"] != "system" and model.get("system"):
            messages = [{"role": "system", "content": model["system"]}, *messages]
        if "template" in model:
            return render_as_ollama(model["template"], messages)
        return self.llama(model).apply_template(messages)

    def complete(self, model, prompt, options):
        asked = {"prompt": prompt, "cache_prompt": True, "n_predict": options.get("num_predict", -1)}
        asked |= {key: options[key] for key in ("temperature", "repeat_penalty", "seed") if key in options}
        asked["stop"] = options.get("stop", model.get("params", {}).get("stop", []))
        told = self.llama(model)._ask("completion", asked)
        counted = told["timings"]["prompt_n"] + told["timings"]["cache_n"]
        reason = "length" if told["stop_type"] == "limit" else "stop"
        return told["content"], {"prompt_eval_count": counted, "done": True, "done_reason": reason}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def tell(self, status, value=None):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self):
        digest = self.path.rpartition("/")[2]
        there = (self.ollama.root / "blobs" / digest.replace(":", "-")).is_file()
        self.tell(200 if there else 404)

    def do_GET(self):
        self.tell(200, {"version": "0.0.0-test"})

    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if "Content-Length" in self.headers
            else self.chunks()
        )
        if self.path.startswith("/api/blobs/"):
            return self.blob(self.path.rpartition("/")[2], body)
        asked = json.loads(body)
        if self.path == "/api/create":
            return self.create(asked)
        try:
            model = open_model(self.ollama.root, asked["model"])
        except FileNotFoundError:
            return self.tell(404, {"error": f"model '{asked['model']}' not found"})
        with self.ollama.lock:
            return self.tell(200, getattr(self, self.path.rpartition("/")[2])(model, asked))

    def chunks(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def blob(self, digest, body):
        if not re.fullmatch("sha256:[0-9a-f]{64}", digest) or hashlib.sha256(body).hexdigest() != digest[7:]:
            return self.tell(400, {"error": "digest mismatch"})
        self.ollama.uploads.append(digest)
        self.put(body)
        return self.tell(201)

    def put(self, body):
        digest = hashlib.sha256(body).hexdigest()
        path = self.ollama.root / "blobs" / f"sha256-{digest}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        return {"digest": f"sha256:{digest}", "size": len(body)}

    def create(self, asked):
        if asked.get("stream") is False:
            return self.tell(200, self.make(asked, lambda **_: None))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def say(**values):
            self.wfile.write(json.dumps(values).encode() + b"\n")

        return self.make(asked, say)

    def make(self, asked, say):
        say(status="parsing GGUF")
        digest = next(iter(asked["files"].values()))
        path = self.ollama.root / "blobs" / digest.replace(":", "-")
        if not path.is_file():
            return say(error="no such blob")
        fields = GGUFReader(path).fields
        family = fields["general.architecture"].contents()
        layers = [{"mediaType": PREFIX + "model", "digest": digest, "size": path.stat().st_size}]
        texts = [("template", asked.get("template")), ("system", asked.get("system"))]
        texts += [("license", text) for text in asked.get("license", ())]
        layers += [{"mediaType": PREFIX + kind, **self.put(text.encode())} for kind, text in texts if text]
        if asked.get("parameters"):
            layers.append(
                {"mediaType": PREFIX + "params", **self.put(json.dumps(asked["parameters"]).encode())}
            )
        config = {"model_format": "gguf", "model_family": family, "model_families": [family]}
        config = self.put(json.dumps({**config, "os": "linux", "architecture": "amd64"}).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **config},
            "layers": layers,
        }
        name, _, tag = asked["model"].partition(":")
        path = self.ollama.root / "manifests/registry.ollama.ai/library" / name / (tag or "latest")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest) + "\n")
        say(status="writing manifest")
        say(status="success")
        return {"status": "success"}

    def show(self, model, asked):
        fields = GGUFReader(model["model"]).fields
        info = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
        template = model.get("template", "")
        return {"system": model.get("system", ""), "template": template, "model_info": info, "details": {}}

    def generate(self, model, asked):
        prompt = asked["prompt"]
        if not asked.get("raw"):
            prompt = self.ollama.prompt(model, [{"role": "user", "content": prompt}])
        text, told = self.ollama.complete(model, prompt, asked.get("options") or {})
        return {"model": asked["model"], "response": text, **told}

    def chat(self, model, asked):
        prompt = self.ollama.prompt(model, asked["messages"])
        if asked.get("_debug_render_only") and self.ollama.shows_prompts:
            return {"model": asked["model"], "_debug_info": {"rendered_template": prompt}}
        text, told = self.ollama.complete(model, prompt, asked.get("options") or {})
        return {"model": asked["model"], "message": {"role": "assistant", "content": text}, **told}

    def embed(self, model, asked):
        inputs = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
        told = [self.ollama.llama(model)._ask("v1/embeddings", {"input": text}) for text in inputs]
        count = sum(answer["usage"]["prompt_tokens"] for answer in told)
        return {"embeddings": [answer["data"][0]["embedding"] for answer in told], "prompt_eval_count": count}
