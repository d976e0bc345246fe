"""ResNets and a VGG with the stems that 32 x 32 images need, on timm's own classes, registered with timm on import.

>>> import timm, timm_lowrank.networks
>>> timm.list_models("*_cifar")
['resnet10_cifar', 'resnet18_cifar', 'resnet50_cifar', 'vgg19_bn_cifar']

timm's ResNets begin with a 7 x 7 stride-2 convolution and a pooling, its VGGs end in a 7 x 7 fully connected
layer of 4,096 units: both are made for 224 pixels. The networks here keep timm's blocks, parameter names and
interface (`forward_features`, `forward_head`, `reset_classifier`, `features_only`, gradient checkpointing, the
Hub layout) and differ in the stem or the head alone. Every argument is a plain number, string or list, so that
timm can write it to `config.json` and build the same network from it.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG, ConvMlp
from timm.models.vgg import cfgs as vgg_layouts
from torch import Tensor, nn

__all__ = ["CifarResNet", "CifarVGG", "resnet10_cifar", "resnet18_cifar", "resnet50_cifar", "vgg19_bn_cifar"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class CifarResNet(ResNet):
    """timm's ResNet with a 3 x 3 stem and no pooling behind it.

    For images (batch, in_chans, H, W) stage s = 1..4 returns
    (batch, channels[s-1] * block.expansion, H / (stem_stride * 2^(s-1)), the same of W), rounded up.

    Args:
        block: timm's class `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        channels: planes of each of the four stages.
        stem_channels: channels of the stem, an even number; None takes `channels[0]`.
        stem_stride: 1, or 2 for a network that costs about a fourth.
        output_stride: stages that would go beyond this stride are dilated instead, as in timm; one of 2, 4, 8
            times `stem_stride`, and anything larger dilates nothing.
        kwargs: any further argument of timm's `ResNet` that does not concern the stem.

    Raises:
        ValueError: for a stem or an output stride that cannot be built, or other than four stages.
    """

    feature_info: list[dict[str, Any]]

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        in_chans: int = 3,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_channels: int | None = None,
        stem_stride: int = 1,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        _check_resnet(layers, channels, stem_channels, stem_stride, kwargs)
        stem = channels[0] if stem_channels is None else stem_channels
        super().__init__(
            block,
            tuple(layers),
            in_chans=in_chans,
            channels=tuple(channels),
            output_stride=_timm_output_stride(output_stride, stem_stride),
            # timm fixes the input of the first stage at 64 channels except behind a deep stem, where it is
            # 2 * stem_width: the only way to choose it. The deep stem itself is replaced below.
            stem_type="deep",
            stem_width=stem // 2,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        conv1 = nn.Conv2d(in_chans, stem, 3, stride=stem_stride, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", conv1)  # in the place of timm's, so that the order of the parameters stays
        self.add_module("maxpool", nn.Identity())
        # timm counts strides from a stem of stride 2 followed by a pooling of stride 2
        stem_info, *stages = self.feature_info
        self.feature_info = [{**stem_info, "reduction": stem_stride}]
        self.feature_info += [{**info, "reduction": info["reduction"] * stem_stride // 4} for info in stages]


def _check_resnet(
    layers: Sequence[int], channels: Sequence[int], stem_channels: int | None, stem_stride: int, kwargs: dict[str, Any]
) -> None:
    if len(channels) != 4 or len(layers) != 4:
        raise ValueError(
            f"a ResNet has four stages: got channels={tuple(channels)} and layers={tuple(layers)}, "
            "give four numbers each"
        )
    stem = channels[0] if stem_channels is None else stem_channels
    if stem < 2 or stem % 2:
        raise ValueError(
            f"the stem needs an even number of channels, got {stem}: pass an even channels[0], or stem_channels"
        )
    if stem_stride not in (1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride!r}")
    if fixed := {"stem_type", "stem_width", "replace_stem_pool"}.intersection(kwargs):
        raise ValueError(
            f"{', '.join(sorted(fixed))}: the stem of a CIFAR network is one 3 x 3 convolution, "
            "set stem_channels and stem_stride instead"
        )


def _timm_output_stride(output_stride: int, stem_stride: int) -> int:
    """The same stage limit in timm's counting, where the first stage lies at stride 4."""
    counted = min(32, output_stride * 4 // stem_stride)
    if counted not in (8, 16, 32):
        allowed = ", ".join(str(stem_stride * factor) for factor in (2, 4, 8))
        raise ValueError(f"output_stride must be one of {allowed} or larger, got {output_stride}")
    return counted


class CifarVGG(VGG):
    """timm's VGG whose three fully connected layers follow a 1 x 1 map: 512 -> 512 -> 512 -> classes.

    As in timm the first two are 1 x 1 convolutions (`pre_logits.fc1`, `pre_logits.fc2`), with ReLU after each
    and dropout before the second and the third. Images are (batch, in_chans, H, W) with H, W >= 32; at 32 the
    five poolings leave (batch, 512, 1, 1), larger images are averaged over positions before the classifier.

    Args:
        cfg: timm's layout, channels of the convolutions and "M" for each 2 x 2 max pooling.
        num_classes: width of the classifier; 0 for none.
        hidden_size: width of the two hidden fully connected layers.
        drop_rate: probability of both dropouts.
        kwargs: any further argument of timm's `VGG` except `mlp_ratio`.

    Attributes:
        lowrank_stage: name of the last pooling, whose output enters the first fully connected layer. The input
            of the last stage of `feature_info` would be the map before that pooling.
    """

    lowrank_stage: str

    def __init__(
        self,
        cfg: list[Any],
        num_classes: int = 10,
        hidden_size: int = 512,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
        act_layer: type[nn.Module] = nn.ReLU,
        conv_layer: type[nn.Module] = nn.Conv2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            cfg,
            num_classes=0,
            mlp_ratio=1 / 4096,  # timm's 4,096 x 25,088 head is replaced below: never allocate it
            act_layer=act_layer,
            conv_layer=conv_layer,
            **kwargs,
            **factory,
        )
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.pre_logits = ConvMlp(
            self.num_features,
            hidden_size,
            kernel_size=1,
            drop_rate=drop_rate,
            act_layer=act_layer,
            conv_layer=conv_layer,
            **factory,
        )
        self.head = ClassifierHead(hidden_size, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        for layer in self.pre_logits.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(cast(Tensor, layer.bias), 0.0)
        if isinstance(self.head.fc, nn.Linear):
            nn.init.normal_(self.head.fc.weight, 0.0, 0.01)
            nn.init.zeros_(self.head.fc.bias)
        self.lowrank_stage = f"features.{len(self.features) - 1}"

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the convolutional stages in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The last fully connected layer, or its dotted name."""
        return "head.fc" if name_only else self.head.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, H, W) to (batch, 512, H // 32, W // 32)."""
        if not self.grad_checkpointing or torch.jit.is_scripting():
            return self.features(x)
        # a stage ends before the pooling: a segment must not begin with an in-place activation
        starts = [0, *(end + 1 for end in self.feature_ends)]
        layers = list(self.features)
        for start, end in pairwise(starts):
            x = checkpoint(partial(_run, layers[start:end]), x)
        return x


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet10_cifar": _cfg(),
        "resnet18_cifar": _cfg(),
        "resnet50_cifar": _cfg(),
        "vgg19_bn_cifar": _cfg(first_conv="features.0", classifier="head.fc", pool_size=(1, 1)),
    }
)


