"""A trained model as a folder or a repository on the Hugging Face Hub: saved, loaded, published.

config.json, model.safetensors        the plain network in timm's own layout: timm and transformers load it alone
lowrank.json, lowrank.safetensors     the branches: configuration, and W and b of each layer
README.md                             on the Hub: the model card

>>> import timm_lowrank as tlr
>>> model = tlr.from_pretrained("USER/NAME")  # doctest: +SKIP
"""

from ..errors import CheckpointDamagedError, CheckpointError, CheckpointWriteError
from .card import minimal_card
from .files import (
    CHECKPOINT_FILES,
    FORMAT,
    LOWRANK_CONFIG,
    LOWRANK_WEIGHTS,
    NETWORK_CONFIG,
    NETWORK_WEIGHTS,
    checked_name,
    module_to_import,
    sha256_of,
    verify,
)
from .loading import from_pretrained
from .publishing import Published, push_to_hub
from .remote import download
from .saving import save_pretrained

__all__ = [
    "CHECKPOINT_FILES",
    "FORMAT",
    "LOWRANK_CONFIG",
    "LOWRANK_WEIGHTS",
    "NETWORK_CONFIG",
    "NETWORK_WEIGHTS",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointWriteError",
    "Published",
    "checked_name",
    "download",
    "from_pretrained",
    "minimal_card",
    "module_to_import",
    "push_to_hub",
    "save_pretrained",
    "sha256_of",
    "verify",
]
