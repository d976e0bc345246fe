"""The CIFAR networks: sizes counted by hand, timm's interface, and the way through timm's Hub layout."""

import json
import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import timm_lowrank as tlr
from timm_lowrank.networks import CifarResNet

NAMES = ["resnet10_cifar", "resnet18_cifar", "resnet50_cifar", "vgg19_bn_cifar"]
RESNETS = NAMES[:3]
# keyword arguments that make a network cheap, and still go through every argument of its own
SMALL = {
    "resnet10_cifar": {"channels": [8, 12, 16, 20], "stem_stride": 2},
    "resnet18_cifar": {"channels": [8, 8, 16, 16], "stem_channels": 6},
    "resnet50_cifar": {"channels": [4, 4, 8, 8]},
    "vgg19_bn_cifar": {"hidden_size": 24, "drop_rate": 0.25, "width": 0.0625},
}


def images(batch=2, channels=3, size=32, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def build(name, **kwargs):
    """A network with fixed random weights and, where the architecture zeroes them, random last norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, **kwargs)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def numbers(module):
    return sum(p.numel() for p in module.parameters())


def conv(inputs, outputs, kernel):
    """Parameters of a convolution without bias and the normalisation behind it."""
    return inputs * outputs * kernel**2 + 2 * outputs


def resnet(layers, channels, classes, expansion=1, stem=None):
    """Parameters of a ResNet with a 3 x 3 stem, from the definition; blocks with `expansion` 4 are bottlenecks."""
    inputs = stem or channels[0]
    count = conv(3, inputs, 3)
    for stage, (repeats, planes) in enumerate(zip(layers, channels, strict=True)):
        outputs = planes * expansion
        for index in range(repeats):
            if expansion == 1:
                count += conv(inputs, planes, 3) + conv(planes, planes, 3)
            else:
                count += conv(inputs, planes, 1) + conv(planes, planes, 3) + conv(planes, outputs, 1)
            shortcut = (stage and not index) or inputs != outputs
            count += conv(inputs, outputs, 1) if shortcut else 0
            inputs = outputs
    return count + (inputs + 1) * classes


def test_listed_by_timm_without_pretrained_weights():
    assert set(NAMES) <= set(timm.list_models("*_cifar"))
    assert not set(NAMES) & set(timm.list_models("*_cifar", pretrained=True))
    with pytest.raises(RuntimeError, match="No pretrained weights exist for resnet10_cifar"):
        timm.create_model("resnet10_cifar", pretrained=True)


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name):
    network = build(name).eval()
    cfg = network.pretrained_cfg
    assert (cfg["architecture"], cfg["num_classes"], cfg["crop_pct"], cfg["url"]) == (name, 10, 1.0, "")
    assert (cfg["mean"], cfg["std"]) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert timm.data.resolve_data_config({}, pretrained_cfg=cfg)["input_size"] == (3, 32, 32)
    assert network.get_submodule(cfg["first_conv"]).in_channels == 3
    assert network.get_submodule(cfg["classifier"]) is network.get_classifier()
    assert network.get_classifier(name_only=True) == cfg["classifier"]
    with torch.no_grad():
        features = network.forward_features(images(1))
    assert tuple(features.shape) == (1, network.num_features, *cfg["pool_size"])


def test_parameter_counts():
    default, narrow = (64, 128, 256, 512), (16, 32, 64, 128)
    count = {name: numbers(timm.create_model(name, device="meta")) for name in NAMES}
    assert count["resnet10_cifar"] == resnet((1, 1, 1, 1), narrow, 10)
    assert count["resnet18_cifar"] == resnet((2, 2, 2, 2), default, 10) == 11_173_962
    assert count["resnet50_cifar"] == resnet((3, 4, 6, 3), default, 10, expansion=4) == 23_520_842
    widths = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
    convolutions = sum(conv(a, b, 3) + b for a, b in pairwise(widths))  # with biases
    assert count["vgg19_bn_cifar"] == convolutions + 2 * (512 * 512 + 512) + 513 * 10


def test_vgg_is_vgg19_with_three_fully_connected_layers():
    network = timm.create_model("vgg19_bn_cifar", device="meta")
    kinds = [type(module) for module in network.features]
    assert [kinds.count(kind) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)] == [16, 16, 5]
    assert kinds[-1] is nn.MaxPool2d
    hidden = [type(m) for m in network.pre_logits.children()]
    assert hidden == [nn.Conv2d, nn.ReLU, nn.Dropout, nn.Conv2d, nn.ReLU]
    assert network.pre_logits.drop.p == network.head.drop.p == 0.5
    assert network.pre_logits.fc1.kernel_size == network.pre_logits.fc2.kernel_size == (1, 1)


@pytest.mark.parametrize(("name", "width"), [("resnet18_cifar", 16_384), ("resnet50_cifar", 65_536)])
def test_features_before_the_last_stage(name, width):
    network = build(name, features_only=True, out_indices=(3,)).eval()
    with torch.no_grad():
        (features,) = network(images(1))
    assert features.flatten(1).shape == (1, width)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_feature_info_is_what_the_features_are(name, stem_stride):
    options = SMALL[name] | ({} if name == "vgg19_bn_cifar" else {"stem_stride": stem_stride})
    network = build(name, features_only=True, **options).eval()
    with torch.no_grad():
        features = network(images(1))
    info = network.feature_info
    assert [tuple(f.shape) for f in features] == [
        (1, c, 32 // r, 32 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    plain = build(name, **options).eval()
    with torch.no_grad():
        named, _ = plain.forward_intermediates(images(1))
        torch.testing.assert_close(features[-1], named)
    assert all(module in dict(plain.named_modules()) for module in info.module_name())


def test_lowrank_stage_of_vgg_is_the_input_of_its_first_fully_connected_layer():
    network = build("vgg19_bn_cifar").eval()
    seen = {}
    network.get_submodule(network.lowrank_stage).register_forward_hook(lambda m, a, out: seen.update(out=out))
    network.pre_logits.fc1.register_forward_pre_hook(lambda m, args: seen.update(fc=args[0]))
    with torch.no_grad():
        network(images(3))
    assert seen["out"].data_ptr() == seen["fc"].data_ptr()
    assert seen["out"].flatten(1).shape == (3, 512)
    assert not hasattr(build("resnet10_cifar"), "lowrank_stage")  # the generic rule is right there


def test_presets_have_the_ranks_of_the_paper():
    """100 before fully connected layers, also where "2-LR" finds one in the place of a stage."""
    network = build("vgg19_bn_cifar", width=1, hidden_size=512)
    model = tlr.wrap(network, tlr.LowRankConfig(branches="2-LR"))
    assert [branch.rank for branch in model.branches.values()] == [100, 100]
    narrow = build("vgg19_bn_cifar", hidden_size=128)
    with pytest.warns(UserWarning, match="rank 100 is more than half of the 128 features of 'pre_logits'"):
        tlr.wrap(narrow, tlr.LowRankConfig(branches="1-LR"))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name):
    network = build(name, **SMALL[name])
    for batch, training in ((1, False), (2, True)):
        network.train(training).zero_grad()
        logits = network(images(batch))
        assert logits.shape == (batch, 10)
        assert logits.isfinite().all()
        nn.functional.cross_entropy(logits, torch.arange(batch)).backward()
        gradients = {key: p.grad for key, p in network.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        assert gradients["features.0.weight" if "vgg" in name else "conv1.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_head_and_pre_logits(name):
    network = build(name, **SMALL[name]).eval()
    x = images()
    with torch.no_grad():
        features = network.forward_features(x)
        hidden = network.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, network.head_hidden_size)
        torch.testing.assert_close(network.get_classifier()(hidden), network(x))
        network.reset_classifier(7)
        assert network(x).shape == (2, 7)
        assert network.num_classes == 7
        network.reset_classifier(0)
        torch.testing.assert_close(network(x), hidden)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    gradients, calls = [], []
    for enable in (False, True):
        network = build(name, **{**SMALL[name], "drop_rate": 0.0}).double()
        network.set_grad_checkpointing(enable)
        count = []
        last = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        last.register_forward_hook(lambda *_, count=count: count.append(1))
        network(images().double()).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]  # recomputed in the backward pass
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("size", [8, 28])
def test_resnet10_on_small_grey_images(size, stem_stride):
    network = build("resnet10_cifar", in_chans=1, stem_stride=stem_stride)
    assert network.conv1.weight.shape == (16, 1, 3, 3)
    side = math.ceil(math.ceil(size / stem_stride) / 8)
    assert network.forward_features(images(2, 1, size)).shape == (2, 128, side, side)


def test_widths_and_stem_of_resnet10():
    network = build("resnet10_cifar", channels=(8, 12, 16, 20), stem_channels=10, num_classes=3)
    assert numbers(network) == resnet((1, 1, 1, 1), (8, 12, 16, 20), 3, stem=10)
    assert [info["num_chs"] for info in network.feature_info] == [10, 8, 12, 16, 20]


@pytest.mark.parametrize(("output_stride", "side"), [(2, 16), (4, 8), (8, 4), (32, 4)])
def test_output_stride_counts_from_the_image(output_stride, side):
    network = build("resnet10_cifar", output_stride=output_stride).eval()
    with torch.no_grad():
        assert network.forward_features(images(1)).shape[-1] == side
    assert network.feature_info[-1]["reduction"] == 32 // side


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_hub_layout_round_trip(name, in_chans, tmp_path):
    network = build(name, num_classes=6, in_chans=in_chans, **SMALL[name])
    network(images(4, in_chans))  # moves the running statistics away from their start
    network.eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    needed = {key: value for key, value in SMALL[name].items() if key != "drop_rate"}  # not part of the weights
    assert needed.items() <= config["model_args"].items()
    assert config["pretrained_cfg"]["input_size"] == [in_chans, 32, 32]
    del config["model_args"]["num_classes"]  # it is also a key of the root, and transformers would pass it twice
    path.write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(network)
    with torch.no_grad():
        x = images(3, in_chans, seed=1)
        assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (16, 32, 64)}, "four stages"),
        ({"channels": ()}, "four stages"),
        ({"channels": (15, 32, 64, 64)}, "even number of channels"),
        ({"stem_channels": 0}, "even number of channels"),
        ({"stem_stride": 3}, "stem_stride must be 1 or 2"),
        ({"stem_type": "deep"}, "set stem_channels and stem_stride"),
        ({"output_stride": 3}, "output_stride must be one of 2, 4, 8"),
        ({"output_stride": 2, "stem_stride": 2}, "output_stride must be one of 4, 8, 16"),
    ],
)
def test_networks_that_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("resnet10_cifar", **options)


def test_widths_do_not_leak_into_timm():
    """timm's own ResNet keeps its stem: the subclass edits instances, never the class."""
    network = timm.create_model("resnet18", device="meta")
    assert not isinstance(network, CifarResNet)
    assert network.conv1.kernel_size == (7, 7)
    assert isinstance(network.maxpool, nn.MaxPool2d)
