"""Pixels and noise."""

import copy
import math

import pytest
import timm
import torch

import timm_lowrank as tlr
from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation import PixelModel, classified_right, predictions
from timm_lowrank.evaluation.attacks import fgsm
from timm_lowrank.evaluation.maxmargin import HybridModel, MaxMarginClassifier
from timm_lowrank.evaluation.noise import NOISE_READINGS, STANDARD_DEVIATION, VARIANCE, pixel_noise
from timm_lowrank.integrations.transformers_models import as_transformers
from timm_lowrank.training.report import layer_spectra


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet10_cifar", num_classes=10, channels=(8, 8, 8, 8)).eval()


def test_a_pixel_model_normalises_inside(network):
    images = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(network.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    expected = network((images - mean) / std)
    assert torch.equal(PixelModel(network)(images), expected)
    wrapped = tlr.wrap(network, tlr.LowRankConfig(branches={"pre_logits": 2}))
    assert torch.equal(PixelModel(wrapped)(images), expected)
    assert PixelModel(network).state_dict().keys() == {f"network.{key}" for key in network.state_dict()}
    assert PixelModel(copy.deepcopy(network).bfloat16())(images).dtype == torch.float32
    with pytest.raises(ValueError, match="pass mean and std"):
        PixelModel(torch.nn.Conv2d(3, 2, 3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 32, 32) * 255, r"must lie in \[0, 1\]"),
        (torch.randn(2, 3, 32, 32).clamp(-1, 1), r"must lie in \[0, 1\]"),
        (torch.full((2, 3, 32, 32), torch.nan), r"must lie in \[0, 1\]"),
        (torch.rand(2, 1, 32, 32), r"\(batch, 3, height, width\), one channel for each number in mean and std"),
        (torch.randint(255, (2, 3, 32, 32)), "divide by 255"),
    ],
)
def test_a_pixel_model_refuses_what_is_no_pixel(network, images, message):
    with pytest.raises(ValueError, match=message):
        PixelModel(network)(images)


@pytest.mark.parametrize(
    ("mean", "std"), [((123.7, 116.3, 103.5), (0.2,) * 3), ((0.5,) * 3, (58.4,) * 3), ((torch.nan,) * 3, (0.2,) * 3)]
)
def test_statistics_of_another_scale(network, mean, std):
    with pytest.raises(ValueError, match=r"must be of pixels in \[0, 1\]: divide what is in 0 to 255 by 255"):
        PixelModel(network, mean, std)


def test_predictions_are_those_of_eval_mode_in_any_batch(network):
    images = torch.rand(7, 3, 32, 32)
    model = PixelModel(network)
    with torch.no_grad():
        expected = model(images).argmax(dim=1)
    model.train()
    network.layer1.eval()
    modes = [module.training for module in model.modules()]
    for batch_size in (3, 7, 500):
        assert torch.equal(predictions(model, images, batch_size), expected)
    assert [module.training for module in model.modules()] == modes
    network.eval()
    labels = torch.where(torch.arange(7) < 4, expected, (expected + 1) % 10)
    assert classified_right(model, images, labels, 3).tolist() == [True] * 4 + [False] * 3
    assert predictions(model, images[:0]).shape == (0,)
    with pytest.raises(EvaluationError, match="7 images need as many labels"):
        classified_right(model, images, labels[1:])
    with pytest.raises(EvaluationError, match=r"labels must lie in 0\.\.9"):
        classified_right(model, images, labels + 10)


def looks_at(network, images):
    """What reads a network and is not to change it."""
    config = tlr.LowRankConfig(branches={"layer3": 2, "pre_logits": 2})
    wrapped = tlr.wrap(network, config, example_input=images)
    yield "wrap", lambda: tlr.wrap(network, config, example_input=images)
    yield "PixelModel", lambda: PixelModel(network)
    yield "predictions", lambda: predictions(PixelModel(network), images)
    yield "attack", lambda: fgsm(PixelModel(network), images, torch.arange(4), eps=0.1)
    yield "list_layers", lambda: tlr.list_layers(network)
    yield "layer_spectra", lambda: layer_spectra(wrapped, [(images, None)], None)
    classifier = MaxMarginClassifier(torch.zeros(8, 10).double(), torch.zeros(10).double(), None)
    yield "HybridModel", lambda: HybridModel(PixelModel(network), "pre_logits", classifier, images)
    yield "as_transformers", lambda: as_transformers(network)


