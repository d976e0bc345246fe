"""The real clients turned towards a loopback hub, every other address closed to them, and the pytest fixtures.

huggingface_hub reads HF_ENDPOINT, HF_HOME and its switches once, when it is imported, and what imports it copies them
again. A process that has imported it needs every copy changed, and changed back; one that has not needs the
environment alone. `pointed_at` does both, so that a test and the processes it starts see the same hub.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import _http

from loopback_hub import LoopbackHub

PACKAGES = ("accelerate", "datasets", "huggingface_hub", "timm", "transformers")
OVERRIDES = """
HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_ASSETS_CACHE HF_XET_CACHE HF_TOKEN_PATH HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
HF_MODULES_CACHE HF_DATASETS_CACHE HUGGING_FACE_HUB_TOKEN HF_HUB_DISABLE_IMPLICIT_TOKEN SSL_CERT_FILE
"""  # variables that would win over those of `environment`


def environment(hub: LoopbackHub, home: Path) -> dict[str, str]:
    """The variables that point a fresh process to `hub`.

    The hub is also its proxy for everything else, so that a call to any other host ends in `hub.unexpected`.
    """
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": next(iter(hub.users)),
        "HF_HUB_DISABLE_XET": "1" if hub.xet_folder is None else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if hub.xet_folder is None:
        # Without certificates no other host is trusted, and a new client has not several hundred to read. hf_xet
        # refuses to start without any.
        variables["SSL_CERT_DIR"] = str(home)
    for name, value in {"ALL": hub.url, "HTTP": hub.url, "HTTPS": hub.url, "NO": "127.0.0.1,localhost"}.items():
        variables |= dict.fromkeys((f"{name}_PROXY", f"{name.lower()}_proxy"), value)
    return variables


@contextmanager
def pointed_at(hub: LoopbackHub, home: Path) -> Iterator[None]:
    """Turn this process, and those it starts meanwhile, to `hub`, with a cache of its own under `home`."""
    home.mkdir(parents=True, exist_ok=True)
    here = [constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HOME]
    there = [hub.url, str(home / "hub"), str(home)]
    with pytest.MonkeyPatch.context() as patch:
        for name in OVERRIDES.split():
            patch.delenv(name, raising=False)
        for name, value in environment(hub, home).items():
            patch.setenv(name, value)
        on = dict.fromkeys(("DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS"), True)
        switches = {"DISABLE_XET": hub.xet_folder is None, "OFFLINE": False, **on}
        for module in _client_modules():
            for name in [f"HF_HUB_{switch}" for switch in switches]:
                if name in vars(module):
                    patch.setattr(module, name, switches[name.removeprefix("HF_HUB_")])
        _only_loopback(patch, hub)
        _rebind(dict(zip(here, there, strict=True)))
        huggingface_hub.close_session()  # it holds connections, and the proxies of the environment it was made in
        try:
            yield
        finally:
            huggingface_hub.close_session()
            # This way round it also reaches modules that were imported meanwhile and copied the loopback address.
            _rebind(dict(zip(there, here, strict=True)))


def _client_modules() -> list[types.ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in PACKAGES]


def _rebind(names: dict[str, str]) -> None:
    """Replace an address or a folder wherever a module of the clients has it, alone or as the beginning of more."""

    def renamed(text: str) -> str:
        for old, new in names.items():
            if text == old or text.startswith((f"{old}/", f"{old}{os.sep}")):
                return new + text[len(old) :]
        return text

    kinds = (str, type(Path()))
    for module in _client_modules():
        for name, value in list(vars(module).items()):
            if (kind := type(value)) in kinds:
                # The default address stays what it is: the clients compare with it.
                if not name.startswith(("__", "_HF_DEFAULT")) and (text := renamed(str(value))) != str(value):
                    setattr(module, name, kind(text))
            elif isinstance(value, HfApi):
                value.endpoint = renamed(value.endpoint)


def _only_loopback(patch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    """Refuse to look up or connect to anything but this machine, and tell the hub of it."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: object) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", "localhost", "::1") and not str(name).startswith("127."):
            hub.unexpected.append(f"a connection to {name}")
            raise ConnectionRefusedError(f"tests may not connect to {name}")

    def checked(method: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return method(self, address)

        return call

    def lookup(host: Any, *arguments: Any, **options: Any) -> Any:
        check(host)
        return getaddrinfo(host, *arguments, **options)

    patch.setattr(socket.socket, "connect", checked(connect))
    patch.setattr(socket.socket, "connect_ex", checked(connect_ex))
    patch.setattr(socket, "getaddrinfo", lookup)


# ---------------------------------------------------------------------------------------------------------- fixtures


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
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the client would have waited before its retries; it retries at once instead."""
    seconds: list[float] = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": seconds.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return seconds


def _serve(folder: Path, hub: LoopbackHub) -> Iterator[LoopbackHub]:
    with hub, pointed_at(hub, folder / "home"):
        yield hub
    assert not hub.unexpected, "the loopback hub was asked for what it does not have:\n" + "\n".join(hub.unexpected)
    idle = [fault for fault in hub.faults if not fault.hits]
    assert not idle, f"these failures were asked for and never happened: {idle}"
