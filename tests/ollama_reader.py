"""An Ollama store read by the rules of Ollama's own sources, with nothing of lexmill's."""

import hashlib
import json
import re
from pathlib import Path

from gguf import GGUFReader

PREFIX = "application/vnd.ollama.image."


def open_model(root, name):
    """Name to manifest to blobs, every digest recomputed; gives texts, the GGUF's path and the config."""
    rest, _, tag = name.partition(":")
    *before, model = rest.split("/")
    host, namespace = ["registry.ollama.ai", "library"][: 2 - len(before)] + before
    path = Path(root, "manifests", host, namespace, model, tag or "latest")
    raw = path.read_bytes()
    assert raw.endswith(b"}\n") and raw.count(b"\n") == 1
    manifest = json.loads(raw)
    assert list(manifest) == ["schemaVersion", "mediaType", "config", "layers"]
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == "application/vnd.docker.container.image.v1+json"
    config = json.loads(blob(root, manifest["config"]).read_bytes())
    found = {"config": config, "kinds": [], "license": []}
    for layer in manifest["layers"]:
        assert layer["mediaType"].startswith(PREFIX)
        kind = layer["mediaType"][len(PREFIX) :]
        file = blob(root, layer)
        found["kinds"].append(kind)
        if kind == "model":
            found["model"] = file
            fields = GGUFReader(file).fields
            architecture = fields["general.architecture"].contents()
            assert config["model_family"] == architecture and config["model_families"] == [architecture]
            found["embeds"] = f"{architecture}.pooling_type" in fields
        elif kind == "license":
            found["license"].append(file.read_text("utf-8"))
        elif kind == "params":
            found["params"] = json.loads(file.read_bytes())
        else:
            found[kind] = file.read_text("utf-8")
    assert config["model_format"] == "gguf" and config["os"] == "linux" and config["architecture"] == "amd64"
    return found


def blob(root, layer):
    assert re.fullmatch("sha256:[0-9a-f]{64}", layer["digest"])
    path = Path(root, "blobs", layer["digest"].replace(":", "-"))
    data = path.read_bytes()
    assert len(data) == layer["size"] and "sha256:" + hashlib.sha256(data).hexdigest() == layer["digest"]
    return path


def everything(root):
    """Every file of a store but the lock, as relative paths."""
    root = Path(root)
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lexmill.lock"
    }
