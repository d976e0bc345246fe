"""Networks and images that are odd, in measurements of a few images: none may cost the others their figures."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import yaml
from accelerate import PartialState
from evaluations import SHORT_DIAGNOSIS
from torch import nn

from timm_lowrank.data.images import ImageData
from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation import PixelModel, predictions
from timm_lowrank.evaluation.masking import BUDGETS, PGDAccuracy, diagnose_published
from timm_lowrank.evaluation.maxmargin import linear_accuracy, max_margin_classifiers
from timm_lowrank.evaluation.representations import cut_spectrum, preactivations
from timm_lowrank.evaluation.results import DataInfo
from timm_lowrank.files import weights_sha256
from timm_lowrank.suites import Options, evaluate
from timm_lowrank.suites.foreign import Resizing
from timm_lowrank.suites.measurements.accuracy import AutoAttack, Clean, Diagnosis
from timm_lowrank.suites.measurements.base import Context, Results
from timm_lowrank.suites.measurements.classifiers import Compression, FooledHybrid, OtherLabels
from timm_lowrank.suites.measurements.perturbations import IteratedFGSM, MinimumPerturbation
from timm_lowrank.suites.measurements.representations import Cushion, CutPreactivations
from timm_lowrank.suites.networks import EvaluatedNetwork, load_network
from timm_lowrank.suites.runner import PartialResults, run, settings_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CLASSES = 4


def network(seed=0, width=8, end=None):
    """Of grey images of 6 x 6 pixels; its layer "3" is as wide as is asked for."""
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(216, width), end or nn.ReLU())
    convolution = nn.Conv2d(1, 6, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), layer, nn.Linear(width, CLASSES)).eval()


def evaluated(module, title="plain", **fields):
    return EvaluatedNetwork(
        title=title, path=title, model=PixelModel(module, (0.5,), (0.25,)).eval(), branches={}, comparator=None,
        weights=weights_sha256(module.state_dict()), layers=("3",), **fields,
    )  # fmt: skip


def context_of(*networks, count=40, chunk=16, labels=None, **fields):
    random = torch.Generator().manual_seed(1)
    images, train = torch.rand(count, 1, 6, 6, generator=random), torch.rand(60, 1, 6, 6, generator=random)
    info = DataInfo(source="x", split="test", images=count, image_size=(1, 6, 6), class_names=tuple("abcd"))
    return Context(
        networks={each.title: each for each in networks}, images=images, data=info, layers=("3",), seed=0, chunk=chunk,
        labels=torch.arange(count) % CLASSES if labels is None else labels, train_images=(train * 255).byte(),
        **{"train_labels": torch.arange(60) % CLASSES, **fields},
    )  # fmt: skip


def measured(context, folder, *measurements):
    partial = PartialResults(folder / "partial", settings_of(context, measurements))
    return run(context, measurements, partial, PartialState())


def values(results, title="plain"):
    return {figure.key: figure.values[title].value for figure in results.figures if title in figure.values}


class Detached(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images).detach()


@pytest.mark.parametrize("chunk", [13, 16])
def test_a_diagnosis_does_not_take_in_what_failed_on_some_of_the_images(tmp_path, monkeypatch, chunk):
    """AutoAttack has nothing to do in the last chunk, and fails in the others."""
    monkeypatch.setitem(BUDGETS, "quick", SHORT_DIAGNOSIS)
    own = evaluated(Detached(network()))
    right = predictions(own.model, context_of(own).images)
    labels = torch.cat([right[:32], (right[32:] + 1) % CLASSES])
    results = measured(
        context_of(own, chunk=chunk, labels=labels), tmp_path, AutoAttack("linf", 8 / 255), Diagnosis(8 / 255, "quick")
    )
    checks = {check.name: check for check in results.verdicts["plain"].checks}
    assert checks["AutoAttack"].value is None
    assert any("autoattack-linf-8-255 was not measured" in text for text in results.warnings)


def test_images_that_are_wrong_to_begin_with_are_not_among_the_sizes_of_an_attack_that_stops(tmp_path):
    """Three of four, which it leaves as they are: the median of all images is 0."""
    own = evaluated(network())
    right = predictions(own.model, context_of(own).images)
    labels = torch.where(torch.arange(40) % 4 == 0, right, (right + 1) % CLASSES)
    attack = {"eps": 0.2, "steps": 60}
    found = measured(
        context_of(own, labels=labels), tmp_path, *(IteratedFGSM(least_likely=False, stop_at_success=stop, **attack)
                                                    for stop in (False, True))
    )  # fmt: skip
    going, stopped = (figure.values["plain"] for figure in found.figures if figure.key.endswith("-rho"))
    assert (going.of, stopped.of) == (40, 10)
    assert 0 < stopped.value < going.value


@pytest.mark.parametrize(
    ("version", "restarts", "attacks", "queries"),
    [
        ("standard", 1, "apgd-ce, apgd-t, fab-t, square", 5000),
        ("plus", 5, "apgd-ce, apgd-dlr, fab, square, apgd-t, fab-t", 5000),
        ("rand", 1, "apgd-ce, apgd-dlr", None),
    ],
)
def test_a_figure_of_autoattack_says_how_its_version_is_run(version, restarts, attacks, queries):
    results, seen = Results(), {"plain": {"withstood": [True], "broken_by": [None], "flags": [[]]}}
    AutoAttack("linf", 8 / 255, version).report(context_of(evaluated(network())), seen, results)
    (protocol,) = (figure.protocol for figure in results.figures)
    assert protocol.attack.restarts == restarts
    assert (protocol.details["attacks"], protocol.details.get("square_queries")) == (attacks, queries)


def test_weights_of_zero_have_no_cushion_and_cost_no_other(tmp_path):
    own = network()
    nn.init.zeros_(own[4].weight)
    results = measured(context_of(evaluated(own)), tmp_path, Cushion())
    assert math.isnan(values(results)["cushion-4"])
    assert values(results)["cushion-0"] > 0
    assert {curve.key for curve in results.curves} == {"cushion-0", "cushion-3.0"}


class Table(nn.Module):
    """Adds what a layer makes of one row that is the same for all images, as position biases are made."""

    def __init__(self):
        super().__init__()
        self.inner, self.made = network(), nn.Linear(3, CLASSES)

    def forward(self, images):
        return self.inner(images) + self.made(torch.ones(1, 3))


def test_a_layer_of_one_row_for_all_images_has_no_cushion_in_a_chunk_of_one(tmp_path):
    results = measured(context_of(evaluated(Table()), count=33), tmp_path, Cushion())
    assert {figure.layer for figure in results.figures} == {"inner.0", "inner.3.0", "inner.4"}


class ByName(nn.Linear):
    def __call__(self, images):
        return super().__call__(input=images)


def test_a_layer_that_is_called_with_its_input_by_name_has_a_cushion(tmp_path):
    torch.manual_seed(0)
    own = nn.Sequential(nn.Flatten(), ByName(36, 8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    results = measured(context_of(evaluated(own)), tmp_path, Cushion())
    assert {figure.layer for figure in results.figures} == {"1", "3"}


def test_a_network_that_is_never_right_has_no_smallest_radius_and_costs_the_other_nothing(tmp_path):
    one, other = evaluated(network(0), "one"), evaluated(network(1), "other")
    images = context_of(one).images
    wrong = (predictions(one.model, images) + 1) % CLASSES
    labels = predictions(other.model, images)
    labels = torch.where(labels == predictions(one.model, images), wrong, labels)
    results = measured(context_of(one, other, labels=labels), tmp_path, MinimumPerturbation(False, (8 / 255,)))
    values = results.figures[0].values
    assert (values["one"].known, values["one"].of, values["other"].of > 0) == (False, 0, True)
    assert any("one: minimum-iter-fgsm has no images" in text for text in results.warnings)


# -------------------------------------------------------------------------------------------------- source, sizes, data


def test_the_hybrid_of_a_source_with_the_title_of_the_network_is_not_made_of_its_classifier(tmp_path):
    context = context_of(evaluated(network(0)), source=evaluated(network(1)))
    results = measured(context, tmp_path, FooledHybrid("DeepFool"))
    assert {figure.key for figure in results.figures} == {"hybrid-deepfool-3-white", "hybrid-deepfool-3-black"}


def saved_by_timm(folder, name="test_resnet", size=16, seed=0, **arguments):
    """What timm's train.py leaves of an untrained network."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    extra = {"img_size": size} if "vit" in name else {}
    channels = arguments.get("in_chans") or 3
    state = timm.create_model(name, num_classes=CLASSES, in_chans=channels, **extra).state_dict()
    torch.save({"state_dict": state}, folder / "model_best.pth.tar")
    said = {"model": name, "num_classes": CLASSES, "img_size": size, "model_kwargs": extra, **arguments}
    (folder / "args.yaml").write_text(yaml.safe_dump(said))
    return folder