def _resnet(variant: str, pretrained: bool, block: type, layers: tuple[int, ...], **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, variant, pretrained, block=block, layers=layers, **kwargs)


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Four narrow stages of one block each, 0.31 M parameters: made for CPUs, from 8 x 8 pixels on."""
    kwargs.setdefault("channels", (16, 32, 64, 128))
    return _resnet("resnet10_cifar", pretrained, BasicBlock, (1, 1, 1, 1), **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with a 3 x 3 stem: 256 x 8 x 8 = 16,384 features before the last stage at 32 x 32 pixels."""
    return _resnet("resnet18_cifar", pretrained, BasicBlock, (2, 2, 2, 2), **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with a 3 x 3 stem: 1,024 x 8 x 8 = 65,536 features before the last stage at 32 x 32 pixels."""
    return _resnet("resnet50_cifar", pretrained, Bottleneck, (3, 4, 6, 3), **kwargs)


@register_model
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm, 16 convolutions and three fully connected layers, for 32 x 32 pixels.

    `width` multiplies the channels of the convolutions.
    """
    width = kwargs.pop("width", 1.0)
    layout = [step if step == "M" else max(1, round(width * step)) for step in vgg_layouts["vgg19"]]
    kwargs.setdefault("norm_layer", nn.BatchNorm2d)
    return build_model_with_cfg(
        CifarVGG,
        "vgg19_bn_cifar",
        pretrained,
        model_cfg=layout,
        feature_cfg={"flatten_sequential": True, "out_indices": kwargs.pop("out_indices", (0, 1, 2, 3, 4, 5))},
        **kwargs,
    )
