"""A card that is written anew while what its owner wrote in it stays: marked sections and front matter.

A generated section stands between two lines:

    <!-- generated: NAME -->
    <!-- end of generated: NAME -->

Everything else belongs to the owner.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

from ..checkpoint import CheckpointError
from ..checkpoint.card import mark

OURS = "timm_lowrank"  # the name of the source of our results in model-index
_MARK = re.compile(r"^<!-- (generated|end of generated): ([\w-]+) -->[ \t]*$", re.MULTILINE)
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_TOP_LEVEL = re.compile(r"^(?=[^\s#\-])", re.MULTILINE)
_COMPLETED = ("tags", "datasets", "metrics")  # lists that the owner's entries and ours share


@dataclasses.dataclass(frozen=True)
class Merged:
    """A card, and what its owner should know about it."""

    text: str
    notes: tuple[str, ...] = ()


def section(card: str, name: str) -> str | None:
    """What stands in a generated section of a card; None without its marks.

    Raises:
        CheckpointError: marks that do not come in pairs.
    """
    card = card.replace("\r\n", "\n")
    place = _places(card, "the card").get(name)
    return card[slice(*place)] if place else None


def replaced(text: str, name: str, body: str, where: str) -> str | None:
    """A text with the content of one generated section replaced; None without its marks."""
    crlf = "\r\n" in text
    text = text.replace("\r\n", "\n")
    place = _places(text, where).get(name)
    if place is None:
        return None
    text = f"{text[: place[0]]}{body}\n{text[place[1] :]}"
    return text.replace("\n", "\r\n") if crlf else text


def front_matter(card: str, where: str = "README.md") -> dict[str, Any]:
    """The metadata at the head of a card.

    Raises:
        CheckpointError: it is no YAML mapping.
    """
    return _loaded(_split(card.removeprefix("\ufeff").replace("\r\n", "\n"))[0], where)


def merge(
    card: str,
    metadata: Mapping[str, Any],
    sections: Mapping[str, str],
    where: str = "README.md",
    overruled: Mapping[str, Any] = {},
) -> Merged:
    """Writes generated sections and metadata into a card.

    Of the metadata, the results of this package are replaced, lists such as tags are completed, missing keys are
    added, and every other key stays as it was written. A section without marks is the owner's own by now and not
    written again; a card without any marks gets all sections at its end.

    Args:
        card: README.md as it is, with any line ends; or a template.
        metadata: keys of the front matter.
        sections: name to Markdown.
        where: for messages.
        overruled: keys of the front matter that get a new value even if the card has one.

    Raises:
        CheckpointError: front matter that is no YAML mapping, or marks that do not come in pairs.
    """
    crlf, bom = "\r\n" in card, card.startswith("\ufeff")
    front, text = _split(card.removeprefix("\ufeff").replace("\r\n", "\n"))
    front = _merge_front(front, metadata, overruled, where)
    text, notes = _merge_sections(text, sections, where)
    whole = f"---\n{front}---\n{text}"
    return Merged(("\ufeff" if bom else "") + (whole.replace("\n", "\r\n") if crlf else whole), notes)


def _split(card: str) -> tuple[str, str]:
    """Front matter and the text behind it."""
    found = _FRONT.match(card)
    if not found:
        return "", card
    return found[1], card[found.end() :]


# -------------------------------------------------------------------------------------------------------- sections


def _places(text: str, where: str) -> dict[str, tuple[int, int]]:
    """Where the content of each generated section begins and ends."""
    places: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for found in _MARK.finditer(text):
        kind, name = found.groups()
        expected = "generated" if opened is None else "end of generated"
        if kind != expected or (opened is not None and name != opened[2]) or (opened is None and name in places):
            broken = name if opened is None else opened[2]
            raise _broken(broken, where)
        if opened is None:
            opened = found
        else:
            places[name] = (min(opened.end() + 1, found.start()), found.start())
            opened = None
    if opened is not None:
        raise _broken(opened[2], where)
    return places


def _broken(name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the marks of the generated section {name!r} do not come as one pair, a line <!-- generated: {name} "
        f"--> and below it a line <!-- end of generated: {name} -->, so it cannot be told what was written by hand. "
        "Put the missing one back, or delete both to keep the text between them as your own"
    )


def _merge_sections(text: str, sections: Mapping[str, str], where: str) -> tuple[str, tuple[str, ...]]:
    places = _places(text, where)
    if not places:
        appended = "\n\n".join(mark(name, body) for name, body in sections.items())
        before = text.rstrip("\n")
        note = f"{where} had no generated sections: all of it was kept, and they follow below it"
        return (f"{before}\n\n" if before.strip() else "\n") + appended + "\n", (note,) if before.strip() else ()
    for name, (begin, end) in sorted(places.items(), key=lambda item: -item[1][0]):
        if name in sections:
            text = f"{text[:begin]}{sections[name]}\n{text[end:]}"
    notes = []
    if missing := [name for name in sections if name not in places]:
        notes.append(
            f"{where} has no marks for {', '.join(missing)} any more: what stands there is yours, was kept, and may be "
            "of an earlier checkpoint. To have a section written again, put the line <!-- generated: NAME --> and "
            "below it <!-- end of generated: NAME --> where it shall stand"
        )
    if unknown := [name for name in places if name not in sections]:
        notes.append(
            f"{where} has generated sections that this version does not know, left alone: {', '.join(unknown)}"
        )
    return text, tuple(notes)


# ---------------------------------------------------------------------------------------------------- front matter


def _merge_front(front: str, metadata: Mapping[str, Any], overruled: Mapping[str, Any], where: str) -> str:
    """The front matter with the metadata in it. Blocks of other keys stay as they were written, comments and all."""
    before = _loaded(front, where)
    after = dict(before)
    for key, value in metadata.items():
        if key == "model-index":
            after[key] = _merge_index(before.get(key), value, where)
        elif key in _COMPLETED:
            after[key] = _completed(before.get(key), value)
        else:
            after.setdefault(key, value)
    after.update(overruled)
    if "model-index" in before and "model-index" not in metadata:
        after["model-index"] = _merge_index(before["model-index"], [], where)
    after = {key: value for key, value in after.items() if not (key == "model-index" and value == [])}
    spliced = _spliced(front, before, after)
    try:
        faithful = yaml.safe_load(spliced) == after
    except yaml.YAMLError:
        faithful = False
    return spliced if faithful else str(yaml_dump(after, sort_keys=False))


def _loaded(front: str, where: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"the front matter of {where} is not valid YAML ({' '.join(str(error).split())}): repair it first, or "
            "leave the card alone with --keep-card"
        ) from error
    if not isinstance(found, dict | None):
        raise CheckpointError(f"the front matter of {where} must be a mapping of keys to values: repair it first")
    return found or {}


def _spliced(front: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    blocks = []
    for block in _TOP_LEVEL.split(front):
        key = next((key for key in before if re.match(rf"[\"']?{re.escape(str(key))}[\"']?\s*:", block)), None)
        if key is None or after.get(key) == before[key]:
            blocks.append(block)
        elif key in after:
            comments = re.search(r"(?:^[ \t]*(?:#.*)?\n)*\Z", block, re.MULTILINE)  # they belong to the next key
            blocks.append(_dumped(key, after[key]) + (comments[0] if comments else ""))
    text = "".join(blocks)
    text += "\n" if text and not text.endswith("\n") else ""
    return text + "".join(_dumped(key, value) for key, value in after.items() if key not in before)


def _dumped(key: str, value: Any) -> str:
    return str(yaml_dump({key: value}, sort_keys=False))


def _completed(before: Any, ours: Sequence[str]) -> list[Any]:
    """The owner's entries, and then those of ours that are not among them."""
    theirs = before if isinstance(before, list) else [] if before is None else [before]
    return [*theirs, *(entry for entry in ours if entry not in theirs)]


def _merge_index(before: Any, ours: Sequence[Mapping[str, Any]], where: str) -> list[Any]:
    """model-index with our results in place of our earlier ones; results from elsewhere stay."""
    entries = [] if before is None else before
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(
            f"the model-index of {where} must be a list of models with their results: repair it first"
        )
    merged = []
    for entry in entries:
        results = entry.get("results") or []
        theirs = [result for result in results if not _is_ours(result)]
        if theirs or not results:
            merged.append({**entry, **({"results": theirs} if results else {})})
    for entry in ours:
        same = next((other for other in merged if other.get("name") == entry["name"]), None)
        if same is None:
            merged.append(dict(entry))
        else:
            same["results"] = [*entry["results"], *(same.get("results") or [])]
    return merged


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == OURS
