"""The card of a published run: what it claims, what it keeps, and what cannot break it."""

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from evaluations import SOUND, figure
from huggingface_hub import ModelCard
from publishable import FIGURES, REPO, change, edit, evaluation, make_run, share, summary

import timm_lowrank as tlr
from timm_lowrank import CheckpointError
from timm_lowrank.evaluation.results import (
    Check,
    Value,
    Verdict,
    evaluation_from_json,
    read_evaluation,
    write_evaluation,
)
from timm_lowrank.publish import push_to_hub
from timm_lowrank.publish.card import Dataset, Place, code, dataset_of, escaped, run_card, short_card
from timm_lowrank.publish.checkpoints import figures_of
from timm_lowrank.publish.front_matter import license_of
from timm_lowrank.publish.merging import merge, section
from timm_lowrank.publish.paths import without_local_paths
from timm_lowrank.publish.record import read_run
from timm_lowrank.publish.run import files_of
from timm_lowrank.report import text_table, write_report
from timm_lowrank.suites.measurements.accuracy import PGD, AutoAttack, Clean, PGDSteps, PixelNoise
from timm_lowrank.suites.measurements.base import Context, Results
from timm_lowrank.suites.networks import infos_of, load_network, load_networks
from timm_lowrank.suites.plan import chosen_suites, measurements_of

SECTIONS = ["about", "loading", "low-rank", "robustness", "limits", "training", "files", "citation"]


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def card(run, **options):
    """The card of a run in the repository REPO."""
    record = read_run(run)
    return run_card(
        record, Place.on_hub(REPO), {"config.json": "the network"}, **{"license": record.license(), **options}
    )


def merged(run, before, license=None):
    """The same written into a card that is there."""
    return merge(before, card(run, license=license or license_of(before, "README.md")), license=license)


def mark(name, body=""):
    """A generated section with its marks."""
    return f"<!-- generated: {name} -->\n{body}{chr(10) if body else ''}<!-- end of generated: {name} -->"


def without(*keys):
    return lambda figures: tuple(one for one in figures if one.key not in keys)


def with_values(key, *values):
    """Gives a figure other values of this network and its twin."""
    names = ("2-LR", "plain")
    return lambda figures: tuple(
        dataclasses.replace(one, values=dict(zip(names, values, strict=False))) if one.key == key else one
        for one in figures
    )


# What it claims


