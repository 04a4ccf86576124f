"""A Hub on this machine: enough of its HTTP API to create a repo, commit with LFS files, and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCard

LARGE = (".safetensors", ".png")
LICENSES = ["apache-2.0", "mit"]


class LoopbackHub:
    """`with LoopbackHub() as hub:`; `hub.url` is the endpoint.

    token      the one accepted, of the account `owner`; whose repos are others' may be read, not written
    repos      {repo id: {path: bytes}}; commits: {repo id: [message]}
    broken     {"PUT": so many large files, "POST": so many commits} whose bodies are cut off in the middle
    lost       so many commits are made, and the connection closed without an answer
    full       nothing more may be stored
    requests   (method, path, headers, body) of all there were
    """

    def __init__(self, token: str = "hf_secret", owner: str = "me") -> None:
        self.token, self.owner = token, owner
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.broken = {"PUT": 0, "POST": 0}
        self.lost, self.full = 0, False
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo: str) -> str:
        """A commit id that changes with the content."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self, limit: int | None = None) -> bytes:
        """As it was sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(limit, length))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        large = self.command == "PUT" or path.endswith("/commit/main")
        breaks = large and self.hub.broken[self.command] > 0
        body = self.body(limit=100 if breaks else None)
        self.hub.requests.append((self.command, path, dict(self.headers), body))
        if breaks:
            self.hub.broken[self.command] -= 1
            self.hang_up()
            return
        with self.hub.lock:
            for method, pattern, action in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    action(self, body, **match.groupdict())
                    return
        self.answer(404, {"error": f"no such page: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def may_write(self, owner: str) -> bool:
        """Answers for who may not."""
        if not self.known:
            self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        elif owner != self.hub.owner:
            self.answer(403, {"error": "Forbidden"}, {"X-Error-Message": "you don't have the rights"})
        return self.known and owner == self.hub.owner

    def whoami(self, body: bytes) -> None:
        facts = {"name": self.hub.owner, "type": "user", "orgs": [], "auth": {"accessToken": {}}}
        self.answer(200 if self.known else 401, facts if self.known else {"error": "Invalid credentials"})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        try:
            if ModelCard(content).data.license not in (None, *LICENSES):
                raise ValueError(f'"license" must be one of {LICENSES}')
            self.answer(200, {"errors": [], "warnings": []})
        except (ValueError, yaml.YAMLError) as error:
            self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.hub.owner
        repo = f"{owner}/{asked['name']}"
        if self.may_write(owner):
            url = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
            if repo in self.hub.repos:
                self.answer(409, {"error": "You already created this model repo", **url})
            else:
                self.hub.repos[repo], self.hub.commits[repo] = {}, []
                self.answer(200, url)

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.repos[repo]
        data = ModelCard(files["README.md"].decode()).data if "README.md" in files else None
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": repo, "modelId": repo, "sha": self.hub.sha(repo), "siblings": siblings, "private": False}
        self.answer(200, {**facts, "tags": list((data and data.tags) or []), "downloads": 0, "likes": 0})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        rows = [{"type": "file", "path": name, "size": len(content), "oid": self.oid(repo, name)}
                for name, content in self.hub.repos[repo].items()]  # fmt: skip
        self.answer(200, rows)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.hub.full:
            self.answer(403, {"error": "Storage limit reached"}, {"X-Error-Message": "Storage limit reached"})
        elif self.may_write(repo.split("/")[0]):
            paths = [one["path"] for one in json.loads(body)["files"]]
            files = [{"path": path, "shouldIgnore": False, "oid": self.oid(repo, path),
                      "uploadMode": "lfs" if path.endswith(LARGE) else "regular"} for path in paths]  # fmt: skip
            self.answer(200, {"files": files})

    def oid(self, repo: str, path: str) -> str | None:
        """As git has it, or LFS."""
        content = self.hub.repos[repo].get(path)
        if content is None:
            return None
        if path.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def batch(self, body: bytes, repo: str) -> None:
        if not self.may_write(repo.split("/")[0]):
            return
        found = []
        for one in json.loads(body)["objects"]:
            if one["oid"] in self.hub.objects:
                found.append(one)
            else:
                actions = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"},
                           "verify": {"href": f"{self.hub.url}/verify"}}  # fmt: skip
                found.append({**one, "actions": actions})
        self.answer(200, {"transfer": "basic", "objects": found})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "the content is not what was announced"})
        else:
            self.hub.objects[oid] = body
            self.answer(200)

    def verify(self, body: bytes) -> None:
        one = json.loads(body)
        self.answer(200 if len(self.hub.objects.get(one["oid"], b"")) == one["size"] else 404, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_write(repo.split("/")[0]):
            return
        files = dict(self.hub.repos[repo])
        for line in body.splitlines():
            one = json.loads(line)
            if one["key"] == "header":
                message = one["value"]["summary"]
            elif one["key"] == "file":
                files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            elif one["key"] == "lfsFile":
                files[one["value"]["path"]] = self.hub.objects[one["value"]["oid"]]
        self.hub.repos[repo] = files
        self.hub.commits[repo].append(message)
        if self.hub.lost:
            self.hub.lost -= 1
            self.hang_up()
        else:
            sha = self.hub.sha(repo)
            self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            sha = self.hub.sha(repo) if repo in self.hub.repos else ""
            headers = {"X-Error-Code": "EntryNotFound" if sha else "RepoNotFound", "X-Repo-Commit": sha or "0" * 40}
            self.answer(404, {"error": "not found"}, headers)
            return
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.sha(repo)})


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("POST", "/verify", Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("HEAD GET", f"/{REPO}/resolve/{REVISION}/(?P<name>.+)", Handler.resolve),
)
