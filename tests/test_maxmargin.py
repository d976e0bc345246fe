"""Max-margin classifiers on representations, and the hybrid models made of them."""

import copy
import sys
from functools import partial

import pytest
import timm
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import timm_lowrank  # noqa: F401  registers resnet10_cifar
from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation import (
    HybridModel,
    PixelModel,
    activations,
    attacks,
    linear_accuracy,
    max_margin_classifiers,
    parameters_behind,
)
from timm_lowrank.evaluation.maxmargin import judge_hybrid


@pytest.fixture(scope="module")
def rows():
    """Four classes in 24 dimensions that overlap a little, (240, 24), a constant feature among them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    centres = torch.randn(4, 24, generator=generator)
    features = 1.2 * centres[labels] + torch.randn(240, 24, generator=generator)
    features[:, 5] = 0.7
    return features * torch.linspace(0.1, 10, 24) + 2, labels


def scores_of_pipeline(count, train, labels, test):
    """By the recipe of the paper, written with scikit-learn alone."""
    machine = SGDClassifier(loss="hinge", alpha=0.01, random_state=0)
    projection = [] if count is None else [PCA(count, svd_solver="full")]
    twin = make_pipeline(StandardScaler(), *projection, machine).fit(train.double().numpy(), labels.numpy())
    return torch.from_numpy(twin.decision_function(test.double().numpy()))


@pytest.mark.parametrize("count", [2, 10, None])
def test_the_classifier_is_that_of_a_scikit_learn_pipeline(rows, count):
    train, labels = rows
    (classifier,) = max_margin_classifiers(train, labels, [count])
    assert classifier.dimensions == count
    expected = scores_of_pipeline(count, train, labels, train)
    same = classifier.predict(train) == expected.argmax(1)
    # The sign of a direction is free, and rounding may move a point across a margin during the fit.
    assert same.double().mean() > 0.98
    if count is None:
        assert torch.allclose(classifier.scores(train), expected, atol=1e-6)
    beside, *_ = max_margin_classifiers(train, labels, [count, 7, None])
    assert torch.allclose(beside.weight, classifier.weight), "one projection serves all dimensions"


def test_more_features_than_images_change_nothing_but_the_time(rows):
    train, labels = rows[0][:40].repeat(1, 3) + torch.randn(40, 72), rows[1][:40]
    (classifier,) = max_margin_classifiers(train, labels)
    new = train + 0.3 * torch.randn(train.shape)
    assert classifier.weight.shape == (72, 4)
    assert torch.allclose(classifier.scores(new), scores_of_pipeline(None, train, labels, new), atol=1e-4)


def test_two_classes_get_a_score_each(rows):
    train, labels = rows[0], rows[1] % 2
    (classifier,) = max_margin_classifiers(train, labels)
    margins = scores_of_pipeline(None, train, labels, train)
    assert torch.allclose(classifier.scores(train), torch.stack([-margins, margins], 1), atol=1e-6)


def test_the_same_seed_gives_the_same_classifier_and_leaves_the_random_streams_alone(rows, random_stream):
    import numpy

    before = numpy.random.get_state()[1].tolist()  # noqa: NPY002
    one, two = (max_margin_classifiers(*rows, [3, None], seed=5) for _ in range(2))
    other = max_margin_classifiers(*rows, [3, None], seed=6)
    for first, second, third in zip(one, two, other, strict=True):
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.bias, second.bias)
        assert not torch.equal(first.weight, third.weight)
    assert random_stream()
    assert numpy.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_a_classifier_counts_what_it_stores():
    labels = torch.arange(60) % 10
    train = torch.randn(60, 50) + labels[:, None]
    narrow, wide, whole = max_margin_classifiers(train, labels, [2, 30, None])
    assert narrow.parameters == 50 * 2 + 2 + 2 * 10 + 10
    assert wide.parameters == whole.parameters == 50 * 10 + 10  # one affine map is less than projection and classifier


def test_linear_accuracy_is_that_of_the_classifiers(rows):
    train, labels = rows
    accuracies = linear_accuracy(train[:160], labels[:160], train[160:], labels[160:], [1, 8, None], seed=3)
    for count, accuracy in zip([1, 8, None], accuracies, strict=True):
        (classifier,) = max_margin_classifiers(train[:160], labels[:160], [count], seed=3)
        assert accuracy == (classifier.predict(train[160:]) == labels[160:]).double().mean()
    assert accuracies[0] < accuracies[1] - 0.2
    for test, wanted in ((train[:0], labels[:0]), (train, labels[1:])):
        with pytest.raises(EvaluationError, match="at least one"):
            linear_accuracy(train, labels, test, wanted, [1])


def test_linear_accuracy_sees_only_the_leading_directions(digits):
    images, labels = digits[0].flatten(1), digits[1]
    loud = 3 * torch.randn(len(images), 1, generator=torch.Generator().manual_seed(0))
    # Forty copies of one noise: scaled as all features are, they still are the direction of largest variance.
    drowned = torch.cat([images, loud.repeat(1, 40)], 1)
    parts = drowned[:900], labels[:900], drowned[900:], labels[900:]
    blind, seeing = linear_accuracy(*parts, [1, 11])
    assert blind < 0.25
    assert seeing > 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y, [25]), "between 1 and 24"),
        (lambda x, y: (x, y, [0]), "between 1 and 24"),
        (lambda x, y: (x, y, []), "between 1 and 24"),
        (lambda x, y: (x, y * 0, [2]), "there are 1 classes"),
        (lambda x, y: (x, y * 2, [2]), "class 1 has no training images"),
        (lambda x, y: (x, y - 1, [2]), "every class 0"),
        (lambda x, y: (x[:0], y[:0], [2]), "every class 0"),
        (lambda x, y: (x, y[1:], [2]), "need labels"),
        (lambda x, y: (x, y.float(), [2]), "int64"),
        (lambda x, y: (x * torch.nan, y, [2]), "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_named(rows, change, message):
    with pytest.raises(EvaluationError, match=message):
        max_margin_classifiers(*change(*rows))


def test_a_missing_scikit_learn_is_named(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"timm_lowrank\[evaluate\]"):
        max_margin_classifiers(*rows)


# Hybrid models


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = timm.create_model("resnet10_cifar", num_classes=4, channels=(4, 4, 8, 32), in_chans=1).eval()
    return PixelModel(network, mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def pictures():
    """Four kinds of pictures, (80, 1, 8, 8), each bright in a quarter of its own, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    images = 0.4 * torch.rand(80, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[index, :, top : top + 4, left : left + 4] += 0.4
    return images, labels


@pytest.fixture(scope="module", params=["layer3", "pre_logits"])
def hybrid(request, model, pictures):
    images, labels = pictures
    seen = activations(model, images, [request.param])[request.param]
    (classifier,) = max_margin_classifiers(seen, labels, [6])
    return HybridModel(model, request.param, classifier, images[:1]), classifier, request.param


def test_a_hybrid_gives_the_scores_of_its_classifier(hybrid, model, pictures):
    network, classifier, layer = hybrid
    images, labels = pictures
    expected = classifier.scores(activations(model, images, [layer])[layer])
    with torch.no_grad():
        scores = network(images)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), expected, atol=1e-4 * float(expected.abs().max()))
    assert (scores.argmax(1) == labels).double().mean() > 0.4
    assert torch.allclose(network(images[3:4]), scores[3:4], atol=1e-3)