def test_the_metadata_holds_what_was_measured(run):
    data = ModelCard(card(run)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert (data.datasets, data.metrics) == (["uoft-cs/cifar10"], ["accuracy"])
    assert {"timm", "transformers", "timm_lowrank", "low-rank"} <= set(data.tags)
    clean, pgd, auto = data.eval_results
    assert [result.metric_value for result in (clean, pgd, auto)] == [0.9005, 0.3, 0.015]
    assert {(r.dataset_type, r.dataset_split, r.metric_type) for r in data.eval_results} == {
        ("uoft-cs/cifar10", "test", "accuracy")
    }
    assert clean.metric_args["images"] == 2000, "the whole test set, not the 200 images of the evaluation"
    expected = {"eps": "8/255", "steps": 20, "step_size": "2/255", "restarts": 1, "images": 200, "seed": 0}
    assert {key: pgd.metric_args[key] for key in expected} == expected
    assert "AutoAttack standard, L_inf 8/255" in auto.metric_name
    low, high = (pgd.metric_args[f"confidence_95_{end}"] for end in ("low", "high"))
    assert low < 0.3 < high


def test_what_was_not_measured_is_not_there(run):
    edit(run, figures=without("autoattack", "5", "10"))
    text = card(run)
    assert len(ModelCard(text).data.eval_results) == 2
    assert "**AutoAttack at 8/255 was not run**" in text
    assert "was not measured" in section(text, "low-rank")
    assert "effective rank | 7 | 19 | -12 | 200 |" in text
    edit(run, figures=with_values("pgd", Value(math.nan), share(20)), verdicts={})
    text = card(run)
    assert len(ModelCard(text).data.eval_results) == 1
    assert "PGD-20" not in section(text, "robustness")
    assert "was not checked" in section(text, "limits")


def test_without_an_evaluation_it_says_so_and_how_to(run):
    (run / "evaluation.json").unlink()
    text = card(run)
    (clean,) = ModelCard(text).data.eval_results
    assert (clean.metric_value, clean.metric_args["images"]) == (0.9005, 2000)
    robust = section(text, "robustness")
    assert "Nothing was evaluated beyond clean accuracy" in robust
    assert "timm-lowrank evaluate RUN" in robust
    assert "No attack was tried on it" in section(text, "limits")
    assert "effective rank | 7 | 19 | -12 | 500 |" in section(text, "low-rank"), "from the training's own summary"


def test_figures_stand_beside_the_plain_twin_with_what_they_were_measured_by(run):
    text = card(run)
    assert "**90.0 % (88.7 to 91.3)**; of its plain twin, trained alike without branches: 91.0 % (89.7 to" in text
    rows = section(text, "low-rank")
    assert "on 5 PCA directions | 75.0 % (68.6 to 80.5) | 74.0 % (67.5 to 79.6) | +1.0, within chance | 200 |" in rows
    assert "on 10 PCA directions | 85.0 % (79.4 to 89.3) | 45.0 % (38.3 to 51.9) | +40.0 | 200 |" in rows
    assert "(plots/spectrum.png)" in rows
    (pgd,) = [line for line in section(text, "robustness").splitlines() if line.startswith("| PGD-20")]
    assert "30.0 % (24.1 to 36.7) | 10.0 % (6.6 to 14.9) | +20.0 |" in pgd
    for named in ("radius 8/255", "20 steps of 2/255", "random start", "1 restart", "200 images", "seed 0"):
        assert named in pgd
    assert "broken by" not in text
    limits = section(text, "limits")
    assert "not adversarially" in limits
    assert "AutoAttack at 8/255 leaves 1.5 % (0.5 to 4.3) of the images right, of the plain twin 0.0 %" in limits
    assert "**no sign of gradient masking**. All eight checks passed. No sign is not a proof." in limits


def test_the_accuracy_of_the_twin_is_that_on_as_many_images(run):
    alone = summary()  # its plain network was trained in a folder of its own
    (run / "summary.json").write_text(json.dumps(alone.to_dict()))
    headline = "**90.0 % (88.7 to 91.3)**"
    assert f"{headline}. In brackets" in card(run)  # the evaluation has the twin's 95.0 % of 200 images
    said = Value.share(1821, alone.data.test_images)
    edit(run, networks=beside(clean=said, twin=True))
    assert f"{headline}; of its plain twin, trained alike without branches: 91.0 % (89.7 to 92.2)" in card(run)
    assert figures_of(read_run(run)).clean.plain == said.value


def beside(**fields):
    """Says something else of the plain network in an evaluation."""
    return lambda networks: (networks[0], dataclasses.replace(networks[1], **fields))


@pytest.mark.parametrize("twin", [False, None])
@pytest.mark.parametrize(("title", "name"), [("plain", "plain network"), ("a|b", r"plain network a\|b")])
def test_a_plain_network_that_was_not_trained_alike_is_no_twin(run, twin, title, name):
    alone = summary()
    (run / "summary.json").write_text(json.dumps(alone.to_dict()))
    (run / "evaluation.json").write_text((run / "evaluation.json").read_text().replace('"plain"', json.dumps(title)))
    edit(run, networks=beside(clean=Value.share(1821, alone.data.test_images), twin=twin))
    text = card(run)
    assert "twin" not in text
    assert f"**90.0 % (88.7 to 91.3)**; of the {name}: 91.0 % (89.7 to 92.2)" in text
    assert f"of the images right, of the {name} 0.0 %" in section(text, "limits")
    for part in ("low-rank", "robustness"):
        assert f"| this network | {name} | difference |" in section(text, part)
    figures = figures_of(read_run(run))
    assert {figures.clean.plain, figures.pgd.plain, *(rank.plain for rank in figures.effective_rank.values())} == {None}


def test_the_twin_stands_beside_a_run_before_other_plain_networks(run):
    other = dataclasses.replace(read_evaluation(run / "evaluation.json").networks[1], title="c", weights="c" * 64)
    edit(run, networks=lambda networks: (networks[0], dataclasses.replace(other, twin=False), networks[1]))
    record = read_run(run)
    assert (record.plain_title, record.plain_is_twin) == ("plain", True), "known by its weights in the folder"
    published = json.loads(files_of(record)["evaluation.json"])["networks"]
    assert [network.get("twin") for network in published] == [None, False, True], "which is not published"
    edit(run, networks=lambda networks: networks[:2], figures=without(*(one.key for one in FIGURES)))
    record = read_run(run)
    assert (record.plain_title, record.plain_is_twin) == ("c", False)
    assert (record.plain_clean_is_twin, record.plain_clean.value) == (True, 0.9105), "that of the run's own twin"
    assert record.effective_rank("pre_logits").plain is None, "which is not the network of the column"


@pytest.mark.parametrize(("keys", "alike"), [({}, True), ({"alike": True}, True), ({"folder": "runs/a"}, False)])
def test_a_twin_in_a_folder_that_was_named_is_one_if_it_was_compared(run, keys, alike):
    """Runs of earlier versions took any plain run."""
    twin = json.loads((run / "summary.json").read_text())["twin"]
    change(run / "summary.json", twin={**twin, "folder": "runs/a", **keys} if keys else twin)
    (run / "evaluation.json").unlink()
    about = section(card(run), "about")
    assert ("of its plain twin, trained alike without branches: 91.0 %" in about) is alike
    assert ("of the plain network tiny (plain): 91.0 %" in about) is not alike


def test_an_evaluation_says_which_network_is_the_twin(run):
    def said(*against):
        return [info.twin for info in infos_of(load_networks(str(run), [str(one) for one in against]))]

    twin = run / "twin"
    assert said() == said(twin) == [None, True]
    assert said(twin / "model") == [None, None], "nobody knows how it was trained"
    recipe = yaml.safe_load((twin / "config.yaml").read_text())
    (twin / "config.yaml").write_text(yaml.safe_dump({**recipe, "lowrank": {"enabled": False}, "save_every": 3}))
    assert said() == [None, True], "what it would be measured at, and how it was saved"
    (twin / "config.yaml").write_text(yaml.safe_dump({**recipe, "lowrank": {"enabled": False}, "epochs": 2}))
    assert said() == [None, False]
    (twin / "config.yaml").write_text(yaml.safe_dump({**recipe, "lowrank": {"enabled": False}}))
    data = json.loads((twin / "summary.json").read_text())["data"]
    change(twin / "summary.json", data={**data, "fingerprint": "0" * 64})
    assert said() == [None, False]


def test_a_failed_diagnosis_and_the_warnings_of_the_evaluation_are_told(run):
    failed = Check("black box", False, 0.2, 0.02, "Black box leaves 10.0 % right, PGD 30.0 %.")
    verdict = Verdict(
        "gradient masking", "One check failed.", (failed, dataclasses.replace(failed, name="x", passed=True))
    )
    edit(run, verdicts={"2-LR": verdict}, warnings=["2-LR was trained on other images"])
    limits = section(card(run), "limits")
    assert "**gradient masking**. One check failed. Failed: black box. Black box leaves 10.0 % right" in limits
    assert "Failed: x" not in limits
    assert "not a proof" not in limits
    assert "The evaluation warns: 2-LR was trained on other images" in limits


def test_figures_are_told_apart_by_what_they_are_not_by_their_names(run):
    """PGD with other steps, radii, starts and norms, all of them called alike, and labels that name other attacks."""
    pgd = next(one.protocol.attack for one in FIGURES if one.key == "pgd")
    changes = ({"steps": 7}, {"eps": 4 / 255}, {"random_start": False}, {"norm": "l2"}, {"targeted": True})
    changes += ({"name": "FGSM"}, {"restarts": 5}, {"radius_unit": "normalized"})
    others = [
        figure(f"a{n}", "PGD-20, 8/255", share(100), share(100), attack=dataclasses.replace(pgd, **one))
        for n, one in enumerate(changes)
    ]
    renamed = tuple(dataclasses.replace(one, key=f"k{n}", label="AutoAttack blackout") for n, one in enumerate(FIGURES))
    edit(run, figures=(*others, *renamed))
    clean, pgd, auto = ModelCard(card(run)).data.eval_results
    assert [result.metric_value for result in (clean, pgd, auto)] == [0.9005, 0.3, 0.015]
    assert "accuracy on 10 PCA directions | 85.0 %" in section(card(run), "low-rank")
    others_shown = re.findall(r"50.0 % .* radius (\S*) of the pixel range;", section(card(run), "robustness"))
    assert others_shown == ["4/255", "8/255", "8/255"], "PGD-20 in L_inf, in L2 and with restarts"


def test_a_plain_run_is_not_called_low_rank(run):
    plain = run / "twin"
    text = card(plain)
    assert "trained plainly, without low-rank branches" in text
    assert "## Dimension of the representations" in text
    assert "plain twin |" not in text
    assert "low-rank" not in ModelCard(text).data.tags


@pytest.mark.parametrize(("warmup", "said"), [(0, False), (100, True)])
def test_branches_whose_penalty_never_had_weight_are_not_said_to_have_pulled(run, warmup, said):
    path = run / "model" / "lowrank.json"
    content = json.loads(path.read_text())
    change(path, config={**content["config"], "warmup_updates": warmup})
    text = " ".join(card(run).split())
    assert ("pulled the activations at" in text) == (not said)
    assert ("before their penalty had any weight (`warmup_updates=100`)" in text) == said


STEPS, CROPS = {"milestones": "[1, 2]", "gamma": "0.1"}, {"crop_scale": "0.08", "crop_pct": "0.875"}


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({}, STEPS),
        ({"milestones": []}, {}),
        ({"schedule": "cosine"}, {}),
        ({"optimizer": "adamw", "gamma": 0.5}, {**STEPS, "optimizer": "adamw", "gamma": "0.5"}),
        ({"cooldown_epochs": 1, "compile": True}, {**STEPS, "cooldown_epochs": "1", "compile": "True"}),
        ({"image_size": 32}, {**STEPS, "image_size": "32", **CROPS}),
        ({"image_size": 32, "augment": "none"}, {**STEPS, "image_size": "32", "crop_pct": "0.875"}),
    ],
)
def test_the_table_of_the_training_shows_what_decided_it(run, keys, shown):
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}, sort_keys=False))
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", section(card(run), "training"), re.MULTILINE))
    assert (rows["momentum"], rows["learning_rate"]) == ("0.9", "0.1")
    depending = {*STEPS, *CROPS, "optimizer", "cooldown_epochs", "compile", "image_size"}
    assert {key: value for key, value in rows.items() if key in depending} == shown


