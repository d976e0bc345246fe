"""A trained model as a folder or a repository on the Hugging Face Hub: saved, loaded, published.

config.json, model.safetensors        the plain network in timm's own layout: timm and transformers load it alone
lowrank.json, lowrank.safetensors     the branches: configuration, and W and b of each layer
README.md                             on the Hub: the model card

>>> import timm_lowrank as tlr
>>> model = tlr.from_pretrained("USER/NAME")  # doctest: +SKIP
"""

from ..errors import CheckpointDamagedError, CheckpointError, CheckpointWriteError
from .branches import FORMAT, BranchDescription, has_branches, load_branches, read_description, write_branches
from .card import minimal_card
from .files import (
    CHECKPOINT_FILES,
    LOWRANK_CONFIG,
    LOWRANK_WEIGHTS,
    NETWORK_CONFIG,
    NETWORK_WEIGHTS,
    checked_name,
    module_to_import,
    sha256_of,
)
from .loading import from_pretrained, verify
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
    "BranchDescription",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointWriteError",
    "Published",
    "checked_name",
    "download",
    "from_pretrained",
    "has_branches",
    "load_branches",
    "minimal_card",
    "module_to_import",
    "push_to_hub",
    "read_description",
    "save_pretrained",
    "sha256_of",
    "verify",
    "write_branches",
]
