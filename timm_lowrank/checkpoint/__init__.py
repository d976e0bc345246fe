"""A trained model as a folder or a repository on the Hugging Face Hub: saved, loaded, fetched.

config.json, model.safetensors        the plain network in timm's own layout: timm and transformers load it alone
lowrank.json, lowrank.safetensors     the branches: configuration, and W and b of each layer
README.md                             on the Hub: the model card

>>> import timm_lowrank as tlr
>>> model = tlr.from_pretrained("USER/NAME")  # doctest: +SKIP
"""

from .branches import BranchDescription, load_branches, read_description, write_branches
from .loading import from_pretrained, verify
from .remote import download
from .saving import save_pretrained

__all__ = [
    "BranchDescription",
    "download",
    "from_pretrained",
    "load_branches",
    "read_description",
    "save_pretrained",
    "verify",
    "write_branches",
]
