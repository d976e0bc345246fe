"""Values of a recipe as the types that its fields name."""

from __future__ import annotations

import types
import typing
from typing import Any


def typed(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names, or a TypeError that says what was expected."""
    if isinstance(hint, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return typed(value, option)
            except TypeError:
                continue
        raise TypeError("must be " + " or ".join(_NAMES[option] for option in typing.get_args(hint)))
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("must be a list")
        return tuple(typed(item, typing.get_args(hint)[0]) for item in value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise TypeError(f"must be {_NAMES[origin]}")
    return value


_NAMES: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    type(None): "null",
}
