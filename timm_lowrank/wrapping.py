"""`wrap`: from a timm name or any network to a `LowRankModel`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .core.config import LowRankConfig
from .core.model import LowRankModel
from .errors import LowRankError
from .layers import create_backbone, example_input
from .placement import find_taps


def wrap(
    model: str | nn.Module,
    config: LowRankConfig | None = None,
    *,
    example_input: Tensor | None = None,
    **create_kwargs: Any,
) -> LowRankModel:
    """Put the low-rank branches of `config` on a network.

    Args:
        model: a timm name (`create_kwargs` go to `timm.create_model`), or any `nn.Module` that takes a batch of
            images. A module is wrapped, not copied: training the wrapper trains it.
        config: what to regularize; None is `LowRankConfig()`, one branch before the classifier.
        example_input: a batch (batch, channels, height, width) as the network takes it, to find the widths of
            the layers by one forward in eval mode. Needed where the images have another size than timm's
            `pretrained_cfg` says, and for a module that has none. One image of zeros otherwise.

    Returns:
        The wrapped model, in the mode (train or eval) of the network.

    Raises:
        ValueError: unknown timm name or layer (the nearest are named), a rank larger than its layer, a network that
            does not take images of the size in its `pretrained_cfg`.
        TypeError: `create_kwargs` for a module that exists already, or a model that is neither name nor module.
        CaptureError: a layer without usable activations.
    """
    config = config or LowRankConfig()
    if isinstance(model, LowRankModel):
        raise TypeError("the model is wrapped already; wrap model.unwrap() to change its branches")
    if isinstance(model, str):
        backbone = create_backbone(model, **create_kwargs)
    elif isinstance(model, nn.Module):
        if create_kwargs:
            raise TypeError(f"{', '.join(create_kwargs)}: keywords for timm.create_model, but the model exists already")
        backbone = model
    else:
        raise TypeError(f"a timm name or an nn.Module is needed, not a {type(model).__name__}")
    images = _default_input(backbone, create_kwargs) if example_input is None else example_input
    try:
        taps, widths, ranks = find_taps(backbone, config, images)
    except (AssertionError, RuntimeError) as problem:  # timm's networks refuse images of a wrong size with either
        if example_input is not None or isinstance(problem, LowRankError):
            raise
        raise ValueError(
            f"the {type(backbone).__name__} does not take an image of {tuple(images.shape[1:])}, the size in its "
            f"pretrained_cfg ({problem}); pass example_input=images, one batch as the network takes it"
        ) from problem
    wrapped = LowRankModel(backbone, config, taps, widths, ranks)
    return wrapped.train(backbone.training)


def _default_input(backbone: nn.Module, create_kwargs: dict[str, Any]) -> Tensor:
    return example_input(backbone, **create_kwargs)
