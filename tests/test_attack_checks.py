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
    assert random_stream()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


# ---- errors ----


def test_train_mode_is_an_error_that_names_the_module(net, batch):
    net.hidden.train()
    with pytest.raises(EvaluationError, match=r"train mode \(hidden\): call model.eval\(\) first"):
        check_before_attack(net, *batch)
    with pytest.raises(EvaluationError, match=r"train mode \(the model itself and \d+ more\)"):
        check_before_attack(net.train(), *batch)
    assert net.training


def test_probabilities_are_an_error(net, batch):
    with pytest.raises(EvaluationError, match="gives probabilities: attacks need logits"):
        check_before_attack(Around(net, after=nn.Softmax(dim=1)).eval(), *batch)
    assert suspicions(Around(net, after=nn.LogSoftmax(dim=1)).eval(), *batch) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"pixels must lie in \[0, 1\], these in \[0, 255\]: divide by 255"),
        (lambda x, y: ((x - 0.5) / 0.25, y), r"these in \[-2, 2\].*leave the normalisation to a PixelModel"),
        (lambda x, y: (torch.where(x == x.max(), torch.nan, x), y), r"pixels must lie in \[0, 1\]"),
        (lambda x, y: ((x * 255).byte(), y), "images must be floating point"),
        (lambda x, y: (x[:, 0], y), r"images must be floating point \(n, channels, height, width\)"),
        (lambda x, y: (x[:0], y), "labels must be integers"),
        (lambda x, y: (x[:0], y[:0]), "there are no images to attack"),
        (lambda x, y: (x, y.float()), "labels must be integers"),
        (lambda x, y: (x, y[1:]), r"labels must be integers \(64,\)"),
        (lambda x, y: (x, torch.nn.functional.one_hot(y)), r"labels must be integers \(64,\), one for each image"),
        (lambda x, y: (x, torch.cat([y[:-1], torch.tensor([10])])), r"labels must lie in 0\.\.9, the model's classes"),
        (lambda x, y: (x, torch.cat([y[:-1], torch.tensor([-1])])), r"not in -1\.\.9"),
    ],
)
def test_what_is_no_pixel_or_label_is_an_error(net, batch, change, message):
    with pytest.raises(EvaluationError, match=message):
        check_before_attack(net, *change(*batch))


def test_another_number_of_classes_than_the_data_is_an_error(net, batch):
    with pytest.raises(EvaluationError, match="the data has 100 classes, the model gives 10"):
        check_before_attack(net, *batch, classes=100)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(net, batch, value):
    def spoil(logits):
        return torch.cat([logits[:1] + value, logits[1:]])

    with pytest.raises(EvaluationError, match="3% of the images get logits that are NaN or infinite"):
        check_before_attack(Around(net, after=spoil).eval(), *batch)


def test_what_gives_no_logits_is_an_error(small_net, batch):
    with pytest.raises(EvaluationError, match=r"must give logits \(32, classes\), not \(32, 1, 8, 8\)"):
        check_before_attack(nn.Identity().eval(), *batch)
    with pytest.raises(EvaluationError, match="at least two classes"):
        check_before_attack(small_net(1).eval(), batch[0], batch[1] * 0)


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


def test_noise_in_the_network_is_noticed_and_draws_nothing_for_good(net, batch, random_stream):
    (text,) = suspicions(Around(net, noisy).eval(), *batch)
    assert "from one forward pass to the next" in text
    assert 'version="rand"' in text
    assert random_stream()


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


def test_half_precision_is_noticed(net, batch):
    model = PixelModel(net.bfloat16(), mean=(0.0,), std=(1.0,))
    (text,) = suspicions(model, *batch)
    assert "are bfloat16: equal logits stall DeepFool" in text


def test_an_accuracy_of_chance_is_noticed(net, batch):
    (text,) = suspicions(net, batch[0], (batch[1] + 1) % 10)
    assert "of the first 32 images are classified correctly, no more than chance" in text
    assert suspicions(net, batch[0][:5], (batch[1][:5] + 1) % 10) == [], "too few to tell"


def test_images_divided_by_255_twice_are_noticed(net, batch):
    assert any("divided by 255 twice?" in text for text in suspicions(net, batch[0] / 255, batch[1]))


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