def test_the_gradient_of_a_hybrid_is_that_of_a_float64_twin(hybrid, model, pictures):
    network, classifier, layer = hybrid
    images = pictures[0][:4].requires_grad_()
    (gradient,) = torch.autograd.grad(network(images)[:, 1].sum(), images)
    twin = copy.deepcopy(model.network).double()
    wide = images.detach().double().requires_grad_()
    maps = twin.layer3(twin.layer2(twin.layer1(twin.act1(twin.bn1(twin.conv1((wide - 0.5) / 0.25))))))
    features = maps if layer == "layer3" else twin.forward_head(twin.layer4(maps), pre_logits=True)
    scores = features.flatten(1) @ classifier.weight + classifier.bias
    (expected,) = torch.autograd.grad(scores[:, 1].sum(), wide)
    assert expected.abs().max() > 0.1
    assert torch.allclose(gradient.double(), expected, atol=1e-4 * float(expected.abs().max()))


def test_attacks_run_on_a_hybrid(hybrid, pictures):
    images, labels = pictures
    attack = partial(attacks.pgd, eps=0.3, steps=5, random_start=False)
    adversarial = attack(hybrid[0], images, labels)
    with torch.no_grad():
        before, after = (hybrid[0](x).argmax(1) == labels for x in (images, adversarial))
    assert after.double().mean() < before.double().mean() - 0.3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hybrid[0].modules())


