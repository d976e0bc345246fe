"""The layer cushion of convolutions and linear layers (paper, Section 3.2 and Appendix E, Fig. 4c and 12 to 20)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.capture import evaluating
from ..errors import EvaluationError, nearest
from .arguments import check_count, check_images
from .pixels import bare
from .representations import network_of

NORMS = ("operator", "kernel")


class Histograms(NamedTuple):
    """Counts of several samples over the same bins."""

    edges: list[float]  # k + 1
    counts: dict[str, list[int]]  # {name: k}


def weight_layers(model: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers whose cushion can be measured, in the order of `named_modules()`."""
    return [name for name, module in network_of(model).named_modules() if name and _is_linear_map(module)]


def layer_cushion(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    layers: Sequence[str] | None = None,
    *,
    norm: str = "operator",
    batch_size: int = 100,
) -> dict[str, Tensor]:
    """||W phi(x)|| / (||W||_F ||phi(x)||) of each image, {layer: (n,) float64}, in eval mode.

    phi(x) is what the layer is given, W its linear map, without bias. The ratio lies in [0, 1]; the cushion mu of
    the layer is the smallest over the training set (Arora et al., 2018), and the paper shows the distribution. NaN
    for an image whose phi(x) is zero, and everywhere if W is.

    Args:
        layers: names of `nn.Conv2d` or `nn.Linear` modules; None takes those of `weight_layers(model)` that a forward
            pass runs once, on the batch of images.
        norm: what ||W||_F is for a convolution. "operator": of the matrix that maps a flattened input to a flattened
            output, exact for every stride, dilation, grouping and kind of padding; so W x is bounded by it and layers
            of different sizes compare. "kernel": of the weight tensor, which ignores that the kernel is
            applied at many places; larger by about the root of the number of these, so beyond 1 at times. The same
            holds for a linear layer that is applied to each of several tokens.

    Raises:
        EvaluationError: no images, an unknown layer or norm, a layer that is no plain convolution or linear layer,
            or that a forward pass does not run exactly once.
    """
    check_images(images)
    if norm not in NORMS:
        raise EvaluationError(f"there is no norm {norm!r}; take one of {', '.join(map(repr, NORMS))}")
    chosen = weight_layers(model) if layers is None else list(dict.fromkeys(layers))
    modules = {layer: _linear_map(model, layer) for layer in chosen}
    parts: dict[str, list[Tensor]] = {layer: [] for layer in modules}
    for batch in images.split(check_count(batch_size, "batch_size")):
        with evaluating(model), _measuring(modules, norm) as found:
            bare(model)(batch)
        once = _of_one_run(found, len(batch))
        for layer in [layer for layer in modules if layer not in once]:
            if layers is not None:
                raise EvaluationError(
                    f"layer {layer!r} ran {len(found[layer])} times in one forward pass of {len(batch)} images; "
                    "its cushion needs a layer that runs once, on a batch of them"
                )
            del modules[layer], parts[layer]
        for layer, ratios in once.items():
            parts[layer].append(ratios)
    return {layer: torch.cat(values) for layer, values in parts.items()}


@contextlib.contextmanager
def cushions_of_pass(model: nn.Module) -> Iterator[Callable[[int], dict[str, Tensor]]]:
    """`layer_cushion` of all layers for a forward pass that is made inside the block, for something else as well.

    Gives a function of the number of images in that pass, for after the block: {layer: (n,) float64}.
    """
    with _measuring({layer: _linear_map(model, layer) for layer in weight_layers(model)}, "operator") as found:
        yield lambda count: _of_one_run(found, count)


def _of_one_run(found: Mapping[str, list[Tensor]], count: int) -> dict[str, Tensor]:
    """The ratios of the layers that ran once, on a batch of all images."""
    return {layer: seen[0] for layer, seen in found.items() if len(seen) == 1 and len(seen[0]) == count}


