"""The loopback hub against the real clients: what it says is what huggingface_hub, timm and transformers understand."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_session,
    hf_hub_download,
    metadata_update,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from timm.models import push_to_hf_hub

REPO = "alice/tiny"
COMMIT, BLOB = "/commit/", "/blobs/"


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """What a small model's folder holds: text that git keeps and a file beside it."""
    path = tmp_path / "model"
    (path / "plots").mkdir(parents=True)
    (path / "config.json").write_text('{"architecture": "resnet18"}')
    (path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [timm]\n---\n# Tiny\n")
    (path / "plots" / "spectrum.txt").write_text("1 2 3")
    save_file({"weight": torch.arange(300_000.0)}, path / "model.safetensors")
    return path


@pytest.fixture
def pushed(api, folder):
    """The repository after one push of `folder`, and its client."""
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
    return api


def add(path, data=b"text"):
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)


# Push


def test_push_holds_every_file_in_one_commit(hub, pushed, folder):
    repo = hub.repo(REPO)
    written = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {path: data for path, data in repo.files().items() if path != ".gitattributes"} == written
    assert [c.title for c in repo.history()] == ["first", "initial commit"]
    assert [path for path, entry in repo.history()[0].tree.items() if entry.lfs] == ["model.safetensors"]
    assert len(hub.seen("POST", COMMIT)) == len(hub.seen("PUT", BLOB)) == len(hub.seen("POST", "/verify/")) == 1


def test_pushing_the_same_again_sends_and_commits_nothing(hub, pushed, folder):
    pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.repo(REPO).history()) == 2
    assert len(hub.seen("PUT", BLOB)) == 1


def test_content_that_is_there_is_not_sent_again(hub, pushed, folder):
    pushed.upload_file(path_or_fileobj=folder / "model.safetensors", path_in_repo="copy.safetensors", repo_id=REPO)
    assert len(hub.seen("PUT", BLOB)) == 1
    assert hub.repo(REPO).files()["copy.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "megabytes", "large"), [("w.safetensors", 11, True), ("log.txt", 11, True), ("log.txt", 1, False)]
)
def test_name_or_size_decide_what_travels_beside_the_commit(hub, api, name, megabytes, large):
    data = b"0123456789abcdef" * (megabytes << 16)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=REPO)
    assert hub.repo(REPO).history()[0].tree[name].lfs is large
    assert len(hub.seen("PUT", BLOB)) == large
    assert Path(hf_hub_download(REPO, name)).read_bytes() == data


def test_a_commit_adds_and_deletes_at_once(hub, pushed):
    operations = [add("new.txt"), CommitOperationDelete("config.json"), CommitOperationDelete("plots/")]
    pushed.create_commit(REPO, operations=operations, commit_message="tidy")
    assert set(hub.repo(REPO).files()) == {".gitattributes", "README.md", "model.safetensors", "new.txt"}
    assert "config.json" in hub.repo(REPO).files(hub.repo(REPO).history()[1].sha)


def test_a_commit_on_a_parent_that_is_not_the_head_is_refused(hub, pushed):
    first = hub.repo(REPO).history()[0].sha
    pushed.create_commit(REPO, operations=[add("a.txt")], commit_message="a", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        pushed.create_commit(REPO, operations=[add("b.txt")], commit_message="b", parent_commit=first)
    assert error.value.response.status_code == 412
    assert "b.txt" not in hub.repo(REPO).files()


# Pull


def test_downloads_are_what_was_pushed(pushed, folder):
    for name in ("config.json", "model.safetensors", "plots/spectrum.txt"):
        assert Path(hf_hub_download(REPO, name)).read_bytes() == (folder / name).read_bytes()
    copy = Path(snapshot_download(REPO))
    assert torch.equal(load_file(copy / "model.safetensors")["weight"], torch.arange(300_000.0))


def test_a_cached_file_is_not_fetched_again(hub, pushed):
    first = hf_hub_download(REPO, "model.safetensors")
    assert hf_hub_download(REPO, "model.safetensors") == first
    assert len(hub.seen("GET", BLOB)) == 1


def test_listings(pushed, folder):
    names = {".gitattributes", "README.md", "config.json", "model.safetensors", "plots/spectrum.txt"}
    assert set(pushed.list_repo_files(REPO)) == names
    assert {entry.path for entry in pushed.list_repo_tree(REPO)} == {name.split("/")[0] for name in names}
    assert [entry.path for entry in pushed.list_repo_tree(REPO, "plots")] == ["plots/spectrum.txt"]
    (weights,) = pushed.get_paths_info(REPO, ["model.safetensors", "absent"])
    assert weights.lfs.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert pushed.file_exists(REPO, "config.json")
    assert not pushed.file_exists(REPO, "absent")


def test_model_info(pushed, folder):
    info = pushed.model_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.private, info.tags) == (REPO, "alice", False, ["timm"])
    assert info.card_data.license == "apache-2.0"
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert pushed.list_repo_commits(REPO)[0].commit_id == info.sha


