"""The endpoints that change nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from loopback_hub import xet
from loopback_hub.content import git_oid
from loopback_hub.protocol import REPO, REVISION, STORAGE, Answer, Request, commit_of, readable, route, writable
from loopback_hub.rules import RefusedError, card_problems, read_card

if TYPE_CHECKING:
    from loopback_hub.state import LoopbackHub


@route("GET", "/api/whoami-v2")
def whoami(hub: LoopbackHub, request: Request) -> Answer:
    if request.user is None:
        raise RefusedError(401, "Invalid username or password.")
    role = "write" if request.may_write else "read"
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return Answer.of_json({"type": "user", "id": request.user, "name": request.user, "orgs": [], "auth": token})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: LoopbackHub, request: Request) -> Answer:
    return Answer.of_json({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Answer:
    metadata, error = read_card(request.json()["content"])
    problems = [error] if error else card_problems(metadata)
    status = 400 if problems else 200
    if request.headers.get("Accept") == "text/plain":
        return Answer("\n".join(problems).encode(), status, {"Content-Type": "text/plain"})
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer.of_json({"errors": [{"message": p} for p in problems], "warnings": warnings}, status)


@route("GET", rf"/api/models/{REPO}(?:/revision/{REVISION})?")
def model_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str = "main") -> Answer:
    repo = readable(hub, request, repo_id)
    commit = commit_of(repo, revision)
    card = read_card(commit.tree["README.md"].data.decode())[0] if "README.md" in commit.tree else {}
    siblings: list[dict[str, Any]] = []
    for path, entry in sorted(commit.tree.items()):
        siblings.append({"rfilename": path})
        if request.query.get("blobs", "").lower() in ("true", "1"):
            row = entry.describe(path)
            siblings[-1].update(size=row["size"], blobId=row["oid"])
            if entry.lfs:
                siblings[-1]["lfs"] = {**row["lfs"], "sha256": entry.sha256}
    info = {
        "_id": git_oid(repo.id.encode())[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.sha,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": repo.history()[-1].date,
        "lastModified": commit.date,
        "tags": list(card.get("tags") or []),
        "cardData": card,
        "siblings": siblings,
    }
    info.update({key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card})
    return Answer.of_json(info)


@route("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?")
def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str, folder: str = "") -> Answer:
    commit = commit_of(readable(hub, request, repo_id), revision)
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    base = f"{folder}/" if folder else ""
    inside = {path.removeprefix(base): entry for path, entry in sorted(commit.tree.items()) if path.startswith(base)}
    if folder and not inside:
        raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    folders: dict[str, None] = {}  # an ordered set
    files = []
    for path, entry in inside.items():
        parts = path.split("/")
        folders |= dict.fromkeys(
            base + "/".join(parts[:n]) for n in range(1, len(parts) if recursive else min(2, len(parts)))
        )
        if recursive or len(parts) == 1:
            files.append(entry.describe(base + path))
    rows = [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode(), "tree")} for path in folders]
    return Answer.of_json(rows + files)


@route("POST", rf"/api/models/{REPO}/paths-info/{REVISION}")
def paths_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    commit = commit_of(readable(hub, request, repo_id), revision)
    paths = parse_qs(request.body.decode())["paths"]  # the client sends this one as a form
    return Answer.of_json([commit.tree[path].describe(path) for path in paths if path in commit.tree])


@route("GET", rf"/api/models/{REPO}/refs")
def refs(hub: LoopbackHub, request: Request, repo_id: str) -> Answer:
    repo = readable(hub, request, repo_id)

    def rows(kind: str) -> list[dict[str, str]]:
        names = {name.removeprefix(f"refs/{kind}/"): name for name in repo.refs if name.startswith(f"refs/{kind}/")}
        return [{"name": name, "ref": full, "targetCommit": repo.refs[full]} for name, full in names.items()]

    return Answer.of_json({"branches": rows("heads"), "tags": rows("tags"), "converts": []})


@route("GET", rf"/api/models/{REPO}/commits/{REVISION}")
def commits(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Answer:
    repo = readable(hub, request, repo_id)
    commit_of(repo, revision)
    history = repo.history(revision)
    return Answer.of_json(
        [
            {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in history
        ]
    )


@route("GET", rf"/{REPO}/(?:resolve|raw)/{REVISION}/(?P<path>.+)")
def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Answer:
    """A file; for a large one, where to fetch it: on the storage's origin, to which no token goes."""
    commit = commit_of(readable(hub, request, repo_id), revision)
    headers = {"X-Repo-Commit": commit.sha}
    entry = commit.tree.get(path)
    if entry is None:
        # With the commit in it, so that the client can remember that this file does not exist.
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    if not entry.lfs:
        return Answer(entry.data, headers={**headers, "ETag": f'"{entry.oid}"'}, is_file=True)
    headers |= {"ETag": f'"{entry.sha256}"', "X-Linked-Etag": f'"{entry.sha256}"'}
    headers |= {"X-Linked-Size": str(len(entry.data)), "Location": f"{hub.storage_url}/blobs/{entry.sha256}"}
    chunked = xet.hashes(hub.xet_folder).get(entry.sha256) if hub.xet_folder else None
    if chunked:
        auth = f'<{hub.url}/api/models/{repo_id}/xet-read-token/{commit.sha}>; rel="xet-auth"'
        headers |= {"X-Xet-Hash": chunked[0], "Link": auth}
    return Answer(status=302, headers=headers)


@route("GET", rf"/api/models/{REPO}/xet-(?P<kind>read|write)-token/{REVISION}")
def xet_token(hub: LoopbackHub, request: Request, repo_id: str, kind: str, revision: str) -> Answer:
    (writable if kind == "write" else readable)(hub, request, repo_id)
    if hub.xet_folder is None:
        hub.unexpected.append("a client wants Xet of a hub without it; its HF_HUB_DISABLE_XET is not set")
        raise RefusedError(404, "There is no Xet here")
    url, expires = f"local://{hub.xet_folder}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Token-Expiration": str(expires), "X-Xet-Access-Token": "xet"}
    return Answer.of_json({"casUrl": url, "exp": expires, "accessToken": "xet"}, headers=headers)


@route("GET", r"/blobs/(?P<sha256>[0-9a-f]{64})", STORAGE)
def get_blob(hub: LoopbackHub, request: Request, sha256: str) -> Answer:
    blob = hub.blob(sha256)
    if blob is None:
        raise RefusedError(404, f"There is no file {sha256}")
    return Answer(blob, headers={"ETag": f'"{sha256}"'}, is_file=True)