def operator_norm(
    module: nn.Conv2d | nn.Linear,
    shape: Sequence[int],
) -> float:
    """Frobenius norm of the matrix that maps one flattened input of the module to its output, without bias; exact.

    Args:
        shape: of one input: (channels, height, width), or (..., features).

    A convolution's entry for output (o, p) and input (i, q) sums the kernel elements k with place(p, k) = q. Places
    split into rows and columns, so the squared norm is sum_{o,i} <K_oi, A K_oi B>, where A counts for each two
    kernel rows the output rows at which both read the same input row, and B the same of columns. With zero padding A
    and B are diagonal: each element counts as often as it falls inside the image.
    """
    weight = module.weight.detach().double()
    if isinstance(module, nn.Linear):
        places = 1
        for size in shape[:-1]:
            places *= size
        return float(weight.norm()) * places**0.5
    left, right, top, bottom = module._reversed_padding_repeated_twice
    rows = _coincidences(module, 0, shape[-2], (top, bottom)).to(weight)
    columns = _coincidences(module, 1, shape[-1], (left, right)).to(weight)
    return float((weight * torch.einsum("ij,ocjk,kl->ocil", rows, weight, columns)).sum().clamp_min(0).sqrt())


def histograms(
    values: Mapping[str, Tensor],  # {name: (n,) float}
    bins: int = 40,
) -> Histograms:
    """Histograms of several samples over the same bins, from the smallest to the largest value; NaN are left out.

    Raises:
        EvaluationError: less than one bin, or no value at all.
    """
    samples = {name: value[~value.isnan()].double().cpu() for name, value in values.items()}
    filled = [value for value in samples.values() if len(value)]
    if bins < 1 or not filled:
        raise EvaluationError(f"a histogram needs at least one bin and one value, not {bins} and {len(filled)}")
    low, high = (float(end) for end in torch.cat(filled).aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return Histograms(
        edges.tolist(), {name: torch.histogram(value, edges)[0].long().tolist() for name, value in samples.items()}
    )


def _is_linear_map(module: nn.Module) -> bool:
    """Whether W is `module.weight`: a subclass with its own forward may standardise it, or pad in its own way."""
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward  # type: ignore[attr-defined]
        for kind in (nn.Conv2d, nn.Linear)
    )


def _linear_map(model: nn.Module, layer: str) -> nn.Conv2d | nn.Linear:
    modules = dict(network_of(model).named_modules())
    if layer not in modules:
        raise EvaluationError(f"there is no layer {layer!r}. " + nearest(layer, weight_layers(model), count=5))
    module = modules[layer]
    if not _is_linear_map(module):
        raise EvaluationError(
            f"layer {layer!r} is a {type(module).__name__}; a cushion needs an nn.Conv2d or nn.Linear with torch's own "
            "forward. " + nearest(layer, weight_layers(model), count=5)
        )
    return module  # type: ignore[return-value]


@contextlib.contextmanager
def _measuring(modules: Mapping[str, nn.Conv2d | nn.Linear], norm: str) -> Iterator[dict[str, list[Tensor]]]:
    """Ratios of each layer at each of its runs inside the block; computed in the hook, as inputs may be overwritten."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in modules}
    handles = [
        module.register_forward_pre_hook(functools.partial(_note, found[layer], norm), with_kwargs=True)
        for layer, module in modules.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: list[Tensor], norm: str, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """A forward pre-hook; `input` is what both kinds of layers call what they are given."""
    seen.append(_ratios(module, args[0] if args else named["input"], norm))  # type: ignore[arg-type]


def _ratios(module: nn.Conv2d | nn.Linear, inputs: Tensor, norm: str) -> Tensor:
    bound = operator_norm(module, inputs.shape[1:]) if norm == "operator" else float(module.weight.double().norm())
    if isinstance(module, nn.Linear):
        outputs = functional.linear(inputs, module.weight)
    else:
        outputs = module._conv_forward(inputs, module.weight, None)
    sizes = [value.flatten(1).double().norm(dim=1) for value in (outputs, inputs)]
    return sizes[0] / (bound * sizes[1])


def _coincidences(module: nn.Conv2d, axis: int, size: int, padding: tuple[int, int]) -> Tensor:
    """(k, k) float64: at how many output places two kernel places read the same input place, along one axis."""
    places = torch.arange(1, size + 1, dtype=torch.float64)[None, None]  # 0 is what zero padding adds
    if module.padding_mode == "zeros":
        places = functional.pad(places, padding)
    else:
        places = functional.pad(places, padding, mode=module.padding_mode)
    kernel, dilation, stride = module.kernel_size[axis], module.dilation[axis], module.stride[axis]
    span = dilation * (kernel - 1) + 1
    read = places[0, 0].unfold(0, span, stride)[:, ::dilation]  # (outputs, kernel)
    return ((read[:, :, None] == read[:, None, :]) & (read > 0)[:, :, None]).sum(0).double()
