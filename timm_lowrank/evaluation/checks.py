"""Mistakes that make an attack look weaker, or a network stronger, than it is; to be looked for before attacking."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..core.model import LowRankModel
from ..errors import EvaluationError, EvaluationWarning
from ..text import counted, listing
from .arguments import check_labels, check_logits, checked
from .attacks.auto import CLASSES_NEEDED, TARGETS
from .pixels import PixelModel, attackable, bare, random_state_kept

LOOKED_AT = 32  # images that are run through the network
SATURATED = 1 / 2  # share of them that attacks by the cross-entropy may start at without their whole gradient
AGREE = 1e-3  # of the largest logit: how far two forward passes of a deterministic network may lie apart


def check_before_attack(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    classes: int | None = None,
) -> list[str]:
    """Looks for what would make the figures of an attack wrong; says what they may suffer from.

    All pixels and labels are looked at, and the logits of the first 32 images.

    Args:
        classes: how many the data has.

    Returns:
        What is suspicious but may be meant, a sentence each, also issued as EvaluationWarning: a network with
        noise in it, logits that depend on the rest of the batch, fewer classes than AutoAttack aims at, half precision,
        a softmax that rounds to 1 on most of the images, accuracy no better than chance, nearly black images.

    Raises:
        EvaluationError: train mode; probabilities instead of logits; logits that are not finite; pixels outside
            [0, 1]; a network that wants its images normalised without a PixelModel around it; labels of another
            shape or range; another number of classes than the data has; no images.
    """
    images, labels = checked(images, labels)
    if not len(images):
        raise EvaluationError("there are no images to attack: is the limit 0, or the share of this process empty?")
    _check_mode(model)
    _check_normalisation(model)
    with attackable(model) as logits_of, random_state_kept(), torch.no_grad():
        few = images[:LOOKED_AT]
        logits = check_logits(logits_of(few), len(few))
        _check_logit_values(logits)
        given = logits.shape[1]
        if classes is not None and classes != given:
            raise EvaluationError(
                f"the data has {classes} classes, the model gives {given}: was it trained on this data?"
            )
        check_labels(labels, given)
        suspicions = list(_suspicions(model, logits_of, images, labels[:LOOKED_AT], logits))
    for text in suspicions:
        warnings.warn(text, EvaluationWarning, stacklevel=2)
    return suspicions


def _check_mode(model: nn.Module) -> None:
    training = [name or "the model itself" for name, module in bare(model).named_modules() if module.training]
    if training:
        more = f" and {len(training) - 1} more" if len(training) > 1 else ""
        raise EvaluationError(f"the model is in train mode ({training[0]}{more}): call model.eval() first")


def _check_normalisation(model: nn.Module) -> None:
    network = bare(model)
    if isinstance(network, PixelModel):
        return
    network = network.backbone if isinstance(network, LowRankModel) else network
    config = dict(getattr(network, "pretrained_cfg", None) or {})
    mean, std = config.get("mean") or (0,), config.get("std") or (1,)
    if any(mean) or any(value != 1 for value in std):
        raise EvaluationError(
            f"this {type(network).__name__} wants images normalised with mean {tuple(mean)} and std {tuple(std)}, "
            f"attacks give it pixels in [0, 1]: pass PixelModel(network)"
        )


def _check_logit_values(logits: Tensor) -> None:
    sums = logits.sum(dim=1)
    if logits.min() >= 0 and logits.max() <= 1 and (sums - 1).abs().max() < 1e-3:
        raise EvaluationError(
            "the model gives probabilities: attacks need logits, or their gradients vanish where it is sure of itself; "
            "leave its softmax out"
        )


def _suspicions(
    model: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, logits: Tensor
) -> Iterator[str]:
    """A sentence for each; `logits` are those of the first images, and `labels` as many."""
    brightest = images.max().item()
    if brightest <= 1.5 / 255:
        yield f"the brightest pixel is {brightest:.2g}: were the images divided by 255 twice?"

    few, agree = images[: len(logits)], AGREE * logits.abs().max().item()
    change = (logits_of(few) - logits).abs().max().item()
    if change > agree:
        yield (
            f"the logits of the same images change by {change:.2g} from one forward pass to the next: attack the "
            f'expectation, AutoAttack with version="rand"'
        )
    elif len(few) > 1:
        alone = torch.cat([logits_of(image) for image in few.split(1)])
        change = (alone - logits).abs().max().item()
        if change > agree:
            yield (
                f"the logits of an image change by {change:.2g} with the rest of its batch: the figures depend on the "
                f"batch size (a batch normalisation without running statistics?)"
            )

    classes = logits.shape[1]
    if classes <= TARGETS:
        without = [attack for attack, needed in CLASSES_NEEDED.items() if classes < needed]
        but = f" and is run without {listing(without)}" if without else ""
        others = counted(classes - 1, "other class", "other classes")
        yield (
            f"the model has {classes} classes: AutoAttack aims at {others} instead of {TARGETS}{but}, "
            f"so its figures do not compare with those of ten classes"
        )

    probability = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    saturated = (probability == 1).float().mean().item()
    if len(labels) >= LOOKED_AT and saturated > SATURATED:
        yield (
            f"the softmax rounds to exactly 1 on {saturated:.0%} of the first {len(labels)} images, where float32 has "
            f'lost the gradient of the cross-entropy or a part of it: attack with loss="margin" or "log_odds", too'
        )

    narrow = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize < 4}
    if narrow:
        yield (
            f"the model's parameters are {listing(sorted(narrow))}: equal logits stall DeepFool and weaken FAB; "
            f"attack a float32 copy"
        )

    right = (logits.argmax(dim=1) == labels).float().mean().item()
    if len(labels) >= LOOKED_AT and right <= 1 / classes:
        yield (
            f"only {right:.0%} of the first {len(labels)} images are classified correctly, no more than chance: are "
            f"labels, normalisation and the order of the classes those of the training?"
        )
