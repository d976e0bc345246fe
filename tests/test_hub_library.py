"""`push_to_hub` and `from_pretrained` with the real huggingface_hub, timm and transformers; see loopback_hub."""

import contextlib
import json
import os
import re

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from publishable import BLOB, CHECKPOINT, COMMIT, REPO, images, in_repo, trained, weights

import timm_lowrank as tlr
from timm_lowrank import CheckpointError, LowRankModel, checkpoint, from_pretrained, push_to_hub
from timm_lowrank.errors import CheckpointWriteError
from timm_lowrank.files import sha256_of


@pytest.fixture
def model():
    return trained()


@pytest.fixture
def folder(model, tmp_path):
    return tlr.save_pretrained(model, tmp_path / "checkpoint")


@pytest.fixture
def another_cache(tmp_path):
    """A cache that holds nothing yet."""
    return tmp_path / "another"


def same_network(network, model):
    """Weights to the bit; logits as far as other code, which may lay the weights out otherwise, computes them."""
    state, expected = network.state_dict(), model.unwrap().state_dict()
    weights = {name: next(state[key] for key in state if key.endswith(name)) for name in expected}
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    logits = network(images())
    torch.testing.assert_close(getattr(logits, "logits", logits), model(images()), rtol=1e-5, atol=1e-6)
    return True


def refused(match, call, *arguments, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*arguments, **options)
    return caught.value


def loaded(**options):
    """The network of REPO, as `from_pretrained` gives it."""
    return from_pretrained(REPO, **options).unwrap()


# Publishing and loading


def test_published_once_and_loaded_by_all(hub, model):
    done = push_to_hub(model, REPO, files={"evaluation.json": b"{}"}, label_names=["a", "b", "c"])
    assert set(in_repo(hub)) == {*CHECKPOINT, "README.md", "evaluation.json"} == set(done.files)
    assert len(hub.repo(REPO).history()) == 2, "the Hub's own first commit and one more"
    assert (done.repo_id, done.commit, done.folder) == (REPO, hub.repo(REPO).history()[0].sha, None)
    assert done.url == f"{hub.url}/{REPO}/commit/{done.commit}"

    for source in (REPO, f"hf-hub:{REPO}", f"hf_hub:{REPO}@main"):
        again = from_pretrained(source)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert same_network(again.unwrap(), model)
    network = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    assert same_network(network, model)
    assert tuple(network.pretrained_cfg["label_names"]) == ("a", "b", "c")
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModelForImageClassification.from_pretrained(REPO).eval()
    assert same_network(network, model)
    assert network.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_with_xet_as_clients_have_it_by_default(xet_hub, model):
    push_to_hub(model, REPO)
    assert len(xet_hub.repo(REPO).history()) == 2
    assert same_network(loaded(), model)


def test_revisions(hub, model):
    first = push_to_hub(model, REPO).commit
    other = trained()
    push_to_hub(other, REPO, revision="wide")
    assert len(hub.repo(REPO).history("main")) == 2
    for source, options, expected in (
        (REPO, {}, model),
        (REPO, {"revision": first}, model),
        (REPO, {"revision": "wide"}, other),
        (f"{REPO}@wide", {}, other),
        (f"{REPO}@wide", {"revision": "wide"}, other),
    ):
        assert same_network(from_pretrained(source, **options).unwrap(), expected)
    refused("two revisions: 'wide' in .*revision='main'; give one", from_pretrained, f"{REPO}@wide", revision="main")
    refused("it has no revision 'narrow': give one of its branches", from_pretrained, REPO, revision="narrow")


