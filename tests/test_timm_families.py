"""Small members of timm's families through the check that benchmarks/timm_sweep.py makes of all of timm."""

from contextlib import nullcontext

import pytest
import timm
import torch
from scripts import benchmark
from torch import nn

from timm_lowrank import CaptureError, Embedder, LowRankConfig, list_layers, wrap
from timm_lowrank.layers import stage_names

# Name, keywords that make it smaller, and where "2-LR" sits before the last stage.
TNT = {"embed_dim": 48, "depth": 3, "num_heads_outer": 2}
TWINS = {"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 2, 1)}
NARROW = {"embed_dim": 48, "depth": 3, "num_heads": 2}
SEQUENCER = {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48)}
NETWORKS = {
    "test_resnet": ({}, "layer3"),
    "test_vit": ({}, "blocks.4"),
    "test_convnext": ({}, "stages.2"),
    "test_efficientnet": ({}, "blocks.3"),
    "test_byobnet": ({}, "stages.2"),
    "test_nfnet": ({}, "stages.2"),
    "test_mambaout": ({}, "stages.2"),
    "test_coatnet": ({}, "stages.2"),
    "test_vit_relpos": ({}, "blocks.7"),
    "lcnet_035": ({}, "blocks.4"),
    "starnet_s050": ({}, "stages.2"),
    "regnetx_002": ({}, "s3"),
    "dla46x_c": ({}, "level4"),
    "mobilevit_xxs": ({}, "stages.3"),
    "efficientvit_b0": ({}, "stages.2"),
    "levit_128s": ({}, "stages.1"),
    "gmlp_ti16_224": ({}, "blocks.28"),
    "deit_tiny_distilled_patch16_224": ({"depth": 3}, "blocks.1"),
    "vit_tiny_patch16_dinov3_qkvb": ({"depth": 3}, "blocks.1"),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}, "layers.2"),
    "naflexvit_base_patch16_gap": (NARROW, "blocks.1"),
    "xcit_nano_12_p16_224": ({"depth": 3}, "blocks.1"),
    "samvit_base_patch16_224": (NARROW, "blocks.1"),
    "sequencer2d_s": (SEQUENCER, "stages.2"),
    # Stages that give several tensors, that do not run as a whole, or that feature_info names wrongly:
    "pit_ti_224": ({}, "transformers.1"),
    "tnt_s_legacy_patch16_224": (TNT, "blocks.1"),
    "mvitv2_tiny": ({}, "stages.2"),
    "twins_svt_small": (TWINS, "blocks.2.1"),
    "coat_tiny": ({"serial_depths": (1, 1, 1, 2), "parallel_depth": 1}, "serial_blocks4.1"),
    "coat_lite_tiny": ({"serial_depths": (1, 1, 2, 1)}, "serial_blocks3.1"),
    # One classifier for each of several features:
    "efficientvim_m1": ({}, "stages.1"),
    "crossvit_tiny_240": ({"depth": ((1, 1, 0), (1, 1, 0))}, "blocks.0"),
}


@pytest.fixture(scope="module")
def sweep():
    with benchmark("timm_sweep_check") as module:
        yield module


@pytest.mark.parametrize("name", NETWORKS)
def test_family(name, sweep, random_stream):
    options, stage = NETWORKS[name]
    row = sweep.check(name, options=options)
    assert (row["status"], row["why"], row["device"]) == ("pass", "", "cpu")
    assert list(row["layers"]["1-LR"]) == ["pre_logits"]
    assert list(row["layers"]["2-LR"]) == [stage, "pre_logits"]
    assert random_stream()


def small(name, **options):
    return timm.create_model(name, num_classes=3, **options).train()


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_stage_of_several_tensors_is_read_by_its_name_too():
    """The preset and the name mean the same tensor: that of the features, not the class tokens beside it."""
    network = small("pit_ti_224", img_size=64)
    model = wrap(network, LowRankConfig(branches={"transformers.1": 5}), example_input=images())
    seen = []
    network.transformers[2].register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    with model.capture() as activations:
        model.eval()(images())
    features, _ = seen  # and class tokens
    assert torch.equal(activations["transformers.1"], features)
    listed = {info.name: info for info in list_layers(network, images=images())}
    assert listed["transformers.1"].width == model.branches["transformers.1"].num_features == features[0].numel()


def test_rows_of_another_count_than_images_are_passed_over():
    """A stage of TNT gives the embeddings of pixels first, with a row for each patch of each image."""
    network = small("tnt_s_legacy_patch16_224", img_size=64, **TNT)
    model = wrap(network, LowRankConfig(branches={"blocks.1": 5, "pre_logits": 5}), example_input=images())
    assert {tap.layer: tap.item for tap in model.taps} == {"blocks.1": 1, "pre_logits": None}
    assert model.branches["blocks.1"].num_features == 48


