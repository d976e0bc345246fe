"""What the code runs on: optional packages, versions, the device."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable
from typing import Any

import torch


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
        raise ImportError(f"{module} is needed here: pip install {package}, or timm_lowrank[{extra}]") from error


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of Python and of those of the packages that are installed or imported."""
    numbers = {"python": platform.python_version()}
    for name in packages:
        said = getattr(sys.modules.get(name), "__version__", None)  # knows the build ("+cu130"), and a clone as well
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = str(said or importlib.metadata.version(name))
    return numbers


def device_name(device: torch.device) -> str:
    """A device in words: the name of a GPU, or "cpu, 2 threads"."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
