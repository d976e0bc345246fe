"""Max-margin classifiers on representations (paper, Section 3.3, Appendices C.1 and C.2, Tables 5, 7c and 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError
from .principal import principal

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


@dataclasses.dataclass(frozen=True)
class CompressionRow:
    """One line of Tables 5 and 8."""

    dimensions: int | None  # None: all of the representation
    hits: int
    of: int
    parameters: int  # of projection and classifier
    replaced: int  # parameters of the layers whose place they take

    @property
    def accuracy(self) -> float:
        return self.hits / self.of


def max_margin_classifiers(
    train: Tensor,  # (n, m) or (n, ...), any float dtype: activations of training images
    labels: Tensor,  # (n,) int64, of every class 0 ... K - 1 at least one
    dimensions: Sequence[int | None] = (None,),
    *,
    l2: float = L2,
    seed: int = 0,
    epochs: int = 1000,
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

    Raises:
        EvaluationError: dimensions that the activations do not have, fewer than two classes, a class without images,
            labels that do not fit, or activations that are not finite.
        ImportError: scikit-learn is not installed.
    """
    rows = _checked(train, labels, dimensions)
    fit = _fitter(labels, l2, seed, epochs)
    mean = rows.mean(dim=0)
    scale = rows.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-12 * mean.abs(), scale, 1.0)  # round-off: the feature is constant
    scaled = (rows - mean) / scale
    # Without a projection, SGD never leaves the span of the images: more features than these change nothing but time.
    few = min(scaled.shape)
    wanted = [few if count is None and rows.shape[1] > few else count for count in dimensions]
    seen, basis = principal(scaled, max(count or 0 for count in wanted)) if any(wanted) else (scaled, scaled)
    found = []
    for count, asked in zip(wanted, dimensions, strict=True):
        coefficients, bias = fit(scaled if count is None else seen[:, :count])
        weight = coefficients if count is None else basis[:, :count] @ coefficients
        weight = weight / scale[:, None]
        found.append(MaxMarginClassifier(weight, bias - mean @ weight, asked))
    return found


def compression(
    classifiers: Sequence[MaxMarginClassifier],
    test: Tensor,  # (n, m) activations of test images
    labels: Tensor,  # (n,) int64
    replaced: int,
) -> list[CompressionRow]:
    """The compression table: accuracy of each classifier, and its parameters beside those that it replaces.

    Args:
        replaced: of the layers behind the representation, see `parameters_behind`.

    Raises:
        EvaluationError: no test images, or activations and labels that do not fit.
    """
    if not len(test) or labels.shape != test.shape[:1]:
        raise EvaluationError(f"{len(test)} activations and {tuple(labels.shape)} labels: give as many, at least one")
    hits = [int((classifier.predict(test) == labels).sum()) for classifier in classifiers]
    return [
        CompressionRow(classifier.dimensions, hit, len(test), classifier.parameters, replaced)
        for classifier, hit in zip(classifiers, hits, strict=True)
    ]


def label_transfer(
    train: Tensor,  # (n, m) activations of training images
    test: Tensor,  # (k, m) activations of test images
    labels: Mapping[str, tuple[Tensor, Tensor]],  # {name: ((n,), (k,))} int64, training and test
    *,
    dimensions: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """How well one representation serves several sets of labels: {name: (k,) bool, test image classified right}.

    Table 7c: `labels={"coarse": ..., "fine": ...}` of a network that was trained on the coarse ones.

    Raises:
        EvaluationError, ImportError: as `max_margin_classifiers`.
    """
    found = {}
    for name, (seen, new) in labels.items():
        if new.shape != test.shape[:1]:
            raise EvaluationError(f"labels {name!r}: {len(test)} test images need as many, not {tuple(new.shape)}")
        (classifier,) = max_margin_classifiers(train, seen, [dimensions], seed=seed)
        found[name] = classifier.predict(test) == new
    return found


def _checked(train: Tensor, labels: Tensor, dimensions: Sequence[int | None]) -> Tensor:
    """`train` as a float64 matrix."""
    if train.dim() < 2 or labels.shape != train.shape[:1] or labels.is_floating_point():
        shapes = f"{tuple(train.shape)} and {tuple(labels.shape)} {labels.dtype}"
        raise EvaluationError(f"activations (n, features) need labels (n,) of int64, not {shapes}")
    counts = labels.bincount().tolist() if len(labels) and int(labels.min()) >= 0 else []
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


def _fitter(labels: Tensor, l2: float, seed: int, epochs: int) -> Any:
    """A function from features (n, d) float64 to coefficients (d, classes) and bias (classes,), both float64."""
    try:
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise ImportError("max-margin classifiers need scikit-learn: pip install 'timm_lowrank[evaluate]'") from error
    classes = labels.cpu().numpy()

    def fit(features: Tensor) -> tuple[Tensor, Tensor]:
        machine = SGDClassifier(loss="hinge", penalty="l2", alpha=l2, max_iter=epochs, random_state=seed)
        machine.fit(features.cpu().numpy(), classes)
        weight, bias = torch.from_numpy(machine.coef_), torch.from_numpy(machine.intercept_)
        if len(weight) == 1:  # two classes share one machine: its margin speaks for the second
            weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
        return weight.T.to(features), bias.to(features)

    return fit
