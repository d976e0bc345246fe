"""AutoAttack, run by the package that implements it: `pyautoattack`, or `autoattack` where only that is installed."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ...errors import EvaluationError
from ..arguments import check_choice, check_count, check_labels, check_number, checked
from ..pixels import attackable, classify, random_state_kept
from .balls import NORMS
from .gradient import cross_entropy, input_gradient

PACKAGES = ("pyautoattack", "autoattack")  # the same algorithms and the same bits; their drivers are called differently
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
ITERATIONS, QUERIES, TARGETS = 100, 5000, 9
CLASSES_NEEDED = {"apgd-t": 4, "apgd-dlr": 3}  # the losses look at so many of the largest logits


@dataclass(frozen=True)
class AutoAttackResult:
    images: Tensor  # (n, channels, height, width) float32; of those that withstood, the clean image
    broken_by: tuple[str | None, ...]  # for each image the attack that broke it, "clean", or None if it withstood
    flags: tuple[str, ...]  # what the package found suspicious about the network, and what was left out
    package: str  # "pyautoattack 0.2.0"


def autoattack(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    **options: Any,
) -> Tensor:
    """The adversarial images of `run_autoattack`, (n, channels, height, width) float32; the same arguments."""
    return run_autoattack(model, images, labels, eps=eps, **options).images


def run_autoattack(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    norm: str = "linf",
    version: str = "standard",
    seed: int = 0,
    batch_size: int = 250,
    attacks: Sequence[str] | None = None,
    iterations: int = ITERATIONS,
    queries: int = QUERIES,
) -> AutoAttackResult:
    """AutoAttack (Croce and Hein, 2020): a fixed sequence of attacks, each on the images that stand after the last.

    The images are bit-identical to those of the package called directly with the same seed and batch size. Its
    random starts depend on the company of an image in its batch, unlike those of `pgd`, and it holds the radius up
    to the rounding of float32 (6e-8). Networks of fewer than ten classes are attacked towards all other classes,
    without the losses that need more classes; the flags say so.

    Args:
        norm: "linf" or "l2".
        version: "standard"; "plus" with more attacks and restarts; "rand" for networks with noise in them.
        seed: of all attacks.
        attacks: of the version's; all of them unless given.
        iterations, queries: of APGD and FAB, and of Square. With fewer than the default the result is not what is
            called AutoAttack, and the flags say so.

    Raises:
        EvaluationError: arguments out of their range, pixels outside [0, 1], labels that are no classes, or a
            model that cannot be differentiated.
        ImportError: no package with AutoAttack is installed.
    """
    check_number(eps, "eps")
    check_choice(norm, NORMS, "norm")
    check_choice(version, tuple(VERSIONS), "version")
    check_count(seed, "seed", least=0)
    for value, name in ((batch_size, "batch_size"), (iterations, "iterations"), (queries, "queries")):
        check_count(value, name)
    if attacks is not None and not attacks:
        raise EvaluationError(f"attacks is empty: name some of {', '.join(VERSIONS[version])}, or leave it out")
    for attack in attacks or ():
        check_choice(attack, VERSIONS[version], "attacks")
    images, labels = checked(images, labels)
    package, checks, name = find_package()
    if not len(images):
        return AutoAttackResult(images.clone(), (), (), name)
    flags = _Flags()
    if (iterations, queries) != (ITERATIONS, QUERIES):
        flags.add(f"shortened to {iterations} iterations and {queries} queries: weaker than what is called AutoAttack")
    with attackable(model, channels_last=False) as logits_of, _restored(checks):
        predicted, classes = classify(model, images, batch_size, channels_last=False)
        check_labels(labels, classes)
        right = predicted == labels
        plan = _plan(version, attacks, classes, flags)
        # The package looks for zero gradients with its other losses alone, so that apgd-ce would fail in silence.
        if (
            right.any()
            and set(plan) != {"square"}
            and (dead := _dead_gradients(logits_of, images[right], labels[right], batch_size))
        ):
            flags.add(f"the gradient of the cross-entropy is zero for {dead} of {int(right.sum())} images")
        settings = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed, "version": version}
        if package.__name__ == "autoattack":
            settings["verbose"] = False
        # A version of the package's own is built and then edited: "custom" would bring other restarts.
        runner = package.AutoAttack(logits_of, device=images.device, **settings)
        _configure(runner, classes, iterations, queries, flags)
        adversarial, broken_by = _cascade(runner, plan, images, labels, right, batch_size, flags)
    return AutoAttackResult(adversarial, tuple(broken_by), flags.texts(), name)


def _cascade(
    runner: Any, plan: tuple[str, ...], images: Tensor, labels: Tensor, right: Tensor, batch_size: int, flags: _Flags
) -> tuple[Tensor, list[str | None]]:
    """The package's own loop over the attacks, run for one attack at a time to learn which of them broke an image."""
    result = images.clone()
    broken_by: list[str | None] = [None if ok else "clean" for ok in right.tolist()]
    standing = right.nonzero().flatten()
    for attack in plan:
        if not len(standing):
            break
        runner.attacks_to_run = [attack]
        adversarial, classes = _run(runner, images[standing], labels[standing], batch_size)
        broken = classes != labels[standing]
        result[standing[broken]] = adversarial[broken]
        for index in standing[broken].tolist():
            broken_by[index] = attack
        if attack == "square" and len(plan) > 1 and int(broken.sum()) > 0.002 * len(images):
            flags.add(
                f"Square, which sees no gradients, broke {int(broken.sum())} of {len(images)} images that the "
                f"attacks before it could not: the gradients may mislead"
            )
        standing = standing[~broken]
    return result, broken_by


