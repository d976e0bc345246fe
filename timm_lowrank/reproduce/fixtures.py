"""Made-up data sets in the layout of real ones: scikit-learn's digits at 32 x 32 pixels, in colours.

They are there so that everything that reads CIFAR or SVHN can run without them. No figure on them says anything about
CIFAR or SVHN.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..environment import require
from ..errors import EvaluationError, nearest

SIDE = 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a data set on the Hub is laid out.

    Args:
        folder: of its configuration, below its own.
        image: name of the column of images.
        labels: columns of labels; "fine_label" tells a digit's polarity, too, so that it has twice as many classes.
        splits: name -> digits that it has.
    """

    folder: str
    image: str
    labels: tuple[str, ...]
    splits: Mapping[str, int]


LAYOUTS = {
    "cifar10": Layout("", "img", ("label",), {"train": 400, "test": 200}),
    "cifar100": Layout("", "img", ("fine_label", "coarse_label"), {"train": 600, "test": 200}),
    "svhn": Layout("cropped_digits", "image", ("label",), {"train": 400, "test": 200, "extra": 200}),
}


def write_fixture(folder: Path, layout: str) -> Path:
    """Writes the data set of a layout unless it is there; the same bytes every time.

    Returns:
        `folder`, for `load_data`.

    Raises:
        EvaluationError: there is no such layout.
        ImportError: scikit-learn, Pillow or pyarrow are not installed.
    """
    if layout not in LAYOUTS:
        raise EvaluationError(f"there is no fixture {layout!r}. {nearest(layout, LAYOUTS)}")
    chosen = LAYOUTS[layout]
    digits = require("sklearn.datasets", "scikit-learn", "evaluate").load_digits()
    parquet, arrow = require("pyarrow.parquet", "pyarrow"), require("pyarrow", "pyarrow")
    draws = np.random.default_rng(0)
    first = 0
    for split, count in chosen.splits.items():
        rows = range(first, first + count)
        first += count
        pictures, polarities = zip(*(_picture(digits.images[row] / 16, draws) for row in rows), strict=True)
        coarse = digits.target[rows.start : rows.stop]
        columns = {"label": coarse, "coarse_label": coarse, "fine_label": 2 * coarse + np.array(polarities)}
        table = arrow.table(
            {chosen.image: list(pictures), **{name: columns[name].tolist() for name in chosen.labels}}
        )  # fmt: skip
        path = folder / chosen.folder / f"{split}-00000-of-00001.parquet"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            parquet.write_table(table, partial)
            partial.replace(path)
    return folder


def _picture(digit: np.ndarray, draws: np.random.Generator) -> tuple[dict[str, bytes | None], int]:
    """A digit (8, 8) in [0, 1] as a PNG of SIDE pixels, light on dark or dark on light, and which of the two."""
    polarity = int(draws.integers(2))
    dark, light = draws.integers(0, 90, 3), draws.integers(165, 256, 3)
    ink, paper = (dark, light) if polarity else (light, dark)
    large = np.kron(digit, np.ones((SIDE // 8, SIDE // 8)))[..., None]
    pixels = np.clip(large * ink + (1 - large) * paper + draws.normal(0, 8, large.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    require("PIL.Image", "Pillow").fromarray(pixels).save(buffer, format="png")
    return {"bytes": buffer.getvalue(), "path": None}, polarity