def images_of(size, channels=3):
    random = torch.Generator().manual_seed(0)
    train, test = (
        torch.randint(256, (40, channels, size, size), generator=random, dtype=torch.uint8) for _ in range(2)
    )
    labels = torch.arange(40) % CLASSES
    return ImageData(
        "noise", train, labels, test, labels, tuple("abcd"), (0.5,) * channels, (0.25,) * channels, f"of {size}"
    )


def clean(network, folder, *, size=16, channels=3, **options):
    given = {"limit": 20, "train_limit": 20, "spectrum_limit": 20, "pages": False, "measurements": (Clean(),)}
    options = Options(str(network), output=folder, data="noise", **{"against": ("none",), **given, **options})
    return evaluate(options, PartialState(), images_of(size, channels))


def test_a_source_has_a_title_of_its_own_and_is_no_network_that_is_measured(tmp_path):
    one, other = saved_by_timm(tmp_path / "one"), saved_by_timm(tmp_path / "other", seed=1)
    evaluation = clean(one, tmp_path / "out", source=str(other))
    assert evaluation.settings.networks.keys() == {"plain", "source plain (source)"}
    with pytest.raises(EvaluationError, match="a black-box attack needs another network"):
        clean(one, tmp_path / "same", source=str(one))


def test_networks_that_name_another_size_or_cut_than_they_are_given_say_so(tmp_path):
    one, other = saved_by_timm(tmp_path / "one"), saved_by_timm(tmp_path / "other", size=24, seed=1)
    cut = saved_by_timm(tmp_path / "cut", seed=2, crop_pct=0.5)
    evaluation = clean(one, tmp_path / "out", against=(str(other), str(cut)))
    assert any("other takes images of 24 x 24 pixels by its own files, and these" in w for w in evaluation.warnings)
    assert any(w.startswith("cut is given crops of 0.9") and "say 0.5" in w for w in evaluation.warnings)
    assert not any(w.startswith(("one takes", "one is")) for w in evaluation.warnings)


