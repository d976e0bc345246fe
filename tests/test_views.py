"""What counts as one sample of a layer."""

import pytest
import timm
import torch
from torch import nn

import timm_lowrank as tlr
from timm_lowrank import CaptureError, LowRankBranch, LowRankConfig, list_layers
from timm_lowrank.core.capture import Tap
from timm_lowrank.core.views import VIEWS, View
from timm_lowrank.layers import natural_view, rows_of_images

SMALL_SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}


def config(layer, view=None, **values):
    return LowRankConfig(branches={layer: {"rank": 3, "view": view}}, **values)


def vit(view=None, **options):
    return tlr.wrap("test_vit", config("blocks.1", view), img_size=32, **options)


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((3, 5, 2, 4), 1), ((3, 2, 4, 5), -1), ((3, 7, 5), 2), ((3, 5, 7), 1), ((3, 2, 4, 6, 5), 4)],
)
def test_rows_are_images_positions_or_means_over_positions(shape, channel_dim):
    activations = values(*shape)
    channels_last = activations.movedim(channel_dim, -1)
    positions = channels_last.reshape(-1, 5)
    tokens = View("token", channel_dim).rows(activations)
    assert torch.equal(tokens, positions), "of one image after those of another"
    pooled = torch.stack([image.reshape(-1, 5).mean(dim=0) for image in channels_last])
    assert torch.allclose(View("pool", channel_dim).rows(activations), pooled)
    assert torch.equal(View("flatten", channel_dim).rows(activations), activations.reshape(3, -1))
    for kind, width in (("token", 5), ("pool", 5), ("flatten", activations[0].numel())):
        assert View(kind, channel_dim).width(activations) == width


@pytest.mark.parametrize("kind", VIEWS)
def test_features_without_positions_are_the_same_in_every_view(kind):
    activations = values(4, 6)
    assert torch.equal(View(kind, -1).rows(activations), activations)
    assert View(kind, -1).width(activations) == 6


def test_the_mean_over_many_tokens_beside_padding_does_not_overflow_half_precision():
    activations, valid = torch.full((1, 400, 5), 200.0).half(), torch.arange(400)[None] < 350
    assert torch.equal(View("pool", -1).rows(activations, valid), torch.full((1, 5), 200.0).half())


class Signal(nn.Module):
    """A network of one-dimensional maps."""

    def __init__(self):
        super().__init__()
        self.wide, self.norm, self.classifier = nn.Conv1d(8, 24, 1), nn.BatchNorm1d(24), nn.Linear(24, 3)

    def forward(self, signals):
        return self.classifier(self.norm(self.wide(signals)).relu().mean(dim=-1))


@pytest.mark.parametrize("layer", ["wide", "norm"])
def test_one_dimensional_maps_have_their_channels_in_front(layer):
    network, signals = Signal(), torch.randn(4, 8, 6)
    assert [(one.width, one.view) for one in list_layers(network, images=signals) if one.name == layer] == [
        (24, "token")
    ]
    model = tlr.wrap(network, config(layer, head_weight=0.0), example_input=signals).train()
    assert model.branches[layer].view == View("token", 1)
    with model.capture() as seen:
        model(signals)
    rows = model.branches[layer].view.rows(seen[layer])
    assert torch.equal(rows, seen[layer].movedim(1, 2).reshape(24, 24))


