"""`Embedder`: a layer's leading coordinates as the output of the plain network."""

import copy
import io
import math

import pytest
import timm
import torch
from torch import nn

import timm_lowrank as tlr


class Network(nn.Module):
    """Two hidden layers; nothing in it depends on the batch."""

    def __init__(self):
        super().__init__()
        self.num_classes = 10
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.GELU())
        self.second = nn.Sequential(nn.Linear(48, 32), nn.GELU())
        self.fc = nn.Linear(32, 10)

    def forward(self, images):
        return self.fc(self.second(self.first(images)))


def trained(digits, network=None, branches=None, learning_rate=0.05, head_weight=1.0, **settings):
    """A model after 40 updates on the digits."""
    torch.manual_seed(0)
    config = tlr.LowRankConfig(
        branches=branches or {"second": 6}, warmup_updates=5, head_weight=head_weight, **settings
    )
    model = tlr.wrap(network or Network(), config, example_input=digits[0][:2]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    tlr.attach(optimizer, model)
    for step in range(40):
        images, labels = (some[32 * step : 32 * step + 32] for some in digits)
        (nn.functional.cross_entropy(model(images), labels) + model.penalty(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model(digits):
    return trained(digits)


def inside(model, images):
    """The activations of "second" less their centre, projected on the range of W by its eigenvectors, in float64."""
    branch = model.branches["second"]
    values, vectors = torch.linalg.eigh(branch.dense_weight().double())
    span = vectors[:, values.abs().argsort(descending=True)[: branch.rank]]
    with model.capture() as seen, torch.no_grad():
        model(images)
    return (seen["second"].double() + branch.bias.double()) @ span @ span.T


@pytest.mark.parametrize("settings", [{}, {"head_weight": 0.0}, {"storage": "dense"}], ids=["head", "none", "dense"])
def test_all_numbers_are_the_activations_inside_the_subspace(digits, settings):
    model, images = trained(digits, **settings), digits[0][:50]
    embedded = tlr.Embedder(model)(images).double()
    expected = inside(model, images)
    assert embedded.shape == (50, 6)
    torch.testing.assert_close(torch.cdist(embedded, embedded), torch.cdist(expected, expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embedded.norm(dim=1), expected.norm(dim=1), atol=1e-4, rtol=1e-4)  # the origin is -b


@pytest.mark.parametrize("given", ["tensor", "batches", "loader"])
def test_of_images_the_numbers_are_their_principal_components(model, digits, given):
    images = digits[0][:300]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, digits[1][:300]), batch_size=64)
    embed = tlr.Embedder(model, images={"tensor": images, "batches": images.split(77), "loader": loader}[given])
    with torch.no_grad():
        embedded = embed(images).double()
    left, sizes, _ = torch.linalg.svd(inside(model, images) - inside(model, images).mean(dim=0), full_matrices=False)
    expected = left[:, :6] * sizes[:6]
    torch.testing.assert_close(embedded.abs(), expected.abs(), atol=1e-4, rtol=1e-3)  # signs are arbitrary
    torch.testing.assert_close(embed.variance.double(), sizes[:6].square() / 300, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fitted", [False, True])
def test_the_first_numbers_are_a_smaller_embedding(model, digits, fitted):
    images = digits[0][:40] if fitted else None
    whole = tlr.Embedder(model, "second", images=images)
    for size in range(1, 7):
        small = tlr.Embedder(model, "second", size, images=images)
        assert small.directions.shape == (size, 32)
        assert small.variance is None if not fitted else small.variance.shape == (size,)
        torch.testing.assert_close(small(digits[0][:9]), whole(digits[0][:9])[:, :size])


def test_directions_of_a_head_come_in_the_order_of_the_variance(digits):
    model = trained(digits, branches={"second": 12}, head_sizes=[4])
    embed = tlr.Embedder(model)
    torch.testing.assert_close(embed.directions @ embed.directions.T, torch.eye(12), atol=1e-4, rtol=0)
    with torch.no_grad():
        variance = embed(digits[0][:1000]).var(dim=0)
        best = tlr.Embedder(model, images=digits[0][:1000])(digits[0][:1000]).var(dim=0)
    assert (variance[:3] > variance[1:4]).all()
    assert variance[:4].sum() > 0.9 * best[:4].sum()  # of other images than those that the head saw last


def test_tokens_keep_their_places(digits):
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=10
    )
    model = trained(digits, network, {"blocks.0": 5}, learning_rate=0.005)
    embed = tlr.Embedder(model, images=digits[0][:64].split(16))
    numbers = embed(digits[0][:7])
    assert numbers.shape == (7, 17, 5)
    alone = torch.cat([embed(image[None]) for image in digits[0][:7]])
    torch.testing.assert_close(numbers, alone, atol=1e-5, rtol=1e-5)
    pooled = trained(
        digits, copy.deepcopy(network), {"blocks.0": {"rank": 5, "view": "pool"}}, learning_rate=0.005, head_weight=0.0
    )
    assert tlr.Embedder(pooled)(digits[0][:7]).shape == (7, 5)
    single = nn.Sequential(nn.Conv2d(1, 12, 8), nn.Flatten(), nn.Linear(12, 10))  # one position an image
    one = trained(digits, single, {"0": {"rank": 4, "view": "token"}}, learning_rate=0.005)
    assert tlr.Embedder(one)(digits[0][:7]).shape == (7, 1, 4)


def test_it_is_a_module_like_others(model, digits):
    images = digits[0][:6]
    embed = tlr.Embedder(model, size=3, images=digits[0][:100]).eval()
    expected = embed(images)
    pixels = images.clone().requires_grad_()
    embed(pixels).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    torch.testing.assert_close(copy.deepcopy(embed)(images), expected)
    file = io.BytesIO()
    torch.save(embed.state_dict(), file)
    file.seek(0)
    other = tlr.Embedder(trained(digits), size=3)
    other.load_state_dict(torch.load(file, weights_only=True), strict=False)
    torch.testing.assert_close(other(images), expected)
    torch.testing.assert_close(torch.compile(embed, backend="eager", fullgraph=True)(images), expected)
    exported = torch.export.export(embed, (images,)).module()
    torch.testing.assert_close(exported(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05 * float(expected.detach().abs().max()), rtol=0.05)
    assert copy.deepcopy(embed).double()(images.double()).dtype == torch.float64


def test_the_model_is_left_as_it_was_and_trains_on(digits):
    model = trained(digits).train()
    model.backbone.first.eval()  # a frozen part
    images, labels = digits[0][:8], digits[1][:8]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embed = tlr.Embedder(model, images=digits[0][:50])
    assert embed.network is model.backbone
    assert model.training
    assert not model.backbone.first.training
    assert embed.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen = embed(images)
    model(images)
    model.penalty(labels)
    model.update()
    torch.testing.assert_close(embed(images), seen)  # its directions are a copy


def test_it_reads_what_was_saved_and_loaded(model, digits, tmp_path):
    tlr.save_pretrained(trained(digits, timm.create_model("resnet10_cifar", channels=[8, 8, 8, 16], in_chans=1,
                        num_classes=10), {"pre_logits": 4}), tmp_path / "model")  # fmt: skip
    loaded = tlr.from_pretrained(tmp_path / "model")
    again = tlr.from_pretrained(tmp_path / "model")
    images = digits[0][:5]
    torch.testing.assert_close(tlr.Embedder(loaded.eval())(images), tlr.Embedder(again.eval(), "pre_logits", 4)(images))


def test_what_cannot_be_embedded_says_why(model, digits):
    with pytest.raises(TypeError, match="Network: a network without branches"):
        tlr.Embedder(Network())
    with pytest.raises(ValueError, match=r"no branch on 'third'\. The branches are on 'second'"):
        tlr.Embedder(model, "third")
    two = trained(digits, branches={"first": 4, "second": 4})
    with pytest.raises(ValueError, match=r"of which layer\? .* 'first', 'second'"):
        tlr.Embedder(two)
    for size in (0, 7):
        with pytest.raises(ValueError, match=f"size {size} must lie between 1 and 6"):
            tlr.Embedder(model, size=size)
    fresh = tlr.wrap(Network(), tlr.LowRankConfig(branches={"second": 4}), example_input=digits[0][:2])
    with pytest.raises(ValueError, match="before its first projection: train it first"):
        tlr.Embedder(fresh)
    with pytest.raises(ValueError, match=r"which 3 of the 4 .* \(without a subspace head\): give images"):
        tlr.Embedder(trained(digits, branches={"second": 4}, head_weight=0.0), size=3)
    with pytest.raises(ValueError, match=r"which 3 of the 4 .* reads 2 leading directions\): give images"):
        tlr.Embedder(trained(digits, branches={"second": 4}, head_sizes=[2]), size=3)
    for too_few in ([], digits[0][:1]):
        with pytest.raises(ValueError, match="at least 2 images"):
            tlr.Embedder(model, images=too_few)
    with pytest.raises(TypeError, match=r"batches of images, .* not a dict: .*batch\[\"pixel_values\"\]"):
        tlr.Embedder(model, images=[{"pixel_values": digits[0][:9]}])
    broken = digits[0][:9].clone()
    broken[3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite values for some of the images"):
        tlr.Embedder(model, images=broken)


def test_states_with_and_without_variances_fit_each_other(model, digits):
    """The variance is there only where images were given: an embedder is loaded into one that was built without."""
    images = digits[0][:64]
    of_images, as_trained = tlr.Embedder(model, size=4, images=images), tlr.Embedder(model, size=4)
    expected = {one: (one(images), one.variance) for one in (of_images, as_trained)}
    for source, target in [(of_images, tlr.Embedder(model, size=4)), (as_trained, copy.deepcopy(of_images))]:
        target.load_state_dict(source.state_dict())
        numbers, variance = expected[source]
        assert torch.equal(target(images), numbers)
        assert torch.equal(target.variance, variance) if variance is not None else target.variance is None


def test_a_size_that_is_no_integer_is_refused(model):
    with pytest.raises(TypeError, match="an integer"):
        tlr.Embedder(model, size=2.0)
