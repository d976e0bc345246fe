"""Accuracy over the steps of an attack, and the smallest perturbation that fools."""

import math
from functools import partial

import pytest
import torch
from attacked import Around
from torch import nn

from timm_lowrank.core.capture import Tap, recording
from timm_lowrank.errors import EvaluationError, EvaluationWarning
from timm_lowrank.evaluation import attacks, classified_right, rho
from timm_lowrank.evaluation.attacks import until_fooled
from timm_lowrank.evaluation.robustness import (
    SmallestRadii,
    deepfool_rho,
    minimum_perturbation,
    noise_at,
    smallest_radii,
    step_accuracies,
    trajectory,
)
from timm_lowrank.suites.measurements.perturbations import _Aim


class Threshold(nn.Module):
    """Two classes: whether the mean of the pixels lies above a half."""

    def __init__(self, border=0.5):
        super().__init__()
        self.border = nn.Parameter(torch.tensor(border))

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return torch.stack([self.border - mean, mean - self.border], 1)


@pytest.fixture
def grey():
    """Five grey images and their labels for `Threshold`; the last is misclassified from the start."""
    levels = torch.tensor([0.6, 0.52, 0.45, 0.9, 0.4])
    return levels.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), torch.tensor([1, 1, 0, 1, 1])


@pytest.fixture(scope="module")
def trained(digits):
    """A network that knows most digits, after two seconds of training."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(80):
        rows = torch.arange(64 * step, 64 * step + 64) % 1500
        loss = nn.functional.cross_entropy(net(digits[0][rows]), digits[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


# Steps


def test_the_two_accuracies_by_hand():
    predicted = torch.tensor([[1, 1, 0, 1], [2, 2, 2, 2], [0, 3, 3, 0], [5, 5, 5, 6]])
    accuracies = step_accuracies(predicted)
    assert accuracies.instantaneous == [1.0, 0.75, 0.5, 0.75]
    assert accuracies.cumulative == [1.0, 0.75, 0.5, 0.25]
    by_label = step_accuracies(predicted, torch.tensor([1, 0, 3, 5]))
    assert by_label.instantaneous == [0.5, 0.75, 0.5, 0.25]
    assert by_label.cumulative == [0.5, 0.5, 0.25, 0.0]
    assert step_accuracies(predicted[:1]).cumulative == [1.0, 1.0, 0.0, 0.0]


def test_the_trajectory_is_that_of_attacks_of_each_length(trained, digits):
    net, images, labels = trained, digits[0][1500:1524], digits[1][1500:1524]
    attack = partial(attacks.iterative_fgsm, eps=0.1, step_size=0.02)
    classes = trajectory(net, images, labels, partial(attack, steps=6))
    assert classes.shape == (24, 7)
    for steps in range(1, 7):
        with torch.no_grad():
            expected = net(attack(net, images, labels, steps=steps)).argmax(1)
        assert torch.equal(classes[:, steps], expected)
    with torch.no_grad():
        assert torch.equal(classes[:, 0], net(images).argmax(1))
    halves = [slice(None, 10), slice(10, None)]
    chunks = [trajectory(net, images[half], labels[half], partial(attack, steps=6)) for half in halves]
    assert torch.equal(torch.cat(chunks), classes)
    accuracies = step_accuracies(classes, labels)
    assert accuracies.instantaneous[0] > accuracies.instantaneous[-1] + 0.2


def test_another_network_may_be_the_judge(small_net, digits):
    source, judge = small_net().eval(), small_net()
    images, labels = digits[0][:12], digits[1][:12]
    attack = partial(attacks.iterative_fgsm, eps=0.2, step_size=0.1)
    classes = trajectory(source, images, labels, partial(attack, steps=2), judge=judge)
    with torch.no_grad():
        assert torch.equal(classes[:, 2], judge.eval()(attack(source, images, labels, steps=2)).argmax(1))


def test_a_judge_may_read_layers_of_the_attacked_network(digits):
    """In front of a BatchNorm, which is folded into them while the attack goes on."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    images, labels = digits[0][:12], digits[1][:12]
    network.train()(images)
    network.eval()

    class Judge(nn.Module):
        def forward(self, pixels):
            with recording(network, [Tap("0", "0")]) as record:
                network(pixels)
            return record.values["0"].flatten(1)

    points = []
    attack = partial(attacks.iterative_fgsm, eps=0.2, step_size=0.1, steps=4)
    attack(network, images, labels, on_step=lambda step, here, logits: points.append(here.clone()))
    classes = trajectory(network, images, labels, attack, judge=Judge())
    with torch.no_grad():
        expected = [Judge()(here).argmax(dim=1) for here in points]
    assert torch.equal(classes, torch.stack(expected, dim=1))


