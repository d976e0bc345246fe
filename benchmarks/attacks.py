"""Images per second of the attacks against the packages called directly, at the same adversarial images.

    python benchmarks/attacks.py
    python benchmarks/attacks.py --model RUN/model --data CIFAR_FOLDER --radius 2

Each attack and its reference take turns on the same network and the same images. The ratio is the median over rounds
of the reference's seconds over ours: above 1 is faster here. "same" is the share of images that agree in every pixel
within 1e-6, "bits" that of images that agree in every bit. Without a model a small ResNet is trained on the embedded
digits first, for some seconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
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


@dataclass(frozen=True)
class Case:
    """An attack on the first images, here and in the package that it is measured against."""

    name: str
    images: Tensor
    labels: Tensor
    ours: Callable[[nn.Module, Tensor, Tensor], Tensor]
    package: str
    reference: Callable[[nn.Module, Tensor, Tensor], Tensor]


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


def cases(images: Tensor, labels: Tensor, eps: float, count: int, batch_size: int) -> list[Case]:
    """AutoAttack, which takes hundreds of times as long as PGD, is measured on the first `count` images."""
    from foolbox.attacks import FGSM, L2PGD, L2DeepFoolAttack, LinfPGD

    linf, l2 = ({"abs_stepsize": radius / 4, "steps": 20, "random_start": False} for radius in (eps, 16 * eps))
    few, radius_l2 = (images[:count], labels[:count]), 16 * eps
    return [
        Case("FGSM", images, labels, lambda *a: fgsm(*a, eps=eps), "foolbox", by_foolbox(FGSM(), eps)),
        Case("PGD-20", images, labels, lambda *a: pgd(*a, eps=eps, steps=20, random_start=False),
             "foolbox", by_foolbox(LinfPGD(**linf), eps)),
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

    seconds = interleaved({"ours": ours, "reference": reference}, rounds, device)
    model.zero_grad(set_to_none=True)  # some packages leave gradients in the parameters
    difference = (found["ours"] - found["reference"]).abs().flatten(1).amax(dim=1)
    with torch.no_grad():
        robust = {name: (model(images).argmax(dim=1) == case.labels).double().mean() for name, images in found.items()}
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


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a saved timm network; a small one is trained without it")
    parser.add_argument("--data", default="digits", help="digits, or a folder of images; test images are attacked")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--autoattack-images", type=int, default=20)
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
    if options.model:
        model = PixelModel(timm.create_model(f"local-dir:{options.model}", pretrained=True).to(device)).eval()
    else:
        model = trained(data, device)
    todo = cases(images, labels, options.radius / 255, options.autoattack_images, options.batch_size)
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
