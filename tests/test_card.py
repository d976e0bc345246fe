"""The card of a published run: what it claims, what it keeps, and what cannot break it."""

import json
import re
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from publishable import LAYER, REPO, change, evaluation, figure, make_run, share, verdict, write

from timm_lowrank import CheckpointError
from timm_lowrank.checkpoint.card import SECTIONS, mark, minimal_card
from timm_lowrank.hub import card_of, headline, read_run
from timm_lowrank.hub.figures import AUTOATTACK, CLEAN, PGD
from timm_lowrank.hub.markup import code, escaped, percent
from timm_lowrank.hub.merging import merge, section
from timm_lowrank.hub.publishing import without_local_paths
from timm_lowrank.hub.record import weights_digest
from timm_lowrank.suites.plan import chosen_suites, measurements_of
from timm_lowrank.suites.subject import load_subject

ROOT = Path(__file__).parent.parent
TEMPLATE = (ROOT / "hub" / "card.md").read_text()


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run")
    return tmp_path / "run"


def card(run, before=TEMPLATE, **options):
    """The card of a run in the repository REPO."""
    return card_of(read_run(run), REPO, before, {"config.json": "the network"}, **options)


def edit(run, change_it):
    """Changes evaluation.json."""
    content = json.loads((run / "evaluation.json").read_text())
    change_it(content)
    write(run / "evaluation.json", content)


def drop(content, *keys):
    content["figures"] = [entry for entry in content["figures"] if not entry["key"].startswith(keys)]


# What it claims


def test_the_metadata_holds_what_was_measured(run):
    data = ModelCard(card(run).text).data
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
    edit(run, lambda content: drop(content, "autoattack", "compression"))
    text = card(run).text
    assert len(ModelCard(text).data.eval_results) == 2
    assert "**AutoAttack at 8/255 was not run**" in text
    assert "was not measured" in section(text, "low-rank")
    assert "effective rank | 7 | 19 | -12 | 200 |" in text

    def not_a_number(content):
        content["figures"][1]["values"]["2-LR"]["value"] = None
        content["verdicts"] = {}

    edit(run, not_a_number)
    text = card(run).text
    assert len(ModelCard(text).data.eval_results) == 1
    assert "PGD-20" not in section(text, "robustness")
    assert "was not checked" in section(text, "limits")


def test_without_an_evaluation_it_says_so_and_how_to(run):
    (run / "evaluation.json").unlink()
    text = card(run).text
    (clean,) = ModelCard(text).data.eval_results
    assert (clean.metric_value, clean.metric_args["images"]) == (0.9005, 2000)
    robust = section(text, "robustness")
    assert "Nothing was evaluated beyond clean accuracy" in robust
    assert "recipes/evaluate.py RUN" in robust
    assert "No attack was tried on it" in section(text, "limits")
    assert "effective rank | 7 | 19 | -12 | 500 |" in section(text, "low-rank"), "from the training's own summary"


def test_figures_stand_beside_the_plain_twin_with_what_they_were_measured_by(run):
    text = card(run).text
    assert "**90.0 % (88.7 to 91.3)**; of its plain twin, trained alike without branches: 91.0 % (89.7 to" in text
    rows = section(text, "low-rank")
    assert "on 5 PCA directions | 75.0 % (68.6 to 80.5) | 74.0 % (67.5 to 79.6) | +1.0, within chance | 200 |" in rows
    assert "on 10 PCA directions | 85.0 % (79.4 to 89.3) | 45.0 % (38.3 to 51.9) | +40.0 | 200 |" in rows
    assert "(plots/spectrum.png)" in rows
    (pgd,) = [line for line in section(text, "robustness").splitlines() if line.startswith("| PGD-20")]
    assert "30.0 % (24.1 to 36.7) | 10.0 % (6.6 to 14.9) | +20.0 |" in pgd
    for named in ("radius 8/255", "20 steps of 2/255", "random start", "restarts 1", "200 images", "seed 0"):
        assert named in pgd
    assert "broken by" not in text
    limits = section(text, "limits")
    assert "not adversarially" in limits
    assert "AutoAttack at 8/255 leaves 1.5 % (0.5 to 4.3) of the images right, of the plain twin 0.0 %" in limits
    assert "**no sign of gradient masking**. All 3 checks passed, on 200 images. No sign is not a proof." in limits


