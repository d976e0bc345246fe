"""Layers by name: what a branch can sit on, its samples there, and what "pre_logits" means for a network."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .core.capture import Recording, Tap, evaluating, innermost, recording
from .core.config import PRE_LOGITS
from .core.views import View
from .errors import CaptureError, nearest

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
# Modules of maps (batch, channels, positions): what else has three dimensions is (batch, tokens, channels).
_CHANNELS_FIRST = (
    nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d,
    nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer that a branch can sit on."""

    name: str  # as `LowRankConfig.branches` takes it
    kind: str  # class of the module
    shape: tuple[int, ...]  # of its output for one image, without the batch dimension
    width: int  # m, the number of features of one sample
    view: str = "flatten"  # what counts as one sample by default, see `natural_view`


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with an error that names the nearest architectures.

    Raises:
        ValueError: timm has no architecture of that name.
    """
    architecture = name.split(":")[-1] if name.startswith("timm:") else name
    if ":" not in name and "/" not in name and not timm.is_model(architecture):
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}. "
            + nearest(architecture.split(".")[0], timm.list_models(), count=5)
        )
    return timm.create_model(name, **kwargs)


def default_input(backbone: nn.Module, keyword: str = "example_input", **create_kwargs: Any) -> Tensor:
    """One image of zeros, (1, channels, height, width) float32, of the size that a timm network was configured for.

    Args:
        keyword: what the caller's own example is called, for the message.
        create_kwargs: what `timm.create_model` was given: `in_chans` and `img_size` change the size.

    Raises:
        ValueError: the network has no `pretrained_cfg`, so its input size is not known.
    """
    size = dict(getattr(backbone, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise ValueError(
            f"the input size of a {type(backbone).__name__} is not known; pass {keyword}=images, "
            "one batch as the network takes it"
        )
    channels, height, width = size
    if image_size := create_kwargs.get("img_size"):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameter = next(backbone.parameters(), torch.empty(0))
    return torch.zeros(1, create_kwargs.get("in_chans", channels), height, width).to(parameter)


def list_layers(model: str | nn.Module, *, images: Tensor | None = None, **create_kwargs: Any) -> list[LayerInfo]:
    """Every layer that a branch can sit on, in the order in which a forward pass meets them.

    Args:
        model: a timm name, or any module.
        images: an example batch (batch, ...); needed for a module without timm's `pretrained_cfg`.
        create_kwargs: for `timm.create_model`.
    """
    backbone = create_backbone(model, **create_kwargs) if isinstance(model, str) else model
    images = default_input(backbone, "images", **create_kwargs) if images is None else images
    # On the modules themselves, not inside Sequentials: every name gets a row of its own.
    # A module that is called "pre_logits" (VGG) is not what the name means for a branch.
    taps = [Tap(name, name) for name, _ in backbone.named_modules() if name and name != PRE_LOGITS]
    record = example_forward(backbone, taps, images)
    layers = []
    for name, value in list(record.values.items()):
        item = pick_item(backbone, Tap(name, name), value, len(images)).item
        record.values[name] = value if item is None else innermost(value[item])  # type: ignore[index]
        with contextlib.suppress(CaptureError):  # then no branch can sit there
            activations = record.activation(Tap(name, name))
            if activations.shape[0] == images.shape[0]:
                kind = type(backbone.get_submodule(name)).__name__
                layers.append(_info(backbone, name, kind, activations, images))
    with contextlib.suppress(ValueError):  # no classifier
        tap = tap_on(backbone, PRE_LOGITS, images)
        activations = example_forward(backbone, [tap], images).activation(tap)
        layers.append(_info(backbone, PRE_LOGITS, f"input of {tap.path}", activations, images))
    return layers


def _info(backbone: nn.Module, name: str, kind: str, activations: Tensor, images: Tensor) -> LayerInfo:
    view = natural_view(backbone, activations, layer=name, images=images)
    return LayerInfo(name, kind, tuple(activations.shape[1:]), view.width(activations), view.kind)


def natural_view(
    backbone: nn.Module,
    activations: Tensor,
    kind: str | None = None,
    channel_dim: int | None = None,
    *,
    layer: str = "",
    images: Tensor | None = None,
) -> View:
    """What counts as one sample of a layer: what a branch there takes for one unless it is told otherwise.

    "flatten" for feature maps, (batch, channels, height, width) or (batch, height, width, channels): convolutional
    networks (ResNet, EfficientNet, ConvNeXt, ...), pyramids of windows (Swin, ...) and hybrids (CoAtNet, MaxViT,
    MobileViT, ...). It is the paper's, and before the last stage such a map has few positions left, each with a place
    of its own in the image.

    "token" for sequences, (batch, tokens, channels): ViT and its relatives, MLP-Mixer, gMLP. All tokens live in one
    space, which every block adds to and the last one still mixes; to flatten them would tie the branch to the number of
    tokens, which changes with the size of the image, and make W as wide as 151,296 features for ViT-B/16.

    Args:
        backbone: the network; timm's `output_fmt` of it settles where the channels are if the shape does not.
        activations: the layer's output for an example, (batch, ...).
        kind, channel_dim: of the view, where they are not left to what is said above.
        layer: the name of the module whose output they are: a Conv1d keeps its channels in front of its positions.
        images: the example (batch, channels, height, width), whose height and width a map has smaller; None is square.

    Raises:
        ValueError: the activations have no dimension `channel_dim`.
    """
    shape = activations.shape
    kind = kind or ("token" if activations.dim() == 3 else "flatten")
    if channel_dim is None:
        channel_dim = _channel_dim(shape, str(getattr(backbone, "output_fmt", "NCHW")), images)
        module = dict(backbone.named_modules(remove_duplicate=False)).get(layer)
        if len(shape) == 3 and layer and isinstance(module, _CHANNELS_FIRST):
            channel_dim = 1
    if not -len(shape) <= channel_dim < len(shape):
        raise ValueError(f"channel_dim={channel_dim} is outside the {len(shape)} dimensions of {tuple(shape)}")
    return View(kind, channel_dim)


def _channel_dim(shape: Sequence[int], output_format: str, images: Tensor | None = None) -> int:
    if len(shape) != 4:
        return -1
    _, one, two, three = shape
    height, width = images.shape[2:] if images is not None and images.dim() == 4 else (1, 1)
    # Height and width are the two that have the ratio of the images', but for rounding up to one position each.
    first, last = (abs(h * width - w * height) < max(height, width) for h, w in ((two, three), (one, two)))
    if not (first or last):  # windows are square, whatever the images are
        first, last = two == three, one == two
    if first != last:
        return 1 if first else -1
    return -1 if output_format == "NHWC" else 1


def tap_on(backbone: nn.Module, layer: str, images: Tensor | None = None) -> Tap:
    """The tap of a branch on one layer.

    "pre_logits" is the input of the classifier: of timm's `get_classifier()`, else of the layer whose features are the
    logits. `images` are needed for it where the network is not timm's.

    Raises:
        AttributeError: the network has no such layer.
        ValueError: "pre_logits" of a network without a classifier, or of one that is not timm's without images.
    """
    if layer != PRE_LOGITS:
        return Tap.at(layer, layer, backbone)
    if hasattr(backbone, "get_classifier"):
        classifier = _classifier(backbone)
        for name, module in backbone.named_modules():
            if module is classifier and not isinstance(module, nn.Identity):
                return Tap.at(PRE_LOGITS, name, backbone, takes_input=True)
        example = (stage_names(backbone) or [name for name, _ in backbone.named_children()])[-1]
        raise ValueError(
            f"{type(backbone).__name__} has no classifier (an encoder, or num_classes=0?), so there is no "
            f"{PRE_LOGITS!r}; name a layer instead, for example branches={{{example!r}: 50}}"
        )
    if images is None:
        raise ValueError(f"{type(backbone).__name__} is no timm network: finding {PRE_LOGITS!r} takes example images")
    return Tap(PRE_LOGITS, _layer_of_logits(backbone, images), takes_input=True)


def _layer_of_logits(backbone: nn.Module, images: Tensor) -> str:
    """The name of the linear layer or convolution that gives the logits, by what comes out of it for `images`.

    Of several with as many features as there are logits, the one that gives the very logits, or a map whose mean they
    are; else the last that all of what is in an image goes through on its way to them, as in front of a softmax. A
    squeeze layer with as many features is neither, wherever it runs.

    Raises:
        ValueError: the output holds no logits, or no such layer gives them.
    """
    names = [name for name, module in backbone.named_modules() if isinstance(module, (nn.Linear, *_CONVOLUTIONS))]
    with evaluating(backbone), recording(backbone, [Tap(name, name) for name in names]) as record:
        logits = logits_of(backbone(images))
    features = {name: _features_last(backbone, name, value) for name, value in record.values.items()}
    if logits is not None:
        fitting = [name for name, value in features.items() if value.shape[-1] == logits.shape[1]]
        exact = [name for name in fitting if _are_logits(features[name], logits)]
        chosen = exact or [name for name in fitting if _all_goes_through(backbone, name, images)]
        if chosen:
            return chosen[-1]
    if logits is None:
        found = "gives no logits (batch, classes): it has no classifier (an encoder?)"
    else:
        found = f"gives {logits.shape[1]} logits, and no linear layer or convolution of its own gives them"
    inside = {name: value.shape[-1] for name, value in features.items() if value.shape[-1] > 1}
    examples = [f", for example branches={{{name!r}: {max(1, width // 4)}}}" for name, width in inside.items()]
    raise ValueError(
        f"the {type(backbone).__name__} {found}, so what {PRE_LOGITS!r} is cannot be told; name a layer instead"
        + "".join(examples[-1:])
    )


def _all_goes_through(backbone: nn.Module, name: str, images: Tensor) -> bool:
    """Whether the logits of different images become the same where this layer gives zeros for all of them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *images.shape[1:], generator=generator).to(images)
    handle = backbone.get_submodule(name).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        with evaluating(backbone):
            logits = logits_of(backbone(noise))
    finally:
        handle.remove()
    return logits is not None and torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-6)