def test_images_that_fooled_the_network_are_tried_on_its_hybrid(hybrid, model, pictures):
    images, _ = pictures
    with torch.no_grad():
        labels = model(images).argmax(1)  # an untrained network is right by definition
        labels[:3] = (labels[:3] + 1) % 4
    adversarial = attacks.iterative_fgsm(model, images, labels, eps=0.1, steps=3, step_size=0.05)
    verdict = judge_hybrid(model, hybrid[0], images, adversarial, labels, batch_size=30)
    with torch.no_grad():
        fooled = model(adversarial).argmax(1) != labels
        assert torch.equal(verdict.counted, fooled & (torch.arange(80) >= 3))
        assert torch.equal(verdict.right, hybrid[0](adversarial).argmax(1) == labels)
    assert verdict.counted.any()


def test_a_hybrid_names_what_does_not_fit(model, pictures):
    images, labels = pictures
    (classifier,) = max_margin_classifiers(torch.rand(80, 5), labels)
    with pytest.raises(EvaluationError, match="fitted on 5 features"):
        HybridModel(model, "layer3", classifier, images)
    with pytest.raises(EvaluationError, match="Did you mean"):
        HybridModel(model, "layer33", classifier, images)


# Parameters


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_parameters_behind_a_layer_are_those_of_the_layers_behind_it(model, pictures):
    network, images = model.network, pictures[0]
    for parameter in network.conv1.parameters():
        parameter.requires_grad_(False)
    assert parameters_behind(model, "layer3", images) == count(network.layer4, network.fc)
    assert parameters_behind(model, "pre_logits", images) == count(network.fc)
    assert parameters_behind(model, "fc", images) == 0
    every = count(network) - network.conv1.weight.numel()
    assert parameters_behind(model, "conv1", images) == every
    assert not network.conv1.weight.requires_grad
    assert network.fc.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Bypassed(nn.Module):
    """The first layer also reaches the logits around the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, images):
        hidden = self.first(images.flatten(1))
        return hidden + self.second(hidden)


def test_a_way_around_the_layer_counts_and_what_never_runs_does_not():
    net = Bypassed()
    assert parameters_behind(net, "second", torch.rand(1, 1, 2, 2)) == count(net.first)
    assert parameters_behind(net, "first", torch.rand(1, 1, 2, 2)) == count(net.second)


class Stage(nn.Module):
    """Gives features and class tokens, as those of CrossViT and others do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features):
        features = self.layer(features)
        return [features, features.mean(dim=1)]


class Staged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage(), Stage()])
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        features, first = self.stages[0](images.flatten(2))
        _, second = self.stages[1](features)
        return self.head(first + second)


def test_parameters_behind_a_layer_that_gives_several_tensors():
    net = Staged()
    assert parameters_behind(net, "stages.0", torch.rand(1, 3, 2, 2)) == count(net.stages[1], net.head)
