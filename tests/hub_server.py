"""A hub on this machine: the part of Hugging Face's HTTP protocol by which models are uploaded and read, over plain dicts.

Written from the requests of the `huggingface_hub` client (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`) and from the Git LFS batch specification. Files of 10 kB or of safetensors go by LFS.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


class Hub:
    """What the hub holds; `log` are the requests as (method, path)."""

    def __init__(self):
        self.repos, self.objects, self.log = {}, {}, []
        self.fail = {}  # path pattern -> status
        self.address = ""

    def files(self, repo, branch="main"):
        return self.repos[repo]["branches"][branch]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, headers=(), body=None):
        body = json.dumps({} if value is None else value).encode() if body is None else body
        self.send_response(status)
        for name, content in headers:
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append((self.command, path))
        for pattern, status in hub.fail.items():
            if re.search(pattern, path):
                return self.answer({"error": "as the test asked"}, status)
        writing = self.command != "GET" and self.command != "HEAD" and not path.startswith("/lfs/")
        if writing and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return action(self, hub, body, *found.groups())
        return self.answer({"error": f"no such place: {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


def create(self, hub, body):
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    if name in hub.repos:
        return self.answer(
            {"error": "You already created this model repo", "url": f"{hub.address}/{name}"}, 409
        )
    private = asked.get("private") is True or asked.get("visibility") == "private"
    hub.repos[name] = {"private": private, "branches": {"main": {}}, "commits": []}
    return self.answer({"url": f"{hub.address}/{name}", "name": name, "id": name})


def branch(self, hub, body, repo, name):
    branches = hub.repos[repo]["branches"]
    if name in branches:
        return self.answer({"error": "Reference already exists"}, 409)
    branches[name] = dict(branches["main"])
    return self.answer({})


def preupload(self, hub, body, repo, revision):
    if repo not in hub.repos or revision not in hub.repos[repo]["branches"]:
        return self.answer({"error": "no such revision"}, 404)
    files = json.loads(body)["files"]
    modes = [
        "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10_000 else "regular"
        for file in files
    ]
    rows = [
        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
        for file, mode in zip(files, modes)
    ]
    return self.answer({"files": rows})


def batch(self, hub, body, repo):
    rows = []
    for item in json.loads(body)["objects"]:
        row = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.objects:
            row["actions"] = {
                "upload": {"href": f"{hub.address}/lfs/{item['oid']}", "header": {}},
                "verify": {"href": f"{hub.address}/api/lfs-verify/{item['oid']}", "header": {}},
            }
        rows.append(row)
    return self.answer({"transfer": "basic", "objects": rows})


def put(self, hub, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        return self.answer({"error": "the content is not what its hash says"}, 400)
    hub.objects[oid] = body
    return self.answer({})


def verified(self, hub, body, oid):
    return self.answer({}, 200 if oid in hub.objects else 404)


def commit(self, hub, body, repo, revision):
    lines = [json.loads(line) for line in body.decode().splitlines()]
    assert lines[0]["key"] == "header"
    changed = {}
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            changed[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            changed[value["path"]] = hub.objects[value["oid"]]  # a KeyError is a client that lies
            assert len(changed[value["path"]]) == value["size"]
        else:
            return self.answer({"error": f"what is {line['key']}?"}, 400)
    hub.files(repo, revision).update(changed)
    hub.repos[repo]["commits"].append((revision, lines[0]["value"]["summary"], sorted(changed)))
    oid = hashlib.sha1(repr(sorted(changed)).encode()).hexdigest()
    url = f"{hub.address}/{repo}/commit/{oid}"
    return self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def info(self, hub, body, repo, revision="main"):
    if repo not in hub.repos or revision not in hub.repos[repo]["branches"]:
        return self.answer({"error": "not found"}, 404, [("X-Error-Code", "RepoNotFound")])
    names = sorted(hub.files(repo, revision))
    value = {"id": repo, "modelId": repo, "sha": sha(hub, repo, revision), "private": False}
    return self.answer(value | {"siblings": [{"rfilename": name} for name in names], "tags": []})


def tree(self, hub, body, repo, revision):
    return self.answer(
        [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in sorted(hub.files(repo, revision).items())
        ]
    )


def resolve(self, hub, body, repo, revision, name):
    branches = hub.repos[repo]["branches"] if repo in hub.repos else {}
    known = {sha(hub, repo, one): one for one in branches}
    data = branches.get(known.get(revision, revision), {}).get(name)
    if data is None:
        return self.answer({"error": "not found"}, 404, [("X-Error-Code", "EntryNotFound")])
    headers = [
        ("ETag", f'"{hashlib.sha256(data).hexdigest()}"'),
        ("X-Repo-Commit", sha(hub, repo, known.get(revision, revision))),
    ]
    return self.answer(headers=headers, body=data)


def sha(hub, repo, branch):
    listing = sorted(
        (name, hashlib.sha256(data).hexdigest()) for name, data in hub.files(repo, branch).items()
    )
    return hashlib.sha1(repr(listing).encode()).hexdigest()


REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", create),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", branch),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", batch),
    ("PUT", "/lfs/([0-9a-f]{64})", put),
    ("POST", "/api/lfs-verify/([0-9a-f]{64})", verified),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", commit),
    ("POST", "/api/validate-yaml", lambda self, hub, body: self.answer({"errors": [], "warnings": []})),
    ("GET", f"/api/models/{REPO}", info),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", tree),
    (("GET", "HEAD"), f"/{REPO}/resolve/([^/]+)/(.+)", resolve),
]


@contextlib.contextmanager
def serving():
    """A hub that lives as long as the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
