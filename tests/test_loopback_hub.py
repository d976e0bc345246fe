"""The loopback hub against the real clients: it stores, refuses and fails as asked, and nothing else can be reached.

What `push_to_hub`, `from_pretrained` and the scripts meet there is in test_hub_library and test_hub_scripts.
"""

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, hf_api, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from loopback_hub import LoopbackHub
from loopback_hub.clients import pointed_at
from timm.models import push_to_hf_hub

REPO = "alice/tiny"
COMMIT, BLOB = "/commit/", "/blobs/"
TOKEN = {"Authorization": "Bearer hf_alice"}


@pytest.fixture
def repo(hub):
    """A repository with a text that git keeps and a large file that it does not."""
    return hub.seed(REPO, {"config.json": "{}", "model.safetensors": bytes(range(256)) * 4000})


def upload(name="model.safetensors", data=b"weights", **options):
    return HfApi().upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=REPO, **options)


def commit(hub, *lines):
    """The status of a commit as no client would send it."""
    body = "\n".join(json.dumps(line) for line in ({"key": "header", "value": {"summary": "raw"}}, *lines))
    return get_session().post(f"{hub.url}/api/models/{REPO}/commit/main", content=body, headers=TOKEN).status_code


def test_pushed_once_and_pulled(hub, repo):
    upload("new.safetensors", b"new")
    upload("copy.safetensors", b"new")
    assert len(hub.seen("PUT", BLOB)) == 1, "what is there already is not sent again"
    assert [entry.lfs for entry in repo.history()[0].tree.values()] == [False, False, True, True, True]
    assert Path(hf_hub_download(REPO, "copy.safetensors")).read_bytes() == b"new"
    before = len(repo.history())
    upload("copy.safetensors", b"new")
    assert len(repo.history()) == before


def test_timm_pushes_and_pulls(hub):
    network = timm.create_model("test_resnet", num_classes=4).eval()
    push_to_hf_hub(network, REPO, model_config={"num_classes": 4}, safe_serialization=True)
    pulled = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    assert all(torch.equal(pulled.state_dict()[key], value) for key, value in network.state_dict().items())
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model("hf-hub:alice/absent", pretrained=True)


def test_a_commit_on_a_parent_that_is_not_the_head_is_refused(hub, repo):
    first = repo.history()[0].sha
    upload("a.txt", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        upload("b.txt", parent_commit=first)
    assert error.value.response.status_code == 412
    assert "b.txt" not in repo.files()


@pytest.mark.parametrize(
    ("token", "status"), [("hf_bob", 403), ("hf_alice_read", 403), (False, 401), ("hf_wrong", 401)]
)
def test_writing_needs_the_owners_token(hub, repo, token, status):
    before, stranger = repo.files(), HfApi(token=token)
    for write in (
        lambda: stranger.create_repo("alice/other"),
        lambda: stranger.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="a"),
        lambda: stranger.create_branch(REPO, branch="next"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert error.value.response.status_code == status
    assert (repo.files(), list(hub.repos)) == (before, [REPO])


def test_a_private_repository_is_its_owners_alone(hub):
    HfApi().create_repo(REPO, private=True)
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            HfApi().model_info(REPO, token=token)
        assert error.value.response.status_code == status
    assert HfApi().model_info(REPO).private


# What it refuses


@pytest.mark.parametrize("path", ["", "../out.txt", "/etc/passwd", "a//b", ".git/config", "a\\b", "config.json/b"])
def test_paths_that_are_none_are_refused(hub, repo, path):
    before = repo.files()
    good, bad = ({"key": "file", "value": {"path": p, "content": "eA=="}} for p in ("good.txt", path))
    assert commit(hub, good, bad) == 400
    assert repo.files() == before, "not even the good one"


def test_content_that_is_not_what_was_announced_is_refused(hub, repo):
    assert commit(hub, {"key": "file", "value": {"path": "a.txt", "content": "YQBi"}}) == 400, "binary"
    pointer = {"path": "w.pt", "algo": "sha256", "oid": "0" * 64, "size": 3}
    assert commit(hub, {"key": "lfsFile", "value": pointer}) == 400
    assert get_session().put(f"{hub.storage_url}{BLOB}{'0' * 64}", content=b"abc").status_code == 400
    assert commit(hub, {"key": "lfsFile", "value": {**pointer, "oid": next(iter(hub.blobs))}}) == 400, "another size"
    assert len(repo.history()) == 2


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: 3", '"license" must be a list of strings'),
        ("tags: timm", '"tags" must be a list of strings'),
        ("tags: [a", "Invalid YAML"),
        ("- a\n- b", "must be a mapping"),
        ("model-index:\n- name: tiny\n  results:\n  - dataset: {name: a, type: a}", "task.type"),
        (
            "model-index:\n- name: tiny\n  results:\n  - task: {type: a}\n    dataset: {name: a, type: a}\n"
            "    metrics:\n    - {type: accuracy, value: !!binary AAAA}",
            "metrics.0.. needs a type and a number",
        ),
    ],
)
def test_a_bad_card_is_refused(hub, repo, metadata, complaint):
    with pytest.raises(ValueError, match=complaint):
        upload("README.md", f"---\n{metadata}\n---\n# Tiny\n".encode())
    assert len(repo.history()) == 2


