"""The endpoints that make repositories, branches and tags, and those through which files come in, in their order."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from loopback_hub.content import Entry, git_oid
from loopback_hub.protocol import REPO, REVISION, STORAGE, Answer, Request, commit_of, route, writable, writer
from loopback_hub.rules import RefusedError, check_inline, check_path, check_repo_id, is_large

if TYPE_CHECKING:
    from loopback_hub.state import LoopbackHub


@route("POST", "/api/repos/create")
def create_repo(hub: LoopbackHub, request: Request) -> Answer:
    asked = request.json()
    if asked.get("type", "model") != "model":
        raise RefusedError(400, "This hub keeps models alone")
    owner = asked.get("organization") or request.user
    writer(request, owner)
    repo_id = f"{owner}/{asked['name']}"
    check_repo_id(repo_id)
    url = f"{hub.url}/{repo_id}"
    if repo_id in hub.repos:
        return Answer.of_json({"error": "You already created this model repo", "url": url}, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.create(repo_id, private=private)
    return Answer.of_json({"url": url, "name": repo_id, "id": git_oid(repo_id.encode())[:24]})


@route("POST", rf"/api/models/{REPO}/(?P<kind>branch|tag)/{REVISION}")
def create_ref(hub: LoopbackHub, request: Request, repo_id: str, kind: str, revision: str) -> Answer:
    repo, asked = writable(hub, request, repo_id), request.json()
    if kind == "branch":
        name, start = f"refs/heads/{revision}", asked.get("startingPoint") or "main"
    else:
        name, start = f"refs/tags/{asked['tag']}", revision
    if name in repo.refs:
        raise RefusedError(409, f"Reference {name} already exists")
    repo.refs[name] = commit_of(repo, start).sha
    return Answer.of_json({})


@route("DELETE", rf"/api/models/{REPO}/(?P<kind>branch|tag)/{REVISION}")
def delete_ref(hub: LoopbackHub, request: Request, repo_id: str, kind: str, revision: str) -> Answer:
    repo = writable(hub, request, repo_id)
    if repo.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{revision}", None) is None:
        raise RefusedError(404, f"There is no {kind} {revision}", "RevisionNotFound")
    return Answer.of_json({})


@route("POST", rf"/api/models/{REPO}/preupload/{REVISION}")
def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    """Which files go into the commit and which beside it, and what is there already under their names."""
    known, asked = commit_of(writable(hub, request, repo_id), revision).tree, request.json()
    ignored = [line.strip().strip("/") for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
    rows = []
    for file in asked["files"]:
        path = file["path"]
        large = is_large(path, file["size"], base64.b64decode(file.get("sample") or ""))
        ignore = any(fnmatch(path, pattern) or fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in ignored)
        entry = known.get(path)
        oid = None if entry is None else entry.sha256 if entry.lfs else entry.oid
        mode = "lfs" if large else "regular"
        rows.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
    return Answer.of_json({"files": rows})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    """Where to upload each large file; nowhere, if it is here already."""
    writable(hub, request, repo_id)
    rows: list[dict[str, Any]] = []
    for wanted in request.json()["objects"]:
        sha256, size = wanted["oid"], wanted["size"]
        rows.append({"oid": sha256, "size": size})
        if not re.fullmatch("[0-9a-f]{64}", sha256) or size < 0:
            rows[-1]["error"] = {"code": 422, "message": "not a sha256 and a size"}
        elif sha256 not in hub.blobs:
            hub.announced[sha256] = size
            upload, verify = f"{hub.storage_url}/blobs/{sha256}", f"{hub.url}/api/models/{repo_id}/verify/{sha256}"
            rows[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
    return Answer.of_json({"transfer": "basic", "objects": rows})


@route("PUT", r"/blobs/(?P<sha256>[0-9a-f]{64})", STORAGE)
def put_blob(hub: LoopbackHub, request: Request, sha256: str) -> Answer:
    hub.store(sha256, request.body)
    return Answer()


@route("POST", rf"/api/models/{REPO}/verify/(?P<sha256>\w+)")
def lfs_verify(hub: LoopbackHub, request: Request, repo_id: str, sha256: str) -> Answer:
    writable(hub, request, repo_id)
    if len(hub.blobs.get(sha256, b"")) != request.json()["size"]:
        raise RefusedError(404, f"{sha256} was not uploaded")
    return Answer.of_json({})


@route("POST", rf"/api/models/{REPO}/commit/{REVISION}")
def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    """One commit from lines of JSON: a header, then what changes. All of it or nothing."""
    repo = writable(hub, request, repo_id)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"] if lines and lines[0]["key"] == "header" else {}
    if not header.get("summary"):
        raise RefusedError(400, "A commit begins with a header that has a summary")
    head, branch = commit_of(repo, revision), f"refs/heads/{revision}"
    if branch not in repo.refs:
        raise RefusedError(400, f"{revision} is not a branch")
    if not head.sha.startswith(header.get("parentCommit") or ""):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.tree)
    for line in lines[1:]:
        _apply(hub, files, line["key"], line["value"])
    new = repo.add_commit(branch, files, header["summary"], header.get("description") or "", str(request.user))
    url = f"{hub.url}/{repo_id}/commit/{new.sha}"
    return Answer.of_json({"success": True, "commitOid": new.sha, "commitUrl": url, "hookOutput": ""})


def _apply(hub: LoopbackHub, files: dict[str, Entry], key: str, value: Mapping[str, Any]) -> None:
    path = value["path"].rstrip("/") if key == "deletedFolder" else value["path"]
    check_path(path, files if key in ("file", "lfsFile") else ())
    if key == "file":
        encoded = value.get("encoding") == "base64"
        data = base64.b64decode(value["content"], validate=True) if encoded else value["content"].encode()
        check_inline(path, data)
        files[path] = Entry(data)
    elif key == "lfsFile":
        blob = hub.blob(value["oid"]) if value.get("algo") == "sha256" else None
        if blob is None or value.get("size", len(blob)) != len(blob):
            raise RefusedError(400, f"An LFS pointer points to a file that does not exist: {value['oid']}")
        files[path] = Entry(blob, lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise RefusedError(404, f"There is no file {path}", "EntryNotFound")
    elif key == "deletedFolder":
        gone = [other for other in files if other.startswith(f"{path}/")]
        if not gone:
            raise RefusedError(404, f"There is no folder {path}", "EntryNotFound")
        for other in gone:
            del files[other]
    else:
        hub.unexpected.append(f"no such operation in a commit: {key}")
        raise RefusedError(400, f"Unknown operation {key}")