def _features_last(backbone: nn.Module, name: str, value: Any) -> Tensor:
    """What a linear layer or convolution gave, (batch, ..., features)."""
    is_map = isinstance(backbone.get_submodule(name), _CONVOLUTIONS)
    return value.movedim(1, -1) if is_map and value.dim() > 2 else value  # type: ignore[no-any-return]


def _are_logits(value: Tensor, logits: Tensor) -> bool:
    """Whether (batch, ..., classes) are `logits` (batch, classes), or have them as their mean."""
    if len(value) != len(logits):
        return False
    means = value.float().reshape(len(value), -1, value.shape[-1]).mean(dim=1)  # under autocast their dtypes differ
    return torch.allclose(means, logits.float(), rtol=1e-4, atol=1e-5)


def logits_of(output: Any) -> Tensor | None:
    """The logits (batch, classes) in what a network gave: a tensor, the first of a tuple, or `logits` by name.

    None where there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    return found if isinstance(found, Tensor) and found.dim() == 2 and found.is_floating_point() else None


def _classifier(backbone: nn.Module) -> Any:
    """timm's classifier, or the part of it that turns features into logits; None if there is none."""
    classifier: Any = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None  # type: ignore[operator]
    if isinstance(classifier, tuple | list):  # labels first, then the teacher of a distilled network
        classifier = classifier[0]
    if isinstance(classifier, nn.ModuleList):  # one for each of several features: the last sees the deepest
        classifier = classifier[-1]
    while hasattr(classifier, "global_pool") and hasattr(classifier, "fc"):  # a head that pools; only its fc classifies
        classifier = classifier.fc
    return classifier


