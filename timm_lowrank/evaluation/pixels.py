"""`PixelModel`: a network that takes pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.model import LowRankModel


class PixelModel(nn.Module):
    """A network that takes pixels in [0, 1], normalises them itself and returns float32 logits.

    Args:
        network: a timm network or `LowRankModel`; mean and std come from its `pretrained_cfg`.
        mean, std: per channel; for a network without `pretrained_cfg`, or to overrule it.

    Raises:
        ValueError: mean and std are not known.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        network = bare(network)
        self.network = network.unwrap() if isinstance(network, LowRankModel) else network
        self.train(self.network.training)
        config = dict(getattr(self.network, "pretrained_cfg", None) or {})
        mean, std = mean or config.get("mean"), std or config.get("std")
        if mean is None or std is None:
            raise ValueError(f"the normalisation of a {type(self.network).__name__} is not known: pass mean and std")
        device = next((parameter.device for parameter in self.network.parameters()), None)
        self.register_buffer("mean", torch.tensor(mean, device=device).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) float32 of images (batch, channels, height, width) float in [0, 1].

        Raises:
            ValueError: integer images, or pixels outside [0, 1].
        """
        if not images.is_floating_point():
            raise ValueError(f"pixels must be floating point in [0, 1], not {images.dtype}: divide by 255")
        low, high = images.detach().aminmax()
        if low < 0 or high > 1:
            raise ValueError(
                f"pixels must lie in [0, 1], these in [{low:.3g}, {high:.3g}]: are they normalised already?"
            )
        normalised = (images.float() - self.mean) / self.std
        weight = next(self.network.parameters(), normalised)
        logits: Tensor = self.network(normalised.to(weight.dtype))
        return logits.float()


@torch.no_grad()
def predictions(
    model: PixelModel,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    batch_size: int = 500,
) -> Tensor:
    """The most likely class of each image, (n,) int64, in eval mode."""
    mode = model.training
    model.eval()
    try:
        return torch.cat([model(batch).argmax(dim=1) for batch in images.split(batch_size)])
    finally:
        model.train(mode)


@contextmanager
def attackable(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from pixels (n, channels, height, width) to logits (n, classes) float32, ready to be differentiated.

    Meanwhile the network is in eval mode and its parameters are frozen, so that no attack leaves anything in their
    `.grad`; both are put back afterwards, module by module. It is called uncompiled and without autocast, on
    contiguous images, and gradients are on whatever the caller has switched off. `model` is used by one attack at a
    time.
    """
    network = bare(model)
    modes = [(module, module.training) for module in network.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in network.parameters()]

    def logits(images: Tensor) -> Tensor:
        found: Tensor = network(images.contiguous())
        return found.float() if isinstance(found, Tensor) else found

    device = next((parameter.device.type for parameter, _ in frozen), "cpu")
    try:
        network.eval()
        network.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
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
