"""Where images lie: parquet files or images in a folder or on the Hub, the Arrow files of its cache, the digits.

`open_source` looks at a data set once, at footers and columns of labels alone: what its classes are, how many images
there are, and whether every label is right. `Split.read` then gives the encoded images of any rows, whether they are
to be held in memory or streamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..environment import require
from ..errors import DataError

IMAGE_COLUMNS = ("img", "image")
TEST_SPLITS = ("test", "validation")  # where none is named: the first that there is
IMAGE_FOLDER = "imagefolder"  # what `datasets` calls images that are files of their own
LAYOUT = "a class is a folder of its own, all on the same level (train/CLASS/NAME.png, test/CLASS/NAME.png)"
IMAGE_ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".tga",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
UNREAD_ENDINGS = (".heic", ".heif", ".avif", ".jxl")  # of images, which `datasets` passes over without a word
METADATA = "metadata.parquet"  # of such images, not a shard
DEFAULT_CONFIG = "default"  # what the Hub calls a configuration of a data set that has one
DataOrigin = Literal["hub", "folder", "built-in"]
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
ROWS_AT_ONCE = 64  # taken out of a row group in one piece
BUFFER_BYTES = 1 << 20  # read from a file in one piece
FILES_AT_ONCE = 16


class Encoded(NamedTuple):
    """One image before it is decoded."""

    image: bytes
    label: int
    row: int  # in the split
    where: str  # file and row in it


class RowGroup(NamedTuple):
    """A row group that is not empty."""

    shard: Shard
    number: int  # in the shard
    before: int  # rows of the shard before it


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of encoded images and their labels: parquet, or Arrow where there is no footer.

    Args:
        path: of the file; of the Hub by its hf:// address.
        size: in bytes.
        image, label: the names of its columns.
        groups: (rows, bytes as decompressed) of each row group.
        class_names: as the `datasets` library notes them, if it does.
        footer: of a parquet file.
        table: what is in memory is not read from `path`.
        apart: whether the images are files of their own, whose paths the table has instead of bytes.
    """

    path: str
    size: int
    image: str
    label: str
    groups: list[tuple[int, int]]
    class_names: tuple[str, ...] | None
    footer: Any = dataclasses.field(default=None, repr=False)
    table: Any = dataclasses.field(default=None, repr=False)
    apart: bool = False

    @property
    def name(self) -> str:
        """The name without folders."""
        return self.path.rsplit("/", 1)[-1]

    def rows(
        self, group: int, wanted: np.ndarray, mapped: dict[str, list[Any]]
    ) -> Iterator[tuple[int, Any, int, str | None]]:
        """(row in the group, encoded image or None, label, own file) of the `wanted` rows, in ascending order.

        Args:
            group: a row group.
            wanted: (n,), int64, rows of it.
            mapped: the batches of Arrow files, by path, that were mapped before; this one joins them.

        Raises:
            DataError: the file, or that of an image, cannot be read.
        """
        begin = 0
        with _damage(self.path, f"row group {group} of "):
            for part in self._batches(group, mapped):
                images, labels = _bytes_of(part[self.image]), part[self.label]
                paths = part[self.image].field("path") if self.apart else None
                first, last = np.searchsorted(wanted, [begin, begin + len(part)])
                for row in wanted[first:last].tolist():
                    image, label = images[row - begin].as_py(), labels[row - begin].as_py()
                    path = None if paths is None or image is not None else paths[row - begin].as_py()
                    yield row, image if path is None else _content(path), label, path
                begin += len(part)
                if begin > wanted[-1]:
                    return
            raise EOFError(f"it ends after {begin} rows")

    def _batches(self, group: int, mapped: dict[str, list[Any]]) -> Iterator[Any]:
        if self.footer is None:
            if self.path not in mapped:
                mapped[self.path] = self._table().to_batches()
            yield mapped[self.path][group]
            return
        parquet = require("pyarrow.parquet", "pyarrow")
        with _opened(self.path) as file:
            # Buffered, a row group is not held as a whole.
            source = parquet.ParquetFile(file, metadata=self.footer, buffer_size=BUFFER_BYTES)
            columns = [self.image, self.label]
            yield from source.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)

    def _table(self) -> Any:
        return _arrow_table(self.path) if self.table is None else self.table

    @functools.cached_property
    def label_range(self) -> tuple[int, int] | None:
        """The smallest and the largest label, from the footer if it notes them; None if the file is empty.

        Raises:
            DataError: as `labels`.
        """
        numbers = [number for number, (rows, _) in enumerate(self.groups) if rows]
        noted = [self.footer and _noted_range(self.footer.row_group(number), self.label) for number in numbers]
        ranges = [both for both in noted if both is not None]
        if len(ranges) < len(noted):  # nothing about labels, or that some are missing
            labels = self.labels()
            return int(labels.min()), int(labels.max())
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

    def labels(self) -> np.ndarray:
        """(rows,), int64: all labels of the file.

        Raises:
            DataError: the file cannot be read, or a label is missing.
        """
        with _damage(self.path):
            if self.footer is None:
                column = self._table()[self.label]
            else:
                with _opened(self.path) as file:
                    source = require("pyarrow.parquet", "pyarrow").ParquetFile(file, metadata=self.footer)
                    column = source.read([self.label]).column(0)
        return _as_labels(self.path, column)


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of several shards, numbered through from 0."""

    name: str
    shards: tuple[Shard, ...]

    @functools.cached_property
    def row_groups(self) -> list[RowGroup]:
        """Those that are not empty."""
        listed = []
        for shard in self.shards:
            before = 0
            for number, (rows, _) in enumerate(shard.groups):
                listed += [RowGroup(shard, number, before)] * bool(rows)
                before += rows
        return listed

    @functools.cached_property
    def group_rows(self) -> np.ndarray:
        """(g,), int64: the number of rows of each row group that is not empty."""
        return np.array([rows for shard in self.shards for rows, _ in shard.groups if rows], dtype=np.int64)

    @property
    def group_bytes(self) -> int:
        """The size of the largest row group as decompressed."""
        return max(size for shard in self.shards for _, size in shard.groups)

    @property
    def apart(self) -> bool:
        """Whether all images are files of their own, of which any one is read as quickly as its neighbour."""
        return all(shard.apart for shard in self.shards)

    def __len__(self) -> int:
        return int(self.group_rows.sum())

    def labels(self) -> np.ndarray:
        """(n,), int64: all labels, in the order of the rows. Raises DataError as `Shard.labels`."""
        return np.concatenate([shard.labels() for shard in self.shards])

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        """The images of `rows`, (n,), int64, in this order; quick where neighbours ascend within a row group, and where
        images are files of their own.

        Raises:
            DataError: a file cannot be read, or an image is missing.
        """
        starts = np.cumsum(self.group_rows) - self.group_rows
        group_of = np.searchsorted(starts, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(group_of) != 0) | (np.diff(rows) <= 0)) + 1
        mapped: dict[str, list[Any]] = {}
        for run in np.split(rows, breaks) if len(rows) else []:
            index = int(np.searchsorted(starts, run[0], side="right")) - 1
            shard, number, before = self.row_groups[index]
            for row, image, label, path in shard.rows(number, run - starts[index], mapped):
                where = path or f"{shard.path}, row {before + row}"
                if image is None:
                    raise DataError(f"{where}: the image is missing")
                yield Encoded(image, label, int(starts[index]) + row, where)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set whose labels are right: integers without gaps in [0, len(class_names)), of two classes at least."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    origin: DataOrigin | None = None

    @property
    def remote(self) -> bool:
        """Whether it is read from the Hub whenever it is read."""
        return any("://" in shard.path for shard in (*self.train.shards, *self.test.shards))


def open_source(
    name: str,
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
    train_split: str = "train",
    test_split: str | None = None,
    extra: bool = False,
    download: bool = False,
) -> Source:
    """Finds the shards of a data set and checks its labels; no image is read.

    Args:
        name: "digits", a folder of parquet files, or a data set on the Hub.
        config, image_column, label_column, train_split, test_split, extra: as in `load_data`.
        download: whether a data set on the Hub comes into the cache of the `datasets` library. It does so, too, if it
            is not stored there as parquet files or the Hub cannot be reached.

    Raises:
        DataError: it is not there, is damaged, or lacks a split, a column or images; a label is missing or wrong; an
            argument has no meaning for it.
    """
    trained = {train_split, *(["extra"] if extra else [])}
    tested = [split for split in TEST_SPLITS if split not in trained] if test_split is None else [test_split]
    wanted = [(train_split,), tested, *([("extra",)] if extra else [])]
    origin: DataOrigin
    if name == "digits":
        origin = "built-in"
        if extra:
            raise DataError("data='digits' has no extra images: set data_args.extra=false")
        for key, value, there in (
            ("config", config, None), ("image_column", image_column, "image"), ("label_column", label_column, "label"),
        ):  # fmt: skip
            if value not in (None, there):
                raise DataError(f"data='digits' is built in and has no {key} {value!r}: drop data_args.{key}")
        digits = _digits()
        splits = [digits[_named("data='digits'", digits, choices)] for choices in wanted]
    else:
        folder = local_folder(name)
        origin = "hub" if folder is None else "folder"
        if folder is None:
            found = (None if download else _hub_files(name, config, wanted)) or _cached_files(name, config, wanted)
        elif _holds_images(root := _root(folder, config)):
            found = _image_folder(root, wanted, label_column)
        else:
            found = [_parquet_files(folder, config, choices) for choices in wanted]
        splits = [
            Split(f"the {files.split} split of {name}", _shards(files, image_column, label_column)) for files in found
        ]
    train, test, *more = splits
    for split in splits:
        if not len(split):
            raise DataError(f"{split.name} is empty")
    train = Split(train.name, train.shards + tuple(shard for split in more for shard in split.shards))
    return Source(name, train, test, _checked_classes(train, test), origin)


def _checked_classes(train: Split, test: Split) -> tuple[str, ...]:
    """The names in the files, which agree, or numbers up to the largest training label; every label is checked."""
    ranges = [shard.label_range for shard in train.shards if shard.label_range is not None]
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    named = [shard for shard in (*train.shards, *test.shards) if shard.class_names]
    for shard in named[1:]:
        if shard.class_names != named[0].class_names:
            raise DataError(
                f"the class names in {shard.path} ({_some(shard.class_names)}) are not those in {named[0].path} "
                f"({_some(named[0].class_names)}), so a label would mean two classes: "
                "write all files with the same names"
            )
    if not named and highest >= len(train):
        raise DataError(
            f"{train.name} has the label {highest} among {len(train)} images, and labels must be integers without "
            "gaps: number the classes from 0, or name another column with data_args.label_column"
        )
    if not named:
        _check_gaps(train)
    names = (named[0].class_names if named else None) or tuple(str(label) for label in range(highest + 1))
    for shard in (*train.shards, *test.shards):
        if shard.label_range is None or 0 <= shard.label_range[0] <= shard.label_range[1] < len(names):
            continue
        labels = shard.labels()
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        raise DataError(
            f"{shard.path}, row {wrong[0]} has the label {labels[wrong[0]]}, "
            f"outside the {len(names)} classes 0 to {len(names) - 1}"
            + (f" ({len(wrong)} such rows)" if len(wrong) > 1 else "")
        )
    if lowest == highest:
        raise DataError(f"{train.name} holds a single class, {names[lowest]}: there is nothing to learn")
    return names


def _check_gaps(train: Split) -> None:
    """Raises DataError unless every label from 0 to the largest one is that of a training image."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        there = np.unique(np.concatenate(list(pool.map(lambda shard: np.unique(shard.labels()), train.shards))))
    missing = np.setdiff1d(np.arange(there.max() + 1), there)
    if len(missing):
        raise DataError(
            f"{train.name} has no label {_some(tuple(map(str, missing)))} below the largest, {there.max()}, and labels "
            "must be integers without gaps: number the classes from 0, or write their names into the files"
        )


