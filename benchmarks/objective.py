"""Which form of the loss works: a grid of forms, weights and seeds, one row of a JSON file for each run.

    python benchmarks/objective.py small --data DATA --jobs 2
    python benchmarks/objective.py full --data DATA --only N-LR "1/0.05 head 1" --seeds 0 1 2
    python benchmarks/objective.py coarse --data DATA --only N-LR "1-LR 1 head 1"
    python benchmarks/objective.py vit --data DATA --only N-LR "rank 48, 1/0.05 head 1"
    python benchmarks/objective.py small --list

Every run is judged beside the plain twin of its seed by clean accuracy, the accuracy of a linear classifier on the
leading directions of a layer (the package's one way of measuring it), the share of the variance that they hold, the
effective rank and the accuracy under pixel noise. Rows that the file has already are not computed again, and each is
written as soon as it is there, so a grid can be stopped and taken up at any time. `--markdown` prints the table.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from timm_lowrank.core.config import PRE_LOGITS
from timm_lowrank.core.spectrum import singular_energies
from timm_lowrank.core.views import View
from timm_lowrank.data import ImageData, load_data
from timm_lowrank.environment import device_name, versions
from timm_lowrank.evaluation import PixelModel
from timm_lowrank.evaluation.maxmargin import linear_accuracy
from timm_lowrank.evaluation.noise import pixel_noise
from timm_lowrank.evaluation.pixels import classified_right
from timm_lowrank.evaluation.representations import activations
from timm_lowrank.files import write_whole
from timm_lowrank.records import decode, encode
from timm_lowrank.suites.networks import load_network
from timm_lowrank.text import markdown_table
from timm_lowrank.training.experiment import train
from timm_lowrank.training.recipe import Recipe, load_recipe

DIRECTIONS = (5, 10, 20)
IMAGES = 5000  # of each split, for representations and noise
SCALES = {  # recipe, and the layer inside
    "digits": ("digits", "layer3"),
    "small": ("cifar10-small", "layer3"),
    "full": ("cifar10-fast", "layer3"),
    "coarse": ("cifar100-coarse-fast", "layer3"),
    "vit": ("cifar10-vit-tiny-fast", "blocks.4"),
}
SHORTENED = {  # half an hour a run on one core
    "coarse": ("epochs=10", "pretrain_epochs=2"),
    "vit": (
        "model_args={img_size: 32, patch_size: 8, depth: 6}", "epochs=10", "pretrain_epochs=2", "warmup_epochs=1"
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the grid


def lowrank(
    inside: float,
    classifier: float,
    *,
    head: float = 0.0,
    classifier_head: float = 0.0,
    rank: int = 20,
    norm: float = 0.0,
    **fields: Any,
) -> dict[str, Any]:
    """The `lowrank` key of a recipe with weights of its own at each of the two layers; `LAYER` is the one inside."""
    return {
        "branches": {
            "LAYER": {"rank": rank, "reconstruction_weight": inside, "norm_weight": norm, "head_weight": head},
            **before_classifier(classifier, classifier_head, norm)["branches"],
        },
        **fields,
    }


def before_classifier(weight: float, head: float = 0.0, norm: float = 0.0) -> dict[str, Any]:
    """The same with one branch, before the classifier."""
    one = {"rank": 50, "reconstruction_weight": weight, "norm_weight": norm, "head_weight": head}
    return {"branches": {PRE_LOGITS: one}}


PLAIN = {**lowrank(0, 0), "enabled": False}

FORMS: dict[str, dict[str, Any]] = {
    "N-LR": {"lowrank": PLAIN},
    "5/0.3": {"lowrank": lowrank(5, 0.3)},
    "5/0.3 head 0.3": {"lowrank": lowrank(5, 0.3, head=0.3)},
    "5/0.3 head 1": {"lowrank": lowrank(5, 0.3, head=1)},
    "5/0.05 head 0.3": {"lowrank": lowrank(5, 0.05, head=0.3)},
    "1/0.05 head 0.3": {"lowrank": lowrank(1, 0.05, head=0.3)},
    "1/0.05 head 1": {"lowrank": lowrank(1, 0.05, head=1)},
    "5/0.05 head 1": {"lowrank": lowrank(5, 0.05, head=1)},
    "0.5/0.05 head 0.5": {"lowrank": lowrank(0.5, 0.05, head=0.5)},
    "0.5/0.05 head 1": {"lowrank": lowrank(0.5, 0.05, head=1)},
    "1/0.05 head 1 cooldown 4": {"lowrank": lowrank(1, 0.05, head=1), "cooldown_epochs": 4},
    "5/0.3 head 0.3 cooldown 4": {"lowrank": lowrank(5, 0.3, head=0.3), "cooldown_epochs": 4},
    "0/0 head 0.3": {"lowrank": lowrank(0, 0, head=0.3)},
    "0/0 head 1": {"lowrank": lowrank(0, 0, head=1)},
    "20/0.3 head 0.3": {"lowrank": lowrank(20, 0.3, head=0.3)},
    "20/0.3 head 1": {"lowrank": lowrank(20, 0.3, head=1)},
    "unit 0.1/0.02 head 0.3": {"lowrank": lowrank(0.1, 0.02, head=0.3, scale="unit")},
    "unit 0.3/0.05 head 0.3": {"lowrank": lowrank(0.3, 0.05, head=0.3, scale="unit")},
    "unit 1/0.1 head 0.3": {"lowrank": lowrank(1, 0.1, head=0.3, scale="unit")},
    "unit 1/0.1 head 1": {"lowrank": lowrank(1, 0.1, head=1, scale="unit")},
    "unit 3/0.3 head 1": {"lowrank": lowrank(3, 0.3, head=1, scale="unit")},
    "paper .003/.001/.003": {"lowrank": lowrank(0.003, 0.001, norm=0.003, scale="paper", warmup_updates=0)},
    "paper .003/.001/.003 head 0.3": {
        "lowrank": lowrank(0.003, 0.001, norm=0.003, head=0.3, scale="paper", warmup_updates=0)
    },
    # Before the classifier.
    "1-LR 0.05": {"lowrank": before_classifier(0.05)},
    "1-LR 0.05 head 1": {"lowrank": before_classifier(0.05, 1)},
    "1-LR 0.3 head 0.3": {"lowrank": before_classifier(0.3, 0.3)},
    "1-LR 1": {"lowrank": before_classifier(1)},
    "1-LR 1 head 1": {"lowrank": before_classifier(1, 1)},
    "standard, classifier head 0.3": {"lowrank": lowrank(1, 0.05, head=1, classifier_head=0.3)},
    "standard, classifier head 1": {"lowrank": lowrank(1, 0.05, head=1, classifier_head=1)},
    "standard, classifier 0.3 head 0.3": {"lowrank": lowrank(1, 0.3, head=1, classifier_head=0.3)},
    "standard, classifier 1 head 1": {"lowrank": lowrank(1, 1, head=1, classifier_head=1)},
    # Of tokens of 192 channels a quarter, as the presets take it.
    "rank 48, 1/0.05 head 1": {"lowrank": lowrank(1, 0.05, head=1, rank=48)},
    "rank 48, 1/0.05 head 1, classifier head 1": {"lowrank": lowrank(1, 0.05, head=1, classifier_head=1, rank=48)},
    # What else can be chosen, around the default.
    "standard, rank 5": {"lowrank": lowrank(1, 0.05, head=1, rank=5)},
    "standard, rank 10": {"lowrank": lowrank(1, 0.05, head=1, rank=10)},
    "standard, rank 50": {"lowrank": lowrank(1, 0.05, head=1, rank=50)},
    "standard, rank 100": {"lowrank": lowrank(1, 0.05, head=1, rank=100)},
    "standard, head on 10 alone": {"lowrank": lowrank(1, 0.05, head=1, head_sizes=[10])},
    "standard, head on 2 to 50": {"lowrank": lowrank(1, 0.05, head=1, rank=50, head_sizes=[2, 5, 10, 20, 50])},
    "standard, L_n 0.003": {"lowrank": lowrank(1, 0.05, head=1, norm=0.003)},
    "standard, no warm-up": {"lowrank": lowrank(1, 0.05, head=1, warmup_updates=0)},
    "standard, W fitted for 500 updates": {"lowrank": lowrank(1, 0.05, head=1, warmup_updates=500)},
    "standard, on at once": {"lowrank": lowrank(1, 0.05, head=1), "pretrain_epochs": 0},
    "standard, on at half": {"lowrank": lowrank(1, 0.05, head=1), "pretrain_epochs": 0.5},
    "standard, rise over half": {"lowrank": lowrank(1, 0.05, head=1), "ramp_epochs": 0.5},
    "standard, fall over a third": {"lowrank": lowrank(1, 0.05, head=1), "cooldown_epochs": 1 / 3},
    "standard, steps at a half and three quarters": {
        "lowrank": lowrank(1, 0.05, head=1),
        "schedule": "step",
        "milestones": [0.5, 0.75],
    },
    "standard, cosine": {"lowrank": lowrank(1, 0.05, head=1), "schedule": "cosine", "milestones": []},
    "N-LR, cosine": {"lowrank": PLAIN, "schedule": "cosine", "milestones": []},
    "N-LR, steps at a half and three quarters": {"lowrank": PLAIN, "schedule": "step", "milestones": [0.5, 0.75]},
}  # epochs that are no whole numbers are shares of the training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of one network; shares in [0, 1]. Of tokens: the classifier reads their means, the rest all of them."""

    linear: dict[str, float]  # number of leading directions, or "all" -> accuracy of the linear classifier
    variance: dict[int, float]  # number of leading directions, 10 among them -> share of the test variance
    rank: int  # directions that hold 99 % of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run of the grid."""

    form: str
    seed: int
    recipe: dict[str, Any]
    clean: float  # accuracy on all test images
    noise: float  # on 5,000 of them with noise of standard deviation 128/255 on 40 % of the pixels
    layers: dict[str, Layer]
    train_accuracy: float
    seconds: float  # of training
    device: str
    versions: dict[str, str]


