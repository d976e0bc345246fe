"""scikit-learn's digits in parquet shards, in the layout of the Hub."""

import io

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

DIGITS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
TARGET = load_digits().target


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def encoded(images):
    return [{"bytes": png(pixels), "path": None} for pixels in images]


def write(path, rows, group=25, statistics=True, **columns):
    """A shard of the digits `rows` with row groups of `group` rows; a column given as None is left out."""
    columns = {"image": encoded(DIGITS[list(rows)]), "label": TARGET[list(rows)].tolist(), **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({name: column for name, column in columns.items() if column is not None})
    parquet.write_table(table, path, row_group_size=group, write_statistics=statistics)
    return path


def write_shards(folder, test="test"):
    """230 training images in three shards and ten row groups, and 55 test images in one shard."""
    for number, rows in enumerate((range(90), range(90, 180), range(180, 230))):
        write(folder / f"train-{number:05d}-of-00003.parquet", rows)
    write(folder / f"{test}-00000-of-00001.parquet", range(230, 285), group=20)
    return folder
