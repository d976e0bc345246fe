"""What the code runs on: optional packages, versions, the device."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from .errors import ProcessLostError


def require(module: str, package: str, extra: str = "train") -> Any:
    """An optional module, imported where it is needed.

    Args:
        module: its full name.
        package: what pip calls its package.
        extra: of this package, which brings it along.

    Raises:
        ImportError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here: pip install {package}, or timm_lowrank[{extra}] ({error})"
        ) from error


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of Python and of those of the packages that are installed or imported, and this one's commit."""
    numbers = {"python": platform.python_version()}
    for name in packages:
        said = getattr(sys.modules.get(name), "__version__", None)  # knows the build ("+cu130"), and a clone as well
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = str(said or importlib.metadata.version(name))
    commit = git_commit()
    return numbers if commit is None else {**numbers, "commit": commit}


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone that this package is imported from, with "+" if files were changed; None elsewhere.

    That of the first call in a process, whose code it runs.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name) != Path(__file__).name:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def together(what: str, advice: str) -> Iterator[None]:
    """Turns what torch.distributed raises inside where another process has ended into one error.

    Args:
        what: the processes do together, for the message.
        advice: what to do about it.

    Raises:
        ProcessLostError: another process has ended. The one that began it says why, if anything could be said.
    """
    try:
        yield
    except RuntimeError as problem:
        if isinstance(problem, ProcessLostError):
            raise
        # gloo has no type of its own; what it raises begins with the place in its source.
        if not isinstance(problem, torch.distributed.DistError) and "/gloo/" not in str(problem):
            raise
        raise ProcessLostError(
            f"another process of this {what} has ended, or could not be reached: {advice}"
        ) from problem


def device_name(device: torch.device) -> str:
    """A device in words: the name of a GPU, or "cpu, 2 threads"."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def fast_precision(device: torch.device) -> Literal["bf16", "no"]:
    """Whether convolutions train faster in bfloat16, under autocast, or in float32 ("no") on a device.

    Of GPUs the driver knows. A CPU is tried, which takes a fraction of a second: some have instructions for bfloat16,
    others compute in float32 and convert. What is not clearly faster is not taken.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type != "cpu":
        return "no"
    with torch.random.fork_rng(devices=[]):  # its first weights are random numbers
        layer = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    images = torch.zeros(16, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()

    def seconds(half: bool) -> float:
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = layer(images).sum()
            loss.backward()
            taken.append(time.perf_counter() - began)
        return min(taken)

    with torch.enable_grad():
        return "bf16" if seconds(True) < 0.8 * seconds(False) else "no"