def test_a_failed_diagnosis_and_the_warnings_of_the_evaluation_are_told(run):
    def worse(content):
        failed = {"name": "black box", "passed": False, "says": "Black box leaves 10.0 % right, PGD 30.0 %."}
        content["verdicts"]["2-LR"] = verdict("gradient masking", failed)
        content["warnings"] = ["2-LR was trained on other images"]

    edit(run, worse)
    limits = section(card(run).text, "limits")
    assert "**gradient masking**" in limits
    assert "Failed: black box. Black box leaves 10.0 % right" in limits
    assert "not a proof" not in limits
    assert "The evaluation warns: 2-LR was trained on other images" in limits


def test_a_plain_run_is_not_called_low_rank(run):
    record = read_run(run)
    plain = run.parent / "plain"
    (run / "twin").rename(plain)
    summary = {**record.summary["twin"], "name": "plain"}
    write(plain / "summary.json", summary)
    (plain / "config.yaml").write_text((run / "config.yaml").read_text())
    text = card(plain).text
    assert "trained plainly, without low-rank branches" in text
    assert "## Dimension of the representations" in text
    assert "plain twin |" not in text
    assert "low-rank" not in ModelCard(text).data.tags


def test_the_same_run_gives_the_same_card(run):
    first = card(run).text
    assert card(run).text == first
    assert card(run, first).text == first, "written into itself it does not change"
    assert [name for name in SECTIONS if section(first, name)] == list(SECTIONS)
    assert re.findall(r"^## (.*)$", first, re.MULTILINE)[0] == "Loading"


# What it reads


def test_the_keys_of_the_headline_are_those_that_the_suites_measure():
    keys = {m.key for m in measurements_of(chosen_suites(["quick", "autoattack"]))}
    assert {CLEAN, PGD, AUTOATTACK} <= keys


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_named_as_the_suites_name_them(tmp_path, dtype):
    import torch

    network = timm.create_model("test_resnet", num_classes=3).to(getattr(torch, dtype))
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    assert weights_digest(network) == load_subject(str(tmp_path)).weights


def test_the_evaluation_must_be_of_these_weights(run):
    write(run / "evaluation.json", evaluation(run / "twin", run / "twin" / "model") | {"verdicts": {}})
    with pytest.raises(CheckpointError, match=r"is not about the weights in .*Evaluate again"):
        read_run(run)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"format": 2}, "has format 2, and this version reads 1: evaluate again"),
        ({"networks": [{}]}, "is not complete .KeyError: 'title'.: evaluate again"),
        ({"figures": [figure("clean", "x", {"other": share(1)})]}, "figure 'clean' of 'other'"),
        ({"data": {"source": 3, "images": 1, "split": "test"}}, "data needs source"),
        ({"verdicts": {"2-LR": {}}}, "KeyError: 'verdict'"),
        ({"warnings": None}, "TypeError"),
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
    refused("lacks clean_accuracy")
    (run / "summary.json").write_text("{")
    refused("is not valid JSON")
    (run / "summary.json").unlink()
    refused("has not come to its end .*--resume auto")
    write(run / "summary.json", {})
    (run / "model" / "config.json").unlink()
    refused("holds no model/config.json")


