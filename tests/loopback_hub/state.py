"""One hub: what it holds, what it has seen, and what tests ask of it."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from loopback_hub import server, xet
from loopback_hub.content import Entry, Repo
from loopback_hub.faults import Fault
from loopback_hub.protocol import HUB, STORAGE
from loopback_hub.rules import GIT_ATTRIBUTES, RefusedError, is_large

TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_alice_read": "alice"}


class Call(NamedTuple):
    """One request as the server saw it; `status` is 0 where the connection was dropped before an answer."""

    method: str
    path: str
    status: int
    range: str | None  # the Range header
    user: str | None


@dataclass
class LoopbackHub:
    """A hub for the length of a `with` statement; every attribute may be read and changed by a test.

    Two servers share its state, as with the real one: `url` speaks the Hub's API and knows tokens, `storage_url` keeps
    large files, to be written and read without a token; a token that reaches it is an unexpected call.
    """

    xet_folder: Path | None = None  # where hf_xet keeps its chunks; None: large files travel over HTTP (git-lfs)
    users: dict[str, str] = field(default_factory=lambda: dict(TOKENS))  # token -> user
    read_only: set[str] = field(default_factory=lambda: {"hf_alice_read"})  # tokens that may not write
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content of large files
    announced: dict[str, int] = field(default_factory=dict)  # sha256 -> bytes of the uploads that were granted
    calls: list[Call] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)  # what no client should have asked for
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> LoopbackHub:
        self._servers = [server.listen(self, table) for table in (HUB, STORAGE)]
        self.url, self.storage_url = (f"http://127.0.0.1:{listening.server_port}" for listening in self._servers)
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        for listening in self._servers:
            listening.shutdown()
            listening.server_close()

    # What tests ask

    def repo(self, repo_id: str) -> Repo:
        """A repository: its `files(revision)`, `history(revision)`, `refs`, `private`; KeyError if there is none."""
        return self.repos[repo_id]

    def seed(self, repo_id: str, files: Mapping[str, bytes | str], *, private: bool = False) -> Repo:
        """Put files into a repository without asking the rules, so that it can hold what no client could push."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.create(repo_id, private=private)
            contents = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
            added = {path: Entry(data, is_large(path, len(data), data)) for path, data in contents.items()}
            head = repo.commits[repo.refs["refs/heads/main"]]
            repo.add_commit("refs/heads/main", {**head.tree, **added}, "seed", "", repo.owner)
            self.blobs.update({entry.sha256: entry.data for entry in added.values() if entry.lfs})
        return repo

    def seen(self, method: str, path: str) -> list[Call]:
        """The calls so far of a method ("*" for all) whose path contains the regular expression `path`, in order."""
        return [call for call in self.calls if method in ("*", call.method) and re.search(path, call.path)]

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        drop_after: int | None = None,
        lose_answer: bool = False,
        corrupt_at: int | None = None,
        delay: float = 0.0,
        times: int = 1,
        skip: int = 0,
    ) -> Fault:
        """Let the next `times` requests of `method` whose path contains the regular expression `path` fail.

        In one of these ways: the answer `status` (with an X-Error-Code and a Retry-After in seconds if given); the
        connection closed after `drop_after` bytes of the body, received for PUT and POST, sent for GET; one byte of the
        answered file flipped; only a `delay` in seconds. The first `skip` such requests still pass. Large files are
        PUT and GET at "/blobs/<sha256>". `fixtures.hub` fails a test whose faults never struck.
        """
        if (status, drop_after, lose_answer, corrupt_at, delay) == (None, None, False, None, 0.0):
            raise ValueError("fail() needs one of status, drop_after, lose_answer, corrupt_at, delay")
        how = (status, code, retry_after, drop_after, lose_answer, corrupt_at, delay)
        fault = Fault(method, path, *how, times, skip)
        self.faults.append(fault)
        return fault

    # What the endpoints and the two servers ask

    def record(self, method: str, path: str, status: int, wanted: str | None, user: str | None) -> None:
        self.calls.append(Call(method, path, status, wanted, user))

    def create(self, repo_id: str, *, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        attributes = {".gitattributes": Entry(GIT_ATTRIBUTES.encode())}
        repo.add_commit("refs/heads/main", attributes, "initial commit", "", repo.owner)
        return repo

    def store(self, sha256: str, data: bytes) -> None:
        """Keep an upload that was announced, if it is what was announced."""
        if sha256 not in self.announced:
            raise RefusedError(403, f"nobody announced an upload of {sha256}")
        if len(data) != self.announced[sha256]:
            raise RefusedError(400, f"{len(data)} bytes came, {self.announced[sha256]} were announced")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RefusedError(400, f"the content's sha256 is not {sha256}")
        self.blobs[sha256] = data

    def blob(self, sha256: str) -> bytes | None:
        """A large file, fetched from hf_xet's storage if it came that way."""
        if sha256 not in self.blobs and self.xet_folder is not None:
            data = xet.read(self.xet_folder, sha256)
            if data is not None:
                self.blobs[sha256] = data
        return self.blobs.get(sha256)

    def strike(self, method: str, path: str) -> Fault | None:
        """The failure that this request is to meet."""
        with self.lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)
