"""Training recipes: the recipe, the loop, run folders and reports behind `timm-lowrank train`.

>>> from timm_lowrank.training import load_recipe, train
>>> recipe = load_recipe("digits", ["epochs=3", "pretrain_epochs=1"])
>>> summary = train(recipe, "runs/short")  # doctest: +SKIP
"""

import importlib.util

_missing = [name for name in ("accelerate", "tqdm", "yaml") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f"training recipes need {', '.join(_missing)}: pip install 'timm_lowrank[train]'")

from .experiment import train  # noqa: E402
from .recipe import Recipe, load_recipe, recipe_names  # noqa: E402
from .run import Run  # noqa: E402

__all__ = ["Recipe", "Run", "load_recipe", "recipe_names", "train"]
