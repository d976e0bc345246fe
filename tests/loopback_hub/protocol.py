"""Requests, answers, and how the endpoints are found; who may read and write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loopback_hub.content import Commit, Repo
from loopback_hub.rules import RefusedError

if TYPE_CHECKING:
    from loopback_hub.state import LoopbackHub


class Request(NamedTuple):
    user: str | None
    may_write: bool  # whether the token may, not whether the user may here
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_file: bool = False  # may be asked for in ranges

    @classmethod
    def of_json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def cut(self, header: str | None) -> Answer:
        """The part that a Range header asks for."""
        headers = {**self.headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
        if not wanted:
            return replace(self, headers=headers)
        size = len(self.body)
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first > last:
            return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Answer(self.body[first : last + 1], 206, headers)


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


def readable(hub: LoopbackHub, request: Request, repo_id: str) -> Repo:
    """A repository that this user may know of: a private one of others is as good as none."""
    repo = hub.repos.get(repo_id)
    if repo is None or (repo.private and request.user != repo.owner):
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise RefusedError(404, "Repository not found", "RepoNotFound")
    return repo


def writer(request: Request, owner: str | None) -> str:
    """The user, if allowed to write to what `owner` owns."""
    if request.user is None:
        raise RefusedError(401, "Invalid username or password.")
    if request.user != owner:
        raise RefusedError(403, f"You don't have the rights to write to the namespace {owner!r}")
    if not request.may_write:
        raise RefusedError(403, "This token has no write permission")
    return request.user


def writable(hub: LoopbackHub, request: Request, repo_id: str) -> Repo:
    repo = readable(hub, request, repo_id)
    writer(request, repo.owner)
    return repo


def commit_of(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit
