"""One hub: what it holds, what it has seen and what tests ask of it; the endpoints, what they refuse, and HTTP."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

from loopback_hub import xet

LARGE_FILES = (".bin", ".safetensors")  # of those that git does not hold, the ones of these tests
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_FILES).encode()


def git_oid(data: bytes, kind: str = "blob") -> str:
    """The sha1 by which git names `data`."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a tree: its whole content, whether git holds it (`lfs` false) or a pointer to it."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Of the content, or of the text that git keeps in place of a large file."""
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n"
        return git_oid(pointer % (self.sha256.encode(), len(self.data)) if self.lfs else self.data)


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    tree: Mapping[str, Entry]


@dataclass
class Repo:
    """One model repository; `branches` maps names to the hashes of commits."""

    id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def add_commit(self, branch: str, tree: Mapping[str, Entry], title: str) -> Commit:
        """A commit on top of a branch, which then points to it."""
        parent = self.branches.get(branch)
        # The number of commits tells apart two equal ones of the same second.
        body = [parent, title, time.time(), len(self.commits), sorted((path, e.oid) for path, e in tree.items())]
        sha = git_oid(json.dumps(body).encode(), "commit")
        commit = self.commits[sha] = Commit(sha, parent, title, dict(tree))
        self.branches[branch] = sha
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or a sha."""
        return self.commits.get(self.branches.get(revision, revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of every file of a revision."""
        return {path: entry.data for path, entry in commit_of(self, revision).tree.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return commits


@dataclass
class Fault:
    """What goes wrong with requests of one kind; `hits` counts how often it did."""

    method: str  # "GET", ..., or "*"
    path: str  # a regular expression, searched for in the path
    status: int | None = None  # answer this instead
    code: str | None = None  # with this X-Error-Code
    drop_after: int | None = None  # close the connection after so many bytes of the body, sent or received
    lose_answer: bool = False  # do what is asked and close the connection without an answer
    corrupt_at: int | None = None  # turn over the byte at this place of the answered file
    times: int = 1  # for so many requests
    hits: int = 0


class Call(NamedTuple):
    """One request as the server saw it; `status` is 0 where the connection was dropped before an answer."""

    method: str
    path: str
    status: int
    range: str | None  # the Range header


@dataclass
class LoopbackHub:
    """A hub for the length of a `with` statement; every attribute may be read and changed by a test.

    Two servers share its state, as with the real one: `url` speaks the Hub's API and knows tokens, `storage_url` keeps
    large files at /blobs/<sha256>, written and read without a token; a token that reaches it is an unexpected call.
    """

    xet_folder: Path | None = None  # where hf_xet keeps its chunks; None: large files travel over HTTP (git-lfs)
    users: dict[str, str] = field(  # token -> user
        default_factory=lambda: {"hf_alice": "alice", "hf_bob": "bob", "hf_alice_read": "alice"}
    )
    read_only: frozenset[str] = frozenset({"hf_alice_read"})  # tokens that may not write
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content of large files
    calls: list[Call] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)  # what no client should have asked for
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> LoopbackHub:
        self._servers = [listen(self, table) for table in (HUB, STORAGE)]
        self.url, self.storage_url = (f"http://127.0.0.1:{listening.server_port}" for listening in self._servers)
        return self

    def __exit__(self, *error: object) -> None:
        for listening in self._servers:
            listening.shutdown()
            listening.server_close()

    def repo(self, repo_id: str) -> Repo:
        """A repository: its `files(revision)`, `history(revision)`, `private`; KeyError if there is none."""
        return self.repos[repo_id]

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.add_commit("main", {".gitattributes": Entry(GIT_ATTRIBUTES)}, "initial commit")
        return repo

    def seed(self, repo_id: str, files: Mapping[str, bytes | str]) -> Repo:
        """Put files into a repository without asking the rules, so that it can hold what no client could push."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.create(repo_id)
            contents = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
            added = {path: Entry(data, is_large(path, data)) for path, data in contents.items()}
            repo.add_commit("main", {**commit_of(repo, "main").tree, **added}, "seed")
            self.blobs.update({entry.sha256: entry.data for entry in added.values() if entry.lfs})
        return repo

    def seen(self, method: str, path: str) -> list[Call]:
        """The calls so far of a method ("*" for all) whose path contains the regular expression `path`, in order."""
        return [call for call in self.calls if method in ("*", call.method) and re.search(path, call.path)]

    def fail(self, method: str, path: str, **how: int | str | bool) -> Fault:
        """Let the next requests of `method` whose path contains the regular expression `path` fail; see `Fault`.

        The fixtures fail a test whose faults never struck.
        """
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def strike(self, method: str, path: str) -> Fault | None:
        """The failure that this request is to meet; each call counts."""
        with self.lock:
            for fault in self.faults:
                if fault.method in ("*", method) and re.search(fault.path, path) and fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None

    def blob(self, sha256: str) -> bytes:
        """A large file, fetched from hf_xet's storage if it came that way."""
        if sha256 not in self.blobs and self.xet_folder is not None:
            self.blobs[sha256] = xet.read(self.xet_folder, sha256)
        return self.blobs[sha256]


class RefusedError(Exception):
    """An answer other than success. `code` is the X-Error-Code by which clients tell their errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Request(NamedTuple):
    user: str | None
    may_write: bool  # whether the token may, not whether the user may here
    query: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_file: bool = False  # may be asked for in ranges


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def refusal(error: RefusedError) -> Answer:
    code = {"X-Error-Code": error.code} if error.code else {}
    headers = {"X-Error-Message": error.message.replace("\n", " "), **code}
    return as_json({"error": error.message}, error.status, headers)


class Route(NamedTuple):
    method: str
    path: re.Pattern[str]
    endpoint: Callable[..., Answer]


HUB: list[Route] = []
STORAGE: list[Route] = []
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"  # a name without an owner is asked for too, and not found
REVISION = r"(?P<revision>[^/]+)"


def route(method: str, path: str, table: list[Route] = HUB) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def register(endpoint: Callable[..., Answer]) -> Callable[..., Answer]:
        table.append(Route(method, re.compile(path), endpoint))
        return endpoint

    return register


# ------------------------------------------------------------------------------------------------------------- rules


def is_large(path: str, sample: bytes) -> bool:
    """Whether a file belongs beside git: by its name or a zero byte at its beginning."""
    return path.endswith(LARGE_FILES) or b"\0" in sample[:512]


def card_problems(text: str) -> list[str]:
    """What the Hub finds wrong with the metadata at the head of a README.md: the part of its rules for our cards."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n?---\s*(\r?\n|$)", text, re.DOTALL)
    metadata = (yaml.safe_load(block[1]) if block else None) or {}
    texts = ("library_name", "pipeline_tag", "license_name", "license_link")
    problems = [f'"{key}" must be a string' for key in texts if not isinstance(metadata.get(key, ""), str)]
    for key in ("tags", "license", "metrics", "datasets"):
        value = metadata.get(key, [])
        items = [value] if isinstance(value, str) and key != "tags" else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            problems.append(f'"{key}" must be a list of strings')
    for i, model in enumerate(metadata.get("model-index", [])):
        problems += [] if model.get("name") else [f'"model-index[{i}].name" is required']
        for j, result in enumerate(model.get("results", [])):
            at = f"model-index[{i}].results[{j}]"
            required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            problems += [f'"{at}.{a}.{b}" is required' for a, b in required if not (result.get(a) or {}).get(b)]
            for n, metric in enumerate(result.get("metrics") or []):
                # A numpy or torch scalar arrives here as bytes or as a list.
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float, str)):
                    problems.append(f'"{at}.metrics[{n}]" needs a type and a number or a string for value')
    return problems