def test_branches_and_tags(hub, pushed):
    pushed.create_tag(REPO, tag="v1")
    pushed.create_branch(REPO, branch="dev/next")
    pushed.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id=REPO, revision="dev/next")
    text = {name: Path(hf_hub_download(REPO, "config.json", revision=name)).read_text() for name in ("v1", "dev/next")}
    assert text == {"v1": '{"architecture": "resnet18"}', "dev/next": "new"}
    assert hub.repo(REPO).files()["config.json"].decode() == text["v1"]
    listed = pushed.list_repo_refs(REPO)
    assert ({b.name for b in listed.branches}, [t.name for t in listed.tags]) == ({"main", "dev/next"}, ["v1"])
    with pytest.raises(HfHubHTTPError, match="409"):
        pushed.create_tag(REPO, tag="v1")
    pushed.delete_branch(REPO, branch="dev/next")
    assert "refs/heads/dev/next" not in hub.repo(REPO).refs


# Cards


def test_a_card_is_pushed_loaded_and_updated(hub, pushed):
    data = ModelCardData(
        license="apache-2.0",
        model_name="tiny",
        eval_results=[
            EvalResult("image-classification", "cifar10", "CIFAR-10", "accuracy", 0.9, metric_args={"eps": 0.1})
        ],
    )
    ModelCard.from_template(data).push_to_hub(REPO)
    metadata_update(REPO, {"datasets": ["cifar10"]})
    card = ModelCard.load(REPO)
    assert (card.data.datasets, card.data.eval_results[0].metric_args) == (["cifar10"], {"eps": 0.1})
    assert card.data.eval_results[0].metric_value == 0.9
    assert HfApi().model_info(REPO).model_index[0]["name"] == "tiny"


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
            "metrics.0..value",
        ),
    ],
)
def test_a_bad_card_is_refused(hub, pushed, metadata, complaint, folder):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Tiny\n")
    with pytest.raises(ValueError, match=complaint):
        pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.repo(REPO).history()) == 2


# Who may, and what is not there


def test_whoami(api):
    assert api.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


def test_a_private_repo_is_its_owners_alone(hub, api, tmp_path):
    api.create_repo("alice/secret", private=True)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="x.txt", repo_id="alice/secret")
    assert Path(hf_hub_download("alice/secret", "x.txt")).read_bytes() == b"1"
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("alice/secret", token=token)
        assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("alice/secret", "x.txt", token=token, cache_dir=tmp_path)
    assert not HfApi(token="hf_bob").repo_exists("alice/secret")


@pytest.mark.parametrize(
    ("token", "status"), [("hf_bob", 403), ("hf_alice_read", 403), (False, 401), ("hf_wrong", 401)]
)
def test_writing_needs_the_owners_token(hub, pushed, token, status):
    before = hub.repo(REPO).files()
    stranger = HfApi(token=token)
    for write in (
        lambda: stranger.create_repo("alice/other"),
        lambda: stranger.create_commit(REPO, operations=[add("a.txt")], commit_message="a"),
        lambda: stranger.create_tag(REPO, tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert error.value.response.status_code == status
    assert (hub.repo(REPO).files(), list(hub.repos)) == (before, [REPO])


def test_without_any_token_the_client_asks_for_one(hub, api, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo(REPO)


def test_a_repo_is_made_once(hub, pushed):
    with pytest.raises(HfHubHTTPError) as error:
        pushed.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert pushed.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert "config.json" in hub.repo(REPO).files()


def test_what_is_not_there(pushed):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "absent.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="absent")
    for absent in ("alice/absent", "resnet18"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(absent, "config.json")
    with pytest.raises(RepositoryNotFoundError):
        pushed.create_commit("alice/absent", operations=[add("a.txt")], commit_message="a")
    with pytest.raises(RevisionNotFoundError):
        pushed.create_commit(REPO, operations=[add("a.txt")], commit_message="a", revision="absent")


# Failures on request


def test_an_upload_is_tried_again_after_a_server_error(hub, api, waits):
    fault = hub.fail("PUT", BLOB, status=500, times=2)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.pt", repo_id=REPO)
    assert hub.repo(REPO).files()["w.pt"] == b"weights"
    assert ([call.status for call in hub.seen("PUT", BLOB)], fault.hits, waits) == ([500, 500, 200], 2, [1, 2])


def test_an_upload_that_breaks_off_is_sent_again(hub, api, waits):
    hub.fail("PUT", BLOB, drop_after=100_000)
    data = b"\0" * 3_000_000
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=data, path_in_repo="w.pt", repo_id=REPO)
    assert hub.repo(REPO).files()["w.pt"] == data
    assert [call.status for call in hub.seen("PUT", BLOB)] == [0, 200]


@pytest.mark.parametrize(("how", "status"), [({"status": 503}, 503), ({"drop_after": 10}, None)])
def test_a_commit_that_fails_leaves_the_repo_as_it_was(hub, pushed, folder, how, status):
    before = hub.repo(REPO).history()
    hub.fail("POST", COMMIT, **how)
    (folder / "config.json").write_text("{}")
    with pytest.raises(Exception, match=r"503|reset|closed|disconnected|pipe") as error:
        pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert getattr(getattr(error.value, "response", None), "status_code", None) == status
    assert hub.repo(REPO).history() == before
    pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repo(REPO).files()["config.json"] == b"{}"


def test_a_commit_whose_answer_is_lost_is_there(hub, pushed, folder):
    hub.fail("POST", COMMIT, lose_answer=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(Exception, match="without sending a response"):
        pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repo(REPO).files()["config.json"] == b"{}"
    pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.repo(REPO).history()) == 3  # the second time there was nothing left to do


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (401, "RepoNotFound", RepositoryNotFoundError),
        (403, None, HfHubHTTPError),
        (404, "RevisionNotFound", RevisionNotFoundError),
    ],
)
def test_a_status_on_request(hub, pushed, status, code, error):
    hub.fail("GET", f"/api/models/{REPO}", status=status, code=code)
    with pytest.raises(error) as caught:
        pushed.model_info(REPO)
    assert caught.value.response.status_code == status
    assert pushed.model_info(REPO).id == REPO


def test_a_rate_limit_is_waited_for(hub, pushed, waits):
    hub.fail("GET", BLOB, status=429, retry_after=7)
    hf_hub_download(REPO, "model.safetensors")
    assert waits == [8]  # the client adds a second
    assert [call.status for call in hub.seen("GET", BLOB)] == [429, 200]


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, pushed, folder, waits, monkeypatch):
    # The client keeps whole chunks: of a file smaller than one (10 MB by default) it begins again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.fail("GET", BLOB, drop_after=500_000)
    path = hf_hub_download(REPO, "model.safetensors")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [(call.status, call.range) for call in hub.seen("GET", BLOB)] == [(200, None), (206, "bytes=500000-")]