def test_the_same_run_gives_the_same_card(run):
    first = card(run)
    assert card(run) == first
    assert merged(run, first).text == first, "written into itself it does not change"
    assert re.findall("<!-- generated: ([a-z-]+) -->", first) == SECTIONS
    assert all(section(first, name).strip() for name in SECTIONS)


# What it reads


def test_what_the_suites_measure_is_what_the_card_looks_for(run):
    """Figures as the measurements themselves make them, of made-up observations of four images."""
    setting = SimpleNamespace(images=range(4), seed=0)
    context = SimpleNamespace(
        networks={"2-LR": None},
        confidence=0.95,
        chunk=100,
        other=lambda title: None,
        protocol=functools.partial(Context.protocol, setting),
    )
    attacked = [True] + [False] * 3
    names = ("withstood", "white 7", "white 20")
    observed = {"2-LR": {"correct": [True] * 3 + [False], **dict.fromkeys(names, attacked)}}
    results = Results()
    for measurement in measurements_of(chosen_suites(["quick", "autoattack"])):
        if isinstance(measurement, Clean | PGD | PGDSteps | AutoAttack | PixelNoise):
            measurement.report(context, observed, results)
    edit(run, figures=tuple(results.figures))
    shown = ModelCard(card(run)).data.eval_results
    assert [result.metric_value for result in shown] == [0.9005, 0.25, 0.25]
    names = re.findall(r"^\| (\S+).*(?:25|75).0 %", section(card(run), "robustness"), re.MULTILINE)
    assert set(names) == {"Clean", "PGD-20,", "AutoAttack,", "Noise"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_named_as_the_suites_name_them(run, dtype):
    network = timm.create_model("test_resnet", num_classes=3).to(getattr(torch, dtype))
    tlr.save_pretrained(network, run / "model")
    digest = load_network(str(run / "model")).weights
    edit(run, networks=lambda networks: (dataclasses.replace(networks[0], weights=digest), networks[1]))
    assert read_run(run).title == "2-LR"


def test_the_evaluation_must_be_of_these_weights(run):
    write_evaluation(evaluation(run / "twin" / "model", run / "twin" / "model"), run / "evaluation.json")
    with pytest.raises(CheckpointError, match=r"is not about the weights in .*Evaluate again"):
        read_run(run)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"format": 3}, "evaluation.json: this version reads .* not 3: evaluate again"),
        ({"networks": [{}]}, "evaluation.json is not complete: .*lacks title.* Evaluate again"),
    ],
)
def test_an_evaluation_that_is_not_whole(run, keys, match):
    change(run / "evaluation.json", **keys)
    with pytest.raises(CheckpointError, match=match):
        read_run(run)


