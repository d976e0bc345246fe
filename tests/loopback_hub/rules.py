"""What the Hub refuses, and which files it wants beside git instead of in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

import yaml

INLINE_LIMIT = 10 * 1024 * 1024  # bytes a file may have inside a commit
LARGE_FILES = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst
*tfevents*
"""
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES.split())


class RefusedError(Exception):
    """An answer other than success. `code` is the X-Error-Code by which clients tell their errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository: `owner/name` of letters, digits, "-", "_" and ".", 96 at the most."""
    part = r"[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?"
    well_formed = re.fullmatch(rf"{part}/{part}", repo_id, re.ASCII) and len(repo_id) <= 96
    if not well_formed or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", ".ipynb")):
        raise RefusedError(400, f"Invalid repo name: {repo_id!r}")


def check_path(path: str, others: Iterable[str]) -> None:
    """Refuse a path that leaves the repository, or is a file where one of `others` needs a folder or the reverse."""
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..", ".git") for part in parts):
        raise RefusedError(400, f"Invalid path in repo: {path!r}")
    above = {"/".join(parts[:n]) for n in range(1, len(parts))}
    if any(other in above or other.startswith(f"{path}/") for other in others):
        raise RefusedError(400, f"{path!r} is a file and a folder at once")


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file belongs beside git: by its name, its size in bytes or a zero byte at its beginning."""
    name = path.rsplit("/", 1)[-1]
    by_name = any(fnmatch(name, pattern) for pattern in LARGE_FILES.split())
    return by_name or size > INLINE_LIMIT or b"\0" in sample[:512]


def check_inline(path: str, data: bytes) -> None:
    """Refuse what may not sit inside a commit."""
    if len(data) > INLINE_LIMIT:
        raise RefusedError(413, f"{path} is larger than 10 MiB: upload it as a large file")
    if b"\0" in data[:512]:
        raise RefusedError(400, f"Your push was rejected because it contains binary files: {path}")


def read_card(text: str) -> tuple[dict[str, Any], str | None]:
    """The metadata at the head of a README.md, and what is wrong with its YAML, or None."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n?---\s*(\r?\n|$)", text, re.DOTALL)
    if not block:
        return {}, None
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return {}, f"Invalid YAML: {error}"
    if metadata is not None and not isinstance(metadata, dict):
        return {}, "Invalid YAML: the metadata must be a mapping"
    return metadata or {}, None


def card_problems(metadata: Mapping[str, Any]) -> list[str]:
    """What the Hub finds wrong with a card's metadata: the part of its rules that touches our cards."""
    texts = ("library_name", "pipeline_tag", "license_name", "license_link")
    problems = [f'"{key}" must be a string' for key in texts if not isinstance(metadata.get(key, ""), str)]
    for key in ("tags", "license", "metrics", "datasets"):
        value = metadata.get(key, [])
        items = [value] if isinstance(value, str) and key != "tags" else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            problems.append(f'"{key}" must be a list of strings')
    index = metadata.get("model-index", [])
    if not isinstance(index, list):
        return [*problems, '"model-index" must be a list']
    for i, model in enumerate(index):
        if not model.get("name"):
            problems.append(f'"model-index[{i}].name" is required')
        for j, result in enumerate(model.get("results", [])):
            problems += _result_problems(f"model-index[{i}].results[{j}]", result)
    return problems


def _result_problems(at: str, result: Mapping[str, Any]) -> list[str]:
    required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
    problems = [f'"{at}.{a}.{b}" is required' for a, b in required if not (result.get(a) or {}).get(b)]
    for n, metric in enumerate(result.get("metrics") or []):
        if not isinstance(metric.get("type"), str):
            problems.append(f'"{at}.metrics[{n}].type" is required')
        # A numpy or torch scalar arrives here as bytes or as a list.
        if not isinstance(metric.get("value"), (int, float, str)):
            problems.append(f'"{at}.metrics[{n}].value" must be a number or a string')
    return problems
