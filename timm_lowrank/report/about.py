"""The end of the report: how everything was measured, and how to read it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .content import titles
from .markup import Markup, join, tag
from .wording import THIN, TIMES, difference, duration

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def day(created: str) -> str:
    """22 November 2026, whatever the language of the machine; a time that cannot be read stays as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {MONTHS[moment.month - 1]} {moment.year}"


def confidence_text(evaluation: Mapping[str, Any]) -> str:
    return f"{100 * evaluation['confidence']:g}{THIN}%"


def how_measured(evaluation: Mapping[str, Any]) -> Markup:
    """Networks, data, machine and versions."""
    data, versions = evaluation["data"], evaluation["versions"]
    names = data["class_names"]
    classes = ", ".join(map(str, names[:12])) + (f", … {names[-1]}" if len(names) > 12 else "")
    command = evaluation.get("command") or _command(evaluation)
    facts = {
        "Command": tag("code", command) if command else None,
        "Suite": f"{evaluation['suite']}, seed {evaluation['seed']}, {evaluation['chunk']} images at a time",
        "Data": f"{data['source']}, {data['split']} split, {data['images']:,} images of "
        + f" {TIMES} ".join(map(str, data["image_size"])),
        "Fingerprint": tag("code", data["fingerprint"]) if data.get("fingerprint") else None,
        "Classes": f"{len(names)}: {classes}",
        "Intervals": f"{confidence_text(evaluation)} confidence",
        "Made": f"{_time(evaluation['created'])}, in {duration(evaluation['seconds'])} on {evaluation['device']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    listed = [join([tag("dt", name), tag("dd", text)]) for name, text in facts.items() if text]
    return join([*map(_network, evaluation["networks"]), tag("dl", *listed, class_="facts")])


def differences_note(evaluation: Mapping[str, Any]) -> Markup:
    """What the signs in the tables mean, and how many of them chance alone would set."""
    first, *others = titles(evaluation)
    gaps = [
        difference(figure["values"].get(first), figure["values"].get(other))
        for figure in evaluation["figures"]
        for other in others
    ]
    tested = sum(gap is not None and gap.low is not None for gap in gaps)
    if not tested:
        return Markup("")
    confidence = evaluation["confidence"]
    chance = f"{tested * (1 - confidence):.1f}".removesuffix(".0")
    return tag(
        "p",
        f"Differences are figures of {first} minus those of the other network, in percentage points where they are "
        f"shares. \u2260 (beyond chance) marks a difference whose {confidence_text(evaluation)} interval leaves out "
        "zero, \u2248 (within chance) one that is not distinguishable. The interval is that of Newcombe for two "
        "independent proportions, made of the Wilson intervals of both. The networks saw the same images: "
        "as far as they fail on the same ones, it is too wide rather than too narrow. It is about the choice of test "
        "images alone; another training seed moves the figures too, often by more. "
        f"Of the {tested} differences tested here, about {chance} would be marked if there were none.",
        class_="prose note",
    )


def how_to_read(evaluation: Mapping[str, Any]) -> Markup:
    """What such figures can and cannot say."""
    paragraphs = {
        "An attack gives an upper bound.": "Accuracy under an attack is what is left after one particular search for "
        "adversarial images. A better search can only find more of them. True robustness is at most the lowest figure "
        "in this report, and may be far below it.",
        "PGD alone does not show robustness.": "It follows the gradient of the loss. Where the gradient is zero, noisy "
        "or points nowhere, PGD fails although adversarial images are close: gradient masking. The checks above look "
        "for its known signs; finding none of them is not a proof that there is none.",
        "AutoAttack is the figure to compare.": "It combines attacks with and without gradients and has no parameters "
        "to tune. Networks trained on clean images alone, with or without low-rank representations, are expected to "
        "fall to it almost entirely at a radius of 8/255. Differences between such networks show at smaller radii, "
        "or in how far an image has to be moved.",
        "Black box is not weaker evidence, but other evidence.": "Images made for another network tell how far attacks "
        "transfer. If they do more harm than the attack on the network itself, that attack is broken.",
        "Intervals.": "Below each share stands its Wilson interval and how many images it counts. The dots and lines "
        "beside the label show the same from 0 to 100 %.",
    }
    return tag("div", *(tag("p", tag("strong", head), " ", text) for head, text in paragraphs.items()), class_="prose")


def _network(network: Mapping[str, Any]) -> Markup:
    branches = network.get("branches") or {}
    ranks = ", ".join(f"{layer} (target rank {rank})" for layer, rank in branches.items())
    parameters = network.get("parameters")
    facts = {
        "Model": f"{network.get('model', 'unknown')}" + (f", {parameters:,} parameters" if parameters else ""),
        "Low-rank branches while training": ranks or "none",
        "From": tag("code", network["path"]) if network.get("path") else None,
        "Weights": tag("code", network["weights"][:16]) if network.get("weights") else None,
    }
    listed = [join([tag("dt", name), tag("dd", text)]) for name, text in facts.items() if text]
    return tag("section", tag("h3", network["title"]), tag("dl", *listed, class_="facts"))


def _command(evaluation: Mapping[str, Any]) -> str | None:
    """What gives the same figures again; None where paths are not known or there are more than two networks."""
    paths = [network.get("path") for network in evaluation["networks"]]
    if not all(paths) or len(paths) > 2:
        return None
    words = ["accelerate", "launch", "recipes/evaluate.py", paths[0], *(["--against", paths[1]] if paths[1:] else [])]
    limit = str(evaluation["data"]["images"])
    return shlex.join([*map(str, words), "--suite", str(evaluation["suite"]), "--limit", limit])


def _time(created: str) -> str:
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{day(created)}, {moment.astimezone(UTC):%H:%M} UTC" if moment.tzinfo else f"{day(created)}, {moment:%H:%M}"
