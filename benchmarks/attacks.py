"""Images per second of the attacks against the packages called directly, at the same adversarial images.

    python benchmarks/attacks.py
    python benchmarks/attacks.py --model RUN/model --source OTHER/model --data CIFAR_FOLDER --radius 2
    pip install --no-deps torchattacks    # compared with, too, where it is installed; the packages that it pins are old

Each attack and its reference take turns on the same network and the same images. The ratio is the median over rounds
of the reference's seconds over ours: above 1 is faster here. On a CPU they are processor seconds, which other processes
on the machine disturb less. "same" is the share of images that agree in every pixel within 1e-6, "bits" that of
images that agree in every bit. The bare loop is what no attack of these steps can do without: a forward and a backward
of the frozen network for each, in the layout of memory that it is given. Without a model a small ResNet is trained on
the embedded digits first, for some seconds.

The diagnosis of gradient masking is compared with its attacks called one by one, each on all images, as far as a
package has them (FGSM, PGD-20, PGD-100, twice the radius, all of the cube, four restarts, transfer; Square of
torchattacks). It does two more, of PGD on the margin and random signs, in its time. "same" is there the share of
verdicts that agree, of each attack on each image: random starts differ.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import foolbox
import pyautoattack
import timm
import torch
from measure import interleaved, median_ratio, print_table, write_json
from torch import Tensor, nn

import timm_lowrank  # noqa: F401  (its small networks are timm's from here on)
from timm_lowrank.data import ImageData, load_images
from timm_lowrank.evaluation import PixelModel
from timm_lowrank.evaluation.attacks import autoattack, deepfool, fgsm, pgd
from timm_lowrank.evaluation.masking import Budget, observe

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
QUERIES, RESTARTS = 200, 4  # of the diagnosis


@dataclass(frozen=True)
class Case:
    """An attack on the first images, here and in the package that it is measured against."""

    name: str
    images: Tensor
    labels: Tensor
    ours: Attack
    package: str
    reference: Attack
    verdicts: bool = False  # whether they give verdicts (n, attacks) instead of images, that of PGD as the second


def trained(data: ImageData, device: torch.device) -> PixelModel:
    """A small ResNet after 100 steps on the data."""
    images, labels = (data.train_images.float() / 255).to(device), data.train_labels.to(device)
    torch.manual_seed(0)
    network = timm.create_model("resnet10_cifar", num_classes=len(data.class_names), in_chans=images.shape[1])
    model = PixelModel(network.to(device), mean=data.mean, std=data.std).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(100):
        rows = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval()


def by_foolbox(attack: Any, eps: float | None) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        found: Tensor = attack(wrapped, images, labels, epsilons=eps)[1]
        return found

    return run


def by_pyautoattack(eps: float, norm: str, batch_size: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        runner = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=0, device=images.device)
        found: Tensor = runner.run_standard_evaluation(images, labels, batch_size=batch_size)[0]
        return found

    return run


def bare_loop(eps: float, steps: int) -> Attack:
    """PGD without any check, on a network whose parameters need no gradient."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        points = images
        needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        for _ in range(steps):
            here = points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(here), labels, reduction="sum"), here)
            points = (images + (points + eps / 4 * gradient.sign() - images).clamp(-eps, eps)).clamp(0, 1)
        for parameter in needed:
            parameter.requires_grad_(True)
        return points

    return run


def diagnosed(source: nn.Module, eps: float, queries: int) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        found = observe(model, images, labels, eps=eps, source=source, budget=Budget(queries=queries))
        names = ["fgsm", "pgd", "pgd_more_steps", "pgd_double", "pgd_unbounded", "transfer", "square"]
        verdicts = [found[name] for name in names if name in found]
        return torch.stack([*verdicts, found["restarts_withstood"] >= RESTARTS], 1)

    return run


