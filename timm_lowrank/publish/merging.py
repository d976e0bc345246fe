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

from ..errors import CheckpointError
from .card import LOWRANK_TAG, OURS, WEIGHTS
from .front_matter import loaded, split_card

_MARK = re.compile(r"^<!-- (generated|end of generated): ([\w-]+) -->[ \t]*$", re.MULTILINE)
_TOP_LEVEL = re.compile(r"^(?=[^\s#\-])", re.MULTILINE)
_COMPLETED = ("tags", "datasets", "metrics")  # lists that the owner's entries and ours share


@dataclasses.dataclass(frozen=True)
class Merged:
    """A card, and what its owner should know about it."""

    text: str
    notes: tuple[str, ...] = ()


def has_marks(card: str) -> bool:
    """Whether a card has marks of generated sections, in pairs or not: a push of this package has written it."""
    return _MARK.search(card.replace("\r\n", "\n")) is not None


def section(card: str, name: str, where: str = "the card") -> str | None:
    """What stands in a generated section of a card; None without its marks.

    Raises:
        CheckpointError: marks that do not come in pairs.
    """
    card = card.replace("\r\n", "\n")
    span = _spans(card, where).get(name)
    return card[slice(*span)] if span else None


def weights_of(card: str, where: str = "the card") -> str | None:
    """The sha256 of the weights that the figures of a card are of; None where no generated section says it.

    Raises:
        CheckpointError: marks that do not come in pairs.
    """
    said = re.search(rf"^\| `{WEIGHTS}` \| `([0-9a-f]{{64}})` \|", section(card, "training", where) or "", re.MULTILINE)
    return said[1] if said else None


def replaced(text: str, name: str, body: str, where: str) -> str | None:
    """A text with the content of one generated section replaced; None without its marks."""
    crlf = "\r\n" in text
    text = text.replace("\r\n", "\n")
    span = _spans(text, where).get(name)
    if span is None:
        return None
    text = f"{text[: span[0]]}{body}\n{text[span[1] :]}"
    return text.replace("\n", "\r\n") if crlf else text


def merge(
    card: str, new: str, where: str = "README.md", *, license: str | None = None, complete: bool = True
) -> Merged:
    """Writes the generated sections and the front matter of a new card into one that exists.

    Of the front matter, the results of this package are replaced, lists such as tags lose what only those were about
    and are completed, missing keys are added, and every other key stays as it was written. A section without marks is
    the owner's own by now and not written again; a card without any marks gets all sections at its end.

    Args:
        card: README.md as it is, with any line ends.
        new: what `run_card` gives.
        where: for messages.
        license: to be named, as the new card does, even if the card names another one.
        complete: whether keys, entries of lists and sections that the card does not have are added.

    Raises:
        CheckpointError: front matter that is no YAML mapping, or marks that do not come in pairs.
    """
    crlf, bom = "\r\n" in card, card.startswith("\ufeff")
    front, text = split_card(card.removeprefix("\ufeff").replace("\r\n", "\n"))
    new_front, new_text = split_card(new)
    merged = _merge_front(front, loaded(new_front, "the new card"), license, where, complete)
    text, notes = _merge_sections(text, new_text, where, complete)
    whole = f"---\n{merged}---\n{text}" if front or merged else text
    return Merged(("\ufeff" if bom else "") + (whole.replace("\n", "\r\n") if crlf else whole), notes)


# -------------------------------------------------------------------------------------------------------- sections


def _spans(text: str, where: str) -> dict[str, tuple[int, int]]:
    """Where the content of each generated section begins and ends."""
    spans: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for sign in _MARK.finditer(text):
        kind, name = sign.groups()
        if opened is None and kind == "generated" and name not in spans:
            opened = sign
        elif opened is not None and kind == "end of generated" and name == opened[2]:
            spans[name] = (min(opened.end() + 1, sign.start()), sign.start())
            opened = None
        else:
            raise _broken(opened[2] if opened else name, where)
    if opened is not None:
        raise _broken(opened[2], where)
    return spans


def _broken(name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the marks of the generated section {name!r} do not come as one pair, a line <!-- generated: {name} "
        f"--> and below it a line <!-- end of generated: {name} -->, so it cannot be told what was written by hand. "
        "Put the missing one back, or delete both to keep the text between them as your own"
    )


