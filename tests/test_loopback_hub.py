"""The loopback hub: it is the only one there is, and leaves no trace.

That it stores, refuses and fails as asked is shown by test_hub_library and test_hub_scripts.
"""

import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session, hf_api
from loopback_hub import LoopbackHub
from loopback_hub.clients import pointed_at

UNKNOWN_BLOB = f"/blobs/{'0' * 64}"


def test_what_no_client_should_ask_for_is_recorded(hub):
    assert get_session().get(f"{hub.url}/api/datasets/alice/data").status_code == 404
    assert (
        get_session().get(hub.storage_url + UNKNOWN_BLOB, headers={"Authorization": "Bearer hf_alice"}).status_code
        == 400
    )
    with socket.socket() as plain, pytest.raises(ConnectionRefusedError):
        plain.connect(("192.0.2.1", 443))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("example.org", 443), timeout=1)
    with pytest.raises(Exception, match="404"):
        get_session().get("https://example.org/")
    assert hub.unexpected == [
        "no such endpoint: GET /api/datasets/alice/data",
        f"a token was sent to the storage: GET {UNKNOWN_BLOB}",
        "a connection to 192.0.2.1",
        "a connection to example.org",
        "no such endpoint: CONNECT example.org:443",
    ]
    hub.unexpected.clear()


@pytest.mark.parametrize("broken", ["hub.unexpected.append('GET /nowhere')", "hub.fail('GET', 'nowhere', status=500)"])
def test_the_fixture_fails_a_test_for_what_it_left_unsaid(tmp_path, broken):
    (tmp_path / "conftest.py").write_text("from loopback_hub.clients import hub\n")
    (tmp_path / "test_it.py").write_text(f"def test_it(hub):\n    {broken}\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 passed, 1 error" in done.stdout
    assert "nowhere" in done.stdout


def test_the_process_is_left_as_it_was(tmp_path, monkeypatch):
    def state():
        texts = {name: value for name, value in vars(constants).items() if isinstance(value, (str, bool))}
        return texts, hf_api.api.endpoint, dict(os.environ), socket.socket.connect, socket.getaddrinfo

    before = state()
    with LoopbackHub() as hub, pointed_at(hub, tmp_path):
        assert constants.HUGGINGFACE_CO_URL_TEMPLATE.startswith(hub.url)
        assert Path(constants.HF_HUB_CACHE) == tmp_path / "hub"
        late = types.ModuleType("huggingface_hub.late")  # as if imported just now, with a copy of its own
        late.ENDPOINT, late.CACHE = constants.ENDPOINT, Path(constants.HF_HUB_CACHE)
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert (late.ENDPOINT, str(late.CACHE)) == (constants.ENDPOINT, constants.HF_HUB_CACHE)
    assert state() == before


def test_a_child_process_sees_the_same_hub(hub):
    hub.seed("alice/tiny", {"config.json": "{}"})
    code = (
        "import huggingface_hub as h, urllib.request as u\n"
        "print(h.hf_hub_download('alice/tiny', 'config.json'))\n"
        "try: u.urlopen('https://example.org/')\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert done.startswith(f"{constants.HF_HUB_CACHE}/")
    assert "404" in done
    assert hub.unexpected.pop() == "no such endpoint: CONNECT example.org:443"
