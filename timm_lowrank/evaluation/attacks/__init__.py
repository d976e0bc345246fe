"""Attacks: each takes (model, images, labels) and gives adversarial images.

Pixels are in [0, 1]. Radii are in units of the pixel range, or with radius_unit="normalized" in standard deviations of
the channel.
"""

from .auto import AutoAttackResult, autoattack, run_autoattack
from .deepfool import deepfool
from .gradient import FIXED, MADRY, PAPER, PGDSetting, fgsm, iterative_fgsm, iterative_least_likely, least_likely, pgd
from .transfer import TransferResult, transfer, until_fooled

__all__ = [
    "FIXED",
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
