"""DeepFool (Moosavi-Dezfooli et al., 2016; paper, Appendix D.1): the smallest change by repeated linearisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_count, check_labels, check_logits, check_number, checked
from ..pixels import attackable, radius_unit_of
from .gradient import input_gradient


def deepfool(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    radius_unit: str = "pixel",
) -> Tensor:
    """Adversarial images (n, channels, height, width) float32 at a small L2 distance, inside the box [0, 1].

    Each step goes to the nearest of the linearised boundaries between the class of the image and its rivals;
    what comes back is the image plus (1 + overshoot) times the sum of the steps, clipped to the box. Images that are
    misclassified already come back unchanged; those that withstand all steps come back where they have got to.
    Images that are done leave the batch. Give it the network in float32: half precision stalls it on equal logits.

    Args:
        steps: at most so many.
        overshoot: how far beyond the boundary, as a share of the change.
        candidates: the image's own class and the likeliest rivals, of which the nearest boundary is taken.
        radius_unit: in which distances are short: "pixel", or "normalized", those of the normalised image, as `pgd`
            has it. The authors' code, on normalised images, means the second (and clips nothing).

    Raises:
        EvaluationError: arguments out of their range, pixels outside [0, 1], labels that are no classes, or a
            model that cannot be differentiated.
    """
    check_count(steps, "steps")
    check_count(candidates, "candidates", least=2)
    check_number(overshoot, "overshoot", least=0)
    images, labels = checked(images, labels)
    if not len(images):
        return images.clone()
    unit = radius_unit_of(model, radius_unit)
    unit = images.new_ones(1, 1, 1, 1) if unit is None else unit.to(images)
    with attackable(model, many=True) as logits_of:
        adversarial = images.clone()
        going, total = torch.arange(len(images), device=images.device), torch.zeros_like(images)
        ranking = torch.empty(0)
        for number in range(steps):
            here = adversarial[going].requires_grad_()
            logits = logits_of(here)
            if number == 0:
                check_labels(labels, check_logits(logits, len(images)).shape[1])
                # The label comes before what is level with it.
                first = logits.detach().scatter(1, labels[:, None], torch.inf)
                ranking = first.argsort(dim=1).flip(1)[:, :candidates]
            standing = logits.argmax(dim=1) == labels[going]
            if not standing.any():
                break
            going, kept = going[standing], standing
            # Of images that are done, gradients would be taken in vain: another forward of the others may cost less.
            if len(standing) - len(going) > len(going) / (ranking.shape[1] - 1):
                here = adversarial[going].requires_grad_()
                logits, kept = logits_of(here), standing[standing]
            step = _to_nearest_boundary(logits[kept], here, ranking[going], unit, kept)
            total[going] += step
            adversarial[going] = (images[going] + (1 + overshoot) * total[going]).clamp(0, 1)
    return adversarial


def _to_nearest_boundary(logits: Tensor, points: Tensor, ranking: Tensor, unit: Tensor, kept: Tensor) -> Tensor:
    """The shortest step (m, ...) from each point onto a linearised boundary between its first and another class.

    Logits and ranking are of the m points that are `kept`, a mask over `points`. Shortest is meant after division by
    `unit`: with z = x / unit the gradient by z is unit times that by x, and a step in z is one of unit times that in x.
    """
    own = logits.gather(1, ranking[:, :1])
    differences = logits.gather(1, ranking[:, 1:]) - own  # (m, rivals)
    rivals = differences.shape[1]
    nearest = torch.full((len(logits),), torch.inf, device=points.device)
    steps = torch.zeros_like(points[kept])
    for rival in range(rivals):
        gradient = input_gradient(differences[:, rival].sum(), points, retain_graph=rival + 1 < rivals)
        gradient = unit * gradient[kept]
        length = gradient.flatten(1).norm(dim=1) + 1e-8
        distance = differences[:, rival].detach().abs() / length
        closer = distance < nearest
        # A touch further than the boundary, or rounding leaves points on it for ever.
        candidate = ((distance + 1e-4) / length).view(-1, 1, 1, 1) * gradient
        steps = torch.where(closer.view(-1, 1, 1, 1), candidate, steps)
        nearest = torch.where(closer, distance, nearest)
    return unit * steps