def _run(runner: Any, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Adversarial images and the classes that the network gives them; the two packages take these by other names."""
    if type(runner).__module__.startswith("pyautoattack"):
        return runner.run_standard_evaluation(images, labels, batch_size=batch_size)  # type: ignore[no-any-return]
    return runner.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)  # type: ignore[no-any-return]


def _configure(runner: Any, classes: int, iterations: int, queries: int, flags: _Flags) -> None:
    """Edits what the version has set: targets that exist, and the length where it is not the standard one."""
    runner.logger = runner.apgd.logger = runner.apgd_targeted.logger = flags
    runner.apgd_targeted.n_target_classes = min(runner.apgd_targeted.n_target_classes, classes - 1)
    runner.fab.n_target_classes = min(runner.fab.n_target_classes, classes - 1)
    runner.fab.n_iter, runner.square.n_queries = iterations, queries
    if iterations != ITERATIONS:
        for attack in (runner.apgd, runner.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = iterations
            # When its step is first reconsidered, how soon that is at the least, and how much sooner each time.
            attack.n_iter_2, attack.n_iter_min = max(int(0.22 * iterations), 1), max(int(0.06 * iterations), 1)
            attack.size_decr = max(int(0.03 * iterations), 1)


def _plan(version: str, chosen: Sequence[str] | None, classes: int, flags: _Flags) -> tuple[str, ...]:
    """The attacks, in the order of the version, whose loss is defined for so many classes.

    Raises:
        EvaluationError: one that is not was asked for by name.
    """
    plan = []
    for attack in VERSIONS[version]:
        needed = CLASSES_NEEDED.get(attack, 2)
        if chosen is not None and attack not in chosen:
            continue
        if classes >= needed:
            plan.append(attack)
        elif chosen is not None:
            raise EvaluationError(f"{attack} needs {needed} classes, the model has {classes}: leave it out of attacks")
        else:
            flags.add(f"{attack} left out: its loss needs {needed} classes, the model has {classes}")
    return tuple(plan)


def _dead_gradients(logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int) -> int:
    """For how many images the gradient of the cross-entropy is zero."""
    dead = 0
    for points, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        points.requires_grad_()
        gradient = input_gradient(cross_entropy(logits_of(points), wanted), points)
        dead += int((gradient == 0).flatten(1).all(dim=1).sum())
    return dead


def find_package() -> tuple[ModuleType, ModuleType, str]:
    """The installed package, its module of checks, and its name with version."""
    for name in PACKAGES:
        try:
            package, checks = importlib.import_module(name), importlib.import_module(f"{name}.checks")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != name:
                raise
            continue
        try:
            return package, checks, f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return package, checks, name
    raise ImportError("AutoAttack needs pyautoattack: pip install 'timm_lowrank[evaluate]'")


@contextmanager
def _restored(checks: ModuleType) -> Iterator[None]:
    """The package seeds the global generators, switches tracing off, and counts calls from one run to the next."""
    tracer = sys.gettrace()
    counts = dict(checks.funcs)
    try:
        checks.funcs.update(dict.fromkeys(counts, 0))
        with random_state_kept():
            yield
    finally:
        checks.funcs.update(counts)
        sys.settrace(tracer)


class _Flags:
    """In the place of the package's logger: keeps its warnings, each once, and drops its progress."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def add(self, text: str) -> None:
        text = text.removesuffix(" See flags_doc.md for details.").strip()
        self._texts.setdefault(re.sub(r"\d+", "#", text), text)  # the same of another batch has other counts

    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts.values())

    def warning(self, text: str) -> None:  # pyautoattack
        self.add(text)

    def log(self, text: str) -> None:  # autoattack, which logs progress in the same way
        if text.startswith("Warning: "):
            self.add(text.removeprefix("Warning: "))

    def debug(self, text: str) -> None:
        pass

    info = debug
