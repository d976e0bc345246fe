"""Evaluations with made-up numbers, for tests of what is made of them: report, cards, tables; and short real ones."""

import dataclasses
import math

import numpy as np

from timm_lowrank.evaluation.masking import Budget
from timm_lowrank.evaluation.results import (
    AttackProtocol,
    Check,
    Curve,
    DataInfo,
    Evaluation,
    Figure,
    Kind,
    NetworkInfo,
    NoiseProtocol,
    Protocol,
    Series,
    Strip,
    StripRow,
    Value,
    Verdict,
)

# In the place of "quick" in `BUDGETS`, where what an evaluation finds does not matter: most of its time goes there.
SHORT_DIAGNOSIS = Budget(steps=3, more_steps=6, restarts=2, signs=2, queries=10, draws=2)
TITLES = ("2-LR", "plain")
PGD = AttackProtocol(name="PGD", eps=8 / 255, steps=20, step_size=2 / 255, random_start=True, restarts=1)
AUTOATTACK = AttackProtocol(name="AutoAttack", version="standard", eps=8 / 255, restarts=1)
NETWORKS = (
    NetworkInfo(title="2-LR", path="runs/digits", model="resnet10_cifar", parameters=1234567, weights="5f" * 32,
                branches={"layer3": 20, "pre_logits": 10}),
    NetworkInfo(title="plain", path="runs/digits/twin", model="resnet10_cifar", parameters=1234567, weights="a0" * 32),
)  # fmt: skip
DATA = DataInfo(
    source="digits",
    split="test",
    images=360,
    image_size=(1, 8, 8),
    class_names=tuple("0123456789"),
    fingerprint="9f3c2b",
)


def figure(key, label, *values, kind=Kind.ATTACK, group="White box", attack=None, noise=None, details=None, **fields):
    """A figure of TITLES; values are numbers of 360 images, `Value`s, or None where nothing was measured."""
    given = {
        title: value if isinstance(value, Value) else Value.share(value, 360)
        for title, value in zip(TITLES, values, strict=False)
        if value is not None
    }
    protocol = Protocol(images=360, seed=0, attack=attack, noise=noise, details=details or {})
    return Figure(key=key, label=label, values=given, kind=kind, group=group, protocol=protocol, **fields)


def pgd_figure(steps, radius, *values):
    attack = dataclasses.replace(PGD, steps=steps, eps=radius / 255)
    return figure(f"pgd-madry-{steps}-{radius}-255", f"PGD-{steps}, {radius}/255", *values, attack=attack)


CLEAN = figure("clean", "Clean images", 346, 351, kind=Kind.CLEAN, group="Clean")
AUTOATTACKED = figure("autoattack-linf-8-255", "AutoAttack, 8/255", 4, 0, group="AutoAttack", attack=AUTOATTACK)
FIGURES = (
    CLEAN,
    pgd_figure(7, 8, 203, 171),
    pgd_figure(20, 2, 330, 322),
    pgd_figure(20, 8, 148, 137),
    pgd_figure(20, 16, 31, 12),
    figure("iter-ll-fgsm-8-255-hit", "Iter-LL-FGSM, target hit", 88, 140, kind=Kind.TARGET_HIT, better="lower",
           attack=AttackProtocol(name="Iter-LL-FGSM", eps=8 / 255, steps=10, step_size=1 / 255)),
    figure("autoattack-linf-2-255", "AutoAttack, 2/255", 301, 284, group="AutoAttack",
           attack=dataclasses.replace(AUTOATTACK, eps=2 / 255)),
    AUTOATTACKED,
    figure("autoattack-l2-0.5", "AutoAttack L2, 0.5", 97, group="AutoAttack",
           attack=dataclasses.replace(AUTOATTACK, norm="l2", eps=0.5)),
    figure("transfer-pgd-20-8-255", "PGD-20, 8/255, from the other", 251, 233, kind=Kind.TRANSFER, group="Black box",
           attack=dataclasses.replace(PGD, crafted_on={"2-LR": "plain", "plain": "2-LR"})),
    *[figure(f"noise-{percent}", f"Noise on {percent} % of the pixels", *values, kind=Kind.NOISE,
             group="Random pixel noise", noise=NoiseProtocol(percent / 100, "standard deviation"))
      for percent, *values in ((40, 240, 201), (80, 120, 118), (100, 88, 70))],
    figure("deepfool-rho", "DeepFool, median rho", Value(0.2113, 0.2011, 0.2291, of=346),
           Value(0.1652, 0.1602, 0.1711, of=351), kind=Kind.PERTURBATION, group="Perturbation", unit="number",
           attack=AttackProtocol(name="DeepFool", norm="l2", steps=50), details={"overshoot": 0.02}),
    figure("gradient", "Median norm of the gradient", Value(3.2e-7, of=360), Value(0.0419, of=360), kind=Kind.OTHER,
           group="Perturbation", unit="number", better=None),
    figure("parameters", "Parameters replaced", Value(1638400), Value(1638400), kind=Kind.OTHER, group="Compression",
           unit="count", better="lower"),
)  # fmt: skip
SUSPECTED = Verdict("suspect", "One of eight checks failed: AutoAttack finds far more than PGD.", (
    Check("Black box is no stronger", True, -0.31, 0.02, "Transferred PGD leaves 73.8 %, PGD 41.1 %."),
    Check("AutoAttack close to PGD", False, 0.4, 0.1, "AutoAttack leaves 1.1 % where PGD-20 leaves 41.1 %."),
    Check("Gradients are there", True, 3.2e-7, 0, "No image has a gradient of zero; the smallest is 3.2e-07."),
    Check("Smooth loss", None, None, None, "Not checked: fewer than 100 images."),
    Check("Single step", None, 0.05, 0.02, "A single step leaves 36.1 %, PGD 41.1 %."),
))  # fmt: skip
SOUND = Verdict("no sign of gradient masking", "All eight checks passed.", (
    Check("Black box is no stronger", True, -0.27, 0.02, "Transferred PGD leaves 68.5 %, PGD 38.1 %."),
))  # fmt: skip