def _some(names: tuple[str, ...] | None) -> str:
    names = names or ()
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------ finding the files


def local_folder(source: str) -> Path | None:
    """`source` as a folder, or None if it is a name on the Hub.

    Raises:
        DataError: it can be neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise DataError(
            f"data={source!r} is not a folder. Give a folder of parquet files or images, the name of a data set on "
            'the Hub such as uoft-cs/cifar10, or "digits".'
        )
    return None


class Files(NamedTuple):
    """Where a split lies."""

    split: str
    paths: Sequence[str]
    apart: bool = False  # see `Shard`


def _root(folder: Path, config: str | None) -> Path:
    """The subfolder of a configuration, or the folder itself if that is all there is.

    Raises:
        DataError: there are other subfolders of shards or images, but none for `config`.
    """
    if not config or (folder / config).is_dir():
        return folder / (config or "")
    others = sorted({parts[0] for path in _parquet_in(folder) if len(parts := path.relative_to(folder).parts) > 1})
    if config != DEFAULT_CONFIG and (others or _holds_images(folder)):
        holds = f"shards in {', '.join(others[:8])}" if others else "images"
        raise DataError(
            f"the folder {folder} has no subfolder {config!r}, it holds {holds}: change data_args.config, or drop it"
        )
    return folder


def _parquet_files(folder: Path, config: str | None, choices: Sequence[str]) -> Files:
    """The first of `choices` that is there. Raises DataError as `files_of`."""
    there = (name for name in choices if _shards_called(name, _root(folder, config)))
    name = next(there, choices[0])
    return Files(name, [str(path) for path in files_of(folder, config, name)])


def _shards_called(name: str, root: Path) -> list[Path]:
    """Of a split: the name itself, or with the number of a shard as the Hub writes it; train_unlabeled is another."""
    shard = re.compile(re.escape(name) + r"([-._ ]*\d+([-._ ]of[-._ ]\d+)?(-[0-9a-f]{16})?)?\.parquet")
    return [path for path in _parquet_in(root) if shard.fullmatch(path.name)]


def _parquet_in(root: Path) -> list[Path]:
    """All parquet files, in the order of their names."""
    return sorted(Path(where, name) for where, _, names in _walk(root) for name in names if name.endswith(".parquet"))


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk: through symbolic links, but neither in circles nor into hidden folders."""
    above |= {folder.resolve()}
    _, folders, names = next(os.walk(folder), (folder, [], []))
    folders = [n for n in folders if not n.startswith((".", "__")) and (folder / n).resolve() not in above]
    yield folder, folders, names
    for name in folders:
        yield from _walk(folder / name, above)


