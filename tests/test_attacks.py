"""PGD and its relatives, DeepFool and transfer: against foolbox, against a textbook, and against their promises."""

import copy
import inspect
import sys
from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
import torch
from attacked import Around, quantised, right, trained
from torch import nn
from torch.nn.functional import cross_entropy

from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation import PixelModel, attacks
from timm_lowrank.evaluation.attacks import (
    MADRY,
    PAPER,
    deepfool,
    fgsm,
    iterative_fgsm,
    iterative_least_likely,
    least_likely,
    pgd,
    transfer,
)
from timm_lowrank.evaluation.pixels import attackable

EPS = 24 / 255

ALL = {
    "fgsm": partial(fgsm, eps=EPS),
    "pgd": partial(pgd, eps=EPS, steps=3),
    "pgd, l2": partial(pgd, eps=0.5, steps=3, norm="l2"),
    "pgd, margin": partial(pgd, eps=EPS, steps=3, loss="margin"),
    "pgd, restarts": partial(pgd, eps=EPS, steps=3, restarts=3, keep="first_hit"),
    "iterative_fgsm": partial(iterative_fgsm, eps=EPS, steps=3, step_size=0.05),
    "iterative_least_likely": partial(iterative_least_likely, eps=EPS, steps=3, step_size=0.05),
    "deepfool": partial(deepfool, steps=3),
}


@pytest.fixture
def net(small_net, digits):
    return trained(small_net, digits)


@pytest.fixture
def batch(digits):
    """40 images that the network has not been trained on."""
    return digits[0][-40:], digits[1][-40:]


def share_that_agrees(adversarial, expected, tolerance=1e-5):
    return ((adversarial.double() - expected.double()).abs().flatten(1).amax(dim=1) <= tolerance).double().mean().item()


def record(net, batch, attack, **settings):
    """Images (steps + 1, n, ...) and logits (steps + 1, n, classes) of all iterates, and what came back."""
    points, logits = [], []

    def on_step(step, images, scores):
        assert step == len(points)
        points.append(images.clone())
        logits.append(scores.clone())

    adversarial = attack(net, *batch, on_step=on_step, **settings)
    return torch.stack(points), torch.stack(logits), adversarial


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


# ---- against other implementations ----


def foolbox_images(attack, model, images, criterion, eps):
    foolbox = pytest.importorskip("foolbox")
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), images, criterion, epsilons=eps)[1]