def make_evaluation(**changes):
    """A small evaluation without pictures: a clean and two PGD figures of two networks."""
    fields = {
        "suite": "quick", "seed": 0, "chunk": 100, "confidence": 0.95, "device": "cpu", "seconds": 93.1,
        "created": "2026-11-22T17:00:00+00:00", "data": DATA, "networks": NETWORKS, "figures": FIGURES[:3],
        "versions": {"python": "3.11.7", "torch": "2.15.0", "timm": "1.0.31", "timm_lowrank": "0.1.0"},
        "curves": (), "strips": (), "verdicts": {"2-LR": SUSPECTED, "plain": SOUND},
        "warnings": ("All AutoAttack figures on digits use 9 target classes.",),
    }  # fmt: skip
    return Evaluation(**fields | changes)


def full_evaluation(**changes):
    """All kinds of figures, curves and pictures."""
    return make_evaluation(**{"figures": FIGURES, "curves": make_curves(), "strips": (make_strip(TITLES),)} | changes)


def make_curves():
    """Two line plots, histograms of two layers, and clouds of points."""
    draws, edges, steps = np.random.default_rng(0), np.linspace(0, 1, 21), tuple(map(float, range(11)))
    lines = tuple(
        Series(network=network, name=name, x=steps, y=tuple(0.97 * math.exp(-rate * step) for step in steps))
        for network, slow in zip(TITLES, (0.12, 0.2), strict=True)
        for name, rate in (("instantaneous", slow), ("cumulative", 1.3 * slow))
    )
    radii = tuple(Series(network=network, x=(2.0, 4.0, 8.0, 16.0), y=(0.9, 0.7, 0.4, 0.05)) for network in TITLES)
    cushions = tuple(
        Series(
            network=network,
            name=layer,
            x=tuple(edges.tolist()),
            y=tuple(map(float, np.histogram(draws.beta(a, 6, 360), edges)[0])),
        )
        for layer in ("layer3.0.conv1", "pre_logits")
        for network, a in zip(TITLES, (4, 2), strict=True)
    )
    clouds = tuple(
        Series(network=network, name="pre_logits", x=tuple(draws.normal(labels).tolist()),
               y=tuple(draws.normal(labels).tolist()), labels=tuple(labels.tolist()))
        for network in TITLES
        for labels in [np.arange(360) % 10]
    )  # fmt: skip
    iterated = Protocol(images=360, attack=AttackProtocol(name="Iter-FGSM", step_size=1 / 255))
    return (
        Curve(key="steps-ifgsm", group="White box", title="Accuracy over attack steps", kind="line", x_label="steps",
              y_label="accuracy", y_share=True, protocol=iterated, lines=lines),
        Curve(key="radii", group="White box", title="Accuracy by radius", kind="line", x_label="radius, 1/255",
              y_label="accuracy", x_log=True, y_share=True, protocol=Protocol(attack=PGD), lines=radii),
        Curve(key="cushion", group="Representations", title="Layer cushion", kind="histogram", x_label="cushion",
              y_label="share of images", y_share=True, lines=cushions),
        Curve(key="plane", group="Representations", title="First two principal components", kind="scatter",
              x_label="first", y_label="second", protocol=Protocol(images=360), lines=clouds),
    )  # fmt: skip


def make_strip(titles, count=6, caption=None):
    """Images of every network as they are, attacked, and what was changed."""
    shape = (count, 1, 8, 8)
    draws = np.random.default_rng(1)
    original, noise = draws.integers(0, 256, shape), draws.integers(-40, 41, shape)
    rows = [
        StripRow(
            network=network,
            name=name,
            pixels=images.clip(0, 255).astype(np.uint8).tobytes(),
            captions=tuple(caption or str(number % 10) for number in range(count)),
            notes=notes,
        )
        for network in titles
        for name, images, notes in (
            ("original", original, ()),
            ("adversarial", original + noise, tuple(f"rho {0.05 + 0.01 * number:.2f}" for number in range(count))),
            ("difference x10", 128 + 3 * noise, ()),
        )
    ]
    protocol = Protocol(attack=AttackProtocol(name="DeepFool", norm="l2", steps=50), details={"overshoot": 0.02})
    return Strip(key="deepfool", title="DeepFool", shape=shape, rows=tuple(rows), protocol=protocol)
