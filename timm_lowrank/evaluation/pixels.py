"""Networks that take pixels: `PixelModel`, the state in which a network is attacked, and what it says of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model import LowRankModel
from ..errors import EvaluationError
from .arguments import RADIUS_UNITS, check_choice, check_labels, check_logits
from .folding import folded


class PixelModel(nn.Module):
    """A network that takes pixels in [0, 1], normalises them itself and returns float32 logits.

    Args:
        network: a timm network or `LowRankModel`, whose mean and std come from its `pretrained_cfg`; or any that gives
            logits, or an object with `logits` as the models of transformers do.
        mean, std: per channel; for a network without `pretrained_cfg`, or to overrule it.

    Raises:
        ValueError: mean and std are not known, or not those of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        network = bare(network)
        self.network = network.backbone if isinstance(network, LowRankModel) else network
        self.training = self.network.training  # not train(): that would undo a frozen BatchNorm's eval mode
        config = dict(getattr(self.network, "pretrained_cfg", None) or {})
        mean, std = mean or config.get("mean"), std or config.get("std")
        if mean is None or std is None:
            raise ValueError(f"the normalisation of a {type(self.network).__name__} is not known: pass mean and std")
        if not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):  # NaN too
            raise ValueError(
                f"mean {tuple(mean)} and std {tuple(std)} must be of pixels in [0, 1]: "
                "divide what is in 0 to 255 by 255"
            )
        device = next((parameter.device for parameter in self.network.parameters()), None)
        self.register_buffer("mean", torch.tensor(mean, device=device).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) float32 of images (batch, channels, height, width) float in [0, 1].

        Raises:
            ValueError: integer images, pixels that are NaN or outside [0, 1], or other channels than mean has.
        """
        channels = self.mean.shape[1]
        if images.dim() != 4 or (channels > 1 and images.shape[1] != channels):
            raise ValueError(
                f"images must be (batch, {channels}, height, width), one channel for each number in mean and std, not "
                f"{tuple(images.shape)}; where the network takes these, pass PixelModel mean and std of its channels"
            )
        if not images.is_floating_point():
            raise ValueError(f"pixels must be floating point in [0, 1], not {images.dtype}: divide by 255")
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):  # NaN too
            raise ValueError(
                f"pixels must lie in [0, 1], these in [{low:.3g}, {high:.3g}]: are they normalised already?"
            )
        normalised = (images.float() - self.mean) / self.std
        weight = next(self.network.parameters(), normalised)
        output = self.network(normalised.to(weight.dtype))
        logits: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        return logits.float() if isinstance(logits, Tensor) else logits  # type: ignore[no-any-return]  # see check_logits


def predictions(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    batch_size: int = 500,
) -> Tensor:
    """The most likely class of each image, (n,) int64, of the network in the state in which it is attacked.

    Args:
        model: a `PixelModel`, or any module that takes pixels and gives logits.

    Raises:
        EvaluationError: the model gives no logits.
    """
    return classify(model, images, batch_size)[0]


def classified_right(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    batch_size: int = 500,
) -> Tensor:
    """Whether each image is classified as its label, (n,) bool; see `predictions`.

    Raises:
        EvaluationError: labels that do not fit or are no classes of the model.
    """
    if labels.shape != images.shape[:1]:
        raise EvaluationError(f"{len(images)} images need as many labels, not {tuple(labels.shape)}")
    predicted, classes = classify(model, images, batch_size)
    if len(labels):
        check_labels(labels, classes)
    return predicted == labels


def classify(model: nn.Module, images: Tensor, batch_size: int, *, channels_last: bool = True) -> tuple[Tensor, int]:
    """The class of each image, and the number of classes, 0 if there is no image; channels_last as of `attackable`."""
    predicted, classes = [images.new_zeros(0, dtype=torch.int64)], 0
    with attackable(model, channels_last=channels_last) as logits_of, torch.no_grad():
        for batch in images.split(batch_size) if len(images) else ():
            logits = logits_of(batch)
            predicted.append(check_logits(logits, len(batch)).argmax(dim=1))
            classes = logits.shape[1]
    return torch.cat(predicted), classes


def radius_unit_of(model: nn.Module, radius_unit: str) -> Tensor | None:
    """What a radius of 1 is in each channel of a pixel, (1, channels, 1, 1); None where the unit is the pixel range.

    Args:
        model: on which an attack is crafted. In normalised units it has to be a `PixelModel` or hold one (a hybrid, a
            wrapper around one), which knows the standard deviations of the channels.
        radius_unit: "pixel" or "normalized".

    Raises:
        EvaluationError: another unit, or normalised units and a model that does not say what they are.
    """
    check_choice(radius_unit, RADIUS_UNITS, "radius_unit")
    if radius_unit == "pixel":
        return None
    units = [module.std for module in bare(model).modules() if isinstance(module, PixelModel)]
    if not units or any(not torch.equal(unit, units[0]) for unit in units):
        raise EvaluationError(
            f'radius_unit="normalized" needs the standard deviation of each channel, and {type(bare(model)).__name__} '
            "does not say it: pass PixelModel(network), or PixelModel(network, mean, std)"
        )
    return units[0]


@contextmanager
def attackable(
    model: nn.Module, *, channels_last: bool = True, many: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from pixels (n, channels, height, width) to logits (n, classes) float32, ready to be differentiated.

    Meanwhile the network is in eval mode and its parameters are frozen, so that no attack leaves anything in their
    `.grad`; both are put back afterwards, module by module. It is called uncompiled and without autocast, and
    gradients are on whatever the caller has switched off. `model` is used by one attack at a time.

    Args:
        channels_last: give the network its images in this order of memory where it is on a CPU, whose convolutions
            and their gradients are faster in it. What it rounds is rounded otherwise, so where the bits of other
            programs count, it is False. A network that fails on such images (one that calls `view`) gets them
            contiguous.
        many: the function will be called many times: from the second call on BatchNorms are folded, see `folding.py`.
    """
    network = bare(model)
    modes = [(module, module.training) for module in network.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in network.parameters()]

    device = next((parameter.device.type for parameter, _ in frozen), "cpu")
    layout = torch.channels_last if channels_last and device == "cpu" else torch.contiguous_format
    folds = ExitStack()

    def logits(images: Tensor) -> Tensor:
        nonlocal layout, many
        try:
            given = network(images.contiguous(memory_format=layout))
        except RuntimeError:
            if layout is torch.contiguous_format:
                raise
            layout = torch.contiguous_format
            given = network(images.contiguous())
        if many and len(images):
            many = False
            folds.enter_context(folded(network, images[:1].contiguous(memory_format=layout)))
        return given.float() if isinstance(given, Tensor) else given  # what is no tensor, `check_logits` refuses

    try:
        network.eval()
        network.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False), folds:
            yield logits
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required in frozen:
            parameter.requires_grad_(required)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn from torch's global generators meanwhile, or seeds them, they are as before afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def bare(model: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` and `DistributedDataParallel` put around it."""
    while True:
        name = "module" if isinstance(model, nn.parallel.DistributedDataParallel) else "_orig_mod"
        inner = getattr(model, name, None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
