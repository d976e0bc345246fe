"""Max-margin classifiers on representations (paper, Section 3.3, Appendices C.1 and C.2, Tables 5 to 8), and the hybrid
models made of a network up to a layer and such a classifier."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..core.capture import Tap, evaluating
from ..environment import require
from ..errors import EvaluationError
from .arguments import check_images
from .pixels import bare, classified_right
from .representations import captured, network_of, principal, taps_of

L2 = 0.01  # paper, Appendix C


@dataclasses.dataclass(frozen=True)
class MaxMarginClassifier:
    """Scaling, projection and linear classifier as one affine map, scores = activations @ weight + bias.

    Made by `max_margin_classifiers`.
    """

    weight: Tensor  # (m, classes) float64
    bias: Tensor  # (classes,) float64
    dimensions: int | None  # of the projection; None: there is none

    def scores(
        self,
        activations: Tensor,  # (n, m) or (n, ...), any float dtype
    ) -> Tensor:
        """The margin of each class, (n, classes) float64.

        Raises:
            EvaluationError: another number of features than the classifier was fitted on.
        """
        rows = activations.detach().flatten(1)
        if rows.shape[1] != len(self.weight):
            raise EvaluationError(f"the classifier was fitted on {len(self.weight)} features, not {rows.shape[1]}")
        return rows.double() @ self.weight.to(rows.device) + self.bias.to(rows.device)

    def predict(self, activations: Tensor) -> Tensor:
        """The class of each row, (n,) int64."""
        return self.scores(activations).argmax(dim=1)

    @property
    def parameters(self) -> int:
        """Numbers that have to be stored: of the one affine map, or of projection and classifier if these are fewer."""
        width, classes = self.weight.shape
        folded = width * classes + classes
        if self.dimensions is None:
            return folded
        return min(folded, width * self.dimensions + self.dimensions + self.dimensions * classes + classes)


def max_margin_classifiers(
    train: Tensor,  # (n, m) or (n, ...), any float dtype: activations of training images
    labels: Tensor,  # (n,) int64, of every class 0 ... K - 1 at least one
    dimensions: Sequence[int | None] = (None,),
    *,
    l2: float = L2,
    seed: int = 0,
    epochs: int = 1000,
    classes: int | None = None,
) -> list[MaxMarginClassifier]:
    """One classifier for each number of dimensions, by the recipe of the paper's Appendix C.

    Each feature is brought to mean 0 and variance 1 over `train`, projected on the d leading principal directions of
    that, and scikit-learn's `SGDClassifier` (hinge loss, one class against the rest) is fitted, with its "optimal"
    schedule eta_t = 1 / (l2 (t_0 + t)): the paper's eta_0 / (1 + alpha t), set by the heuristics of its footnote 9.
    Nothing depends on anything but the arguments; another `seed` gives another order of the images, and with few
    dimensions an accuracy that differs by a few points, so report it.

    Args:
        dimensions: d of each classifier; None leaves out the projection.
        l2: coefficient of the L2 regularization.
        epochs: passes over `train` at most; fitting stops when the loss no longer falls, mostly within 200.
        classes: K; without it the largest of `labels` is taken for the last class.

    Raises:
        EvaluationError: dimensions that the activations do not have, fewer than two classes, a class without images,
            labels that do not fit, or activations that are not finite.
        ImportError: scikit-learn is not installed.
    """
    rows = _checked(train, labels, dimensions, classes)
    mean = rows.mean(dim=0)
    scale = rows.std(dim=0, correction=0)
    rounding = 4 * torch.finfo(train.dtype).eps if train.is_floating_point() else 0.0
    scale = torch.where(scale > rounding * mean.abs(), scale, 1.0)  # the feature is constant
    scaled = (rows - mean) / scale
    # Without a projection, SGD never leaves the span of the images: more features than these change nothing but time.
    few = min(scaled.shape)
    wanted = [few if count is None and rows.shape[1] > few else count for count in dimensions]
    seen, basis = principal(scaled, max(count or 0 for count in wanted)) if any(wanted) else (scaled, scaled)
    classifiers = []
    for count, asked in zip(wanted, dimensions, strict=True):
        coefficients, bias = _fit(scaled if count is None else seen[:, :count], labels, l2, seed, epochs)
        weight = coefficients if count is None else basis[:, :count] @ coefficients
        weight = weight / scale[:, None]
        classifiers.append(MaxMarginClassifier(weight, bias - mean @ weight, asked))
    return classifiers


def linear_accuracy(
    train: Tensor,  # (n, m) activations of training images, any float dtype
    train_labels: Tensor,  # (n,) int64
    test: Tensor,  # (k, m) activations of test images
    test_labels: Tensor,  # (k,) int64
    directions: Sequence[int | None],
    *,
    seed: int = 0,
) -> list[float]:
    """Test accuracy of a linear classifier that sees only the first d principal directions (Tables 5 and 8).

    The one way in which this package measures what a few directions are worth: `max_margin_classifiers`, with the
    paper's settings, fitted on all of `train`.

    Args:
        directions: d of each accuracy; None is the whole representation.
        seed: of the order of the images.

    Raises:
        EvaluationError: no test images, activations and labels that do not fit, or as `max_margin_classifiers`.
        ImportError: scikit-learn is not installed.
    """
    if not len(test) or test_labels.shape != test.shape[:1]:
        shape = tuple(test_labels.shape)
        raise EvaluationError(f"{len(test)} activations and {shape} labels: give as many, at least one")
    classes = int(torch.cat([train_labels, test_labels.to(train_labels)]).max()) + 1
    classifiers = max_margin_classifiers(train, train_labels, directions, seed=seed, classes=classes)
    return [float((each.predict(test) == test_labels).double().mean()) for each in classifiers]


def _checked(train: Tensor, labels: Tensor, dimensions: Sequence[int | None], classes: int | None) -> Tensor:
    """`train` as a float64 matrix."""
    if train.dim() < 2 or labels.shape != train.shape[:1] or labels.is_floating_point():
        shapes = f"{tuple(train.shape)} and {tuple(labels.shape)} {labels.dtype}"
        raise EvaluationError(f"activations (n, features) need labels (n,) of int64, not {shapes}")
    counts = labels.bincount(minlength=classes or 0).tolist() if len(labels) and int(labels.min()) >= 0 else []
    if len(counts) < 2 or 0 in counts:
        empty = f"class {counts.index(0)} has no training images" if 0 in counts else f"there are {len(counts)} classes"
        raise EvaluationError(f"a classifier needs images of every class 0 ... K - 1 with K >= 2, but {empty}")
    rows = train.detach().flatten(1).double()
    most = min(rows.shape)
    if not dimensions or not all(count is None or 1 <= count <= most for count in dimensions):
        raise EvaluationError(f"dimensions must lie between 1 and {most}, or be None for all, not {list(dimensions)}")
    if not rows.isfinite().all():
        raise EvaluationError("the activations are not finite: is the network trained?")
    return rows


def _fit(features: Tensor, labels: Tensor, l2: float, seed: int, epochs: int) -> tuple[Tensor, Tensor]:
    """Coefficients (d, classes) and bias (classes,) of features (n, d), all float64."""
    machine = require("sklearn.linear_model", "scikit-learn", "evaluate").SGDClassifier(
        loss="hinge", penalty="l2", alpha=l2, max_iter=epochs, random_state=seed
    )
    machine.fit(features.cpu().numpy(), labels.cpu().numpy())
    weight, bias = torch.from_numpy(machine.coef_), torch.from_numpy(machine.intercept_)
    if len(weight) == 1:  # two classes share one machine: its margin speaks for the second
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    return weight.T.to(features), bias.to(features)


# ---- hybrid models ----


class HybridVerdict(NamedTuple):
    """Per image, so that chunks can be concatenated."""

    right: Tensor  # (n,) bool: the hybrid classifies the adversarial image as its label
    counted: Tensor  # (n,) bool: the network classifies the clean image as its label and the adversarial one not


class HybridModel(nn.Module):
    """Takes pixels in [0, 1] and gives the float32 scores of a max-margin classifier on a layer of a network.

    Differentiable, so every attack runs on it as on the network. The network is shared, not copied.

    Args:
        model: a `PixelModel`, or any module that takes pixels.
        layer: whose activations the classifier was fitted on, named as in `activations`.
        classifier: one of `max_margin_classifiers`.
        example: one image or more (n, channels, height, width), to find the layer.

    Raises:
        EvaluationError: a layer that does not exist, or is not as wide as the classifier.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, layer: str, classifier: MaxMarginClassifier, example: Tensor) -> None:
        super().__init__()
        self.model = bare(model)
        self.taps = taps_of(model, example, [layer])
        with evaluating(model):
            activations = captured(model, self.taps, example[:1])[layer]
        classifier.scores(activations)  # raises if the widths differ
        self.register_buffer("weight", classifier.weight.to(activations.device, torch.float32), persistent=False)
        self.register_buffer("bias", classifier.bias.to(activations.device, torch.float32), persistent=False)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, classes) float32 of images (batch, channels, height, width) float in [0, 1]."""
        (activations,) = captured(self.model, self.taps, images).values()
        return activations.float() @ self.weight + self.bias


def judge_hybrid(
    network: nn.Module,
    hybrid: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    adversarial: Tensor,  # of the same shape, crafted on the network or on another
    labels: Tensor,  # (n,) int64
    *,
    batch_size: int = 500,
) -> HybridVerdict:
    """What the hybrid makes of the images that fooled its network (Appendix D.5, Table 6).

    Raises:
        EvaluationError: no images, or images and labels that do not fit.
    """
    check_images(images)
    clean = classified_right(network, images, labels, batch_size)
    fooled = ~classified_right(network, adversarial, labels, batch_size)
    return HybridVerdict(classified_right(hybrid, adversarial, labels, batch_size), clean & fooled)


def parameters_behind(
    model: nn.Module,
    layer: str,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]; one will do
) -> int:
    """How many parameters a classifier on `layer` replaces: those with which its activations become logits.

    A parameter counts if the logits depend on it while the activations of `layer` are held fixed; those in front of
    the layer only act through it, so they do not. What the layer gives beside its activations, such as class tokens, is
    held fixed, too. Statistics of normalisation layers are no parameters.

    Raises:
        EvaluationError: no images, or a layer as in `activations`.
    """
    (tap,) = taps_of(model, images, [layer])
    model = bare(model)
    free = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    with evaluating(model), _cut(network_of(model), tap), torch.enable_grad():
        logits: Tensor = torch.func.functional_call(model, free, (images[:1].detach(),))
    if not logits.requires_grad:
        return 0
    gradients = torch.autograd.grad(logits.sum(), list(free.values()), allow_unused=True)
    return sum(value.numel() for value, gradient in zip(free.values(), gradients, strict=True) if gradient is not None)


@contextlib.contextmanager
def _cut(network: nn.Module, tap: Tap) -> Iterator[None]:
    """Detach what `tap` sees from everything in front of it, for as long as the block lasts."""
    module = network.get_submodule(tap.path)

    def cut_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].detach(), *args[1:])

    def cut_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tree_map_only(Tensor, Tensor.detach, output)  # a stage or block may give several

    handle = (
        module.register_forward_pre_hook(cut_input) if tap.takes_input else module.register_forward_hook(cut_output)
    )
    try:
        yield
    finally:
        handle.remove()