def test_paths_of_this_machine_are_not_published(run):
    assert without_local_paths({"path": "/home/me/runs/a b", "n": 3, "pixels": "/ab/cd", "eps": "8/255"}) == {
        "path": "a b", "n": 3, "pixels": "/ab/cd", "eps": "8/255",
    }  # fmt: skip
    assert without_local_paths(["~/data/x", r"C:\data\x", "run /home/me/x.py --data /d/e/", "runs/digits"]) == [
        "x", "x", "run x.py --data e/", "runs/digits",
    ]  # fmt: skip
    assert without_local_paths("see https://example.org/a/b and uoft-cs/cifar10") == (
        "see https://example.org/a/b and uoft-cs/cifar10"
    )
    summary = json.loads((run / "summary.json").read_text())
    change(run / "summary.json", data={**summary["data"], "source": "/home/me/data/cifar10"})
    edit(run, lambda content: content["data"].update(source="/home/me/data/cifar10"))
    text = card(run).text
    assert "/home/me" not in text
    assert ModelCard(text).data.datasets is None, "nobody has said that it is on the Hub"
    data = ModelCard(card(run, dataset="uoft-cs/cifar10").text).data
    assert data.datasets == ["uoft-cs/cifar10"]
    assert {result.dataset_type for result in data.eval_results} == {"uoft-cs/cifar10"}


# What cannot break it


NASTY = "a | b\n<!-- end of generated: limits -->\n`c` **d** [e](f) <script> # &amp; $x$ \x1b[31m"


def test_nothing_from_elsewhere_breaks_tables_marks_or_yaml(run):
    plain = card(run).text

    def nasty(content):
        content["warnings"] = [NASTY]
        content["suite"] = NASTY
        content["data"]["split"] = "test: |\n- # x"
        for entry in content["figures"]:
            entry["label"] = NASTY
            entry["protocol"]["note"] = NASTY
        content["verdicts"]["2-LR"]["summary"] = NASTY

    edit(run, nasty)
    change(run / "summary.json", device=NASTY, versions={NASTY: NASTY})
    text = card(run).text
    marks = re.compile(r"^<!-- .*$", re.MULTILINE)
    assert marks.findall(text) == marks.findall(plain)
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in re.sub(r"`` .*? ``", "", body), "only where it is code"
    assert "\x1b" not in text
    for name in ("low-rank", "robustness", "training", "files"):
        rows = [line for line in section(text, name).splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, name
    assert ModelCard(text).data.eval_results[-1].dataset_split == "test: |\n- # x"
    assert card(run, text).text == text


def test_escaping():
    assert escaped("a|b*c_d[e]`f`\ng") == r"a\|b\*c\_d\[e\]\`f\` g"
    assert escaped("# x") == r"\# x"
    assert escaped("1. x") == r"\1. x"
    assert code("a`b|c") == r"`` a`b\|c ``"
    assert code("plain") == "`plain`"


@pytest.mark.parametrize(
    ("share", "shown"), [(0.5, "50.0"), (1, "100.0"), (0, "0.0"), (0.9999, "99.99"), (0.00004, "0.004")]
)
def test_percent_does_not_round_to_none_or_all(share, shown):
    assert percent(share) == shown


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
---
My own words.

"""


def by_hand(run):
    """A pushed card with an owner's changes all over."""
    text = card(run).text.split("---\n", 2)[2].replace("## Limits", "## Limits, changed in a generated section")
    return (
        HAND + text.replace(mark("citation", section(text, "citation").rstrip()), "Mine between.") + "\nLast words.\n"
    )


def test_what_the_owner_wrote_stays(run):
    before = by_hand(run)
    edit(run, lambda content: content["figures"][1]["values"].update({"2-LR": share(70)}))
    merged = card(run, before)
    text = merged.text
    for kept in ("My own words.\n", "Mine between.\n", "\nLast words.\n", 'text: "keep me: yes"', "# chosen with care"):
        assert kept in text
    assert "language: no   # Norwegian" in text, "not false, as PyYAML would write it"
    assert "changed in a generated section" not in text
    assert "| 35.0 % (28.7 to 41.8) | 10.0 %" in text, "the new figure"
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["license"], data["tags"][:2]) == ("mit", ["mine", "timm"])
    assert data["tags"].count("timm") == 1
    assert "low-rank" in data["tags"]
    (entry,) = data["model-index"]
    ours, theirs = entry["results"]
    assert theirs["dataset"]["name"] == "CIFAR-10.1"
    assert [metric["value"] for metric in ours["metrics"]] == [0.9005, 0.35, 0.015]
    assert list(data) == ["license", "language", "tags", "model-index", "widget", *list(data)[5:]]
    (note,) = merged.notes
    assert "has no marks for citation any more" in note
    assert card(run, text).text == text


