"""Comparators: each against its slow definition in float64, in a loop, and as a recipe from start to export."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import forked
import pytest
import timm
import torch
from pictures import RUNS, undrawn
from runs import assert_same_run
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional

import timm_lowrank as tlr
from timm_lowrank import cli, comparators
from timm_lowrank.comparators import Bottleneck, SpectralNormalized, StableRankNormalized, Start
from timm_lowrank.core.views import View
from timm_lowrank.data import load_images
from timm_lowrank.errors import CheckpointError, RecipeError, RunError
from timm_lowrank.suites.networks import load_network
from timm_lowrank.training import Recipe, Run, load_recipe, recipe_names, train
from timm_lowrank.training.state import build


def batch(digits, count=32):
    images, labels = digits
    return images[:count].double(), labels[:count]


# ------------------------------------------------------------------------------------------------- slow definitions


@pytest.mark.parametrize(
    ("shape", "view", "width"),
    [
        ((6, 3, 2, 2), View(), 12),
        ((6, 5), View("token"), 5),
        ((6, 4, 5), View("token", -1), 5),
        ((6, 5, 2, 3), View("token", 1), 5),
    ],
    ids=["feature map", "features", "tokens", "positions"],
)
def test_a_bottleneck_multiplies_every_sample_by_w(shape, view, width):
    layer = Bottleneck(width, 2, view).double()
    factor, activations = layer.factor.detach(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    weight = (factor * torch.tensor([2.0, 3.0])) @ (factor * torch.tensor([2.0, 3.0])).T
    layer.factor.data *= torch.tensor([2.0, 3.0])
    rows = torch.stack([weight @ row for row in view.rows(activations)])
    output = layer(activations)
    assert output.shape == activations.shape
    torch.testing.assert_close(view.rows(output), rows)
    assert torch.linalg.matrix_rank(view.rows(output)) <= 2


def slow_spectral(weight):
    return weight / torch.linalg.svdvals(weight.flatten(1))[0]


def slow_stable_rank(weight, stable_rank):
    left, values, right = (one.detach() for one in torch.linalg.svd(weight.flatten(1), full_matrices=False))
    leading = torch.outer(left[:, 0], right[0])
    if stable_rank == 1:  # nothing else is left to learn by
        turned = (weight.flatten(1) @ right[0], weight.flatten(1).T @ left[:, 0])
        return torch.outer(*(one / one.norm() for one in turned)).view(weight.shape)
    values = torch.linalg.svdvals(weight.flatten(1))
    rest = weight.flatten(1) / values[0] - leading
    if rest.norm() ** 2 > stable_rank - 1:
        rest = rest * (stable_rank - 1) ** 0.5 / rest.norm()
    return (leading + rest).view(weight.shape)


@pytest.mark.parametrize("stable_rank", [None, 1.0, 1.8, 5.0])
@pytest.mark.parametrize("shape", [(5, 7), (6, 2, 2, 2)])
def test_a_normalised_weight_and_its_gradient(shape, stable_rank):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    fast = SpectralNormalized(weight, 200) if stable_rank is None else StableRankNormalized(weight, stable_rank, 200)
    slow = slow_spectral(weight) if stable_rank is None else slow_stable_rank(weight, stable_rank)
    normalized, towards = fast(weight), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(normalized, slow)
    torch.testing.assert_close(*(torch.autograd.grad((one * towards).sum(), weight)[0] for one in (normalized, slow)))
    values = torch.linalg.svdvals(normalized.detach().flatten(1))
    assert values[0] == pytest.approx(1)
    if stable_rank is not None:
        before = torch.linalg.svdvals(weight.detach().flatten(1))
        stable = float(before.square().sum() / before[0].square())
        assert values.square().sum() == pytest.approx(min(stable, stable_rank))


def test_a_classifier_of_two_classes_learns_under_stable_rank_normalisation():
    """A share of its two rows is less than one: its weight is of rank one, and turns."""
    torch.manual_seed(0)
    linear = comparators.stable_rank_normalize(nn.Sequential(nn.Linear(8, 2)))[0]
    rows = torch.randn(64, 8)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for _ in range(200):
        loss = nn.functional.cross_entropy(linear(rows), (rows[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, values, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    assert values.tolist() == pytest.approx([1, 0], abs=1e-3)
    assert abs(right[0, 0]) > 0.9, "it reads the feature that tells the classes"


@pytest.mark.parametrize("comparator", [comparators.SpectralNorm(), comparators.StableRank(share=0.5)])
def test_an_average_of_normalised_weights_is_normalised_once_it_settles(comparator, digits, small_net):
    images, _ = digits
    network, rank = small_net(), getattr(comparator, "share", 1)
    comparators.stable_rank_normalize(network, rank) if rank < 1 else comparators.spectral_normalize(network)
    average = ModelEmaV3(network, decay=0.5)
    for _ in range(3):
        for parameter in network.parameters():
            parameter.data += 0.5 * parameter.std() * torch.randn_like(parameter)
        network.train()(images[:8])
        average.update(network)
    comparator.settle(average.module.eval())
    norms = [
        torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        for layer in comparators._weighted_layers(average.module).values()
    ]
    assert norms == pytest.approx([1] * len(norms), abs=1e-3)


def test_normalisation_is_of_the_precision_of_the_weight_under_autocast():
    linear = comparators.stable_rank_normalize(nn.Sequential(nn.Linear(8, 6)))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.weight.dtype == torch.float32
        assert linear(torch.ones(2, 8)).dtype == torch.bfloat16


def test_snip_keeps_the_largest_products_of_weight_and_gradient(digits, small_net):
    images, labels = batch(digits)
    network = small_net().double()
    slow = copy.deepcopy(network)
    functional.cross_entropy(slow(images), labels).backward()
    names = ["stem.0", "body.0", "hidden", "classifier"]
    sensitivity = {
        (name, position): abs(float(slow.get_submodule(name).weight.detach().flatten()[position] * gradient))
        for name in names
        for position, gradient in enumerate(slow.get_submodule(name).weight.grad.flatten())
    }
    best = set(sorted(sensitivity, key=lambda where: -sensitivity[where])[: round(0.3 * len(sensitivity))])
    comparators.snip(network, images, labels, sparsity=0.7)
    for name in names:
        kept, original = network.get_submodule(name).weight != 0, slow.get_submodule(name).weight
        assert {(name, int(at)) for at in kept.flatten().nonzero()} == {where for where in best if where[0] == name}
        assert torch.equal(network.get_submodule(name).weight, original * kept)
    # The masks stay: what is zero gets no gradient.
    functional.cross_entropy(network(images), labels).backward()
    hidden = network.hidden
    assert not hidden.parametrizations.weight.original.grad[hidden.weight == 0].any()


def test_snip_leaves_to_the_training_what_its_dropout_draws(digits, small_net):
    images, labels = batch(digits)
    network = small_net().double()
    network.hidden = nn.Sequential(nn.Dropout(0.5), network.hidden)
    before = torch.get_rng_state()
    comparators.snip(network, images, labels)
    assert torch.equal(torch.get_rng_state(), before)


def test_nested_classifiers_of_a_network_that_has_none(digits, small_net):
    images, labels = batch(digits)
    network = small_net().double().train()
    criterion = comparators.NestedLoss(functional.cross_entropy, network)
    with pytest.raises(ValueError, match=r"the SmallNet has no nested classifiers: give it some with matryoshka"):
        criterion(network(images), labels)


def test_snip_takes_the_mean_of_the_gradients_of_all_batches_and_processes(digits, small_net):
    images, labels = batch(digits, 64)
    whole = small_net().double()
    parted = copy.deepcopy(whole)
    quarters = list(zip(images.chunk(4), labels.chunk(4), strict=True))
    # Another process has the second half, and its gradients come in the order of the layers.
    theirs = iter(comparators._weight_gradients(whole, quarters[2:]).values())
    start = Start(images, "1-LR", lambda count: quarters[:count], lambda mine: (mine + next(theirs)) / 2)
    comparators.comparator_from("snip", {"sparsity": 0.5, "batches": 2}).attach(parted, start)
    comparators.snip(whole, images, labels, sparsity=0.5)
    assert [name for name, one in whole.state_dict().items() if not torch.equal(one, parted.state_dict()[name])] == []


def test_snip_sees_through_norms_that_start_at_zero_and_leaves_the_network_as_it_was(digits):
    images, labels = digits[0][:64], digits[1][:64]
    network = timm.create_model("resnet10_cifar", in_chans=1, channels=(8, 8, 16, 16))
    before = copy.deepcopy(network.state_dict())
    assert not before["layer1.0.bn2.weight"].any()
    comparators.snip(network, images, labels, sparsity=0.7)
    after = comparators.fold(network).state_dict()
    assert after.keys() == before.keys()
    pruned = [name for name in after if after[name].dim() > 1]
    assert all(0 < (after[name] != 0).float().mean() < 1 for name in pruned if name != "conv1.weight")
    assert [name for name in after if name not in pruned and not torch.equal(after[name], before[name])] == []
    total = sum(before[name].numel() for name in pruned)
    assert sum(int((after[name] != 0).sum()) for name in pruned) == round(0.3 * total)


def test_nested_classifiers_see_the_first_features(digits, small_net):
    images, labels = batch(digits)
    network = small_net().double()
    plain = copy.deepcopy(network)
    comparators.matryoshka(network, [2, 5, 20], example_input=images)
    criterion = comparators.NestedLoss(functional.cross_entropy, network)
    assert list(criterion.parameters()) == []
    logits = network(images)
    assert torch.equal(logits, plain(images))
    features = plain.act(plain.hidden(plain.body(plain.stem(images)).flatten(1)))
    heads = network.classifier.nested
    slow = [features[:, :size] @ head.weight.T + head.bias for size, head in zip([2, 5, 20], heads, strict=True)]
    wanted = sum(-one.log_softmax(1)[torch.arange(len(labels)), labels].mean() for one in [*slow, logits])
    loss = criterion(logits, labels)
    assert loss.item() == pytest.approx(wanted.item())
    with pytest.raises(RuntimeError, match="needs a forward pass in train mode"):
        criterion(logits, labels)
    network(images)
    copy.deepcopy(network)  # with logits that wait
    network.eval()
    assert criterion(network(images), labels).item() == pytest.approx(functional.cross_entropy(logits, labels).item())
    assert torch.equal(comparators.fold(network)(images), plain(images))
    assert network.state_dict().keys() == plain.state_dict().keys()


# ------------------------------------------------------------------------------------------------ a loop of one's own

ONES_OWN = {
    "bottleneck": lambda net, x, y: comparators.bottleneck(net, {"body": 5, "pre_logits": 3}, example_input=x),
    "spectral_normalize": lambda net, x, y: comparators.spectral_normalize(net, iterations=25),
    "stable_rank_normalize": lambda net, x, y: comparators.stable_rank_normalize(net, 0.3, iterations=25),
    "snip": lambda net, x, y: comparators.snip(net, x, y, 0.5),
    "matryoshka": lambda net, x, y: comparators.matryoshka(net, [2, 5], example_input=x),
}


@pytest.mark.parametrize("name", ONES_OWN)
def test_training_accumulating_copying_and_folding(name, digits, small_net):
    images, labels = batch(digits, 64)
    network = ONES_OWN[name](small_net().double(), images, labels)
    criterion = functional.cross_entropy
    if name == "matryoshka":
        criterion = comparators.NestedLoss(criterion, network)

    def gradients(parts):
        network.zero_grad()
        for some, theirs in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (criterion(network(some), theirs) / parts).backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    for _ in range(30):  # to the exact singular vectors, which parts of a batch would otherwise see one after the other
        network(images)
    torch.testing.assert_close(gradients(4), gradients(1), rtol=1e-6, atol=1e-9)

    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    network.eval()
    twin = copy.deepcopy(network)
    logits = network(images)
    torch.testing.assert_close(comparators.fold(network)(images), logits, rtol=1e-6, atol=1e-9)
    plain = set(small_net().state_dict())
    assert {key for key in network.state_dict() if not key.startswith("bottlenecks.")} == plain
    for parameter in network.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(images), logits)  # a copy shares nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net, x, y: comparators.bottleneck(net, {"body": 500}, example_input=x), "rank 500 is larger"),
        (lambda net, x, y: comparators.bottleneck(net, {"bodi": 5}, example_input=x), "no layer 'bodi'.*body"),
        (
            lambda net, x, y: comparators.bottleneck(net, {"body": {"rank": 5, "view": "pool"}}, example_input=x),
            'cannot replace the view "pool"',
        ),
        (
            lambda net, x, y: comparators.bottleneck(
                comparators.bottleneck(net, {"body": 5}, example_input=x), {"body": 5}, example_input=x
            ),
            "has bottlenecks already",
        ),
        (lambda net, x, y: comparators.snip(net, x, y, 1.0), "sparsity=1.0 must lie between"),
        (lambda net, x, y: comparators.snip(net, x, y, 0.9999), "sparsity=0.9999 leaves .* without any weight"),
        (lambda net, x, y: comparators.snip(net, x * float("nan"), y), "get no finite gradient"),
        (lambda net, x, y: comparators.stable_rank_normalize(net, 1.5), "share=1.5 must be > 0 and <= 1"),
        (lambda net, x, y: comparators.matryoshka(net, [5, 32], example_input=x), "below the 32 features"),
        (lambda net, x, y: comparators.matryoshka(net, [5, 2], example_input=x), "must be increasing"),
    ],
)
def test_what_a_network_does_not_allow_is_one_clear_error(change, message, digits, small_net):
    with pytest.raises(ValueError, match=message):
        change(small_net().double(), *batch(digits))


def test_a_zero_weight_has_no_norm():
    network = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(network[0].weight)
    with pytest.raises(ValueError, match="the weights of 0 are all zero"):
        comparators.spectral_normalize(network)


# ------------------------------------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize(
    ("name", "arguments", "branches", "size"),
    [
        ("resnet10_cifar", {"channels": (8, 8, 16, 16)}, {"layer3": 6, "pre_logits": 4}, 24),
        ("vit_tiny_patch16_224", {"img_size": 24, "patch_size": 8, "depth": 2, "embed_dim": 24}, "2-LR", 24),
        ("vgg19_bn_cifar", {"width": 0.125, "hidden_size": 48}, {"features.52": 20, "pre_logits": 20}, 32),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is larger than the .*capped")
def test_a_network_with_bottlenecks_is_saved_and_loaded(tmp_path, name, arguments, branches, size):
    images = torch.randn(4, 3, size, size)
    network = timm.create_model(name, num_classes=7, **arguments)
    network = comparators.bottleneck(network, branches, example_input=images).eval()
    network.bottlenecks["pre_logits"].factor.data += 0.1
    tlr.save_pretrained(network, tmp_path / "saved")
    for loaded in (
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True),
        tlr.from_pretrained(tmp_path / "saved", lowrank=False),
    ):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(images), network(images))
    assert comparators.architecture_of(loaded) == name
    assert load_network(str(tmp_path / "saved")).info.comparator == "Bottle-LR"
    # It is what is measured: the layer behind the bottleneck has its rank.
    with (
        torch.no_grad(),
        tlr.wrap(loaded, tlr.LowRankConfig(branches=branches), example_input=images).capture() as seen,
    ):
        loaded(torch.randn(30, 3, size, size))
    assert torch.linalg.matrix_rank(seen["pre_logits"], rtol=1e-4) <= network.bottlenecks["pre_logits"].factor.shape[1]


@pytest.mark.parametrize("change", [comparators.spectral_normalize, lambda net: comparators.matryoshka(net, [2, 5])])
def test_a_network_is_saved_when_it_is_folded(tmp_path, change):
    network = change(timm.create_model("resnet10_cifar", channels=(8, 8, 16, 16)))
    with pytest.raises(CheckpointError, match=r"(conv1|fc) has normalised .*comparators.fold\(network\)"):
        tlr.save_pretrained(network, tmp_path / "saved")
    tlr.save_pretrained(comparators.fold(network), tmp_path / "saved")
    loaded, images = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network(images))


# ------------------------------------------------------------------------------------------------------------ recipes

SMALL = {
    "name": "small",
    "model": "resnet10_cifar",
    "model_args": {"channels": [8, 8, 16, 16]},
    "data_args": {"train_limit": 200, "test_limit": 100},
    "lowrank": {"branches": {"layer3": 6, "pre_logits": 4}},
    "epochs": 2,
    "batch_size": 40,
    "gradient_accumulation": 2,
    "learning_rate": 0.05,
    "augment": "crop",
}
ARGUMENTS = {"matryoshka": {"sizes": [2, 5]}, "stable-rank": {"share": 0.4}, "snip": {"sparsity": 0.6, "batches": 2}}


@pytest.fixture
def undrawn_pictures(monkeypatch):
    """Those of `plain` are drawn."""
    monkeypatch.setattr(RUNS, undrawn)


def recipe(**values) -> Recipe:
    return Recipe.from_dict({**SMALL, **values})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run of the plain network."""
    output = tmp_path_factory.mktemp("plain") / "run"
    train(recipe(lowrank={**SMALL["lowrank"], "enabled": False}, ema_decay=0.5), output)
    return output


