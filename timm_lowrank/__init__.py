"""Low-rank representations for image models: a virtual branch that pulls a layer's activations into a low-dimensional
subspace while a network trains, and is gone when it predicts.

An implementation of Sanyal, Kanade, Torr, Dokania, "Robustness via Deep Low-Rank Representations".
Importing the package registers its CIFAR networks with timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import comparators, networks
from .checkpoint import from_pretrained, save_pretrained
from .core import projection, spectrum
from .core.branch import LowRankBranch
from .core.config import LowRankConfig
from .core.embedder import Embedder
from .core.loop import LossHook, attach
from .core.model import LowRankModel
from .errors import CaptureError, CheckpointError, CollapseError, LowRankError, LowRankWarning, ProjectionWarning
from .layers import LayerInfo, list_layers
from .wrapping import wrap

if TYPE_CHECKING:
    from . import evaluation
    from .publish import push_to_hub

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CollapseError",
    "Embedder",
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

# Whoever only trains need not wait for these: name -> where it is, a module of its own or a name in one.
_WHEN_ASKED_FOR = {"evaluation": "evaluation", "push_to_hub": "publish"}


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_WHEN_ASKED_FOR[name]}", __name__)
    value = module if _WHEN_ASKED_FOR[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
