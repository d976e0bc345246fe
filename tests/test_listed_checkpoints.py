"""The checkpoints of the clone: added by a command, loaded by bare name, published by one command; see loopback_hub."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluations import DATA
from huggingface_hub import ModelCard
from publishable import evaluation, in_repo
from scripts import ROOT, done, in_folder, refused, script

import timm_lowrank as tlr
from timm_lowrank import CheckpointError, files
from timm_lowrank.checkpoint import listed
from timm_lowrank.checkpoint.listed import folder_of, read_checkpoints
from timm_lowrank.data import load_images
from timm_lowrank.data.images import balanced_rows
from timm_lowrank.evaluation.results import write_evaluation
from timm_lowrank.publish import checkpoints as publishing
from timm_lowrank.publish.card import Place, run_card
from timm_lowrank.publish.checkpoints import SAMPLE, checkpoints_table, count_right
from timm_lowrank.publish.merging import section
from timm_lowrank.publish.record import read_run
from timm_lowrank.suites.networks import load_network
from timm_lowrank.training import load_recipe, train
from timm_lowrank.training.run import unlike_twin

checkpoints, push, pull = (script(name) for name in ("checkpoints", "push", "pull"))

WHOLE = "TIMM_LOWRANK_CIFAR10"  # names a folder with all test images of CIFAR-10 in parquet files
FILES = {
    "README.md", "config.json", "evaluation.json", "lowrank.json", "lowrank.safetensors", "model.safetensors",
    "plots/spectrum.png", "recipe.yaml", "summary.json",
}  # fmt: skip
SHORT = [
    "model_args.channels=[8,8,16,16]", "data_args.train_limit=450", "epochs=6", "batch_size=32",
    "pretrain_epochs=1", "warmup_epochs=0",
    "lowrank.branches={layer3: 6}", "lowrank.warmup_updates=5",
    "lowrank.project_every=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a tiny network on digits, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("trained") / "digits"
    seen = train(load_recipe("digits", SHORT), folder).data
    data = dataclasses.replace(DATA, images=200, fingerprint=seen.fingerprint)
    write_evaluation(evaluation(folder / "model", folder / "twin" / "model", data=data), folder / "evaluation.json")
    return folder


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of the project as far as its checkpoints go, without any."""
    root = tmp_path / "clone"
    for folder in ("hub", "docs"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "recipes" / "configs", root / "recipes" / "configs")
    (root / "hub" / "checkpoints.yaml").write_text("[]")
    (root / "docs" / "hub.md").write_text(
        "# Page\n\n<!-- generated: checkpoints -->\n<!-- end of generated: checkpoints -->\n\nMine.\n"
    )
    monkeypatch.setattr(listed, "CLONE", root)
    return root


@pytest.fixture
def added(clone, trained):
    """The clone with the run as "tiny"."""
    done(checkpoints, "add", trained, "tiny", "--sample", "digits")
    return clone


def rows(clone):
    return {row.name: row for row in read_checkpoints(clone / "hub" / "checkpoints.yaml")}


def same_weights(model, folder):
    own = tlr.checkpoint.loading.load_folder(folder, lowrank=False).state_dict()
    state = (model.unwrap() if isinstance(model, tlr.LowRankModel) else model).state_dict()
    return all(torch.equal(state[name], value) for name, value in own.items())


# The checkpoints of this project


LISTED = read_checkpoints(ROOT / "hub" / "checkpoints.yaml")
HERE = [row for row in LISTED if folder_of(row.name).is_dir()]


def test_the_list_of_this_project_is_sound():
    assert LISTED, "docs/hub.md shows some"
    for row in LISTED:
        assert (ROOT / row.recipe).is_file(), row.name
        assert (row.sample is not None) is (row in HERE), row.name
    shown = section((ROOT / "docs" / "hub.md").read_text(), "checkpoints")
    assert shown.strip() == checkpoints_table(LISTED), "python hub/checkpoints.py table --write docs/hub.md"
    folders = {folder.name for folder in folder_of("").glob("*")}
    assert folders == {row.name for row in HERE}, "each folder has its row"
    sizes = [sum(file.stat().st_size for file in folder_of(row.name).rglob("*") if file.is_file()) for row in HERE]
    assert max(sizes, default=0) <= publishing.MOST_BYTES
    assert sum(sizes) <= publishing.MOST_BYTES_TOGETHER


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.name)
def test_a_checkpoint_of_this_project_is_what_its_row_says(row):
    """Two images of 200 may fall to the other side on another processor."""
    record = read_run(folder_of(row.name), sha256=row.sha256)
    assert publishing.figures_of(record) == row.figures
    counted = count_right(folder_of(row.name), row.sample.source, row.figures.clean)
    assert counted.images == row.sample.images
    assert abs(counted.right - row.sample.right) <= 2
    clean = ModelCard((folder_of(row.name) / "README.md").read_text(encoding="utf-8")).data.eval_results[0]
    assert clean.metric_value == row.figures.clean.value


