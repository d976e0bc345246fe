"""Where the branches of a configuration sit: what "1-LR" and "2-LR" mean for a network, and how wide each layer is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .core.capture import Tap
from .core.config import PRE_LOGITS, LowRankConfig
from .core.errors import CaptureError, nearest
from .layers import example_forward, tap_on

PRE_LOGITS_RANK, STAGE_RANK = 100, 500  # paper, Section 3


def find_taps(
    backbone: nn.Module, config: LowRankConfig, images: Tensor
) -> tuple[list[Tap], dict[str, int], dict[str, int]]:
    """Taps, widths and target ranks of the branches that `config` asks for.

    The ranks of the presets are capped by the width of the layer, with a warning.

    Raises:
        ValueError: layers that do not exist (all named in one message, with the nearest ones), or ranks larger
            than the width of their layer.
        CaptureError: a layer that one forward of `images` does not run exactly once, or without float activations.
    """
    wanted = _wanted_ranks(backbone, config)
    _raise_if_unknown(backbone, wanted)
    taps = [tap_on(backbone, layer, images) for layer in wanted]
    record = example_forward(backbone, taps, images)
    widths = {}
    for tap in taps:
        value = record.activation(tap)
        if value.shape[0] != images.shape[0]:
            raise CaptureError(
                f"layer {tap.layer!r} gives a tensor of shape {tuple(value.shape)} for {images.shape[0]} images; "
                "its first dimension is not the batch, so its rows are not images"
            )
        widths[tap.layer] = value[0].numel()
    return taps, widths, _fitting_ranks(wanted, widths, capped=isinstance(config.branches, str))


def _wanted_ranks(backbone: nn.Module, config: LowRankConfig) -> dict[str, int]:
    if isinstance(config.branches, Mapping):
        return {layer: spec["rank"] if isinstance(spec, Mapping) else spec for layer, spec in config.branches.items()}
    if config.branches == "1-LR":
        return {PRE_LOGITS: PRE_LOGITS_RANK}
    return {_last_stage_input(backbone): STAGE_RANK, PRE_LOGITS: PRE_LOGITS_RANK}


def _last_stage_input(backbone: nn.Module) -> str:
    """The name of the layer whose output enters the last stage, from timm's `feature_info`."""
    if hasattr(backbone, "lowrank_stage"):  # a network that knows better, such as a VGG
        return str(backbone.lowrank_stage)
    info = getattr(backbone, "feature_info", None)
    stages: Sequence[str] = (
        [] if info is None else [entry["module"] for entry in (info.info if hasattr(info, "info") else info)]
    )
    if len(stages) < 2:
        raise ValueError(
            f'"2-LR" needs timm\'s feature_info with at least two stages, which {type(backbone).__name__} does '
            'not have; name the layers instead, for example branches={"layer3": 500, "pre_logits": 100}'
        )
    return stages[-2]


def _raise_if_unknown(backbone: nn.Module, wanted: Mapping[str, int]) -> None:
    known = [name for name, _ in backbone.named_modules() if name]
    unknown = [layer for layer in wanted if layer != PRE_LOGITS and layer not in known]
    if unknown:
        raise ValueError(
            "; ".join(
                f"{type(backbone).__name__} has no layer {layer!r}. " + nearest(layer, [*known, PRE_LOGITS], count=5)
                for layer in unknown
            )
        )


def _fitting_ranks(wanted: Mapping[str, int], widths: Mapping[str, int], *, capped: bool) -> dict[str, int]:
    too_large = {layer: rank for layer, rank in wanted.items() if rank > widths[layer]}
    text = "; ".join(
        f"rank {rank} is larger than the {widths[layer]} features of layer {layer!r}"
        for layer, rank in too_large.items()
    )
    if too_large and not capped:
        raise ValueError(f"{text}; a branch needs a rank well below the width to have an effect")
    if too_large:
        warnings.warn(
            f"{text}; capped there, where the branch has no effect: name the layers and smaller ranks", stacklevel=3
        )
    return {layer: min(rank, widths[layer]) for layer, rank in wanted.items()}
