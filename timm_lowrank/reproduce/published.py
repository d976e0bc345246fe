"""What the paper prints: every figure of its Tables 1 to 10, and the figures that its text claims.

Shares (accuracies, parts of a variance) lie in [0, 1], whatever the paper prints; rho and radii are numbers. `None`
stands where the paper prints nothing. Of Figures 2 to 20 it prints curves and pictures alone, and no number of them is
read off here.
"""

from __future__ import annotations

import dataclasses

Shares = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Printed:
    """A figure that the paper qualifies.

    Attributes:
        value: the number in it.
        text: how it stands there: "more than 1,000".
    """

    value: float
    text: str


def _percent(*values: float | None) -> Shares:
    return tuple(None if value is None else round(value / 100, 6) for value in values)


# Columns of Tables 1, 2 and 9: radii 8, 10, 16, 20 of 255, each with 7 and 20 steps; then clean test accuracy.
WHITE_BOX: dict[str, dict[str, Shares]] = {
    "CIFAR-10, ResNet-50": {
        "N-LR": _percent(43.1, 31.0, 38.5, 21.8, 31.2, 7.8, 28.9, 4.5, 95.4),
        "1-LR": _percent(79.1, 78.5, 78.6, 78.1, 77.9, 77.0, 77.1, 76.6, 95.4),
    },
    "CIFAR-10, ResNet-18": {
        "N-LR": _percent(40.9, 26.7, 35.1, 16.6, 26.7, 4.4, 24.3, 2.3, 94.6),
        "1-LR": _percent(48, 31.3, 44.4, 25.4, 39.6, 17.9, 38.2, 15.7, 94.9),
        "2-LR": _percent(54.7, 37.6, 52.4, 33.1, 48.7, 25.7, 48.0, 23.6, 94.5),
    },
    "CIFAR-100 coarse, ResNet-50": {
        "N-LR": _percent(37.2, 29.9, 34.1, 24.6, 29.8, 15.9, 34.1, 13.3, 85.8),
        "1-LR": _percent(45.3, 38.7, 43.7, 35.8, 40.9, 31.5, 40.0, 29.8, 85.8),
    },
    "CIFAR-100 coarse, ResNet-18": {
        "N-LR": _percent(30.6, 23.2, 26.4, 16.9, 20.5, 7.42, 18.4, 5.1, 84.1),
        "1-LR": _percent(34.5, 25.4, 31.3, 20.2, 27.3, 13.1, 25.7, 10.8, 84.2),
        "2-LR": _percent(33.82, 24.37, 30.9, 19.1, 26.8, 11.83, 25.41, 9.9, 84),
    },
}
BLACK_BOX: dict[str, dict[str, Shares]] = {  # crafted on N-LR
    "CIFAR-10, ResNet-50": {"1-LR": _percent(64.7, 56.8, 59.0, 47.5, 51.2, 28.0, 48.3, 20.6, 95.4)},
    "CIFAR-10, ResNet-18": {
        "1-LR": _percent(66.6, 60.8, 61.1, 51.0, 52.2, 31.52, 49.8, 23.6, 94.9),
        "2-LR": _percent(68.0, 62.5, 62.3, 53.4, 53.8, 33.5, 50.8, 25.8, 94.5),
    },
    "CIFAR-100 coarse, ResNet-50": {"1-LR": _percent(52.4, 46.2, 48.1, 38.8, 42.0, 25.4, 48.1, 20.9, None)},
    "CIFAR-100 coarse, ResNet-18": {
        "1-LR": _percent(53.0, 48.6, 47.9, 41.0, 41.1, 26.3, 38.7, 20.4, 84.2),
        "2-LR": _percent(51.3, 47.2, 46.9, 39.9, 39.5, 24.3, 37.2, 19.2, 84),
    },
}
TABLE_1_NOTE = (
    "Two cells of the paper's table repeat their neighbours and look like slips of the pen: CIFAR-100 coarse, "
    "ResNet-50, 20/255 with 7 steps, N-LR white box (34.1, as at 10/255) and 1-LR black box (48.1, as at 10/255)."
)
COMPARED: dict[str, Shares] = {  # Table 2, ResNet-50 on CIFAR-10; the last column is empty there
    "N-LR": _percent(43.1, 31.0, 38.5, 21.8, 31.2, 7.8, 28.9, 4.5),
    "SNIP": _percent(29.4, 14.5, 25.0, 8.0, 18.5, 1.3, 16.2, 0.4),
    "SRN": _percent(47.8, 37.6, 44.4, 31.4, 39.8, 21.3, 37.5, 18.4),
    "SN": _percent(54.2, 43.8, 50.8, 36.4, 45.0, 22.6, 42.8, 18.1),
    "1-LR": _percent(79.1, 78.5, 78.6, 78.1, 77.9, 77.0, 77.1, 76.6),
}
FINE_WHITE_BOX: dict[str, Shares] = {  # Table 9, ResNet-50, fine labels of CIFAR-100
    "N-LR": _percent(27.8, 21.8, 25.2, 17.7, 21.1, 17.7, 19.4, 7.6, 77.2),
    "1-LR": _percent(28.8, 23.6, 26.8, 21.4, 24.4, 17.8, 23.5, 16.5, 77.7),
}
FINE_BLACK_BOX: dict[str, Shares] = {"1-LR": _percent(38.3, 32.8, 34.3, 26.4, 28.9, 15.0, 27.0, 11.7, None)}

