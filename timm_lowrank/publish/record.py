"""`read_run`: everything that is known of a finished run of `timm-lowrank train`, checked before anything is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

from timm.models import get_pretrained_cfg

from ..checkpoint import verify
from ..checkpoint.files import NETWORK_CONFIG, NETWORK_WEIGHTS
from ..checkpoint.loading import CheckpointInfo, load_folder, read_info
from ..errors import CheckpointError, EvaluationError, RunError
from ..evaluation.results import MOST_BYTES, Evaluation, Figure, Headline, Kind, Value, evaluation_from_json, headline
from ..files import RUN_MODEL, read_json, sha256_of, weights_sha256
from ..training.run import Run, RunPaths
from .front_matter import CARD, license_of
from .paths import last_part, without_paths_in_titles

PICTURES = (".png", ".svg", ".jpg", ".webp")
PLAIN_TWIN = "plain twin"  # what a network is called that was trained alike without branches
LICENSE = "apache-2.0"  # of weights trained from scratch


@dataclasses.dataclass(frozen=True)
class EffectiveRank:
    """Directions that hold 99 % of the variance of a layer's activations on test images."""

    own: int
    plain: int | None  # of the plain network beside it
    images: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Weights that a training began from."""

    name: str  # of the network, the repository, the folder or the file
    base_model: str | None  # repository on the Hub
    license: str | None  # None if it is not known


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, its checkpoint, and its place in its evaluation."""

    run: Run
    network: CheckpointInfo
    sha256: str  # of model.safetensors
    evaluation: Evaluation | None  # with the twin named, which those of earlier versions left to its folder
    title: str | None  # of this network in it
    plain_title: str | None  # of a plain network there, its twin before others, if one was evaluated too
    plain_is_twin: bool  # whether that is known to have been trained alike
    plots: tuple[str, ...]  # names in plots/, sorted

    @property
    def clean(self) -> Value:
        """Accuracy on all test images of the run."""
        return self.run.summary.clean

    @property
    def same_data(self) -> bool:
        """Whether the evaluation, if there is one, was on the data set of the run, as far as is known."""
        if self.evaluation is None:
            return True
        trained, tested = self.run.summary.data, self.evaluation.data
        if tested.fingerprint in (None, trained.fingerprint):
            return True
        # The fingerprint of what was streamed is of its files, not of its images.
        return trained.streamed and last_part(tested.source) == last_part(trained.source)

    @property
    def plain_clean(self) -> Value | None:
        """The same of a plain network, on as many images; None where that is not known."""
        return self._clean_beside[1]

    @property
    def plain_clean_name(self) -> str:
        """What that network is called: "plain twin", or by its title."""
        return self._clean_beside[0]

    @property
    def plain_clean_is_twin(self) -> bool:
        """Whether that network is known to have been trained alike without branches."""
        return self.plain_clean_name == PLAIN_TWIN

    @property
    def _clean_beside(self) -> tuple[str, Value | None]:
        summary, networks = self.run.summary, self.evaluation.networks if self.evaluation else ()
        said = next((network.clean for network in networks if network.title == self.plain_title), None)
        known = (said, self.plain(self.headline().clean) if self.same_data else None)
        evaluated = next((value for value in known if value and value.of == self.clean.of), None)
        if summary.twin and (summary.has_twin or evaluated is None):
            return _plain_name(summary.twin.name, summary.has_twin), summary.twin.clean
        return _plain_name(self.plain_title, self.plain_is_twin), evaluated

    @property
    def plain_name(self) -> str | None:
        """What the plain network is called whose figures stand beside those of this one; None without any."""
        if self.plain_title is not None:
            return _plain_name(self.plain_title, self.plain_is_twin)
        summary = self.run.summary
        return _plain_name(summary.twin.name, summary.has_twin) if summary.twin else None

    @property
    def origin(self) -> Origin | None:
        """The weights that the training began from; None for a network trained from scratch."""
        return _origin_of(self.run)

    def license(self) -> str:
        """The licence of the weights where their owner names none: that of those they began from, or Apache-2.0.

        A card beside the run says it, as that of a checkpoint of a clone, whose recipe has lost the folder of those
        weights.

        Raises:
            CheckpointError: the licence of those that they began from is not known.
        """
        if named := _license_in(self.run.folder):
            return named
        if self.origin is None:
            return LICENSE
        if self.origin.license is None:
            raise CheckpointError(
                f"the training began from the weights {self.origin.name}, whose licence is not known and binds what is "
                "made of them: look it up and name it with --license"
            )
        return self.origin.license

    def figure(self, kind: Kind, layer: str | None = None, directions: int | None = None) -> Figure | None:
        """The first figure of the evaluation of this kind."""
        figures = self.evaluation.by_kind(kind, layer=layer, directions=directions) if self.evaluation else ()
        return figures[0] if figures else None

    def headline(self) -> Headline:
        """Clean accuracy, PGD-20 and AutoAttack at 8/255 by the protocol that others use, as far as measured."""
        return headline(self.evaluation, reference=True) if self.evaluation else Headline(None, None, None)

    def own(self, figure: Figure | None) -> Value | None:
        """The value of this network; None where it was not measured."""
        return _known(figure, self.title)

    def plain(self, figure: Figure | None) -> Value | None:
        """The value of the plain network `plain_title`; None where it was not measured."""
        return _known(figure, self.plain_title)

    def effective_rank(self, layer: str) -> EffectiveRank:
        """Of a layer of the run: from the evaluation, otherwise what the training measured."""
        summary, recipe = self.run.summary, self.run.recipe
        figure = self.figure(Kind.EFFECTIVE_RANK, layer)
        images = min(recipe.spectrum_images or summary.data.test_images, summary.data.test_images)
        if own := self.own(figure):  # on other images than the training: both from the evaluation, or both not
            plain = self.plain(figure)
            return EffectiveRank(int(own.value), int(plain.value) if plain else None, own.of or images)
        same = self.plain_title is None or (self.plain_is_twin and summary.has_twin)
        theirs = summary.twin.branches.get(layer) if summary.twin and same else None
        return EffectiveRank(summary.branches[layer].effective_rank, theirs.effective_rank if theirs else None, images)