def recipe_of(scale: str, form: str, seed: int, overrides: list[str]) -> Recipe:
    """The recipe of one run."""
    name, layer = SCALES[scale]
    recipe = load_recipe(name, [*SHORTENED.get(scale, ()), *overrides])
    changes = {**FORMS[form], "seed": seed, "spectrum_images": IMAGES, "twin": False, "name": f"{name} {form}"}

    def epochs(value: Any) -> Any:
        return round(value * recipe.epochs) if isinstance(value, float) else value

    for key in ("pretrain_epochs", "ramp_epochs", "cooldown_epochs"):
        if key in changes:
            changes[key] = epochs(changes[key])
    if "milestones" in changes:
        changes["milestones"] = [epochs(value) for value in changes["milestones"]]
    branches = {layer if key == "LAYER" else key: spec for key, spec in changes["lowrank"]["branches"].items()}
    return dataclasses.replace(recipe, **{**changes, "lowrank": {**changes["lowrank"], "branches": branches}})


# ------------------------------------------------------------------------------------------------------- one run

_data: ImageData | None = None  # of a worker, which was forked after it was loaded


def run_one(scale: str, form: str, seed: int, overrides: list[str], runs: str | None) -> Row:
    """Trains and measures one network."""
    torch.set_num_threads(1)
    recipe = recipe_of(scale, form, seed, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(runs or scratch) / f"{form.replace('/', '-').replace(' ', '_')}-seed{seed}"
        began = time.monotonic()
        summary = train(recipe, folder, resume=True, data=_data)
        seconds = time.monotonic() - began
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = load_network(str(folder))
    model = network.model.to(device)
    assert _data is not None
    noisy, layers = measure(model, _data, list(recipe.lowrank["branches"]), network.views, device)
    return Row(
        form=form, seed=seed, recipe=recipe.to_dict() | {"data": Path(recipe.data).name}, clean=summary.clean_accuracy,
        noise=noisy, layers=layers, train_accuracy=summary.train_accuracy, seconds=round(seconds, 1),
        device=device_name(device), versions=versions(("torch", "timm")),
    )  # fmt: skip


def measure(
    model: PixelModel, data: ImageData, layers: list[str], views: Mapping[str, View], device: torch.device
) -> tuple[float, dict[str, Layer]]:
    """Accuracy under noise, and the layers, on the first images of each split; `views` are those of token sequences."""
    train_images, test_images = ((t[:IMAGES].float() / 255).to(device) for t in (data.train_images, data.test_images))
    train_labels, test_labels = data.train_labels[:IMAGES].to(device), data.test_labels[:IMAGES].to(device)
    generator = torch.Generator(device).manual_seed(0)
    noisy = torch.cat([pixel_noise(chunk, 0.4, generator=generator) for chunk in test_images.split(500)])
    right = classified_right(model, noisy, test_labels)
    measured = {}
    for layer in layers:
        of_images = {layer: dataclasses.replace(views[layer], kind="pool")} if layer in views else None
        seen = activations(model, train_images, [layer], views=of_images)[layer]
        unseen = activations(model, test_images, [layer], views=of_images)[layer]
        counts = [*(d for d in DIRECTIONS if d < seen.shape[1]), None]
        accuracies = linear_accuracy(seen, train_labels, unseen, test_labels, counts)
        samples = activations(model, test_images, [layer], views=views)[layer] if layer in views else unseen
        held = singular_energies(samples.flatten(1)).cumsum(0)
        held = held / held[-1]
        measured[layer] = Layer(
            linear={str(count or "all"): accuracy for count, accuracy in zip(counts, accuracies, strict=True)},
            variance={count: float(held[min(count, len(held)) - 1]) for count in (*DIRECTIONS, 50)},
            rank=1 + int((held < 0.99).sum()),
        )
    return float(right.double().mean()), measured


# ------------------------------------------------------------------------------------------------------ the file


def read_rows(path: Path) -> list[Row]:
    """The rows of a grid that was begun; none where there is no file."""
    problems: list[str] = []
    rows = [decode(Row, row, "row", problems) for row in json.loads(path.read_text())] if path.exists() else []
    assert not problems, problems
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """All rows, those of one form together."""
    order = {form: number for number, form in enumerate(FORMS)}
    rows = sorted(rows, key=lambda row: (order.get(row.form, len(order)), row.form, row.seed))
    write_whole(path, json.dumps([encode(row) for row in rows], indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Means over the seeds of each form, in per cent."""
    layers = [layer for layer in rows[0].layers if all(layer in row.layers for row in rows)]
    shown = {layer: [n for n in rows[0].layers[layer].linear if all(n in row.layers[layer].linear for row in rows)]
             for layer in layers}  # fmt: skip
    lines = []
    for form in dict.fromkeys(row.form for row in rows):
        mine = [row for row in rows if row.form == form]

        def mean(values: list[float], digits: int = 1) -> str:
            spread = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{100 * statistics.mean(values):.{digits}f}{spread}"

        cells = [form, str(len(mine)), mean([row.clean for row in mine]), mean([row.noise for row in mine])]
        for layer in layers:
            cells += [" / ".join(mean([row.layers[layer].linear[count] for row in mine]) for count in shown[layer])]
            cells += [mean([row.layers[layer].variance[10] for row in mine])]
            cells += [f"{statistics.mean(row.layers[layer].rank for row in mine):.0f}"]
        lines.append(cells)
    head = [
        f"{layer} {what}" for layer in layers for what in (f"linear {' / '.join(shown[layer])}", "variance 10", "rank")
    ]
    return markdown_table(["form", "seeds", "clean", "noise", *head], lines)


def picture(path: Path, rows: list[Row], directions: str = "10") -> None:
    """Clean accuracy against the accuracy of the linear classifier at the layer inside, a point for each form."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 5.5))
    layer = next(iter(rows[0].layers))
    names: dict[str, tuple[float, float]] = {}
    for form in dict.fromkeys(row.form for row in rows):
        mine = [row for row in rows if row.form == form]
        x, y = ([100 * value for value in values] for values in (
            [row.layers[layer].linear[directions] for row in mine], [row.clean for row in mine]
        ))  # fmt: skip
        axes.errorbar(
            statistics.mean(x), statistics.mean(y), fmt="o", capsize=3,
            xerr=statistics.stdev(x) if len(x) > 1 else None, yerr=statistics.stdev(y) if len(y) > 1 else None,
        )  # fmt: skip
        names[f"{form} ({len(mine)})"] = statistics.mean(x), statistics.mean(y)
    axes.set_xlabel(f"accuracy of a linear classifier on {directions} leading directions of {layer}, per cent")
    axes.set_ylabel("clean test accuracy, per cent")
    axes.set_title("Means over so many seeds; bars are standard deviations", fontsize=10)
    axes.margins(x=0.3, y=0.12)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    _name_points(axes, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _name_points(axes: Any, names: Mapping[str, tuple[float, float]]) -> None:
    """Writes the name of each point beside it, on the first side where it lies within the axes and on no other name."""
    figure, inside = axes.figure, axes.get_window_extent()
    taken: list[Any] = []  # what the names written so far cover
    sides = [(x, y, side) for y in (5, -11, 15, -21, 25, -31) for x, side in ((5, "left"), (-5, "right"))]
    for name, point in names.items():
        tries: list[tuple[int, int, Any, Any]] = []
        for x, y, side in sides:
            text = axes.annotate(name, point, (x, y), textcoords="offset points", fontsize=8, ha=side)
            box = text.get_window_extent(figure.canvas.get_renderer())
            on_others = sum(box.overlaps(other) for other in taken) + sum(
                box.contains(*axes.transData.transform(other)) for other in names.values()
            )
            tries.append((on_others + 10 * (not (inside.x0 <= box.x0 and box.x1 <= inside.x1)), len(tries), text, box))
            if not tries[-1][0]:
                break
        _, _, kept, box = min(tries, key=lambda one: one[:2])
        for _, _, text, _ in tries:
            if text is not kept:
                text.remove()
        taken.append(box)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--data", help="folder of the data set; default: what the recipe names")
    parser.add_argument("--output", type=Path, help="default: docs/objective-SCALE.json")
    parser.add_argument("--only", nargs="+", default=list(FORMS), metavar="FORM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--runs", help="keep the run folders here")
    parser.add_argument("--list", action="store_true", help="print the forms and stop")
    parser.add_argument("--markdown", action="store_true", help="print the table of what is there and stop")
    parser.add_argument("--picture", type=Path, help="draw what is there and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(FORMS))
        return
    if unknown := [form for form in options.only if form not in FORMS]:
        parser.error(f"there is no form {unknown[0]!r}: --list prints them")
    path = options.output or Path(__file__).parent.parent / "docs" / f"objective-{options.scale}.json"
    rows = read_rows(path)
    if options.markdown:
        print(table(rows) if rows else f"{path} has no rows")
        return
    if options.picture:
        picture(options.picture, rows)
        return
    overrides = [*options.overrides, *([f"data={options.data}"] if options.data else []), "streaming=false"]
    have = {(row.form, row.seed) for row in rows}
    wanted = [(form, seed) for seed in options.seeds for form in options.only if (form, seed) not in have]
    global _data
    recipe = recipe_of(options.scale, "N-LR", 0, overrides)
    data = load_data(recipe.data, **recipe.data_options())
    assert isinstance(data, ImageData)
    _data = data
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    workers = concurrent.futures.ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("fork"), max_tasks_per_child=None
    )
    with workers:
        pending: dict[concurrent.futures.Future[Row], tuple[str, int]] = {}
        queue = list(wanted)
        while queue or pending:
            while queue and len(pending) < options.jobs and time.monotonic() < deadline:
                form, seed = queue.pop(0)
                pending[workers.submit(run_one, options.scale, form, seed, overrides, options.runs)] = (form, seed)
            if not pending:
                break
            done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                name = pending.pop(future)
                try:
                    rows.append(future.result())
                except Exception as error:  # a form that diverges is a result: the others go on
                    print(f"{name}: {type(error).__name__}: {error}", flush=True)
                    continue
                write_rows(path, rows)
                print(table([rows[-1]]).splitlines()[-1], flush=True)
    if queue:
        print(f"time is up: {len(queue)} runs are left")


if __name__ == "__main__":
    main()
