"""What is looked at to tell gradient masking: columns with a number for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from ...errors import EvaluationError
from ..arguments import RADIUS_UNITS, check_choice, check_count, check_labels, check_logits, check_number, checked
from ..attacks.auto import find_package
from ..attacks.balls import seeds_of
from ..attacks.gradient import cross_entropy, fgsm, margins, pgd
from ..pixels import attackable, bare, predictions, radius_unit_of, random_state_kept

SETTING = "setting."
"""Prefix of the constant columns that say how the others were made."""

SMALL_STEPS = (1 / 4, 1 / 6, 1 / 10)
"""In radii. The first is PGD's own step. Several, as a ripple of just that period would look smooth."""

REPEATS = 1e-3  # of the largest logit: kernels of some devices add in an order of their own


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to look for gradient masking: the lengths of the attacks.

    Attributes:
        steps: of every PGD but one.
        more_steps: of that one.
        restarts: further random starts, of `steps` steps each, for images that still stand.
        signs: random sign perturbations of each image.
        queries: of the Square attack; 0 leaves it out, and with it the need for pyautoattack.
        draws: forwards over which the gradient of a randomised network is averaged.

    Raises:
        EvaluationError: a length below 1 (of restarts: 2), or no more `more_steps` than `steps`.
    """

    steps: int = 20
    more_steps: int = 100
    restarts: int = 4
    signs: int = 20
    queries: int = 200
    draws: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_count(value, f"budget.{name}", {"queries": 0, "restarts": 2}.get(name, 1))
        if self.more_steps <= self.steps:
            raise EvaluationError(f"budget.more_steps must exceed budget.steps={self.steps}, not {self.more_steps}")


BUDGETS = {"quick": Budget(), "full": Budget(restarts=10, signs=100, queries=2000, draws=20)}
"""By name. "quick" costs some 300 forwards and backwards of an image that withstands everything."""


def observe(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    radius_unit: str = "pixel",
    seed: int = 0,
    source: nn.Module | None = None,
    autoattack: Tensor | None = None,  # (n,) bool
    budget: str | Budget = "quick",
    batch_size: int = 500,
) -> dict[str, Tensor]:
    """Columns (n,) for `judge`, on the CPU; those of several sets of images can be concatenated one by one.

    Columns named like an attack are bool: right on the image and under the attack (L_inf, radius eps). Images that are
    wrong to begin with are not attacked. Gradient attacks and random signs treat an image alike in any company,
    up to the rounding of the network; Square and a randomised network draw for the batch as a whole. On a CPU the
    same arguments give the same columns bit for bit, also of a network that draws from torch's global generator:
    it is seeded meanwhile and put back afterwards.

    Args:
        model: takes pixels in [0, 1] and gives logits (n, classes); it is looked at in eval mode.
        eps: radius: 8 / 255.
        radius_unit: of eps, "pixel" or "normalized", as of `attacks.pgd`. Of every attack; only the one without a bound
            may always make any valid image of any other. Normalised units are those of `model`, and of `source` for
            what is crafted on it.
        source: the network on which the black-box attack is crafted; without one there is no such column.
        autoattack: whether each image withstood AutoAttack in the same radius, where that was run.
        budget: "quick", "full" or a `Budget`.
        batch_size: images at a time.

    Raises:
        EvaluationError: arguments out of their range, pixels outside [0, 1], labels that are no classes, no images, or
            logits that are not a number.
        ImportError: pyautoattack is not installed and `budget.queries` is not 0.
    """
    if isinstance(budget, str):
        check_choice(budget, tuple(BUDGETS), "budget")
        budget = BUDGETS[budget]
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
    parts = []
    for batch, aim in zip(pixels.split(batch_size), aims.split(batch_size), strict=True):
        with random_state_kept():
            _seed_global(batch.device, seed)
            parts.append(_observe_batch(Differentiable(model), batch, aim, eps, radius_unit, seed, source, budget))
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    if autoattack is not None:
        columns["autoattack"] = columns["clean"] & autoattack.cpu()
    for name, value in {"eps": eps, "unit": RADIUS_UNITS.index(radius_unit), **asdict(budget)}.items():
        columns[SETTING + name] = torch.full((len(pixels),), float(value), dtype=torch.float64)
    return columns


def _seed_global(device: torch.device, seed: int) -> None:
    """Not `torch.manual_seed`, which reaches for devices that nobody has started."""
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _observe_batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    radius_unit: str,
    seed: int,
    source: nn.Module | None,
    budget: Budget,
) -> dict[str, Tensor]:
    unit = radius_unit_of(model, radius_unit)
    columns = _look(model, images, labels, eps, unit)
    right = columns["clean"]

    def attacked(attack: Callable[..., Tensor], among: Tensor = right, by: nn.Module = model) -> Tensor:
        """Which of the images withstand; the others are not attacked."""
        chosen = among.nonzero()[:, 0]
        withstood = torch.zeros_like(among)
        if len(chosen):
            points = attack(by, images[chosen], labels[chosen])
            withstood[chosen] = predictions(model, points, len(points)) == labels[chosen]
        return withstood

    def climb(by: nn.Module, points: Tensor, aims: Tensor, stream: int = seed, **changed: object) -> Tensor:
        settings = {"eps": eps, "steps": budget.steps, "radius_unit": radius_unit, **changed}
        return pgd(by, points, aims, generator=torch.Generator().manual_seed(stream), **settings)  # type: ignore[arg-type]

    columns["fgsm"] = attacked(partial(fgsm, eps=eps, radius_unit=radius_unit))
    on_the_way: list[Tensor] = []  # where the longer attack was when the shorter one, of the same start, would end

    def remember(step: int, points: Tensor, _: Tensor) -> None:
        if step == budget.steps:
            on_the_way.append(points.clone())

    columns["pgd_more_steps"] = attacked(partial(climb, steps=budget.more_steps, on_step=remember))
    columns["pgd"] = attacked(lambda *_: on_the_way[0])
    columns["pgd_margin"] = attacked(partial(climb, loss="margin"))
    # Stopping at the first hit saves time, but a randomised network errs at some time on the way to anywhere.
    keep = "first_hit" if columns["repeats"].all() else "last"
    columns["pgd_double"] = attacked(partial(climb, eps=2 * eps, keep=keep))
    # From the image itself: a random point of the whole cube would fool a network whose gradient leads nowhere, too.
    whole = partial(climb, eps=1.0, radius_unit="pixel", random_start=False, keep=keep)
    columns["pgd_unbounded"] = attacked(whole)
    columns["restarts_withstood"] = _restarts(attacked, climb, columns["pgd"], seed, budget.restarts)
    columns["signs"] = attacked(partial(best_signs, eps=eps, unit=unit, count=budget.signs, seed=seed))
    if budget.queries:
        columns["square"] = attacked(partial(square, eps=eps, unit=unit, queries=budget.queries, seed=seed))
    if source is not None:
        columns["transfer"] = attacked(climb, by=Differentiable(source))
    columns["pgd_averaged"] = torch.full(labels.shape, torch.nan, device=images.device)
    if not columns["repeats"].all():
        columns["pgd_averaged"] = attacked(climb, by=Averaged(model, budget.draws)).float()
    return columns


def _look(model: nn.Module, images: Tensor, labels: Tensor, eps: float, unit: Tensor | None) -> dict[str, Tensor]:
    """What needs no attack: two forwards, the gradients of both losses, small steps along the second."""
    with attackable(model) as logits_of:
        points = images.clone().requires_grad_(True)
        logits = check_logits(logits_of(points), len(points))
        check_labels(labels, logits.shape[1])
        if logits.isnan().any():
            raise EvaluationError("the model gives logits that are not a number: there is nothing to attack")
        (steepest,) = torch.autograd.grad(cross_entropy(logits, labels), points, retain_graph=True)
        reached = margins(logits, labels)
        (slope,) = torch.autograd.grad(reached.sum(), points)
        reach = eps * (images.new_ones(1) if unit is None else unit.to(images))
        kept = _kept_promise(logits_of, images, labels, reached.detach(), slope.nan_to_num(0.0, 0.0, 0.0), reach)
        with torch.no_grad():
            change = (logits_of(images) - logits).abs().amax(dim=1)
    logits = logits.detach()
    return {
        "clean": logits.argmax(dim=1) == labels,
        "repeats": change <= REPEATS * logits.abs().amax(dim=1),
        "zero_gradient": (steepest == 0).flatten(1).all(dim=1),
        "finite_gradient": steepest.isfinite().flatten(1).all(dim=1),
        "saturated": logits.softmax(dim=1).amax(dim=1) == 1,
        "kept_promise": kept,
    }


@torch.no_grad()
def _kept_promise(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, before: Tensor, slope: Tensor, reach: Tensor
) -> Tensor:
    """(f(x + d) - f(x)) / (d . gradient of f) for steps d along the gradient's sign: 1 where f is linear, (n,).

    f is the margin of the logits: it has no scale and does not saturate, while the cross-entropy of a confident
    network bends within any step. The worst of `SMALL_STEPS` counts; NaN where the gradient is zero.
    """
    ratios = []
    for step in SMALL_STEPS:
        moved = (images + step * reach * slope.sign()).clamp(0, 1)
        promised = (slope.double() * (moved - images)).flatten(1).sum(dim=1)
        gained = (margins(logits_of(moved), labels) - before).double()
        ratios.append(gained / promised.where(promised != 0, torch.nan))
    return torch.stack(ratios).amin(dim=0).float()


def _restarts(
    attacked: Callable[..., Tensor], climb: Callable[..., Tensor], standing: Tensor, seed: int, restarts: int
) -> Tensor:
    """How many further random starts each image withstood one after another, `restarts` at most, (n,) float32.

    -1 for images that fell to the first start or were wrong to begin with.
    """
    withstood = standing.float() - 1
    for restart in range(1, restarts + 1):
        stream = seed + 1_000_003 * restart  # no nearby seed's
        standing = attacked(partial(climb, stream=stream), among=standing)
        withstood += standing
    return withstood


# ---- what is put around a network before it is looked at ----


class Differentiable(nn.Module):
    """The same logits, always with a graph to the pixels: where there is none, with a gradient of zero.

    Attacks refuse a network without one (a threshold or an argmax on the way); here it is a finding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = bare(model)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) float32 of images (n, channels, height, width) in [0, 1]."""
        logits: Tensor = self.network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return logits  # refused by `check_logits`, which names the shape
        return logits.float() + 0.0 * images.flatten(1).sum(dim=1, keepdim=True)


class Averaged(nn.Module):
    """The mean logits of several forwards of a randomised network: the expectation over its randomness."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.network, self.draws = model, draws
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width) in [0, 1]."""
        return torch.stack([self.network(images) for _ in range(self.draws)]).mean(dim=0)


# ---- attacks that see the logits and no gradient ----


def square(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    queries: int,
    seed: int,
    unit: Tensor | None = None,  # of eps, as `balls.ball` takes it
) -> Tensor:
    """The Square attack (Andriushchenko et al., 2020), L_inf: adversarial images like `pgd`'s.

    Its schedule is shortened to so many queries. AutoAttack's own Square is not: cut short it would still be trying
    its largest squares. All images of a call are tried with the same squares.

    Raises:
        ImportError: no package with AutoAttack is installed.
    """
    radius = eps if unit is None else eps * unit.to(images).view(-1, 1, 1)  # it takes one for each channel as well
    package, *_ = find_package()
    attack_class = import_module(f"{package.__name__}.square").SquareAttack
    with attackable(model, many=True) as logits_of, torch.no_grad(), random_state_kept():
        classes = logits_of(images[:1]).shape[1]

        def predict(points: Tensor) -> Tensor:
            # It writes into the logits it gets, and asks about no image at all where all margins are exactly 0.
            return logits_of(points).clone() if len(points) else points.new_zeros(0, classes)

        attack = attack_class(predict, norm="Linf", n_queries=queries, eps=radius, seed=seed, device=images.device)
        adversarial: Tensor = attack.perturb(images, labels)
    return adversarial


def best_signs(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    count: int,
    seed: int,
    unit: Tensor | None = None,  # of eps, as `balls.ball` takes it
) -> Tensor:
    """Of `count` perturbations of +-eps, each pixel's sign drawn by itself, the one with the largest margin.

    Judged by another forward, it does not give a randomised network a chance to err with every draw.
    """
    best, chosen = torch.full(labels.shape, -torch.inf, device=images.device), images
    radius = eps if unit is None else eps * unit.to(images)
    with attackable(model, many=True) as logits_of, torch.no_grad():
        for draw in range(count):
            generators = (torch.Generator().manual_seed(each) for each in seeds_of(images, seed, draw))
            drawn = torch.stack([torch.rand(images.shape[1:], generator=generator) for generator in generators])
            points = (images + radius * (drawn.to(images.device) - 0.5).sign()).clamp(0, 1)
            reached = margins(logits_of(points), labels)
            better = reached > best
            best = torch.where(better, reached, best)
            chosen = torch.where(better.view(-1, 1, 1, 1), points, chosen)
    return chosen