def test_what_is_no_finished_run(run, tmp_path):
    def refused(match, folder=run):
        with pytest.raises(CheckpointError, match=match):
            read_run(folder)

    refused("does not exist: give the folder of a finished run", tmp_path / "nowhere")
    refused("holds no config.yaml, so it is no run: .*It is a checkpoint: timm_lowrank.push_to_hub", run / "model")
    with pytest.raises(CheckpointError, match="its sha256 is"):
        read_run(run, sha256="0" * 64)
    change(run / "summary.json", clean_accuracy=None)
    refused("clean_accuracy")
    (run / "summary.json").write_text("{")
    refused("is not valid JSON")
    (run / "summary.json").unlink()
    refused("has not come to its end .*--resume auto")


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/runs/a b", "a b"),
        ("~/data/x", "x"),
        ("~me/data/x", "x"),
        (r"C:\data\x", "x"),
        ("C:/data/x/", "x"),
        (r"\\server\me\x", "x"),
        ("file:///home/John Smith/my runs/x", "x"),
        ("../../me/x", "x"),
        ("/home/me", "home"),
        ("C:\\Users\\me\\", "home"),
        (f"{HOME}/x", "x"),
        (f"{HOME} is there", "~ is there"),
        ("run /home/me/x.py --data /d/e/", "run x.py --data e"),
        ("/home/me/bin/eval '/home/me/my runs/a b' --data=\"C:/Users/John Smith/x\"", "eval 'a b' --data=\"x\""),
        ("/home/John Smith/runs/x: 8/255 of them and a/b", "x: 8/255 of them and a/b"),
        ("saw file:///home/me/x, D:/me/y and ../me/z", "saw x, y and z"),
        ("path:/home/me/x (/home/me/y) [/home/é ü/z]", "path:x (y) [z]"),
        ("/home/me/a 8/255; 2/255 +/- 0.2/0.4", "a 8/255; 2/255 +/- 0.2/0.4"),
        *((text, text) for text in (
            "runs/digits", "uoft-cs/cifar10", "hf-hub:a/b@main", "see https://example.org/a/b", "s3://b/c/d", "8/255",
            "~5 images / 3 s", r"\alpha\beta", "</b></i>", "a / b / c", "it is 3/4, /2", "http://me@host/x/y", "~", "",
        )),
    ],
)  # fmt: skip
def test_of_a_path_the_last_part_is_left(text, left):
    assert without_local_paths(text) == left
    assert without_local_paths({"list": [text], text: 1, "pixels": text}) == {"list": [left], left: 1, "pixels": text}
    assert without_local_paths(left) == left, "once is enough"


