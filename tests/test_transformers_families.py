"""Every image classifier of transformers, with tiny configurations: both presets find their layers, and it trains."""

import re

import pytest
import torch

import timm_lowrank as tlr
from timm_lowrank import LowRankConfig

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
VIT = {**VIT, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}
SWIN = {**SWIN, "window_size": 2}
CONVNEXT = {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 2}
PYRAMID = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 2], "num_attention_heads": [1, 2, 2, 2]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 2]}
PERCEIVER = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 3, "image_size": 32}
PERCEIVER = {**PERCEIVER, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}
HGNET = {"embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16]}
HGNET |= {"stage_mid_channels": [8] * 4, "stage_out_channels": [16, 16, 16, 32], "hidden_sizes": [16, 16, 16, 32]}
HGNET |= {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [2] * 4}
DOWN = [["Subsample", 4, 4, 2, 2, 2], ["Subsample", 4, 4, 2, 2, 2]]
LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 2], "key_dim": [4] * 3}
LEVIT = {**LEVIT, "down_ops": DOWN, "image_size": 64}
HIERA = {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
FOCALNET = {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 2], "hidden_sizes": [16, 32, 32]}
FOCALNET = {**FOCALNET, "focal_levels": [1] * 3, "focal_windows": [3] * 3}
MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 16, 24], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32]}
MOBILEVIT2 = {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1] * 3, "base_attn_unit_dims": [32, 32, 64]}
EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "initializer_range": 0.3}
TEXTNET = {"hidden_sizes": [8, 8, 8, 16, 16], "stem_out_channels": 8}
IMAGEGPT = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 17, "n_positions": 64}

# name, options, size of the images, and the layer whose output enters the last stage or block
FAMILIES = [
    ("Beit", VIT, 32, "beit.layers.1"),
    ("Bit", {**RESNET, "num_groups": 2}, 32, "bit.encoder.stages.1"),
    ("CLIP", {"vision_config": VIT}, 32, "vision_model.encoder.layers.1"),
    ("ConvNext", CONVNEXT, 32, "convnext.encoder.stages.1"),
    ("ConvNextV2", CONVNEXT, 32, "convnextv2.encoder.stages.1"),
    ("Cvt", {"embed_dim": [8, 8, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, 32, "cvt.encoder.stages.1"),
    ("Data2VecVision", VIT, 32, "data2vec_vision.encoder.layer.1"),
    ("DeiT", VIT, 32, "deit.layers.1"),
    ("Dinov2", VIT, 32, "dinov2.encoder.layer.1"),
    ("Dinov2WithRegisters", VIT, 32, "dinov2_with_registers.encoder.layer.1"),
    ("DonutSwin", SWIN, 32, "donut.encoder.layers.1"),
    # Blocks, of which the last two sizes of the map have several.
    ("EfficientNet", EFFICIENTNET, 32, "encoder.blocks.6"),
    ("FocalNet", FOCALNET, 32, "focalnet.encoder.stages.1"),
    ("HGNetV2", HGNET, 32, "encoder.stages.2"),
    ("Hiera", HIERA, 32, "hiera.encoder.stages.2"),
    ("IJepa", VIT, 32, "ijepa.layers.1"),
    ("ImageGPT", IMAGEGPT, 8, "transformer.h.1"),
    ("Levit", LEVIT, 64, "levit.encoder.stages.1"),
    ("MetaClip2", {"vision_config": VIT}, 32, "vision_model.encoder.layers.1"),
    ("MobileNetV1", {"depth_multiplier": 0.25, "initializer_range": 0.3}, 64, "mobilenet_v1.layer.21"),
    ("MobileNetV2", {"depth_multiplier": 0.25}, 64, "mobilenet_v2.layer.11"),
    ("MobileViT", MOBILEVIT, 64, "mobilevit.encoder.layer.3"),
    ("MobileViTV2", MOBILEVIT2, 64, "mobilevitv2.encoder.layer.3"),
    ("Perceiver", PERCEIVER, 32, "perceiver.encoder.self_attends.1"),
    ("PoolFormer", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}, 64, "poolformer.encoder.block.2.1"),
    ("Pvt", {**PYRAMID, "image_size": 64}, 64, "pvt.encoder.block.2.0"),
    ("PvtV2", {**PYRAMID, "image_size": [64, 64]}, 64, "pvt_v2.encoder.layers.2"),
    ("RegNet", {**RESNET, "groups_width": 8}, 32, "regnet.encoder.stages.1"),
    ("ResNet", {**RESNET, "layer_type": "basic"}, 32, "resnet.encoder.stages.1"),
    ("Segformer", PYRAMID, 64, "segformer.stages.2"),
    ("Siglip", {"vision_config": VIT}, 32, "vision_model.encoder.layers.1"),
    ("SwiftFormer", {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}, 64, "swiftformer.encoder.network.4"),
    ("Swin", SWIN, 32, "swin.encoder.layers.1"),
    ("Swinv2", SWIN, 32, "swinv2.encoder.layers.1"),
    ("TextNet", TEXTNET, 32, "textnet.encoder.stages.2"),
    ("ViT", VIT, 32, "vit.layers.1"),
    ("ViTMSN", VIT, 32, "vit.layers.1"),
]


def renamed(layer: str) -> str:
    """A layer of the first versions of transformers 5 by its name in later ones."""
    layer = re.sub(r"\b(beit|deit|ijepa|vit)\.encoder\.layer\.", r"\1.layers.", layer)
    return layer.replace("segformer.encoder.layer_norm.", "segformer.stages.")


@pytest.mark.filterwarnings("ignore:.*capped there")
@pytest.mark.filterwarnings("ignore:.*more than half of the")
@pytest.mark.parametrize(("family", "options", "size", "stage"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_both_presets_find_their_layers_and_train(family, options, size, stage):
    ending = {"Perceiver": "Learned"}.get(family, "")
    torch.manual_seed(0)
    network = getattr(transformers, f"{family}ForImageClassification{ending}")(
        getattr(transformers, f"{family}Config")(num_labels=5, **options)
    )
    images = torch.rand(4, 3, size, size)
    if family == "ImageGPT":  # whose pixels are tokens
        images = torch.randint(0, 17, (4, size * size))
    config = LowRankConfig(branches="2-LR", warmup_updates=0, project_every=2, head_weight=0.0)
    model = tlr.wrap(network.train(), config, example_input=images)
    assert list(model.branches)[1] == "pre_logits"
    assert renamed(next(iter(model.branches))).endswith(stage)
    for _ in range(2):
        (model(images).logits.sum() + model.penalty()).backward()
        model.update()
    assert all(branch.updates == 2 for branch in model.branches.values())
    assert all(float(parts["reconstruction"]) > 0 for parts in model.losses().values())
