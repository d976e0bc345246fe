"""`Recipe`: everything that decides the outcome of a training run, read from YAML and checked at once."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError, nearest
from .checks import problems_of
from .fields import RecipeFields
from .typed import typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(RecipeFields):
    """One training run. The same recipe on the same data with the same number of threads gives the same weights.

    `RecipeFields` explains the values.

    Raises:
        RecipeError: with every problem found, in one message.
    """

    def __post_init__(self) -> None:
        problems = problems_of(self)
        if problems:
            raise RecipeError(_listed(f"recipe {self.name!r}", problems))

    def plain(self) -> Recipe:
        """The twin: the same run with the branches switched off."""
        return dataclasses.replace(
            self, name=f"{self.name} (plain)", lowrank={**self.lowrank, "enabled": False}, twin=False
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from plain values.

        Raises:
            RecipeError: unknown keys (the nearest known ones are named), missing keys, values of a wrong type.
        """
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        problems = [f"there is no key {key!r}. {nearest(str(key), fields)}" for key in values if key not in fields]
        problems += [
            f"the key {name!r} is missing"
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        checked = {}
        for key in values.keys() & fields.keys():
            try:
                checked[key] = typed(values[key], hints[key])
            except TypeError as error:
                problems.append(f"{key}={values[key]!r} {error}")
        if problems:
            raise RecipeError(_listed(f"recipe {values.get('name', 'recipe')!r}", problems))
        return cls(**checked)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **replace: Any) -> Recipe:
    """Reads a YAML recipe and changes keys of it.

    Args:
        path: the YAML file; its stem is the recipe's name unless it sets one.
        overrides: "key=value" each, value in YAML; a dotted key reaches inside (`lowrank.scale=paper`).
        replace: keys that are set when they are not None.

    Raises:
        RecipeError: a file that is not there or not YAML, an override without "=", and all that `Recipe` refuses.
    """
    path = Path(path)
    try:
        values = parse_yaml(path.read_text())
    except OSError as error:
        near = sorted(other.stem for other in path.parent.glob("*.yaml"))
        known = f" Recipes there: {', '.join(near)}." if near else ""
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.{known}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of keys to values")
    values.setdefault("name", path.stem)
    for override in overrides:
        _override(values, override)
    values.update({key: value for key, value in replace.items() if value is not None})
    return Recipe.from_dict(values)


def parse_yaml(text: str) -> Any:
    """YAML in which 5e-4 is a number (YAML 1.1, and with it PyYAML, takes it for a string)."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"--set {override}: write it as key=value, such as --set lowrank.reconstruction_weight=0.3")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from error
    # A layer name may hold dots of its own: lowrank.branches.layer3.1 is the key "layer3.1".
    *parents, last = key.split(".", 2)
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {parent} is {inner!r}, which has no keys inside")
        values = inner
    values[last] = value


def _listed(what: str, problems: Sequence[str]) -> str:
    return f"{what}: {problems[0]}" if len(problems) == 1 else f"{what}:\n" + "\n".join(f"- {p}" for p in problems)
