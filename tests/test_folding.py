"""BatchNorms folded into convolutions: the same function in every network, and nothing is changed afterwards."""

import contextlib

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from timm_lowrank.evaluation import PixelModel, folding
from timm_lowrank.evaluation.attacks import deepfool, pgd
from timm_lowrank.evaluation.folding import folded
from timm_lowrank.evaluation.pixels import attackable


def trained(network, dtype=torch.float64):
    """As after some training: no BatchNorm is the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.3, 3),
                (module.weight.data, 0.3, 1.5), (module.bias.data, -0.5, 0.5),
            ):  # fmt: skip
                tensor.uniform_(low, high, generator=generator)
    return network.to(dtype).eval().requires_grad_(False)


def of_timm(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **arguments)


class OfTransformers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic", num_labels=10)
        self.network = ResNetForImageClassification(config)

    def forward(self, images):
        return self.network(images).logits


NETWORKS = {
    "a small ResNet": (lambda: of_timm("resnet10_cifar", channels=[8, 8, 16, 16]), 12, 12),
    "a ResNet of timm": (lambda: of_timm("resnet18"), 20, 20),
    "BatchNorm with an activation": (lambda: of_timm("mobilenetv3_small_050"), 34, 34),
    "norms in front of convolutions": (lambda: of_timm("densenet121", block_config=(2, 2), growth_rate=8), 5, 11),
    "of transformers": (OfTransformers, 7, 7),
    "none": (lambda: of_timm("vit_tiny_patch16_224", img_size=32, depth=1), 0, 0),
}


def asked(network, images):
    points = images.clone().requires_grad_()
    logits = network(points)
    (gradient,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), points)
    return logits.detach(), gradient


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients_are_those_of_the_network(name):
    build, expected, norms = NETWORKS[name]
    network = trained(build())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == norms
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    before = asked(network, images)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with folded(network, images[:1]) as count:
        assert count == expected
        meanwhile = asked(network, images)
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    for own, other in zip(before, meanwhile, strict=True):
        assert (own - other).abs().max() <= 1e-11 * own.abs().max()
    assert expected == 0 or not torch.equal(before[0], meanwhile[0]), "nothing was folded"
    for own, other in zip(before, asked(network, images), strict=True):
        assert torch.equal(own, other), "something is left"


class Small(nn.Module):
    """A convolution and a BatchNorm, put together by `way`."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=way != "no statistics")
        self.other_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        if self.way == "several images" and len(images) < 2:
            raise ValueError("needs two images")
        hidden = self.first(images)
        after = self.norm(hidden)
        if self.way == "read twice":
            after = self.other_norm(self.second(after + hidden))  # which is read once
        elif self.way == "read by its weight too":
            after = after * self.first.weight.mean()
        elif self.way == "read without a graph":
            after = after + hidden.detach()
        elif self.way == "convolution called twice":
            after = after + self.first(images.flip(3)).relu()
        elif self.way == "norm called twice":
            after = after + self.norm(self.second(hidden.relu()))
        elif self.way == "noise":
            after = after + torch.rand_like(after)
        return self.head(after.relu().mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("way", "expected"),
    [("plain", 1), ("read by its weight too", 1), ("noise", 1), ("read twice", 1), ("read without a graph", 0),
     ("convolution called twice", 0), ("norm called twice", 0), ("several images", 0), ("no statistics", 0)],
)  # fmt: skip
def test_a_convolution_that_anything_else_reads_stays_as_it_is(way, expected):
    network, images = trained(Small(way)), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    before = network(images)
    torch.manual_seed(1)
    with folded(network, images[:1]) as count:
        assert count == expected
        torch.testing.assert_close(network(images), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["as a whole", "a part", "in place", "in DataParallel"])
def test_what_is_compiled_or_replicated_stays_as_it_is(way):
    network, images = trained(Small("plain")), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    if way == "in place":
        network.compile(backend="eager")
    elif way == "a part":
        network.norm = torch.compile(network.norm, backend="eager")
    whole = torch.compile(network, backend="eager") if way == "as a whole" else network
    whole = nn.DataParallel(network) if way == "in DataParallel" else whole
    before = whole(images)
    with folded(whole, images[:1]) as count:
        assert count == 0
    network.norm.weight.mul_(2)
    assert not torch.allclose(whole(images), before)


@pytest.mark.parametrize("name", ["first", "norm"])
@pytest.mark.parametrize("kind", ["hook", "pre hook", "forward of its own", "parametrization"])
def test_modules_that_do_more_than_their_type_says_stay_as_they_are(name, kind):
    network, images = trained(Small("plain")), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    module, seen = network.get_submodule(name), []
    if kind == "hook":
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    elif kind == "pre hook":
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    elif kind == "forward of its own":
        own = module.forward
        module.forward = lambda values: own(values) + 1
    else:
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())
    before = network(images)
    forward = vars(module).get("forward")
    with folded(network, images[:1]) as count:
        assert count == 0
        assert torch.equal(network(images), before)
    assert vars(module).get("forward") is forward
    assert all(torch.equal(seen[0], values) for values in seen if values.shape == seen[0].shape)


def test_an_error_meanwhile_leaves_nothing_behind():
    network, images = trained(Small("plain")), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt), folded(network, images[:1]):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in network.modules())


def test_ctrl_c_while_it_folds_leaves_nothing_behind(monkeypatch):
    network, images = trained(Small("plain")), torch.rand(4, 3, 8, 8, dtype=torch.float64)

    def interrupted(before, after):
        assert any("forward" in vars(module) for module in network.modules())
        raise KeyboardInterrupt

    monkeypatch.setattr(folding, "_agree", interrupted)
    with pytest.raises(KeyboardInterrupt), folded(network, images[:1]):
        pass
    assert not any("forward" in vars(module) for module in network.modules())


def test_random_numbers_of_the_network_are_drawn_as_without():
    network, images = trained(Small("noise")), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    with folded(network, images[:1]):
        assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("attack", [lambda *a: pgd(*a, eps=8 / 255, steps=10), deepfool])
def test_attacks_find_what_they_find_without(attack, monkeypatch):
    network = trained(of_timm("resnet10_cifar", channels=[8, 8, 16, 16]), torch.float32)
    model, images = PixelModel(network).eval(), torch.rand(24, 3, 32, 32)
    labels = model(images).argmax(dim=1)
    calls = []
    monkeypatch.setattr(functional, "batch_norm", counting(functional.batch_norm, calls))
    found = attack(model, images, labels)
    assert len(calls) == 24, "the first call and that which looks at the graph, twelve BatchNorms each"
    monkeypatch.setattr("timm_lowrank.evaluation.pixels.folded", lambda *_: contextlib.nullcontext(0))
    without = attack(model, images, labels)
    assert len(calls) > 48
    agree = ((found - without).abs().flatten(1).amax(dim=1) <= 1e-5).float().mean()
    assert agree >= 0.8, "what a network rounds moves few images"


def counting(function, calls):
    def counted(*arguments, **keywords):
        calls.append(1)
        return function(*arguments, **keywords)

    return counted


def test_one_call_is_that_of_the_network_itself():
    network = trained(Small("plain"), torch.float32)
    images = torch.rand(4, 3, 8, 8)
    expected = network(images.contiguous(memory_format=torch.channels_last))
    with attackable(network, many=True) as logits_of:
        assert torch.equal(logits_of(images), expected)
        assert "forward" in vars(network.norm), "the next ones are folded"
    with attackable(network) as logits_of:
        assert torch.equal(logits_of(images), expected)
        assert "forward" not in vars(network.norm)