# Failures on request


def test_a_commit_that_fails_and_one_whose_answer_is_lost(hub, repo):
    fault = hub.fail("POST", COMMIT, status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        upload()
    assert (fault.hits, len(repo.history())) == (1, 2)
    hub.fail("POST", COMMIT, lose_answer=True)
    with pytest.raises(Exception, match="without sending a response"):
        upload()
    assert repo.files()["model.safetensors"] == b"weights"


def test_an_upload_that_breaks_off_is_sent_again(hub, repo, waits):
    hub.fail("PUT", BLOB, drop_after=100_000)
    upload(data=bytes(3_000_000))
    assert repo.files()["model.safetensors"] == bytes(3_000_000)
    assert ([call.status for call in hub.seen("PUT", BLOB)], len(waits)) == ([0, 200], 1)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, repo, waits, monkeypatch):
    # The client keeps whole chunks: of a file smaller than one (10 MB by default) it begins again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.fail("GET", BLOB, drop_after=500_000)
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == repo.files()["model.safetensors"]
    assert [(call.status, call.range) for call in hub.seen("GET", BLOB)] == [(200, None), (206, "bytes=500000-")]


def test_a_byte_that_turned_over_goes_unnoticed_by_the_client(hub, repo):
    hub.fail("GET", BLOB, corrupt_at=1000)
    fetched = Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()
    sent = repo.files()["model.safetensors"]
    assert [n for n, (a, b) in enumerate(zip(fetched, sent, strict=True)) if a != b] == [1000]


def test_a_status_strikes_as_often_as_it_was_asked_for(hub, repo, waits):
    fault = hub.fail("HEAD", "config.json$", status=404, code="RepoNotFound", times=2)
    assert get_session().head(f"{hub.url}/{REPO}/resolve/main/.gitattributes").status_code == 200
    url = f"{hub.url}/{REPO}/resolve/main/config.json"
    assert ([get_session().head(url).status_code for _ in range(3)], fault.hits) == ([404, 404, 200], 2)
    hub.fail("HEAD", "/resolve/", status=500, times=99)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json")
    assert waits


# The hub is strict, and it is the only one there is


def test_what_no_client_should_ask_for_is_recorded(hub):
    assert get_session().get(f"{hub.url}/api/datasets/alice/data").status_code == 404
    assert get_session().get(f"{hub.storage_url}{BLOB}{'0' * 64}", headers=TOKEN).status_code == 400
    with socket.socket() as plain, pytest.raises(ConnectionRefusedError):
        plain.connect(("192.0.2.1", 443))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("example.org", 443), timeout=1)
    with pytest.raises(Exception, match="404"):
        get_session().get("https://example.org/")
    assert hub.unexpected == [
        "no such endpoint: GET /api/datasets/alice/data",
        f"a token was sent to the storage: GET {BLOB}{'0' * 64}",
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


def test_a_child_process_sees_the_same_hub(hub, repo):
    code = (
        "import huggingface_hub as h, urllib.request as u\n"
        f"print(h.hf_hub_download({REPO!r}, 'config.json'))\n"
        "try: u.urlopen('https://example.org/')\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert done.startswith(f"{constants.HF_HUB_CACHE}/")
    assert "404" in done
    assert hub.unexpected.pop() == "no such endpoint: CONNECT example.org:443"