def normalised(run: Path) -> torch.Tensor:
    """The test images as the network of a run takes them."""
    cfg = json.loads((run / "model" / "config.json").read_text())["pretrained_cfg"]
    return (load_images(**SMALL["data_args"]).test_images.float() / 255 - cfg["mean"][0]) / cfg["std"][0]


@pytest.mark.usefixtures("fresh_accelerate", "undrawn_pictures")
@pytest.mark.parametrize("name", comparators.COMPARATORS)
def test_a_recipe_from_start_to_export_and_resumed(name, plain, tmp_path):
    made = recipe(comparator=name, comparator_args=ARGUMENTS.get(name, {}), twin=str(plain), ema_decay=0.5)
    summary = train(made, tmp_path / "whole")
    assert Run.open(tmp_path / "whole").summary == summary
    assert (summary.lowrank, summary.comparator.name, summary.twin.comparator) == (False, name, None)
    assert summary.kind == summary.comparator.title == load_network(str(tmp_path / "whole")).title
    figures = summary.comparator.figures
    # The average that was tested after the last epoch is the network that is exported.
    assert Run.open(tmp_path / "whole").metrics()[-1].ema_test_accuracy == pytest.approx(summary.clean_accuracy)
    if name == "bottleneck":
        assert all(
            branch.effective_rank <= SMALL["lowrank"]["branches"][layer] for layer, branch in summary.branches.items()
        )
    if name == "snip":
        assert figures["sparsity"] == pytest.approx(0.6, abs=1e-3)
    if name == "matryoshka":
        assert list(figures) == ["accuracy_of_first_2", "accuracy_of_first_5"]
    if name in ("spectral-norm", "stable-rank"):
        assert figures["largest_spectral_norm"] == pytest.approx(1, abs=1e-5)
    if name == "stable-rank":
        assert figures["largest_stable_rank_share"] == pytest.approx(0.4, abs=1e-3)
    exported = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    twin = load_file(plain / "model" / "model.safetensors")
    assert all(not torch.equal(exported[key], twin[key]) for key in twin if key.endswith("conv1.weight"))
    added = exported.keys() - twin.keys()
    layers = SMALL["lowrank"]["branches"] if name == "bottleneck" else ()
    assert added == {f"bottlenecks.{layer}.factor" for layer in layers}

    # From the checkpoint of the first epoch it becomes the same run.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "epoch_0002")
    assert train(made, tmp_path / "resumed", resume=True).comparator == summary.comparator
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")

    # What was measured is what was exported.
    with torch.no_grad():
        predicted = tlr.from_pretrained(tmp_path / "whole", lowrank=False)(normalised(tmp_path / "whole")).argmax(1)
    accuracy = (predicted == load_images(**SMALL["data_args"]).test_labels).float().mean().item()
    assert accuracy == pytest.approx(summary.clean_accuracy, abs=1e-6)


