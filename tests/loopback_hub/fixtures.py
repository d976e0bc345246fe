"""The pytest fixtures; `tests/conftest.py` imports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_hub.clients import pointed_at, without_waiting
from loopback_hub.state import LoopbackHub


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A new, empty hub to which this process and its children speak as alice, without Xet; see `loopback_hub`.

    The test fails at its end if a client asked for something that is not there, or if a `hub.fail` never struck.
    """
    yield from _serve(tmp_path_factory.mktemp("hub"), LoopbackHub())


@pytest.fixture
def xet_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """The same with Xet, as clients that have hf_xet use it by default: large files never touch HTTP."""
    pytest.importorskip("hf_xet")
    folder = tmp_path_factory.mktemp("hub")
    yield from _serve(folder, LoopbackHub(xet_folder=folder / "xet"))


@pytest.fixture
def waits() -> Iterator[list[float]]:
    """The seconds for which the client would have waited before its retries; it retries at once instead."""
    with without_waiting() as seconds:
        yield seconds


def _serve(folder: Path, hub: LoopbackHub) -> Iterator[LoopbackHub]:
    with hub, pointed_at(hub, folder / "home"):
        yield hub
    assert not hub.unexpected, "the loopback hub was asked for what it does not have:\n" + "\n".join(hub.unexpected)
    idle = [fault for fault in hub.faults if not fault.hits]
    assert not idle, f"these failures were asked for and never happened: {idle}"