def files_of(folder: Path, config: str | None, name: str) -> list[Path]:
    """The parquet files of a split, in the order of their names.

    Raises:
        DataError: there is none, or they lie in several places.
    """
    root = _root(folder, config)
    files = _shards_called(name, root)
    if not files:
        there = [str(path.relative_to(folder)) for path in _parquet_in(folder)]
        holds = f"It holds {', '.join(there[:8])}." if there else "It holds neither parquet files nor images."
        raise DataError(
            f"the folder {folder} has no {name} split ({name}.parquet, {name}-00000-of-00001.parquet). {holds}"
        )
    parents = sorted({str(path.parent.relative_to(folder)) for path in files})
    if len(parents) > 1:
        raise DataError(
            f"the folder {folder} has {name} files in several places ({', '.join(parents)}): "
            "name one with data_args.config"
        )
    return files


def _hub_files(source: str, config: str | None, wanted: Sequence[Sequence[str]]) -> list[Files] | None:
    """The addresses of the parquet files of each split; None without the Hub, or if it holds other files."""
    datasets = require("datasets", "datasets")
    files: dict[Any, Any] = {}
    with contextlib.suppress(Exception):  # the Hub's client raises a dozen unrelated types; its cache may still help
        files = datasets.load_dataset_builder(source, config).config.data_files or {}
    if not files:
        return None
    names = [_named(source, files, choices) for choices in wanted]
    found = [Files(name, [str(path) for path in files[name]]) for name in names]
    return found if all(path.endswith(".parquet") for one in found for path in one.paths) else None