def test_a_dry_run_writes_what_would_be_pushed_and_asks_nobody(hub, model, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "spectrum.png").write_bytes(b"\x89PNG\0")
    files = {"plots": tmp_path / "plots", "evaluation.json": b"{}", "notes/a.txt": str(tmp_path / "plots/spectrum.png")}
    done = push_to_hub(model, REPO, files=files, dry_run=tmp_path / "new" / "dry")
    assert not hub.calls
    assert (done.commit, done.url, done.folder) == (None, None, tmp_path / "new" / "dry")
    written = {name: (done.folder / name).read_bytes() for name in done.files}
    assert {str(p.relative_to(done.folder)) for p in done.folder.rglob("*") if p.is_file()} == set(done.files)
    assert set(done.files) == {*CHECKPOINT, "README.md", "plots/spectrum.png", "evaluation.json", "notes/a.txt"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dry"], "nothing temporary is left"

    push_to_hub(model, REPO, files=files, token="hf_alice")
    assert in_repo(hub) == written


def test_a_folder_and_a_run_are_published_as_they_are(hub, folder, tmp_path):
    (folder / "scratch.txt").write_text("not for the world")
    (folder / "README.md").write_text("neither")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: run")
    refused(r"has not come to its end", push_to_hub, run, REPO)
    os.rename(folder, run / "model")
    push_to_hub(run, REPO)
    assert set(in_repo(hub)) == {*CHECKPOINT, "README.md"}
    for name in CHECKPOINT:
        assert in_repo(hub)[name] == (run / "model" / name).read_bytes()
    refused("leave them out", push_to_hub, run, REPO, label_names=["a", "b", "c"])
    refused("there is no folder 'alice/other' to publish", push_to_hub, "alice/other", REPO)


def test_a_private_repository(hub, model, another_cache):
    push_to_hub(model, REPO, private=True)
    assert hub.repo(REPO).private
    assert isinstance(from_pretrained(REPO, token="hf_alice"), LowRankModel)
    message = "there is no such repository, or it is private and not yours to see: .*HF_TOKEN"
    refused(message, from_pretrained, REPO, token="hf_bob", cache_dir=another_cache)


def test_a_pull_request_is_asked_for(hub, model):
    refused("there is no such repository", push_to_hub, model, REPO, create_pr=True)
    hub.seed(REPO, {"README.md": "hello"})
    hub.fail("POST", COMMIT, status=403)  # this hub has no pull requests
    refused("no permission", push_to_hub, model, REPO, create_pr=True)
    assert [call.path for call in hub.seen("POST", COMMIT)] == [f"/api/models/{REPO}/commit/main?create_pr=1"]
    assert not hub.seen("POST", "/repos/create")


def test_a_repository_without_branches_is_a_plain_network(hub, model):
    push_to_hub(model.unwrap(), REPO)
    assert set(in_repo(hub)) == {"config.json", "model.safetensors", "README.md"}
    with pytest.warns(UserWarning, match=rf"{REPO} holds no lowrank.json: loaded as a plain network"):
        network = from_pretrained(REPO)
    assert same_network(network, model)


# The card


@pytest.mark.parametrize("revision", [None, "dev"])
def test_the_short_card(hub, model, revision):
    looks = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    push_to_hub(model, REPO, data_config=looks, revision=revision)
    card = ModelCard(in_repo(hub, revision=revision or "main")["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert card.data.license is None, "its owner decides that"
    assert "`test_resnet` for 3 classes and images of 3 x 32 x 32" in card.text
    assert "(0.1, 0.2, 0.3)" in card.text
    assert "`pre_logits` (target rank 4 of 96)" in card.text
    assert "neither its accuracy nor its robustness is known" in card.text
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        if "transformers" in block:
            pytest.importorskip("transformers")
        names = {}
        exec(block, names)
        network = names["network"] if "network" in names else names["model"].unwrap()
        assert same_network(network, model)


@pytest.mark.parametrize("words", ["my own words", "---\nlicense: mit   # mine\n---\nmy own words", ""])
def test_a_card_that_its_owner_edited_is_left_alone(hub, model, words):
    push_to_hub(model, REPO)
    hub.seed(REPO, {"README.md": words})
    with torch.no_grad():
        model.fc.bias += 1
    done = push_to_hub(model, REPO)
    assert in_repo(hub)["README.md"] == words.encode()
    assert "README.md" not in done.files
    assert same_network(loaded(), model)


@pytest.mark.parametrize("kind", [str, ModelCard])
def test_a_card_that_is_given_replaces(hub, model, kind):
    hub.seed(REPO, {"README.md": "old"})
    text = "---\nlicense: apache-2.0\n---\n# Mine\n"
    push_to_hub(model, REPO, card=kind(text))
    assert in_repo(hub)["README.md"].decode() == text


# Publishing again


def test_files_of_another_program_in_the_repository_stay(hub, model):
    theirs = {"evaluation.json": b'{"mine": 1}', "README.md": b"# Mine", "plots/a.png": b"x"}
    hub.seed(REPO, theirs)
    push_to_hub(model, REPO)
    assert theirs.items() <= in_repo(hub).items()


def test_branches_of_an_older_model_are_deleted_with_the_same_commit(hub, model):
    push_to_hub(model, REPO, files={"evaluation.json": b"{}", "notes.txt": b"mine"})
    push_to_hub(model.unwrap(), REPO, delete=["evaluation.json", "never-there.json"])
    assert set(in_repo(hub)) == {"config.json", "model.safetensors", "README.md", "notes.txt"}
    assert len(hub.repo(REPO).history()) == 3


def test_a_change_between_reading_and_writing_is_not_overwritten(hub, model, monkeypatch):
    head = push_to_hub(model, REPO).commit
    create_commit = HfApi.create_commit

    def late(*arguments, **options):
        hub.seed(REPO, {"README.md": "written just now"})
        return create_commit(*arguments, **options)

    with torch.no_grad():
        model.fc.bias += 1
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", late)
        refused("has changed in the meantime: run it again", push_to_hub, model, REPO, card="# mine")
    assert in_repo(hub)["README.md"] == b"written just now"
    refused("has changed in the meantime", push_to_hub, model, REPO, parent_commit=head)
    push_to_hub(model, REPO)
    assert same_network(loaded(), model)


# What is refused before the Hub is asked


def test_without_a_token(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = f"cannot publish {REPO}: there is no token. Log in with `hf auth login`, set HF_TOKEN"
    refused(message, push_to_hub, model, REPO)
    assert not hub.calls


@pytest.mark.parametrize("name", ["tiny", "alice/", "/tiny", "alice/a b", "a/b/c", "alice/x.git", ""])
def test_invalid_names(hub, model, name):
    refused(r"is no repository: .+", push_to_hub, model, name)
    if name.count("/") < 2 and name and not name.startswith("/"):
        refused(r"is no repository: .*; there is no folder .* either", from_pretrained, name)
    assert not hub.calls


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("../x", b"", "'../x' is no name of a file inside a repository"),
        ("/etc/x", b"", "is no name of a file inside"),
        (".git/hooks/x", b"", "is no name of a file inside"),
        ("model.safetensors", b"", "is written from the model"),
        ("README.md", b"", "is written from the model or the card"),
        ("weights.PT", b"", "may be a pickle"),
        ("pytorch_model.bin", b"", "may be a pickle"),
        ("x.json", "nowhere/x.json", "there is no file nowhere/x.json to publish as x.json"),
    ],
)
def test_files_that_are_not_published(hub, model, name, content, match):
    refused(match, push_to_hub, model, REPO, files={name: content})
    assert not hub.calls


def test_links_that_lead_out_and_names_twice_are_refused(hub, model, tmp_path):
    (tmp_path / "secret").write_text("secret")
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "inside.txt").write_text("x")
    (plots / "same.txt").symlink_to("inside.txt")
    push_to_hub(model, REPO, files={"plots": plots})
    assert in_repo(hub)["plots/same.txt"] == b"x"
    (plots / "out.txt").symlink_to(tmp_path / "secret")
    for source in (plots, plots / "out.txt"):
        refused("out.txt is a link that leads out of", push_to_hub, model, REPO, files={"plots": source})
    (plots / "out.txt").unlink()
    files = {"plots": plots, "plots/inside.txt": b"2"}
    refused("two of the files are to be published as plots/inside.txt", push_to_hub, model, REPO, files=files)
    assert len(hub.repo(REPO).history()) == 2


def test_what_cannot_be_loaded_is_not_published(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 7}))
    refused("do not belong together", push_to_hub, folder, REPO)
    (folder / "config.json").write_text(json.dumps(config))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    refused("was damaged or exchanged", push_to_hub, folder, REPO)
    refused("is no timm network", push_to_hub, torch.nn.Linear(2, 2), REPO)
    assert not hub.calls


