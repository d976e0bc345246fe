"""Which runs stand for which networks of the paper: setups, scales and conditions.

A setup is a network on a data set of the paper ("CIFAR-10, ResNet-18"). A scale says what is trained in its place: one
or more bases, recipes with changes. A condition is what is done to the network: nothing (N-LR, the plain twin),
branches, or one of the comparators. The run of a base, a condition and a seed lies in RUNS/BASE/CONDITION-seedK.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import EvaluationError, RecipeError, nearest
from ..training import Recipe
from ..training.recipe import read_recipe, recipe_names, recipe_path

PLAIN = "N-LR"
LAST = "pre_logits"
Values = dict[str, Any]  # keys and values of a recipe

# --------------------------------------------------------------------------------------------------------- conditions


@dataclasses.dataclass(frozen=True)
class Condition:
    """What is done to a network.

    Args:
        name: as the paper has it where it has it.
        change: takes the keys of a 2-LR recipe and gives those of this condition.
        text: in words.
        recipes: endings of recipes that are the same: "snip" for cifar10-fast-snip. They say with which settings, and
            their runs may lie in folders of their own.
    """

    name: str
    change: Callable[[Values], Values]
    text: str
    recipes: tuple[str, ...] = ()


def _branches(values: Values, branches: Any, **options: Any) -> Values:
    return {**values, "lowrank": {**values.get("lowrank", {}), "branches": branches, **options}}


def _last_alone(values: Values) -> Any:
    """The branches of 1-LR: the one before the classifier."""
    branches = values["lowrank"]["branches"]
    return {LAST: branches[LAST]} if isinstance(branches, Mapping) and LAST in branches else "1-LR"


def _with_head(values: Values) -> Values:
    """1-LR with the subspace head that the presets have inside the network alone."""
    last = _spelled(_last_alone(values))[LAST]
    one = dict(last) if isinstance(last, Mapping) else {"rank": last}
    return _branches(values, {LAST: {**one, "head_weight": 1.0}})


PRESETS = {"1-LR": {LAST: 100}, "2-LR": {"layer3": 500, LAST: 100}}  # of the recipes that name one


def _spelled(branches: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Layer -> its rank, or a mapping with it; of presets, too."""
    return PRESETS[branches] if isinstance(branches, str) else branches


def _plain(values: Values) -> Values:
    """Layers stay, so that the same are measured."""
    return _branches(values, values["lowrank"]["branches"], enabled=False)


def _strength(name: str) -> Callable[[Values], Values]:
    return lambda values: _branches(values, values["lowrank"]["branches"], strength=name)


def _ranks(factor: float) -> Callable[[Values], Values]:
    def scaled(one: Any) -> Any:
        rank = one["rank"] if isinstance(one, Mapping) else one
        rank = max(1, round(rank * factor))
        return {**one, "rank": rank} if isinstance(one, Mapping) else rank

    def change(values: Values) -> Values:
        branches = _spelled(values["lowrank"]["branches"])
        return _branches(values, {layer: scaled(one) for layer, one in branches.items()})

    return change


def _comparator(name: str, one_place: bool = False, **arguments: Any) -> Callable[[Values], Values]:
    def change(values: Values) -> Values:
        given = {**arguments, **({"branches": _last_alone(values)} if one_place else {})}
        return {**_plain(values), "comparator": name, "comparator_args": given}

    return change


RANK_FACTORS = (0.25, 0.5, 1, 2, 4)
CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition(PLAIN, _plain, "plain"),
        Condition("1-LR", lambda values: _branches(values, _last_alone(values)), "a branch before the classifier"),
        Condition("1-LR-head", _with_head, "1-LR with a subspace head of weight 1"),
        Condition("2-LR", lambda values: values, "another branch before the last stage"),
        Condition("2-LR-light", _strength("light"), "2-LR of strength light"),
        Condition("2-LR-strong", _strength("strong"), "2-LR of strength strong"),
        *(
            Condition(f"2-LR-ranks-x{factor:g}", _ranks(factor), f"2-LR with {factor:g} times the target ranks")
            for factor in RANK_FACTORS
            if factor != 1
        ),
        Condition(
            "Bottle-LR",
            _comparator("bottleneck", one_place=True),
            "an explicit bottleneck in the place of 1-LR's branch",
        ),
        Condition("Bottle-2LR", _comparator("bottleneck"), "explicit bottlenecks in the places of 2-LR's branches",
                  ("bottleneck",)),
        Condition("SN", _comparator("spectral-norm"), "spectral normalisation", ("spectral-norm",)),
        Condition("SRN", _comparator("stable-rank"), "stable rank normalisation", ("stable-rank",)),
        Condition("SNIP", _comparator("snip", sparsity=0.7), "70 % of the weights pruned at initialisation", ("snip",)),
        Condition("Matryoshka", _comparator("matryoshka"), "nested classifiers on the first features", ("matryoshka",)),
    )
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------ bases, scales


