"""Building timm's networks for the sweep: quickly, with random weights, for the smallest images that they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

CLASSES = 10
BATCH = 2  # batch normalisation of a 1 x 1 map needs two images
SIZES = (64, 56, 96, 112, 128, 160, 192, 224, 256)  # images to try, in this order; then the network's own size

_RANDOM = {"normal_", "uniform_", "erfinv_", "trunc_normal_", "orthogonal_", "sparse_"}
_RANDOM |= {f"{method}_{law}_" for method in ("kaiming", "xavier") for law in ("normal", "uniform")}


class _LazyInit(torch.overrides.TorchFunctionMode):
    """Leaves out the random numbers of large initialisations; `fill` makes up for them afterwards, in one draw."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:  # methods of tensors and functions of nn.init
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
            if tensor.numel() > 10_000:
                self.skipped.add(tensor.data_ptr())
                with torch.no_grad():  # zeros: torch draws truncated laws anew until all values lie within the bounds
                    return tensor.zero_()
        return func(*args, **kwargs)

    def fill(self, network: nn.Module) -> None:
        noise = torch.rand(2**20, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for value in [*network.parameters(), *network.buffers()]:
            if value.data_ptr() in self.skipped:
                scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.02
                for part in value.data.view(-1).split(len(noise)):
                    torch.mul(noise[: len(part)], scale, out=part)


def family(name: str) -> str:
    """The module of timm that a network is defined in, for example "resnet"."""
    return model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def build(
    name: str,
    size: int | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    *,
    filled: bool = True,
) -> nn.Module:
    """A network of timm, its global random stream left alone.

    Args:
        size: of the images, pixels, where the network has to be told; None is its own.
        options: further keywords for `timm.create_model`.
        filled: whether the weights have to be anything in particular, namely random.
    """
    keywords: dict[str, Any] = {"pretrained": False, "num_classes": CLASSES, **(options or {})}
    lazy = _LazyInit()
    with torch.random.fork_rng(devices=[]), torch.device(device), lazy:
        torch.manual_seed(0)
        if size is None:
            network = timm.create_model(name, **keywords)
        else:
            try:
                network = timm.create_model(name, img_size=size, **keywords)
            except TypeError as problem:
                if "img_size" not in str(problem):
                    raise
                network = timm.create_model(name, **keywords)
    if filled:
        lazy.fill(network)
    return network


def candidates(
    name: str, shape: Sequence[int], device: str, options: Mapping[str, Any] | None = None
) -> Iterator[tuple[nn.Module, Tensor, int | None]]:
    """The network with images of every size of `SIZES` that it takes, then of its own; with the `img_size` it got.

    Args:
        shape: of its own images, (channels, height, width).
    """
    channels, height, width = shape
    for size in (*SIZES, None):
        if size is not None and size >= min(height, width):
            continue
        sides = (height, width) if size is None else (size, size)
        images = torch.rand(BATCH, channels, *sides, generator=torch.Generator().manual_seed(0)).to(device) - 0.5
        try:
            network = build(name, size, device, options)
            with torch.no_grad():
                network.eval()(images)
        except Exception:
            if size is None:
                raise
            continue
        yield network, images, size