def _cached_files(source: str, config: str | None, wanted: Sequence[Sequence[str]]) -> list[Files]:
    """The Arrow files of each split in the cache of the `datasets` library, downloaded if they are not there yet."""
    datasets = require("datasets", "datasets")
    try:
        loaded = datasets.load_dataset(source, config, keep_in_memory=False)
    except Exception as error:  # as in `_hub_files`
        raise DataError(
            f"could not load {source!r} from the Hub: {type(error).__name__}: {error}\n"
            "Check the name and the network, give a local folder of parquet files or images with --data, or use "
            '"digits".'
        ) from error
    return _arrow_files(source, loaded, wanted)


def _arrow_files(source: str, loaded: Any, wanted: Sequence[Sequence[str]]) -> list[Files]:
    """Those of each split of a `datasets.DatasetDict`.

    Raises:
        DataError: there is no such split, or an image stands in two of them.
    """
    parts = {name: loaded[name] for name in (_named(source, loaded, choices) for choices in wanted)}
    apart = {name: part.builder_name == IMAGE_FOLDER for name, part in parts.items()}
    seen: dict[str, str] = {}
    for name, part in parts.items():
        if not apart[name]:
            continue
        for path in _paths_of(part):
            if seen.setdefault(path, name) != name:
                raise DataError(
                    f"{path} stands in two splits of {source}, {seen[path]} and {name}: the names of its folders speak "
                    "of both. Put the images into one folder for each split, as in train/CLASS/NAME.png, that no other "
                    "folder is called like"
                )
    return [
        Files(name, [file["filename"] for file in parts[name].cache_files], apart[name])
        for name in (_named(source, loaded, choices) for choices in wanted)
    ]