def stage_names(backbone: nn.Module) -> list[str]:
    """Names of the layers behind which timm's `feature_info` sees the ends of the stages, as far as they exist.

    Where it names a list of blocks, which never runs as a whole, the last block stands for it.
    """
    network, inside = backbone, ""
    if hasattr(backbone, "feature_info") and "feature_info" not in vars(backbone):  # a wrapper that hands on: peft's
        owners = [(name, module) for name, module in backbone.named_modules() if "feature_info" in vars(module)]
        inside, network = owners[0] if owners else ("", backbone)
    names = _stage_names(network)
    return [f"{inside}.{name}" if inside else name for name in names]


def _stage_names(backbone: nn.Module) -> list[str]:
    info = getattr(backbone, "feature_info", None)
    entries = [] if info is None else (info.info if hasattr(info, "info") else info)
    modules, names = dict(backbone.named_modules()), []
    for name in [entry["module"] for entry in entries]:
        # MViTv2 and Twins say "block.2" of what they call stages.2 and blocks.2; Gemma4 leaves "encoder." out.
        for known in (name, name.replace("block.", "stages."), name.replace("block.", "blocks."), f"encoder.{name}"):
            if known in modules:
                names.append(_last_of_list(known, modules[known]))
                break
    if len(names) > 1 and names[-2] == names[-1]:  # CoaT: scales in parallel, behind stages in series
        series = [name for name, module in backbone.named_children() if isinstance(module, nn.ModuleList)]
        names[-2:] = [_last_of_list(name, modules[name]) for name in series[-2:]]
    return names


