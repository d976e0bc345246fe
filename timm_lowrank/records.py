"""Dataclasses into and out of what JSON and YAML hold; all that is wrong is listed, with where it stands."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

UNIONS = (types.UnionType, typing.Union)  # str | None, and what typing makes of Literal["a"] | None
WORDS = {
    str: "a string", int: "an integer", float: "a number", bool: "true or false", types.NoneType: "null",
    bytes: "base64", tuple: "a list",
}  # fmt: skip
WRONG: Any = object()  # stands for what could not be decoded

_hints = functools.cache(typing.get_type_hints)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def encode(value: Any) -> Any:
    """Dataclasses as mappings without what has its default value, NaN as null, bytes as base64."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: encode(entry)
            for field in dataclasses.fields(value)
            if (entry := getattr(value, field.name)) != default_of(field)
        }
    if isinstance(value, Mapping):
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode_fields(
    kind: Any, content: Mapping[str, Any], problems: list[str], where: str = "", *, nulls: bool = False
) -> dict[str, Any]:
    """The arguments of the dataclass `kind`, without what is missing or wrong.

    Keys that the dataclass does not have are left out: a newer version may have written them.

    Args:
        problems: gets a sentence for whatever is missing or wrong.
        where: what `content` is called there.
        nulls: whether null may stand for a number that could not be computed, which becomes NaN.
    """
    fields = dataclasses.fields(kind)
    absent = [f.name for f in fields if f.name not in content and default_of(f) is dataclasses.MISSING]
    if absent:
        problems.append(f"{where or 'it'} lacks {', '.join(absent)}")
    hints = _hints(kind)
    decoded = {
        field.name: decode(
            hints[field.name], content[field.name], f"{where}.{field.name}".lstrip("."), problems, nulls=nulls
        )
        for field in fields
        if field.name in content
    }
    return {name: value for name, value in decoded.items() if value is not WRONG}


def decode(kind: Any, value: Any, where: str, problems: list[str], *, nulls: bool = False) -> Any:
    """`value` as the type `kind`, or WRONG with an entry in `problems`; lists and mappings without what is wrong.

    A string of digits stands for a key that is an integer, and with `nulls` null for a number that is NaN.
    """
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any or (value is None and types.NoneType in inner):
        return value
    if origin in UNIONS:
        tried: list[str] = []
        for option in inner if value is not None else ():
            if option is types.NoneType:
                continue
            tried = []
            decoded = decode(option, value, where, tried, nulls=nulls)
            if not tried:
                return decoded
        if inside := [problem for problem in tried if not problem.startswith(f"{where}=")]:
            problems += inside
            return WRONG
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        before = len(problems)
        fields = decode_fields(kind, value, problems, where, nulls=nulls)
        return kind(**fields) if len(problems) == before else WRONG  # type: ignore[operator]
    elif origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            problems.append(f"{where} has {len(value)} entries, not {len(inner)}")
            return WRONG
        entries = [decode(inner[0], entry, f"{where}[{row}]", problems, nulls=nulls) for row, entry in enumerate(value)]
        return tuple(entry for entry in entries if entry is not WRONG)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        items = {}
        for key, entry in value.items():
            name = int(key) if inner[0] is int and isinstance(key, str) and key.isdecimal() else key
            name = decode(inner[0], name, f"the key {key!r} of {where}", problems)
            items[name] = decode(inner[1], entry, f"{where}[{key!r}]", problems, nulls=nulls)
        return {name: entry for name, entry in items.items() if name is not WRONG and entry is not WRONG}
    elif kind is bytes and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return base64.b64decode(value, validate=True)
    elif kind is float and ((value is None and nulls) or type(value) in (int, float)):
        return math.nan if value is None else value
    elif (origin is Literal and value in inner) or (kind in (str, bool, int) and type(value) is kind):
        return value
    elif isinstance(kind, type) and issubclass(kind, enum.Enum) and value in list(kind):
        return kind(value)
    shown = repr(value)
    problems.append(f"{where}={shown if len(shown) <= 60 else shown[:57] + '...'} must be {in_words(kind)}")
    return WRONG


def in_words(kind: Any) -> str:
    """A type in words: a number or null."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in UNIONS:
        return " or ".join(map(in_words, inner))
    if origin is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return f"one of {', '.join(inner or kind)}"
    return WORDS.get(origin, "a mapping")
