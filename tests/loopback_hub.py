"""A Hub on the loopback interface: real HTTP for the real client, repositories in memory, faults on demand.

Models, datasets and Spaces, tokens and private repositories, LFS, commits with stale parents refused, branches,
tags and pinned revisions. `uploaded` counts what was really sent, `requests` what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

WRITER, READER, STRANGER = "hf_writerTokenOfTests", "hf_readerTokenOfTests", "hf_strangerTokenOfTests"
_LFS = (".safetensors", ".bin", ".npy", ".faiss", ".pt", ".pth", ".onnx", ".trec", ".png", ".parquet")
_NO_USER = "Invalid credentials in Authorization header"
_DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([title, parent, sorted((path, blob.etag) for path, blob in files.items())])
        oid = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)


@dataclass
class Fault:
    path: str
    status: int | None  # None: the connection is cut after some of the body
    method: str = ""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class LoopbackHub(ThreadingHTTPServer):
    """Binds its port when made, so that the address is known before a client is imported; `start` serves it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Begin again with no repository and no fault."""
        self.users = {WRITER: ("tester", "write"), READER: ("tester", "read"), STRANGER: ("stranger", "write")}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.uploaded: Counter[str] = Counter()  # sha256 of an LFS object or path of a regular file -> times sent
        self.on_request: Callable[[str, str], None] | None = None

    def start(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fail(self, path: str, status: int | None, **more: Any) -> None:
        """Answer the next requests whose path matches with a status, or cut them off (None)."""
        self.faults.append(Fault(path, status, **more))

    def publish(self, folder: Path, name: str, kind: str = "models", *, private: bool = False) -> str:
        """Put a folder there as its owner would have; the commit."""
        files = {
            file.relative_to(folder).as_posix(): Blob(file.read_bytes(), file.name.endswith(_LFS))
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self.lfs |= {blob.sha256: blob.content for blob in files.values() if blob.lfs}
        repo = self.repos.setdefault((kind, name), Repo(private))
        return repo.commit("main", "published", files).oid

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        commit = self.repo(name, kind).at(revision)
        assert commit is not None, f"{name} has no revision {revision}"
        return {path: blob.content for path, blob in commit.files.items()}

    def everything(self) -> dict[str, bytes]:
        """All that was ever stored, by a name that tells where."""
        found = {f"lfs/{oid}": content for oid, content in self.lfs.items()}
        for (kind, name), repo in self.repos.items():
            for oid, commit in repo.commits.items():
                found |= {f"{kind}/{name}@{oid}/{path}": blob.content for path, blob in commit.files.items()}
                found[f"{kind}/{name}@{oid} title"] = commit.title.encode()
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the tests' business."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._do
        raise AttributeError(name)

    def _do(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        with self.server.lock:
            self.server.requests.append((self.command, path))
            for fault in self.server.faults:
                if fault.times and fault.method in ("", self.command) and re.search(fault.path, path):
                    fault.times -= 1
                    break
            else:
                fault = None
        if self.server.on_request is not None:
            self.server.on_request(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault is not None:
            self._send(fault.status or 500, {"error": "a fault on purpose"}, fault.headers)
            return
        try:
            with self.server.lock:
                self._route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            given = {name: value for name, value in headers.items() if value}
            self._send(refusal.status, {"error": refusal.message or refusal.code}, given)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self) -> tuple[str, str] | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in self.server.users:
            raise Refusal(401, message=_NO_USER)
        return self.server.users.get(given)

    def _repo(self, kind: str, name: str, *, write: bool = False) -> Repo:
        user = self._user()
        repo = self.server.repos.get((kind, name))
        owner = name.split("/")[0]
        if repo is None or (repo.private and (user is None or user[0] != owner)):
            raise Refusal(401 if user is None else 404, "RepoNotFound")
        if write and (user is None or user != (owner, "write")):
            raise Refusal(403 if user else 401, message="Forbidden: you can't write here with this token")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            if (user := self._user()) is None:
                raise Refusal(401, message=_NO_USER)
            token = {"accessToken": {"role": user[1], "displayName": "tests"}}
            return self._send(200, {"type": "user", "name": user[0], "fullname": user[0], "orgs": [], "auth": token})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", path):
            return self._lfs_object(found[1], found[2], body)
        if found := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repo((found[1] or "models").rstrip("/"), found[2], write=True)
            return self._lfs_batch(json.loads(body))
        if found := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve((found[1] or "models").rstrip("/"), *found.groups()[1:])
        if found := re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?", path
        ):
            return self._api(*found.groups(), body)
        raise Refusal(404)

    def _create(self, asked: dict[str, Any]) -> None:
        user = self._user()
        owner = asked.get("organization") or (user[0] if user else "")
        if user is None or user != (owner, "write"):
            raise Refusal(403 if user else 401, message="Forbidden: you can't create a repository with this token")
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        url = f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.server.repos:
            return self._send(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.server.repos[kind, name] = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self._send(200, {"url": url, "name": name})

    def _api(
        self, kind: str, name: str, call: str | None, revision: str | None, rest: str | None, body: bytes
    ) -> None:
        repo = self._repo(kind, name, write=self.command == "POST")
        if call is None or call == "revision":
            commit = self._commit(repo, revision or "main")
            siblings = [{"rfilename": file} for file in sorted(commit.files)]
            info = {"id": name, "modelId": name, "sha": commit.oid, "siblings": siblings, "private": repo.private}
            return self._send(200, {**info, "lastModified": _DATE, "tags": [], "downloads": 0, "likes": 0})
        if call == "refs":
            refs: dict[str, Any] = {"converts": []}
            for key, places, ref in (("branches", repo.branches, "heads"), ("tags", repo.tags, "tags")):
                refs[key] = [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": oid} for n, oid in places.items()]
            return self._send(200, refs)
        if call == "tree":
            return self._tree(self._commit(repo, revision or "main"), rest)
        if call in ("tag", "branch"):
            return self._ref(repo, call, revision or "main", json.loads(body or b"{}"))
        if call == "preupload":
            known = repo.at(revision or "main")
            answer = []
            for path in (file["path"] for file in json.loads(body)["files"]):
                there = known.files.get(path) if known else None
                mode, oid = "lfs" if path.endswith(_LFS) else "regular", there.etag if there else None
                answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return self._send(200, {"files": answer})
        if call == "commit":
            return self._take_commit(name, kind, repo, revision or "main", body)
        raise Refusal(404)

    def _tree(self, commit: Commit, sub: str | None) -> None:
        entries = []
        for path, blob in sorted(commit.files.items()):
            if not sub or path.startswith(f"{sub}/"):
                size = len(blob.content)
                lfs = {"lfs": {"oid": blob.sha256, "size": size, "pointerSize": 130}} if blob.lfs else {}
                entries.append({"type": "file", "oid": blob.oid, "size": size, "path": path, **lfs})
        if sub and not entries:
            raise Refusal(404, "EntryNotFound")
        self._send(200, entries)

    def _ref(self, repo: Repo, call: str, revision: str, asked: dict[str, Any]) -> None:
        if call == "tag":
            places, name, start = repo.tags, asked["tag"], revision
        else:
            places, name, start = repo.branches, revision, asked.get("startingPoint") or "main"
        if name in places:
            raise Refusal(409, message="Reference already exists")
        places[name] = self._commit(repo, start).oid
        self._send(200, {})

    def _take_commit(self, name: str, kind: str, repo: Repo, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if branch not in repo.branches:
            raise Refusal(404, "RevisionNotFound")
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                self.server.uploaded[value["path"]] += 1
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    raise Refusal(400, message=f"LFS pointer of {value['path']} points to an object that is not here")
                files[value["path"]] = Blob(self.server.lfs[value["oid"]], True)
            elif line["key"] in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                files = {path: blob for path, blob in files.items() if not f"{path}/".startswith(f"{gone}/")}
        commit = repo.commit(branch, header["summary"], files)
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.server.url}/{prefix}{name}/commit/{commit.oid}"
        self._send(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        answer = []
        for one in asked["objects"]:
            href = f"{self.server.url}/lfs/{one['oid']}"
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            new = one["oid"] not in self.server.lfs
            answer.append({"oid": one["oid"], "size": one["size"], **(actions if new else {})})
        self._send(200, {"transfer": "basic", "objects": answer})

    def _lfs_object(self, oid: str, verify: str | None, body: bytes) -> None:
        if self.command in ("GET", "HEAD"):
            return self._content(self.server.lfs[oid], {"ETag": f'"{oid}"'})
        if verify:
            known = self.server.lfs.get(oid)
            return self._send(200 if known is not None and len(known) == json.loads(body)["size"] else 404, {})
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, message="the content does not have this sha256")
        self.server.lfs[oid] = body
        self.server.uploaded[oid] += 1
        self._send(200)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        commit = self._commit(self._repo(kind, name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self._send(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        blob = commit.files[path]
        if not blob.lfs:
            return self._content(blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        # Another host name: the client follows a redirect within the host and loses the commit.
        place = self.server.url.replace("127.0.0.1", "localhost")
        self._send(302, b"", {**headers, "Location": f"{place}/lfs/{quote(blob.sha256)}"})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        self._send(200, content, {**headers, "Content-Length": str(len(content))})