@pytest.mark.parametrize(
    ("source", "origin", "kind", "name", "on_hub"),
    [
        ("uoft-cs/cifar10", "hub", "uoft-cs/cifar10", "uoft-cs/cifar10", True),
        ("mnist", "hub", "mnist", "mnist", True),
        ("data/photos", "folder", "photos", "photos", False),
        ("data/photos", None, "photos", "photos", False),
        ("/home/me/my photos/", "folder", "my-photos", "my photos", False),
        ("/home/me", "folder", "home", "home", False),
        ("/", "folder", "images", "images", False),
        ("digits", "built-in", "digits", "scikit-learn digits", False),
        ("digits", None, "digits", "scikit-learn digits", False),
    ],
)
def test_a_data_set_is_on_the_hub_if_it_was_loaded_from_there(source, origin, kind, name, on_hub):
    data = dataclasses.replace(summary().data, source=source, origin=origin)
    assert dataset_of(data) == Dataset(kind, name, on_hub)
    assert dataset_of(data, "me/d") == Dataset("me/d", "me/d", True)


def test_a_folder_that_is_not_here_is_no_data_set_of_the_hub(run):
    for origin in ("folder", None):  # a run of an earlier version does not say it
        data = dataclasses.replace(summary().data, source="data/photos", origin=origin)
        (run / "summary.json").write_text(json.dumps(dataclasses.replace(summary(), data=data).to_dict()))
        edit(run, data=lambda data, origin=origin: dataclasses.replace(data, source="data/photos", origin=origin))
        text = card(run)
        assert ModelCard(text).data.datasets is None
        assert {result.dataset_type for result in ModelCard(text).data.eval_results} == {"photos"}
        assert "data/photos" not in text


def test_a_name_for_the_data_of_the_run_is_not_that_of_other_data_it_was_evaluated_on(run):
    edit(
        run,
        data=lambda data: dataclasses.replace(data, source="/data/corrupted", origin="folder", fingerprint="0" * 64),
    )
    text = card(run, dataset="me/mine")
    results = ModelCard(text).data.eval_results
    assert [result.dataset_type for result in results] == ["me/mine", "corrupted", "corrupted", "corrupted"]
    assert "of corrupted, in per cent" in section(text, "robustness")


def test_clean_accuracy_on_other_data_takes_the_place_of_neither_network(run):
    more = dataclasses.replace(FIGURES[0], values={"2-LR": Value.share(2500, 5000), "plain": Value.share(1000, 2000)})
    change(run / "summary.json", twin=None, twin_folder=None)
    edit(run, figures=(more,), data=lambda data: dataclasses.replace(data, fingerprint="0" * 64, source="corrupted"))
    record = read_run(run)
    assert (record.clean.of, record.plain_clean) == (2000, None)
    values = [result.metric_value for result in ModelCard(card(run)).data.eval_results]
    assert values == [0.9005, 0.5]


