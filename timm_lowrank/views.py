"""Which view of a layer is the natural one: what a branch there takes for a sample unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .core.views import View


def view_of(backbone: nn.Module, activations: Tensor, options: Mapping[str, Any]) -> View:
    """What counts as one sample of a layer.

    "flatten" for feature maps, (batch, channels, height, width) or (batch, height, width, channels): convolutional
    networks (ResNet, EfficientNet, ConvNeXt, ...), pyramids of windows (Swin, ...) and hybrids (CoAtNet, MaxViT,
    MobileViT, ...). It is the paper's, and before the last stage such a map has few positions left, each with a place
    of its own in the image.

    "token" for sequences, (batch, tokens, channels): ViT and its relatives, MLP-Mixer, gMLP. All tokens live in one
    space, which every block adds to and the last one still mixes; to flatten them would tie the branch to the number of
    tokens, which changes with the size of the image, and make W as wide as 151,296 features for ViT-B/16.

    Outputs (batch, features), such as the input of most classifiers, are the same in every view.

    Args:
        backbone: the network; timm's `output_fmt` of it settles where the channels are if the shape does not.
        activations: the layer's output for an example, (batch, ...).
        options: of the branch; "view" and "channel_dim" go before what is said above.
    """
    shape = activations.shape
    kind = options.get("view") or ("token" if activations.dim() == 3 else "flatten")
    channel_dim = options.get("channel_dim")
    if channel_dim is None:
        channel_dim = _channel_dim(shape, str(getattr(backbone, "output_fmt", "NCHW")))
    if not -len(shape) <= channel_dim < len(shape):
        raise ValueError(f"channel_dim={channel_dim} is outside the {len(shape)} dimensions of {tuple(shape)}")
    return View(kind, channel_dim)


def _channel_dim(shape: Sequence[int], output_format: str) -> int:
    if len(shape) != 4:
        return -1
    _, one, two, three = shape
    if (one == two) != (two == three):  # height and width are the two that are alike
        return -1 if one == two else 1
    return -1 if output_format == "NHWC" else 1