def test_a_download_that_hangs_is_taken_up_again(hub, pushed, folder, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.fail("GET", BLOB, delay=30)
    path = hf_hub_download(REPO, "model.safetensors")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert waits == [1]


def test_a_byte_that_turned_over_goes_unnoticed_by_the_client(hub, pushed):
    hub.fail("GET", BLOB, corrupt_at=1000)
    fetched = Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()
    differing = [
        n for n, (a, b) in enumerate(zip(fetched, hub.repo(REPO).files()["model.safetensors"], strict=True)) if a != b
    ]
    assert differing == [1000]


def test_failures_keep_to_their_path_their_count_and_their_turn(hub, pushed):
    fault = hub.fail("HEAD", "config.json$", status=500, times=2, skip=1)

    def statuses():
        return [get_session().head(f"{hub.url}/{REPO}/resolve/main/config.json").status_code for _ in range(4)]

    assert get_session().head(f"{hub.url}/{REPO}/resolve/main/README.md").status_code == 200
    assert (statuses(), fault.hits) == ([200, 500, 500, 200], 2)
    with pytest.raises(ValueError, match="needs one of"):
        hub.fail("GET", "/")


def test_a_file_that_is_here_is_used_when_the_hub_is_gone(hub, pushed, waits):
    first = hf_hub_download(REPO, "config.json")
    hub.fail("HEAD", "/resolve/", status=500, times=99)
    assert hf_hub_download(REPO, "config.json") == first
    assert not waits
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "README.md")
    assert waits == [1, 2, 4, 8, 8]


# timm and transformers


@pytest.fixture
def network():
    return timm.create_model("test_resnet", num_classes=4).eval()


def test_timm_pushes_and_pulls(hub, network):
    images = torch.randn(2, 3, 96, 96)
    push_to_hf_hub(network, REPO, model_config={"num_classes": 4, "label_names": list("abcd")}, safe_serialization=True)
    assert set(hub.repo(REPO).files()) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    pulled = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    assert pulled.pretrained_cfg["label_names"] == list("abcd")
    assert torch.equal(pulled(images), network(images))
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model("hf-hub:alice/absent", pretrained=True)


def test_transformers_pulls_what_timm_wrote(hub, network, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    images = torch.randn(2, 3, 96, 96)
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["num_classes"]  # it stands beside them too, and transformers takes it from both
    (tmp_path / "config.json").write_text(json.dumps(config))
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    pulled = AutoModelForImageClassification.from_pretrained(REPO).eval()
    assert torch.equal(pulled(images).logits, network(images))
    assert list(AutoImageProcessor.from_pretrained(REPO).data_config["input_size"]) == [3, 160, 160]


def test_xet_as_clients_use_it_by_default(xet_hub, folder):
    """Stands on `local://` in hf_xet, which nothing documents: if only this fails, it is that which has changed."""
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert xet_hub.repo(REPO).files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    path = hf_hub_download(REPO, "model.safetensors")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not xet_hub.seen("*", BLOB)
    assert xet_hub.seen("GET", "/xet-write-token/")
    assert xet_hub.seen("GET", "/xet-read-token/")