def _origin_of(run: Run, followed: frozenset[Path] = frozenset()) -> Origin | None:
    """What the recipe of a run names, or of the run that it began from.

    Args:
        followed: folders of runs that began from this one.
    """
    name, options = run.recipe.model, run.recipe.model_args
    if run.recipe.init_from is not None:
        return _origin_in(run.recipe.init_from, followed)
    if path := options.get("checkpoint_path"):
        return Origin(last_part(str(path)), None, None)
    if not options.get("pretrained"):
        return None
    if name.startswith("local-dir:"):
        return _origin_in(name.removeprefix("local-dir:"), followed)
    cfg = read_json(run.model / NETWORK_CONFIG).get("pretrained_cfg", {})
    license = str(cfg.get("license") or "unknown").lower()
    remote = re.fullmatch(r"hf[-_]hub:([^@]+)(?:@.*)?", name)
    known = None if remote else get_pretrained_cfg(name)
    base = remote[1] if remote else known.hf_hub_id if known else None
    return Origin(base or name, base, None if license == "unknown" else license)


def _origin_in(source: str, followed: frozenset[Path]) -> Origin | None:
    """Weights on this machine: under the licence of their card; those of a run without one are what it began from."""
    unknown = Origin(last_part(source), None, None)
    place = Path(source).expanduser().resolve()
    folder = place.parent if place.is_file() else place
    if folder.name == RUN_MODEL and RunPaths(folder.parent).is_run():
        folder = folder.parent
    if (folder / CARD).is_file():
        return dataclasses.replace(unknown, license=_license_in(folder))
    try:
        run = Run.open(folder)
    except (OSError, RunError):  # a checkpoint or a file of which nothing is known, or it is not here any more
        return unknown
    return unknown if folder in followed else _origin_of(run, followed | {folder})


