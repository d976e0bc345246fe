"""What a repository holds: files, commits with parents, branches and tags, all in memory."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    def pointer(self) -> bytes:
        """The text that git keeps in place of a large file."""
        fields = (self.sha256.encode(), len(self.data))
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % fields

    @property
    def oid(self) -> str:
        return git_oid(self.pointer if self.lfs else self.data)

    def describe(self, path: str) -> dict[str, Any]:
        """The row of this file in a listing of its tree."""
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            row["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return row


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: Mapping[str, Entry]


@dataclass
class Repo:
    """One model repository; `refs` maps full names such as "refs/heads/main" to commits."""

    id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def add_commit(self, ref: str, tree: Mapping[str, Entry], title: str, message: str, author: str) -> Commit:
        """A commit on top of `ref`, which then points to it."""
        parent = self.refs.get(ref)
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        # The number of commits tells apart two equal ones of the same second.
        body = [parent, title, message, author, date, len(self.commits), sorted((p, e.oid) for p, e in tree.items())]
        sha = git_oid(json.dumps(body).encode(), "commit")
        commit = self.commits[sha] = Commit(sha, parent, title, message, author, date, dict(tree))
        self.refs[ref] = sha
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or a sha (at least seven digits of it)."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        matches = [c for sha, c in self.commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        return matches[0] if len(matches) == 1 else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of every file of a revision; KeyError where there is no such revision."""
        commit = self.find(revision)
        if commit is None:
            raise KeyError(revision)
        return {path: entry.data for path, entry in commit.tree.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return commits
