"""Representations: the activations of layers, and how many directions they take and how far they move."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.capture import Tap, evaluating, recording
from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..core.spectrum import variance_ratio
from ..core.views import FLATTEN, View
from ..errors import CaptureError, EvaluationError, EvaluationWarning
from ..layers import rows_of_images
from ..wrapping import find_taps
from .arguments import check_count, check_images
from .pixels import PixelModel, bare


def activations(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    layers: Sequence[str],
    batch_size: int = 500,
    views: Mapping[str, View] | None = None,
) -> dict[str, Tensor]:
    """The activations of layers, {layer: (n, features)} of the network's dtype, in eval mode, no graph.

    Args:
        model: a `PixelModel`, or any module that takes pixels.
        layers: dotted names as in `named_modules()` of the network (a `PixelModel`'s network, that is), each
            meaning that module's output; "pre_logits" is the input of the classifier.
        batch_size: images in one forward pass.
        views: of layers whose samples are not whole images, as of a branch (`LowRankModel.taps`); all others are
            flattened.

    Raises:
        EvaluationError: no images, a layer that does not exist (the nearest are named), that a forward pass does
            not run exactly once, or that is overwritten in place after it was recorded.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch in activation_batches(model, images, layers, batch_size, views):
        for layer, value in batch.items():
            parts.setdefault(layer, []).append(value)
    return {layer: torch.cat(values) for layer, values in parts.items()}


def activation_batches(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    batch_size: int = 500,
    views: Mapping[str, View] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """As `activations`, batch by batch, for what is too large to hold.

    Raises:
        EvaluationError: as `activations`.
    """
    flattened = taps_of(model, images, layers)
    taps = [dataclasses.replace(tap, view=(views or {}).get(tap.layer, FLATTEN)) for tap in flattened]
    for batch in images.split(check_count(batch_size, "batch_size")):
        with evaluating(model):
            values = captured(model, taps, batch)
        yield values


def taps_of(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tap]:
    """Where `layers` are read, flattened, found by one forward pass of the first image.

    Raises:
        EvaluationError: as `activations`.
    """
    check_images(images)
    if isinstance(layers, str) or not layers:
        raise EvaluationError(f"layers must be a list of at least one layer name, not {layers!r}")
    network = network_of(model)
    weight = next(network.parameters(), images)
    try:
        example = images[:1].to(weight.device, weight.dtype)
        taps, *_ = find_taps(network, LowRankConfig(branches=dict.fromkeys(layers, 1), head_weight=0.0), example)
        fits = rows_of_images(network, taps, example)
    except (ValueError, CaptureError) as error:
        raise EvaluationError(str(error)) from error
    if others := [layer for layer, whether in fits.items() if not whether]:
        raise EvaluationError(
            f"the first dimension of what {', '.join(map(repr, others))} gives is not the batch (was it made with "
            "batch_first=False?): its rows are not those of images; choose another layer"
        )
    return [dataclasses.replace(tap, view=FLATTEN) for tap in taps]


def captured(model: nn.Module, taps: Sequence[Tap], images: Tensor) -> dict[str, Tensor]:
    """Activations {layer: (n, features)} of one forward pass, with a graph where gradients are on.

    Raises:
        EvaluationError: a layer did not run exactly once, or was overwritten in place after it was recorded.
    """
    with recording(network_of(model), taps) as record:
        bare(model)(images)
    try:
        return {tap.layer: tap.view.rows(record.activation(tap)) for tap in taps}
    except CaptureError as error:
        raise EvaluationError(str(error)) from error


def network_of(model: nn.Module) -> nn.Module:
    """The network whose module names a user knows: without `PixelModel`, branches or compilation around it."""
    model = bare(model)
    network = bare(model.network) if isinstance(model, PixelModel) else model
    return network.backbone if isinstance(network, LowRankModel) else network


# ---- directions ----


def principal(
    matrix: Tensor,  # (n, m) float64, its columns centred by the caller
    count: int,
) -> tuple[Tensor, Tensor]:
    """Projections (n, count) on the leading principal directions, and these, (m, count) with orthonormal columns.

    Directions beyond the rank of the matrix carry nothing but round-off; they come back as zeros. Signs are those
    of LAPACK. Takes 8 * min(n, m)^2 bytes and `count` may be at most min(n, m).
    """
    rows, width = matrix.shape
    wide = width > rows
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    energies, vectors = energies[-count:].flip(0), vectors[:, -count:].flip(1)
    lost = energies <= min(rows, width) * torch.finfo(matrix.dtype).eps * energies[0]
    basis = matrix.T @ vectors / energies.clamp_min(torch.finfo(matrix.dtype).tiny).sqrt() if wide else vectors
    basis = basis.masked_fill(lost, 0.0)
    return matrix @ basis, basis


def class_variance_ratio(
    activations: Tensor,  # (n, m) or (n, ...), any float dtype
    labels: Tensor,  # (n,) int64
    ranks: Sequence[int] = (1,),
    *,
    centred: bool = True,
) -> dict[int, list[float]]:
    """sum_{i <= r} sigma_i^2 / sum_i sigma_i^2 for every r in `ranks`, of the rows of each class alone (Fig. 7).

    Args:
        centred: sigma_i are the singular values of the class's activations minus their mean, or of the activations
            as they are. The paper's "inverse stable rank" sigma_1^2 / ||A||_F^2 is of A as it is: there the mean
            of the class counts as a direction, and mostly it is the first.

    Returns:
        {class: ratios}, by class, for the classes that occur. NaN, with an `EvaluationWarning`, where a class has
        no variance: all its rows are equal, which one row always is (centred), or all are zero (not centred).

    Raises:
        EvaluationError: labels that do not fit, no activations, values that are not finite, ranks below 1.
    """
    if activations.dim() < 2 or not activations.is_floating_point() or not len(activations):
        shape = f"{tuple(activations.shape)} {activations.dtype}"
        raise EvaluationError(f"activations must be (n, features) floating point with n >= 1, not {shape}")
    if labels.shape != activations.shape[:1]:
        raise EvaluationError(f"{len(activations)} activations need as many labels, not {tuple(labels.shape)}")
    rows = activations.detach().flatten(1)
    by_class: dict[int, list[float]] = {}
    for label in labels.unique().tolist():
        matrix = rows[labels == label]
        if bool((matrix == (matrix[:1] if centred else 0)).all()):
            by_class[label] = [math.nan] * len(ranks)
            continue
        try:
            # The mean of A and -A together is zero, and their squared singular values are twice those of A alone.
            by_class[label] = variance_ratio(matrix if centred else torch.cat([matrix, -matrix]), ranks)
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"class {label}: {error}") from error
    if flat := [label for label, ratios in by_class.items() if any(map(math.isnan, ratios))]:
        warnings.warn(
            f"classes {flat} have no variance, so their variance ratio is NaN: all their activations are "
            + ("equal" if centred else "zero"),
            EvaluationWarning,
            stacklevel=2,
        )
    return by_class


# ---- low-rank pre-activations (paper, Appendix A) ----


class Preactivations(NamedTuple):
    """What the activation function at the end of a layer takes, and the function."""

    values: Tensor  # (n, features), of the network's dtype
    function: nn.Module  # elementwise


def preactivations(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    layer: str,
    batch_size: int = 500,
) -> Preactivations:
    """The pre-activations of a layer that ends in an elementwise activation function, in eval mode, no graph.

    What comes behind the function and changes no number (dropout, an identity, a flattening) is passed over.

    Args:
        model, layer, batch_size: as of `activations`.

    Raises:
        EvaluationError: the layer ends in no such function, and as `activations`.
    """
    (tap,) = taps_of(model, images, [layer])
    named = dict(network_of(model).named_modules())
    module = named[layer if layer in named else tap.path]  # the tap may be on the last part of the layer
    refused = EvaluationError(f"layer {layer!r} does not end in an elementwise activation function")
    ran: list[nn.Module] = []
    leaves = [] if tap.takes_input else [one for one in module.modules() if not list(one.children())]
    _with_hook(model, tap, images[:1], leaves, lambda one, _: ran.append(one))
    for function in dict.fromkeys(reversed(ran)):
        before: list[Tensor] = []
        note = functools.partial(_note_input, before)
        after = [
            _with_hook(model, tap, batch, [function], note)
            for batch in images.split(check_count(batch_size, "batch_size"))
        ]
        values = torch.cat(before).flatten(1)
        if torch.equal(values, torch.cat(after)):
            continue
        if not _is_elementwise(function, values, torch.cat(after)):
            break
        return Preactivations(values, function)
    raise refused


def _note_input(seen: list[Tensor], module: nn.Module, taken: tuple[Any, ...]) -> None:
    seen.append(taken[0].clone())


@torch.no_grad()
def _is_elementwise(function: nn.Module, values: Tensor, after: Tensor) -> bool:
    """Whether it makes `after` of `values`, (n, features) both, and of each number by itself."""
    try:
        # Not equal to the last bit: vector and scalar instructions of a processor may round an exponential otherwise,
        # and which of them a number meets depends on how many there are.
        return torch.allclose(function(values.clone()), after) and torch.allclose(
            function(values[:1].reshape(-1, 1).clone()).flatten(), after[:1].flatten()
        )
    except (RuntimeError, ValueError):  # a convolution, a norm or a linear layer
        return False


def _with_hook(
    model: nn.Module, tap: Tap, images: Tensor, modules: Sequence[nn.Module], hook: Callable[[nn.Module, Any], None]
) -> Tensor:
    """The activations of one forward pass, before which `hook` is put on modules and after which it is gone."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        with evaluating(model):
            return captured(model, [tap], images)[tap.layer]
    finally:
        for handle in handles:
            handle.remove()


class CutSpectrum(NamedTuple):
    """The singular values of activations whose pre-activations were cut to a rank, all as they are: not centred."""

    cut: int  # the rank of the pre-activations
    singular_values: Tensor  # (min(n, features),) float64, descending

    @property
    def rank(self) -> int:
        """Singular values above round-off."""
        values = self.singular_values
        return int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())

    @property
    def share(self) -> float:
        """Of the squared singular values, what the first `cut` hold."""
        energies = self.singular_values.square()
        return float(energies[: self.cut].sum() / energies.sum())


def cut_spectrum(
    values: Tensor,  # (n, features) pre-activations
    function: Callable[[Tensor], Tensor],  # elementwise
    rank: int,
) -> CutSpectrum:
    """Cuts pre-activations to their best approximation of a rank and applies the activation function.

    The paper (Appendix A) does so to show that pre-activations of low rank, which low-rank weights give, do not make
    activations of low rank.

    Raises:
        EvaluationError: a rank below 1 or not below that of the matrix's smaller side; values that are not finite.
    """
    most = min(values.shape)
    if not 1 <= rank < most:
        raise EvaluationError(f"pre-activations {tuple(values.shape)} can be cut to a rank of 1 to {most - 1}")
    if not values.isfinite().all():
        raise EvaluationError("the pre-activations are not finite: is the network trained?")
    matrix = values.double()
    wide = matrix.shape[1] > matrix.shape[0]
    vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix).eigenvectors[:, -rank:]
    low = vectors @ (vectors.T @ matrix) if wide else (matrix @ vectors) @ vectors.T
    if isinstance(function, nn.Module):  # which may have parameters
        function = copy.deepcopy(function).to(low)
    with torch.no_grad():
        return CutSpectrum(rank, torch.linalg.svdvals(function(low)))


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane of largest variance of some activations (Appendix C.4, Fig. 8). Made by `fit_plane`."""

    mean: Tensor  # (m,) float64
    basis: Tensor  # (m, 2) float64, orthonormal columns; the second is zero if there is one direction alone
    shares: tuple[float, float]  # of the variance that the two directions hold

    def project(
        self,
        activations: Tensor,  # (n, m) or (n, ...), any float dtype
    ) -> Tensor:
        """Coordinates (n, 2) float64 of activations in the plane.

        Raises:
            EvaluationError: another number of features than the plane was fitted on.
        """
        rows = activations.detach().flatten(1)
        if rows.shape[1] != len(self.mean):
            raise EvaluationError(f"the plane was fitted on {len(self.mean)} features, these are {rows.shape[1]}")
        return (rows.double() - self.mean) @ self.basis


def fit_plane(
    activations: Tensor,  # (n, m) or (n, ...), any float dtype
) -> Plane:
    """The first two principal directions of centred activations.

    Signs are fixed: the coefficient of largest absolute value of each direction is positive, so that the picture does
    not flip from one machine to the next.

    Raises:
        EvaluationError: fewer than two images or two features, values that are not finite, or no variance.
    """
    rows = activations.detach().flatten(1).double()
    if min(rows.shape) < 2:
        raise EvaluationError(f"a plane needs at least two images and two features, not {tuple(rows.shape)}")
    mean = rows.mean(dim=0)
    centred = rows - mean
    total = float(centred.square().sum())
    if not 0 < total < float("inf"):
        raise EvaluationError("a plane needs activations that are finite and not all equal")
    seen, basis = principal(centred, 2)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    basis = torch.where(largest < 0, -basis, basis)
    first, second = (float(value) / total for value in seen.square().sum(dim=0))
    return Plane(mean, basis, (first, second))


# ---- distances (paper, Sections 3.1 and 3.2) ----


class Stability(NamedTuple):
    """Per image, squared and normalised: how far the input moved, and how far each representation did."""

    inputs: Tensor  # (n,) float64, ||delta||^2 / ||x||^2
    layers: dict[str, Tensor]  # {layer: (n,) float64}, ||f(x + delta) - f(x)||^2 / ||f(x)||^2


def rho(
    images: Tensor,  # (n, channels, height, width) clean
    adversarial: Tensor,  # of the same shape
) -> Tensor:
    """||x_a - x||_2 / ||x||_2 of each image, (n,) float64; the paper's rho is the mean of it (Section 3.1).

    NaN, with an `EvaluationWarning`, for an image that is zero everywhere: nothing can be said relative to it; take
    `nanmean`.

    Raises:
        EvaluationError: no images, or of different shapes.
    """
    _check_pair(images, adversarial)
    distances = _moved(images, adversarial).sqrt()
    _warn_of_zeros(distances, "images are zero everywhere, so rho of them is NaN")
    return distances


def stability(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    adversarial: Tensor,  # of the same shape, the same images perturbed
    layers: Sequence[str],
    batch_size: int = 500,
    *,
    clean: Mapping[str, Tensor] | None = None,  # {layer: (n, features)}
) -> Stability:
    """How far each perturbation moves the input and the representations (paper, Fig. 4b and 16), in eval mode.

    Input norms are those of the pixels in [0, 1], before the normalisation inside the model. NaN, with an
    `EvaluationWarning`, where the clean image or its representation is zero.

    Args:
        model, layers: as in `activations`.
        clean: `activations` of the images, where they are known already.

    Raises:
        EvaluationError: images of different shapes, and as `activations`.
    """
    _check_pair(images, adversarial)
    parts: dict[str, list[Tensor]] = {}
    if clean is None:
        before = activation_batches(model, images, layers, batch_size)
    else:
        split = [clean[layer].to(images.device).split(batch_size) for layer in layers]
        before = (dict(zip(layers, batch, strict=True)) for batch in zip(*split, strict=True))
    after = activation_batches(model, adversarial, layers, batch_size)
    for start, moved in zip(before, after, strict=True):
        for layer, value in start.items():
            parts.setdefault(layer, []).append(_moved(value, moved[layer]))
    shifts = {layer: torch.cat(values) for layer, values in parts.items()}
    inputs = _moved(images, adversarial)
    _warn_of_zeros(inputs, "images are zero everywhere, so their stability is NaN")
    for layer, values in shifts.items():
        _warn_of_zeros(values, f"images have a representation of zeros at layer {layer!r}: NaN there")
    return Stability(inputs, shifts)


def _moved(clean: Tensor, moved: Tensor) -> Tensor:
    """||moved - clean||^2 / ||clean||^2 of each row, float64; NaN where clean is zero."""
    start = clean.detach().flatten(1).double()
    energy = start.square().sum(dim=1)
    ratio = (moved.detach().flatten(1).double() - start).square().sum(dim=1) / energy
    return ratio.masked_fill(energy == 0, torch.nan)


def _check_pair(images: Tensor, adversarial: Tensor) -> None:
    check_images(images)
    if images.shape != adversarial.shape:
        shapes = f"{tuple(images.shape)} and {tuple(adversarial.shape)}"
        raise EvaluationError(f"clean and perturbed images must be of one shape, not {shapes}")


def _warn_of_zeros(values: Tensor, text: str) -> None:
    if count := int(values.isnan().sum()):
        warnings.warn(f"{count} of {len(values)} {text}", EvaluationWarning, stacklevel=3)
