"""hub/push.py and hub/pull.py with the real huggingface_hub; see loopback_hub."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from publishable import (
    BLOB,
    CHECKPOINT,
    COMMIT,
    FIGURES,
    REPO,
    change,
    edit,
    images,
    in_repo,
    make_run,
    share,
    trained,
    weights,
)
from scripts import done, in_folder, refused, script

import timm_lowrank as tlr
from timm_lowrank import CheckpointError
from timm_lowrank.checkpoint import download
from timm_lowrank.publish import run as publishing
from timm_lowrank.publish.card import Place, run_card
from timm_lowrank.publish.merging import merge, section
from timm_lowrank.publish.record import read_run

ROOT = Path(__file__).parent.parent
FILES = {*CHECKPOINT, "README.md", "evaluation.json", "summary.json", "recipe.yaml", "plots/spectrum.png"}


push, pull = (script(name) for name in ("push", "pull"))


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


# Publishing


def test_a_dry_run_writes_what_the_commit_then_holds(hub, run, tmp_path, capsys):
    done(push, run, REPO, "--dry-run", tmp_path / "dry")
    assert REPO not in hub.repos
    assert "not published: " in capsys.readouterr().out
    done(push, run, REPO)
    assert in_folder(tmp_path / "dry") == in_repo(hub)
    assert set(in_repo(hub)) == FILES
    assert [commit.title for commit in hub.repo(REPO).history()] == [
        "Publish tiny with timm_lowrank", "initial commit",
    ]  # fmt: skip
    assert f"published {REPO}: 9 files, {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert len(ModelCard.load(REPO).data.eval_results) == 3

    hub.seed(REPO, {"README.md": in_repo(hub)["README.md"] + b"\nBy hand.\n"})
    change(run / "summary.json", clean_accuracy=0.8)
    done(push, run, REPO, "--dry-run", tmp_path / "again")
    done(push, run, REPO)
    assert in_folder(tmp_path / "again") == in_repo(hub), "a dry run takes the card that is there into account"
    assert b"By hand." in in_repo(hub)["README.md"]


def test_a_dry_run_without_the_hub(hub, run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    hub.fail("GET", "/api/models/", status=503)
    done(push, run, REPO, "--dry-run", tmp_path / "dry")
    assert set(in_folder(tmp_path / "dry")) == FILES
    assert "note: written as for a new repository: cannot fetch alice/tiny: the Hub failed" in capsys.readouterr().out
    refused("the folder of a dry run must be new or empty", push, run, REPO, "--dry-run", tmp_path / "dry")


def test_paths_of_this_machine_are_not_published(hub, run):
    recipe = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(recipe.replace("data: uoft-cs/cifar10", "data: /home/me/data/cifar10"))
    change(run / "summary.json", device="/home/me/gpu")
    edit(run, command="recipes/evaluate.py /home/me/runs/a", warnings=("2-LR: /home/me/runs/a saw other images",))
    done(push, run, REPO)
    assert not [name for name, data in in_repo(hub).items() if b"/home/me" in data]
    assert b"data: cifar10" in in_repo(hub)["recipe.yaml"]
    done(push, run, REPO, "--dataset", "uoft-cs/cifar10")
    assert b"data: uoft-cs/cifar10" in in_repo(hub)["recipe.yaml"]


def test_pushed_again_it_updates_and_keeps(hub, run, capsys):
    done(push, run, REPO)
    done(push, run, REPO)
    assert len(hub.repo(REPO).history()) == 2, "nothing had changed"
    card = in_repo(hub)["README.md"].decode()
    card = card.replace("license: apache-2.0", "license: mit\nlanguage: en")
    card = card.replace("<!-- generated: limits -->", "What I want to say.\n\n<!-- generated: limits -->")
    hub.seed(REPO, {"README.md": card, "plots/mine.png": b"\x89PNG\0", "notes.txt": "mine"})
    pgd = dataclasses.replace(FIGURES[1], values={"2-LR": share(100)})
    edit(run, figures=(FIGURES[0], pgd))
    (run / "plots" / "variance.png").write_bytes(b"\x89PNG\0")
    done(push, run, REPO)
    card = in_repo(hub)["README.md"].decode()
    assert "What I want to say.\n\n<!-- generated: limits -->" in card
    assert "license: mit\nlanguage: en" in card
    assert "50.0 %" in section(card, "robustness")
    assert set(in_repo(hub)) == {*FILES, "plots/mine.png", "plots/variance.png", "notes.txt"}

    (run / "plots" / "variance.png").unlink()
    (run / "evaluation.json").unlink()
    capsys.readouterr()
    done(push, run, REPO)
    assert set(in_repo(hub)) == {*FILES, "plots/mine.png", "notes.txt"} - {"evaluation.json"}
    deleted = re.findall("deleted, as of an earlier push: (.*)", capsys.readouterr().out)
    assert deleted == ["evaluation.json", "plots/variance.png"]
    assert "Nothing was evaluated" in in_repo(hub)["README.md"].decode()


def began_from(run, license, model="test_resnet", **options):
    """Has the run begin from pretrained weights under this licence."""
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    arguments = {**recipe["model_args"], **options}
    (run / "config.yaml").write_text(yaml.safe_dump({**recipe, "model": model, "model_args": arguments}))
    config = json.loads((run / "model" / "config.json").read_text())
    change(run / "model" / "config.json", pretrained_cfg={**config["pretrained_cfg"], "license": license})


@pytest.mark.parametrize(
    ("license", "named", "own_name"),
    [("cc-by-nc-4.0", "cc-by-nc-4.0", None), ("mit", "mit", None), ("dinov3-license", "other", "dinov3-license")],
)
def test_the_licence_is_that_of_the_pretrained_weights(hub, run, license, named, own_name):
    began_from(run, license, pretrained=True)
    for _ in range(2):
        done(push, run, REPO)
        card = ModelCard.load(REPO)
        assert (card.data.license, card.data.get("license_name")) == (named, own_name)
        assert card.data.base_model == "timm/test_resnet.r160_in1k"
        assert f"Weights under {license}. The training began from `timm/test_resnet.r160_in1k`, which is" in card.text
    assert len(hub.repo(REPO).history()) == 2, "the second time nothing had changed"


def test_a_licence_that_the_hub_does_not_know_is_called_other_again(run):
    """It is refused there otherwise."""
    began_from(run, "dinov3-license", pretrained=True)
    card, record = "", read_run(run)
    for given, named in (("dinov3-license", "other"), ("dinov3-license", "other"), ("mit", "mit")):
        new = run_card(record, Place.on_hub(REPO), {}, license=given)
        card = merge(card, new, license=given).text.replace("license_name", "license_link: x\nlicense_name", not card)
        data = ModelCard(card).data
        assert data.license == named
        assert data.get("license_name") == ("dinov3-license" if named == "other" else None)
        assert ("license_link" in data.to_dict()) == (named == "other"), "that of the other licence"


def test_weights_from_elsewhere_on_the_hub(hub, run):
    began_from(run, "mit", model="hf-hub:bob/his@v1", pretrained=True)
    done(push, run, REPO)
    assert ModelCard.load(REPO).data.to_dict()["base_model"] == "bob/his"
    assert ModelCard.load(REPO).data.license == "mit"


@pytest.mark.parametrize(
    ("license", "options"),
    [(None, {"pretrained": True}), ("unknown", {"pretrained": True}), ("mit", {"checkpoint_path": "/home/me/w.pth"})],
)
def test_a_licence_that_is_not_known_is_asked_for(hub, run, license, options):
    began_from(run, license, **options)
    message = "began from the weights (timm/test_resnet.r160_in1k|w.pth), whose licence is not known .*with --license"
    refused(message, push, run, REPO)
    assert REPO not in hub.repos
    done(push, run, REPO, "--license", "cc-by-4.0")
    assert ModelCard.load(REPO).data.license == "cc-by-4.0"
    done(push, run, REPO)
    assert ModelCard.load(REPO).data.license == "cc-by-4.0", "the card says it now"


def set_recipe(run, **keys):
    """Sets keys of the recipe of a run."""
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**recipe, **keys}))


@pytest.mark.parametrize("inside", ["", "model", "model/model.safetensors"])
def test_a_run_that_began_from_another_one_began_from_its_weights(hub, run, tmp_path, monkeypatch, inside):
    plain = shutil.copytree(run, tmp_path / "plain")
    set_recipe(run, init_from=str(plain / inside))
    done(push, run, REPO)
    assert ModelCard.load(REPO).data.license == "apache-2.0", "the other one was trained from scratch"
    assert f"| `init_from` | `{(plain / inside).name}` |" in ModelCard.load(REPO).text
    began_from(plain, "cc-by-nc-4.0", pretrained=True)
    done(push, run, "alice/tuned")
    data = ModelCard.load("alice/tuned").data
    assert (data.license, data.to_dict()["base_model"]) == ("cc-by-nc-4.0", "timm/test_resnet.r160_in1k")
    set_recipe(plain, model_args={"pretrained": False}, init_from=str(plain))
    refused("began from the weights plain, whose licence is not known", push, run, "alice/third")


@pytest.mark.parametrize("gone", [True, False])
def test_the_licence_of_weights_that_are_no_run_here_is_asked_for(hub, run, tmp_path, gone):
    if not gone:
        shutil.copytree(run / "model", tmp_path / "base")
    set_recipe(run, init_from=str(tmp_path / "base"))
    refused("began from the weights base, whose licence is not known .*with --license", push, run, REPO)
    assert REPO not in hub.repos
    done(push, run, REPO, "--license", "mit")
    assert "began from `base`, whose licence the push could not find out" in ModelCard.load(REPO).text
    if not gone:
        (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nSomebody's.\n")
        done(push, run, "alice/other")
        assert ModelCard.load("alice/other").data.license == "cc-by-4.0", "of the card beside them"
        assert "The training began from `base`, which is under cc-by-4.0." in ModelCard.load("alice/other").text


def test_a_card_under_another_licence_than_the_pretrained_weights_is_noted(hub, run, capsys):
    done(push, run, REPO)
    assert ModelCard.load(REPO).data.license == "apache-2.0"
    assert ModelCard.load(REPO).data.base_model is None
    began_from(run, "cc-by-nc-4.0", pretrained=True)
    done(push, run, REPO)
    note = "note: the card names the licence apache-2.0, and timm/test_resnet.r160_in1k is under cc-by-nc-4.0"
    assert note in capsys.readouterr().out
    done(push, run, REPO, "--license", "cc-by-nc-4.0")
    assert ModelCard.load(REPO).data.license == "cc-by-nc-4.0"
    hub.seed(REPO, {"README.md": '---\nlicense: "\\e[2Jmine"\n---\n'})
    capsys.readouterr()
    done(push, run, REPO, "--dry-run", run / "dry")
    out = capsys.readouterr().out
    assert "licence [2Jmine, and" in out
    assert "\x1b" not in out


def test_front_matter_with_keys_that_are_no_strings(hub, run):
    hub.seed(REPO, {"README.md": "---\nyes: 1\n---\n"})
    refused("README.md of alice/tiny cannot be read as a model card: keywords must be strings", push, run, REPO)


def test_an_evaluation_of_another_program_stays(hub, run, capsys):
    hub.seed(REPO, {"README.md": "# Mine\n", "evaluation.json": b'{"mine": 1}'})
    (run / "evaluation.json").unlink()
    done(push, run, REPO)
    assert in_repo(hub)["evaluation.json"] == b'{"mine": 1}'
    assert "deleted" not in capsys.readouterr().out


def test_a_card_that_names_other_weights_as_its_base_is_noted(hub, run, capsys):
    done(push, run, REPO)
    hub.seed(
        REPO, {"README.md": in_repo(hub)["README.md"].decode().replace("---\n", "---\nbase_model: timm/other\n", 1)}
    )
    capsys.readouterr()
    done(push, run, REPO)
    note = "note: the card names the base_model timm/other, and "
    assert f"{note}the network was trained from scratch" in capsys.readouterr().out
    began_from(run, "apache-2.0", pretrained=True)
    done(push, run, REPO)
    assert f"{note}the training began from timm/test_resnet.r160_in1k" in capsys.readouterr().out
    assert ModelCard.load(REPO).data.base_model == "timm/other"


def test_marks_that_the_owner_took_out(hub, run, capsys):
    done(push, run, REPO)
    card = in_repo(hub)["README.md"].decode()
    mine = card.replace("<!-- generated: limits -->\n", "").replace("<!-- end of generated: limits -->\n", "")
    hub.seed(REPO, {"README.md": mine})
    done(push, run, REPO)
    assert in_repo(hub)["README.md"].decode() == mine
    assert "note: README.md of alice/tiny has no marks for limits any more" in capsys.readouterr().out

    broken = card.replace("<!-- end of generated: limits -->\n", "")
    hub.seed(REPO, {"README.md": broken})
    refused("README.md of alice/tiny: the marks of the generated section 'limits'", push, run, REPO)
    assert in_repo(hub)["README.md"].decode() == broken
    change(run / "summary.json", clean_accuracy=0.5)
    done(push, run, REPO, "--keep-card")
    assert in_repo(hub)["README.md"].decode() == broken
    assert b'"clean_accuracy": 0.5' in in_repo(hub)["summary.json"]


def other_network():
    """One that was trained elsewhere, and never evaluated."""
    model = trained()
    with torch.no_grad():
        model.unwrap().fc.bias += 1
    return model


def test_other_weights_do_not_keep_the_figures_of_those_before(hub, run, capsys):
    done(push, run, REPO)
    card = in_repo(hub)["README.md"].decode()
    words = "<!-- Mine. -->\nWhat I want to say.\n\n"
    theirs = {"task": {"type": "image-classification"}, "dataset": {"type": "other", "name": "Other"}}
    theirs["metrics"] = [{"type": "accuracy", "value": 0.5}]
    front = yaml.safe_load(card.split("---\n")[1])
    front["model-index"].append({"name": "theirs", "results": [theirs]})
    front |= {"datasets": ["uoft-cs/cifar10", "mine/too"], "license": "mit"}
    body = card.split("---\n", 2)[2].replace("<!-- generated: limits -->", f"{words}<!-- generated: limits -->")
    card = f"---\n{yaml.safe_dump(front)}---\n{body}"
    hub.seed(REPO, {"README.md": card, "plots/mine.png": b"\x89", "notes": "mine"})
    model = other_network()
    tlr.push_to_hub(model, REPO)
    held = in_repo(hub)
    assert set(held) == {*CHECKPOINT, "README.md", "plots/mine.png", "notes"}
    assert len(hub.repo(REPO).history()) == 4, "with one commit"
    text, data = held["README.md"].decode(), ModelCard(held["README.md"].decode()).data
    assert words in text
    assert "neither its accuracy nor its robustness is known" in section(text, "about")
    assert not [number for number in ("90.0 %", "30.0 %", "sha256", "evaluation.json") if number in text]
    assert [result.dataset_type for result in data.eval_results] == ["other"]
    assert (data.datasets, data.license, data.metrics) == (["mine/too"], "mit", ["accuracy"])
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text
    capsys.readouterr()
    done(pull, REPO)
    assert "accuracy" not in capsys.readouterr().out
    tlr.push_to_hub(model, REPO)
    assert in_repo(hub) == held
    done(push, run, REPO)
    assert in_repo(hub).keys() == held.keys() | FILES
    assert words in in_repo(hub)["README.md"].decode()
    assert len(ModelCard.load(REPO).data.eval_results) == 4


def test_the_same_weights_keep_their_figures(hub, run):
    done(push, run, REPO)
    before = in_repo(hub)
    tlr.push_to_hub(run, REPO)
    assert in_repo(hub) == before


def test_a_card_that_cannot_be_told_apart_is_not_left_with_other_weights(hub, run):
    done(push, run, REPO)
    card = in_repo(hub)["README.md"].decode()
    hub.seed(REPO, {"README.md": card.replace("<!-- end of generated: limits -->\n", "")})
    before = in_repo(hub)
    message = r"README.md of alice/tiny: the marks of the generated section 'limits' .* Put the missing one back"
    with pytest.raises(CheckpointError, match=message):
        tlr.push_to_hub(other_network(), REPO)
    assert in_repo(hub) == before


def test_a_branch_of_other_weights_loads_that_branch(hub, run):
    done(push, run, REPO)
    tlr.push_to_hub(other_network(), REPO, revision="dev")
    assert f'create_model("hf-hub:{REPO}@dev"' in in_repo(hub, revision="dev")["README.md"].decode()
    assert "**90.0 %" in in_repo(hub)["README.md"].decode()


def test_a_kept_card_with_figures_of_other_weights_is_noted(hub, run, tmp_path, capsys):
    done(push, run, REPO, "--keep-card")
    assert "figures are of other weights" not in capsys.readouterr().out
    tlr.save_pretrained(other_network(), run / "model")
    (run / "evaluation.json").unlink()
    done(push, run, REPO, "--keep-card")
    assert "note: README.md of alice/tiny was kept, and its figures are of other weights" in capsys.readouterr().out
    done(pull, REPO)
    assert "accuracy" not in capsys.readouterr().out, "of the card"


def test_a_branch_of_its_own(hub, run):
    done(push, run, REPO)
    change(run / "summary.json", clean_accuracy=0.5)
    done(push, run, REPO, "--revision", "next")
    assert "**50.0 %" in in_repo(hub, revision="next")["README.md"].decode()
    assert "**90.0 %" in in_repo(hub)["README.md"].decode()
    assert f"{REPO}/tree/next" in in_repo(hub, revision="next")["README.md"].decode()
    loading = section(in_repo(hub, revision="next")["README.md"].decode(), "loading")
    assert f'timm.create_model("hf-hub:{REPO}@next", pretrained=True)' in loading
    assert loading.count(f'from_pretrained("{REPO}", revision="next")') == 2
    assert "next" not in section(in_repo(hub)["README.md"].decode(), "loading")


def test_private(hub, run):
    done(push, run, REPO, "--private")
    assert hub.repo(REPO).private
    done(push, run, REPO, "--private")
    refused("no permission", push, run, REPO, "--token", "hf_bob")
    hub.seed("alice/open", {})
    refused("alice/open exists and is public", push, run, "alice/open", "--private")
    assert set(in_repo(hub, "alice/open")) == set()


def test_what_is_refused_before_the_hub_is_asked(hub, run, monkeypatch):
    refused("'tiny' is no repository: the name of a repository has the form USER/NAME", push, run, "tiny")
    refused("does not exist: give the folder of a finished run", push, run.parent / "nowhere", REPO)
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no token. Log in with `hf auth login`, set HF_TOKEN", push, run, REPO)
    assert not hub.calls


def test_what_the_hub_refuses(hub, run):
    refused("the Hub does not accept the token", push, run, REPO, "--token", "hf_wrong")
    hub.seed(REPO, {"README.md": "---\nlibrary_name: 3\n---\n"})
    refused('cannot publish alice/tiny: .*"library_name" must be a string', push, run, REPO)
    assert set(in_repo(hub)) == {"README.md"}


def test_a_network_that_breaks_off_in_the_middle(hub, run, waits):
    done(push, run, REPO)
    before = in_repo(hub)
    (run / "model" / "lowrank.json").unlink()
    (run / "evaluation.json").unlink()
    state = run / "model" / "model.safetensors"
    state.write_bytes((run / "twin" / "model" / "model.safetensors").read_bytes())
    for fault in (
        {"path": BLOB, "method": "PUT", "drop_after": 1000},
        {"path": COMMIT, "method": "POST", "status": 500},
    ):
        failing = hub.fail(times=100, **fault)
        refused("cannot publish alice/tiny: .*run it again", push, run, REPO)
        assert in_repo(hub) == before
        failing.times = 0
    hub.fail("POST", COMMIT, lose_answer=True)
    refused("the connection broke .*run it again", push, run, REPO)
    after = in_repo(hub)
    assert after["model.safetensors"] == state.read_bytes()
    done(push, run, REPO)
    assert in_repo(hub) == after
    assert len(hub.repo(REPO).history()) == 3, "the commit whose answer was lost was there, and is not made twice"


def test_somebody_else_writes_at_the_same_time(hub, run, monkeypatch):
    done(push, run, REPO)
    change(run / "summary.json", clean_accuracy=0.5)
    ask = publishing._ask

    def late(*arguments):
        held = ask(*arguments)
        hub.seed(REPO, {"README.md": "written just now"})
        return held

    monkeypatch.setattr(publishing, "_ask", late)
    refused("has changed in the meantime: run it again", push, run, REPO)
    assert in_repo(hub)["README.md"] == b"written just now"


def said_next(capsys):
    """What a command says to do next."""
    return capsys.readouterr().out.split("\nnext:\n  ")[1].rstrip()


def test_what_is_said_to_come_next_keeps_the_options(hub, run, tmp_path, capsys):
    options = ["--private", "--revision", "dev", "--license", "mit", "--dataset", "me/some data", "--keep-card"]
    done(push, run, REPO, "--dry-run", tmp_path / "dry", *options, "--token", "hf_alice")
    said = said_next(capsys)
    assert shlex.split(said) == ["timm-lowrank", "push", str(run), REPO, *options]
    assert "hf_alice" not in said
    done(push, run, REPO, "--dry-run", tmp_path / "bare")
    assert shlex.split(said_next(capsys)) == ["timm-lowrank", "push", str(run), REPO]
    done(push, run, REPO, "--revision", "dev", "--token", "hf_alice")
    assert said_next(capsys) == f"timm-lowrank pull {REPO} --revision dev"
    done(push, run, REPO)
    assert said_next(capsys) == f"timm-lowrank pull {REPO}"


# Loading what was published


RUNNER = """
import hashlib, json, os, sys
import huggingface_hub, safetensors.torch, torch, timm
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
for name, snippet in json.load(sys.stdin):
    if os.fork() == 0:
        names = {}
        exec(snippet, names)
        network = names.get("network") or names["model"]
        images = torch.randn(2, *json.loads(sys.argv[2]), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = network(images)
        state = (network.unwrap() if hasattr(network, "unwrap") else network).state_dict()
        digest = hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()
        loaded = {"logits": getattr(logits, "logits", logits).tolist(), "weights": digest}
        loaded["ours"] = "timm_lowrank" in sys.modules
        with open(os.path.join(sys.argv[1], name), "w") as file:
            json.dump(loaded, file)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


def test_the_snippets_of_the_card_load_it_in_fresh_processes(hub, tmp_path):
    pytest.importorskip("transformers")
    expected, snippets = {}, []
    own = {"channels": [8, 8, 8, 8]}
    for kind, name, options in (("timms", "test_resnet", {}), ("ours", "resnet10_cifar", own)):
        model = make_run(tmp_path / kind, name, evaluated=False, **options)
        done(push, tmp_path / kind, f"alice/{kind}")
        blocks = re.findall(r"```python\n(.*?)```", in_repo(hub, f"alice/{kind}")["README.md"].decode(), re.DOTALL)
        state = model.unwrap().state_dict()
        digest = hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()
        for library_name, block in zip(("timm", "transformers", "timm_lowrank"), blocks, strict=True):
            snippets.append((f"{kind}-{library_name}", block))
            expected[f"{kind}-{library_name}"] = model(images()).detach(), digest
    arguments = [sys.executable, "-c", RUNNER, str(tmp_path), json.dumps(images().shape[1:])]
    subprocess.run(arguments, input=json.dumps(snippets), text=True, check=True, env=os.environ, cwd=tmp_path)
    for name, (logits, digest) in expected.items():
        loaded = json.loads((tmp_path / name).read_text())
        assert loaded["weights"] == digest, name
        torch.testing.assert_close(torch.tensor(loaded["logits"]), logits, rtol=1e-5, atol=1e-6, msg=name)
        assert loaded["ours"] is (name not in ("timms-timm", "timms-transformers")), name


def test_pulled_and_verified(hub, run, tmp_path, capsys):
    done(push, run, REPO)
    hub.seed(REPO, {"pytorch_model.bin": b"\x80"})
    capsys.readouterr()
    done(pull, REPO, tmp_path / "copy")
    out = capsys.readouterr().out
    expected = {name: data for name, data in hub.repo(REPO).files().items() if name != "pytorch_model.bin"}
    assert in_folder(tmp_path / "copy") == expected
    assert "alice/tiny: test_resnet, 3 classes, images of 3 x 32 x 32" in out
    assert "trained with low-rank branches on pre_logits (rank 4)" in out
    assert "clean accuracy 90.0 % (88.7 to 91.3) of 2,000 test images (uoft-cs/cifar10)" in out
    assert f"the sha256 {hashlib.sha256(expected['model.safetensors']).hexdigest()}; all files are what the Hub" in out
    names = {}
    for block in ("import timm\n    network", "import timm_lowrank\n    model"):
        exec(re.sub(r"^ +", "", out[out.index(block) :].split("\nor,")[0], flags=re.MULTILINE), names)
    state = names["network"].state_dict()
    assert all(torch.equal(state[key], value) for key, value in names["model"].unwrap().state_dict().items())
    refused("exists and is not empty: choose a new folder", pull, REPO, tmp_path / "copy")

    done(pull, REPO)
    out = capsys.readouterr().out
    commit = hub.repo(REPO).history()[0].sha
    assert f'timm.create_model("hf-hub:{REPO}@{commit}", pretrained=True)' in out
    assert f'from_pretrained("{REPO}", revision="{commit}")' in out


def test_the_current_folder_and_a_link_to_an_empty_one_are_taken(hub, run, tmp_path, monkeypatch):
    for name in ("dry", "pulled"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name} link").symlink_to(tmp_path / name)
    done(push, run, REPO, "--dry-run", tmp_path / "dry link")
    done(push, run, REPO)
    done(pull, REPO, tmp_path / "pulled link")
    assert in_folder(tmp_path / "dry") == in_repo(hub)
    assert in_folder(tmp_path / "pulled") == hub.repo(REPO).files()
    for name, command in (("here", (push, run, REPO, "--dry-run", ".")), ("there", (pull, REPO, "."))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        done(*command)
        assert in_repo(hub).items() <= in_folder(tmp_path / name).items()
    refused("exists and is not empty: choose a new folder", pull, REPO, ".")
    refused("must be new or empty", push, run, REPO, "--dry-run", ".")


def test_damaged_on_the_way(hub, run, tmp_path):
    done(push, run, REPO)
    weight = hub.fail("GET", weights(hub), corrupt_at=1_000_000)
    text = hub.fail("GET", "/resolve/.*/evaluation.json", corrupt_at=100, times=1000)
    for destination in ((), (tmp_path / "copy",)):
        refused(r"evaluation.json is not what the Hub lists", pull, REPO, *destination)
    assert not (tmp_path / "copy").exists()
    text.times = 0
    hub.calls.clear()
    done(pull, REPO, tmp_path / "copy")
    assert weight.hits == 1
    assert not hub.seen("GET", BLOB), "what was fetched anew and is sound is not fetched a third time"
    assert in_folder(tmp_path / "copy") == hub.repo(REPO).files()


def test_a_damaged_file_whose_name_would_be_a_pattern_is_fetched_again(hub, run):
    hub.seed(REPO, {**in_folder(run / "model"), "notes[1].txt": "mine"})
    kept = download(REPO, names=None) / "notes[1].txt"
    kept.write_text("else")
    done(pull, REPO)
    assert kept.read_text() == "mine"


def test_what_cannot_be_pulled(hub, run, tmp_path, waits):
    refused("there is no such repository, or it is private", pull, "alice/absent")
    refused("'tiny' is no repository", pull, "tiny")
    hub.seed("alice/notes", {"notes.txt": "x"})
    refused("alice/notes holds no config.json", pull, "alice/notes", tmp_path / "new")
    done(push, run, REPO, "--private")
    refused("private and not yours to see", pull, REPO, "--token", "hf_bob")
    refused("its sha256 is .*and it should be 0000", pull, REPO, "--sha256", "0" * 64)
    (tmp_path / "file").touch()
    refused("could not write .*What was fetched is kept in the cache", pull, REPO, tmp_path / "file" / "new")
    hub.seed(REPO, {"../../stolen": b"x"})
    refused("is no name of a file inside", pull, REPO, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    architecture = b'{"architecture": "nonesuch"}'
    hub.seed("alice/new", {"config.json": architecture, "model.safetensors": in_repo(hub)["model.safetensors"]})
    refused("there is no architecture 'nonesuch'", pull, "alice/new")


def test_a_pull_without_the_hub_takes_the_cache(hub, run, tmp_path, monkeypatch, waits, capsys):
    done(push, run, REPO)
    done(pull, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capsys.readouterr()
    done(pull, REPO, tmp_path / "copy")
    assert in_folder(tmp_path / "copy") == hub.repo(REPO).files()
    assert "; the Hub could not be asked for the sums" in capsys.readouterr().out
    refused("no connection to the Hub, or HF_HUB_OFFLINE is set, and the cache does not", pull, "alice/other")


def test_a_pickle_that_another_program_has_fetched_is_not_copied(hub, run, tmp_path):
    done(push, run, REPO)
    hub.seed(REPO, {"pytorch_model.bin": b"\x80"})
    hf_hub_download(REPO, "pytorch_model.bin")
    done(pull, REPO, tmp_path / "copy")
    assert not (tmp_path / "copy" / "pytorch_model.bin").exists()


def test_a_pull_that_breaks_off_goes_on(hub, run, tmp_path, waits):
    done(push, run, REPO)
    fault = hub.fail("GET", weights(hub), drop_after=1000, times=1000)
    refused("the connection broke .*what has arrived is kept", pull, REPO, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    fault.times = 0
    done(pull, REPO, tmp_path / "copy")
    assert set(in_folder(tmp_path / "copy")) >= FILES


def test_names_in_a_repository_cannot_move_the_cursor(hub, run, capsys):
    done(push, run, REPO)
    lowrank = json.loads(in_repo(hub)["lowrank.json"])
    lowrank["layers"] = {"\x1b[31m": {"rank": 4, "num_features": 7}}
    card = in_repo(hub)["README.md"].decode().replace("name: uoft-cs/cifar10", 'name: "\\e[2J\\nevil"')
    hub.seed(REPO, {"README.md": card, "lowrank.json": json.dumps(lowrank)})
    capsys.readouterr()
    done(pull, REPO)
    out = capsys.readouterr().out
    assert "(rank 4)" in out
    assert "evil" in out
    assert "\x1b" not in out
    hub.seed(REPO, {"README.md": "Mine.", "lowrank.json": json.dumps({**lowrank, "format": 99})})
    done(pull, REPO)
    assert "its low-rank branches cannot be loaded: " in capsys.readouterr().out
