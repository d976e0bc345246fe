"""What lies in parquet shards, told by their footers alone, and reading chosen rows of them one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, StreamError
from .sources import (
    Columns,
    bytes_of,
    check_types,
    class_names_in,
    damaged,
    files_of,
    hub_errors,
    local_folder,
    pick_columns,
    require,
)

ROWS_AT_ONCE = 64  # taken out of a row group in one piece
BUFFER_BYTES = 1 << 20  # read from a file in one piece
FOOTERS_AT_ONCE = 16


class Encoded(NamedTuple):
    """One image before it is decoded."""

    image: bytes
    label: int
    row: int  # in the split
    where: str  # file and row in it


@dataclasses.dataclass(frozen=True)
class Shard:
    """A parquet file: where it is, its size in bytes, its columns of images and labels, its footer."""

    path: str
    size: int
    image: str
    label: str
    footer: Any = dataclasses.field(repr=False)
    class_names: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The name without folders."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(rows, bytes as decompressed) of each row group."""
        found = (self.footer.row_group(number) for number in range(self.footer.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in found]

    def label_range(self, group: int) -> tuple[int, int] | None:
        """The smallest and the largest label of a row group, if the file notes them."""
        held = self.footer.row_group(group)
        columns = (held.column(number) for number in range(held.num_columns))
        statistics = next((c.statistics for c in columns if c.path_in_schema == self.label), None)
        if statistics is None or not statistics.has_min_max:
            return None
        return int(statistics.min), int(statistics.max)

    def rows(self, group: int, wanted: np.ndarray) -> Iterator[tuple[int, Any, Any]]:
        """(row in the group, image, label), the two as Python values, of the `wanted` rows in ascending order.

        Raises:
            DataError: the file cannot be read.
        """
        parquet = require("pyarrow.parquet", "pyarrow")
        begin = 0
        try:
            with _opened(self.path) as file:
                # Buffered, a row group is not held as a whole.
                source = parquet.ParquetFile(file, metadata=self.footer, buffer_size=BUFFER_BYTES)
                columns = [self.image, self.label]
                for part in source.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    images, labels = bytes_of(part[self.image]), part[self.label]
                    first, last = np.searchsorted(wanted, [begin, begin + len(part)])
                    for row in wanted[first:last].tolist():
                        yield row, images[row - begin].as_py(), labels[row - begin].as_py()
                    begin += len(part)
                    if begin > wanted[-1]:
                        return
        except DataError:
            raise
        except Exception as error:  # of pyarrow, the disk, or a dozen unrelated types of the Hub's client
            raise DataError(f"row group {group} of " + damaged(self.path, error)) from error
        raise DataError(damaged(self.path, EOFError(f"row group {group} ends after {begin} rows")))

    def labels(self) -> np.ndarray:
        """(rows,), int64: all labels of the file.

        Raises:
            DataError: the file cannot be read, or a label is missing.
        """
        parquet = require("pyarrow.parquet", "pyarrow")
        try:
            with _opened(self.path) as file:
                column = parquet.ParquetFile(file, metadata=self.footer).read([self.label]).column(0)
        except Exception as error:  # as in `rows`
            raise DataError(damaged(self.path, error)) from error
        if column.null_count:
            raise DataError(f"{self.path}: {column.null_count} labels are missing")
        return np.asarray(column.to_numpy(), dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class ShardSplit:
    """The rows of several shards, numbered through from 0."""

    name: str
    shards: tuple[Shard, ...]

    @functools.cached_property
    def places(self) -> list[tuple[Shard, int, int]]:
        """Of each row group that is not empty: its shard, its number in it, and the rows before it in that shard."""
        found = []
        for shard in self.shards:
            before = 0
            for number, (rows, _) in enumerate(shard.groups):
                found += [(shard, number, before)] * bool(rows)
                before += rows
        return found

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """(g,), int64: the number of rows of each row group that is not empty."""
        return np.array([rows for shard in self.shards for rows, _ in shard.groups if rows], dtype=np.int64)

    @property
    def group_bytes(self) -> int:
        """The size of the largest row group as decompressed."""
        return max(size for shard in self.shards for _, size in shard.groups)

    def __len__(self) -> int:
        return int(self.groups.sum())

    def labels(self) -> np.ndarray:
        """(n,), int64: all labels, in the order of the rows. Raises DataError as `Shard.labels`."""
        return np.concatenate([shard.labels() for shard in self.shards])

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        """The images of `rows`, (n,), int64, in this order; quick where neighbours ascend within a row group.

        Raises:
            DataError: a file cannot be read, or an image or a label is missing.
        """
        starts = np.cumsum(self.groups) - self.groups
        found = np.searchsorted(starts, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(found) != 0) | (np.diff(rows) <= 0)) + 1
        for run in np.split(rows, breaks) if len(rows) else []:
            number = int(np.searchsorted(starts, run[0], side="right")) - 1
            shard, group, before = self.places[number]
            for row, image, label in shard.rows(group, run - starts[number]):
                where = f"{shard.path}, row {before + row}"
                if image is None or label is None:
                    raise DataError(f"{where}: the {'image' if image is None else 'label'} is missing")
                yield Encoded(image, label, int(starts[number]) + row, where)


def find_split(source: str, config: str | None, name: str, columns: Columns) -> ShardSplit:
    """A split of a folder or of a data set on the Hub, which must be stored there as parquet files.

    Raises:
        DataError: if it is not there, is damaged, is empty, or lacks a column.
    """
    folder = local_folder(source)
    found: Sequence[str | Path] = _hub_files(source, config, name) if folder is None else files_of(folder, config, name)
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        shards = tuple(pool.map(lambda path: _scanned(str(path), columns), found))
    split = ShardSplit(f"the {name} split of {source}", shards)
    if not len(split):
        raise DataError(f"{split.name} is empty")
    return split


def _hub_files(source: str, config: str | None, name: str) -> list[str]:
    datasets = require("datasets", "datasets")
    try:
        with hub_errors(source):
            files = datasets.load_dataset_builder(source, config).config.data_files or {}
    except DataError as error:
        raise StreamError(str(error)) from error
    if name not in files:
        held = ", ".join(map(str, files)) or "none"
        raise StreamError(f"{source} has no files of a split {name!r}; it has those of {held}")
    other = [path for path in files[name] if not str(path).endswith(".parquet")]
    if other:
        raise StreamError(f"{source} is not stored as parquet files ({other[0]}): it cannot be streamed")
    return [str(path) for path in files[name]]


def _scanned(path: str, columns: Columns) -> Shard:
    parquet = require("pyarrow.parquet", "pyarrow")
    try:
        with _opened(path) as file:
            held = parquet.ParquetFile(file)
            size, schema, footer = file.seek(0, 2), held.schema_arrow, held.metadata
    except Exception as error:  # as in `Shard.rows`
        raise (StreamError if "://" in path else DataError)(damaged(path, error)) from error
    image, label = pick_columns(path, schema.names, columns)
    if footer.num_rows:
        check_types(path, schema.field(image).type, schema.field(label).type)
    return Shard(path, size, image, label, footer, class_names_in(schema.metadata or {}, label))


def _opened(path: str) -> Any:
    """A file of a folder, or of the Hub by its hf:// address."""
    if "://" not in path:
        return Path(path).open("rb")
    return require("fsspec", "fsspec").open(path, "rb").open()
