"""evaluation.json: read back as it was written, and all that is wrong with it in one message."""

import dataclasses
import json
import math

import evaluations
import pytest
from evaluations import FIGURES, PGD, figure, full_evaluation, make_evaluation

from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation.results import (
    Kind,
    NoiseProtocol,
    Protocol,
    Settings,
    Value,
    difference,
    evaluation_from_json,
    evaluation_to_json,
    headline,
    radius_text,
    read_evaluation,
    write_evaluation,
)

SETTINGS = Settings(
    seed=0, chunk=100, images=360, train_images=200, data="9f3c2b", networks={"2-LR": "5f", "plain": "a0"},
    layers=("layer3",), torch="2.15.0", measurements=("Clean()",),
)  # fmt: skip


def content(evaluation=None):
    """The parsed content of an evaluation.json."""
    return json.loads(evaluation_to_json(evaluation or full_evaluation()))


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    unknown = dataclasses.replace(FIGURES[0], key="unknown", values={"plain": Value(math.inf, low=math.nan, of=0)})
    evaluation = full_evaluation(figures=(*FIGURES, unknown), settings=SETTINGS)
    write_evaluation(evaluation, tmp_path / "evaluation.json")
    again = read_evaluation(tmp_path / "evaluation.json")
    assert again == evaluation
    assert evaluation_to_json(again) == (tmp_path / "evaluation.json").read_text()
    assert not again.figure("unknown").values["plain"].known
    assert content(evaluation)["figures"][-1]["values"]["plain"] == {"value": None, "of": 0}
    assert again.all_warnings()[-1] == "plain, Clean images: not a number (of 0 images)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(format=3), "of format 2, not 3: evaluate again"),
        (lambda e: e.update(format=1), "of format 2, not 1: evaluate again with `timm-lowrank evaluate --overwrite`"),
        (lambda e: e.pop("format"), "of format 2, not None"),
        (lambda e: [e.pop("seed"), e.pop("curves")], "it lacks seed, curves"),
        (lambda e: e["figures"][0].pop("kind"), r"figures\[0\] lacks kind"),
        (lambda e: e["figures"][0].update(kind="fast"), r"figures\[0\].kind='fast' must be one of clean, attack"),
        (lambda e: e["figures"][0].update(unit="apples"), "unit='apples' must be one of share, number, count"),
        (lambda e: e["figures"][0].update(better=1), "better=1 must be one of higher, lower or null"),
        (lambda e: e["figures"].append(e["figures"][0]), "two figures 'clean'"),
        (lambda e: e["figures"][0]["values"].update(other={"value": 1}), "network 'other', which is not among '2-LR'"),
        (lambda e: e["figures"][0]["values"].update(plain={"value": "much"}), "value='much' must be a number"),
        (lambda e: e["figures"][1]["protocol"]["attack"].update(eps="8/255"), "eps='8/255' must be a number or null"),
        (lambda e: e["figures"][0].update(protocol=[]), r"figures\[0\].protocol=\[\] must be a mapping"),
        (lambda e: e["networks"].append(e["networks"][0]), "each another one"),
        (lambda e: e.update(networks=[]), "networks need titles"),
        (lambda e: e["data"].update(image_size="8 x 8"), "data.image_size='8 x 8' must be a list"),
        (lambda e: e["curves"][0].update(kind="pie"), "kind='pie' must be one of line, scatter, histogram"),
        (lambda e: e["curves"][0]["lines"][0]["y"].pop(), "'steps-ifgsm' needs x, y of fitting lengths"),
        (lambda e: e["curves"][3]["lines"][0]["labels"].pop(), "'plane' needs x, y, labels of fitting lengths"),
        (lambda e: e["curves"][2]["lines"][0]["x"].pop(), r"'cushion' needs x \(edges\), y \(counts\) of fitting"),
        (lambda e: e["strips"][0].update(shape=[6, 3, 8]), "shape has 3 entries, not 4"),
        (lambda e: e["strips"][0].update(shape=[6, 3, 8, 8]), "does not hold images of the shape"),
        (lambda e: e["strips"][0]["rows"][0].update(pixels="?"), "pixels='\\?' must be base64"),
        (lambda e: e["strips"][0]["rows"][0]["captions"].pop(), "a caption for each of its 6 images"),
        (lambda e: e["verdicts"]["plain"].update(verdict="robust"), "'robust', not one of no sign"),
        (lambda e: e["verdicts"]["plain"]["checks"][0].pop("passed"), r"\['plain'\].checks\[0\] lacks passed"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(change, words):
    broken = content()
    change(broken)
    with pytest.raises(EvaluationError, match=words):
        evaluation_from_json(broken)


def test_all_problems_come_in_one_message(tmp_path):
    broken = content()
    for one in broken["figures"][:2]:
        del one["label"]
    broken["figures"][2]["values"]["other"] = {"value": 1}
    (tmp_path / "evaluation.json").write_text(json.dumps(broken))
    with pytest.raises(EvaluationError, match=r"figures\[0\] lacks label; figures\[1\] lacks label; .* 'other'"):
        read_evaluation(tmp_path / "evaluation.json")
    with pytest.raises(EvaluationError, match="and 9 more"):
        make_evaluation(verdicts={str(number): evaluations.SOUND for number in range(17)})
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(EvaluationError, match="not valid JSON"):
        read_evaluation(tmp_path / "evaluation.json")


# ------------------------------------------------------------------------------------------------ what is read from it


def test_the_headline_is_the_strongest_common_attack():
    def chosen(*figures):
        return tuple(one and one.key for one in headline(make_evaluation(figures=figures)))

    assert chosen(*FIGURES) == ("clean", "pgd-madry-20-8-255", "autoattack-linf-8-255")
    assert chosen() == (None, None, None)
    by_key = {one.key: one for one in FIGURES}
    strongest, weaker = by_key["pgd-madry-20-8-255"], by_key["pgd-madry-7-8-255"]
    alone = dataclasses.replace(strongest, values={"2-LR": strongest.values["2-LR"]})
    assert chosen(alone, weaker)[1] == weaker.key  # the one that both networks have
    assert chosen(by_key["pgd-madry-20-16-255"], by_key["pgd-madry-20-2-255"])[1] == "pgd-madry-20-2-255"
    assert chosen(by_key["pgd-madry-20-16-255"])[1] == "pgd-madry-20-16-255"
    small = by_key["autoattack-linf-2-255"]
    assert chosen(by_key["pgd-madry-20-2-255"], by_key["autoattack-linf-8-255"], small)[2] == small.key
    named = dataclasses.replace(strongest, label="PGD-20 on blackout images, targeted noise")
    assert chosen(named)[1] == strongest.key  # words do not count
    for other in (
        dataclasses.replace(strongest, kind=Kind.TRANSFER),
        figure("l2", "PGD", 1, 1, attack=dataclasses.replace(PGD, norm="l2")),
        figure("targeted", "PGD", 1, 1, attack=dataclasses.replace(PGD, targeted=True)),
        figure("fgsm", "PGD", 1, 1, attack=dataclasses.replace(PGD, name="Iter-FGSM")),
        figure("hit", "PGD", 1, 1, kind=Kind.TARGET_HIT, attack=PGD),
        dataclasses.replace(strongest, values={}),
    ):
        assert chosen(other)[1] is None


def test_the_headline_that_is_set_beside_others_is_of_the_reference_attacks_alone():
    def chosen(*figures):
        return tuple(one and one.key for one in headline(make_evaluation(figures=figures), reference=True))

    by_key = {one.key: one for one in FIGURES}
    pgd, auto = by_key["pgd-madry-20-8-255"], by_key["autoattack-linf-8-255"]
    own = dataclasses.replace(pgd, values={"2-LR": pgd.values["2-LR"]})
    assert chosen(by_key["pgd-madry-7-8-255"], own, auto) == (None, pgd.key, auto.key), "of whatever networks"
    changes = [{"steps": 50}, {"eps": 4 / 255}, {"random_start": False}, {"restarts": 5}, {"radius_unit": "normalized"}]
    for changed in changes:
        assert chosen(figure("other", "PGD", 1, 1, attack=dataclasses.replace(PGD, **changed))) == (None,) * 3
    for changed in ({"eps": 2 / 255}, {"version": "plus"}, {"norm": "l2"}):
        attack = dataclasses.replace(auto.protocol.attack, **changed)
        assert chosen(figure("other", "AutoAttack", 1, 1, attack=attack)) == (None,) * 3


def test_figures_are_found_by_what_they_are():
    evaluation = make_evaluation(
        figures=[
            figure(f"{layer}-{count}", "x", 1, kind=Kind.COMPRESSION, layer=layer, directions=count)
            for layer in ("layer3", "pre_logits")
            for count in (5, 10, None)
        ]
        + [figure("nowhere", "x", kind=Kind.CLEAN, group="empty")]
    )

    def keys(**coordinates):
        return [one.key for one in evaluation.by_kind(Kind.COMPRESSION, Kind.NOISE, **coordinates)]

    assert keys(layer="layer3") == ["layer3-5", "layer3-10", "layer3-None"]
    assert keys(directions=5) == ["layer3-5", "pre_logits-5"]
    assert len(keys()) == 6
    assert evaluation.figure("layer3-5").directions == 5
    assert evaluation.figure("layer4-5") is None
    assert list(evaluation.groups()) == ["White box"]


def test_values_are_shares_means_and_medians():
    assert Value.share(2, 3).hits == 2
    assert not Value.share(0, 0).known
    assert Value.share(50, 50).high == 1
    middle = Value.median(float(number) for number in range(101))
    assert middle.value == 50
    assert (middle.low, middle.high) == (40, 61)
    assert Value.median([math.nan, 2.0]).of == 1
    few, enough = (Value.median([float(number) for number in range(count)]) for count in (5, 6))
    assert (few.value, few.interval) == (2.0, None), "5 values lie on one side of the true median too often"
    assert enough.interval == (0.0, 5.0)
    assert Value.mean([math.nan, 2.0, 4.0]) == Value(3.0, of=2)
    assert not Value.median([]).known
    assert not Value.mean([]).known
    assert Value(math.nan, 0.1, 0.2).interval is None
    assert len({Value(math.nan, of=3), Value(float("nan"), of=3), Value(math.inf, of=3)}) == 1  # unknown is unknown
    assert Value(math.nan, of=3) != Value(math.nan, of=2)
    assert [radius_text(eps) for eps in (8 / 255, 0.5, 1.5 / 255, 0.0)] == ["8/255", "0.5", "1.5/255", "0"]


def test_the_interval_of_a_difference_is_that_of_newcombe():
    gap = difference(Value.share(56, 70), Value.share(48, 80))  # Newcombe (1998), Table II, method 10
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert gap.distinguishable
    assert not difference(Value.share(3, 7), Value.share(2, 7)).distinguishable
    assert difference(Value(0.5), Value.share(2, 7)).distinguishable is None
    assert difference(Value(math.nan), Value.share(2, 7)) is None


def test_a_protocol_is_told_in_order():
    attack = dataclasses.replace(PGD, crafted_on={"2-LR": "plain", "plain": "2-LR"}, notes=("last iterate",))
    protocol = Protocol(images=360, seed=0, attack=attack, details={"batch": 100})
    assert list(protocol.entries().items()) == [
        ("attack", "PGD, L_inf, last iterate"), ("eps", "8/255"), ("radius_unit", "pixel"), ("steps", 20),
        ("step_size", "2/255"), ("random_start", True), ("restarts", 1),
        ("crafted_on", "plain for 2-LR; 2-LR for plain"), ("batch", 100), ("images", 360), ("seed", 0),
    ]  # fmt: skip
    noise = Protocol(noise=NoiseProtocol(0.4, "variance 128/255")).entries()
    assert noise == {"noise": "Gaussian, variance 128/255, clipped to [0, 1]", "probability": 0.4}