class Sequences(nn.Module):
    """An encoder of sequences, with the batch first or behind the tokens."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.classifier = nn.Linear(8, 3)

    def forward(self, tokens):
        encoded = self.encoder(tokens if self.batch_first else tokens.transpose(0, 1))
        return self.classifier(encoded.mean(dim=1 if self.batch_first else 0))


@pytest.mark.parametrize("images", [1, 2, 5, 6])  # 5: as many as there are tokens
def test_a_head_wants_the_rows_image_by_image(images):
    tokens = torch.randn(images, 5, 8)
    tlr.wrap(Sequences(True), config("encoder"), example_input=tokens)
    with pytest.raises(CaptureError, match=r"what layer 'encoder' gives is not the batch .*batch_first=False"):
        tlr.wrap(Sequences(False), config("encoder"), example_input=tokens)
    model = tlr.wrap(Sequences(False), config("encoder", "token", head_weight=0.0), example_input=tokens)
    assert model.branches["encoder"].num_features == 8


class Noisy(nn.Module):
    def forward(self, values):
        return values + torch.randn_like(values)


class ByTheBatch(nn.Module):
    """Normalises over the whole batch, in eval mode too."""

    def forward(self, values):
        return (values - values.mean(dim=(0, 1))) / values.std(dim=(0, 1))


@pytest.mark.parametrize("part", [Noisy(), ByTheBatch()], ids=["noise", "the batch"])
def test_rows_that_are_not_a_matter_of_their_image_alone_come_image_by_image_all_the_same(part):
    network = nn.Sequential(nn.Linear(8, 8), part, nn.Flatten(), nn.Linear(40, 3))
    assert rows_of_images(network, [Tap("1", "1")], torch.rand(3, 5, 8)) == {"1": True}
    tlr.wrap(network, config("1"), example_input=torch.rand(3, 5, 8))


class Formatted(nn.Module):
    output_fmt = "NHWC"


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (nn.Identity(), (2, 64, 7, 7), View("flatten", 1)),
        (nn.Identity(), (2, 7, 7, 64), View("flatten", -1)),
        (nn.Identity(), (2, 7, 7, 7), View("flatten", 1)),
        (Formatted(), (2, 7, 7, 7), View("flatten", -1)),
        (Formatted(), (2, 4, 7, 9), View("flatten", -1)),
        (nn.Identity(), (2, 4, 7, 9), View("flatten", 1)),
        (Formatted(), (2, 64, 7, 7), View("flatten", 1)),
        (nn.Identity(), (2, 197, 64), View("token", -1)),
        (nn.Identity(), (2, 64), View("flatten", -1)),
    ],
)
def test_the_natural_view(network, shape, expected):
    assert natural_view(network, torch.empty(shape, device="meta")) == expected


@pytest.mark.parametrize(
    ("network", "shape", "image", "channel_dim"),
    [
        (nn.Identity(), (2, 8, 8, 16), (8, 16), 1),  # as many channels as rows
        (nn.Identity(), (2, 64, 64, 128), (127, 255), 1),
        (nn.Identity(), (2, 8, 16, 16), (8, 16), -1),  # as many channels as columns
        (Formatted(), (2, 16, 7, 16), (100, 224), 1),
        (nn.Identity(), (2, 16, 4, 5), (100, 150), 1),  # rounded
        (nn.Identity(), (2, 7, 7, 24), (64, 96), -1),  # a window
        (nn.Identity(), (2, 4, 8, 16), (8, 16), 1),  # either could be
        (Formatted(), (2, 4, 8, 16), (8, 16), -1),
    ],
)
def test_where_the_channels_are_when_images_are_not_square(network, shape, image, channel_dim):
    images = torch.empty(2, 3, *image, device="meta")
    assert natural_view(network, torch.empty(shape, device="meta"), images=images).channel_dim == channel_dim


@pytest.mark.parametrize("view", ["token", "pool"])
def test_samples_of_images_that_are_not_square(view):
    images = torch.zeros(1, 3, 128, 256)
    model = tlr.wrap("test_resnet", config("layer1", view), example_input=images)
    assert (model.taps[0].view, model.branches["layer1"].num_features) == (View(view, 1), 32)


@pytest.mark.parametrize(
    ("name", "size", "options", "layer", "kind", "width"),
    [
        ("test_vit", 32, {"img_size": 32}, "blocks.4", "token", 64),
        ("mixer_s32_224", 224, {}, "blocks.0", "token", 512),
        ("test_convnext", 64, {}, "stages.2", "flatten", 48 * 4 * 4),
        ("swin_tiny_patch4_window7_224", 64, SMALL_SWIN, "layers.2", "flatten", 96 * 4 * 4),
        ("test_efficientnet", 64, {}, "blocks.3", "flatten", 48 * 4 * 4),
    ],
)  # fmt: skip
def test_the_default_of_architectures(name, size, options, layer, kind, width):
    images = torch.zeros(2, 3, size, size)
    network = timm.create_model(name, **options)
    model = tlr.wrap(network, config(layer), example_input=images)
    (tap,) = model.taps
    assert (tap.view.kind, model.branches[layer].num_features) == (kind, width)
    info = next(info for info in list_layers(network, images=images) if info.name == layer)
    assert (info.view, info.width) == (kind, width)


def test_the_channels_of_a_swin_are_last():
    model = tlr.wrap("swin_tiny_patch4_window7_224", config("layers.2", "token"), **SMALL_SWIN)
    assert model.branches["layers.2"].num_features == 96


@pytest.mark.parametrize("kind", VIEWS)
def test_a_branch_sees_the_rows_of_its_view(kind):
    """The model's penalty and step are those of a branch that is fed the rows by hand."""
    images = torch.randn(4, 3, 32, 32)
    model = tlr.wrap("test_resnet", config("layer2", kind, warmup_updates=0, project_every=2), example_input=images)
    model.train()
    branch = model.branches["layer2"]
    twin = LowRankBranch(branch.num_features, 3, branch.config)
    for _ in range(3):
        with model.capture() as seen:
            model(images)
        loss = model.penalty()
        rows = View(kind, 1).rows(seen["layer2"])
        assert torch.equal(loss, twin.penalty(rows))
        (gradient,) = torch.autograd.grad(loss, seen["layer2"])
        assert gradient.shape == seen["layer2"].shape
        model.update()
        twin.update()
    assert torch.equal(branch.dense_weight(), twin.dense_weight())
    assert float(branch.dense_weight().norm()) > 0