def _merge_sections(text: str, new: str, where: str, complete: bool) -> tuple[str, tuple[str, ...]]:
    spans, new_spans = _spans(text, where), _spans(new, "the new card")
    if not spans and not complete:
        return text, ()
    if not spans:
        kept = f"{text.rstrip()}\n\n" if text.strip() else "\n"
        note = f"{where} had no generated sections: all of it was kept, and they follow below it"
        return kept + new[_MARK.search(new).start() :], (note,) if text.strip() else ()  # type: ignore[union-attr]
    for name, (begin, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        if name in new_spans:
            text = text[:begin] + new[slice(*new_spans[name])] + text[end:]
    notes = []
    if missing := [name for name in new_spans if name not in spans]:
        notes.append(
            f"{where} has no marks for {', '.join(missing)} any more: what stands there is yours, was kept, and may be "
            "of an earlier checkpoint. To have a section written again, put the line <!-- generated: NAME --> and "
            "below it <!-- end of generated: NAME --> where it shall stand"
        )
    if unknown := [name for name in spans if name not in new_spans]:
        notes.append(
            f"{where} has generated sections that this version does not know, left alone: {', '.join(unknown)}"
        )
    return text, tuple(notes)


# ---------------------------------------------------------------------------------------------------- front matter


def _merge_front(front: str, metadata: Mapping[str, Any], license: str | None, where: str, complete: bool) -> str:
    """The front matter with the metadata in it. Blocks of other keys stay as they were written, comments and all."""
    before = loaded(front, where)
    after = _without_results(before, metadata, where)  # they may be of another data set, or of branches
    for key, value in metadata.items() if complete else ():
        if key == "model-index":
            after[key] = _merge_index(before.get(key), value, where)
        elif key in _COMPLETED:
            theirs = after.get(key) or []
            theirs = theirs if isinstance(theirs, list) else [theirs]
            after[key] = [*theirs, *(entry for entry in value if entry not in theirs)]
        else:
            after.setdefault(key, value)
    if license:
        ours = {"license": metadata.get("license", license), "license_name": metadata.get("license_name")}
        if any(before.get(key) != value for key, value in ours.items()):  # those were of the licence before
            after = {key: value for key, value in after.items() if key not in ("license_name", "license_link")}
        after |= {key: value for key, value in ours.items() if value}
    for written in (front, _as_block(front)):
        spliced = _spliced(written, before, after)
        try:
            if (yaml.safe_load(spliced) or {}) == after:
                return spliced
        except yaml.YAMLError:
            continue
    return str(yaml_dump(after, sort_keys=False))


def _without_results(before: Mapping[str, Any], metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Front matter without the results of this package, the data sets and metrics that they alone name, and our tag."""
    listed = _merge_index(before.get("model-index"), [], where)
    ours, theirs = _named(before.get("model-index") or [], True), _named(listed, False)
    gone = {key: ours[key] - theirs[key] for key in ours} | {"tags": {LOWRANK_TAG} if any(ours.values()) else set()}
    after = {**before, "model-index": listed}
    for key, names in gone.items():
        if names and isinstance(held := before.get(key), list):
            after[key] = [entry for entry in held if entry not in names or entry in metadata.get(key, ())]
    return {key: value for key, value in after.items() if value or before.get(key) == value}


def _named(index: Sequence[Mapping[str, Any]], ours: bool) -> dict[str, set[str]]:
    """The data sets and metrics in the results of a model-index, in ours or in those from elsewhere."""
    results = [result for entry in index for result in entry.get("results") or [] if _is_ours(result) is ours]
    results = [result for result in results if isinstance(result, dict)]
    metrics = [metric for result in results for metric in result.get("metrics") or [] if isinstance(metric, dict)]
    data = [result["dataset"] for result in results if isinstance(result.get("dataset"), dict)]
    return {
        "datasets": {str(one.get("type")) for one in data},
        "metrics": {str(metric.get("type")) for metric in metrics},
    }


def _as_block(front: str) -> str:
    """A mapping in braces, {license: mit, language: [no, en]}, with a line for each key, values as written."""
    node = yaml.compose(front, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or not node.flow_style:
        return front
    return "".join(f"{front[key.start_mark.index : value.end_mark.index]}\n" for key, value in node.value)


def _spliced(front: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    blocks = []
    for block in _TOP_LEVEL.split(front):
        key = next((key for key in before if re.match(rf"[\"']?{re.escape(str(key))}[\"']?\s*:", block)), None)
        if key is None or after.get(key) == before[key]:
            blocks.append(block)
        else:
            comments = re.search(r"(?:^[ \t]*(?:#.*)?\n)*\Z", block, re.MULTILINE)  # they belong to the next key
            dumped = _dumped(key, after[key]) if key in after else ""
            blocks.append(dumped + (comments[0] if comments else ""))
    text = "".join(blocks)
    text += "\n" if text and not text.endswith("\n") else ""
    return text + "".join(_dumped(key, value) for key, value in after.items() if key not in before)


def _dumped(key: str, value: Any) -> str:
    return str(yaml_dump({key: value}, sort_keys=False))


def _merge_index(before: Any, ours: Sequence[Mapping[str, Any]], where: str) -> list[Any]:
    """model-index with our results in place of our earlier ones; results from elsewhere stay."""
    entries = [] if before is None else before
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("results") or [], list) for entry in entries
    ):
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