def test_keys_stay_different_and_names_of_classes_as_they_are():
    assert without_local_paths({"/home/me/a": 1, "/home/you/a": 2, 3: "8/255"}) == {"a": 1, "a (2)": 2, 3: "8/255"}
    assert without_local_paths({"class_names": ["/m/01g317"]}) == {"class_names": ["/m/01g317"]}


def test_an_evaluation_whose_titles_are_paths_is_published_with_names_and_read_again(run, tmp_path):
    """As they were called when two folders had one name."""
    titles = ("/home/me/my runs/a|b/model", "/home/me/other/model")
    content = (run / "evaluation.json").read_text()
    for old, new in zip(("2-LR", "plain"), titles, strict=True):
        content = content.replace(json.dumps(old), json.dumps(new))
    (run / "evaluation.json").write_text(content)
    edit(run, warnings=[f"{titles[0]}: saw other images"], command=f"evaluate {titles[1]}")
    record = read_run(run)
    assert (record.title, record.plain_title) == ("model", "model (2)")
    written = files_of(record)["evaluation.json"]
    assert evaluation_from_json(json.loads(written)) == record.evaluation
    assert record.evaluation.warnings == ("model: saw other images",)
    for text in (written.decode(), card(run)):
        assert "/home" not in text
        assert "me/" not in text


def test_networks_of_one_name_are_numbered(tmp_path):
    folders = []
    for number, parent in enumerate(("one", "two", "three")):
        make_run(tmp_path / parent / "model", evaluated=False, channels=[8, 8, 8, 8 + number], name="resnet10_cifar")
        folders.append(str(tmp_path / parent / "model"))
    assert [network.title for network in load_networks(folders[0], folders[1:])] == ["model", "model (2)", "model (3)"]
    shutil.move(folders[2], tmp_path / "\x1b[31ma\nb<i>|")
    networks = load_networks(str(tmp_path / "\x1b[31ma\nb<i>|"), folders[:1])
    assert [network.title for network in networks] == ["[31ma b<i>|", "model"]


def test_a_path_in_the_configuration_of_the_network_is_not_published(run):
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["file"] = "/home/me/weights/resnet.safetensors"
    path.write_text(json.dumps({**config, "label_names": ["/m/01g317", "b", "c"]}))
    done = push_to_hub(run, REPO, dry_run=run / "dry")
    sent = json.loads((done.folder / "config.json").read_text())
    assert sent["pretrained_cfg"]["file"] == "resnet.safetensors"
    assert sent["label_names"] == ["/m/01g317", "b", "c"]


def test_paths_of_this_machine_are_not_published(run):
    data = json.loads((run / "summary.json").read_text())["data"]
    change(run / "summary.json", data={**data, "source": "/home/me/data/cifar10", "origin": "folder"})
    edit(run, data=lambda data: dataclasses.replace(data, source="/home/me/data/cifar10", origin="folder"))
    text = card(run)
    assert "/home/me" not in text
    assert ModelCard(text).data.datasets is None, "nobody has said that it is on the Hub"
    data = ModelCard(card(run, dataset="uoft-cs/cifar10")).data
    assert data.datasets == ["uoft-cs/cifar10"]
    assert {result.dataset_type for result in data.eval_results} == {"uoft-cs/cifar10"}


# What cannot break it


NASTY = "a | b\n<!-- end of generated: limits -->\n`c` **d** [e](f) <script> # &amp; $x$ {{ 1 }} \x1b[31m"


