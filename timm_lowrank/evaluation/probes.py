"""What a few leading directions of a layer are worth: the paper's claim about compression (Tables 5 and 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .principal import principal


def linear_accuracy(
    train: Tensor,  # (n, m) activations of training images, any float dtype
    train_labels: Tensor,  # (n,) int64
    test: Tensor,  # (k, m)
    test_labels: Tensor,  # (k,) int64
    directions: Sequence[int],
) -> list[float]:
    """Test accuracy of a linear classifier that sees only the first d principal directions of the training activations.

    Centred activations are projected on the d directions of largest variance in `train`, each is brought to unit
    variance, and a logistic regression is fitted on all of `train`; it is convex, so nothing has to be tuned and
    no seed enters.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: more directions than the layer has features or the training set images, or a single class.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("linear_accuracy needs scikit-learn: pip install 'timm_lowrank[train]'") from error
    most = max(directions)
    if min(directions) < 1 or most > min(train.shape):
        raise ValueError(f"directions must lie between 1 and {min(train.shape)}, not {list(directions)}")
    if train_labels.unique().numel() < 2:
        raise ValueError("a linear classifier needs training images of at least two classes")
    mean = train.double().mean(dim=0)
    seen, basis = principal(train.double() - mean, most)
    new = (test.double() - mean) @ basis
    scale = seen.std(dim=0).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    seen, new = seen / scale, new / scale
    found = []
    for count in directions:
        classifier = LogisticRegression(max_iter=500).fit(seen[:, :count].numpy(), train_labels.numpy())
        found.append(float(classifier.score(new[:, :count].numpy(), test_labels.numpy())))
    return found