def readable(hub: LoopbackHub, request: Request, repo_id: str) -> Repo:
    """A repository that this user may know of: a private one of others is as good as none."""
    repo = hub.repos.get(repo_id)
    if repo is None or (repo.private and request.user != repo.owner):
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise RefusedError(404, "Repository not found", "RepoNotFound")
    return repo


def check_writer(request: Request, owner: str) -> None:
    if request.user != owner:
        raise RefusedError(403, f"You don't have the rights to write to the namespace {owner!r}")
    if not request.may_write:
        raise RefusedError(403, "This token has no write permission")


def writable(hub: LoopbackHub, request: Request, repo_id: str) -> Repo:
    repo = readable(hub, request, repo_id)
    check_writer(request, repo.owner)
    return repo


def commit_of(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


# ----------------------------------------------------------------------------------------------------------- reading


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: LoopbackHub, request: Request) -> Answer:
    return as_json({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Answer:
    problems = card_problems(request.json()["content"])
    content = {"errors": [{"message": problem} for problem in problems], "warnings": []}
    return as_json(content, 400 if problems else 200)


@route("GET", rf"/api/models/{REPO}(?:/revision/{REVISION})?")
def model_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str = "main") -> Answer:
    repo = readable(hub, request, repo_id)
    commit = commit_of(repo, revision)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.tree)]
    if request.query.get("blobs", "").lower() in ("true", "1"):
        for row in siblings:
            entry = commit.tree[row["rfilename"]]
            row |= {"size": len(entry.data), "blobId": entry.oid}
            row |= {"lfs": {"sha256": entry.sha256, "size": len(entry.data), "pointerSize": 130}} if entry.lfs else {}
    about = {"id": repo.id, "author": repo.owner, "sha": commit.sha, "private": repo.private, "gated": False}
    return as_json({**about, "tags": [], "siblings": siblings})