@pytest.mark.parametrize("training", [True, False])
def test_a_look_at_a_network_leaves_the_mode_of_each_module(network, training):
    """A BatchNorm that is frozen stays so, and what is built around the network has the network's own mode."""
    network = copy.deepcopy(network).train(training)
    network.bn1.train(not training)
    modes = {name: module.training for name, module in network.named_modules()}
    for name, look in looks_at(network, torch.rand(4, 3, 32, 32)):
        built = look()
        assert {key: module.training for key, module in network.named_modules()} == modes, name
        if isinstance(built, torch.nn.Module):
            assert built.training is training, name


def test_pixel_noise_hits_the_share_of_pixels_that_it_is_told_to():
    images = torch.full((20, 3, 32, 32), 0.5)
    noisy = pixel_noise(images, 0.4, sigma=0.05, generator=torch.Generator().manual_seed(0))
    hit = (noisy != images).any(dim=1)
    assert hit.float().mean().item() == pytest.approx(0.4, abs=0.01)
    changed = (noisy - images)[hit[:, None].expand_as(images)]
    assert changed.std().item() == pytest.approx(0.05, rel=0.02)  # three channels hit together, each with its own value


def test_the_readings_of_the_noise_are_what_their_names_say():
    images = torch.full((200, 3, 8, 8), 0.5, dtype=torch.float64)
    assert set(NOISE_READINGS) >= {STANDARD_DEVIATION.name, VARIANCE.name}
    assert len(NOISE_READINGS) == 8
    std = torch.tensor([0.2, 0.3, 0.4])
    for name, reading in NOISE_READINGS.items():
        noisy = pixel_noise(
            images,
            1.0,
            sigma=reading.sigma,
            per_channel=reading.per_channel,
            std=std if reading.unit == "normalized" else None,
            generator=torch.Generator().manual_seed(0),
        )
        assert ("normalised" in name) == (reading.unit == "normalized")
        sigma = 128 / 255 if "standard" in name else (128 / 255) ** 0.5
        for channel, unit in enumerate(std.tolist() if "normalised" in name else [1.0] * 3):
            # Clipping at 0 and 1 hides the spread; the share that reaches neither end gives it away.
            inside = math.erf(0.5 / (sigma * unit) / 2**0.5)
            values = noisy[:, channel]
            assert ((values > 0) & (values < 1)).double().mean().item() == pytest.approx(inside, abs=0.015)
        drawn = (noisy - images) / (std if "normalised" in name else torch.ones(3)).view(1, 3, 1, 1)
        free = (noisy[:, :2] > 0) & (noisy[:, :2] < 1)
        both = free.all(dim=1)
        assert torch.allclose(drawn[:, 0][both], drawn[:, 1][both]) == ("together" in name)


def test_pixel_noise_stays_in_the_box_and_follows_its_generator_alone(random_stream):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = (pixel_noise(images, 0.6, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    options = {"sigma": STANDARD_DEVIATION.sigma, "per_channel": STANDARD_DEVIATION.per_channel}
    named = pixel_noise(images, 0.6, **options, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, second)
    assert torch.equal(first, named), "the default is the first reading"
    assert first.min() >= 0
    assert first.max() <= 1
    assert random_stream()


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {"probability": -0.1}, "probability"),
        (1, {"probability": 1.1}, "probability"),
        (1, {"probability": 0.5, "sigma": -1.0}, "sigma"),
        (1, {"probability": 0.5, "sigma": math.nan}, "sigma"),
        (0, {"probability": 0.5}, "no images"),
        (1, {"probability": 0.5, "std": torch.tensor([0.2, 0.2])}, "std must be 1 positive numbers"),
        (1, {"probability": 0.5, "std": torch.tensor([0.0])}, "std must be 1 positive numbers"),
    ],
)
def test_pixel_noise_refuses_impossible_settings(count, options, message):
    with pytest.raises(EvaluationError, match=message):
        pixel_noise(torch.zeros(count, 1, 2, 2), **options)