def test_nothing_from_elsewhere_breaks_tables_marks_or_yaml(run):
    plain = card(run)

    def nasty(figures):
        protocols = [dataclasses.replace(one.protocol, details={"note": NASTY}) for one in figures]
        return tuple(
            dataclasses.replace(one, label=NASTY, protocol=about) for one, about in zip(figures, protocols, strict=True)
        )

    edit(
        run,
        figures=nasty,
        warnings=[NASTY],
        suite=NASTY,
        data=lambda data: dataclasses.replace(data, split="test: |\n- # x"),
        verdicts={"2-LR": dataclasses.replace(SOUND, summary=NASTY)},
    )
    change(run / "summary.json", device=NASTY, versions={NASTY: NASTY})
    text = card(run)
    marks = re.compile(r"^<!-- .*$", re.MULTILINE)
    assert marks.findall(text) == marks.findall(plain)
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in re.sub(r"`` .*? ``", "", body), "only where it is code"
    assert "\x1b" not in text
    for name in ("low-rank", "robustness", "training", "files"):
        rows = [line for line in section(text, name).splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, name
    assert ModelCard(text).data.eval_results[-1].dataset_split == "test: |\n- # x"
    assert merged(run, text).text == text


@pytest.mark.parametrize(
    "name", [NASTY, "</style><script>alert(1)</script>", "a\x1b]0;x\x07\x9b2J\u202eb", "$x_{", "| | |", "- \r\n\t -"]
)
def test_titles_from_elsewhere_break_neither_card_nor_page_nor_terminal(run, name):
    before = text_table(read_evaluation(run / "evaluation.json"))
    marks = re.compile(r"^<!-- .*$", re.MULTILINE)
    expected = marks.findall(card(run))
    renamed = (run / "evaluation.json").read_text().replace('"plain"', json.dumps(name))
    (run / "evaluation.json").write_text(renamed.replace('"2-LR"', json.dumps(f"2-LR {name}")))
    edit(run, figures=lambda figures: (dataclasses.replace(figures[0], label=name), *figures[1:]))
    hostile = read_evaluation(run / "evaluation.json")
    assert hostile.titles == (f"2-LR {name}", name)

    text, table = card(run), text_table(hostile)
    assert marks.findall(text) == expected
    for shown in (text, table):
        assert all(sign.isprintable() or sign == "\n" for sign in shown)
    assert "<script>" not in text
    rows = [line for line in section(text, "robustness").splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert len(table.splitlines()) == len(before.splitlines())
    assert max(map(len, table.splitlines())) <= 100
    assert "<script>" not in write_report(hostile, run).read_text()


def test_a_diagnosis_in_normalised_units_from_elsewhere_cannot_move_the_cursor(run):
    edit(run, normalized_verdicts={"2-LR": dataclasses.replace(SOUND, summary="\x1b[2J\n")})
    table = text_table(read_evaluation(run / "evaluation.json"))
    assert all(sign.isprintable() or sign == "\n" for sign in table)


def test_the_card_of_a_pull_request_is_for_the_branch_that_it_is_merged_into():
    assert Place.on_hub(REPO, "refs/pr/1") == Place.on_hub(REPO)


def test_escaping():
    assert escaped("a|b*c_d[e]`f`\ng") == r"a\|b\*c\_d\[e\]\`f\` g"
    assert escaped("# x") == r"\# x"
    assert escaped("1. x") == r"\1. x"
    assert code("a`b|c") == r"`` a`b\|c ``"
    assert code("plain") == "`plain`"


# What it keeps


HAND = """---
# chosen with care
license: mit
language: no   # Norwegian, which YAML takes for false
tags: [mine, timm]
model-index:
- name: tiny
  results:
  - task: {type: image-classification}
    dataset: {name: CIFAR-10.1, type: cifar10.1}
    metrics:
    - {type: accuracy, value: 0.5}
widget:
- text: "keep me: yes"
pipeline_tag: image-feature-extraction
---
My own words.

"""


def by_hand(run):
    """A pushed card with an owner's changes all over."""
    text = card(run).split("---\n", 2)[2].replace("## Limits", "## Limits, changed in a generated section")
    return (
        HAND + text.replace(mark("citation", section(text, "citation").rstrip()), "Mine between.") + "\nLast words.\n"
    )


def test_what_the_owner_wrote_stays(run):
    before = by_hand(run)
    edit(run, figures=with_values("pgd", share(70), share(20)))
    done = merged(run, before)
    text = done.text
    for kept in ("My own words.\n", "Mine between.\n", "\nLast words.\n", 'text: "keep me: yes"', "# chosen with care"):
        assert kept in text
    assert "language: no   # Norwegian" in text, "not false, as PyYAML would write it"
    assert "changed in a generated section" not in text
    assert "| 35.0 % (28.7 to 41.8) | 10.0 %" in text, "the new figure"
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["license"], data["tags"][:2]) == ("mit", ["mine", "timm"])
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert data["tags"].count("timm") == 1
    assert "low-rank" in data["tags"]
    (entry,) = data["model-index"]
    ours, theirs = entry["results"]
    assert theirs["dataset"]["name"] == "CIFAR-10.1"
    assert [metric["value"] for metric in ours["metrics"]] == [0.9005, 0.35, 0.015]
    assert list(data) == ["license", "language", "tags", "model-index", "widget", *list(data)[5:]]
    (note,) = done.notes
    assert "has no marks for citation any more" in note
    assert merged(run, text).text == text


def test_a_licence_is_the_owners_unless_another_is_given(run):
    before = by_hand(run)
    assert "license: mit" in merged(run, before).text
    text = merged(run, before.replace("Mine between.", mark("citation")), license="cc-by-4.0").text
    assert "license: cc-by-4.0" in text
    assert "Weights under cc-by-4.0." in text
    assert "# chosen with care" in text
    assert "has not named a licence" in merged(run, "# Mine").text


def test_a_card_without_marks_is_kept_whole_and_completed(run):
    done = merged(run, "# Written by hand\n\nNothing generated.")
    assert "\n# Written by hand\n\nNothing generated.\n\n<!-- generated: about -->\n" in done.text
    assert all(section(done.text, name).strip() for name in SECTIONS)
    assert "all of it was kept, and they follow below it" in done.notes[0]
    again = merged(run, done.text)
    assert (again.text, again.notes) == (done.text, ())


@pytest.mark.parametrize(
    "broken",
    [
        lambda text: text.replace("<!-- end of generated: limits -->\n", ""),
        lambda text: text.replace("<!-- generated: limits -->\n", ""),
        lambda text: text + "\n" + mark("limits", "twice"),
        lambda text: text.replace("<!-- end of generated: limits -->", "<!-- end of generated: about -->"),
    ],
)
def test_half_a_pair_of_marks_is_an_error(run, broken):
    with pytest.raises(CheckpointError, match=r"the marks of the generated section 'limits' do not come as one"):
        merged(run, broken(card(run)))


def test_sections_of_another_version_are_left_alone(run):
    text = card(run) + "\n" + mark("carbon", "1 g")
    done = merged(run, text)
    assert done.text == text
    assert "does not know, left alone: carbon" in done.notes[0]


def test_line_ends_and_a_byte_order_mark_stay(run):
    windows = "\ufeff" + card(run).replace("\n", "\r\n")
    assert merged(run, windows).text == windows
    edit(run, figures=without("autoattack"))
    assert merged(run, windows).text == "\ufeff" + card(run).replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("front", "match"),
    [
        ("tags: [a", "is not valid YAML .*repair it first"),
        ("- a", "must be a mapping"),
        ("model-index: 3", "model-index of README.md must be a list"),
        ("model-index: [{name: a, results: 3}]", "model-index of README.md must be a list"),
    ],
)
def test_front_matter_that_cannot_be_read(run, front, match):
    with pytest.raises(CheckpointError, match=match):
        merged(run, f"---\n{front}\n---\ntext\n")


