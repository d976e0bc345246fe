"""The mistakes that are looked for before an attack, and the state that a network is in during one."""

import contextlib
import warnings

import pytest
import torch
from attacked import Around, noisy, trained
from torch import nn

import timm_lowrank as tlr
from timm_lowrank.errors import EvaluationError, EvaluationWarning
from timm_lowrank.evaluation import PixelModel
from timm_lowrank.evaluation.checks import check_before_attack
from timm_lowrank.evaluation.pixels import attackable, bare, random_state_kept


@pytest.fixture
def net(small_net, digits):
    return trained(small_net, digits)


@pytest.fixture
def batch(digits):
    return digits[0][-64:], digits[1][-64:]


def suspicions(model, images, labels, **settings):
    """What is said of a network, having checked that each sentence is a warning too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sentences = check_before_attack(model, images, labels, **settings)
    texts = [str(warning.message) for warning in caught if warning.category is EvaluationWarning]
    assert texts == sentences
    assert all(warning.filename == __file__ for warning in caught if warning.category is EvaluationWarning)
    return sentences


# ---- nothing to say ----


def test_a_sound_network_raises_no_suspicion(net, batch, random_stream):
    assert suspicions(net, *batch, classes=10) == []
    assert suspicions(PixelModel(net, mean=(0.0,), std=(1.0,)), *batch) == []
    assert suspicions(net, batch[0][:1], batch[1][:1]) == []
    assert suspicions(net, batch[0][:5], (batch[1][:5] + 1) % 10) == [], "too few to tell"
    assert suspicions(Around(net, after=nn.LogSoftmax(dim=1)).eval(), *batch) == []
    assert random_stream()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


# ---- errors ----


def partly_in_train_mode(net):
    net.hidden.train()
    return net


def with_logits(change):
    return lambda net, x, y: (Around(net, after=change).eval(), x, y)


WRONG = {
    "a module in train mode": (
        lambda net, x, y: (partly_in_train_mode(net), x, y), r"train mode \(hidden\): call model.eval\(\) first"
    ),
    "train mode": (lambda net, x, y: (net.train(), x, y), r"train mode \(the model itself and \d+ more\)"),
    "probabilities": (with_logits(nn.Softmax(dim=1)), "gives probabilities: attacks need logits"),
    "nan": (
        with_logits(lambda z: torch.cat([z[:1] * torch.nan, z[1:]])), "3% of the images get logits that are NaN or inf"
    ),
    "infinite": (with_logits(lambda z: torch.cat([z[:1] + torch.inf, z[1:]])), "3% of the images get logits that are"),
    "no logits": (
        lambda net, x, y: (nn.Identity().eval(), x, y), r"must give logits \(32, classes\), not \(32, 1, 8, 8\)"
    ),
    "one class": (with_logits(lambda z: z[:, :1]), "at least two classes"),
    "levels": (lambda net, x, y: (net, x * 255, y), r"pixels must lie in \[0, 1\], these in \[0, 255\]: divide by 255"),
    "normalised": (
        lambda net, x, y: (net, (x - 0.5) / 0.25, y), r"these in \[-2, 2\].*leave the normalisation to a PixelModel"
    ),
    "pixels, nan": (lambda net, x, y: (net, torch.where(x == x.max(), torch.nan, x), y), r"must lie in \[0, 1\]"),
    "bytes": (lambda net, x, y: (net, (x * 255).byte(), y), "images must be floating point"),
    "no channels": (lambda net, x, y: (net, x[:, 0], y), r"floating point \(n, channels, height, width\)"),
    "labels of no images": (lambda net, x, y: (net, x[:0], y), "labels must be integers"),
    "no images": (lambda net, x, y: (net, x[:0], y[:0]), "there are no images to attack"),
    "labels, dtype": (lambda net, x, y: (net, x, y.float()), "labels must be integers"),
    "labels, number": (lambda net, x, y: (net, x, y[1:]), r"labels must be integers \(64,\)"),
    "one-hot": (lambda net, x, y: (net, x, nn.functional.one_hot(y)), r"integers \(64,\), one for each image"),
    "label too large": (lambda net, x, y: (net, x, y.index_fill(0, torch.tensor([63]), 10)), r"must lie in 0\.\.9"),
    "label below 0": (lambda net, x, y: (net, x, y.index_fill(0, torch.tensor([63]), -1)), r"not in -1\.\.9"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_attacked_is_an_error(name, net, batch):
    change, message = WRONG[name]
    model, images, labels = change(net, *batch)
    modes = [module.training for module in model.modules()]
    with pytest.raises(EvaluationError, match=message):
        check_before_attack(model, images, labels)
    assert [module.training for module in model.modules()] == modes


def test_another_number_of_classes_than_the_data_is_an_error(net, batch):
    with pytest.raises(EvaluationError, match="the data has 100 classes, the model gives 10"):
        check_before_attack(net, *batch, classes=100)


def test_a_timm_network_without_its_normalisation_is_an_error(digits):
    images, labels = digits[0][:4], digits[1][:4]
    model = tlr.wrap("resnet10_cifar", tlr.LowRankConfig(branches={"pre_logits": 4}), num_classes=10, in_chans=1).eval()
    network = model.unwrap()
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    assert any(mean)
    for bare_network in (network, torch.compile(network)):
        with pytest.raises(EvaluationError, match=r"wants images normalised with mean .* pass PixelModel\(network\)"):
            check_before_attack(bare_network, images, labels)
    with pytest.raises(EvaluationError, match=r"pass PixelModel\(network\)"):
        check_before_attack(model, images, labels)
    assert suspicions(PixelModel(model, mean=mean[:1], std=std[:1]), images, labels) == []


# ---- suspicions ----


def test_logits_that_depend_on_the_batch_are_noticed(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 10)).eval()
    labels = model(batch[0]).argmax(dim=1).detach()
    (text,) = suspicions(model, batch[0], labels)
    assert "with the rest of its batch" in text
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    assert suspicions(model, batch[0], model(batch[0]).argmax(dim=1).detach()) == []


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (9, "8 other classes instead of 9, so"),
        (3, "2 other classes instead of 9 and is run without apgd-t, so"),
        (2, "1 other class instead of 9 and is run without apgd-t and apgd-dlr, so"),
    ],
)
def test_fewer_than_ten_classes_are_noticed(small_net, batch, classes, says):
    torch.manual_seed(0)
    model = small_net(classes).eval()
    labels = model(batch[0]).argmax(dim=1).detach()
    (text,) = suspicions(model, batch[0], labels, classes=classes)
    assert text.startswith(f"the model has {classes} classes: AutoAttack aims at {says}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda net, x, y: (Around(net, noisy).eval(), x, y), "from one forward pass to the next"),
        (lambda net, x, y: (Around(net, noisy).eval(), x, y), 'version="rand"'),
        (lambda net, x, y: (PixelModel(net.bfloat16(), (0.0,), (1.0,)), x, y), "bfloat16: equal logits stall DeepFool"),
        (lambda net, x, y: (net, x, (y + 1) % 10), "of the first 32 images are classified correctly, no more than"),
        (lambda net, x, y: (Around(net, after=lambda logits: 20 * logits).eval(), x, y), "rounds to exactly 1 on"),
        (lambda net, x, y: (net, x / 255, net(x / 255).argmax(dim=1)), "divided by 255 twice?"),
    ],
)
def test_what_may_be_meant_is_noticed_and_draws_nothing_for_good(net, batch, change, says, random_stream):
    (text,) = suspicions(*change(net, *batch))
    assert says in text
    assert random_stream()


# ---- the state during an attack ----


def test_a_network_is_readied_for_attack_and_put_back(net, batch):
    net.hidden.train()
    net.stem[0].weight.requires_grad_(False)
    modes = {name: module.training for name, module in net.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    for fails in (False, True):
        with contextlib.suppress(KeyError), torch.no_grad(), torch.autocast("cpu"), attackable(net) as logits_of:
            assert not any(module.training for module in net.modules())
            assert not any(parameter.requires_grad for parameter in net.parameters())
            assert torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            point = batch[0].to(memory_format=torch.channels_last).requires_grad_()
            logits = logits_of(point)
            logits.sum().backward()
            assert logits.dtype == torch.float32
            assert point.grad.abs().sum() > 0
            if fails:
                raise KeyError("on the way")
        assert {name: module.training for name, module in net.named_modules()} == modes
        assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == required
        assert all(parameter.grad is None for parameter in net.parameters())
    with attackable(net.bfloat16()) as logits_of:
        assert logits_of(batch[0].bfloat16()).dtype == torch.float32


def test_the_network_inside_its_wrappers_is_found(net):
    assert bare(net) is net
    assert bare(torch.compile(net)) is net
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(net)
        assert bare(torch.compile(shared)) is net
        assert PixelModel(shared, mean=(0.0,), std=(1.0,)).network is net
    finally:
        torch.distributed.destroy_process_group()


def test_the_random_state_is_kept_after_an_error_too(random_stream):
    with pytest.raises(AttributeError), random_state_kept():
        print(torch.manual_seed(7).no_such_thing)
    assert random_stream()
