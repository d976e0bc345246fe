"""What is looked at to tell gradient masking: a column of numbers for each image."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..attacks.balls import seeds_of
from ..attacks.gradient import fgsm, pgd
from ..attacks.inputs import check_count, check_logits, check_number, checked
from ..errors import EvaluationError
from ..pixels import attackable, bare
from .square import square

SETTING = "setting."
"""Prefix of columns that say how the others were made; they are constant."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to look. `steps` and `more_steps` of PGD; the rest is spent on images that still withstand.

    Attributes:
        steps: of every PGD but one.
        more_steps: of that one.
        restarts: further random starts, of `steps` steps each.
        signs: random sign perturbations for each image.
        queries: of the Square attack; 0 leaves it out, and with it the need for pyautoattack.
        draws: forwards over which a randomised network is averaged.
    """

    steps: int = 20
    more_steps: int = 100
    restarts: int = 4
    signs: int = 20
    queries: int = 200
    draws: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_count(value, f"budget.{name}", 0 if name == "queries" else 1)
        if self.more_steps <= self.steps:
            raise EvaluationError(f"budget.more_steps must exceed budget.steps={self.steps}, not {self.more_steps}")


BUDGETS = {"quick": Budget(), "full": Budget(restarts=9, signs=100, queries=2000, draws=20)}


def observe(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    seed: int = 0,
    source: nn.Module | None = None,
    autoattack: Tensor | None = None,  # (n,) bool
    budget: str | Budget = "quick",
    batch_size: int = 500,
) -> dict[str, Tensor]:
    """Columns (n,) for `judge`, on the CPU; those of several sets of images can be concatenated one by one.

    Columns named like an attack are bool: right on the image and under the attack (L_inf, radius eps). Images that are
    wrong to begin with are not attacked. Gradient attacks and random signs treat an image alike in any company,
    up to the rounding of the network; Square and a randomised network draw for the batch as a whole. The same
    arguments give the same columns bit for bit on a CPU, also of a network that draws from torch's global generator,
    which is put back afterwards.

    Args:
        model: takes pixels in [0, 1] and gives logits (n, classes); it is looked at in eval mode.
        eps: radius in units of the pixel range: 8 / 255.
        source: the network on which the black-box attack is crafted; without one there is no such column.
        autoattack: whether each image withstood AutoAttack in the same radius, where that was run.
        budget: "quick", "full" or a `Budget`.
        batch_size: images at a time.

    Raises:
        EvaluationError: arguments out of their range, pixels outside [0, 1], labels that are no classes.
        ImportError: pyautoattack is not installed and `budget.queries` is not 0.
    """
    spent = _budget(budget)
    check_number(eps, "eps")
    check_count(seed, "seed", 0)
    check_count(batch_size, "batch_size")
    pixels, aims = checked(images, labels)
    if not len(pixels):
        raise EvaluationError("there are no images to look at")
    if autoattack is not None and (autoattack.shape != labels.shape or autoattack.dtype != torch.bool):
        raise EvaluationError(
            f"autoattack must be bool {tuple(labels.shape)}, not {autoattack.dtype} {tuple(autoattack.shape)}"
        )
    network = _Differentiable(model)
    parts = []
    for batch, aim in zip(pixels.split(batch_size), aims.split(batch_size), strict=True):
        with _own_randomness(batch.device, seed):
            parts.append(_observe_batch(network, batch, aim, eps, seed, source, spent))
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    if autoattack is not None:
        columns["autoattack"] = columns["clean"] & autoattack.cpu()
    for name, value in {"eps": eps, **asdict(spent)}.items():
        columns[SETTING + name] = torch.full((len(pixels),), float(value), dtype=torch.float64)
    return columns


def _budget(budget: str | Budget) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        near = difflib.get_close_matches(str(budget), BUDGETS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EvaluationError(
            f"budget must be one of {', '.join(map(repr, BUDGETS))} or a Budget, not {budget!r}{hint}"
        )
    return BUDGETS[budget]


def _observe_batch(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int, source: nn.Module | None, budget: Budget
) -> dict[str, Tensor]:
    columns = _look(model, images, labels, eps)
    right = columns["clean"]
    climb = partial(pgd, eps=eps, steps=budget.steps)

    def attacked(attack: Callable[..., Tensor], among: Tensor = right, by: nn.Module = model) -> Tensor:
        """Which of the images still stand; the others are not attacked, and those wrong to begin with never."""
        chosen = among.nonzero()[:, 0]
        found = images.clone()
        if len(chosen):
            found[chosen] = attack(by, images[chosen], labels[chosen])
        return among & _withstands(model, found, labels)

    def stream() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    columns["fgsm"] = attacked(partial(fgsm, eps=eps))
    columns["pgd"] = attacked(partial(climb, generator=stream()))
    columns["pgd_more_steps"] = attacked(partial(pgd, eps=eps, steps=budget.more_steps, generator=stream()))
    columns["pgd_margin"] = attacked(partial(climb, loss="margin", generator=stream()))
    columns["pgd_double"] = attacked(partial(pgd, eps=2 * eps, steps=budget.steps, generator=stream()))
    # From the image itself: a random point of the whole cube would fool a network whose gradient leads nowhere, too.
    columns["pgd_unbounded"] = attacked(partial(climb, eps=1.0, random_start=False))
    columns["restarts_withstood"] = _restarts(attacked, climb, columns["pgd"], seed, budget.restarts)
    columns["signs"] = attacked(partial(_best_signs, eps=eps, count=budget.signs, seed=seed))
    if budget.queries:
        columns["square"] = attacked(partial(square, eps=eps, queries=budget.queries, seed=seed))
    if source is not None:
        columns["transfer"] = attacked(partial(climb, generator=stream()), by=_Differentiable(source))
    columns["pgd_averaged"] = torch.full(labels.shape, torch.nan, device=images.device)
    if not columns["repeats"].all():
        averaged = _Averaged(model, budget.draws)
        columns["pgd_averaged"] = attacked(partial(climb, generator=stream()), by=averaged).float()
    return columns


def _look(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> dict[str, Tensor]:
    """What needs no attack: two forwards, the gradients of both losses, one step along the second."""
    with attackable(model) as logits_of:
        points = images.clone().requires_grad_(True)
        logits = logits_of(points)
        check_logits(logits, labels)
        if logits.isnan().any():
            raise EvaluationError("the model gives logits that are not a number: there is nothing to attack")
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (steepest,) = torch.autograd.grad(loss, points, retain_graph=True)
        margins = _margins(logits, labels)
        (slope,) = torch.autograd.grad(margins.sum(), points)
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        # A quarter of the radius is PGD's own step: does the gradient know what such a step brings?
        stepped = (images + eps / 4 * slope.sign()).clamp(0, 1)
        with torch.no_grad():
            promised = (slope.double() * (stepped - images)).flatten(1).sum(dim=1)
            gained = (_margins(logits_of(stepped), labels) - margins).double()
            again = logits_of(images)
    logits = logits.detach()
    tolerance = 1e-4 * logits.abs().amax(dim=1)  # kernels of some devices add in an order of their own
    return {
        "clean": logits.argmax(dim=1) == labels,
        "repeats": (again - logits).abs().amax(dim=1) <= tolerance,
        "zero_gradient": (steepest == 0).flatten(1).all(dim=1),
        "finite_gradient": steepest.isfinite().flatten(1).all(dim=1),
        "saturated": logits.softmax(dim=1).amax(dim=1) == 1,
        "kept_promise": (gained / promised.where(promised != 0, torch.nan)).detach(),
    }


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit minus that of the label, (n,)."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - logits.gather(1, labels[:, None])[:, 0]


def _withstands(model: nn.Module, found: Tensor, labels: Tensor) -> Tensor:
    with attackable(model) as logits_of, torch.no_grad():
        return logits_of(found).argmax(dim=1) == labels


def _restarts(
    attacked: Callable[..., Tensor], climb: Callable[..., Tensor], standing: Tensor, seed: int, restarts: int
) -> Tensor:
    """How many further random starts each image withstood, one after another: `restarts` if all, -1 if not the first.

    Images that fell to the first start, or were wrong to begin with, count as -1.
    """
    withstood = standing.double() - 1
    for restart in range(1, restarts + 1):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * restart)  # not the stream of a nearby seed
        standing = attacked(partial(climb, generator=generator), among=standing)
        withstood += standing
    return withstood


def _best_signs(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, count: int, seed: int) -> Tensor:
    """Of `count` perturbations of +-eps, each pixel's sign drawn by itself, the one with the largest margin.

    It is chosen and then judged, so that a randomised network gets no further chance to err with every draw.
    """
    best, found = torch.full(labels.shape, -torch.inf, device=images.device), images
    with attackable(model) as logits_of, torch.no_grad():
        for draw in range(count):
            seeds = seeds_of(images, seed, draw)
            drawn = [torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(each)) for each in seeds]
            signs = (torch.stack(drawn).to(images.device) - 0.5).sign()
            points = (images + eps * signs).clamp(0, 1)
            margins = _margins(logits_of(points), labels)
            better = margins > best
            best = torch.where(better, margins, best)
            found = torch.where(better.view(-1, 1, 1, 1), points, found)
    return found


class _Differentiable(nn.Module):
    """The same logits, always with a graph to the pixels: where there is none, with a gradient of zero.

    Attacks refuse a network without one (a threshold, an argmax on the way); here it is a finding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = bare(model)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return logits  # refused by `check_logits`, with its shape
        return logits.float() + 0.0 * images.flatten(1).sum(dim=1, keepdim=True)


class _Averaged(nn.Module):
    """The mean logits of several forwards of a randomised network: expectation over its randomness."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.network, self.draws = model, draws
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.network(images) for _ in range(self.draws)]).mean(dim=0)


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators start at `seed`, for networks that draw from them, and are put back."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
