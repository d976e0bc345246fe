"""What the loopback hub does on its own: what it refuses and records, and how it takes the real one's place."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_session, hf_api, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from loopback_hub import LoopbackHub
from loopback_hub.clients import pointed_at

REPO = "alice/tiny"
BLOB = "/blobs/"
TOKEN = {"Authorization": "Bearer hf_alice"}


@pytest.fixture
def repo(hub):
    """A repository with a text, a text in a folder, and a file that git does not keep."""
    return hub.seed(REPO, {"config.json": "{}", "plots/spectrum.txt": "1 2 3", "model.safetensors": bytes(range(250))})


def commit(hub, *lines):
    """The status of a commit as no client would send it."""
    body = "\n".join(json.dumps(line) for line in ({"key": "header", "value": {"summary": "raw"}}, *lines))
    return get_session().post(f"{hub.url}/api/models/{REPO}/commit/main", content=body, headers=TOKEN).status_code


@pytest.mark.parametrize("name", ["a--b", "a..b", "-a", "a.", "a b", "a.git", "x" * 97, "ü"])
def test_bad_repo_names_are_refused_by_client_and_server(hub, name):
    with pytest.raises((HFValidationError, HfHubHTTPError)):
        HfApi().create_repo(f"alice/{name}")
    assert get_session().post(f"{hub.url}/api/repos/create", json={"name": name}, headers=TOKEN).status_code == 400
    assert not hub.repos


PATHS = """
../out.txt /etc/passwd a/../../out.txt a//b a/./b .git/config a\\b config.json/b plots
"""


@pytest.mark.parametrize("path", ["", *PATHS.split()])
def test_paths_that_are_none_are_refused(hub, repo, path):
    before = repo.files()
    good, bad = ({"key": "file", "value": {"path": p, "content": "x"}} for p in ("good.txt", path))
    assert commit(hub, good, bad) == 400
    assert repo.files() == before  # not even the good one


@pytest.mark.parametrize(("content", "status"), [("x" * (10 << 20), 200), ("x" * (10 << 20) + "x", 413), ("a\0b", 400)])
def test_what_belongs_beside_a_commit_may_not_come_in_it(hub, repo, content, status):
    assert commit(hub, {"key": "file", "value": {"path": "a.txt", "content": content}}) == status
    assert ("a.txt" in repo.files()) == (status == 200)


def test_a_pointer_to_what_was_not_uploaded_is_refused(hub, repo):
    data = repo.files()["model.safetensors"]
    value = {"path": "w.pt", "algo": "sha256", "oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert commit(hub, {"key": "lfsFile", "value": {**value, "size": 3}}) == 400
    assert commit(hub, {"key": "lfsFile", "value": {**value, "oid": "0" * 64}}) == 400
    assert commit(hub, {"key": "lfsFile", "value": value}) == 200


@pytest.mark.parametrize("wrong", ["size", "sha256", "unannounced"])
def test_the_storage_checks_what_it_is_given(hub, wrong):
    hub.seed(REPO, {})
    data, sha256 = b"content", hashlib.sha256(b"content").hexdigest()
    asked = {"objects": [{"oid": sha256, "size": len(data)}]}
    if wrong != "unannounced":
        get_session().post(f"{hub.url}/{REPO}.git/info/lfs/objects/batch", json=asked, headers=TOKEN)
    sent = {"size": data + b"!", "sha256": b"CONTENT", "unannounced": data}[wrong]
    status = get_session().put(f"{hub.storage_url}{BLOB}{sha256}", content=sent).status_code
    assert status == (403 if wrong == "unannounced" else 400)
    assert not hub.blobs


def test_ranges(hub, repo):
    data = repo.files()["model.safetensors"]
    url = f"{hub.storage_url}{BLOB}{hashlib.sha256(data).hexdigest()}"

    def get(wanted):
        answer = get_session().get(url, headers={"Range": wanted})
        return answer.status_code, answer.headers.get("Content-Range"), answer.content

    size = len(data)
    assert get("bytes=5-9") == (206, f"bytes 5-9/{size}", data[5:10])
    assert get("bytes=100-") == (206, f"bytes 100-{size - 1}/{size}", data[100:])
    assert get(f"bytes={size}-") == (416, f"bytes */{size}", b"")


def test_seed_holds_what_no_client_could_push(hub):
    repo = hub.seed("bob/odd", {"../out.txt": "x", "model.safetensors": b"short"})
    assert repo.files()["../out.txt"] == b"x"
    assert Path(hf_hub_download("bob/odd", "model.safetensors")).read_bytes() == b"short"
    assert "../out.txt" in HfApi().list_repo_files("bob/odd")


# The hub is strict, and it is the only one there is


def test_an_unknown_endpoint_is_recorded(hub):
    assert get_session().get(f"{hub.url}/api/datasets/alice/data").status_code == 404
    assert hub.unexpected == ["no such endpoint: GET /api/datasets/alice/data"]
    hub.unexpected.clear()


def test_a_token_sent_to_the_storage_is_recorded(hub):
    assert get_session().get(f"{hub.storage_url}{BLOB}{'0' * 64}", headers=TOKEN).status_code == 400
    assert "a token was sent to the storage" in hub.unexpected.pop()


def test_no_other_address_can_be_reached(hub):
    with socket.socket() as plain, pytest.raises(ConnectionRefusedError):
        plain.connect(("192.0.2.1", 443))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("example.org", 443), timeout=1)
    assert hub.unexpected == ["a connection to 192.0.2.1", "a connection to example.org"]
    hub.unexpected.clear()
    with pytest.raises(Exception, match="404"):
        get_session().get("https://example.org/")
    assert hub.unexpected == ["no such endpoint: CONNECT example.org:443"]
    hub.unexpected.clear()


@pytest.mark.parametrize("broken", ["hub.unexpected.append('GET /nowhere')", "hub.fail('GET', 'nowhere', status=500)"])
def test_the_fixture_fails_a_test_for_what_it_left_unsaid(tmp_path, broken):
    (tmp_path / "conftest.py").write_text("from loopback_hub.fixtures import hub\n")
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
    assert late.ENDPOINT == constants.ENDPOINT
    assert str(late.CACHE) == constants.HF_HUB_CACHE
    assert state() == before


def test_a_child_process_sees_the_same_hub(hub, repo):
    code = (
        "import huggingface_hub as h, urllib.request as u\n"
        f"print(h.whoami()['name'], h.hf_hub_download({REPO!r}, 'config.json'))\n"
        "try: u.urlopen('https://example.org/')\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert done.startswith(f"alice {constants.HF_HUB_CACHE}/")
    assert "404" in done
    assert hub.unexpected.pop() == "no such endpoint: CONNECT example.org:443"