@pytest.mark.parametrize(
    ("name", "options", "path", "width"),
    [
        ("samvit_base_patch16_224", NARROW, "head.fc", 48),
        ("sequencer2d_s", SEQUENCER, "head.fc", 48),
        ("efficientvim_m1", {}, "heads.3", 320),
        ("levit_128s", {}, "head", 384),
    ],
)
def test_the_input_of_the_classifier_is_pooled(name, options, path, width):
    """Also where timm's classifier is a whole head, a list of classifiers, or one of two."""
    model = wrap(small(name, **options), LowRankConfig(branches={"pre_logits": 5}), example_input=images(224))
    assert model.taps[0].path == path
    assert model.branches["pre_logits"].num_features == width


def test_the_encoder_of_a_language_model(sweep):
    """On the meta device: it is large. A branch on a named layer works."""
    row = sweep.check("qwen3_vit_88m_enc", meta_above=0)
    assert row["status"] == "refused"
    assert "has no classifier" in row["why"]
    assert list(row["layers"]) == ["named"]


def test_patches_in_a_dictionary():
    """NaFlexViT takes patches of images of any shape: tokens are samples, so their number may change."""
    network = small("naflexvit_base_patch16_gap", **NARROW)
    model = wrap(network, LowRankConfig(branches={"blocks.1": 5, "pre_logits": 3}), example_input=images())
    for count in (9, 12):
        rows = torch.arange(count)
        patches = {
            "patches": torch.randn(2, count, 16 * 16 * 3),
            "patch_coord": torch.stack([rows // 3, rows % 3], dim=-1).expand(2, -1, -1),
            "patch_valid": torch.ones(2, count, dtype=torch.bool),
        }
        (model(patches).square().mean() + model.penalty()).backward()
        model.update()
    assert all(branch.updates == 2 for branch in model.branches.values())


def padded(padding, fill=0.0):
    """A batch of two images of 9 and 7 patches, as timm's NaFlex loader pads them, and by so many patches more."""
    count = 9 + padding
    rows = torch.arange(count)
    patches = torch.randn(2, 9, 16 * 16 * 3, generator=torch.Generator().manual_seed(0))
    valid = rows < torch.tensor([[9], [7]])
    patches = torch.cat([patches, torch.zeros(2, padding, 16 * 16 * 3)], dim=1).masked_fill(~valid[..., None], fill)
    coordinates = torch.stack([rows // 3, rows % 3], dim=-1) * valid[..., None]
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("view", ["token", "pool"])
def test_padding_of_patches_is_no_sample(view):
    """However long it is and whatever is in it: W, b, the head and the penalty are those of the patches alone."""
    found = []
    for padding, fill in [(0, 0.0), (20, 3.0)]:
        torch.manual_seed(0)
        network = small("naflexvit_base_patch16_gap", **NARROW)
        branches = {"blocks.1": {"rank": 5, "view": view}, "pre_logits": 3}
        config = LowRankConfig(branches=branches, warmup_updates=0, project_every=2, head_weight=1.0)
        model = wrap(network, config, example_input=images())
        for _ in range(4):
            model(padded(padding, fill))
            penalty = model.penalty(torch.tensor([0, 1]))
            model.update()
        embedded = Embedder(model.eval(), "blocks.1")(padded(padding, fill))
        found.append((penalty, model.branches["blocks.1"].bias, embedded[:, :7] if view == "token" else embedded))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_padding_that_cannot_be_told_is_refused():
    network = small("naflexvit_base_patch16_gap", **NARROW, patch_drop_rate=0.5)
    model = wrap(network, LowRankConfig(branches={"blocks.1": 5}), example_input=images())
    model(padded(20))
    with pytest.raises(CaptureError, match="patch dropout"):
        model.penalty()
    network = small("naflexvit_base_patch16_gap", **NARROW)
    model = wrap(network, LowRankConfig(branches={"blocks.1": {"rank": 5, "view": "flatten"}}), example_input=images())
    model(padded(20))
    with pytest.raises(CaptureError, match='view "token"'):
        model.penalty()


def test_names_of_stages_that_feature_info_gets_wrong():
    assert stage_names(small("twins_svt_small", **TWINS))[-2:] == ["blocks.2.1", "blocks.3.0"]
    assert stage_names(nn.Linear(2, 2)) == []


# What the check itself would notice


class Broken(nn.Module):
    """A network around another, with one thing wrong."""

    def __init__(self, wrong):
        super().__init__()
        self.network, self.wrong = small("test_resnet"), wrong

    def get_classifier(self):
        return self.network.fc

    def forward(self, x):
        if self.wrong == "random":
            x = x + torch.randn_like(x)
        if self.wrong == "hook" and self.training:
            self.network.conv1.register_forward_hook(lambda *_: None)
        if self.wrong == "key" and self.training:
            self.network.register_buffer("one_more", torch.zeros(1))
        return self.network(x * torch.nan if self.wrong == "nan" else x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nothing", None),
        ("random", "eval output differs"),
        ("hook", "does not give the plain network back"),
        ("key", "other keys"),
        ("nan", "not finite"),
    ],
)
def test_the_check_sees_what_is_wrong(wrong, message, sweep):
    expectation = nullcontext() if message is None else pytest.raises(sweep.Failure, match=message)
    branches = {"network.layer3": 5, "pre_logits": 3}
    with expectation:
        sweep.examine(Broken(wrong), images(), lambda: Broken("nothing"), {"named": branches})