@pytest.mark.usefixtures("fresh_accelerate", "undrawn_pictures")
def test_bottlenecks_fine_tune_a_trained_network_and_load_in_another_process(plain, tmp_path):
    tuned = recipe(comparator="bottleneck", comparator_args={"branches": {"pre_logits": 4}}, init_from=str(plain))
    state = build(tuned, load_images(**SMALL["data_args"]), tmp_path / "nowhere")
    trained = load_file(plain / "model" / "model.safetensors")
    begun = state.lowrank.backbone.state_dict()
    assert [key for key in trained if not torch.equal(trained[key], begun[key])] == []
    assert begun.keys() - trained.keys() == {"bottlenecks.pre_logits.factor"}
    summary = train(tuned, tmp_path / "tuned")
    assert cli.main(["push", str(tmp_path / "tuned"), "user/name", "--dry-run", str(tmp_path / "hub")]) == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "It was trained as Bottle-LR (`bottleneck`), in the place of low-rank branches" in card
    assert str(plain) not in (tmp_path / "hub" / "recipe.yaml").read_text()
    assert summary.branches["pre_logits"].effective_rank <= 4 < summary.branches["layer3"].effective_rank
    with torch.no_grad():
        images = normalised(tmp_path / "tuned")
        logits = tlr.from_pretrained(tmp_path / "tuned", lowrank=False)(images)
    save_file({"images": images, "logits": logits}, tmp_path / "seen.safetensors")
    log = tmp_path / "log"
    loaded = forked.start(differs, tmp_path / "tuned" / "model", tmp_path / "seen.safetensors", log=log)
    forked.finish(loaded, logs=[log])