@pytest.mark.parametrize("stop", [False, True])
def test_what_the_least_likely_class_was_in_the_last_step(trained, digits, stop):
    images, labels = digits[0][1500:1530], digits[1][1500:1530]
    attack = partial(attacks.iterative_least_likely, trained, images, labels, eps=0.3, step_size=0.05)
    aim = _Aim()
    attack(steps=5, on_step=aim, stop_at_success=stop)
    expected = None
    going = torch.ones(30, dtype=torch.bool)
    for steps in range(5):
        points = attack(steps=steps) if steps else images
        with torch.no_grad():
            logits = trained(points)
        going &= logits.argmax(dim=1).eq(labels) if stop else True
        least = logits.argmin(dim=1)
        expected = least if expected is None else torch.where(going, least, expected)
    assert torch.equal(aim.targets, expected)


# The smallest perturbation


def stopping(model, step_size=0.01, steps=60):
    attack = partial(attacks.iterative_fgsm, steps=steps, step_size=step_size, stop_at_success=True)
    return lambda images, labels, eps: attack(model, images, labels, eps=eps)


def test_the_smallest_radius_is_the_distance_to_the_border(grey):
    net = Threshold()
    smallest = smallest_radii(net, *grey, stopping(net), [0.03, 0.25, 0.12])
    assert smallest.radius.tolist() == [0.12, 0.03, 0.12, math.inf, 0.0]
    # Steps of 0.01 cross the border: by how much, a uniform image shows.
    crossing = [0.11 / 0.6, 0.03 / 0.52, 0.06 / 0.45]
    assert smallest.rho[:3].tolist() == pytest.approx(crossing, abs=0.01 / 0.45)
    assert smallest.rho[3].isnan()
    assert smallest.rho[4] == 0
    halves = [slice(None, 2), slice(2, None)]
    one, two = (smallest_radii(net, grey[0][half], grey[1][half], stopping(net), [0.03, 0.12, 0.25]) for half in halves)
    assert torch.equal(torch.cat([one.radius, two.radius]), smallest.radius)
    assert torch.allclose(torch.cat([one.rho, two.rho]), smallest.rho, rtol=1e-6, equal_nan=True)


def test_the_smallest_radius_does_not_grow_with_the_scale_of_the_logits(grey):
    """Of the probabilities of two classes and their gradient float32 keeps nothing where the logits are 200 apart."""
    net = Threshold()
    loud = Around(net, after=lambda logits: 1e4 * logits)
    radii = [0.03, 0.12, 0.25]
    smallest = [smallest_radii(model, *grey, stopping(model), radii) for model in (net, loud)]
    assert torch.equal(smallest[0].radius, smallest[1].radius)
    assert torch.allclose(smallest[0].rho, smallest[1].rho, equal_nan=True)