# Table 3, ResNet-18 on CIFAR-10: rho of DeepFool, Iter-LL-FGSM, Iter-FGSM at 99 % misclassification.
RHO_WHITE_BOX = {"N-LR": (1.6e-2, 2.4e-2, 2.1e-2), "1-LR": (1.7e-1, 1.1e-1, 6.0e-2), "2-LR": (1.8e-1, 9.8e-2, 7.6e-2)}
RHO_BLACK_BOX = {"1-LR": (4.7e-2, 1.8e-1, 5.6e-2), "2-LR": (5.5e-2, 2.0e-1, 7.5e-2)}

# Table 4, CIFAR-10: noise N(0, 128/255) on a pixel with probability 0.4, 0.6, 0.8, 1.
NOISE: dict[str, dict[str, Shares]] = {
    "CIFAR-10, ResNet-50": {"N-LR": _percent(69.7, 26.1, 12.6, 11.3), "1-LR": _percent(75.1, 34.2, 15.8, 13.0)},
    "CIFAR-10, ResNet-18": {
        "N-LR": _percent(57.7, 27.3, 13.0, 7.2),
        "1-LR": _percent(75.1, 33.0, 15.2, 11.0),
        "2-LR": _percent(74.1, 35.5, 16.4, 11.5),
    },
}

# Table 5: accuracy of a max-margin classifier on all features and on fewer directions.
EMBEDDED_LAST = {"N-LR": _percent(75.6, 68.4, 48), "1-LR": _percent(78.1, 76.5, 72)}  # all 2,048, 10, 5
EMBEDDED_INSIDE = {"N-LR": _percent(90.7, 76.9, 61.7), "2-LR": _percent(91.14, 88.5, 75)}  # all 16,384, 20, 10

# Table 6, ResNet-18: max-margin hybrids on images that fool the network, by DeepFool, Iter-LL-FGSM, Iter-FGSM.
HYBRID_WHITE_BOX = {"N-LR": (0.01, 0.04, 0.02), "1-LR": (0.38, 0.35, 0.48), "2-LR": (0.43, 0.55, 0.55)}
HYBRID_BLACK_BOX = {"1-LR": (0.29, 0.31, 0.33), "2-LR": (0.44, 0.50, 0.48)}

# Table 7: test accuracy.
VGG_CLEAN = {"N-LR": _percent(89.1), "2-LR": _percent(89.8)}
SVHN_RESNET_CLEAN = {
    "N-LR": _percent(97.97),
    "1-LR": _percent(97.98),
    "2-LR": _percent(97.86),
    "Bottle-2LR": _percent(97.70),
}
SVHN_VGG_CLEAN = {"N-LR": _percent(97.21), "2-LR": _percent(97.79)}
TRANSFERRED = {"N-LR": _percent(75.6, 52), "1-LR": _percent(78.1, 48), "Bottle-LR": _percent(76, 38)}  # coarse, fine

# Table 8, VGG-19 on CIFAR-10, before the first fully connected layer: all 512, 20, 10.
EMBEDDED_VGG = {"N-LR": _percent(89.7, 89.78, 89.65), "2-LR": _percent(89.8, 89.85, 89.79)}

# Table 10, ResNet-18 on CIFAR-10: L_inf radius of Iter-LL-FGSM and Iter-FGSM for 99 % misclassification.
RADIUS_WHITE_BOX = {"N-LR": (0.01, 0.01), "1-LR": (0.06, 0.01), "2-LR": (0.04, 0.02)}
RADIUS_BLACK_BOX = {"1-LR": (0.08, 0.01), "2-LR": (0.1, 0.01)}

# Appendix A, ResNet 1-LR: zeros before and after the fourth block, and directions that hold 99 % of the variance.
SPARSITY = (0.39, 0.05, Printed(1000, "more than 1,000"), Printed(10, "about 10"))
# Appendix A: rank, 101st and 1,000th singular value, share of the first 100, behind pre-activations of rank 100.
CUT = (None, 49.0, 7.9, 0.94)
# Section 3.3: parameters of the fourth block and the classifier, and the share of them that a linear classifier has.
REPLACED = (8.4e6, None, 0.02)