FOOLBOX = {
    "FGSM": ({}, EPS, partial(fgsm, eps=EPS)),
    "LinfPGD": ({"abs_stepsize": EPS / 4, "steps": 20, "random_start": False}, EPS,
                partial(pgd, eps=EPS, steps=20, random_start=False)),
    "L2PGD": ({"abs_stepsize": 0.7 / 4, "steps": 20, "random_start": False}, 0.7,
              partial(pgd, eps=0.7, steps=20, norm="l2", random_start=False)),
    "LinfBasicIterativeAttack": ({"abs_stepsize": 1 / 255, "steps": 12, "random_start": False}, 10 / 255,
                                 partial(iterative_fgsm, eps=10 / 255, steps=12)),
    "L2DeepFoolAttack": ({"candidates": 10}, None, deepfool),
    "L2DeepFoolAttack ": ({"candidates": 2}, None, partial(deepfool, candidates=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOOLBOX)
def test_an_attack_is_that_of_foolbox(name, net, batch):
    kind = getattr(pytest.importorskip("foolbox").attacks, name.strip())
    settings, eps, attack = FOOLBOX[name]
    adversarial = attack(net, *batch)
    assert share_that_agrees(adversarial, foolbox_images(kind(**settings), net, *batch, eps)) == 1
    assert right(net, adversarial, batch[1]).sum() < right(net, *batch).sum() - 5, "nothing to tell apart"


def test_pgd_from_a_random_start_is_that_of_foolbox(net, batch, monkeypatch):
    foolbox_attacks = pytest.importorskip("foolbox.attacks")
    points, _, adversarial = record(net, batch, pgd, eps=EPS, steps=7)
    oracle = foolbox_attacks.LinfPGD(abs_stepsize=EPS / 4, steps=7)
    monkeypatch.setattr(oracle, "get_random_start", lambda images, eps: type(images)(points[0]))
    assert (points[0] - batch[0]).abs().mean() > EPS / 8
    assert share_that_agrees(adversarial, foolbox_images(oracle, net, *batch, EPS)) == 1


def test_targeted_pgd_is_that_of_foolbox(net, batch):
    foolbox = pytest.importorskip("foolbox")
    images, labels = batch
    targets = (labels + 3) % 10
    adversarial = pgd(net, images, labels, eps=0.3, steps=10, targets=targets, random_start=False)
    oracle = foolbox.attacks.LinfPGD(abs_stepsize=0.3 / 4, steps=10, random_start=False)
    wanted = foolbox.criteria.TargetedMisclassification(targets)
    assert share_that_agrees(adversarial, foolbox_images(oracle, net, images, wanted, 0.3)) == 1
    assert right(net, adversarial, targets).float().mean() > 0.5


def textbook_ascent(network, images, labels, objective, *, eps, steps, step_size):
    """Images after so many steps in L_inf, one image after the other in float64.

    `objective` is of the logits (classes,), those of the image itself (classes,), and the label.
    """
    network, ends = copy.deepcopy(network).double(), []
    for image, label in zip(images.double(), labels, strict=True):
        point, first = image.clone(), network(image[None]).detach()[0]
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(network(point[None])[0], first, label), point)
            point = point.detach() + step_size * gradient.sign()
            point = (image + (point - image).clamp(-eps, eps)).clamp(0, 1)
        ends.append(point)
    return torch.stack(ends)


def margin(logits, first, label):
    return max(logits[j] for j in range(len(logits)) if j != label) - logits[label]


LEAST_LIKELY = partial(iterative_least_likely, eps=0.4, steps=12, step_size=0.1)
TEXTBOOK = {
    "margin": (partial(pgd, loss="margin", random_start=False, eps=EPS, steps=5, step_size=EPS / 3), margin),
    "least likely": (LEAST_LIKELY, lambda logits, first, label: -cross_entropy(logits, logits.detach().argmin())),
    "least likely at first": (
        partial(LEAST_LIKELY, retarget=False), lambda logits, first, label: -cross_entropy(logits, first.argmin())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTBOOK)
def test_an_attack_is_that_of_a_textbook_in_float64(name, net, batch):
    attack, objective = TEXTBOOK[name]
    settings = {key: attack.keywords[key] for key in ("eps", "steps", "step_size")}
    expected = textbook_ascent(net, *batch, objective, **settings)
    assert share_that_agrees(attack(net, *batch), expected, 1e-4) >= (1 if name == "margin" else 0.95)


def test_the_two_readings_of_the_least_likely_class_differ(net, batch):
    assert share_that_agrees(LEAST_LIKELY(net, *batch), LEAST_LIKELY(net, *batch, retarget=False)) < 0.95


def test_the_least_likely_class_is_the_one_of_the_smallest_logit(net, batch):
    assert torch.equal(least_likely(net, batch[0]), net(batch[0]).argmin(dim=1))
    hits = right(net, iterative_least_likely(net, *batch, eps=1.0, steps=40, retarget=False, step_size=0.05),
                       least_likely(net, batch[0]))  # fmt: skip
    assert hits.float().mean() > 0.5


def test_deepfool_on_a_linear_network_is_the_distance_to_the_boundary():
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 1.0, -1.0]])
    image = torch.tensor([0.6, 0.2, 0.5, 0.5]).view(1, 1, 2, 2)
    (own, other), direction = (weight @ image.flatten()).tolist(), weight[1] - weight[0]
    adversarial = deepfool(Linear(weight), image, torch.tensor([0]), overshoot=0.02)
    assert own > other
    distance = (own - other) / direction.norm() + 1e-4
    expected = image.flatten() + 1.02 * distance * direction / direction.norm()
    torch.testing.assert_close(adversarial.flatten(), expected)


def test_deepfool_steps_away_from_a_label_that_another_class_is_level_with():
    """Whichever of them comes first."""
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-3.0, -3.0]])
    images, labels = torch.full((2, 1, 1, 2), 0.5), torch.tensor([0, 0])
    adversarial = deepfool(Linear(weight), images, labels)
    assert ((adversarial - images).flatten(1).norm(dim=1) < 1e-3).all()
    assert (adversarial.flatten(1) @ weight.T).argmax(dim=1).tolist() == [1, 1]


# ---- the ball and the box, to the last bit ----


