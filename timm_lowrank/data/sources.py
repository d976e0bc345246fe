"""Where images come from: scikit-learn's digits, a folder of parquet files, or a data set on the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import DataError, TrainingError

IMAGE_COLUMNS = ("img", "image")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split before its images are decoded.

    `images` is either an array of pixels (n, c, h, w), uint8, or a pyarrow array of n encoded files;
    `labels` is (n,), int64; `class_names` is None where the source does not say.
    """

    name: str
    images: Any
    labels: np.ndarray
    class_names: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read; `image` None takes "img" or "image"."""

    image: str | None
    label: str


def read_splits(source: str, config: str | None, columns: Columns, names: Mapping[str, str]) -> dict[str, Split]:
    """Whole splits of `source`, in memory.

    Args:
        source: "digits", a folder of parquet files, or a data set on the Hub.
        config: the configuration of a Hub data set, or the subfolder of a folder that holds several.
        columns: which columns to read.
        names: "train", "test" and so on -> what the source calls that split.

    Raises:
        DataError: if the source is not there, is damaged, or lacks a split or a column.
    """
    if source == "digits":
        return _digits()
    folder = local_folder(source)
    if folder is not None:
        return {use: _from_folder(folder, config, name, columns) for use, name in names.items()}
    found = _from_hub(source, config, list(names.values()), columns)
    return {use: found[name] for use, name in names.items()}


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
            f"data={source!r} is not a folder. Give a folder of parquet files, the name of a data set on the Hub "
            'such as uoft-cs/cifar10, or "digits".'
        )
    return None


def require(module: str, package: str) -> ModuleType:
    """Imports an optional dependency, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainingError(f"{package} is needed here: pip install 'timm_lowrank[train]' ({error})") from error


def _digits() -> dict[str, Split]:
    """1,797 real handwritten digits of 8 x 8 pixels; 360 of them, in equal shares of the classes, are the test set."""
    datasets = require("sklearn.datasets", "scikit-learn")
    selection = require("sklearn.model_selection", "scikit-learn")
    digits = datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = selection.train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    names = tuple(str(name) for name in digits.target_names)
    return {
        "train": Split("train", pixels[train], labels[train], names),
        "test": Split("test", pixels[test], labels[test], names),
    }


def files_of(folder: Path, config: str | None, name: str) -> list[Path]:
    """The parquet files of a split, in the order of their names.

    Raises:
        DataError: there is none, or they lie in several places.
    """
    root = folder / config if config and (folder / config).is_dir() else folder
    files = sorted(root.rglob(f"{name}*.parquet"))
    if not files:
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
        found = f"It holds {', '.join(there[:8])}." if there else "It holds no parquet file at all."
        raise DataError(f"the folder {folder} has no {name} split ({name}*.parquet). {found}")
    parents = sorted({str(path.parent.relative_to(folder)) for path in files})
    if len(parents) > 1:
        raise DataError(
            f"the folder {folder} has {name} files in several places ({', '.join(parents)}): "
            "name one with data_args.config"
        )
    return files


def _from_folder(folder: Path, config: str | None, name: str, columns: Columns) -> Split:
    files = files_of(folder, config, name)
    pyarrow = require("pyarrow", "pyarrow")
    parts = [_read_parquet(path, columns) for path in files]
    try:
        table = pyarrow.concat_tables([part for part, _ in parts])
    except pyarrow.ArrowException as error:
        raise DataError(f"the {name} files of {folder} do not fit together: {error}") from error
    return _split(f"the {name} split of {folder}", table, parts[0][1])


def _read_parquet(path: Path, columns: Columns) -> tuple[Any, tuple[str, ...] | None]:
    pyarrow = require("pyarrow", "pyarrow")
    parquet = require("pyarrow.parquet", "pyarrow")
    try:
        schema = parquet.read_schema(path)
        image, label = pick_columns(str(path), schema.names, columns)
        table = parquet.read_table(path, columns=[image, label]).select([image, label])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(damaged(path, error)) from error
    return table, class_names_in(schema.metadata or {}, label)


def damaged(path: str | Path, error: Exception) -> str:
    """What to say of a parquet file that cannot be read."""
    return f"{path} is truncated, damaged or not parquet: fetch it again ({error})"


def class_names_in(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library leaves in a parquet file's schema, if they are there."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(str(name) for name in names)
    return None


def _from_hub(source: str, config: str | None, names: Sequence[str], columns: Columns) -> dict[str, Split]:
    datasets = require("datasets", "datasets")
    with hub_errors(source):
        loaded = datasets.load_dataset(source, config)
    missing = [name for name in names if name not in loaded]
    if missing:
        raise DataError(f"{source} has no split {missing[0]!r}; it has {', '.join(loaded)}")
    splits = {}
    for name in names:
        part = loaded[name]
        image, label = pick_columns(source, part.column_names, columns)
        class_names = getattr(part.features[label], "names", None)
        # The encoded bytes, not decoded images: one decoder serves folders and the Hub.
        part = part.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        table = part.with_format("arrow")[:].select([image, label])
        splits[name] = _split(f"the {name} split of {source}", table, tuple(class_names) if class_names else None)
    return splits


@contextlib.contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turns whatever goes wrong on the way to the Hub into one DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the Hub's client raises a dozen unrelated types; every one of them ends here
        raise DataError(
            f"could not load {source!r} from the Hub: {type(error).__name__}: {error}\n"
            'Check the name and the network, give a local folder of parquet files with --data, or use "digits".'
        ) from error


def pick_columns(where: str, names: Sequence[str], columns: Columns) -> tuple[str, str]:
    """The names of the image and of the label column among `names`.

    Raises:
        DataError: one of them is not there; `where` says in which file.
    """
    images = [columns.image] if columns.image else list(IMAGE_COLUMNS)
    image = next((name for name in images if name in names), None)
    has = f"It has {', '.join(names)}."
    if image is None:
        raise DataError(f"{where} has no column {' or '.join(map(repr, images))}. {has} Set data_args.image_column.")
    if columns.label not in names:
        raise DataError(f"{where} has no column {columns.label!r}. {has} Set data_args.label_column.")
    return image, columns.label


def check_types(name: str, image: Any, label: Any) -> None:
    """Raises DataError unless `image` and `label`, types of pyarrow, are those of encoded images and of labels."""
    types = require("pyarrow", "pyarrow").types
    if not types.is_integer(label):
        raise DataError(f"{name}: the labels must be integers without gaps, and the column holds {label}")
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (types.is_binary(image) or types.is_large_binary(image)):
        raise DataError(f"{name}: the images must be stored as bytes in the parquet files, not as {image}")


def bytes_of(images: Any) -> Any:
    """The encoded files of a pyarrow array of images, which are bytes or hold bytes beside a path."""
    return images.field("bytes") if require("pyarrow", "pyarrow").types.is_struct(images.type) else images


def _split(name: str, table: Any, class_names: tuple[str, ...] | None) -> Split:
    images, labels = (column.combine_chunks() for column in table.columns)
    check_types(name, images.type, labels.type)
    if labels.null_count:
        raise DataError(f"{name}: the labels must be integers without gaps, and {labels.null_count} are missing")
    images = bytes_of(images)
    if images.null_count:
        raise DataError(f"{name}: the images must be stored as bytes in the parquet files, and some are missing")
    return Split(name, images, labels.to_numpy(zero_copy_only=False).astype(np.int64), class_names)
