"""Numbers, differences and protocols in words. Signs and spaces are typographic; `plain` undoes that for a terminal."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.intervals import newcombe

THIN = "\u202f"  # narrow space at which no line is broken
MINUS, DASH, TIMES = "\u2212", "\u2013", "\u00d7"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PLAIN = str.maketrans({THIN: " ", "\u00a0": " ", MINUS: "-", DASH: "-"})
COUNTED = {"restarts": ("restart", "restarts"), "images": ("image", "images"), "queries": ("query", "queries")}
UNMEASURED = "not measured"
NOT_A_NUMBER = "not a number"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher a figure is for one network than for another."""

    value: float
    low: float | None  # the interval of the difference; None where the figures have no intervals
    high: float | None

    @property
    def distinguishable(self) -> bool | None:
        """Whether the interval leaves out zero; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 0 <= self.high


def plain(text: str) -> str:
    """The same without special spaces and dashes."""
    return text.translate(PLAIN)


def tied(text: str) -> str:
    """The same with no line break between a number and its sign of per cent."""
    return re.sub(r"(?<=\d) %", f"{THIN}%", text)


def known(value: Mapping[str, Any] | None) -> float | None:
    """The figure if there is one and it is finite."""
    number = None if value is None else value["value"]
    return None if number is None or not math.isfinite(number) else float(number)


def difference(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Difference | None:
    """one - other, with Newcombe's interval for a difference of two independent figures."""
    first, second = known(one), known(other)
    if one is None or other is None or first is None or second is None:
        return None
    ends: list[Any] = [value.get(end) for value in (one, other) for end in ("low", "high")]
    gap = first - second
    if any(end is None or not math.isfinite(end) for end in ends):
        return Difference(gap, None, None)
    low, high, other_low, other_high = map(float, ends)
    return Difference(gap, *newcombe((first, low, high), (second, other_low, other_high)))


def figure_text(number: float | None, unit: str) -> str:
    """41.1 %, 0.0523, 1,234; very small and very large ones keep their leading digits. JSON has null for NaN."""
    if number is None or math.isnan(number):
        return NOT_A_NUMBER
    if math.isinf(number):
        return "infinite" if number > 0 else f"{MINUS}infinite"
    return f"{_percent(number)}{THIN}%" if unit == "share" else _number(number)


def short_number(number: float) -> str:
    """A number without trailing zeros."""
    text = figure_text(number, "number")
    return text.rstrip("0").rstrip(".") if "." in text and text[-1].isdigit() and TIMES not in text else text


def interval_text(value: Mapping[str, Any], unit: str) -> str:
    """36.1-46.2 without the sign of per cent, or nothing."""
    low, high = value.get("low"), value.get("high")
    if known(value) is None or low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    write = _percent if unit == "share" else _number
    return f"{write(low)}{THIN}{DASH}{THIN}{write(high)}"


def counts_text(value: Mapping[str, Any]) -> str:
    """148 of 360, 360 images, or nothing."""
    hits, of = value.get("hits"), value.get("of")
    if of is None:
        return ""
    return f"{hits:,} of {of:,}" if hits is not None else f"{of:,} {'image' if of == 1 else 'images'}"


def difference_text(gap: Difference, unit: str) -> str:
    """+3.0 for percentage points."""
    return _signed(gap.value, unit)


def difference_interval_text(gap: Difference, unit: str) -> str:
    """-4.1 to +10.1, or nothing."""
    if gap.low is None or gap.high is None:
        return ""
    return f"{_signed(gap.low, unit)} to {_signed(gap.high, unit)}"


def protocol_phrases(protocol: Mapping[str, Any], leave_out: Sequence[str] = ()) -> list[str]:
    """How something was measured: ["L∞ PGD", "radius 8/255", "20 steps of 2/255", "random start", ...]."""
    left = {key: value for key, value in protocol.items() if value is not None and key not in leave_out}
    phrases = [str(left.pop("attack"))] if "attack" in left else []
    if "norm" in left:
        phrases.append(str(left.pop("norm")))
    if "eps" in left:
        phrases.append(f"radius {left.pop('eps')}")
    if "steps" in left:
        step = f" of {left.pop('step_size')}" if "step_size" in left else ""
        phrases.append(_counted(left.pop("steps"), "step", "steps") + step)
    for key, value in left.items():
        phrases.append(_phrase(key, value))
    return [phrase.replace("L_inf", "L∞").replace("L_2", "L2").replace("linf", "L∞") for phrase in phrases]


def shared_protocol(protocols: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all of at least two protocols, so that it has to be said once."""
    if len(protocols) < 2:
        return {}
    first, *others = protocols
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)}


def listing(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def duration(seconds: float) -> str:
    """93 seconds, 12 minutes, 3 h 20 min."""
    if seconds < 120:
        return _counted(round(seconds), "second", "seconds")
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _phrase(key: str, value: Any) -> str:
    name = key.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if key in COUNTED:
        return _counted(value, *COUNTED[key])
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return f"{name} {value}"


def _counted(number: Any, one: str, many: str) -> str:
    shown = f"{number:,}" if isinstance(number, int) else str(number)
    return f"{shown} {one if number == 1 else many}"


def _percent(share: float) -> str:
    """One decimal; more where one would turn a share into none or all of the images, which it is not."""
    number = 100 * share
    for decimals in range(1, 5):
        text = f"{number:.{decimals}f}"
        if abs(float(text)) not in (0, 100) or float(text) == number:
            break
    else:
        return _number(number) if abs(number) < 1 else f"{number:.10g}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e7):
        return f"{int(value):,}".replace("-", MINUS)
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
        return text.replace("-", MINUS)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{THIN}{TIMES}{THIN}10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", MINUS)


def _signed(value: float, unit: str) -> str:
    text = _percent(value) if unit == "share" else _number(value)
    return text if value <= 0 or text == "0.0" else f"+{text}"
