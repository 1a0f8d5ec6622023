"""A small Hub on the loopback interface for `huggingface_hub`'s own client: what a download and a push ask for.

Models and data sets share one list of names. Files are resolved as on the real one: small ones are sent at once, large
ones (weights, pictures, shards) come by a redirect to storage, which knows ranges. Connections can be made to break.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_member"
LARGE = (".bin", ".pt", ".safetensors", ".png", ".onnx", ".ckpt", ".tar")


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


class Repository:
    """Commits, each a dict from path to content; `main` is the last one."""

    def __init__(self, files: dict[str, bytes] | None = None, gated: bool = False) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}  # further ones, with their commit
        self.gated = gated
        self.private = False
        self.commit(files or {})

    def commit(self, files: dict[str, bytes]) -> str:
        text = repr([len(self.commits), *((path, _sha256(content)) for path, content in sorted(files.items()))])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def revision(self, name: str) -> tuple[str, dict[str, bytes]] | None:
        sha = list(self.commits)[-1] if name == "main" else self.branches.get(name, name)
        return (sha, self.commits[sha]) if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return list(self.commits.values())[-1]


class Hub(ThreadingHTTPServer):
    """A Hub on a free port, in threads of its own within `with`.

    Attributes:
        repositories: by ORG/REPO.
        breaks: connections that storage will break in the middle of the content.
        tampered: whether storage sends other bytes than were stored.
        lies: by how many bytes the announced size of a large file is wrong.
        requests: what was asked, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.breaks = 0
        self.tampered = False
        self.lies = 0
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Under another host name, as on the real Hub: the client follows redirects within one host by itself."""
        return f"http://localhost:{self.server_address[1]}/storage"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def asked_for(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]


def answers_at(patch: Any, url: str, cache: Path | None = None) -> None:
    """With pytest's MonkeyPatch: the client talks to this address in place of the real one, and has this cache."""
    from huggingface_hub import constants

    if cache is not None:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the Hub's second protocol, in a library of its own
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._note()
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/storage/(\w+)", path):
            self._send_stored(found[1])
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            if commit := self._commit(found[1], found[2]):
                folder = f"{unquote(found[3])}/" if found[3] else ""
                inside = {p: c for p, c in commit[1].items() if p.startswith(folder)}
                below = [p.removeprefix(folder).split("/") for p in inside]
                levels = None if "recursive=true" in self.path.lower() else 1
                names = {folder + "/".join(p[:n]): None for p in below for n in range(1, len(p) + 1)[:levels]}
                tree = [self._entry(p, commit[1].get(p)) for p in names]
                if inside or not folder:
                    self._answer(200, tree)
                else:
                    self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if commit := self._commit(found[1], found[2] or "main"):
                siblings = [{"rfilename": name} for name in commit[1]]
                self._answer(200, {"id": found[1], "sha": commit[0], "siblings": siblings})
        else:
            self._answer(404)

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self._token() != TOKEN:
            self._answer(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            current = self.server.repositories[found[1]].files
            self._answer(200, {"files": [self._upload_mode(f["path"], current) for f in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.server.storage:
                    item["actions"] = {"upload": {"href": f"{self.server.storage_url}/{item['oid']}"}}
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._push(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        oid = self._note().rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if _sha256(body) == oid:
            self.server.storage[oid] = body
        self._answer(200 if _sha256(body) == oid else 400)

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The files of a revision; None if there is an error, which is sent."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self._token() != TOKEN):
            self._answer(401 if self._token() is None else 404, headers={"X-Error-Code": "RepoNotFound"})
        elif repository.gated and self._token() != TOKEN:
            self._answer(403 if self._token() else 401, headers={"X-Error-Code": "GatedRepo"})
        elif (commit := repository.revision(unquote(revision))) is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return commit
        return None

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            return
        sha, files = commit
        headers = {"X-Repo-Commit": sha}
        content = files.get(unquote(path))
        if content is None:
            self._answer(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            oid = _sha256(content)
            self.server.storage[oid] = content
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content) + self.server.lies)}
            self._answer(302, headers=headers | linked | {"Location": f"{self.server.storage_url}/{oid}"})
        else:
            self._answer(200, content, headers | {"ETag": f'"{_sha1(content)}"'})

    def _send_stored(self, oid: str) -> None:
        content = self.server.storage[oid]
        if self.server.tampered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2] or len(content)) + 1) if found else (0, len(content))
        headers, part = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, content[start:stop]
        if found:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        cut = self.server.breaks > 0 and self.command == "GET"
        self.server.breaks -= cut
        self._answer(206 if found else 200, part, headers, cut)

    def _entry(self, path: str, content: bytes | None) -> dict[str, Any]:
        """What the list of a folder has of a file, or of a folder in it."""
        if content is None:
            return {"type": "directory", "path": path, "oid": _sha1(path.encode())}
        return {"type": "file", "path": path, "size": len(content), "oid": _sha1(content)}

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.server.repositories
        repository = self.server.repositories.setdefault(name, Repository())
        if not there:
            repository.private = asked.get("visibility") == "private" or asked.get("private") is True
        self._answer(409 if there else 200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})

    @staticmethod
    def _upload_mode(path: str, current: dict[str, bytes]) -> dict[str, Any]:
        oid = None
        if path in current:
            oid = _sha256(current[path]) if path.endswith(LARGE) else _sha1(current[path])
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _push(self, name: str, operations: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[name]
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.storage[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _note(self) -> str:
        path = urlsplit(self.path).path
        self.server.requests.append(Request(self.command, path, self.headers.get("Range"), self._token()))
        return path

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _answer(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