@route("GET", rf"/api/models/{REPO}/tree/{REVISION}")
def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    commit = commit_of(readable(hub, request, repo_id), revision)
    rows = []
    for path, entry in sorted(commit.tree.items()):
        lfs = {"lfs": {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 130}} if entry.lfs else {}
        rows.append({"type": "file", "path": path, "size": len(entry.data), "oid": entry.oid, **lfs})
    return as_json(rows)


@route("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Answer:
    """A file; for a large one, where to fetch it: on the storage's origin, to which no token goes."""
    commit = commit_of(readable(hub, request, repo_id), revision)
    headers = {"X-Repo-Commit": commit.sha}
    entry = commit.tree.get(path)
    if entry is None:
        raise RefusedError(404, "Entry not found", "EntryNotFound")
    if not entry.lfs:
        return Answer(entry.data, headers={**headers, "ETag": f'"{entry.oid}"'}, is_file=True)
    headers |= {"ETag": f'"{entry.sha256}"', "X-Linked-Etag": f'"{entry.sha256}"'}
    headers |= {"X-Linked-Size": str(len(entry.data)), "Location": f"{hub.storage_url}/blobs/{entry.sha256}"}
    if hub.xet_folder and (chunked := xet.hashes(hub.xet_folder).get(entry.sha256)):
        auth = f'<{hub.url}/api/models/{repo_id}/xet-read-token/{commit.sha}>; rel="xet-auth"'
        headers |= {"X-Xet-Hash": chunked[0], "Link": auth}
    return Answer(status=302, headers=headers)


@route("GET", rf"/api/models/{REPO}/xet-(?P<kind>read|write)-token/{REVISION}")
def xet_token(hub: LoopbackHub, request: Request, repo_id: str, kind: str, revision: str) -> Answer:
    (writable if kind == "write" else readable)(hub, request, repo_id)
    assert hub.xet_folder, "a client wants Xet of a hub without it; its HF_HUB_DISABLE_XET is not set"
    url, expires = f"local://{hub.xet_folder}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Token-Expiration": str(expires), "X-Xet-Access-Token": "xet"}
    return as_json({"casUrl": url, "exp": expires, "accessToken": "xet"}, headers=headers)


@route("GET", r"/blobs/(?P<sha256>[0-9a-f]{64})", STORAGE)
def get_blob(hub: LoopbackHub, request: Request, sha256: str) -> Answer:
    return Answer(hub.blob(sha256), headers={"ETag": f'"{sha256}"'}, is_file=True)


# ----------------------------------------------------------------------------------------------------------- writing


@route("POST", "/api/repos/create")
def create_repo(hub: LoopbackHub, request: Request) -> Answer:
    asked = request.json()
    owner = asked.get("organization") or request.user
    check_writer(request, owner)
    repo_id = f"{owner}/{asked['name']}"
    url = f"{hub.url}/{repo_id}"
    if repo_id in hub.repos:
        return as_json({"error": "You already created this model repo", "url": url}, 409)
    hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return as_json({"url": url, "name": repo_id})