def test_a_licence_is_the_owners_unless_another_is_given(run):
    before = by_hand(run)
    assert "license: mit" in card(run, before).text
    text = card(run, before.replace("Mine between.", mark("citation")), license="cc-by-4.0").text
    assert "license: cc-by-4.0" in text
    assert "Weights under cc-by-4.0." in text
    assert "# chosen with care" in text


def test_a_card_without_marks_is_kept_whole_and_completed(run):
    merged = card(run, "# Written by hand\n\nNothing generated.")
    assert "\n# Written by hand\n\nNothing generated.\n\n<!-- generated: about -->\n" in merged.text
    assert [name for name in SECTIONS if section(merged.text, name)] == list(SECTIONS)
    assert "all of it was kept, and they follow below it" in merged.notes[0]
    again = card(run, merged.text)
    assert (again.text, again.notes) == (merged.text, ())


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
    with pytest.raises(
        CheckpointError, match=r"the marks of the generated section '(limits|about)' do not come as one"
    ):
        card(run, broken(card(run).text))


def test_sections_of_another_version_are_left_alone(run):
    text = card(run).text + "\n" + mark("carbon", "1 g")
    merged = card(run, text)
    assert merged.text == text
    assert "does not know, left alone: carbon" in merged.notes[0]


def test_line_ends_and_a_byte_order_mark_stay(run):
    text = card(run).text
    windows = "\ufeff" + text.replace("\n", "\r\n")
    assert card(run, windows).text == windows
    edit(run, lambda content: drop(content, "autoattack"))
    changed = card(run, windows).text
    assert changed == "\ufeff" + card(run).text.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("front", "match"),
    [
        ("tags: [a", "is not valid YAML .*repair it first"),
        ("- a", "must be a mapping"),
        ("model-index: 3", "model-index of README.md must be a list"),
    ],
)
def test_front_matter_that_cannot_be_read(run, front, match):
    with pytest.raises(CheckpointError, match=match):
        card(run, f"---\n{front}\n---\ntext\n")


def test_front_matter_is_written_as_it_was_wherever_it_can_be():
    before = "---\nquoted: 'a: b'\n\n# about tags\ntags:\n- x   # mine\n# the end\nlast: {a: [1, 2]}\n---\n"
    text = merge(before, {"tags": ["x", "y"], "new": 1}, {}).text
    assert (
        text == "---\nquoted: 'a: b'\n\n# about tags\ntags:\n- x\n- y\n# the end\nlast: {a: [1, 2]}\nnew: 1\n---\n\n\n"
    )
    odd = "---\n? tags\n: - x\nother: 1\n---\n"  # a form that is not looked for: then all of it is written anew
    assert yaml.safe_load(merge(odd, {"tags": ["y"]}, {}).text.split("---")[1]) == {"tags": ["x", "y"], "other": 1}


def test_results_of_an_earlier_name_go(run):
    text = card(run).text.replace("- name: tiny\n", "- name: older\n")
    data = yaml.safe_load(card(run, text).text.split("---\n")[1])
    assert [entry["name"] for entry in data["model-index"]] == ["tiny"]


def test_the_headline_is_what_the_card_says(run):
    found = headline(read_run(run))
    results = ModelCard(card(run).text).data.eval_results
    assert [found[key]["value"] for key in (CLEAN, PGD, AUTOATTACK)] == [r.metric_value for r in results]
    assert found[PGD]["plain"] == 0.1
    assert found["effective_rank"] == {LAYER: {"value": 7, "plain": 19}}


def test_a_short_card_becomes_a_full_one(run):
    """What `tlr.push_to_hub` wrote is generated text: the run's own card replaces all of it."""
    short = minimal_card(run / "model", "alice/tiny")
    assert "No evaluation was published" in short
    merged = card(run, short)
    assert "No evaluation was published" not in merged.text
    assert all(section(merged.text, name).strip() for name in SECTIONS)
    assert set(re.findall("generated: ([a-z-]+) -->", (ROOT / "hub" / "card.md").read_text())) == set(SECTIONS)