def differs(saved: Path, seen: Path) -> bool:
    """Whether what timm loads gives anything else than what was seen; as an exit code, 0 says no."""
    network, expected = timm.create_model(f"local-dir:{saved}", pretrained=True).eval(), load_file(seen)
    return not torch.equal(network(expected["images"]), expected["logits"])


AT_ONCE = {"lowrank": {"branches": {"layer3": 6}, "warmup_updates": 1}}  # the penalty has weight in so few steps


@pytest.mark.usefixtures("fresh_accelerate", "undrawn_pictures")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_from": "RUN", "model_args": {}, **AT_ONCE}, "holds the weights of another network"),
        ({"init_from": "runs/none", **AT_ONCE}, "init_from='runs/none': .*does not exist: .*timm-lowrank pull"),
        ({"comparator": "bottleneck", "lowrank": {"branches": {"layer9": 3}}}, "comparator='bottleneck' .*'layer9'"),
        ({"comparator": "matryoshka"}, "comparator='matryoshka' .*below the 16 features"),
    ],
)
def test_what_only_the_network_can_tell_is_found_before_anything_is_written(plain, tmp_path, values, message):
    if values.get("init_from") == "RUN":
        values = {**values, "init_from": str(plain)}
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        train(recipe(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).comparator])
def test_the_comparator_of_a_named_recipe_fits_its_network(name):
    made = load_recipe(name)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    network = timm.create_model(made.model, num_classes=10, **made.model_args).train()
    start = Start(images, made.lowrank_config().branches, lambda count: [(images, labels)] * count)
    made.compared().attach(network, start)
    loss = functional.cross_entropy(network(images), labels)
    extra = made.compared().extra_loss(network, labels)
    (loss if extra is None else loss + extra).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.usefixtures("fresh_accelerate", "undrawn_pictures")
def test_a_comparator_is_no_plain_twin(plain, tmp_path):
    train(recipe(comparator="snip", epochs=1), tmp_path / "pruned")
    with pytest.raises(RunError, match="is not a plain run"):
        train(recipe(twin=str(tmp_path / "pruned")), tmp_path / "run")