def _last_of_list(name: str, module: nn.Module) -> str:
    return f"{name}.{len(module) - 1}" if isinstance(module, nn.ModuleList) and len(module) else name


def last_stage_input(backbone: nn.Module, images: Tensor) -> str:
    """The name of the layer whose output enters the last stage, or the last block where there is one stage alone.

    It is what the network says itself (`lowrank_stage`), else the last but one of timm's stages. Other networks, those
    of transformers among them, keep stages or blocks in an `nn.ModuleList`:

    - stages (modules with a list of blocks in them): the last but one;
    - blocks, and what lies between them: the one in front of the last that makes the map smaller, or the last but one
      if none does, as in ViT.

    Args:
        images: a batch as the network takes it.

    Raises:
        ValueError: the network has neither.
    """
    if hasattr(backbone, "lowrank_stage"):  # a network that knows better, such as a VGG
        return str(backbone.lowrank_stage)
    if len(stages := stage_names(backbone)) > 1:
        return stages[-2]
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {name: module for name, module in lists.items() if len(module) > 1}
    outer = {name: lists[name] for name in lists if not any(name.startswith(f"{other}.") for other in lists)}
    if outer:
        largest = max(outer, key=lambda name: sum(parameter.numel() for parameter in outer[name].parameters()))
        last = f"{largest}.{len(outer[largest]) - 2}"
        runs = not isinstance(outer[largest][0], nn.ModuleList)
        if runs and all(map(_has_blocks, outer[largest])):
            return last
        blocks = [block for name, module in outer.items() for block in _running(name, module)]
        record = example_forward(backbone, [Tap(name, name) for name in blocks], images)
        sizes = {name: _positions(value, images) for name, value in record.values.items()}
        chain = [(name, size) for name, size in sizes.items() if size]
        smaller = [number for number in range(1, len(chain)) if chain[number][1] < chain[number - 1][1]]
        if smaller:
            return chain[smaller[-1] - 1][0]
        if runs:
            return last
    record = example_forward(backbone, [Tap(name, name) for name, _ in backbone.named_modules() if name], images)
    layers = [name for name, value in record.values.items() if isinstance(value, Tensor) and value.dim() > 1]
    raise ValueError(
        f'"2-LR" needs timm\'s feature_info with at least two stages, or an nn.ModuleList of stages or blocks, which '
        f"{type(backbone).__name__} does not have; name the layers instead, for example "
        f'branches={{"{layers[len(layers) // 2]}": 500, "pre_logits": 100}}'
    )