def awkward_images():
    """Pixels of every kind of exponent, and those of 8-bit images."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(2000, generator=generator)
    small = 10 ** (-12 * torch.rand(500, generator=generator))
    levels = torch.arange(256) / 255
    edges = torch.tensor([0.0, 1.0, 1e-45, 1e-38, 1 - 2**-24, 2**-24, 8 / 255, 0.5])
    return torch.cat([uniform, small, 1 - small, levels, edges]).view(1, 1, 1, -1)


@pytest.mark.parametrize("eps", [2 / 255, 8 / 255, 20 / 255, 0.1, 1 / 3, 1e-4, 1e-9, 0.5, 1.5])
@pytest.mark.parametrize("ascending", [True, False])
def test_the_linf_ball_and_the_box_hold_in_exact_arithmetic(eps, ascending):
    images = awkward_images()
    weight = torch.zeros(2, images.numel())
    weight[1] = 1 if ascending else -1
    settings = {"eps": eps, "steps": 3, "step_size": 0.7 * eps, "random_start": False, "loss": "margin"}
    adversarial = pgd(Linear(weight), images, torch.tensor([0]), **settings)
    radius = Fraction(eps)
    changes = [
        abs(Fraction(a) - Fraction(b))
        for a, b in zip(adversarial.flatten().tolist(), images.flatten().tolist(), strict=True)
    ]
    assert max(changes) <= radius
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    # The whole radius is used where the box lets it: up to the spacing of float32 below 1, and not merely some of it.
    wanted = (images.double() + (eps if ascending else -eps)).clamp(0, 1)
    assert (adversarial.double() - wanted).abs().max() <= 2**-24
    naive = (images + eps).clamp(0, 1) if ascending else (images - eps).clamp(0, 1)
    if eps in (8 / 255, 0.1):
        assert (naive.double() - images.double()).abs().max() > eps, "clamping to rounded bounds would have done"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [8 / 255, 0.3, 1.0])
def test_random_starts_and_all_iterates_are_in_the_ball_and_the_box(net, batch, norm, eps):
    seen, _, _ = record(net, batch, pgd, eps=eps, steps=4, norm=norm)
    for points in seen:
        change = (points.double() - batch[0].double()).flatten(1)
        assert (change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)).max() <= eps
    assert seen.min() >= 0
    assert seen.max() <= 1


@pytest.mark.parametrize("eps", [0.5, 0.1, 1e-3, 1e-6])
def test_the_l2_ball_is_used_to_its_rim_and_not_left(eps):
    generator = torch.Generator().manual_seed(4)
    images = 0.25 + torch.rand(20, 3, 8, 8, generator=generator) / 2
    model = Linear(torch.randn(2, 192, generator=generator))
    adversarial = pgd(model, images, torch.zeros(20).long(), eps=eps, steps=3, step_size=eps, norm="l2")
    lengths = (adversarial.double() - images.double()).flatten(1).norm(dim=1)
    assert (lengths <= eps).all()
    assert (lengths >= eps * (1 - 1e-6) - 192**0.5 * 2**-24).all()  # each pixel is rounded by 2^-24 at most


def test_a_gradient_whose_square_is_not_a_float_still_gives_a_direction(batch):
    images, labels = batch
    weight = torch.zeros(10, 64)
    weight[:, 5] = torch.arange(10) * 1e-30
    adversarial = pgd(Linear(weight), images, labels, eps=0.5, steps=1, norm="l2", random_start=False, loss="margin")
    moved = (adversarial - images).flatten(1).abs()
    assert (moved[:, 5] > 0.12).sum() > 10
    assert moved[:, :5].max() == 0


# ---- radii in normalised units ----

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.25, 0.4]).view(3, 1, 1)
NORMALIZED = {
    "pgd": (partial(pgd, eps=0.5, steps=5), {"eps": 0.5, "size": 0.125}),
    "pgd, l2": (partial(pgd, eps=4.0, steps=5, norm="l2"), {"eps": 4.0, "size": 1.0, "norm": "l2"}),
    "fgsm": (partial(fgsm, eps=0.5), {"eps": 0.5, "size": 0.5}),
    "iterative_fgsm": (partial(iterative_fgsm, eps=0.4, steps=5, step_size=0.1), {"eps": 0.4, "size": 0.1}),
    "iterative_least_likely": (
        partial(iterative_least_likely, eps=0.4, steps=4, step_size=0.1), {"eps": 0.4, "size": 0.1, "away": False}
    ),
}  # fmt: skip


@pytest.fixture
def coloured(net, batch):
    """A `PixelModel` for three channels that it normalises differently, and the digits in colours."""
    share = torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1)
    inner = Around(net, before=lambda z: ((z * STD.to(z) + MEAN.to(z)) * share.to(z)).sum(1, keepdim=True))
    tint = torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1)
    model = PixelModel(inner, tuple(MEAN.flatten().tolist()), tuple(STD.flatten().tolist())).eval()
    return model, (batch[0] * tint, batch[1])


def textbook_normalized(network, start, images, labels, *, eps, size, steps, norm="linf", away=True):
    """An attack on normalised images in float64: what is moved, clipped and kept valid is what the network is given."""
    network, mean, std = copy.deepcopy(network).double(), MEAN.double(), STD.double()
    clean, lowest, highest = (images.double() - mean) / std, -mean / std, (1 - mean) / std
    point = (start.double() - mean) / std
    for _ in range(steps):
        point = point.detach().requires_grad_()
        logits = network(point)
        loss = cross_entropy(logits, labels if away else logits.detach().argmin(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss if away else -loss, point)
        lengths = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        point = point.detach() + size * (gradient.sign() if norm == "linf" else gradient / lengths)
        change = point - clean
        if norm == "linf":
            change = change.clamp(-eps, eps)
        else:
            change *= (eps / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp_max(1)
        point = torch.maximum(torch.minimum(clean + change, highest), lowest)
    return point.detach() * std + mean


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_radius_in_normalised_units_is_that_of_an_attack_on_normalised_images(name, coloured):
    model, (images, labels) = coloured
    attack, settings = NORMALIZED[name]
    steps = attack.keywords.get("steps", 1)
    start = images
    if attack.func is pgd:
        points, _, adversarial = record(model, (images, labels), attack, radius_unit="normalized")
        start = points[0]
        change = ((start.double() - images.double()) / STD.double()).flatten(1)
        spread = change.abs().amax(1) if "norm" not in settings else change.norm(dim=1)
        assert spread.mean() > settings["eps"] / 4
        assert spread.max() <= settings["eps"] + 1e-12
    else:
        adversarial = attack(model, images, labels, radius_unit="normalized")
    expected = textbook_normalized(model.network, start, images, labels, steps=steps, **settings)
    assert share_that_agrees(adversarial, expected, 1e-4) >= 0.95
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    change = ((adversarial.double() - images.double()) / STD.double()).flatten(1)
    assert (change.abs().amax(1) if "norm" not in settings else change.norm(dim=1)).max() <= settings["eps"] * (
        1 + 1e-12
    )
    assert share_that_agrees(adversarial, attack(model, images, labels)) < 0.5, "the unit makes no difference"
    # One unit for all channels is another radius in pixels, and no other attack.
    equal = PixelModel(model.network, (0.5,) * 3, (0.25,) * 3).eval()
    smaller = {key: value / 4 for key, value in attack.keywords.items() if key in ("eps", "step_size")}
    in_pixels = attack(equal, images, labels, **smaller)
    tolerance = 1e-5
    assert share_that_agrees(attack(equal, images, labels, radius_unit="normalized"), in_pixels, tolerance) >= 0.95


def test_deepfool_in_normalised_units_takes_the_shortest_way_in_the_normalised_image():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]])
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.1, 0.25)
    image = torch.tensor([0.6, 0.2, 0.5]).view(1, 3, 1, 1)
    adversarial = deepfool(
        PixelModel(Linear(weight), mean, std).eval(), image, torch.tensor([0]), overshoot=0.02, radius_unit="normalized"
    ).flatten()
    z = (image.flatten() - torch.tensor(mean)) / torch.tensor(std)
    (own, other), direction = (weight @ z).tolist(), weight[1] - weight[0]
    distance = (own - other) / direction.norm() + 1e-4
    expected = (z + 1.02 * distance * direction / direction.norm()) * torch.tensor(std) + torch.tensor(mean)
    assert own > other
    torch.testing.assert_close(adversarial, expected)


def test_normalised_units_are_those_of_the_network_that_images_are_crafted_on(coloured, net):
    model, (images, labels) = coloured
    other = PixelModel(model.network, tuple(MEAN.flatten().tolist()), (0.2, 0.2, 0.2)).eval()
    crafted = pgd(model, images, labels, eps=0.3, steps=2, radius_unit="normalized")
    for wrapped in (torch.compile(model, backend="eager"), Around(model)):
        assert torch.equal(pgd(wrapped, images, labels, eps=0.3, steps=2, radius_unit="normalized"), crafted)
    result = transfer(model, other, images, labels, partial(pgd, eps=0.3, steps=2, radius_unit="normalized"))
    assert torch.equal(result.images, crafted)
    with pytest.raises(EvaluationError, match=r"SmallNet does not say it: pass PixelModel\(network\)"):
        fgsm(net, images[:, :1], labels, eps=0.3, radius_unit="normalized")
    with pytest.raises(EvaluationError, match="did you mean 'normalized'"):
        fgsm(model, images, labels, eps=0.3, radius_unit="normalised")


# ---- reproducible, and alike in any batch ----


@pytest.mark.parametrize("name", ALL)
def test_the_same_call_gives_the_same_bits_and_leaves_no_trace(name, net, batch, random_stream):
    before = [parameter.clone() for parameter in net.parameters()]
    sentinel = torch.ones_like(before[0])
    next(net.parameters()).grad = sentinel
    next(net.parameters()).requires_grad_(False)
    net.body.train()
    first = ALL[name](net, *batch)
    assert torch.equal(first, ALL[name](net, *batch))
    assert not first.requires_grad
    assert first.dtype == torch.float32
    assert not torch.equal(first, batch[0])
    assert random_stream()
    parameters = list(net.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert parameters[0].grad is sentinel
    assert torch.equal(sentinel, torch.ones_like(sentinel))
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert [name for name, module in net.named_modules() if module.training] == ["body", "body.0", "body.1", "body.2"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_follow_the_generator_and_the_image_alone(net, batch, norm):
    def start(images, labels, seed):
        settings = {"eps": EPS, "steps": 1, "norm": norm, "generator": torch.Generator().manual_seed(seed)}
        return record(net, (images, labels), pgd, **settings)[0][0]

    images, labels = batch
    whole, order = start(images, labels, 5), torch.randperm(len(images))
    assert torch.equal(start(images[order], labels[order], 5), whole[order])
    assert torch.equal(start(images[7:8], labels[7:8], 5), whole[7:8])
    assert (start(images, labels, 6) != whole).float().mean() > 0.5
    inside = 0.4 + 0.2 * images  # the box cuts nothing off
    changes = (start(inside, labels, 5) - inside).flatten(1)
    apart = torch.cdist(changes, changes) + torch.eye(len(images))
    assert apart.min() > EPS / 4, "two images start alike"


def test_the_generator_moves_on_by_one_number(net, batch):
    generator, twin = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    first = pgd(net, *batch, eps=EPS, steps=1, generator=generator)
    assert not torch.equal(first, pgd(net, *batch, eps=EPS, steps=1, generator=generator))
    for _ in range(2):
        torch.randint(2**62, (), generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state())
    fgsm(net, *batch, eps=EPS)
    assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize("name", ALL)
def test_an_image_is_treated_alike_in_any_batch(name, net, batch):
    images, labels = batch
    whole = ALL[name](net, images, labels)
    parts = torch.cat([ALL[name](net, *part) for part in zip(images.split(17), labels.split(17), strict=True)])
    assert share_that_agrees(whole, parts) == 1
    alone = ALL[name](net, images[3:4], labels[3:4])
    assert share_that_agrees(alone, whole[3:4]) == 1


@pytest.mark.parametrize("name", ALL)
def test_no_images_give_no_images(name, net, batch):
    assert ALL[name](net, batch[0][:0], batch[1][:0]).shape == (0, 1, 8, 8)
    assert least_likely(net, batch[0][:0]).shape == (0,)


# ---- what is kept, and when an image leaves ----


@pytest.mark.parametrize("attack", [pgd, iterative_fgsm, iterative_least_likely])
def test_on_step_sees_every_iterate_and_its_logits(net, batch, attack):
    points, logits, adversarial = record(net, batch, attack, eps=EPS, steps=4)
    assert len(points) == 5
    assert torch.equal(points[4], adversarial)
    assert torch.equal(points[0], batch[0]) == (attack is not pgd)
    for images, scores in zip(points, logits, strict=True):
        torch.testing.assert_close(net(images).detach(), scores)


@pytest.mark.parametrize(
    ("attack", "stop", "settings", "shift"),
    [
        (pgd, {"keep": "first_hit"}, {"eps": 0.15}, 0),
        (pgd, {"keep": "first_hit"}, {"eps": 0.4, "loss": "margin"}, 1),
        (iterative_fgsm, {"stop_at_success": True}, {"eps": 0.15, "step_size": 0.03}, 0),
        (iterative_least_likely, {"stop_at_success": True}, {"eps": 0.3, "step_size": 0.06}, 0),
    ],
)
def test_an_image_stops_at_its_first_success(net, batch, attack, stop, settings, shift):
    labels = batch[1]
    targets = (labels + shift) % 10  # with a shift, to be classified as these is the success
    settings = {"steps": 8, **settings} | ({"targets": targets} if shift else {})
    points, logits, _ = record(net, batch, attack, **settings)
    fooled = (logits.argmax(dim=2) == targets) == bool(shift)
    first = torch.where(fooled.any(dim=0), fooled.int().argmax(dim=0), 8)
    assert len(set(first.tolist())) > 2, "nothing to tell apart"
    expected = points[first, torch.arange(len(labels))]
    frozen_points, frozen_logits, adversarial = record(net, batch, attack, **settings, **stop)
    assert share_that_agrees(adversarial, expected) == 1
    assert torch.equal(frozen_points[-1], adversarial)
    torch.testing.assert_close(net(adversarial).detach(), frozen_logits[-1])
    assert share_that_agrees(attack(net, *batch, **settings, **stop), expected) == 1


def test_images_that_are_fooled_leave_the_batch(net, batch):
    sizes = []
    hook = net.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    pgd(net, *batch, eps=0.15, steps=8, keep="first_hit")
    assert sizes[0] == 40
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 20
    assert len(sizes) <= 8
    sizes.clear()
    pgd(net, *batch, eps=0.15, steps=8)
    assert sizes == [40] * 8, "an iterate that nobody asks for is run through the network"
    sizes.clear()
    hook.remove()
    assert not net._forward_hooks
    assert not net._backward_hooks


def test_deepfool_takes_few_gradients_in_vain(net, batch, monkeypatch):
    """Of images that are done: where they are many, the others are run through the network once more instead."""
    forwards, gradients = [], []
    hook = net.register_forward_pre_hook(lambda module, arguments: forwards.append(len(arguments[0])))
    module = sys.modules[deepfool.__module__]
    taken = module.input_gradient

    def counting(total, points, **settings):
        gradients.append(len(points))
        return taken(total, points, **settings)

    monkeypatch.setattr(module, "input_gradient", counting)
    images, labels = batch[0], batch[1].clone()
    labels[:30] = (labels[:30] + 1) % 10
    together = deepfool(net, images, labels)
    hook.remove()
    assert forwards[0] == 40
    assert max(gradients) <= 10
    assert forwards[1] == gradients[0], "the others were not run through the network again"
    assert gradients == sorted(gradients, reverse=True)
    alone = torch.cat(
        [deepfool(net, image, label) for image, label in zip(images.split(1), labels.split(1), strict=True)]
    )
    assert share_that_agrees(together, alone) == 1


class Pictured(nn.Module):
    """A small network of colour images whose layout of memory it keeps, with or without a `view` that needs one."""

    def __init__(self, views):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 10)
        self.views, self.layouts = views, []

    def forward(self, images):
        self.layouts.append(images.is_contiguous(memory_format=torch.channels_last))
        hidden = self.convolution(images).relu()
        return self.linear(hidden.view(len(images), -1) if self.views else hidden.flatten(1))


@pytest.mark.parametrize("attack", [ALL["pgd"], ALL["pgd, l2"], ALL["deepfool"]])
def test_images_are_given_channels_last_where_the_network_takes_them(attack, batch):
    images = batch[0].repeat(1, 3, 1, 1) * torch.tensor([1, 0.8, 0.6]).view(3, 1, 1)
    free, views = Pictured(False).eval(), Pictured(True).eval()
    labels = free(images).argmax(dim=1)
    free.layouts.clear()
    adversarial, by_view = attack(free, images, labels), attack(views, images, labels)
    assert all(free.layouts)
    assert views.layouts[0]
    assert not any(views.layouts[1:]), "tried again and again"
    assert share_that_agrees(adversarial, by_view) >= 0.95
    assert adversarial.is_contiguous()
    with attackable(free, channels_last=False) as logits_of:
        logits_of(images)
    assert not free.layouts[-1]


def test_an_error_of_the_network_itself_is_not_hidden(net, batch):
    with pytest.raises(RuntimeError, match="broken in every layout"):
        pgd(Around(net, before=fail), *batch, eps=EPS, steps=1)


def fail(images):
    raise RuntimeError("broken in every layout")


def test_each_image_keeps_the_first_restart_that_fooled_it(net, batch):
    images, labels = batch
    settings = {"eps": 0.05, "steps": 2, "step_size": 0.02}
    runs = [pgd(net, images, labels, restarts=count, **settings) for count in (1, 2, 3, 4)]
    fooled = [~right(net, run, labels) for run in runs]
    assert fooled[0].any()
    assert not fooled[-1].all()
    assert fooled[-1].sum() > fooled[0].sum(), "no restart helps: nothing is tested"
    for fewer, more, done in zip(runs, runs[1:], fooled, strict=False):
        assert torch.equal(fewer[done], more[done])
        assert (fewer[~done] != more[~done]).flatten(1).any(dim=1).all()
    for before, after in pairwise(fooled):
        assert (before <= after).all()


def test_the_margin_loss_sees_through_a_saturated_softmax(net, batch):
    loud = Around(net, after=lambda logits: 1e4 * logits)
    sound = right(net, pgd(net, *batch, eps=EPS, steps=10, loss="margin"), batch[1]).float().mean()
    masked = right(net, pgd(loud, *batch, eps=EPS, steps=10), batch[1]).float().mean()
    through = right(net, pgd(loud, *batch, eps=EPS, steps=10, loss="margin"), batch[1]).float().mean()
    assert masked > sound + 0.2
    assert through == sound


@pytest.mark.parametrize("scale", [6, 1e4])
def test_iterative_fgsm_climbs_the_cross_entropy_where_float32_has_lost_its_gradient(scale, net, batch):
    """As scales of the logits grow, the log-odds come to grow along the margin, which has no scale."""
    settings = {"eps": 0.12, "steps": 20, "step_size": 0.01}
    loud = Around(net, after=lambda logits: scale * logits)
    with torch.no_grad():
        saturated = loud(batch[0]).softmax(dim=1).gather(1, batch[1][:, None])[:, 0] == 1
    assert saturated.float().mean() > 0.5

    attacked = iterative_fgsm(loud, *batch, **settings)
    rounded = pgd(loud, *batch, random_start=False, **settings)
    in_float64 = textbook_ascent(loud, *batch, exact_cross_entropy, **settings)
    assert share_that_agrees(attacked, in_float64, 1e-4) >= 0.95
    assert share_that_agrees(rounded, in_float64, 1e-4) < 0.7


def exact_cross_entropy(logits, first, label):
    """log q, q the odds of the others: -log p = log(1 + q), so its gradient is that of -log p times 1 + 1 / q."""
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return others.logsumexp(0) - logits[label]


def test_log_odds_have_the_direction_of_the_cross_entropy(net, batch):
    settings = {"eps": EPS, "steps": 5, "norm": "l2"}
    ends = [pgd(net, *batch, loss=loss, **settings) for loss in ("cross_entropy", "log_odds")]
    assert (ends[0] - ends[1]).abs().max() < 1e-5


# ---- named settings ----


def test_the_named_settings_are_what_they_say(net, batch):
    same = {"eps": 8 / 255, "steps": 7}
    assert MADRY.arguments(**same) == {
        **same, "step_size": 2 / 255, "random_start": True, "loss": "cross_entropy"
    }  # fmt: skip
    assert PAPER.arguments(**same) == {**same, "step_size": 1 / 255, "random_start": False, "loss": "log_odds"}
    assert {MADRY.name, PAPER.name} == {"Madry", "paper"}
    assert torch.equal(pgd(net, *batch, **MADRY.arguments(EPS, 3)), pgd(net, *batch, eps=EPS, steps=3))
    paper = pgd(net, *batch, **PAPER.arguments(EPS, 7))
    assert torch.equal(paper, iterative_fgsm(net, *batch, eps=EPS, steps=7))
    loud = Around(net, after=lambda logits: 1e4 * logits)
    paper_of_loud = pgd(loud, *batch, **PAPER.arguments(EPS, 7))
    assert torch.equal(paper_of_loud, iterative_fgsm(loud, *batch, eps=EPS, steps=7))
    # What the docstring of PAPER says of Table 1.
    assert torch.equal(paper, pgd(net, *batch, **PAPER.arguments(8 / 255, 7)))


def test_all_attacks_are_called_alike():
    for name in ("pgd", "fgsm", "iterative_fgsm", "iterative_least_likely", "deepfool", "autoattack"):
        parameters = list(inspect.signature(getattr(attacks, name)).parameters.values())
        assert [parameter.name for parameter in parameters[:3]] == ["model", "images", "labels"]
        assert not any(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters[3:])


# ---- transfer ----


def test_transfer_counts_images_that_both_get_right():
    source, target = (Linear(torch.stack([torch.zeros(4), torch.eye(4)[pixel]])) for pixel in (0, 1))
    images = torch.tensor([[0.9, 0.9, 0, 0], [0.9, 0.0, 0, 0], [0.0, 0.9, 0, 0], [0.9, 0.3, 0, 0]]).view(4, 1, 2, 2)
    labels = torch.ones(4, dtype=torch.int64)
    asked = []

    def wipe(model, images, labels):
        asked.append((model, len(images)))
        return (images - 0.5).clamp(0, 1)

    result = transfer(source, target, images, labels, wipe)
    assert asked == [(source, 4)]
    assert result.counted.tolist() == [True, False, False, True]
    assert result.robust.tolist() == [True, False, True, False]
    assert result.accuracy == 0.5
    assert torch.equal(result.images, (images - 0.5).clamp(0, 1))
    white = transfer(source, source, images, labels, wipe, batch_size=3)
    assert white.counted.tolist() == [True, True, False, True]
    assert white.accuracy == 1


# ---- networks and callers of every kind ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_other_dtypes_are_attacked_on_float32_logits(net, batch, dtype):
    model = PixelModel(copy.deepcopy(net).to(dtype), mean=(0.0,), std=(1.0,))
    adversarial = pgd(model, *batch, eps=EPS, steps=5)
    assert adversarial.dtype == torch.float32
    assert (adversarial.double() - batch[0].double()).abs().max() <= EPS
    reference = right(net, pgd(net, *batch, eps=EPS, steps=5), batch[1]).float().mean()
    assert abs(right(net, adversarial, batch[1]).float().mean() - reference) <= 0.1


def test_images_and_labels_of_other_dtypes_are_taken_as_float32_and_int64(net, batch):
    images, labels = batch
    wanted = fgsm(net, images, labels, eps=EPS)
    assert torch.equal(fgsm(net, images.double(), labels.int(), eps=EPS), wanted)
    strided = images.expand(-1, -1, -1, -1).to(memory_format=torch.channels_last)
    assert torch.equal(fgsm(net, strided, labels, eps=EPS), wanted)


def test_a_compiled_network_is_attacked_uncompiled(net, batch):
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    wanted = deepfool(net, *batch, steps=3)
    assert torch.equal(deepfool(torch.compile(net, backend=refuse), *batch, steps=3), wanted)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_grad_mode_and_autocast_do_not_matter(name, context, net, batch):
    wanted = ALL[name](net, *batch)
    with context():
        images = batch[0].clone()
        assert torch.equal(ALL[name](net, images, batch[1]), wanted)


CUT = {
    "no graph": {"after": torch.Tensor.detach},
    "not to the pixels": {"before": torch.Tensor.detach, "after": lambda x: x + torch.zeros(10, requires_grad=True)},
}


@pytest.mark.parametrize("how", CUT)
@pytest.mark.parametrize("name", ALL)
def test_a_network_that_cannot_be_differentiated_is_an_error(name, how, net, batch):
    with pytest.raises(EvaluationError, match=r"cannot be run; craft on another model and use transfer"):
        ALL[name](Around(net, **CUT[how]), *batch)


def test_pixels_without_a_gradient_stay_put(net, batch):
    dead = Around(net, quantised)
    assert torch.equal(fgsm(dead, *batch, eps=EPS), batch[0])
    assert torch.equal(pgd(dead, *batch, eps=EPS, steps=2, norm="l2", random_start=False), batch[0])
    assert torch.equal(deepfool(dead, *batch, steps=2), batch[0])


def test_deepfool_leaves_what_is_wrong_already_and_fools_the_rest(net, batch):
    images, labels = batch
    assert not right(net, deepfool(net, images, labels), labels).any()
    wrong = (labels + 5) % 10
    adversarial = deepfool(net, images, torch.where(torch.arange(40) < 20, wrong, labels))
    assert torch.equal(adversarial[:20], images[:20])
    changed = (adversarial[20:] != images[20:]).flatten(1).any(dim=1)
    assert changed.equal(right(net, images, labels)[20:])


# ---- what cannot be ----

WRONG_CALLS = {
    "eps=0": (lambda m, x, y: pgd(m, x, y, eps=0, steps=1), "eps must be a finite number above 0"),
    "eps=nan": (lambda m, x, y: iterative_fgsm(m, x, y, eps=float("nan"), steps=1), "eps must be a finite"),
    "steps=0": (lambda m, x, y: pgd(m, x, y, eps=1, steps=0), "steps must be a whole number, 1 or more, not 0"),
    "steps=1.5": (lambda m, x, y: iterative_least_likely(m, x, y, eps=1, steps=1.5), "steps must be a whole number"),
    "step_size=0": (lambda m, x, y: iterative_fgsm(m, x, y, eps=1, steps=1, step_size=0), "step_size must be"),
    "restarts=0": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, restarts=0), "restarts must be"),
    "restarts, no start": (
        lambda m, x, y: pgd(m, x, y, eps=1, steps=1, restarts=2, random_start=False), "restarts need random_start"
    ),
    "restarts, on_step": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, restarts=2, on_step=print), "no on_step"),
    "loss": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, loss="marginal"), "did you mean 'margin'"),
    "norm": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, norm="Linf"), "did you mean 'linf'"),
    "keep": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, keep="first"), "did you mean 'first_hit'"),
    "targets are labels": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, targets=y), "targets must differ"),
    "targets, range": (lambda m, x, y: pgd(m, x, y, eps=1, steps=1, targets=y + 10), "targets must lie in 0..9"),
    "labels, range": (lambda m, x, y: pgd(m, x, y + 1, eps=1, steps=1), "labels must lie in 0..9"),
    "labels, negative": (lambda m, x, y: deepfool(m, x, y - 1), "labels must lie in 0..9"),
    "images, range": (lambda m, x, y: fgsm(m, x * 2 - 1, y, eps=1), r"pixels must lie in \[0, 1\].*PixelModel"),
    "candidates": (lambda m, x, y: deepfool(m, x, y, candidates=1), "candidates must be a whole number, 2 or more"),
    "overshoot": (lambda m, x, y: deepfool(m, x, y, overshoot=-0.1), "overshoot must be a finite number of 0 or more"),
    "huge": (lambda m, x, y: deepfool(m, x, y, overshoot=10**400), "overshoot must be a finite number of 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_one_clear_error(name, net, batch):
    call, message = WRONG_CALLS[name]
    with pytest.raises(EvaluationError, match=message):
        call(net, *batch)


@pytest.mark.parametrize("name", ALL)
def test_a_network_that_gives_no_logits_is_an_error(name, batch):
    images, labels = batch
    with pytest.raises(EvaluationError, match="at least two classes"):
        ALL[name](Linear(torch.ones(1, 64)), images, torch.zeros_like(labels))
    with pytest.raises(EvaluationError, match=r"must give logits \(40, classes\), not \(40, 1, 8, 8\)"):
        ALL[name](nn.Identity(), images, labels)
    with pytest.raises(EvaluationError, match=r"must give logits \(40, classes\), not tuple"):
        ALL[name](Around(nn.Identity(), after=lambda x: (x, x)), images, labels)


@pytest.mark.parametrize("attack", [*ALL.values(), least_likely], ids=[*ALL, "least_likely"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(net, batch, attack, value):
    images, labels = batch
    nn.init.constant_(net.classifier.bias, value)
    with pytest.raises(EvaluationError, match="100% of the images get logits that are NaN or infinite"):
        attack(net, images) if attack is least_likely else attack(net, images, labels)
