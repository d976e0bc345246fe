"""Attacks: each takes (model, images, labels) and gives adversarial images. Pixels and radii are in [0, 1]."""

from .auto import AutoAttackResult, autoattack, run_autoattack
from .deepfool import deepfool
from .gradient import MADRY, PAPER, PGDSetting, fgsm, iterative_fgsm, iterative_least_likely, least_likely, pgd
from .transfer import TransferResult, transfer, until_fooled

__all__ = [
    "MADRY",
    "PAPER",
    "AutoAttackResult",
    "PGDSetting",
    "TransferResult",
    "autoattack",
    "deepfool",
    "fgsm",
    "iterative_fgsm",
    "iterative_least_likely",
    "least_likely",
    "pgd",
    "run_autoattack",
    "transfer",
    "until_fooled",
]