@dataclasses.dataclass(frozen=True)
class Base:
    """What the runs of a setup are trained by.

    Args:
        name: of their folder.
        recipe: of the package, a 2-LR one.
        changes: keys of it that are set.
        fixture: the made-up data set that it takes unless the data is given, a name in `fixtures.LAYOUTS`.
        data: what it takes, by the name under which it can be given: "cifar10", "cifar100", "svhn".
        sizes: of Matryoshka's nested classifiers; empty takes the comparator's own.
    """

    name: str
    recipe: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    fixture: str | None = None
    data: str | None = None
    sizes: tuple[int, ...] = ()

    def make_recipe(self, condition: str, seed: int, data: str | None = None) -> Recipe:
        """The recipe of one run.

        Args:
            data: where the images are, if not where the recipe says.

        Raises:
            RecipeError: the recipe is not there, or this version does not know the condition.
        """
        values: Values = {**read_recipe(recipe_path(self.recipe)), **self.changes}
        branches = values["lowrank"]["branches"]
        if "2" in condition.partition("-ranks")[0] and isinstance(branches, Mapping) and len(branches) < 2:
            raise RecipeError(f"{self.recipe} has one branch, as the paper has it, so there is no {condition} of it")
        values = {**CONDITIONS[condition].change(values), "name": self.name, "seed": seed, "twin": False}
        own = [name for one in CONDITIONS[condition].recipes if (name := f"{self.recipe}-{one}") in recipe_names()]
        if own:
            values["comparator_args"] = read_recipe(recipe_path(own[0])).get("comparator_args", {})
        elif condition == "Matryoshka" and self.sizes:
            values["comparator_args"] = {"sizes": list(self.sizes)}
        return Recipe.from_dict(values | ({} if data is None else {"data": data}))


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        bases: setup -> what is trained in its place; a setup that is not there is not run.
        seeds: trained unless told otherwise.
        images, train_images: that are evaluated on, and that PCA and linear classifiers are fitted on.
        spectrum_limit: test images for the spectrum; None as `timm_lowrank.suites.Options`.
        notice: said in every file.
        quick: whether the longest attacks are cut short, and gradient masking is looked for in units of the pixel range
            alone: a grid of few radii, few steps, the quick diagnosis.
    """

    name: str
    bases: Mapping[str, tuple[Base, ...]]
    seeds: tuple[int, ...]
    images: int
    train_images: int
    notice: str
    quick: bool = False
    spectrum_limit: int | None = None


C10_R18, C10_R50 = "CIFAR-10, ResNet-18", "CIFAR-10, ResNet-50"
C100_R18, C100_R50 = "CIFAR-100 coarse, ResNet-18", "CIFAR-100 coarse, ResNet-50"
FINE_R50, C10_VGG = "CIFAR-100 fine, ResNet-50", "CIFAR-10, VGG-19"
SVHN_R18, SVHN_VGG = "SVHN, ResNet-18", "SVHN, VGG-19"
C10_VIT = "CIFAR-10, ViT (not in the paper)"
SETUPS = (C10_R18, C10_R50, C100_R18, C100_R50, FINE_R50, C10_VGG, SVHN_R18, SVHN_VGG, C10_VIT)

_SHORT = {
    "epochs": 6, "pretrain_epochs": 2, "warmup_epochs": 0, "batch_size": 32, "learning_rate": 0.1, "schedule": "cosine",
    "augment": "none", "twin": False, "spectrum_images": 200, "streaming": False, "workers": 0, "precision": "no",
}  # fmt: skip
_BRANCHES = {"branches": {"layer3": 6, LAST: 4}, "warmup_updates": 5}


def _small(name: str, channels: Sequence[int], fixture: str | None = None, **changes: Any) -> Base:
    """A narrow ResNet-10 for a second or two of training: on the digits, or on a fixture."""
    return Base(
        f"smoke-{name}", "digits", fixture=fixture, sizes=(2, 5, 10),
        changes={
            **_SHORT, "model": "resnet10_cifar", "lowrank": _BRANCHES,
            "model_args": {"channels": list(channels), **({"stem_stride": 2} if fixture else {})},
            "data_args": {} if fixture else {"test_limit": 200}, **changes,
        },
    )  # fmt: skip


def _small_vgg(name: str, fixture: str, **changes: Any) -> Base:
    """VGG-19 at a sixteenth of its width: 32 features where it has 512."""
    return Base(
        f"smoke-{name}", "digits", fixture=fixture,
        changes={
            **_SHORT, "model": "vgg19_bn_cifar", "model_args": {"width": 0.0625, "hidden_size": 32, "drop_rate": 0.0},
            "lowrank": {"branches": {"features.52": 6, LAST: 6}, "warmup_updates": 5}, "learning_rate": 0.02, **changes,
        },
    )  # fmt: skip


_WIDE, _NARROW = (8, 16, 16, 32), (8, 8, 16, 16)
_COARSE, _FINE = {"data_args": {"label_column": "coarse_label"}}, {"data_args": {"label_column": "fine_label"}}
_EXTRA = {"data_args": {"config": "cropped_digits", "extra": True}}
_SVHN_SMOKE = {
    SVHN_R18: (_small("svhn-resnet18", _NARROW, "svhn", **_EXTRA),),
    SVHN_VGG: (_small_vgg("svhn-vgg19", "svhn", **_EXTRA),),
}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            {
                C10_R18: (_small("cifar10-resnet18", _NARROW),),
                C10_R50: (_small("cifar10-resnet50", _WIDE),),
                C100_R18: (_small("cifar100-coarse-resnet18", _NARROW, "cifar100", **_COARSE),),
                C100_R50: (_small("cifar100-coarse-resnet50", _WIDE, "cifar100", **_COARSE),),
                FINE_R50: (_small("cifar100-fine-resnet50", _WIDE, "cifar100", **_FINE),),
                C10_VGG: (_small_vgg("cifar10-vgg19", "cifar10"),),
                **_SVHN_SMOKE,
            },
            seeds=(0,), images=40, train_images=300, quick=True,
            notice="smoke: networks of a few thousand weights, trained for seconds on handwritten digits (and digits "
            "drawn in the layout of CIFAR and SVHN). It shows that the command works and says nothing about the paper.",
        ),
        Scale(
            "fast",
            {
                C10_R18: (
                    Base("cifar10-resnet18-fast", "cifar10-resnet18-fast", data="cifar10"),
                    Base("cifar10-fast", "cifar10-fast", data="cifar10"),
                ),
                C10_R50: (Base("cifar10-fast", "cifar10-fast", data="cifar10"),),
                C100_R18: (Base("cifar100-coarse-fast", "cifar100-coarse-fast", data="cifar100"),),
                C100_R50: (Base("cifar100-coarse-fast", "cifar100-coarse-fast", data="cifar100"),),
                FINE_R50: (Base("cifar100-fine-fast", "cifar100-fine-fast", data="cifar100"),),
                C10_VGG: (Base("vgg19-fast", "vgg19-fast", data="cifar10"),),
                C10_VIT: (Base("cifar10-vit-tiny-fast", "cifar10-vit-tiny-fast", data="cifar10"),),
                **_SVHN_SMOKE,
            },
            seeds=(0, 1, 2), images=1000, train_images=5000,
            notice="fast: whole data sets, smaller networks and shorter schedules than the paper's; each line names "
            "the network that was trained in the place of the paper's. SVHN is a small fixture of its layout (digits "
            "of scikit-learn), unless its data was given: those lines say nothing about the paper.",
        ),
        Scale(
            "paper",
            {
                C10_R18: (Base("paper-cifar10-resnet18", "paper-cifar10-resnet18", data="cifar10"),),
                C10_R50: (Base("paper-cifar10-resnet50", "paper-cifar10-resnet50", data="cifar10"),),
                C100_R18: (Base("paper-cifar100-coarse-resnet18", "paper-cifar100-coarse-resnet18", data="cifar100"),),
                C100_R50: (Base("paper-cifar100-coarse-resnet50", "paper-cifar100-coarse-resnet50", data="cifar100"),),
                FINE_R50: (Base("paper-cifar100-fine-resnet50", "paper-cifar100-fine-resnet50", data="cifar100"),),
                C10_VGG: (Base("paper-cifar10-vgg19", "paper-cifar10-vgg19", data="cifar10"),),
                SVHN_R18: (Base("paper-svhn-resnet18", "paper-svhn-resnet18", data="svhn"),),
                SVHN_VGG: (Base("paper-svhn-vgg19", "paper-svhn-vgg19", data="svhn"),),
            },
            seeds=(0,), images=10_000, train_images=10_000,
            notice="paper: the paper's networks, data and schedule; what it does not say is ours (see the recipes).",
        ),
    )
}  # fmt: skip


def scale_of(name: str) -> Scale:
    """A scale by name. Raises an EvaluationError if there is none."""
    if name not in SCALES:
        raise EvaluationError(f"there is no scale {name!r}. {nearest(name, SCALES)}")
    return SCALES[name]