def test_a_dry_run_into_a_folder_that_holds_something(model, folder):
    before = sorted(folder.iterdir())
    refused("must be new or empty", push_to_hub, model, REPO, dry_run=folder)
    refused("must be new or empty", push_to_hub, model, REPO, dry_run=folder / "config.json")
    assert sorted(folder.iterdir()) == before
    error = refused("could not write", push_to_hub, model, REPO, dry_run=folder / "config.json" / "dry")
    assert isinstance(error, CheckpointWriteError)


# What the Hub refuses


@pytest.mark.parametrize("exists", [False, True])
def test_permissions(hub, model, exists):
    if exists:
        hub.seed(REPO, {})
    refused("the Hub does not accept the token: log in", push_to_hub, model, REPO, token="hf_wrong")
    for token in ("hf_bob", "hf_alice_read"):
        message = "this token has no permission for it: use a token with the write role"
        refused(message, push_to_hub, model, REPO, token=token)
    assert not exists or set(in_repo(hub)) == set()


def test_a_repository_that_exists(hub, model):
    push_to_hub(model, REPO, exist_ok=False)
    refused(f"{REPO} exists already: .*exist_ok=True", push_to_hub, model, REPO, exist_ok=False)
    assert len(hub.repo(REPO).history()) == 2


def test_repositories_that_hold_no_checkpoint(hub, model, another_cache):
    refused("cannot fetch alice/tiny: there is no such repository", from_pretrained, REPO)
    hub.seed(REPO, {"notes.txt": "x"})
    refused(r"alice/tiny holds no config\.json", from_pretrained, REPO)
    hub.seed(REPO, {"config.json": "{}", "pytorch_model.bin": b"\x80\x04."})
    refused(r"alice/tiny holds no model\.safetensors, only pytorch_model\.bin: pickled", from_pretrained, REPO)
    assert not hub.seen("GET", r"pytorch_model\.bin"), "it is not even fetched"
    hub.seed(REPO, {"config.json": '{"architecture": "nonesuch"}', "model.safetensors": b"x"})
    refused("cannot be read as safetensors", from_pretrained, REPO)
    hub.fail("GET", f"/api/models/{REPO}", status=403, code="GatedRepo")
    refused("its owner has to grant access", from_pretrained, REPO, cache_dir=another_cache)


