"""The checkpoints of this project: put into the clone with what their runs have measured, listed, and published.

`add_checkpoint` makes hub/checkpoints/NAME and a row of hub/checkpoints.yaml of an evaluated run; `push_all` publishes
every checkpoint of the clone and notes its repository in the list, so that `from_pretrained(NAME)` finds it there.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub.utils import yaml_dump

from ..checkpoint import listed, verify
from ..checkpoint.branches import leave_out_state, write_into
from ..checkpoint.files import CHECKPOINT_FILES, LOWRANK_WEIGHTS, NETWORK_WEIGHTS
from ..checkpoint.listed import Accuracy, Figures, ListedCheckpoint, Rank, Sample, folder_of, read_checkpoints
from ..checkpoint.loading import load_folder
from ..checkpoint.remote import checked_repo_id
from ..core.model import LowRankModel
from ..data import load_images
from ..errors import CheckpointError, CheckpointWriteError, DataError
from ..evaluation import PixelModel
from ..evaluation.pixels import classified_right
from ..evaluation.results import Value, wilson
from ..files import disk_errors, folder_aside, read_json, write_whole
from ..records import encode
from ..text import markdown_table, percent
from .card import HUB, Place, code, escaped, run_card, share
from .front_matter import CARD
from .merging import replaced
from .record import PLAIN_TWIN, RunRecord, read_run
from .run import Outcome, described, files_of, publish_run

MOST_BYTES, MOST_BYTES_TOGETHER = 6_000_000, 30_000_000
SAMPLE = "tests/data/cifar10-sample"  # of a clone
PICTURE = "plots/spectrum.png"  # of the plots, the one that the card shows
HEADER = """\
# Checkpoints trained with this project; python hub/checkpoints.py table shows them.
# Rows are made by python hub/checkpoints.py add RUN NAME from what the run has measured; nothing is typed.
"""


def clone_list() -> Path:
    """hub/checkpoints.yaml of the clone.

    Raises:
        CheckpointError: this is an installed package.
    """
    path = listed.CLONE / "hub" / "checkpoints.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"the checkpoints of this project lie in a clone of it, and {listed.CLONE} is none: run this in a clone "
            "(pip install -e . there)"
        )
    return path


# -------------------------------------------------------------------------------------------------- into the clone


def add_checkpoint(
    run: Path,
    name: str,
    *,
    recipe: str | None = None,
    sample: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> list[str]:
    """Puts a run into the clone as hub/checkpoints/NAME and into the list; replaces an older one of this name.

    The folder gets the network, its branches, recipe.yaml, summary.json, evaluation.json, the picture of the spectrum
    and a card, written aside and swapped in; after an error everything is as it was. Where all that is more than
    `MOST_BYTES`, W of each branch is projected to its rank, and if that is not enough left out together with b. The
    weights keep their dtype, so that they are those evaluated.

    Args:
        run: a finished, evaluated run; or such a folder, whose card and row are then made anew.
        name: of the checkpoint.
        recipe: from the root of the clone; None is the one in recipes/configs that the run is called after.
        sample: images on which the right answers are counted, "digits" or a folder from the root of the clone; None
            is the sample of CIFAR-10.
        dataset: the name on the Hub of the data set, if the run had a copy of it; None is what the list said before.
        license: of the weights, an identifier of the Hub; None is that of the weights that the training began from, or
            Apache-2.0.

    Returns:
        What was done, in lines for a terminal.

    Raises:
        CheckpointError: no finished or evaluated run, too large, other classes than the sample, or fewer right answers
            on the sample than its accuracy on all test images allows; weights that the training began from of which
            no licence is known.
    """
    path = clone_list()
    before = {one.name: one for one in read_checkpoints(path)}
    old = before.get(name)
    record = read_run(run)
    if record.evaluation is None:
        raise CheckpointError(f"{run} was not evaluated: run `timm-lowrank evaluate {run}` first")
    recipe = recipe or f"recipes/configs/{record.run.recipe.name.removesuffix(' (plain)')}.yaml"
    if not (listed.CLONE / recipe).is_file():
        raise CheckpointError(
            f"there is no recipe {recipe} in {listed.CLONE}: give one of recipes/configs with --recipe"
        )
    dataset = dataset or (old.dataset if old else None)
    moved_on = old is not None and old.repo is not None and old.sha256 != record.sha256
    row = ListedCheckpoint(
        name=name,
        repo=None if old is None or moved_on else old.repo,
        recipe=recipe,
        sha256=record.sha256,
        figures=figures_of(record),
        dataset=dataset,
    )
    folder = folder_of(name)
    with disk_errors(f"could not write {folder}", "What was there is unchanged", CheckpointWriteError):
        with folder_aside(folder) as new:
            _write(record, new, name, dataset, license)
            row = dataclasses.replace(row, sample=count_right(new, sample or SAMPLE, row.figures.clean))
            texts = _texts(path, [*({**before, name: row}).values()])
        for file, text in texts.items():
            write_whole(file, text)
    return [
        f"{folder}: {_size(folder):,} bytes"
        + ("" if (folder / LOWRANK_WEIGHTS).is_file() or not record.network.branches else ", without W and b"),
        f"{row.sample.right} of the {row.sample.images} images of {row.sample.source} right",  # type: ignore[union-attr]
        *([f"note: {old.repo} holds other weights: publish it again"] if moved_on and old else []),
    ]


def _write(record: RunRecord, folder: Path, name: str, dataset: str | None, license: str | None) -> None:
    """All files of the checkpoint."""
    for file in CHECKPOINT_FILES:
        if (record.run.model / file).is_file():
            shutil.copyfile(record.run.model / file, folder / file)
    files = {
        file: source for file, source in files_of(record, dataset).items() if file in (PICTURE,) or "/" not in file
    }
    for file, source in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    _write_card(record, folder, name, dataset, license)
    for shrink in (_project, leave_out_state):
        if _size(folder) > MOST_BYTES and (folder / LOWRANK_WEIGHTS).is_file():
            shrink(folder)
            _write_card(record, folder, name, dataset, license)
    verify(folder, sha256=record.sha256)
    others = sum(
        _size(other) for other in folder_of("").glob("*") if not other.name.startswith(".") and other.name != name
    )
    for size, most, what in (
        (_size(folder), MOST_BYTES, name),
        (others + _size(folder), MOST_BYTES_TOGETHER, "hub/checkpoints"),
    ):
        if size > most:
            raise CheckpointError(
                f"{what} would take {size:,} bytes, and {most:,} are the most that a clone carries: publish the run "
                "with `timm-lowrank push` instead"
            )


def _project(folder: Path) -> None:
    """Brings W of every branch to its rank, without the rows that wait for the next projection."""
    model = load_folder(folder)
    if isinstance(model, LowRankModel):
        for branch in model.branches.values():
            if branch.updates:
                branch.project()
        write_into(folder, model, belong_to=[NETWORK_WEIGHTS])


def _write_card(record: RunRecord, folder: Path, name: str, dataset: str | None, license: str | None) -> None:
    # Of the run itself, whose recipe still says where the weights are that the training began from.
    record = dataclasses.replace(read_run(folder), run=record.run)
    about = described(folder, [file for file in files_of(record) if (folder / file).is_file()])
    text = run_card(record, Place.in_clone(name), about, license=license or record.license(), dataset=dataset)
    (folder / CARD).write_text(text, encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def count_right(folder: Path, source: str, clean: Accuracy | None = None) -> Sample:
    """How many images of a sample the network of a checkpoint folder tells right, in float32 on the CPU.

    Args:
        folder: as `save_pretrained` writes it.
        source: "digits", or a folder of parquet files from the root of the clone, of which the test split is taken.
        clean: the accuracy on all test images, which must be possible beside what is counted.

    Raises:
        CheckpointError: the classes are not those of the network, or the accuracy cannot be.
    """
    try:
        place = source if source == "digits" else str(listed.CLONE / source)
        data = load_images(place, train_split="test", test_split="test")
    except DataError as error:
        raise CheckpointError(f"the sample cannot be read: {error}") from error
    names = read_json(folder / "config.json").get("label_names")
    if names != list(data.class_names):
        raise CheckpointError(
            f"the classes of the sample {source} are {', '.join(data.class_names)}, and those of the network "
            f"{', '.join(map(str, names or ['not named']))}: give a sample of its own data with --sample"
        )
    model = PixelModel(load_folder(folder, lowrank=False).float()).eval()
    right = int(classified_right(model, data.test_images.float() / 255, data.test_labels).sum())
    low, high = wilson(right, len(data.test_labels), 0.9999)
    if clean is not None and not low <= clean.value <= high:
        raise CheckpointError(
            f"the network tells {right} of the {len(data.test_labels)} images of {source} right, and {clean.value:.1%} "
            "of all test images according to its run: the run saw other images, or they were normalised in another way"
        )
    return Sample(source=source, images=len(data.test_labels), right=right)


def _texts(path: Path, rows: Sequence[ListedCheckpoint]) -> dict[Path, str]:
    """The list and the page that shows it, with these rows."""
    texts = {path: HEADER + str(yaml_dump([encode(row) for row in rows], sort_keys=False))}
    page = path.parent.parent / "docs" / "hub.md"
    return texts | ({page: table_in(page, rows)} if page.is_file() else {})


# ------------------------------------------------------------------------------------------------------- to the Hub


def push_all(
    user: str, *, token: str | None = None, private: bool | None = None, dry_run: Path | None = None
) -> Iterator[Outcome]:
    """Publishes every checkpoint of the clone as USER/NAME, and notes the repositories in the list.

    All are checked before the first is sent. After an error those that were published are noted; the same call goes on.

    Args:
        user: or organisation.
        token, private: as for `push_to_hub`.
        dry_run: a new or empty folder that gets a folder NAME for each; nothing is sent or noted.

    Yields:
        What was published, one after the other.

    Raises:
        CheckpointError: this is no clone, it holds no checkpoints, one is damaged or not the listed one, or what
            `publish_run` raises.
    """
    path = clone_list()
    rows = {row.name: row for row in read_checkpoints(path)}
    here = [row for row in rows.values() if folder_of(row.name).is_dir()]
    if not here:
        raise CheckpointError(f"{folder_of('')} holds none of the listed checkpoints: there is nothing to publish")
    for row in here:
        checked_repo_id(f"{user}/{row.name}")
    records = {row.name: read_run(folder_of(row.name), sha256=row.sha256) for row in here}
    for row in here:
        repo = f"{user}/{row.name}"
        outcome = publish_run(
            records[row.name], repo, token=token, private=private, dataset=row.dataset,
            dry_run=None if dry_run is None else dry_run / row.name,
        )  # fmt: skip
        if dry_run is None:
            rows[row.name] = dataclasses.replace(row, repo=repo)
            with disk_errors(f"{repo} was published, but not noted in {path}", "Run it again", CheckpointWriteError):
                for file, text in _texts(path, [*rows.values()]).items():
                    write_whole(file, text)
        yield outcome


# ---------------------------------------------------------------------------------------------------- rows and table


def figures_of(record: RunRecord) -> Figures:
    """What the list says about a run: the figures of its model-index, and the effective rank of each layer.

    Those of a plain network stand beside them if that is the plain twin.
    """
    headline = record.headline()
    ranks = {layer: record.effective_rank(layer) for layer in record.run.summary.branches}
    is_twin = record.plain_name == PLAIN_TWIN
    return Figures(
        clean=_accuracy(record.clean, record.plain_clean if record.plain_clean_is_twin else None),
        pgd=_accuracy(record.own(headline.pgd), record.plain(headline.pgd) if is_twin else None),
        autoattack=_accuracy(record.own(headline.autoattack), record.plain(headline.autoattack) if is_twin else None),
        effective_rank={
            layer: Rank(value=rank.own, plain=rank.plain if is_twin else None) for layer, rank in ranks.items()
        },
    )


def _accuracy(own: Value | None, plain: Value | None) -> Accuracy | None:
    if own is None or own.interval is None or own.of is None:
        return None
    low, high = (round(end, 6) for end in own.interval)
    twin = None if plain is None else round(plain.value, 6)
    return Accuracy(value=round(own.value, 6), low=low, high=high, images=own.of, plain=twin)


def checkpoints_table(checkpoints: Sequence[ListedCheckpoint]) -> str:
    """The checkpoints as a table in Markdown, for README.md."""
    if not checkpoints:
        return "No checkpoint has been published yet."
    rows = []
    for one in checkpoints:
        name = f"[{escaped(one.name)}]({HUB}/{one.repo})" if one.repo else escaped(one.name)
        recipe = code(Path(one.recipe).stem)  # a name that `timm-lowrank train` takes
        ranks = [
            f"{code(layer)} {rank.value}" + (f" (plain {rank.plain})" if rank.plain else "")
            for layer, rank in one.figures.effective_rank.items()
        ]
        accuracies = [_cell(accuracy) for accuracy in (one.figures.clean, one.figures.pgd, one.figures.autoattack)]
        rows.append([name, recipe, *accuracies, ", ".join(ranks) or "not measured"])
    header = ["checkpoint", "recipe", "clean accuracy", "PGD-20, 8/255", "AutoAttack, 8/255", "effective rank"]
    return markdown_table(header, rows, right=(2, 3, 4))


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not measured"
    plain = "" if accuracy.plain is None else f"; plain {percent(accuracy.plain)} %"
    return f"{share(Value(accuracy.value, accuracy.low, accuracy.high))} of {accuracy.images:,}{plain}"


def table_in(path: Path, checkpoints: Sequence[ListedCheckpoint]) -> str:
    """The text of a file with the table between the marks of its generated section "checkpoints".

    Raises:
        CheckpointError: the file is not there or has no such marks.
    """
    try:
        text = replaced(path.read_bytes().decode("utf-8"), "checkpoints", checkpoints_table(checkpoints), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if text is None:
        raise CheckpointError(
            f"{path} has no place for the table: put the lines <!-- generated: checkpoints --> and "
            "<!-- end of generated: checkpoints --> where it shall stand"
        )
    return text


def write_table(checkpoints: Sequence[ListedCheckpoint], path: Path) -> None:
    """Puts the table into a file, as `table_in` says."""
    text = table_in(path, checkpoints)
    with disk_errors(f"cannot write the table to {path}", "What was there is unchanged", CheckpointWriteError):
        write_whole(path, text)