class Windows(nn.Module):
    """Cuts maps into windows, as attention in windows does: the first dimension is not the batch any more."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).unflatten(2, (2, -1)).movedim(1, -1).flatten(0, 1)  # (batch x 2, ..., channels)
        x = self.inner(x)
        return self.head(x.unflatten(0, (-1, 2)).flatten(1, -2).mean(dim=1))


def test_positions_of_windows_are_samples_and_windows_are_no_images():
    images = torch.randn(3, 3, 16, 16)
    with pytest.raises(tlr.CaptureError, match=r"first dimension is not the batch.*or the view .token"):
        tlr.wrap(Windows(), LowRankConfig(branches={"inner": 2}), example_input=images)
    config = LowRankConfig(branches={"inner": {"rank": 2, "view": "token", "channel_dim": -1}})
    model = tlr.wrap(Windows(), config, example_input=images).train()
    model(images)
    assert model.penalty().requires_grad
    assert model.branches["inner"].num_features == 8


class Transposed(nn.Module):
    """Channels before tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.tokens = nn.Flatten(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.tokens(self.stem(x)).mean(dim=2))


@pytest.mark.parametrize(("channel_dim", "width"), [(1, 8), (-1, 16)])
def test_the_channels_can_be_named(channel_dim, width):
    options = {"rank": 2, "view": "token", "channel_dim": channel_dim}
    images = torch.zeros(3, 3, 16, 16)
    model = tlr.wrap(Transposed(), LowRankConfig(branches={"tokens": options}), example_input=images)
    assert model.branches["tokens"].num_features == width
    wrong = LowRankConfig(branches={"tokens": {"rank": 2, "channel_dim": 3}})
    with pytest.raises(ValueError, match=r"channel_dim=3 is outside the 3 dimensions of \(3, 8, 16\)"):
        tlr.wrap(Transposed(), wrong, example_input=images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "tokens"}, "view of branch 'tokens' is 'tokens'; it must be one of flatten, token, pool"),
        ({"channel_dim": 0}, "channel_dim of branch 'tokens' is 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankConfig(branches={"tokens": {"rank": 2, **options}})


def test_a_state_dict_is_refused_by_a_branch_of_another_view():
    saved, other = vit("token").state_dict(), vit("pool")
    with pytest.raises(RuntimeError, match=r"kind='token', channel_dim=-1.* do not fit .*kind='pool', channel_dim=-1"):
        other.load_state_dict(saved)
    saved["branches.blocks/1.counters"] = saved["branches.blocks/1.counters"][:2]  # as before there were views
    assert not other.load_state_dict(saved).missing_keys


@pytest.mark.parametrize("view", [*VIEWS, None])
def test_a_checkpoint_keeps_the_view(tmp_path, view):
    model = vit(view, num_classes=3).train()
    model(torch.randn(2, 3, 32, 32))
    model.penalty()
    model.update()
    loaded = tlr.from_pretrained(tlr.save_pretrained(model, tmp_path / "saved"))
    assert loaded.taps == model.taps
    assert torch.equal(loaded.branches["blocks.1"].dense_weight(), model.branches["blocks.1"].dense_weight())


def test_a_checkpoint_from_before_there_were_views_is_flattened(tmp_path):
    tlr.save_pretrained(vit("flatten"), tmp_path)
    path = tmp_path / "lowrank.json"
    text = path.read_text()
    old = text.replace(',\n      "view": "flatten",\n      "channel_dim": -1', "").replace(
        '"view": "flatten"', '"norm_weight": 0.0'
    )
    assert old.count("view") == 0
    path.write_text(old)
    loaded = tlr.from_pretrained(tmp_path)
    assert loaded.taps[0].view.kind == "flatten"
    assert loaded.branches["blocks.1"].num_features == 5 * 64
    path.write_text(text.replace('"view": "flatten",\n      "channel_dim"', '"view": "sideways",\n      "channel_dim"'))
    with pytest.raises(tlr.CheckpointError, match=r"'blocks.1' has a view that is none of flatten, token, pool"):
        tlr.from_pretrained(tmp_path)


def test_a_run_reports_the_spectrum_of_the_samples_of_the_view():
    pytest.importorskip("accelerate")
    from timm_lowrank.training.report import layer_spectra

    model = tlr.wrap("test_vit", LowRankConfig(branches={"blocks.1": 3, "pre_logits": 3}), img_size=32)
    images = torch.randn(6, 3, 32, 32)
    spectra = layer_spectra(model, [(images, torch.zeros(6))], None)
    with torch.no_grad(), model.capture() as seen:
        model.eval()(images)
    tokens = seen["blocks.1"].double().reshape(-1, 64)
    assert len(spectra["blocks.1"].shares) == len(tokens) == 6 * 5
    assert spectra["blocks.1"].shares[0] == pytest.approx(tlr.spectrum.variance_ratio(tokens, [1])[0], rel=1e-5)
    assert len(spectra["pre_logits"].shares) == 6


def test_an_evaluation_measures_the_samples_of_the_branch(tmp_path):
    pytest.importorskip("accelerate")
    from timm_lowrank.data import load_images
    from timm_lowrank.evaluation import activations
    from timm_lowrank.suites.evaluation import build_context
    from timm_lowrank.suites.measurements.representations import Spectrum
    from timm_lowrank.suites.networks import load_network

    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2}
    network = timm.create_model("vit_tiny_patch16_224", **options)
    branches = {"blocks.0": 3, "pre_logits": 3}
    model = tlr.wrap(network, LowRankConfig(branches=branches), example_input=torch.zeros(1, 1, 8, 8))
    tlr.save_pretrained(model, tmp_path, data_config={"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)})
    loaded = load_network(str(tmp_path))
    assert loaded.views == {"blocks.0": View("token", -1)}
    context = build_context(
        [loaded], load_images("digits"), list(branches), torch.device("cpu"), seed=0, chunk=7, limit=20, train_limit=10
    )
    figures = Spectrum().observe(context, loaded.title, range(20))
    assert (figures["blocks.0 features"], figures["pre_logits features"]) == ([24], [24])
    assert len(figures["blocks.0 classes"]) == 10
    whole = activations(loaded.model, context.images, ["blocks.0"])["blocks.0"]
    tokens = activations(loaded.model, context.images, ["blocks.0"], 9, loaded.views)["blocks.0"]
    assert whole.shape == (20, 5 * 24)
    assert torch.allclose(tokens, whole.reshape(100, 24), atol=1e-6)
    assert figures["blocks.0 shares"][0] == pytest.approx(tlr.spectrum.variance_ratio(tokens, [1])[0], rel=1e-4)