def _has_blocks(stage: nn.Module) -> bool:
    """Whether there is a list of modules that consist of others in it."""
    lists = [module for module in stage.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return any(all(any(block.children()) for block in blocks) for blocks in lists if len(blocks))


def _running(name: str, modules: nn.ModuleList) -> list[str]:
    """The names of the modules in a list, and in lists in it: a list itself never runs."""
    names = []
    for number, module in enumerate(modules):
        own = f"{name}.{number}"
        names += _running(own, module) if isinstance(module, nn.ModuleList) else [own]
    return names


def _positions(value: object, images: Tensor) -> int:
    """At how many positions of an image a layer has features; 0 where there are none, or no such tensor."""
    tensors = map(innermost, value) if isinstance(value, tuple | list) else [value]
    found = next(
        (one for one in tensors if isinstance(one, Tensor) and one.dim() > 2 and len(one) == len(images)), None
    )
    return 0 if found is None else found[0].numel() // found.shape[_channel_dim(found.shape, "NCHW", images)]


def pick_item(backbone: nn.Module, tap: Tap, value: object, batch: int) -> Tap:
    """`tap` itself, or on one of the tensors that a stage or block gives: its features may come with their size, with
    class tokens or with attentions. The first that has a row for each image is meant.

    Args:
        value: what the tap saw.
        batch: number of images that it saw.
    """
    parent = backbone.get_submodule(tap.path.rpartition(".")[0])
    if isinstance(value, tuple | list) and (isinstance(parent, nn.ModuleList) or tap.layer in stage_names(backbone)):
        for item, one in enumerate(map(innermost, value)):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1 and len(one) == batch:
                return dataclasses.replace(tap, item=item)
    return tap


def class_count(backbone: nn.Module, images: Tensor) -> int | None:
    """How many classes the network tells apart: the width of its output, else what timm or transformers says.

    What they say may be out of date, where the classifier was replaced. None of an encoder, of which they say 0, and
    where the output for `images` is no (batch, classes) and nothing is said.
    """
    named = getattr(backbone, "num_classes", getattr(getattr(backbone, "config", None), "num_labels", None))
    if named == 0:
        return None
    with evaluating(backbone):
        logits = logits_of(backbone(images))
    if logits is not None:
        return logits.shape[1]
    return named if isinstance(named, int) else None


def rows_of_images(backbone: nn.Module, taps: Sequence[Tap], images: Tensor) -> dict[str, bool]:
    """By layer, whether its first dimension goes through a batch image by image: it may be cut into windows, but tokens
    may not come first, as in `nn.TransformerEncoderLayer(batch_first=False)`.

    Of a network that draws random numbers, the shape alone can tell.

    Args:
        images: (batch, ...), of whose shape and type one image of noise is made.
    """
    noise = torch.rand(images[:1].shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(images)
    # Twice the same image: what depends on the whole batch, as a BatchNorm without running statistics does, stays.
    one, two, again = (example_forward(backbone, taps, some) for some in (noise, torch.cat([noise, noise]), noise))
    found = {}
    for tap in taps:
        single, double, repeated = (record.activation(tap) for record in (one, two, again))
        in_order = single.is_meta or _alike(double[: len(single)], single) or not _alike(repeated, single)
        found[tap.layer] = len(double) == 2 * len(single) and in_order
    return found


def _alike(value: Tensor, other: Tensor) -> bool:
    """Whether two activations are the same but for rounding, which grows in half precision."""
    return value.shape == other.shape and bool((value - other).float().norm() <= 0.1 * other.float().norm())


def example_forward(backbone: nn.Module, taps: Sequence[Tap], images: Tensor) -> Recording:
    """What `taps` see in one forward in eval mode, without gradients."""
    with evaluating(backbone), recording(backbone, taps) as record:
        backbone(images)
    return record
