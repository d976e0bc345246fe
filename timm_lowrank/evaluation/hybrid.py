"""Hybrid max-margin models: a network up to a layer, then a linear classifier (paper, Section 3.3, Table 6)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.capture import Tap, evaluating
from .activations import captured, network_of, taps_of
from .maxmargin import MaxMarginClassifier
from .minimum import classified_right
from .pixels import bare


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
        self.train(model.training)

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
    the layer only act through it, so they do not. Statistics of normalisation layers are no parameters.

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

    def cut_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.detach()

    handle = (
        module.register_forward_pre_hook(cut_input) if tap.takes_input else module.register_forward_hook(cut_output)
    )
    try:
        yield
    finally:
        handle.remove()
