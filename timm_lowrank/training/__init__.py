"""Training recipes: data, augmentation, the loop, run folders and reports behind recipes/train.py.

>>> from timm_lowrank.training import load_recipe, train
>>> recipe = load_recipe("recipes/configs/digits.yaml", ["epochs=3", "pretrain_epochs=1"])
>>> summary = train(recipe, "runs/short")  # doctest: +SKIP
"""

try:
    import accelerate as _accelerate
    import tqdm as _tqdm
    import yaml as _yaml
except ImportError as error:
    raise ImportError(f"training recipes need {error.name}: pip install 'timm_lowrank[train]'") from error

from .errors import DataError, DivergedError, RecipeError, RunError, TrainingError
from .experiment import train
from .images import ImageData, load_images
from .recipe import Recipe, load_recipe

__all__ = [
    "DataError",
    "DivergedError",
    "ImageData",
    "Recipe",
    "RecipeError",
    "RunError",
    "TrainingError",
    "load_images",
    "load_recipe",
    "train",
]
