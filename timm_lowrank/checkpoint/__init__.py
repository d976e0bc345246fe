"""A trained model as a folder or a repository on the Hugging Face Hub: saved, loaded, fetched.

config.json, model.safetensors        the plain network in timm's own layout: timm and transformers load it alone
lowrank.json, lowrank.safetensors     the branches: configuration, and W and b of each layer
README.md                             on the Hub: the model card

>>> import timm_lowrank as tlr
>>> model = tlr.from_pretrained("USER/NAME")  # doctest: +SKIP
"""

from ..errors import CheckpointDamagedError, CheckpointError, CheckpointWriteError
from .branches import FORMAT, BranchDescription, has_branches, load_branches, read_description, write_branches
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
    "checked_name",
    "download",
    "from_pretrained",
    "has_branches",
    "load_branches",
    "module_to_import",
    "read_description",
    "save_pretrained",
    "sha256_of",
    "verify",
    "write_branches",
]
