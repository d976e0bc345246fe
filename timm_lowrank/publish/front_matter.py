"""The front matter of a card: YAML between two lines of three dashes, at its beginning."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import CheckpointError

CARD = "README.md"
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def split_card(card: str) -> tuple[str, str]:
    """Front matter and the text behind it."""
    front = _FRONT.match(card)
    return (front[1], card[front.end() :]) if front else ("", card)


def loaded(front: str, where: str) -> dict[str, Any]:
    """The keys and values of front matter.

    Raises:
        CheckpointError: it is no YAML mapping; `where` says of what.
    """
    try:
        metadata = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"the front matter of {where} is not valid YAML ({' '.join(str(error).split())}): repair it first, or "
            "leave the card alone with --keep-card"
        ) from error
    if not isinstance(metadata, dict | None):
        raise CheckpointError(f"the front matter of {where} must be a mapping of keys to values: repair it first")
    return metadata or {}


def license_of(card: str, where: str) -> str | None:
    """The licence that the front matter of a card names, "other" by its own name, several with commas between them.

    Raises:
        CheckpointError: it is no YAML mapping.
    """
    front = loaded(split_card(card.removeprefix("\ufeff").replace("\r\n", "\n"))[0], where)
    named = front.get("license")
    if named == "other":
        named = front.get("license_name") or named
    return ", ".join(str(name) for name in (named if isinstance(named, list) else [named]) if name) or None