def test_front_matter_is_written_as_it_was_wherever_it_can_be():
    def front(before, new):
        return merge(f"---\n{before}---\n{mark('a')}\n", f"---\n{new}---\n{mark('a')}\n").text.split("---\n")[1]

    before = "quoted: 'a: b'\n\n# about tags\ntags:\n- x   # mine\n# the end\nlast: {a: [1, 2]}\n"
    after = "quoted: 'a: b'\n\n# about tags\ntags:\n- x\n- y\n# the end\nlast: {a: [1, 2]}\nnew: 1\n"
    assert front(before, "tags: [x, y]\nnew: 1\n") == after
    odd = "? tags\n: - x\nother: 1\n"  # a form that is not looked for: then all of it is written anew
    assert yaml.safe_load(front(odd, "tags: [y]\n")) == {"tags": ["x", "y"], "other": 1}


def test_results_of_an_earlier_name_go(run):
    text = card(run).replace("- name: tiny\n", "- name: older\n")
    data = yaml.safe_load(merged(run, text).text.split("---\n")[1])
    assert [entry["name"] for entry in data["model-index"]] == ["tiny"]


def test_what_the_results_before_were_about_goes_with_them(run):
    before = card(run).replace("tags:\n", "tags:\n- mine\n").replace("datasets:\n", "datasets:\n- a/b\n")
    plain = "---\ntags: [timm]\ndatasets: [c/d]\nmodel-index: [{name: tiny, results: []}]\n---\n"
    data = yaml.safe_load(merge(before, plain + mark("about")).text.split("---\n")[1])
    assert data["datasets"] == ["a/b", "c/d"], "it was not trained on that of the run before"
    assert "mine" in data["tags"]
    assert "low-rank" not in data["tags"]


def test_front_matter_in_braces_keeps_its_values_as_they_were_written(run):
    before = '---\n{license: mit, "language": [no, en], extra: 1.10, tags: [mine],\n a: {b: "x, y"}}\n---\nMine.\n'
    after = merged(run, before).text
    front = after.split("---\n")[1]
    for line in ("license: mit", '"language": [no, en]', "extra: 1.10", 'a: {b: "x, y"}'):
        assert f"\n{line}\n" in f"\n{front}"
    assert yaml.safe_load(front)["tags"][0] == "mine"
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert merged(run, after).text == after


def test_a_short_card_becomes_a_full_one(run):
    """What `tlr.push_to_hub` wrote is generated text: the run's own card replaces all of it."""
    short = short_card(run / "model", REPO)
    assert "No evaluation was published" in short
    assert merged(run, short).text.split("\n---\n")[1] == card(run).split("\n---\n")[1].replace(
        "Weights under apache-2.0.", "The owner has not named a licence for the weights."
    )