def test_the_smallest_radius_is_that_of_a_loop_over_images_and_radii(trained, digits):
    net, images, labels = trained, digits[0][1500:1520], digits[1][1500:1520]
    grid = [0.02, 0.08, 0.14]
    attack = stopping(net, 0.02, 10)
    smallest = smallest_radii(net, images, labels, attack, grid)
    for index in range(20):
        one, label = images[index : index + 1], labels[index : index + 1]
        with torch.no_grad():
            wrong = net(one).argmax() != label
        expected, distance = (0.0, 0.0) if wrong else (math.inf, math.nan)
        for eps in [] if wrong else grid:
            adversarial = attack(one, label, eps)
            with torch.no_grad():
                if net(adversarial).argmax() != label:
                    expected = eps
                    distance = float((adversarial - one).double().norm() / one.double().norm())
                    break
        assert smallest.radius[index].item() == expected
        assert smallest.rho[index].item() == pytest.approx(distance, nan_ok=True)
    assert 0 < smallest.radius.isinf().sum() < 18


def test_the_noise_at_which_accuracy_is_halved_lies_on_the_line_between_two_points():
    assert noise_at([0.9, 0.7, 0.3, 0.1], [0.0, 0.1, 0.3, 0.5]) == pytest.approx(0.2)
    assert noise_at([0.9, 0.5, 0.3], [0.0, 0.1, 0.3]) == pytest.approx(0.1)
    assert noise_at([0.9, 0.7, 0.3], [0.0, 0.1, 0.3], 0.6) == pytest.approx(0.15)
    assert noise_at([0.4, 0.3], [0.0, 0.1]) == 0
    assert noise_at([0.9, 0.6], [0.0, 0.1]) == math.inf
    for accuracies, sizes in (([], []), ([0.9], [0.0, 0.1])):
        with pytest.raises(EvaluationError, match="give as many"):
            noise_at(accuracies, sizes)


def by_hand():
    inf, nan = math.inf, math.nan
    radius = torch.tensor([0.0, 0.1, 0.1, 0.2, inf], dtype=torch.float64)
    return SmallestRadii(radius, torch.tensor([0.0, 0.3, 0.5, nan, nan], dtype=torch.float64))


def test_the_minimum_perturbation_by_hand():
    radii = by_hand()
    assert minimum_perturbation(radii, 0.5) == (0.1, pytest.approx(0.4), 2, 4)
    assert minimum_perturbation(radii, 0.75) == (0.2, pytest.approx(0.4), 3, 4)  # that rho is of an image of zeros
    assert minimum_perturbation(radii, 0.99) == (None, None, 3, 4)
    assert minimum_perturbation(radii, 0.6, count_misclassified=True) == (0.1, pytest.approx(0.8 / 3), 3, 5)
    assert minimum_perturbation(radii, 0.2, count_misclassified=True) == (0.0, 0.0, 1, 5)


@pytest.mark.parametrize("count", [1, 99, 100, 101, 200, 700, 1000])
def test_99_per_cent_are_counted_exactly(count):
    radius = torch.arange(1, count + 1, dtype=torch.float64)
    eps, _, hits, of = minimum_perturbation(SmallestRadii(radius, radius))
    assert hits == eps
    assert 100 * hits >= 99 * of
    assert 100 * (hits - 1) < 99 * of


def test_a_zero_image_is_fooled_at_an_undefined_rho():
    net = Threshold(0.1)
    with pytest.warns(EvaluationWarning, match="zero everywhere"):
        smallest = smallest_radii(net, torch.zeros(1, 1, 2, 2), torch.tensor([0]), stopping(net), [0.5])
    assert smallest.radius.tolist() == [0.5]
    assert smallest.rho.isnan().all()
    assert minimum_perturbation(smallest) == (0.5, None, 1, 1)


