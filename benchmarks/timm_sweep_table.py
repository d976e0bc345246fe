"""The rows of the sweep over timm as a table by family, in Markdown."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

INTRODUCTION = """# Which networks of timm take a branch

Every architecture of `timm.list_models()` in timm {version}, built with random weights and 10 classes, torch {torch}.
{totals}

**Passed** means: the network is wrapped with `"1-LR"`, then with `"2-LR"`. Each time it takes a training step on two
images: forward, `penalty()`, backward, a step of SGD, `update()`; with `"2-LR"` a second one with gradient
checkpointing, where the network offers it. Every branch must have a finite loss above zero, the network a gradient,
every branch its update. Then `unwrap()` must give the same object back without a hook more than before, with the same
state-dict keys, and its eval output must equal, to the bit, that of a plain network that loads its state dict.

**On the meta device** means: the network has more than {limit} million parameters and was built without memory for its
weights. There the same steps are taken without numbers: every branch takes part, with and without checkpointing, its
penalty carries a gradient, and class, hooks and keys are the same after `unwrap()`. Outputs cannot be compared.

**Refused** means: the network has no classifier, so that neither `"1-LR"` nor `"2-LR"` has a meaning, and `wrap` raises
an error that says so and names a layer to use. It passed all of the above with a branch on a named layer instead.

Images have 64 pixels, or the next size that the network takes, up to its own. "Before the last stage" is where
`"2-LR"` sits in the smallest member of the family; `tlr.list_layers` lists the other places.

Written by `python benchmarks/timm_sweep.py --write docs/timm.md` from the rows of the whole sweep.
"""

HEADER = """
| family | networks | passed | on meta | checkpointed | refused | failed | before the last stage | pixels |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |
"""


def totals(rows: Sequence[Row]) -> str:
    """The figures of the whole sweep."""
    count = collections.Counter(row["status"] for row in rows)
    meta = sum(row["status"] == "pass" and row.get("device") == "meta" for row in rows)
    families = {row["family"] for row in rows}
    whole = len(families - {row["family"] for row in rows if row["status"] == "fail"})
    return (
        f"Networks: {len(rows):,} in {len(families)} families. Passed: {count['pass']:,}, {meta} of them on the meta "
        f"device. Refused: {count['refused']}. Failed: {count['fail']}. Families without a failure: {whole}."
    )


def table(rows: Sequence[Row]) -> str:
    """A line of Markdown for each family, in alphabetical order."""
    lines = []
    for name in sorted({row["family"] for row in rows}):
        members = sorted((r for r in rows if r["family"] == name), key=lambda r: (r.get("parameters", 0), r["name"]))
        passed = [r for r in members if r["status"] == "pass"]
        stages = [layer for r in passed[:1] for layer in r["layers"]["2-LR"] if layer != "pre_logits"]
        pixels = sorted({max(r["input"][1:]) for r in members if "input" in r})
        cells = [
            name,
            len(members),
            len(passed),
            sum(r["device"] == "meta" for r in passed) or "",
            sum(r["checkpointing"] for r in passed) or "",
            sum(r["status"] == "refused" for r in members) or "",
            sum(r["status"] == "fail" for r in members) or "",
            "".join(f"`{layer}`" for layer in stages),
            " to ".join(str(size) for size in dict.fromkeys((pixels[0], pixels[-1]))) if pixels else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def reasons(rows: Sequence[Row]) -> str:
    """Every network that did not pass, with the reason."""
    parts = []
    for status, title in (("refused", "Refused"), ("fail", "Failed")):
        found = sorted((r for r in rows if r["status"] == status), key=lambda r: (r["family"], r["name"]))
        if found:
            lines = [f"- `{r['name']}`: {r['why'].split(': ', 1)[-1]}" for r in found]
            parts.append(f"\n## {title}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def document(rows: Sequence[Row], listed: int, version: str, torch_version: str, limit: int) -> str:
    """The whole page; it says so if fewer than `listed` networks were tried."""
    figures = totals(rows)
    if len(rows) < listed:
        figures = f"**Unfinished: {len(rows):,} of {listed:,} were tried.** {figures}"
    about = INTRODUCTION.format(version=version, torch=torch_version, totals=figures, limit=limit)
    return about + HEADER + table(rows) + "\n" + reasons(rows)