@route("POST", rf"/api/models/{REPO}/branch/{REVISION}")
def create_branch(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    repo = writable(hub, request, repo_id)
    repo.branches[revision] = commit_of(repo, request.json().get("startingPoint") or "main").sha
    return as_json({})


@route("POST", rf"/api/models/{REPO}/preupload/{REVISION}")
def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    """Which files go into the commit and which beside it, and what is there already under their names."""
    known, rows = commit_of(writable(hub, request, repo_id), revision).tree, []
    for file in request.json()["files"]:
        large = is_large(file["path"], base64.b64decode(file.get("sample") or ""))
        entry = known.get(file["path"])
        oid = entry and (entry.sha256 if entry.lfs else entry.oid)
        mode = "lfs" if large else "regular"
        rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": rows})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    """Where to upload each large file; nowhere, if it is here already."""
    writable(hub, request, repo_id)
    rows: list[dict[str, Any]] = []
    for wanted in request.json()["objects"]:
        rows.append({"oid": wanted["oid"], "size": wanted["size"]})
        if wanted["oid"] not in hub.blobs:
            rows[-1]["actions"] = {"upload": {"href": f"{hub.storage_url}/blobs/{wanted['oid']}"}}
    return as_json({"transfer": "basic", "objects": rows})


@route("PUT", r"/blobs/(?P<sha256>[0-9a-f]{64})", STORAGE)
def put_blob(hub: LoopbackHub, request: Request, sha256: str) -> Answer:
    hub.blobs[sha256] = request.body
    return Answer()


@route("POST", rf"/api/models/{REPO}/commit/{REVISION}")
def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    """One commit from lines of JSON: a header, then what changes. All of it or nothing."""
    repo = writable(hub, request, repo_id)
    header, *lines = (json.loads(line) for line in request.body.splitlines() if line.strip())
    head = commit_of(repo, revision)
    if not head.sha.startswith(header["value"].get("parentCommit") or ""):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.tree)
    for line in lines:
        value = line["value"]
        path = value["path"]
        match line["key"]:
            case "file":
                files[path] = Entry(base64.b64decode(value["content"], validate=True))
            case "lfsFile":
                files[path] = Entry(hub.blob(value["oid"]), lfs=True)
            case "deletedFile":
                if files.pop(path, None) is None:
                    raise RefusedError(404, f"There is no file {path}", "EntryNotFound")
    new = repo.add_commit(revision, files, header["value"]["summary"])
    url = f"{hub.url}/{repo_id}/commit/{new.sha}"
    return as_json({"success": True, "commitOid": new.sha, "commitUrl": url, "hookOutput": ""})


# -------------------------------------------------------------------------------------------------------------- HTTP


def listen(hub: LoopbackHub, table: list[Route]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, hub, table))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    """One connection to one of the two servers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits 40 ms for the receipt of its headers

    def __init__(self, hub: LoopbackHub, table: list[Route], *arguments: Any):
        self.hub, self.table = hub, table
        super().__init__(*arguments)  # handles the connection to its end

    def log_message(self, *arguments: object) -> None:
        """The calls are in `hub.calls`."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client went away, as clients of failing servers do
            super().handle()

    def respond(self) -> None:
        fault = self.hub.strike(self.command, unquote(urlsplit(self.path).path))
        if fault and fault.drop_after is not None and self.command in ("POST", "PUT"):
            # Bytes left unread make the system reset the connection when it is closed.
            self.rfile.read(fault.drop_after)
            return self.hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault and fault.status is not None:
            return self.send(refusal(RefusedError(fault.status, "This failure was asked for", fault.code)))
        answer = self.answer(body)
        if fault and fault.lose_answer:
            return self.hang_up()
        if fault and fault.corrupt_at is not None:
            at = fault.corrupt_at
            answer.body = answer.body[:at] + bytes([answer.body[at] ^ 0xFF]) + answer.body[at + 1 :]
        self.send(answer, None if fault is None else fault.drop_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_CONNECT = respond

    def answer(self, body: bytes) -> Answer:
        """Find the endpoint and call it, all under one lock: every call is atomic."""
        url = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            try:
                user, may_write = self.user()
                for entry in self.table:
                    if entry.method == method and (match := entry.path.fullmatch(url.path)):
                        named = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                        request = Request(user, may_write, dict(parse_qsl(url.query)), body)
                        return entry.endpoint(self.hub, request, **named)
                self.hub.unexpected.append(f"no such endpoint: {self.command} {self.path}")
                raise RefusedError(404, f"Sorry, we can't find the page you are looking for: {self.path}")
            except RefusedError as error:
                return refusal(error)
            except Exception:
                self.hub.unexpected.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
                return Answer(b"the loopback hub itself failed", 500)

    def user(self) -> tuple[str | None, bool]:
        """Who sent the token, and whether it may write."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, False
        if self.table is STORAGE:
            self.hub.unexpected.append(f"a token was sent to the storage: {self.command} {self.path}")
            raise RefusedError(400, "Only one auth mechanism allowed")
        token = header.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token], token not in self.hub.read_only

    def send(self, answer: Answer, drop_after: int | None = None) -> None:
        status, headers, body = answer.status, dict(answer.headers), answer.body
        if answer.is_file:
            headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                first, size = int(wanted[1]), len(body)
                status, body = 206, body[first:]
                headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        self.record(status)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:drop_after])
        self.close_connection |= drop_after is not None

    def hang_up(self) -> None:
        self.close_connection = True
        self.record(0)

    def record(self, status: int) -> None:
        self.hub.calls.append(Call(self.command, unquote(self.path), status, self.headers.get("Range")))
