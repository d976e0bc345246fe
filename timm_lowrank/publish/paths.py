"""`without_local_paths`: the filter that everything published goes through: no path and no user name is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..text import numbered

KEPT = ("class_names", "label_names", "pixels")  # names of classes may begin with a slash, base64 may hold anything

# How a path of this machine begins where it stands in other text: not inside a word, a relative path or an address.
_BEGIN = r"(?<![\w.~/\\])(?!(?<=:)//)(?:file:(?://[\w.-]*)?|~[\w.-]*|[A-Za-z]:|(?:\.\.[\\/])*\.\.|(?=\\\\)|)"
_WORD = r"[^\s/\\'\"<>|:;,()\[\]{}`]"
_PART = rf"(?:(?![-\s]){_WORD}+)"
# A folder with spaces in its name; what looks like an option or a number belongs to the text.
_SPACED = rf"{_PART}(?: (?![\d.]*[\\/]){_PART}){{0,3}}(?=[\\/])"
_IN_TEXT = re.compile(rf"({_BEGIN})((?:[\\/]+(?:{_SPACED}|{_PART}))+)[\\/]*")
_QUOTED = re.compile(r"(['\"])((?:file:|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|/|\.\.[\\/])[^'\"\n]*)\1")
_WHOLE = re.compile(r"(?!.*(?:[:;,] | -))(?:file:|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|/|\.\.[\\/])[^\n]*")
_HOME = re.compile(r"(?:^|[\\/])(?:home|Users)[\\/][^\\/]+[\\/]*$")


def without_local_paths(value: Any, renamed: Mapping[str, str] | None = None) -> Any:
    """The same without the folders of this machine: of a path the last part is left, in values and keys alike.

    A path is what begins with /, ~, .., a drive letter, two backslashes or file:, alone or in other text; an address
    such as https://... is none, and relative paths stay. Of somebody's home folder "home" is left, not the name.

    Args:
        value: what JSON and YAML hold.
        renamed: words, such as titles of networks, and what each is called instead.
    """
    if isinstance(value, Mapping):
        keys = numbered([_cleaned(key, renamed) if isinstance(key, str) else key for key in value])
        return {
            new: entry if key in KEPT else without_local_paths(entry, renamed)
            for new, (key, entry) in zip(keys, value.items(), strict=True)
        }
    if isinstance(value, list | tuple):
        return [without_local_paths(entry, renamed) for entry in value]
    return _cleaned(value, renamed) if isinstance(value, str) else value


def last_part(path: str, default: str = "folder") -> str:
    """The last part of a path, with slashes of either kind: what may be published of it.

    >>> last_part("data/photos/"), last_part(r"C:\\data\\photos"), last_part("/home/me"), last_part("/")
    ('photos', 'photos', 'home', 'folder')

    Args:
        path: of a file or folder; of somebody's home folder "home" is left.
        default: where nothing is left.
    """
    return "home" if _HOME.search(path) else re.split(r"[\\/]", path.rstrip("\\/"))[-1] or default


def without_paths_in_titles(evaluation: Mapping[str, Any]) -> Any:
    """`without_local_paths` of evaluation.json, in which titles of networks that were paths stay different ones."""
    networks = evaluation.get("networks")
    listed = [one for one in networks if isinstance(one, Mapping)] if isinstance(networks, list) else []
    titles = [title for one in listed if isinstance(title := one.get("title"), str)]
    renamed = zip(titles, numbered([_cleaned(title, None) for title in titles]), strict=True)
    return without_local_paths(evaluation, {old: new for old, new in renamed if old != new})


def _cleaned(text: str, renamed: Mapping[str, str] | None) -> str:
    for old, new in sorted((renamed or {}).items(), key=lambda item: -len(item[0])):
        text = text.replace(old, new)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.~/\\]){re.escape(home)}(?![\w.-])", "~", text)
    if _WHOLE.fullmatch(text):
        return last_part(text)
    text = _QUOTED.sub(lambda found: found[1] + last_part(found[2]) + found[1], text)
    return _IN_TEXT.sub(_cut, text)


def _cut(found: re.Match[str]) -> str:
    begin, rest = found.groups()
    single = not begin and not rest.startswith("\\\\") and len(re.findall(r"[\\/]+", rest)) < 2
    slash = not begin and rest.startswith("\\") and not rest.startswith("\\\\")
    return found[0] if single or slash else last_part(found[0])  # /255 and \alpha are no paths