def _paths_of(part: Any) -> list[str]:
    """Of the images of a `datasets.Dataset` that are files of their own."""
    column = next(column for column, kind in part.features.items() if type(kind).__name__ == "Image")
    paths: list[str] = part.data.table[column].combine_chunks().field("path").drop_null().to_pylist()
    return paths


def _named(source: str, splits: Iterable[Any], choices: Sequence[str]) -> str:
    """The first of `choices` that is among `splits`."""
    there = [str(name) for name in splits]
    for name in choices:
        if name in there:
            return name
    raise DataError(f"{source} has no split {' or '.join(map(repr, choices))}; it has {', '.join(there)}")


def _holds_images(root: Path) -> bool:
    """Whether a folder holds images as files of their own, and no parquet shards."""
    found = False
    for _, _, names in _walk(root):
        if any(name.endswith(".parquet") and name != METADATA for name in names):
            return False
        found = found or any(name.lower().endswith(IMAGE_ENDINGS + UNREAD_ENDINGS) for name in names)
    return found


def _image_folder(root: Path, wanted: Sequence[Sequence[str]], label_column: str) -> list[Files]:
    """A folder of images as the `datasets` library reads it: SPLIT/CLASS/NAME.png, or metadata.csv with the labels.

    Where folders at the top have the names of the splits, nothing below them makes images those of another split, as
    a class "test_tube" otherwise would.

    Raises:
        DataError: there are no such splits or labels, or `datasets` cannot read it.
    """
    datasets = require("datasets", "datasets")
    tops = {entry.name.lower(): entry.name for entry in sorted(root.iterdir()) if entry.is_dir()}
    below = sorted(where / name for where, folders, _ in _walk(root) for name in folders)
    linked = [folder for folder in below if folder.is_symlink()]
    folders: dict[str, list[str]] = {}
    places: list[Path] = []
    for split in {name for choices in wanted for name in choices}:
        called = [split, *datasets.data_files.SPLIT_KEYWORDS.get(split, ())]
        if top := next((tops[name] for name in called if name in tops), None):
            inside = [link for link in linked if (root / top) in link.parents]  # a pattern does not follow them
            folders[split] = [f"{glob.escape(str(each.relative_to(root)))}/**" for each in (root / top, *inside)]
            places.append(root / top)
    if linked and not folders:
        raise DataError(
            f"{linked[0]} is a symbolic link, which is followed inside of folders with the names of the splits: put "
            f"them at the top of {root}, as in train/CLASS/NAME.png"
        )
    for place in sorted(places) or [root]:
        _check_endings(place)
    try:
        loaded = datasets.load_dataset(
            IMAGE_FOLDER, data_dir=glob.escape(str(root.resolve())), data_files=folders or None, keep_in_memory=False
        )
    except Exception as error:  # whatever a file of its builder raises
        reason = error.__cause__ or error  # what went wrong with which file; the outer one says that something did
        raise DataError(f"the images in {root} cannot be read: {type(reason).__name__}: {reason}") from error
    found = _arrow_files(f"the folder {root}", loaded, wanted)
    classes = {name: sorted({os.path.dirname(path) for path in _paths_of(part)}) for name, part in loaded.items()}
    for name, part in loaded.items():
        _check_labels(root, part, name, label_column, classes)
    return found