def test_a_network_that_does_not_run_on_the_size_of_the_images_is_one_error(tmp_path):
    one = saved_by_timm(tmp_path / "one")
    vit = saved_by_timm(tmp_path / "vit", "vit_tiny_patch16_224", size=32)
    with pytest.raises(EvaluationError, match=r"vit cannot be run on images of 3 x 16 x 16.*it takes 32 x 32: evaluat"):
        clean(one, tmp_path / "out", against=(str(vit),), spectrum_limit=None)


@pytest.mark.parametrize("change", [{"mean": [0.1] * 3, "std": [0.9] * 3}, {"crop_pct": 0.5}])
def test_a_network_whose_images_are_made_otherwise_is_another_evaluation(tmp_path, change, capsys):
    one = saved_by_timm(tmp_path / "one")
    clean(one, tmp_path / "out")
    clean(one, tmp_path / "out")
    assert "is complete" in capsys.readouterr().out
    saved_by_timm(one, **change)
    with pytest.raises(EvaluationError, match="holds another evaluation"):
        clean(one, tmp_path / "out")


def test_grey_checkpoints_of_timm_have_the_normalisation_of_its_loader(tmp_path):
    loaded = load_network(str(saved_by_timm(tmp_path / "grey", in_chans=1)))
    assert (loaded.model.mean.flatten().tolist(), loaded.model.std.flatten().tolist()) == ([0.5], [0.5])


def test_other_labels_are_part_of_what_was_measured():
    labels = torch.arange(60) % 3, torch.arange(40) % 3
    other = labels[0], (labels[1] + 1) % 3
    settings = [
        settings_of(context_of(evaluated(network()), other_labels=each), [OtherLabels()])
        for each in (None, labels, labels, other)
    ]
    assert settings[1] == settings[2]
    assert len({each.other_labels for each in settings}) == 3


