"""Recipes: reading, overriding, and one clear error for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

import timm_lowrank  # noqa: F401 - registers the CIFAR networks
from timm_lowrank.errors import RecipeError
from timm_lowrank.training import Recipe, load_recipe, recipe_names
from timm_lowrank.training.recipe import learning_rate, penalty_weight, read_recipe, recipe_path, require_trackers
from timm_lowrank.wrapping import find_taps

ROOT = Path(__file__).parents[1]

GOOD = "model: resnet10_cifar\nepochs: 3\n"


def recipe(**values: object) -> Recipe:
    return Recipe.from_dict({"model": "resnet10_cifar", "epochs": 3, **values})


@pytest.mark.parametrize("name", recipe_names())
def test_every_named_recipe_is_a_valid_one_of_a_known_network(name):
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded == load_recipe(recipe_path(name))
    assert timm.is_model(loaded.model)
    assert Recipe.from_dict(loaded.to_dict()) == loaded


def test_the_names_are_those_of_the_files_and_an_unknown_one_lists_them():
    assert recipe_names() == sorted(path.stem for path in (ROOT / "recipes" / "configs").iterdir())
    with pytest.raises(RecipeError, match=r"no recipe 'cifar10-smal'. Did you mean: cifar10-small.*vgg19-fast"):
        load_recipe("cifar10-smal")


def test_every_key_has_a_meaning_and_its_own_default():
    fields = {field.name: field for field in Recipe.describe_fields()}
    assert list(fields) == list(recipe().to_dict())
    assert all(len(field.text) > 5 and field.text[-1] != "." for field in fields.values())
    assert [name for name, field in fields.items() if field.required] == ["model", "epochs"]
    made = recipe()
    assert all(field.required or field.default == getattr(made, name) for name, field in fields.items())
    assert fields["image_size"].type == "an integer or null"
    assert (fields["milestones"].type, fields["streaming"].type) == ("a list", "true or false or a string")


@pytest.mark.parametrize("name", recipe_names())
def test_every_named_recipe_builds_its_network_with_its_branches(name):
    """Shapes alone, without memory or arithmetic: on the meta device."""
    loaded = load_recipe(name)
    channels, size = (1, 8) if loaded.data == "digits" else (3, loaded.image_size or 32)
    with torch.device("meta"):
        network = timm.create_model(loaded.model, **{"num_classes": 10, "in_chans": channels, **loaded.model_args})
        images = torch.zeros(2, channels, size, size)
        _, widths, ranks = find_taps(network, loaded.lowrank_config(), images)
    assert all(ranks[layer] <= width / 2 or layer == "pre_logits" for layer, width in widths.items())
    assert all(ranks[layer] < width for layer, width in widths.items())
    assert loaded.lowrank_enabled is (loaded.comparator is None)


PAPER = [name for name in recipe_names() if name.startswith("paper-")]
RANKS = {
    "resnet18_cifar": {"layer3": 500, "pre_logits": 100},
    "resnet50_cifar": {"pre_logits": 100},
    "vgg19_bn_cifar": {"features.52": 100, "pre_logits": 100},
}


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_is_what_the_paper_says(name):
    """Section 3, Appendix C: schedule, ranks, printed loss with both terms, Nystrom with l = 2r, every ten updates."""
    loaded = load_recipe(name)
    assert (loaded.epochs, loaded.milestones, loaded.pretrain_epochs) == (350, (150, 250), 50)
    assert (loaded.batch_size, loaded.optimizer) == (128, "sgd")
    rates = [learning_rate(loaded, epoch, 0, 390) for epoch in (10, 149, 150, 249, 250, 349)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    config = loaded.lowrank_config()
    assert config.ranks() == RANKS[loaded.model]
    assert (config.scale, config.projection, config.nystrom_columns, config.project_every) == (
        "paper",
        "nystrom",
        None,
        10,
    )
    for branch in map(config.for_branch, config.ranks()):
        assert branch.reconstruction_weight > 0
        assert branch.norm_weight > 0
    svhn = loaded.data.endswith("svhn")
    assert (loaded.augment == "none", loaded.data_args.get("extra", False)) == (svhn, svhn)


def test_the_paper_recipes_are_of_its_networks_and_data_sets():
    wanted = [
        f"paper-{data}-{network}"
        for data, networks in {
            "cifar10": ("resnet18", "resnet50", "vgg19"),
            "cifar100-coarse": ("resnet18", "resnet50"),
            "cifar100-fine": ("resnet50",),
            "svhn": ("resnet18", "vgg19"),
        }.items()
        for network in networks
    ]
    assert wanted == PAPER


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("cifar10-fast-")])
def test_what_is_compared_with_cifar10_fast_is_trained_like_it(name):
    fast, compared = load_recipe("cifar10-fast").to_dict(), load_recipe(name).to_dict()
    tuned = ("epochs", "learning_rate", "init_from") if name.endswith("finetune") else ()
    changed = {key for key in fast if fast[key] != compared[key]}
    assert changed - {"comparator_args", *tuned} == {"name", "comparator", "pretrain_epochs"}


def test_overrides_reach_inside(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(GOOD + "lowrank: {reconstruction_weight: 1}\n")
    overrides = ["lowrank.reconstruction_weight=3e-1", "weight_decay=5e-4", "lowrank.branches.layer3.0=7", "seed = 4"]
    loaded = load_recipe(path, overrides, data="digits")
    assert loaded.lowrank == {"reconstruction_weight": 0.3, "branches": {"layer3.0": 7}}
    assert (loaded.weight_decay, loaded.seed, loaded.data) == (5e-4, 4, "digits")
    assert loaded.lowrank_config().seed == 4  # follows the recipe's unless it is set


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"warmup_epochs": 3, "milestones": [1, 2], "gamma": 0.2}, []),
        ({"warmup_epochs": 4}, ["warmup_epochs=4 does not end in epochs=3"]),
        ({"milestones": [1, 3, 5]}, ["milestones 3, 5 have no effect in epochs=3"]),
        ({"milestones": [1], "schedule": "cosine"}, ["milestones and gamma belong to schedule=step .*schedule=cosine"]),
        ({"gamma": 0.2, "schedule": "cosine"}, ["milestones and gamma belong to schedule=step"]),
        ({"ramp_epochs": 2, "cooldown_epochs": 2}, ["ramp_epochs=2 and cooldown_epochs=2 are more than the 3 epochs"]),
        ({"ramp_epochs": 3, "pretrain_epochs": 1}, ["ramp_epochs=3 and .* are more than the 2 epochs with branches"]),
    ],
)
def test_a_schedule_that_was_cut_short_says_what_has_no_effect(values, said):
    found = recipe(**values).without_effect()
    assert len(found) == len(said)
    assert all(re.search(pattern, text) for pattern, text in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "three"}, r"epochs='three' must be an integer"),
        ({"epochs": True}, r"epochs=True must be an integer"),
        ({"learning_rate": "fast"}, r"learning_rate='fast' must be a number"),
        ({"ema_decay": "no"}, r"ema_decay='no' must be a number or null"),
        ({"milestones": [1, "b"]}, r"milestones\[1\]='b' must be an integer"),
        ({"milestones": [2, 1]}, r"milestones=\[2, 1\] must be increasing"),
        ({"model_args": 3}, r"model_args=3 must be a mapping"),
        ({"epochs": 0}, r"epochs=0 must be > 0"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan must be > 0"),
        ({"epochs": 10**400}, r"epochs=10+ must be > 0 and finite"),
        ({"optimizer": "adam"}, r"optimizer='adam' is not one of sgd, adamw"),
        ({"optimizer": "adamw", "nesterov": True}, r"nesterov=true belongs to optimizer=sgd"),
        ({"optimizer": "adamw", "momentum": 1.0}, r"momentum=1.0 is the first beta of AdamW"),
        ({"momentum": 1.0}, r"momentum=1.0 of SGD must be < 1"),
        ({"momentum": -0.1}, r"momentum=-0.1 must be >= 0"),
        ({"streaming": "yes"}, r"streaming='yes' is not one of auto, true, false"),
        ({"streaming": False, "data": "x/y", "image_size": 8}, r"image_size=8 needs streaming"),
        ({"streaming": True}, r"data='digits' is built in and always held in memory"),
        ({"crop_pct": 1.5}, r"crop_pct=1.5 must be > 0 and <= 1"),
        ({"crop_scale": 0.0}, r"crop_scale=0.0 must be > 0 and <= 1"),
        ({"workers": -1}, r"workers=-1 must be >= 0"),
        ({"save_every_steps": 0}, r"save_every_steps=0 must be > 0"),
        ({"spectrum_images": 1}, r"spectrum_images=1 must be >= 2: one has no variance"),
        ({"shuffle_buffer": 0}, r"shuffle_buffer=0 must be > 0"),
        ({"schedule": "linear"}, r"schedule='linear' is not one of step, cosine"),
        ({"augment": "mixup"}, r"augment='mixup' is not one of"),
        ({"precision": "fp8"}, r"precision='fp8' is not one of no, bf16, fp16, auto"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must lie between 0 and 1"),
        ({"gradient_accumulation": 3}, r"batch_size=128 cannot be split into gradient_accumulation=3"),
        ({"nesterov": True, "momentum": 0.0}, r"nesterov=true needs a momentum"),
        ({"pretrain_epochs": 3}, r"leaves none of epochs=3 for the low-rank branch"),
        ({"twin": True, "lowrank": {"enabled": False}}, r"set twin=false"),
        ({"comparator": "bottlneck"}, r"comparator='bottlneck' is not one of bottleneck, spectral-norm, stable-rank"),
        (
            {"comparator": "snip", "comparator_args": {"sparsty": 0.5}},
            r"comparator_args.sparsty. Did you mean: sparsity",
        ),
        ({"comparator": "snip", "comparator_args": {"sparsity": 1.5}}, r"sparsity=1.5 must lie between 0 and 1"),
        ({"comparator": "snip", "comparator_args": {"batches": 0}}, r"batches=0 must be >= 1"),
        ({"comparator": "spectral-norm", "comparator_args": {"iterations": 0}}, r"iterations=0 must be >= 1"),
        ({"comparator": "stable-rank", "comparator_args": {"share": "all"}}, r"share='all' must be a number"),
        ({"comparator": "stable-rank", "comparator_args": {"share": 0}}, r"share=0 must be > 0 and <= 1"),
        ({"comparator": "matryoshka", "comparator_args": {"sizes": [5, 2]}}, r"sizes=\[5, 2\] must be increasing"),
        ({"comparator": "bottleneck", "comparator_args": {"branches": {"layer3": 0}}}, r"layer3.*an integer >= 1"),
        (
            {"comparator": "snip", "lowrank": {"enabled": True}},
            r"takes the place of the branches: drop lowrank.enabled",
        ),
        ({"comparator_args": {"sparsity": 0.5}}, r"comparator_args belong to a comparator"),
        ({"lowrank": {"enabled": "yes"}}, r"lowrank.enabled='yes' must be true or false"),
        ({"lowrank": {"reconstruction_wieght": 1}}, r"reconstruction_wieght.*reconstruction_weight"),
        ({"lowrank": {"branches": {"layer3": 0}}}, r"layer3.*0.*must be an integer >= 1"),
        ({"data_args": {"train_limt": 5}}, r"data_args.train_limt.*train_limit"),
        ({"data_args": {"config": 2019}}, r"data_args.config=2019 must be a string or null"),
        ({"data_args": {"extra": "no"}}, r"data_args.extra='no' must be true or false"),
        ({"data_args": {"train_limit": "500"}}, r"data_args.train_limit='500' must be an integer or null"),
        ({"data_args": {"test_split": "train"}}, r"data_args.test_split='train' is a split of the training images"),
        ({"data_args": {"train_split": "all", "test_split": "all"}}, r"test_split='all' is a split of the training"),
        ({"data_args": {"extra": True, "test_split": "extra"}}, r"test_split='extra' is a split of the training"),
        ({"data_args": {"extra": True, "train_split": "extra"}}, r"which data_args.train_split names already"),
        ({"model_args": {"num_classes": 5}}, r"model_args.num_classes cannot be set"),
        ({"epoch": 3, "learning_rat": 0.1}, r"(?s)'epoch'.*: epochs.*'learning_rat'.*: learning_rate"),
        ({"learning_rate": -1, "schedule": "never"}, r"(?s)learning_rate=-1.*schedule='never'"),
        ({"model": None, "epochs": None}, r"(?s)model=None must be a string.*epochs=None must be an integer"),
        ({"trackers": ["tensorbord"]}, r"no tracker 'tensorbord'.*tensorboard"),
    ],
)
def test_a_wrong_value_names_its_key(values, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**values)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (GOOD, ["epochs"], "write it as key=value"),
        (GOOD, ["epochs.more=3"], "epochs is 3, which has no keys inside"),
        (GOOD, ["milestones=[1"], "not valid YAML"),
        ("model: [", [], r"one\.yaml is not valid YAML"),
        ("- a list", [], "must hold a mapping"),
        (GOOD + "epochs: 4\n", [], r"one\.yaml is not valid YAML: the key 'epochs' is given twice, line 3, column 1"),
        (GOOD + "lowrank: {scale: paper, scale: x}\n", [], r"the key 'scale' is given twice, line 3, column 25"),
        (GOOD, ["lowrank={scale: paper, scale: x}"], "the key 'scale' is given twice"),
        ("{}", [], "it lacks model, epochs"),
    ],
)
def test_mistakes_in_the_file_or_the_override(tmp_path, content, overrides, message):
    (tmp_path / "one.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "one.yaml", overrides)
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*oone.yaml.* Recipes there: one"):
        load_recipe(tmp_path / "oone.yaml")


def test_a_key_that_is_merged_may_be_given_again(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("model: &inner {a: 1, b: 2}\nlowrank: {<<: *inner, a: 3}\n")
    assert read_recipe(path)["lowrank"] == {"a": 3, "b": 2}


def test_the_twin_differs_in_the_branch_alone():
    wrapped = recipe(twin=True, lowrank={"branches": {"layer3": 5}}, seed=3)
    plain = wrapped.plain()
    assert not plain.lowrank_enabled
    assert plain.lowrank_config() == wrapped.lowrank_config()
    changed = {key for key, value in plain.to_dict().items() if value != wrapped.to_dict()[key]}
    assert changed == {"name", "lowrank", "twin"}


def test_a_comparator_is_trained_in_the_place_of_the_branches_and_its_twin_has_neither():
    pruned = recipe(twin=True, comparator="snip", comparator_args={"sparsity": 0.5})
    assert not pruned.lowrank_enabled
    assert repr(pruned.compared()) == "Snip(sparsity=0.5, batches=1)"
    assert penalty_weight(pruned, 2, 0, 10) == 0
    assert pruned.plain() == recipe(twin=True).plain()
    assert Recipe.from_dict(pruned.to_dict()) == pruned


def test_cosine_schedule_with_warmup():
    cosine = recipe(schedule="cosine", warmup_epochs=1, learning_rate=0.2, epochs=4)
    rates = [learning_rate(cosine, epoch, step, 10) for epoch in range(4) for step in range(10)]
    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.02)
    assert 8 <= peak <= 10
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[20] == pytest.approx(0.1)
    assert 0 < rates[-1] < 0.001


def test_the_penalty_is_off_in_pretraining_and_then_grows():
    ramped = recipe(epochs=6, pretrain_epochs=2, ramp_epochs=2)
    assert [penalty_weight(ramped, epoch, 9, 10) for epoch in range(6)] == [0, 0, 0.5, 1, 1, 1]
    assert penalty_weight(ramped, 2, 0, 10) == pytest.approx(0.05)
    paper = load_recipe("paper-cifar10-resnet18")
    assert (penalty_weight(paper, 49, 0, 10), penalty_weight(paper, 50, 0, 10)) == (0, 1)
    assert penalty_weight(ramped.plain(), 5, 0, 10) == 0


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("imagenet1k")])
def test_the_imagenet_recipes_stream_and_test_on_the_validation_split(name):
    loaded = load_recipe(name, ["lowrank.branches=1-LR"])
    assert (loaded.image_size, loaded.streaming, loaded.data_args["test_split"]) == (224, "auto", "validation")
    assert loaded.epochs == 90
    assert loaded.save_every_steps < 1_281_167 // loaded.batch_size
    assert loaded.lowrank_config().branches == "1-LR"


def test_a_tracker_needs_its_package_when_a_run_begins_and_not_when_its_recipe_is_read(monkeypatch):
    tracked = recipe(trackers=["comet_ml"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="the tracker 'comet_ml' needs its package: pip install comet-ml"):
        require_trackers(tracked)
