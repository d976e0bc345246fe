"""The generated sections of a card, in Markdown: what it is, how to load it, how it was trained, whom to cite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoint import module_to_import
from ..checkpoint.card import snippets
from .findings import limits, low_rank, robustness
from .markup import code, escaped, listing, table
from .metadata import Dataset, dataset_of
from .record import RunRecord


def sections_of(
    record: RunRecord, repo_id: str, files: Mapping[str, str], *, license: str | None, dataset: str | None
) -> dict[str, str]:
    """Name to Markdown, in the order of the card.

    Args:
        record: the run.
        repo_id: USER/NAME, for the snippets.
        files: names of the files beside the card, and what each is.
        license: of the weights, as the front matter names it; None if it names none.
        dataset: the name on the Hub of the data set that the run had a copy of.
    """
    data = dataset_of(record.summary["data"]["source"], dataset)
    writers: dict[str, Callable[[], str]] = {
        "about": lambda: _about(record, repo_id, data),
        "loading": lambda: _loading(record, repo_id),
        "low-rank": lambda: low_rank(record),
        "robustness": lambda: robustness(record, dataset),
        "limits": lambda: limits(record, data),
        "training": lambda: _training(record, data),
        "files": lambda: _files(files),
        "citation": lambda: _citation(license),
    }
    return {name: write() for name, write in writers.items()}


# ------------------------------------------------------------------------------------------------ what it is, loading


def _about(record: RunRecord, repo_id: str, data: Dataset) -> str:
    network = record.network
    cfg = network.get("pretrained_cfg", {})
    size = " x ".join(map(str, cfg.get("input_size", record.summary["data"].get("image_size", ()))))
    lines = [
        f"# {escaped(repo_id.split('/')[-1])}",
        "",
        f"{code(record.architecture)} for the {network.get('num_classes')} classes of "
        f"{escaped(data.name)}, trained on images of {size} (channels x height x width).",
    ]
    if record.lowrank:
        layers = [
            f"{code(layer)} (target rank {size['rank']} of {size['num_features']:,})"
            for layer, size in record.lowrank["layers"].items()
        ]
        lines[-1] += (
            f" While it was trained, virtual low-rank branches of timm_lowrank pulled the activations at "
            f"{listing(layers)} into an affine subspace of few dimensions. They are gone when it predicts: this is a "
            "plain network, as fast as one trained without them."
        )
    else:
        lines[-1] += " It was trained plainly, without low-rank branches, to be compared with networks that had them."
    clean, plain = record.clean, record.plain_clean
    lines += ["", f"Accuracy on {clean.of:,} clean test images: **{clean.shown}**"]
    lines[-1] += f"; of its plain twin, trained alike without branches: {plain.shown}." if plain else "."
    lines[-1] += " In brackets the 95 % interval."
    return "\n".join(lines)


def _loading(record: RunRecord, repo_id: str) -> str:
    architecture = record.architecture
    package, cfg = module_to_import(architecture), record.network.get("pretrained_cfg", {})
    needs = (
        f"{code(architecture)} is an architecture of {code(package)}, which has to be installed and imported first."
        if package
        else f"{code(architecture)} is timm's own: timm or transformers alone load it."
    )
    norm = (
        f"Its input are pixels between 0 and 1 minus {_numbers(cfg.get('mean'))}, divided by "
        f"{_numbers(cfg.get('std'))} (a number for each channel)."
    )
    return f"## Loading\n\n{needs} {norm}\n\n{snippets(repo_id, architecture)}"


# ---------------------------------------------------------------------------------------------- training and citation


def _training(record: RunRecord, data: Dataset) -> str:
    summary, recipe = record.summary, record.recipe
    facts: dict[str, Any] = {
        "data": f"{data.name}, {summary['data']['train_images']:,} training images",
        "data fingerprint": summary["data"].get("fingerprint"),
        "recipe": recipe.get("name"),
    }
    facts |= {key: recipe[key] for key in _RECIPE if recipe.get(key) not in (None, [], {}, False, 0)}
    if record.lowrank:
        facts |= {f"lowrank.{key}": value for key, value in record.lowrank["config"].items() if value is not None}
    facts |= {
        "weights": "of the last step" if summary.get("weights") == "last" else "averaged over the training",
        "seed": summary.get("seed"),
        "took": f"{summary.get('seconds')} seconds on {summary.get('device')}",
        "versions": ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items()),
        "sha256 of model.safetensors": record.sha256,
    }
    rows = [[code(name), code(_shown(value))] for name, value in facts.items() if value not in (None, "")]
    where = "The whole recipe is in `recipe.yaml`, its outcome in `summary.json`."
    return f"## Training\n\n{where}\n\n{table(['', ''], rows)}"


_RECIPE = (
    "model", "model_args", "data_args", "epochs", "pretrain_epochs", "ramp_epochs", "batch_size", "learning_rate",
    "momentum", "weight_decay", "nesterov", "schedule", "milestones", "warmup_epochs", "augment", "precision",
    "ema_decay", "gradient_accumulation", "clip_norm",
)  # fmt: skip


def _shown(value: Any) -> str:
    """{layer3: 20, pre_logits: 10} for a mapping; everything else as it is."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(entry)}' for key, entry in value.items())}}}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else str(value)


def _numbers(values: Any) -> str:
    return code(", ".join(map(str, values))) if isinstance(values, list | tuple) and values else "an unknown number"


def _files(files: Mapping[str, str]) -> str:
    return "## Files\n\n" + table(["file", ""], [[code(name), escaped(what)] for name, what in sorted(files.items())])


def _citation(license: str | None) -> str:
    under = f"Weights under {escaped(license)}." if license else "The owner has not named a licence for the weights."
    return f"""## Citation and licence

```bibtex
@article{{sanyal2020robustness,
  title  = {{Robustness via Deep Low-Rank Representations}},
  author = {{Sanyal, Amartya and Kanade, Varun and Torr, Philip H. S. and Dokania, Puneet K.}},
  year   = {{2020}},
}}
```

{under} Trained with timm_lowrank, an independent implementation of the paper (Apache-2.0)."""