def test_images_are_resized_as_settings_say():
    settings = settings_of(context_of(evaluated(network(), resizing=Resizing(6, 0.9))), [])
    assert "0.9" in settings.inputs["plain"]


# ------------------------------------------------------------------------------------------------------ representations


def test_a_classifier_for_fewer_classes_than_the_data_has_is_none(tmp_path):
    """The missing class is the last, so nothing in the labels of the training images shows that it is missing."""
    few = torch.arange(60) % (CLASSES - 1)
    results = measured(context_of(evaluated(network()), train_labels=few), tmp_path, Compression((2,)))
    assert not results.figures
    assert any("class 3 has no training images" in text for text in results.warnings)
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EvaluationError, match="class 3 has no training images"):
        max_margin_classifiers(rows, few, classes=CLASSES)
    with pytest.raises(EvaluationError, match="class 3 has no training images"):
        linear_accuracy(rows, few, rows[:4], torch.arange(4), [None])


ENDS = {
    "dropout": nn.Sequential(nn.ReLU(), nn.Dropout()),
    "flatten": nn.Sequential(nn.ReLU(), nn.Flatten()),
    "identity": nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity()),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_changes_nothing_behind_an_activation_function_is_passed_over(name):
    own = evaluated(network(width=30, end=ENDS[name]))
    images = context_of(own).images
    values, function = preactivations(own.model, images, "3")
    assert isinstance(function, nn.ReLU)
    assert (values < 0).any()


@pytest.mark.parametrize("function", [nn.SiLU(), nn.ELU(), nn.Softplus(), nn.Mish()], ids=repr)
def test_a_function_that_rounds_otherwise_in_batches_of_odd_sizes_is_elementwise(function):
    own = evaluated(network(width=31, end=function))
    values, found = preactivations(own.model, context_of(own).images, "3", batch_size=7)
    assert found is function
    assert values.shape == (40, 31)


@pytest.mark.parametrize(
    "end", [nn.Identity(), nn.Linear(30, 30), nn.LayerNorm(30), nn.BatchNorm1d(30), nn.Softmax(dim=1)], ids=repr
)
def test_layers_that_are_no_activation_function_have_no_preactivations(tmp_path, end):
    results = measured(context_of(evaluated(network(width=30, end=end))), tmp_path, CutPreactivations())
    assert not results.figures
    assert any("no layer ends in an elementwise activation function" in text for text in results.warnings)


def test_an_activation_function_with_parameters_is_cut_in_float64():
    values = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    function = nn.PReLU()
    there = cut_spectrum(values, function, 3)
    assert torch.equal(there.singular_values, cut_spectrum(values, lambda x: torch.where(x > 0, x, 0.25 * x), 3)[1])
    assert function.weight.dtype == torch.float32


def test_networks_that_are_cut_to_other_ranks_share_no_figure(tmp_path):
    wide, narrow = evaluated(network(0, width=36), "wide"), evaluated(network(1, width=8), "narrow")
    results = measured(context_of(wide, narrow), tmp_path, CutPreactivations(rank=10))
    for figure in results.figures:
        assert len(figure.values) == 1
        assert figure.protocol.details["cut_to"] == (10 if "wide" in figure.values else 4)
    assert {f"cut-preactivations-3-rank{ending}" for ending in ("", "-cut-to-4")} <= {f.key for f in results.figures}


# -------------------------------------------------------------------------------------------------------------- masking


def test_a_gap_that_is_more_than_chance_is_not_hidden_by_a_larger_one_that_is_not():
    middle = PGDAccuracy(eps=8 / 255, steps=20, white_box=0.5, black_box=0.47)
    clear = PGDAccuracy(eps=20 / 255, steps=20, white_box=0.025, black_box=0.0)
    (alone, *_), (together, *_) = (diagnose_published(c, images=1000).checks for c in ([clear], [middle, clear]))
    assert (alone.passed, together.passed) == (False, False)
    assert together.value == pytest.approx(0.025)
    (either, *_) = diagnose_published([middle], images=1000).checks
    assert either.passed is None
