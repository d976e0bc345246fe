"""Low-rank representations for image models: a virtual branch that pulls a layer's activations into a low-dimensional
subspace while a network trains, and is gone when it predicts.

An implementation of Sanyal, Kanade, Torr, Dokania, "Robustness via Deep Low-Rank Representations".
Importing the package registers its CIFAR networks with timm.
"""

from . import comparators, evaluation, networks
from .checkpoint import from_pretrained, save_pretrained
from .core import projection, spectrum
from .core.branch import LowRankBranch
from .core.config import LowRankConfig
from .core.loop import LossHook, attach
from .core.model import LowRankModel
from .errors import CaptureError, CheckpointError, CollapseError, LowRankError, LowRankWarning, ProjectionWarning
from .layers import LayerInfo, list_layers
from .publish import push_to_hub
from .wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CollapseError",
    "LayerInfo",
    "LossHook",
    "LowRankBranch",
    "LowRankConfig",
    "LowRankError",
    "LowRankModel",
    "LowRankWarning",
    "ProjectionWarning",
    "attach",
    "comparators",
    "evaluation",
    "from_pretrained",
    "list_layers",
    "networks",
    "projection",
    "push_to_hub",
    "save_pretrained",
    "spectrum",
    "wrap",
]
