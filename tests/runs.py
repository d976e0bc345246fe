"""What two runs have in common."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

TIMING = ("images_per_second", "seconds")


def metrics(folder: Path, but: str = "nothing") -> list[dict[str, str]]:
    """The rows of metrics.csv, without speed and the columns that end in `but`."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMING and not k.endswith(but)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").glob("*.safetensors"))
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_run(one: Path, two: Path, *, but: str = "nothing") -> None:
    assert metrics(one, but) == metrics(two, but)
    first, second = weights(one), weights(two)
    assert first
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
