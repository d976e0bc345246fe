"""The Hugging Face Hub: fetching a checkpoint, and what goes wrong on the way in words that help."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError, CheckpointWriteError
from .files import CHECKPOINT_FILES, NETWORK_CONFIG, NETWORK_WEIGHTS, PICKLES, checked_name, no_weights

_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="
_STATUS = {
    401: f"the Hub does not accept the token: {_LOG_IN}",
    402: "the Hub asks for a paid plan for this",
    403: "this token has no permission for it: use a token with the write role, of an account that may write there",
    409: "it exists already",
    412: "the repository has changed in the meantime: run it again to build on its new state",
    413: "the Hub refuses the size of it",
    429: "too many requests: wait some minutes and run it again",
}
_AGAIN = {
    "fetch": "run it again: what has arrived is kept and not fetched twice",
    "publish": "run it again: files become visible together, with one commit, so nothing is half published, and what "
    "was uploaded is not sent twice",
}


def checked_repo_id(name: str, hint: str = "") -> str:
    """`name`, if it can be that of a repository on the Hub.

    Raises:
        CheckpointError: it has not the form USER/NAME, or signs that the Hub does not allow.
    """
    reason = "the name of a repository has the form USER/NAME"
    if name.count("/") == 1:
        try:
            validate_repo_id(name)
            return name
        except HFValidationError as error:
            reason = str(error).removesuffix(f": '{name}'.")
    raise CheckpointError(f"{name!r} is no repository: {reason}" + f"; {hint}" * bool(hint))


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = CHECKPOINT_FILES,
    force: bool = False,
) -> Path:
    """Fetches files of one commit of a repository; those that were fetched before are not fetched again.

    Without a connection, a commit that was fetched before is taken from the cache.

    Args:
        repo_id: as USER/NAME.
        revision, token, cache_dir: as for `from_pretrained`.
        names: the files, those of a checkpoint by default; ones that the repository does not have are left out.
            None fetches everything but pickles.
        force: fetch again what is in the cache.

    Returns:
        The folder with the files, in huggingface_hub's cache: not to be written to.

    Raises:
        CheckpointError: no such repository, revision or connection; or it is no checkpoint.
    """
    checked_repo_id(repo_id)
    api = HfApi(token=token)
    with hub_errors("fetch", repo_id, revision):
        if names is None:
            for name in _listed(api, repo_id, revision):
                checked_name(name)
        fetched = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            # These are patterns, and a name may hold signs that mean something in one.
            allow_patterns=None if names is None else [glob.escape(checked_name(name)) for name in names],
            ignore_patterns=[f"*{suffix}" for suffix in PICKLES],
            force_download=force,
        )
    folder = Path(fetched)
    if names is None or NETWORK_WEIGHTS in names:
        if not (folder / NETWORK_CONFIG).is_file():
            raise CheckpointError(f"{repo_id} holds no {NETWORK_CONFIG}, so it is no checkpoint in timm's layout")
        if not (folder / NETWORK_WEIGHTS).is_file():
            with hub_errors("fetch", repo_id, revision):
                held = api.list_repo_files(repo_id, revision=revision)
            raise CheckpointError(no_weights(repo_id, sorted(name for name in held if name.endswith(PICKLES))))
    return folder


def _listed(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    """The files of a repository; none where the Hub does not answer, and only the cache may hold it."""
    try:
        return list(api.list_repo_files(repo_id, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (HTTPError, OSError):  # what it was is said by `snapshot_download` if the cache does not hold it
        return []


def holds(repo_id: str, name: str, *, revision: str | None = None, token: str | None = None) -> bool | None:
    """Whether a repository has a file; None where the Hub does not answer."""
    try:
        return HfApi(token=token).file_exists(repo_id, name, revision=revision)
    except (HTTPError, OSError, ValueError):
        return None


@contextlib.contextmanager
def hub_errors(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """A block of requests: what huggingface_hub, the connection or the disk raise comes out as one CheckpointError.

    Args:
        doing: "fetch" or "publish".
        repo_id, revision: for the message.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (HFValidationError, HTTPError, OSError, RuntimeError, ValueError) as error:
        kind = CheckpointWriteError if _is_of_the_disk(error) else CheckpointError
        raise kind(f"cannot {doing} {repo_id}: {_explanation(error, doing, revision)}") from error


def _is_of_the_disk(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in (*full, errno.EACCES, errno.EPERM, errno.EROFS)


def _explanation(error: Exception, doing: str, revision: str | None) -> str:
    while isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(
        error.__cause__, HTTPError | OSError
    ):
        error = error.__cause__  # what kept it from the Hub, or broke an upload off
    said = str(getattr(error, "server_message", None) or error).strip().split("\n")[0]
    if isinstance(error, GatedRepoError):
        return f"its owner has to grant access: accept the conditions on its page, then {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and not yours to see: check the name; {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}: give one of its branches, tags or commits"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = _STATUS.get(status) or ("the Hub failed" if status >= 500 else "the Hub refused")
        return f"{known} (status {status}: {said})" + f"; {_AGAIN[doing]}" * (status >= 500)
    if _is_of_the_disk(error):
        return f"{error}: free some space on the disk or choose another cache_dir, and {_AGAIN[doing]}"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "there is no connection to the Hub, or HF_HUB_OFFLINE is set, and the cache does not hold it"
    if isinstance(error, HTTPError | OSError):
        return f"the connection broke ({type(error).__name__}: {said}); {_AGAIN[doing]}"
    return " ".join(str(error).split())