def _check_endings(folder: Path) -> None:
    """Raises DataError for an image in `folder` that would be left out, and with it perhaps a whole class."""
    unread = [
        where / name
        for where, _, names in _walk(folder)
        for name in names
        if name.lower().endswith(UNREAD_ENDINGS) and not name.startswith((".", "__"))
    ]
    if unread:
        more = f", and {len(unread) - 1} others like it" if len(unread) > 1 else ""
        raise DataError(
            f"{min(unread)}{more}: the datasets library leaves images of this kind out. Convert them to PNG or JPEG, "
            "or put them elsewhere"
        )


def _check_labels(root: Path, part: Any, split: str, label_column: str, places: dict[str, list[str]]) -> None:
    """Of one split of a folder of images.

    Args:
        root: the folder.
        part: the split, a `datasets.Dataset`.
        split: its name.
        label_column: of its labels.
        places: of all splits, the folders of the images.

    Raises:
        DataError: there are no labels, they are no integers, or folders of one name that are two classes are one.
    """
    table, top = part.data.table, root.resolve()
    if label_column not in table.column_names or table[label_column].null_count:
        there = [Path(place) for of_split in places.values() for place in of_split]
        names = {place.name for place in there}
        table_given = len(table.column_names) > 1
        if len(names) == 1 and not table_given and all(place.parent != top for place in there):
            raise DataError(f"the images in {root} are of a single class, {names.pop()}: there is nothing to learn")
        raise DataError(
            f"the images in {root} have no {label_column!r}: {LAYOUT}, or a column of metadata.csv, which is named "
            "with data_args.label_column"
        )
    kind = table.schema.field(label_column).type
    if not require("pyarrow", "pyarrow").types.is_integer(kind):
        raise DataError(
            f"the column {label_column!r} of metadata.csv in {root} holds {kind}, and labels must be integers without "
            "gaps: number the classes from 0"
        )
    if type(part.features[label_column]).__name__ != "ClassLabel":
        return  # of metadata.csv
    classes: dict[str, str] = {}
    for place in places[split]:
        if (other := classes.setdefault(os.path.basename(place), place)) != place:
            one, two = (os.path.relpath(folder, top) for folder in (other, place))
            raise DataError(
                f"{one} and {two} in {root} would be one class, {os.path.basename(place)}: {LAYOUT}, with its images "
                "in that folder and not in others inside of it"
            )


# ---------------------------------------------------------------------------------------------- looking at one file


def _shards(files: Files, image: str | None, label: str) -> tuple[Shard, ...]:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        shards = tuple(pool.map(lambda path: _scanned(path, image, label, files.apart), files.paths))
        list(pool.map(lambda shard: shard.label_range, shards))  # what has to be read for it is read now
    return shards


def _scanned(path: str, image_column: str | None, label_column: str, apart: bool = False) -> Shard:
    if path.endswith(".arrow"):
        with _damage(path):
            table, size = _arrow_table(path), Path(path).stat().st_size
        shard = _arrow_shard(path, size, table, image_column, label_column)
        if apart:  # the sizes of the images: those of the table depend on where they lie
            image = shard.image
            sized = [sum(map(_size_of, batch[image].field("path").to_pylist())) for batch in table.to_batches()]
            own = [(rows, size) for (rows, _), size in zip(shard.groups, sized, strict=True)]
            shard = dataclasses.replace(shard, apart=True, groups=own, size=sum(sized))
        return dataclasses.replace(shard, table=None)
    parquet = require("pyarrow.parquet", "pyarrow")
    with _damage(path), _opened(path) as file:
        held = parquet.ParquetFile(file)
        size, schema, footer = file.seek(0, 2), held.schema_arrow, held.metadata
    image, label = _pick_columns(path, schema, footer.num_rows, image_column, label_column)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    return Shard(path, size, image, label, sizes, _class_names_in(schema, label), footer)


def _noted_range(group: Any, label: str) -> tuple[int, int] | None:
    """The smallest and the largest label of a row group, if the footer notes them and that none is missing."""
    columns = (group.column(number) for number in range(group.num_columns))
    statistics = next((column.statistics for column in columns if column.path_in_schema == label), None)
    if statistics is None or not statistics.has_min_max or not statistics.has_null_count or statistics.null_count:
        return None
    return int(statistics.min), int(statistics.max)