def test_names_in_a_listing_that_climb_out(hub, folder):
    files = {name: (folder / name).read_bytes() for name in CHECKPOINT}
    hub.seed(REPO, {**files, "../../stolen": b"x"})
    assert isinstance(from_pretrained(REPO), LowRankModel), "only its own four files are ever asked for"
    refused(r"'\.\./\.\./stolen' is no name of a file inside", checkpoint.download, REPO, names=None)
    refused("is no name of a file inside", checkpoint.download, REPO, names=["../x"])
    assert not hub.seen("*", "stolen")


# The connection


def test_an_upload_that_breaks_off_publishes_nothing_and_is_taken_up_again(hub, model, folder, waits):
    size = (folder / "model.safetensors").stat().st_size
    digest = sha256_of(folder / "model.safetensors")
    fault = hub.fail("PUT", f"{BLOB}{digest}", drop_after=size // 2, times=100)
    message = f"cannot publish {REPO}: the connection broke .*run it again: .*nothing is half published"
    refused(message, push_to_hub, folder, REPO)
    assert set(in_repo(hub)) == set()
    assert sha256_of(folder / "lowrank.safetensors") in hub.blobs
    fault.times = 0
    hub.calls.clear()
    push_to_hub(folder, REPO)
    assert len(hub.seen("PUT", BLOB)) == 1, "the file that had arrived is not sent again"
    assert same_network(loaded(), model)


def test_a_download_that_breaks_off_is_taken_up_where_it_was(hub, model, waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # what it keeps, bytes
    push_to_hub(model, REPO)
    hub.fail("GET", weights(hub), drop_after=100_000)
    with contextlib.suppress(CheckpointError):  # earlier versions of huggingface_hub leave a second try to the caller
        loaded()
    assert same_network(loaded(), model)
    assert "bytes=100000-" in [call.range for call in hub.seen("GET", BLOB)]


def test_a_byte_that_changed_on_the_way_is_noticed_and_fetched_again(hub, model, another_cache):
    push_to_hub(model, REPO)
    fault = hub.fail("GET", weights(hub), corrupt_at=1_000_000)
    assert same_network(loaded(), model)
    assert fault.hits == 1
    fault.times = 1000
    refused("was damaged or exchanged", from_pretrained, REPO, cache_dir=another_cache)


def test_a_disk_that_fills_up_while_fetching(hub, model):
    push_to_hub(model, REPO)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        message = "File too large.*: free some space on the disk or choose another cache_dir"
        error = refused(message, from_pretrained, REPO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error, CheckpointWriteError)
    assert same_network(loaded(), model)


def test_the_cache_when_the_hub_is_gone(hub, model, waits, another_cache):
    push_to_hub(model, REPO)
    from_pretrained(REPO)
    hub.fail("*", "/api/models/", status=503, times=1000)
    assert same_network(loaded(), model)
    refused("the Hub failed .status 503.*run it again", from_pretrained, "alice/other")
    refused("the Hub failed", from_pretrained, REPO, cache_dir=another_cache)


def test_offline_a_cache_with_the_network_alone_says_nothing_of_branches(hub, model, monkeypatch):
    push_to_hub(model, REPO)
    timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.warns(
        UserWarning, match="the Hub cannot be asked whether alice/tiny holds lowrank.json, and the cache"
    ):
        from_pretrained(REPO)


def test_switched_offline(hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("no connection to the Hub, or HF_HUB_OFFLINE is set", from_pretrained, REPO)
    refused("no connection to the Hub, or HF_HUB_OFFLINE is set", push_to_hub, model, REPO)
