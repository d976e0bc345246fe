"""`tag`: HTML in which everything that is not markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"br", "img", "meta"})


class Markup(str):
    """Text that is HTML already and is passed on as it is."""

    __slots__ = ()


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Parts one after the other; those that are plain text are escaped."""
    return Markup(escape(between).join(escape(part) for part in parts))


def escape(text: str) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def tag(name: str, /, *children: str, **attributes: str | bool | None) -> Markup:
    """An element. `class_` and `data_label` become class and data-label; those that are None or False are left out.

    Args:
        name: of the element; void ones take no children.
        children: markup, or text, which is escaped.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(children)}</{name}>")