def test_the_twin_of_a_checkpoint_of_this_project_was_trained_alike():
    records = [read_run(folder_of(row.name)) for row in HERE]
    weights = [{one.title: one.weights for one in record.evaluation.networks} for record in records]
    own = {of[record.title]: record.run for record, of in zip(records, weights, strict=True)}
    pairs = [
        (record, of[record.plain_title]) for record, of in zip(records, weights, strict=True) if record.plain_title
    ]
    beside = [(record.run, own[plain]) for record, plain in pairs]
    assert len(beside) == len(HERE) - 1, "all but the plain one"
    assert all(record.plain_is_twin for record in records if record.plain_title)
    for run, plain in beside:
        assert unlike_twin(run.recipe, plain.recipe) == []
        assert run.summary.data.fingerprint == plain.summary.data.fingerprint


@pytest.mark.parametrize("row", [row for row in HERE if row.sample.source == SAMPLE], ids=lambda row: row.name)
def test_its_accuracy_on_all_test_images(row):
    """Where they are at hand; the run may have counted in bf16."""
    if WHOLE not in os.environ:
        pytest.skip(f"{WHOLE} names no folder with the test images of CIFAR-10")
    whole = count_right(folder_of(row.name), os.environ[WHOLE])
    assert whole.images == row.figures.clean.images
    assert abs(whole.right / whole.images - row.figures.clean.value) <= 0.003


def test_the_sample_is_20_images_of_each_class():
    sample = load_images(str(ROOT / SAMPLE), train_split="test", test_split="test")
    assert torch.bincount(sample.test_labels).tolist() == [20] * 10
    assert sample.class_names[0] == "airplane"
    assert sum(file.stat().st_size for file in (ROOT / SAMPLE).iterdir()) < 600_000
    if WHOLE in os.environ:
        whole = load_images(os.environ[WHOLE], train_split="test", test_split="test")
        first = balanced_rows(whole.test_labels.numpy(), 200, 10)
        assert np.array_equal(whole.test_images[first], sample.test_images)


# Adding


