"""Files: whole or not at all, named by what is in them, and one clear error where the disk does not play along."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointDamagedError, CheckpointError, RunError

# In the folder of a training run: its recipe, and the folder of the network (see timm_lowrank.training.run).
RUN_CONFIG, RUN_MODEL = "config.yaml", "model"
ASIDE = ".writing-"  # what is prepared lies beside its place in a folder of such a name

# ---------------------------------------------------------------------------------------------------------- writing


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is there whole or not at all, even after a loss of power; text as UTF-8.

    Of several processes that write it at once one comes after the other.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _own(partial) as file:
        try:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no open file
                file.close()
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextlib.contextmanager
def _own(path: Path) -> Iterator[BinaryIO]:
    """An empty file at `path`, which no other process that asks for it has meanwhile; a killed one may have left it.

    Where the platform or the file system has no locks, nobody is kept out.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        with path.open("wb") as file:
            yield file
        return
    while True:
        with path.open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
                # Whoever had it has renamed or removed it: this one is another file by now, or a finished one.
                is_there = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except FileNotFoundError:
                is_there = False
            except OSError:
                is_there = True
            if is_there:
                file.truncate(0)
                yield file
                return


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder where these can be asked, would outlast a loss of power."""
    folder = path.is_dir()
    try:
        # Windows waits for no file that is open for reading alone.
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:  # Windows opens none
            return
        handle = os.open(path, os.O_RDONLY)  # a copy of a file that nobody may write to
    try:
        os.fsync(handle)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(folder: Path, taken: Exception) -> Iterator[None]:
    """Keeps out of a folder every other process that asks for the same, until the block or this process ends.

    Where the platform or the file system has no locks, nobody is kept out.

    Args:
        folder: exists. A file ".lock" lies in it meanwhile, and after a kill until the next time.
        taken: is raised if another process is inside.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    path = folder / ".lock"
    while True:
        file = path.open("w")
        try:
            # Of this process alone: a lock that forked workers share would outlast a kill for as long as they do.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise taken from None
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):  # the one before may just have removed the file
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Marks a folder as in use until the block or this process ends; see `is_abandoned`."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def is_abandoned(folder: Path) -> bool:
    """Whether the process is dead that has `taken` a folder; where there are no locks nothing is said to be."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


@contextlib.contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well.

    After an error or a kill, whenever it comes, `folder` is as it was or the new one; where the system cannot exchange
    two names at once, a kill between two renames leaves neither. What killed calls left beside it is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=ASIDE))
    with taken(aside):
        try:
            new = aside / "new"
            new.mkdir()
            yield new
            for path in (*new.rglob("*"), new):
                sync(path)
            if not folder.exists():
                os.replace(new, folder)
            elif not _exchanged(new, folder):
                os.replace(folder, aside / "old")
                try:
                    os.replace(new, folder)
                except OSError:
                    os.replace(aside / "old", folder)
                    raise
            sync(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    for left in folder.parent.glob(f"{ASIDE}*"):
        if is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def is_new(folder: Path) -> bool:
    """Whether there is nothing at `folder`, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def new_folder(folder: Path, last: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder to write into, whose content is in `folder` when the block ends well.

    Where there is nothing, `folder` appears whole, with one rename. An empty folder stays the one that it is, since the
    current one, or one where a disk is mounted, cannot be replaced: the content moves into it, and after an error it is
    empty again.

    Args:
        folder: `is_new`; a link is followed.
        last: names of files that move last, without which nobody takes the others for the whole.
    """
    target = Path(os.path.realpath(folder))
    inside = target.is_dir()
    parent = target if inside else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=ASIDE) as aside:
        new = Path(aside) / "new"
        new.mkdir()
        yield new
        if inside:
            _move_into(new, target, last)
        else:
            os.replace(new, target)


def _move_into(source: Path, target: Path, last: Collection[str]) -> None:
    """Moves everything in one folder into another one; after an error nothing."""
    names = sorted((entry.name for entry in source.iterdir()), key=lambda name: (name in last, name))
    moved: list[str] = []
    try:
        for name in names:
            os.replace(source / name, target / name)
            moved.append(name)
    except BaseException:
        for name in reversed(moved):
            os.replace(target / name, source / name)
        raise


def _exchanged(one: Path, two: Path) -> bool:
    """Exchanges two names at one moment, if the system can: Python has no call for it."""
    names = os.fsencode(one), os.fsencode(two)
    with contextlib.suppress(AttributeError):  # an older system
        if sys.platform == "linux":
            current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            return bool(ctypes.CDLL(None).renameat2(current, names[0], current, names[1], exchange) == 0)
        if sys.platform == "darwin":
            return bool(ctypes.CDLL(None).renamex_np(*names, 2) == 0)  # RENAME_SWAP
    return False


@contextlib.contextmanager
def disk_errors(
    action: str,
    advice: str = "Choose another folder with --output.",
    error: type[Exception] = RunError,
) -> Iterator[None]:
    """Turns what a full or unwritable disk raises inside into `error`. torch and safetensors have types of their own.

    Args:
        action: what was being done, for the message.
        advice: what to do about it.
        error: the type to raise; one that is raised inside passes as it is.
    """
    try:
        yield
    except error:
        raise
    except (OSError, RuntimeError, SafetensorError) as problem:
        if isinstance(problem, OSError) and problem.strerror:
            reason = problem.strerror
        else:
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise error(f"{action}: {reason}. {advice}") from problem


# ---------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path, error: type[Exception] = CheckpointError, limit: int = 16 << 20) -> dict[str, Any]:
    """A JSON file of at most `limit` bytes that holds an object: parsed, a byte may take twenty.

    Raises:
        CheckpointDamagedError: it is not valid JSON.
        CheckpointError: it cannot be read, or holds something else. Another type that is given is raised for all.
    """
    damaged = CheckpointDamagedError if error is CheckpointError else error
    try:
        if (size := path.stat().st_size) > limit:
            raise error(f"{path} has {size:,} bytes, and no such file has more than {limit:,}: it was exchanged")
        content = json.loads(path.read_text(encoding="utf-8"))
    except error:
        raise
    except (ValueError, RecursionError) as problem:
        raise damaged(f"{path} is not valid JSON ({problem}): it was damaged; fetch it again") from problem
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """YAML in which 5e-4 is a number (YAML 1.1, and with it PyYAML, takes it for a string), and a key stands once.

    Raises:
        yaml.YAMLError: it is not valid YAML, or a key is given twice (PyYAML takes the last one); in one line.
    """
    import yaml  # not at the top: reading weights does not need it

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        raise yaml.MarkedYAMLError(
                            problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                        )
                    seen.add((key.tag, key.value))
            return node

    number = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, error.problem or error.context or "it cannot be read"
        raise yaml.YAMLError(f"{what}, line {mark.line + 1}, column {mark.column + 1}" if mark else what) from error
    except yaml.YAMLError as error:
        raise yaml.YAMLError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise yaml.YAMLError("lists and mappings inside each other, too many to follow") from error
    except ValueError as error:  # of a date such as 2024-99-99
        raise yaml.YAMLError(str(error)) from error


# ----------------------------------------------------------------------------------------------------------- hashes


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes, dtypes and bytes of a state dict, 64 hexadecimal digits.

    The same network has the same one, whatever file, format or order its tensors were stored in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
