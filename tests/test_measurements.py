"""Intervals, captures, variance per class, perturbations, layer cushion, plane: each beside a slow twin."""

import copy
import math

import pytest
import timm
import torch
from scipy.stats import binomtest
from torch import nn

import timm_lowrank
from timm_lowrank.errors import EvaluationError, EvaluationWarning
from timm_lowrank.evaluation import PixelModel
from timm_lowrank.evaluation.cushion import histograms, layer_cushion, operator_norm, weight_layers
from timm_lowrank.evaluation.representations import (
    activation_batches,
    activations,
    class_variance_ratio,
    cut_spectrum,
    fit_plane,
    preactivations,
    rho,
    stability,
)
from timm_lowrank.evaluation.results import wilson


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet10_cifar", num_classes=4, channels=(4, 4, 8, 8), in_chans=1).eval()


@pytest.fixture(scope="module")
def model(network):
    return PixelModel(network, mean=(0.5,), std=(0.25,))


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# Intervals


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 360), (360, 360), (3, 7), (148, 360)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_is_that_of_scipy(hits, count, confidence):
    expected = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    low, high = wilson(hits, count, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (low == 0.0, high == 1.0) == (hits == 0, hits == count), "exact at no and at all hits"


# Captures


def test_activations_are_those_of_the_layers(model, network, images):
    measured = activations(model, images, ["layer3", "pre_logits"], batch_size=2)
    normalised = (images - 0.5) / 0.25
    with torch.no_grad():
        expected = network.layer3(network.layer2(network.layer1(network.act1(network.bn1(network.conv1(normalised))))))
        features = network.forward_head(network.forward_features(normalised), pre_logits=True)
    assert torch.allclose(measured["layer3"], expected.flatten(1), atol=1e-6)
    assert torch.allclose(measured["pre_logits"], features, atol=1e-6)
    batches = list(activation_batches(model, images, ["layer3"], batch_size=2))
    assert [len(batch["layer3"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["layer3"] for batch in batches]), measured["layer3"])


def test_activations_leave_the_modes_alone_and_are_of_eval_mode(model, images):
    expected = activations(model, images, ["layer4"])["layer4"]
    model.train()
    model.network.bn1.eval()
    try:
        measured = activations(model, images, ["layer4"])["layer4"]
        assert torch.equal(measured, expected)
        assert not measured.requires_grad
        assert model.network.layer1.training
        assert not model.network.bn1.training
    finally:
        model.eval()


def test_activations_work_on_any_module(small_net, images):
    measured = activations(small_net(classes=3), images, ["hidden", "pre_logits"])
    assert torch.allclose(measured["hidden"].relu(), measured["pre_logits"])


def test_what_is_around_a_network_does_not_matter(network, model, images):
    wrapped = timm_lowrank.wrap(network, timm_lowrank.LowRankConfig(branches={"layer3": 2}), example_input=images)
    expected = activations(model, images, ["layer3"])["layer3"]
    compiled = torch.compile(model)  # never called, or the hooks would come too late
    for other in (PixelModel(wrapped, mean=(0.5,), std=(0.25,)), compiled):
        assert torch.equal(activations(other, images, ["layer3"])["layer3"], expected)
    assert torch.equal(layer_cushion(compiled, images, ["fc"])["fc"], layer_cushion(model, images, ["fc"])["fc"])


class Overwriting(nn.Module):
    """Its first layer is overwritten by an activation in place, and its second runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, images):
        return self.twice(self.twice(self.first(images.flatten(1)).relu_()))


# Variance per class


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(60, 7), (60, 40)])
def test_variance_ratio_of_a_class_is_that_of_its_singular_values(shape, centred):
    rows = torch.randn(shape, dtype=torch.float64) * torch.arange(1, shape[1] + 1) + 3
    labels = torch.arange(60) % 3
    measured = class_variance_ratio(rows.float(), labels, (1, 2, 100), centred=centred)
    assert list(measured) == [0, 1, 2]
    for label, ratios in measured.items():
        matrix = rows.float().double()[labels == label]
        energies = torch.linalg.svdvals(matrix - matrix.mean(0) if centred else matrix).square()
        expected = [float(energies[:rank].sum() / energies.sum()) for rank in (1, 2, 100)]
        assert ratios == pytest.approx(expected, abs=1e-12)


def test_the_inverse_stable_rank_counts_the_mean_as_a_direction():
    rows = torch.tensor([[10.0, 1.0], [10.0, -1.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    assert class_variance_ratio(rows, labels, centred=False)[0] == pytest.approx([200 / 202])
    assert class_variance_ratio(rows, labels)[0] == [1.0]


def test_a_class_without_variance_is_nan_and_named():
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0], [3.0, 5.0], [0.0, 0.0], [7.0, 2.0], [8.0, 9.0]])
    labels = torch.tensor([4, 1, 1, 2, 6, 6])
    with pytest.warns(EvaluationWarning, match=r"\[1, 2, 4\]"):
        measured = class_variance_ratio(rows, labels)
    assert list(measured) == [1, 2, 4, 6]
    assert [math.isnan(measured[label][0]) for label in measured] == [True, True, True, False]
    with pytest.warns(EvaluationWarning, match=r"\[2\] .* zero"):
        measured = class_variance_ratio(rows, labels, centred=False)
    assert measured[4] == measured[1] == [1.0]


# Perturbations


def test_rho_by_hand():
    images = torch.zeros(2, 1, 2, 2)
    images[0] = torch.tensor([[0.3, 0.4], [0.0, 0.0]])
    images[1] = 0.5
    moved = images.clone()
    moved[0, 0, 1, 1] = 0.25
    assert rho(images, moved).tolist() == pytest.approx([0.5, 0.0])
    assert rho(images, moved).dtype == torch.float64


def test_rho_of_an_image_of_zeros_is_not_defined():
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    with pytest.warns(EvaluationWarning, match="1 of 2 images"):
        measured = rho(images, (images + 0.5).clamp(0, 1))
    assert measured.isnan().tolist() == [True, False]


def test_stability_is_the_ratio_of_squared_norms_image_by_image(model, images):
    moved = (images + 0.1 * torch.randn(images.shape)).clamp(0, 1)
    layers = ["layer3", "pre_logits"]
    measured = stability(model, images, moved, layers, batch_size=2)
    clean, new = activations(model, images, layers), activations(model, moved, layers)
    for index in range(len(images)):
        delta = (moved[index].double() - images[index].double()).square().sum() / images[index].double().square().sum()
        assert measured.inputs[index].item() == pytest.approx(delta.item(), rel=1e-12)
        for layer in layers:
            one, two = clean[layer][index].double(), new[layer][index].double()
            expected = (two - one).square().sum() / one.square().sum()
            assert measured.layers[layer][index].item() == pytest.approx(expected.item(), rel=1e-4)
    alone = stability(model, images[3:4], moved[3:4], layers)
    assert alone.layers["layer3"].item() == pytest.approx(measured.layers["layer3"][3].item(), rel=1e-4)
    assert torch.allclose(rho(images, moved).square(), measured.inputs, rtol=1e-12)


def test_stability_of_a_linear_map_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Identity())
    net[1].weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    images = torch.tensor([[[[0.5, 0.25]]], [[[0.0, 0.5]]]])
    moved = images + torch.tensor([[[[0.25, 0.5]]], [[[0.0, 0.25]]]])
    with pytest.warns(EvaluationWarning, match="zeros at layer '1'"):
        measured = stability(net, images, moved, ["1"])
    assert measured.layers["1"][0].item() == 0.25
    assert measured.layers["1"][1].isnan()


# Cushion


def matrix_of(module, shape):
    """The matrix of a layer without its bias, column by column, float64."""
    plain = copy.deepcopy(module).double()
    columns = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        zero = plain(torch.zeros(1, *shape, dtype=torch.float64))
        return (plain(columns) - zero).flatten(1).T


CONVOLUTIONS = {
    "plain": ({}, (4, 6, 5)),
    "padded": ({"padding": 1}, (4, 6, 5)),
    "same": ({"padding": "same", "kernel_size": 4}, (4, 6, 5)),
    "strided": ({"padding": (2, 1), "stride": (2, 3)}, (4, 7, 6)),
    "dilated": ({"padding": 2, "dilation": (2, 1)}, (4, 6, 5)),
    "grouped": ({"padding": 1, "groups": 2}, (4, 5, 5)),
    "depthwise": ({"padding": 1, "groups": 4, "stride": 2}, (4, 5, 5)),
    "pointwise": ({"kernel_size": 1}, (4, 3, 3)),
    "larger than the image": ({"kernel_size": 5, "padding": 2}, (4, 2, 2)),
    "circular": ({"padding": 2, "padding_mode": "circular"}, (4, 3, 4)),
    "circular, wrapped": ({"kernel_size": 5, "padding": 2, "padding_mode": "circular"}, (4, 2, 3)),
    "reflected": ({"padding": 1, "padding_mode": "reflect", "stride": 2}, (4, 5, 4)),
    "replicated": ({"padding": 2, "kernel_size": 5, "padding_mode": "replicate"}, (4, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_norm_and_cushion_of_a_convolution_are_those_of_its_matrix(name):
    options, shape = CONVOLUTIONS[name]
    module = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), module, nn.Identity())
    images = torch.rand(3, 1, *shape[1:])
    matrix = matrix_of(module, shape)
    assert operator_norm(module, shape) == pytest.approx(matrix.norm().item(), rel=1e-12)
    with torch.no_grad():
        inputs = net[1](net[0](images)).flatten(1).double()
    ratio = (inputs @ matrix.T).norm(dim=1) / inputs.norm(dim=1)
    measured = layer_cushion(net, images, ["2"], batch_size=2)["2"]
    assert torch.allclose(measured, ratio / matrix.norm(), rtol=1e-5)
    assert ((measured > 0) & (measured <= 1)).all()
    by_kernel = layer_cushion(net, images, ["2"], norm="kernel")["2"]
    assert torch.allclose(by_kernel, ratio / module.weight.detach().double().norm(), rtol=1e-5)


def test_the_cushion_of_a_linear_layer_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Identity())
    net[1].weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    images = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.5]]], [[[0.0, 0.0]]]])
    measured = layer_cushion(net, images)["1"]
    assert measured[:2].tolist() == pytest.approx([0.6, 0.8])  # the bias is not part of it
    assert measured[2].isnan()
    assert layer_cushion(net, images[1:2])["1"].tolist() == pytest.approx([0.8])


def test_a_linear_layer_over_tokens_is_a_block_diagonal_matrix():
    module = nn.Linear(3, 2)
    assert operator_norm(module, (5, 3)) == pytest.approx(matrix_of(module, (5, 3)).norm().item(), rel=1e-12)


def test_all_layers_of_a_network_have_a_cushion_and_none_keeps_a_hook(model, network, images):
    measured = layer_cushion(model, images)
    assert list(measured) == weight_layers(model)
    assert {"conv1", "layer3.0.conv1", "layer4.0.downsample.0", "fc"} <= measured.keys()
    assert all(value.shape == (5,) and ((value > 0) & (value <= 1)).all() for value in measured.values())
    assert not any(module._forward_pre_hooks for module in network.modules())
    chunks = [layer_cushion(model, images[:2]), layer_cushion(model, images[2:])]
    for layer, value in measured.items():
        assert torch.allclose(torch.cat([chunk[layer] for chunk in chunks]), value, rtol=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, images):
        return self._conv_forward(images, self.weight - self.weight.mean(), self.bias)


def test_a_layer_without_a_cushion_is_not_among_those_of_a_network():
    assert weight_layers(nn.Sequential(Standardised(1, 1, 3), nn.Flatten())) == []
    assert list(layer_cushion(Overwriting(), torch.rand(2, 1, 2, 2))) == ["first"]


def test_histograms_share_their_bins():
    measured = histograms({"a": torch.tensor([0.0, 0.1, 1.0, math.nan]), "b": torch.tensor([0.5, 0.6])}, bins=4)
    assert measured.edges == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert measured.counts == {"a": [2, 0, 0, 1], "b": [0, 0, 2, 0]}
    assert sum(histograms({"a": torch.tensor([0.3, 0.3])}, bins=3).counts["a"]) == 2


# The plane


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_the_plane_is_that_of_the_singular_vectors(shape):
    rows = torch.randn(shape, dtype=torch.float64) * torch.linspace(3, 1, shape[1], dtype=torch.float64)
    plane = fit_plane(rows)
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    for index in range(2):
        direction = plane.basis[:, index]
        assert abs(direction @ vectors[index]).item() == pytest.approx(1, abs=1e-10)
        assert direction[direction.abs().argmax()] > 0
        assert plane.shares[index] == pytest.approx(float(values[index] ** 2 / (values**2).sum()), rel=1e-10)
    assert torch.allclose(plane.project(rows), centred @ plane.basis)
    assert torch.allclose(fit_plane(-rows).basis, plane.basis, atol=1e-8)  # signs do not follow the data's


def test_other_rows_are_shown_in_the_same_plane():
    plane = fit_plane(torch.tensor([[0.0, 0.0, 5.0], [2.0, 0.0, 5.0], [1.0, 0.5, 5.0], [1.0, -0.5, 5.0]]))
    assert plane.project(torch.tensor([[3.0, 1.0, 7.0]])).tolist() == [pytest.approx([2.0, 1.0])]


def test_a_line_has_no_second_direction():
    steps = torch.arange(5.0)[:, None]
    for rows in (steps * torch.tensor([[3.0, -4.0]]), steps * torch.ones(1, 9)):
        plane = fit_plane(rows)
        assert plane.shares == pytest.approx((1.0, 0.0), abs=1e-12)
        assert plane.project(rows)[:, 1].abs().max() < 1e-6


# What cannot be measured

FEW, SMALL = torch.rand(3, 2), torch.rand(2, 1, 2, 2)


def variance_of(rows, labels, **options):
    return class_variance_ratio(rows, torch.tensor(labels, dtype=torch.int64), **options)


WRONG_CALLS = {
    "interval of nothing": (lambda m, x: wilson(0, 0), "between"),
    "interval, fewer than no hits": (lambda m, x: wilson(-1, 5), "between"),
    "interval, more hits than images": (lambda m, x: wilson(6, 5), "between"),
    "interval, sure": (lambda m, x: wilson(1, 5, 1.0), "between"),
    "interval, unsure": (lambda m, x: wilson(1, 5, 0.0), "between"),
    "layer": (lambda m, x: activations(m, x, ["layer33"]), "Did you mean: .*layer3"),
    "no layer": (lambda m, x: activations(m, x, []), "at least one layer"),
    "layer, no list": (lambda m, x: activations(m, x, "layer3"), "must be a list"),
    "no images": (lambda m, x: activations(m, x[:0], ["layer3"]), "no images"),
    "images, dtype": (lambda m, x: activations(m, (x * 255).byte(), ["layer3"]), "floating point"),
    "batch_size": (lambda m, x: activations(m, x, ["layer3"], batch_size=0), "batch_size"),
    "overwritten": (lambda m, x: activations(Overwriting(), SMALL, ["first"]), "in place"),
    "run twice": (lambda m, x: activations(Overwriting(), SMALL, ["twice"]), "2 times"),
    "variance, labels": (lambda m, x: variance_of(FEW, [0, 0]), "as many labels"),
    "variance of nothing": (lambda m, x: variance_of(FEW[:0], []), "n >= 1"),
    "variance, nan": (lambda m, x: variance_of(FEW * math.nan, [1] * 3, centred=False), r"class 1: .*NaN"),
    "variance, ranks": (lambda m, x: variance_of(FEW, [0, 0, 0], ranks=(0,)), "ranks"),
    "rho, shapes": (lambda m, x: rho(x, x[1:]), "one shape"),
    "rho of nothing": (lambda m, x: rho(x[:0], x[:0]), "no images"),
    "cushion, layer": (lambda m, x: layer_cushion(m, x, ["conv11"]), r"Did you mean: .*conv1"),
    "cushion, kind of layer": (lambda m, x: layer_cushion(m, x, ["bn1"]), "BatchNorm"),
    "cushion, norm": (lambda m, x: layer_cushion(m, x, norm="frobenius"), "no norm 'frobenius'"),
    "cushion, forward": (lambda m, x: layer_cushion(nn.Sequential(Standardised(1, 1, 3)), x, ["0"]), "Standardised"),
    "cushion, run twice": (lambda m, x: layer_cushion(Overwriting(), SMALL, ["twice"]), "'twice' ran 2 times"),
    "histogram": (lambda m, x: histograms({"a": torch.tensor([math.nan])}), "one value"),
    "plane, one image": (lambda m, x: fit_plane(torch.rand(1, 5)), "a plane needs"),
    "plane, one feature": (lambda m, x: fit_plane(torch.rand(5, 1)), "a plane needs"),
    "plane, no variance": (lambda m, x: fit_plane(torch.ones(5, 3)), "a plane needs"),
    "plane, nan": (lambda m, x: fit_plane(torch.full((4, 3), math.nan)), "a plane needs"),
    "plane, features": (lambda m, x: fit_plane(torch.rand(5, 3)).project(torch.rand(5, 4)), "3 features"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_what_cannot_be_measured_is_named(name, model, images):
    call, message = WRONG_CALLS[name]
    with pytest.raises(EvaluationError, match=message):
        call(model, images)


# Low-rank pre-activations


def test_preactivations_are_what_the_last_function_of_a_layer_takes(model, network, images):
    values, function = preactivations(model, images, "layer3", batch_size=2)
    assert function is network.layer3[-1].act2
    assert torch.equal(values.relu(), activations(model, images, ["layer3"])["layer3"])
    assert (values < 0).any()
    assert not any(module._forward_pre_hooks for module in network.modules())
    for layer in ("pre_logits", "layer3.0.conv1"):
        with pytest.raises(EvaluationError, match="does not end in an elementwise activation function"):
            preactivations(model, images, layer)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_cut_pre_activations_of_low_rank_give_activations_of_more(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spectrum = cut_spectrum(values, torch.relu, 3)
    u, s, v = torch.linalg.svd(values.double(), full_matrices=False)  # the slow twin
    behind = torch.linalg.svd(((u[:, :3] * s[:3]) @ v[:3]).relu()).S
    assert torch.allclose(spectrum.singular_values, behind, atol=1e-10)
    assert spectrum.rank == 12
    assert spectrum.share == pytest.approx(float(behind[:3].square().sum() / behind.square().sum()), abs=1e-12)
    assert cut_spectrum(values, lambda matrix: matrix, 3).rank == 3
    for rank in (0, 12):
        with pytest.raises(EvaluationError, match="a rank of 1 to 11"):
            cut_spectrum(values, torch.relu, rank)
    with pytest.raises(EvaluationError, match="not finite"):
        cut_spectrum(values / 0, torch.relu, 3)


def test_the_papers_counter_example_to_low_rank_pre_activations():
    matrix = torch.tensor([[1.0, -1, 1], [-1, 1, -1]])
    assert torch.linalg.matrix_rank(matrix) == 1
    assert cut_spectrum(matrix, torch.relu, 1).rank == 2