def _arrow_shard(path: str, size: int, table: Any, image_column: str | None, label_column: str) -> Shard:
    image, label = _pick_columns(path, table.schema, len(table), image_column, label_column)
    groups = [(len(batch), batch.nbytes) for batch in table.to_batches()]
    return Shard(path, size, image, label, groups, _class_names_in(table.schema, label), table=table)


def _pick_columns(where: str, schema: Any, rows: int, image: str | None, label: str) -> tuple[str, str]:
    """The names of the image and of the label column, whose types are right.

    Raises:
        DataError: one of them is not there or holds something else; `where` says in which file.
    """
    images = [image] if image else list(IMAGE_COLUMNS)
    has = f"It has {', '.join(schema.names)}."
    image = next((name for name in images if name in schema.names), None)
    if image is None:
        raise DataError(f"{where} has no column {' or '.join(map(repr, images))}. {has} Set data_args.image_column.")
    if label not in schema.names:
        raise DataError(f"{where} has no column {label!r}. {has} Set data_args.label_column.")
    types = require("pyarrow", "pyarrow").types
    kind, holds = schema.field(label).type, schema.field(image).type
    if rows and not types.is_integer(kind):
        raise DataError(f"{where}: the labels must be integers without gaps, and the column holds {kind}")
    if types.is_struct(holds) and holds.get_field_index("bytes") >= 0:
        holds = holds.field("bytes").type
    if rows and not (types.is_binary(holds) or types.is_large_binary(holds)):
        raise DataError(f"{where}: the images must be stored as bytes in the parquet files, not as {holds}")
    return image, label


def _as_labels(where: str, column: Any) -> np.ndarray:
    """(n,), int64, of a column of labels. Raises DataError if one is missing."""
    if column.null_count:
        raise DataError(f"{where}: the labels must be integers without gaps, and {column.null_count} are missing")
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _class_names_in(schema: Any, label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library leaves in a file's schema, if they are there."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(str(name) for name in names)
    return None


def _bytes_of(images: Any) -> Any:
    """The encoded files of a pyarrow array of images, which are bytes or hold bytes beside a path."""
    return images.field("bytes") if require("pyarrow", "pyarrow").types.is_struct(images.type) else images


def _opened(path: str) -> Any:
    """A file of a folder, or of the Hub by its hf:// address."""
    if "://" not in path:
        return Path(path).open("rb")
    return require("fsspec", "fsspec").open(path, "rb").open()


def _content(path: str) -> bytes:
    """Of an image that is a file of its own.

    Raises:
        DataError: it is not there any more, or cannot be read.
    """
    try:
        with _opened(path) as file:
            content: bytes = file.read()
            return content
    except Exception as error:  # on the disk, or in what reads archives
        raise DataError(f"{path}: the image cannot be read: {type(error).__name__}: {error}") from error


def _size_of(path: str) -> int:
    """In bytes; 0 of what is no file."""
    with contextlib.suppress(OSError):
        return Path(path).stat().st_size
    return 0


def _arrow_table(path: str) -> Any:
    """Mapped into memory, not read."""
    pyarrow = require("pyarrow", "pyarrow")
    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()


@contextlib.contextmanager
def _damage(path: str, part: str = "") -> Iterator[None]:
    """Turns whatever goes wrong with a file, in pyarrow, on the disk or in the Hub's client, into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{part}{path} is truncated, damaged or not parquet: fetch it again ({error})") from error


@functools.cache
def _digits() -> dict[str, Split]:
    """1,797 real handwritten digits of 8 x 8 pixels; 360 of them, in equal shares of the classes, are the test set."""
    datasets = require("sklearn.datasets", "scikit-learn")
    selection = require("sklearn.model_selection", "scikit-learn")
    pyarrow = require("pyarrow", "pyarrow")
    digits = datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    splits = selection.train_test_split(np.arange(len(pixels)), test_size=360, stratify=digits.target, random_state=0)
    found = {}
    for name, rows in zip(("train", "test"), splits, strict=True):
        images = [b"P5 8 8 255\n" + image.tobytes() for image in pixels[rows]]  # portable greymaps
        table = pyarrow.table({"image": images, "label": digits.target[rows]})
        found[name] = Split(name, (_arrow_shard(f"digits {name}", 0, table, None, "label"),))
    return found
