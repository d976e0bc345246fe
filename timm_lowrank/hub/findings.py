"""The sections of a card about what was found: what low rank bought, robustness, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .figures import AUTOATTACK, Measured, gap, measured
from .markup import code, escaped, table
from .metadata import Dataset, dataset_of
from .record import RunRecord

UNMEASURED = "not measured"
DIRECTIONS = (5, 10)
_ROBUSTNESS = re.compile(r"clean|(pgd|transfer)-madry-20-.*|autoattack-.*|noise-standard-deviation-.*")


# ------------------------------------------------------------------------------------------------ what low rank bought


def low_rank(record: RunRecord) -> str:
    """The spectrum, effective ranks and accuracy on a few directions, beside the plain twin."""
    title = "What low rank bought, and what it cost" if record.lowrank else "Dimension of the representations"
    header, columns = ["", "this network"], [record.title]
    if compared := bool(record.lowrank and (record.twin or record.plain_title)):
        header, columns = [*header, "plain twin", "difference"], [record.title, record.plain_title]
    rows = []
    for layer in record.summary["branches"]:
        rows += _dimension_rows(record, layer, compared)
        for count in DIRECTIONS:
            figure = record.figure(f"compression-{layer}-{count}")
            values = [measured(figure, column) for column in columns]
            if values[0] is None:
                continue
            name = f"{code(layer)}: accuracy on {count} PCA directions"
            rows.append([name, *_compared(values), _images(values[0], figure)])
    parts = [f"## {title}"]
    if "spectrum.png" in record.plots:
        parts.append("![Share of the test activations' variance in their leading directions](plots/spectrum.png)")
    parts.append(table([*header, "images"], rows, right=range(1, len(header) + 1)))
    parts.append(
        "The effective rank is the number of directions that hold 99 % of the variance of a layer's activations on "
        "test images. " + _accuracy_note(record)
    )
    return "\n\n".join(parts)


def _dimension_rows(record: RunRecord, layer: str, compared: bool) -> list[list[str]]:
    own, plain = record.effective_rank(layer)
    if own is None:
        return []
    row = [f"{code(layer)}: effective rank", str(own)]
    if compared:
        row += [UNMEASURED, ""] if plain is None else [str(plain), f"{own - plain:+d}"]
    value = record.own(f"effective-rank-{layer}")
    limit, images = record.recipe.get("spectrum_images"), record.summary["data"]["test_images"]
    seen = value.of if value else min(limit or images, images)
    return [[*row, f"{seen:,}"]]


def _accuracy_note(record: RunRecord) -> str:
    if not any(record.figure(f"compression-{layer}-{DIRECTIONS[0]}") for layer in record.summary["branches"]):
        return "How well a few directions tell the classes apart was not measured."
    return (
        "The accuracies are those of a linear max-margin classifier that sees only the leading directions of training "
        "images; in brackets the 95 % interval. Differences are in percentage points; those whose interval holds zero "
        "are marked as within chance, which covers the choice of test images, not that of the training seed."
    )


def _compared(values: list[Measured | None]) -> list[str]:
    """Cells: this network, and, if asked for, its twin and the difference in percentage points."""
    cells = [value.shown if value else UNMEASURED for value in values]
    if len(values) == 1:
        return cells
    one, other = values
    if one is None or other is None:
        return [*cells, ""]
    difference, beyond = gap(one, other)
    chance = {True: "", False: ", within chance", None: ""}[beyond]
    return [*cells, f"{100 * difference:+.1f}{chance}"]


def _images(value: Measured, figure: Mapping[str, Any] | None) -> str:
    images = value.of or (figure or {}).get("protocol", {}).get("images")
    return f"{images:,}" if isinstance(images, int) else "?"


# ----------------------------------------------------------------------------------------------- robustness and limits


def robustness(record: RunRecord, dataset: str | None) -> str:
    """Accuracy under attack and noise, beside the plain twin, with how each figure was measured."""
    if record.evaluation is None:
        return (
            "## Robustness\n\nNothing was evaluated beyond clean accuracy: how this network behaves under attack or "
            "noise is not known. To find out, evaluate its run and publish it again:\n\n```\n"
            "accelerate launch recipes/evaluate.py RUN --suite quick autoattack\n"
            "python hub/push.py RUN USER/NAME\n```"
        )
    chosen = [
        figure
        for figure in record.evaluation["figures"]
        if _ROBUSTNESS.fullmatch(figure["key"]) and figure["unit"] == "share" and figure.get("better") == "higher"
    ]
    twin = record.plain_title
    rows = []
    for figure in chosen:
        values = [measured(figure, title) for title in ([record.title, twin] if twin else [record.title])]
        if values[0] is not None:
            name = (
                f"{escaped(figure['label'])}, black box"
                if figure["key"].startswith("transfer")
                else escaped(figure["label"])
            )
            rows.append([name, *_compared(values), escaped(_protocol(figure["protocol"], values[0]))])
    header = ["accuracy", "this network", *(["plain twin", "difference"] if twin else []), "how it was measured"]
    data = record.evaluation["data"]
    about = (
        f"Accuracy on {data['images']:,} images of the {escaped(data['split'])} split of "
        f"{escaped(dataset_of(data['source'], dataset).name)}, in per cent, with 95 % intervals"
        + ("; differences whose interval holds zero are marked as within chance. " if twin else ". ")
        + f"All figures are in `evaluation.json` (suite {escaped(record.evaluation.get('suite', '?'))})."
    )
    return "\n\n".join(["## Robustness", about, table(header, rows, right=range(1, len(header) - 1))])


def _protocol(protocol: Mapping[str, Any], value: Measured) -> str:
    """PGD, L_inf, cross-entropy, last iterate; radius 8/255; 20 steps of 2/255; random start; 1 restart; ..."""
    left = {key: entry for key, entry in protocol.items() if entry is not None and key not in ("norm", "setting")}
    words = [str(left.pop("attack"))] if "attack" in left else []
    if "eps" in left:
        words.append(f"radius {left.pop('eps')}")
    if "steps" in left:
        words.append(f"{left.pop('steps')} steps" + (f" of {left.pop('step_size')}" if "step_size" in left else ""))
    images, seed = left.pop("images", value.of), left.pop("seed", None)
    for key, entry in left.items():
        name = key.replace("_", " ")
        words.append(name if entry is True else f"no {name}" if entry is False else f"{name} {entry}")
    return "; ".join([*words, f"{value.of or images} images", *([] if seed is None else [f"seed {seed}"])])


def limits(record: RunRecord, data: Dataset) -> str:
    """What nobody should expect of it, in plain words."""
    points = [
        "It was trained on clean images, **not adversarially**. Do not rely on it where someone may want to deceive "
        "it.",
        f"What it does on images other than those of {escaped(data.name)} is not known. It saw "
        f"{record.summary['data']['train_images']:,} training images, and it is one run with one seed: another seed "
        "gives other figures, often further apart than the intervals here.",
        *_attack_points(record),
        *_masking_points(record),
    ]
    if record.evaluation:
        points += [f"The evaluation warns: {escaped(text)}" for text in record.evaluation["warnings"]]
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _attack_points(record: RunRecord) -> list[str]:
    if record.evaluation is None:
        return ["No attack was tried on it: nothing is known of its adversarial robustness."]
    value, figure = record.own(AUTOATTACK), record.figure(AUTOATTACK)
    upper = "An attack gives an upper bound: a better one can only leave less."
    if value is None or figure is None:
        return [f"**AutoAttack at 8/255 was not run**, and PGD alone does not show robustness. {upper}"]
    plain = record.plain(AUTOATTACK)
    beside = f", of the plain twin {plain.shown}" if plain else ""
    how = escaped(_protocol(figure["protocol"], value))
    return [f"AutoAttack at 8/255 leaves {value.shown} of the images right{beside} ({how}). {upper}"]


def _masking_points(record: RunRecord) -> list[str]:
    verdict = (record.evaluation or {"verdicts": {}})["verdicts"].get(record.title)
    if verdict is None:
        return ["Whether its gradients mislead attacks (gradient masking) was not checked."]
    seen = [check for check in verdict["checks"] if check["passed"] is False]
    failed = "".join(f" Failed: {escaped(check['name'])}. {escaped(check['says'])}" for check in seen)
    proof = " No sign is not a proof." if verdict["verdict"] == "no sign of gradient masking" else ""
    said = f"**{escaped(verdict['verdict'])}**. {escaped(verdict['summary'])}"
    return [f"Diagnosis of gradient masking: {said}{failed}{proof}"]