def _license_in(folder: Path) -> str | None:
    """The licence that the card in a folder names; None where there is none or it cannot be read."""
    card = folder / CARD
    with contextlib.suppress(CheckpointError, OSError, UnicodeDecodeError):
        return license_of(card.read_text(encoding="utf-8"), str(card))
    return None


def read_run(folder: Path, *, sha256: str | None = None) -> RunRecord:
    """Reads and checks a run.

    Args:
        folder: as `timm-lowrank train` wrote it, with evaluation.json if it was evaluated.
        sha256: what model.safetensors must have; None takes any.

    Raises:
        CheckpointError: no run, not finished, damaged, other weights than expected, or an evaluation of others.
    """
    try:
        run = Run.open(folder)
    except RunError as error:
        raise CheckpointError(str(error)) from error
    verify(run.model, sha256=sha256)
    evaluation, title, plain, is_twin = _read_evaluation(run)
    return RunRecord(
        run=run,
        network=read_info(run.model, branches=run.summary.lowrank),
        sha256=sha256_of(run.model / NETWORK_WEIGHTS),
        evaluation=evaluation,
        title=title,
        plain_title=plain,
        plain_is_twin=is_twin,
        plots=tuple(sorted(p.name for p in run.plots.glob("*") if p.is_file() and p.suffix.lower() in PICTURES)),
    )


def _read_evaluation(run: Run) -> tuple[Evaluation | None, str | None, str | None, bool]:
    """evaluation.json, the titles of this network and of a plain one in it, and whether that is the twin."""
    path = run.evaluation_json
    if not path.is_file():
        return None, None, None, False
    try:
        evaluation = evaluation_from_json(
            without_paths_in_titles(read_json(path, EvaluationError, limit=MOST_BYTES))
        )  # as published
    except EvaluationError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digest = weights_sha256(load_folder(run.model, lowrank=False).float().state_dict())
    own = next((network.title for network in evaluation.networks if network.weights == digest), None)
    if own is None:
        raise CheckpointError(
            f"{path} is not about the weights in {run.model}: the network was trained again since, or the file is "
            "another run's. Evaluate again with `timm-lowrank evaluate --overwrite`, or delete it to publish without"
        )
    others = [network for network in evaluation.networks if network.title != own]
    plain = [network for network in others if not network.branches and network.comparator is None]
    about_this = evaluation.titles[0] == own  # others are twins of the first one
    twins = [network for network in plain if about_this and network.twin]
    if about_this and not twins and any(network.twin is None for network in plain):  # it is of an earlier version
        weights = _weights_of_twin(run)
        twins = [network for network in plain if network.weights == weights]
        networks = (dataclasses.replace(one, twin=True) if one in twins else one for one in evaluation.networks)
        evaluation = dataclasses.replace(evaluation, networks=tuple(networks))
    chosen = next(iter([*twins, *plain]), None)
    return evaluation, own, chosen.title if chosen else None, bool(twins)


def _weights_of_twin(run: Run) -> str | None:
    """What the plain twin in the folder of a run is known by in evaluations; None where there is none."""
    if not run.summary.has_twin or not RunPaths(run.twin).is_finished():
        return None
    try:
        return weights_sha256(load_folder(RunPaths(run.twin).model, lowrank=False).float().state_dict())
    except CheckpointError:
        return None


def _plain_name(title: str | None, is_twin: bool) -> str:
    if is_twin:
        return PLAIN_TWIN
    return "plain network" if title in (None, "plain") else f"plain network {title}"


def _known(figure: Figure | None, title: str | None) -> Value | None:
    value = figure.values.get(title) if figure and title else None
    return value if value and value.known else None
