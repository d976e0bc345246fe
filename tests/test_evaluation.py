"""Pixels and noise."""

import pytest
import timm
import torch

import timm_lowrank as tlr
from timm_lowrank.evaluation import PixelModel, pixel_noise, predictions


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


def test_a_pixel_model_returns_float32_logits(network):
    half = timm.create_model("resnet10_cifar", num_classes=10, channels=(8, 8, 8, 8)).eval().bfloat16()
    model = PixelModel(half)
    assert model(torch.rand(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 32, 32) * 255, r"must lie in \[0, 1\]"),
        (torch.randn(2, 3, 32, 32).clamp(-1, 1), r"must lie in \[0, 1\]"),
        (torch.randint(255, (2, 3, 32, 32)), "divide by 255"),
    ],
)
def test_a_pixel_model_refuses_what_is_no_pixel(network, images, message):
    with pytest.raises(ValueError, match=message):
        PixelModel(network)(images)


def test_a_pixel_model_needs_to_know_the_normalisation():
    with pytest.raises(ValueError, match="pass mean and std"):
        PixelModel(torch.nn.Conv2d(3, 2, 3))


def test_predictions_do_not_depend_on_the_batch_size(network):
    images = torch.rand(7, 3, 32, 32)
    model = PixelModel(network).train()
    assert torch.equal(predictions(model, images, batch_size=3), predictions(model, images, batch_size=7))
    assert model.training
    network.eval()
    model = PixelModel(network)
    predictions(model, images)
    assert not network.training  # a network in eval mode stays there


def test_pixel_noise_hits_the_share_of_pixels_that_it_is_told_to():
    images = torch.full((20, 3, 32, 32), 0.5)
    noisy = pixel_noise(images, 0.4, sigma=0.05, generator=torch.Generator().manual_seed(0))
    hit = (noisy != images).any(dim=1)
    assert hit.float().mean().item() == pytest.approx(0.4, abs=0.01)
    changed = (noisy - images)[hit[:, None].expand_as(images)]
    assert changed.std().item() == pytest.approx(0.05, rel=0.02)  # three channels hit together, each with its own value
    together = pixel_noise(images, 1.0, sigma=0.05, per_channel=False, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together[:, 0], together[:, 2])


def test_pixel_noise_stays_in_the_box_and_repeats():
    images = torch.rand(5, 1, 8, 8)
    first, second = (pixel_noise(images, 1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(pixel_noise(images, 0.0), images)


@pytest.mark.parametrize("options", [{"probability": 1.5}, {"probability": 0.5, "sigma": -1.0}])
def test_pixel_noise_refuses_impossible_settings(options):
    with pytest.raises(ValueError, match="probability"):
        pixel_noise(torch.rand(1, 1, 2, 2), **options)