def test_a_black_box_stops_when_the_judge_is_fooled(grey):
    images, labels = grey
    source, judge = Threshold(0.5), Threshold(0.35)
    attack = until_fooled(source, judge, partial(attacks.iterative_fgsm, steps=60, step_size=0.01))
    stopped = attack(images[:2], labels[:2], 0.4)
    means = stopped.flatten(1).mean(1)
    assert ((means < 0.35) & (means > 0.33)).all()  # past the border of the judge, by one step at most
    last = attack(images[3:4], labels[3:4], 0.2)
    assert torch.equal(
        last, attacks.iterative_fgsm(source, images[3:4], labels[3:4], eps=0.2, steps=60, step_size=0.01)
    )
    wrong = attack(images[2:3], labels[2:3], 0.2)
    assert torch.equal(wrong, images[2:3])  # the judge misclassifies it from the start
    smallest = smallest_radii(judge, images, labels, attack, [0.2, 0.3])
    assert smallest.radius.tolist() == [0.3, 0.2, 0.0, math.inf, 0.2]


def test_a_network_that_judges_itself_stops_as_the_attack_does(trained, digits):
    net, images, labels = trained, digits[0][1500:1520], digits[1][1500:1520]
    attack = partial(attacks.iterative_fgsm, steps=12, step_size=0.02)
    one = until_fooled(net, net, attack)(images, labels, 0.2)
    two = attack(net, images, labels, eps=0.2, stop_at_success=True)
    with torch.no_grad():
        assert torch.equal(net(one).argmax(1), net(two).argmax(1))
    assert torch.allclose(one, two, atol=1e-6)


def test_deepfool_s_rho_is_that_of_its_images(trained, digits):
    net, images, labels = trained, digits[0][1500:1530], digits[1][1500:1530]
    labels = torch.where(torch.arange(30) < 25, labels, (labels + 1) % 10)  # some are wrong from the start
    adversarial = attacks.deepfool(net, images, labels)
    right, still = (classified_right(net, x, labels) for x in (images, adversarial))
    smallest = deepfool_rho(net, images, labels)
    fooled = right & ~still
    assert fooled.any()
    assert torch.equal(smallest.rho[fooled], rho(images, adversarial)[fooled])
    lengths = (adversarial.double() - images.double()).flatten(1).norm(dim=1)
    assert torch.equal(smallest.radius[fooled], lengths[fooled])
    assert (smallest.radius[~right] == 0).all()
    assert (smallest.rho[~right] == 0).all()


def test_deepfool_may_be_judged_by_another_network(grey):
    images, labels = grey
    smallest = deepfool_rho(Threshold(0.5), images, labels, judge=Threshold(0.35))
    assert smallest.radius[[0, 1, 3, 4]].isinf().all()  # it stops at 0.5, where the judge still says 1
    assert smallest.radius[2] == 0
    assert smallest.rho[[0, 1, 3, 4]].isnan().all()


NET, IMAGES, LABELS = Threshold(), torch.full((2, 1, 2, 2), 0.6), torch.tensor([1, 1])


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: smallest_radii(NET, IMAGES, LABELS, stopping(NET), []), "radii must be positive"),
        (lambda: smallest_radii(NET, IMAGES, LABELS, stopping(NET), [0.1, 0.0]), "radii must be positive"),
        (lambda: smallest_radii(NET, IMAGES, LABELS[1:], stopping(NET), [0.1]), "as many labels"),
        (lambda: deepfool_rho(NET, IMAGES[:0], LABELS[:0]), "no images"),
        (lambda: minimum_perturbation(by_hand(), 99), "share"),
        (lambda: minimum_perturbation(SmallestRadii(torch.zeros(2), torch.zeros(2))), "no image was classified"),
        (lambda: trajectory(NET, IMAGES[:0], LABELS[:0], attacks.iterative_fgsm), "no images"),
        (lambda: trajectory(NET, IMAGES, LABELS, lambda *images, on_step: images[1]), "never called on_step"),
        (lambda: step_accuracies(torch.zeros(3, 2), torch.zeros(2)), "as many labels"),
        (lambda: step_accuracies(torch.zeros(0, 2)), "n >= 1"),
    ],
)
def test_what_cannot_be_measured_is_named(measure, message):
    with pytest.raises(EvaluationError, match=message):
        measure()