def test_the_licence_of_an_added_run_can_be_named(clone, trained, tmp_path):
    """It has to be, where that of the weights that it began from is not known."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    began = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**began, "init_from": "w.pth"}))
    refused("w.pth, whose licence is not known .*with --license", checkpoints, "add", run, "tiny", "--sample", "digits")
    assert not folder_of("tiny").exists()
    done(checkpoints, "add", run, "tiny", "--sample", "digits", "--license", "cc-by-4.0")
    assert ModelCard.load(folder_of("tiny") / "README.md").data.license == "cc-by-4.0"


def test_the_licence_of_an_added_run_stays_where_its_recipe_has_lost_the_folder_that_it_began_from(
    hub, clone, trained, tmp_path
):
    run, base = shutil.copytree(trained, tmp_path / "run"), tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**recipe, "init_from": str(base)}))
    for source in (run, folder_of("tiny")):
        done(checkpoints, "add", source, "tiny", "--sample", "digits")
        assert ModelCard.load(folder_of("tiny") / "README.md").data.license == "cc-by-nc-4.0"
    done(push, "--all", "--user", "alice")
    assert ModelCard.load("alice/tiny").data.license == "cc-by-nc-4.0"


def test_an_added_run_is_a_folder_a_row_and_a_line_of_the_page(added, trained, capsys):
    folder = folder_of("tiny")
    assert set(in_folder(folder)) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "nothing temporary is left"
    row, run = rows(added)["tiny"], read_run(trained)
    assert (row.repo, row.recipe, row.sha256) == (None, "recipes/configs/digits.yaml", run.sha256)
    assert row.figures == publishing.figures_of(run)
    assert row.figures.clean.value == round(run.run.summary.clean_accuracy, 6)
    assert (row.figures.pgd.plain, row.figures.effective_rank["layer3"].plain) == (
        0.1,
        run.effective_rank("layer3").plain,
    )
    assert row.sample.images == 360
    assert abs(row.sample.right - row.figures.clean.value * 360) < 1.5, "the same images as in training"
    text = (added / "docs" / "hub.md").read_text()
    assert section(text, "checkpoints").strip() == checkpoints_table([row])
    assert text.endswith("Mine.\n")
    card = (folder / "README.md").read_text()
    assert 'tlr.from_pretrained("tiny")' in card
    assert 'timm.create_model("local-dir:hub/checkpoints/tiny", pretrained=True)' in card
    results = ModelCard(card).data.eval_results
    assert [result.metric_value for result in results] == [
        accuracy.value for accuracy in (row.figures.clean, row.figures.pgd, row.figures.autoattack)
    ]
    before = in_folder(added)
    done(checkpoints, "add", folder, "tiny", "--sample", "digits")
    assert in_folder(added) == before, "made anew from itself it is the same"
    network = load_network(str(folder))
    assert (network.branches, network.recipe, network.weights) == (
        {"layer3": 6},
        run.run.recipe,
        run.evaluation.networks[0].weights,
    )


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_takes_the_place_of_the_one_before(tmp_path, monkeypatch, at_once):
    """Also where a system cannot exchange two names."""
    if not at_once:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    folder = tmp_path / "one"
    (tmp_path / ".writing-killed" / "new").mkdir(parents=True)
    for text in ("first", "second"):
        with files.folder_aside(folder) as new:
            (new / "inner").mkdir()
            (new / "inner" / text).write_text(text)
        assert in_folder(folder) == {f"inner/{text}": text.encode()}
    with pytest.raises(OSError, match="full"), files.folder_aside(folder) as new:
        raise OSError("full")
    assert in_folder(tmp_path) == {"one/inner/second": b"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "nothing temporary is left"


def test_a_plain_run(added, trained, tmp_path):
    shutil.copytree(trained / "twin", tmp_path / "run")
    write_evaluation(evaluation(tmp_path / "run/model", trained / "model"), tmp_path / "run" / "evaluation.json")
    done(checkpoints, "add", tmp_path / "run", "plain", "--sample", "digits")
    assert rows(added)["plain"].recipe == "recipes/configs/digits.yaml"
    assert set(rows(added)) == {"tiny", "plain"}
    assert set(in_folder(folder_of("plain"))) == FILES - {"lowrank.json", "lowrank.safetensors"}
    assert "It was trained plainly" in (folder_of("plain") / "README.md").read_text()
    assert same_weights(tlr.from_pretrained("plain", lowrank=False), trained / "twin" / "model")


def test_what_is_too_large_is_left_out_or_refused(added, trained, capsys, monkeypatch):
    whole = in_folder(added)
    size = sum(len(data) for name, data in whole.items() if name.startswith("hub/checkpoints/"))
    monkeypatch.setattr(publishing, "MOST_BYTES", 1000)
    refused(
        "tiny would take .* bytes, and 1,000 are the most", checkpoints, "add", trained, "tiny", "--sample", "digits"
    )
    monkeypatch.setattr(publishing, "MOST_BYTES", 2 * size)
    monkeypatch.setattr(publishing, "MOST_BYTES_TOGETHER", 2 * size - 1)
    message = "hub/checkpoints would take .* bytes, and .* are the most"
    refused(message, checkpoints, "add", trained, "second", "--sample", "digits")
    assert in_folder(added) == whole

    monkeypatch.setattr(publishing, "MOST_BYTES", size - 1)
    done(checkpoints, "add", trained, "tiny", "--sample", "digits")
    projected, as_trained = tlr.from_pretrained("tiny"), tlr.from_pretrained(trained)
    assert same_weights(projected, trained / "model")
    (own, expected) = (model.branches["layer3"] for model in (projected, as_trained))
    assert torch.equal(own.bias, expected.bias)
    assert own.weight.size == own.rank < expected.weight.size, "the run ended between two projections"
    expected.project()
    torch.testing.assert_close(own.weight.dense(), expected.weight.dense(), rtol=0, atol=0)

    size = sum(len(data) for name, data in in_folder(added).items() if name.startswith("hub/checkpoints/"))
    monkeypatch.setattr(publishing, "MOST_BYTES", size - 1)
    done(checkpoints, "add", trained, "tiny", "--sample", "digits")
    assert ", without W and b" in capsys.readouterr().out
    assert set(in_folder(folder_of("tiny"))) == FILES - {"lowrank.safetensors"}
    assert "Their W and b were left out for their size" in (folder_of("tiny") / "README.md").read_text()
    with pytest.warns(UserWarning, match="without their W and b: they begin anew"):
        model = tlr.from_pretrained("tiny")
    assert same_weights(model, trained / "model")
    assert model.branches["layer3"].rank == 6
    model.train()(torch.rand(4, 1, 8, 8))
    model.penalty()
    model.update()


@pytest.mark.parametrize("lacking", ["evaluation.json", "summary.json"])
def test_a_run_that_is_not_finished_or_evaluated_is_refused(added, trained, tmp_path, lacking):
    before = in_folder(added)
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / lacking).unlink()
    message = {
        "evaluation.json": "was not evaluated: run `timm-lowrank evaluate",
        "summary.json": "not come to its end",
    }
    refused(message[lacking], checkpoints, "add", tmp_path / "run", "tiny", "--sample", "digits")
    assert in_folder(added) == before


def test_what_else_is_refused_leaves_everything_as_it_was(added, trained, tmp_path, monkeypatch):
    shutil.copytree(ROOT / SAMPLE, added / SAMPLE)
    before = in_folder(added)
    refused(
        "the classes of the sample .* are airplane, .* and those of the network 0, 1", checkpoints, "add", trained, "x"
    )
    refused("the sample cannot be read: .*no/where", checkpoints, "add", trained, "x", "--sample", "no/where")
    refused("there is no recipe recipes/x.yaml", checkpoints, "add", trained, "x", "--recipe", "recipes/x.yaml")
    refused("'user/a b' is no repository", checkpoints, "add", trained, "a b", "--sample", "digits")
    (tmp_path / "wrong").mkdir()
    shutil.copytree(trained, tmp_path / "wrong", dirs_exist_ok=True)
    path = tmp_path / "wrong" / "model" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {"mean": [1.0], "std": [0.01]}
    path.write_text(json.dumps(config))
    refused("of all test images according to its run: .*normalised", checkpoints, "add", tmp_path / "wrong", "tiny",
            "--sample", "digits")  # fmt: skip
    page = added / "docs" / "hub.md"
    page.write_text("no marks")
    refused("has no place for the table", checkpoints, "add", trained, "tiny", "--sample", "digits")
    page.write_bytes(before["docs/hub.md"])
    assert in_folder(added) == before

    replace = os.replace

    def failing(source, target):
        if Path(target) == folder_of("tiny") and Path(source).name == "new":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files, "_exchanged", lambda one, two: False)  # a system that cannot do it
    monkeypatch.setattr(os, "replace", failing)
    refused("could not write .*tiny: No space left", checkpoints, "add", trained, "tiny", "--sample", "digits")
    assert in_folder(added) == before


# By name


def test_by_name_it_comes_from_the_clone_until_it_is_published(added, trained, tmp_path, capsys):
    model = tlr.from_pretrained("tiny")
    assert isinstance(model, tlr.LowRankModel)
    assert same_weights(model, trained / "model")
    state = tlr.from_pretrained(trained).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="not on the Hub yet, and its copy in the clone has no revisions"):
        tlr.from_pretrained("tiny", revision="main")
    done(pull, "tiny", tmp_path / "copy")
    out = capsys.readouterr().out
    assert in_folder(tmp_path / "copy") == in_folder(folder_of("tiny"))
    assert "tiny: resnet10_cifar, 10 classes, images of 1 x 8 x 8" in out
    assert "it is not on the Hub yet, and was taken from this clone" in out
    done(pull, "tiny")
    assert f"9 files in {folder_of('tiny')}" in capsys.readouterr().out


def test_a_checkpoint_is_evaluated_by_its_name(added, trained):
    network, its_run = load_network("tiny"), load_network(str(trained))
    assert (network.path, network.title, network.branches) == ("tiny", its_run.title, its_run.branches)
    assert network.weights == its_run.weights


def test_names_that_lead_nowhere(added, monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"'tine' is no repository: .* no checkpoint of this project .*are: tiny$"
    ):
        tlr.from_pretrained("tine")
    refused("'tine' is no repository: .* There are: tiny", pull, "tine")
    shutil.rmtree(folder_of("tiny"))
    with pytest.raises(
        CheckpointError, match=r"tiny is not on the Hub yet.*clone the project.*timm-lowrank train digits"
    ):
        tlr.from_pretrained("tiny")


def test_weights_in_the_clone_that_are_not_the_listed_ones(added, trained):
    tlr.save_pretrained(tlr.from_pretrained(trained / "twin", lowrank=False), folder_of("tiny"))
    with pytest.raises(CheckpointError, match="was damaged or exchanged"):
        tlr.from_pretrained("tiny", lowrank=False)
    refused("was damaged or exchanged", pull, "tiny")


# Publishing


def test_all_are_published_with_one_command_from_a_fresh_clone(hub, added, trained, tmp_path, capsys):
    fresh = tmp_path / "fresh"
    shutil.copytree(added, fresh)
    listed.CLONE = fresh  # the fixture puts it back
    done(push, "--all", "--user", "alice", "--private", "--dry-run", tmp_path / "dry")
    assert not hub.repos
    assert "\nnext:\n  timm-lowrank push --all --user alice --private\n" in capsys.readouterr().out
    done(push, "--all", "--user", "alice")
    assert "noted in hub/checkpoints.yaml and docs/hub.md: commit both" in capsys.readouterr().out
    assert in_folder(tmp_path / "dry" / "tiny") == in_repo(hub, "alice/tiny")
    sent = in_repo(hub, "alice/tiny")
    here = in_folder(folder_of("tiny"))
    assert set(sent) == FILES
    assert {name for name in FILES if sent[name] != here[name]} == {"README.md"}, "which says how to load it from there"
    assert 'tlr.from_pretrained("alice/tiny")' in sent["README.md"].decode()
    assert rows(fresh)["tiny"].repo == "alice/tiny"
    assert "[tiny](https://huggingface.co/alice/tiny)" in (fresh / "docs" / "hub.md").read_text()
    done(push, "--all", "--user", "alice")
    assert len(hub.repo("alice/tiny").history()) == 2, "nothing had changed"

    hub.fail("GET", "/api/models/alice/tiny", status=404, code="RepoNotFound")
    with pytest.warns(UserWarning, match=r"no such repository.* Its copy in this clone was loaded"):
        assert same_weights(tlr.from_pretrained("tiny"), trained / "model")

    shutil.rmtree(folder_of("tiny"))  # as from the wheel
    assert same_weights(tlr.from_pretrained("tiny"), trained / "model")
    capsys.readouterr()
    done(pull, "tiny", tmp_path / "copy")
    assert "clean accuracy" in capsys.readouterr().out
    assert {name: data for name, data in in_folder(tmp_path / "copy").items() if name != ".gitattributes"} == sent


def test_a_repository_that_holds_other_weights_than_the_listed_ones(hub, added, trained):
    done(push, "--all", "--user", "alice")
    other = tlr.from_pretrained(trained / "twin", lowrank=False)
    tlr.push_to_hub(other, "alice/tiny")
    with pytest.raises(CheckpointError, match="was damaged or exchanged"):
        tlr.from_pretrained("tiny", lowrank=False)
    refused("was damaged or exchanged", pull, "tiny")
    assert same_weights(tlr.from_pretrained("alice/tiny", lowrank=False), trained / "twin" / "model")


def test_other_weights_of_a_published_name_are_to_be_published_again(hub, added, trained, tmp_path, capsys):
    done(push, "--all", "--user", "alice")
    shutil.copytree(trained, tmp_path / "run")
    model = tlr.from_pretrained(trained)
    with torch.no_grad():
        model.unwrap().conv1.weight += 1e-4
    tlr.save_pretrained(model, tmp_path / "run" / "model", label_names=[str(digit) for digit in range(10)])
    write_evaluation(evaluation(tmp_path / "run/model", trained / "twin/model"), tmp_path / "run/evaluation.json")
    done(checkpoints, "add", tmp_path / "run", "tiny", "--sample", "digits")
    assert "note: alice/tiny holds other weights: publish it again" in capsys.readouterr().out
    assert rows(added)["tiny"].repo is None
    assert same_weights(tlr.from_pretrained("tiny"), tmp_path / "run" / "model")


def test_pushing_all_is_refused(hub, added, tmp_path, monkeypatch):
    refused("give --all and --user USER together", push, "--all")
    refused("give --all and --user USER together", push, tmp_path, "alice/x", "--all", "--user", "alice")
    refused("give RUN and USER/NAME, or --all and --user USER", push, tmp_path)
    refused("--keep-card is for a single run", push, "--all", "--user", "alice", "--keep-card")
    refused("'a b/tiny' is no repository", push, "--all", "--user", "a b")
    weights = bytearray((folder_of("tiny") / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder_of("tiny") / "model.safetensors").write_bytes(weights)
    refused("was damaged or exchanged", push, "--all", "--user", "alice")
    shutil.rmtree(folder_of("tiny"))
    refused("holds none of the listed checkpoints", push, "--all", "--user", "alice")
    monkeypatch.setattr(listed, "CLONE", tmp_path / "site-packages")
    refused("lie in a clone of it, and .*site-packages is none", push, "--all", "--user", "alice")
    assert not hub.repos


def test_a_push_of_all_that_breaks_off_goes_on(hub, added, trained, waits):
    done(checkpoints, "add", trained, "second", "--sample", "digits")
    fault = hub.fail("POST", "/api/models/alice/second/commit/", status=500, times=100)
    refused("cannot publish alice/second: .*run it again", push, "--all", "--user", "alice")
    assert {name: row.repo for name, row in rows(added).items()} == {"tiny": "alice/tiny", "second": None}
    fault.times = 0
    done(push, "--all", "--user", "alice")
    assert rows(added)["second"].repo == "alice/second"


# The list


def test_the_table(added, trained, tmp_path, capsys):
    row = yaml.safe_load((added / "hub" / "checkpoints.yaml").read_text())[0]
    results = ModelCard(run_card(read_run(trained), Place.on_hub("alice/tiny"), {}, license=None)).data.eval_results
    assert row["figures"]["autoattack"]["value"] == results[2].metric_value
    bare = {**row, "name": "second", "figures": {"clean": row["figures"]["clean"]}}
    path, readme = tmp_path / "list.yaml", tmp_path / "README.md"
    path.write_text(yaml.safe_dump([{**row, "repo": "alice/tiny"}, bare]))
    capsys.readouterr()
    done(checkpoints, "table", "--list", path)
    table = capsys.readouterr().out
    assert "[tiny](https://huggingface.co/alice/tiny) | `digits` | " in table
    assert "1.5 % (0.5 to 4.3) of 200; plain 0.0 % | `layer3` " in table
    assert "| second | `digits` |" in table
    assert table.count("| not measured | not measured |") == 1, "PGD and AutoAttack of the second one"
    readme.write_text("before\n\nafter\n")
    refused("has no place for the table: put the lines", checkpoints, "table", "--list", path, "--write", readme)
    marks = "<!-- generated: checkpoints -->\n", "<!-- end of generated: checkpoints -->"
    readme.write_text("before\n" + "".join(marks) + "\nafter\n")
    for _ in range(2):
        done(checkpoints, "table", "--list", path, "--write", readme)
        assert readme.read_text() == f"before\n{marks[0]}{table}{marks[1]}\nafter\n"


GOOD = {"name": "tiny", "repo": None, "recipe": "recipes/configs/digits.yaml", "sha256": "0" * 64, "figures": {}}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"sha": "x"}, r"there is no key 'sha'. Did you mean: sha256"),
        ({"sha256": "123"}, "sha256 must be 64 hexadecimal digits"),
        ({"repo": "a b"}, "'a b' is no repository"),
        ({"figures": {"pdg": {}}}, "there is no key 'pdg'. Did you mean: pgd"),
        ({"figures": {"clean": {"value": 90.1, "low": 0, "high": 1, "images": 10}}}, "shares lie between 0 and 1"),
        ({"figures": {"clean": {"value": 0.9}}}, "clean: the key 'low' is missing"),
        ({"repo": 5}, "'5' is no repository"),
        ({"figures": {"effective_rank": {"layer3": 3}}}, "the rank of layer3 must be a mapping"),
        ({"figures": {"effective_rank": None}}, "effective_rank must be a mapping"),
        ({"sample": {"source": "digits", "images": 10, "right": 11}}, "right must lie between 0 and images"),
    ],
)
def test_rows_that_cannot_be(tmp_path, changed, match):
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump([{**GOOD, "name": "other"}, {**GOOD, **changed}]))
    refused(rf"row 2 .tiny.: .*{match}", checkpoints, "table", "--list", path)
    path.write_text(yaml.safe_dump([GOOD, GOOD]))
    refused("row 2 .tiny.: there is a row of this name already", checkpoints, "table", "--list", path)


@pytest.mark.parametrize(("text", "match"), [("a: 1", "must hold a list"), ("[x]", "row 1 "), ("a: [", "cannot read")])
def test_lists_that_cannot_be(tmp_path, text, match):
    (tmp_path / "list.yaml").write_text(text)
    refused(match, checkpoints, "table", "--list", tmp_path / "list.yaml")
