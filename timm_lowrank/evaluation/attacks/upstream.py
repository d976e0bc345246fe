"""The package that AutoAttack comes from: which one is installed, and what its calls would leave behind."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..pixels import random_state_kept

PACKAGES = ("pyautoattack", "autoattack")  # the same algorithms and the same bits; their drivers are called differently


def find_package() -> tuple[ModuleType, ModuleType, str]:
    """The installed package, its module of checks, and its name with version."""
    for name in PACKAGES:
        try:
            package, checks = importlib.import_module(name), importlib.import_module(f"{name}.checks")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != name:
                raise
            continue
        try:
            return package, checks, f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return package, checks, name
    raise ImportError("AutoAttack needs pyautoattack: pip install 'timm_lowrank[evaluate]'")


@contextmanager
def restored(checks: ModuleType) -> Iterator[None]:
    """The package seeds the global generators, switches tracing off, and counts calls from one run to the next."""
    tracer = sys.gettrace()
    counts = dict(checks.funcs)
    try:
        checks.funcs.update(dict.fromkeys(counts, 0))
        with random_state_kept():
            yield
    finally:
        checks.funcs.update(counts)
        sys.settrace(tracer)


class Flags:
    """In the place of the package's logger: keeps its warnings, each once, and drops its progress."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def add(self, text: str) -> None:
        text = text.removesuffix(" See flags_doc.md for details.").strip()
        self._texts.setdefault(re.sub(r"\d+", "#", text), text)  # the same of another batch has other counts

    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts.values())

    def warning(self, text: str) -> None:  # pyautoattack
        self.add(text)

    def log(self, text: str) -> None:  # autoattack, which logs progress in the same way
        if text.startswith("Warning: "):
            self.add(text.removeprefix("Warning: "))

    def debug(self, text: str) -> None:
        pass

    info = debug