def one_by_one(build: Callable[[nn.Module], Sequence[tuple[Any, ...]]]) -> Attack:
    """Verdicts of the attacks in the order of `diagnosed`, the last being those of `RESTARTS` more random starts."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        verdicts = []
        for attack, *arguments in build(model):
            points = attack(images, labels, *arguments)
            with torch.no_grad():
                verdicts.append(model(points).argmax(dim=1) == labels)
        first, last = verdicts[:-RESTARTS], torch.stack(verdicts[-RESTARTS:]).all(dim=0) & verdicts[1]
        return torch.stack([*first, last], 1)

    return run


def foolbox_sequence(source: nn.Module, eps: float) -> Attack:
    from foolbox.attacks import FGSM, LinfPGD

    def build(model: nn.Module) -> list[tuple[Any, ...]]:
        def called(images: Tensor, labels: Tensor, attack: Any, radius: float, by: nn.Module = model) -> Tensor:
            return by_foolbox(attack, radius)(by, images, labels)

        def steps(count: int, radius: float, start: bool = True) -> Any:
            return LinfPGD(abs_stepsize=radius / 4, steps=count, random_start=start)

        short = steps(20, eps)
        return [
            (called, FGSM(), eps), (called, short, eps), (called, steps(100, eps), eps),
            (called, steps(20, 2 * eps), 2 * eps), (called, steps(20, 1.0, start=False), 1.0),
            (called, short, eps, source), *[(called, short, eps)] * RESTARTS,
        ]  # fmt: skip

    return one_by_one(build)


def torchattacks_sequence(package: Any, source: nn.Module, eps: float) -> Attack:
    def build(model: nn.Module) -> list[tuple[Any, ...]]:
        def steps(count: int, radius: float, start: bool = True, by: nn.Module = model) -> Any:
            return package.PGD(by, eps=radius, alpha=radius / 4, steps=count, random_start=start)

        short = steps(20, eps)
        return [
            (package.FGSM(model, eps=eps),), (short,), (steps(100, eps),), (steps(20, 2 * eps),),
            (steps(20, 1.0, start=False),), (steps(20, eps, by=source),),
            (package.Square(model, eps=eps, n_queries=QUERIES),), *[(short,)] * RESTARTS,
        ]  # fmt: skip

    return one_by_one(build)


def cases(
    images: Tensor, labels: Tensor, eps: float, count: int, batch_size: int, source: nn.Module | None
) -> list[Case]:
    """AutoAttack and the diagnosis, which take far longer than PGD, are measured on the first `count` images."""
    from foolbox.attacks import FGSM, L2PGD, L2DeepFoolAttack, LinfPGD

    linf, l2 = ({"abs_stepsize": radius / 4, "steps": 20, "random_start": False} for radius in (eps, 16 * eps))
    few, radius_l2 = (images[:count], labels[:count]), 16 * eps
    found = importlib.util.find_spec("torchattacks") is not None
    others: Any = importlib.import_module("torchattacks") if found else None
    pgd_20: Attack = lambda *a: pgd(*a, eps=eps, steps=20, random_start=False)  # noqa: E731
    more = [Case("PGD-20", images, labels, pgd_20, "bare loop", bare_loop(eps, 20))]
    if source is not None:
        more.append(Case("diagnosis", *few, diagnosed(source, eps, 0), "foolbox", foolbox_sequence(source, eps), True))
    if others is not None:
        more += [
            Case("PGD-20", images, labels, pgd_20, "torchattacks",
                 lambda m, *a: others.PGD(m, eps=eps, alpha=eps / 4, steps=20, random_start=False)(*a)),
            Case("DeepFool", images, labels, deepfool, "torchattacks", lambda m, *a: others.DeepFool(m)(*a)),
        ]  # fmt: skip
    if others is not None and source is not None:
        sequence = torchattacks_sequence(others, source, eps)
        more.append(Case("diagnosis", *few, diagnosed(source, eps, QUERIES), "torchattacks", sequence, True))
    return [
        *more,
        Case("FGSM", images, labels, lambda *a: fgsm(*a, eps=eps), "foolbox", by_foolbox(FGSM(), eps)),
        Case("PGD-20", images, labels, pgd_20, "foolbox", by_foolbox(LinfPGD(**linf), eps)),
        Case("PGD-20, L2", images, labels,
             lambda *a: pgd(*a, eps=radius_l2, steps=20, norm="l2", random_start=False),
             "foolbox", by_foolbox(L2PGD(**l2), radius_l2)),
        Case("DeepFool", images, labels, deepfool, "foolbox", by_foolbox(L2DeepFoolAttack(), None)),
        Case("AutoAttack", *few, lambda *a: autoattack(*a, eps=eps, batch_size=batch_size),
             "pyautoattack", by_pyautoattack(eps, "Linf", batch_size)),
        Case("AutoAttack, L2", *few, lambda *a: autoattack(*a, eps=radius_l2, norm="l2", batch_size=batch_size),
             "pyautoattack", by_pyautoattack(radius_l2, "L2", batch_size)),
    ]  # fmt: skip


def measure(case: Case, model: nn.Module, rounds: int, device: torch.device) -> dict[str, Any]:
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = case.ours(model, case.images, case.labels)

    def reference() -> None:
        found["reference"] = case.reference(model, case.images, case.labels)

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = interleaved({"ours": ours, "reference": reference}, rounds, device, clock)
    model.zero_grad(set_to_none=True)  # some packages leave gradients in the parameters
    if case.verdicts:
        difference = (found["ours"] != found["reference"]).double().flatten()
        robust = {name: verdicts[:, 1].double().mean() for name, verdicts in found.items()}
    else:
        difference = (found["ours"] - found["reference"]).abs().flatten(1).amax(dim=1)
        with torch.no_grad():
            judged = {name: model(images).argmax(dim=1) == case.labels for name, images in found.items()}
        robust = {name: right.double().mean() for name, right in judged.items()}
    return {
        "attack": case.name,
        "package": case.package,
        "images": len(case.images),
        "images_per_second": len(case.images) / statistics.median(seconds["ours"]),
        "reference_images_per_second": len(case.images) / statistics.median(seconds["reference"]),
        "ratio": median_ratio(seconds["reference"], seconds["ours"]),
        "ratios": [b / a for a, b in zip(seconds["ours"], seconds["reference"], strict=True)],
        "same": (difference <= 1e-6).double().mean().item(),
        "bits": (difference == 0).double().mean().item(),
        "largest_difference": difference.max().item(),
        "robust": robust["ours"].item(),
        "reference_robust": robust["reference"].item(),
    }


def loaded(folder: str, device: torch.device) -> PixelModel:
    return PixelModel(timm.create_model(f"local-dir:{folder}", pretrained=True).to(device)).eval()


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a saved timm network; a small one is trained without it")
    parser.add_argument("--source", help="as --model: the network of the diagnosis's transfer; without it no diagnosis")
    parser.add_argument("--data", default="digits", help="digits, or a folder of images; test images are attacked")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--few", type=int, default=20, help="images of AutoAttack and the diagnosis")
    parser.add_argument("--radius", type=float, default=8, help="of L_inf in 1/255; that of L2 is 16 times as long")
    parser.add_argument("--batch-size", type=int, default=250, help="of AutoAttack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="benchmarks/results/attacks.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    data = load_images(options.data, test_limit=options.images)
    images, labels = (data.test_images.float() / 255).to(device), data.test_labels.to(device)
    model = loaded(options.model, device) if options.model else trained(data, device)
    source = loaded(options.source, device) if options.source else None
    todo = cases(images, labels, options.radius / 255, options.few, options.batch_size, source)
    rows = [measure(case, model, options.rounds, device) for case in todo if options.only in case.name]
    print_table(
        f"images per second, {device}, {options.threads} thread(s), eps {options.radius:g}/255 "
        f"(L2: {16 * options.radius:g}/255)",
        ("attack", "images", "here", "reference", "package", "ratio", "same", "bits", "robust", "reference"),
        [
            (
                row["attack"], row["images"], rate(row["images_per_second"]),
                rate(row["reference_images_per_second"]), row["package"], f"{row['ratio']:.2f}",
                f"{row['same']:.3f}", f"{row['bits']:.3f}", f"{row['robust']:.3f}", f"{row['reference_robust']:.3f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in ("data", "radius", "batch_size", "rounds", "threads")}
    packages = {package.__name__: package.__version__ for package in (foolbox, pyautoattack)}
    write_json(options.output, {"device": str(device), **settings, "packages": packages, "rows": rows})


if __name__ == "__main__":
    main()
