"""`read_run`: everything that is known of a finished run of `timm-lowrank train`, checked before anything is sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..checkpoint import verify
from ..checkpoint.files import NETWORK_WEIGHTS
from ..checkpoint.loading import CheckpointInfo, load_folder, read_info
from ..errors import CheckpointError, EvaluationError, RunError
from ..evaluation.results import Evaluation, Figure, Headline, Kind, Value, read_evaluation
from ..files import sha256_of, weights_sha256
from ..training.run import Run, Summary

PICTURES = (".png", ".svg", ".jpg", ".webp")
EPS = 8 / 255  # radius of the attacks that a card and the list of checkpoints name first


@dataclasses.dataclass(frozen=True)
class EffectiveRank:
    """Directions that hold 99 % of the variance of a layer's activations on test images."""

    own: int
    plain: int | None  # of the plain twin
    images: int


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, its checkpoint, and its place in its evaluation."""

    run: Run
    network: CheckpointInfo
    sha256: str  # of model.safetensors
    evaluation: Evaluation | None
    title: str | None  # of this network in it
    plain_title: str | None  # of its plain twin there, if that was evaluated too
    plots: tuple[str, ...]  # names in plots/, sorted

    @property
    def clean(self) -> Value:
        """Accuracy on all test images of the run."""
        return _clean(self.run.summary)

    @property
    def plain_clean(self) -> Value | None:
        """The same of the plain twin; None if there is none."""
        twin = self.run.summary.twin
        return _clean(twin) if twin else self.plain(self.headline().clean)

    def figure(self, kind: Kind, layer: str | None = None, directions: int | None = None) -> Figure | None:
        """The first figure of the evaluation of this kind."""
        figures = self.evaluation.by_kind(kind, layer=layer, directions=directions) if self.evaluation else ()
        return figures[0] if figures else None

    def headline(self) -> Headline:
        """Clean accuracy, PGD-20 from a random start and standard AutoAttack, both in L_inf at 8/255, if measured."""
        pgd = self._reference(name="PGD", steps=20, random_start=True, restarts=1)
        return Headline(self.figure(Kind.CLEAN), pgd, self._reference(name="AutoAttack", version="standard"))

    def _reference(self, **wanted: str | int | bool) -> Figure | None:
        """The figure of an untargeted attack in L_inf at EPS with these fields."""
        wanted = {"norm": "linf", "targeted": False, **wanted}
        for figure in self.evaluation.by_kind(Kind.ATTACK) if self.evaluation else ():
            attack = figure.protocol.attack
            if attack is None or attack.eps is None or abs(attack.eps - EPS) > 1e-6:
                continue
            if all(getattr(attack, name) == value for name, value in wanted.items()):
                return figure
        return None

    def own(self, figure: Figure | None) -> Value | None:
        """The value of this network; None where it was not measured."""
        return _known(figure, self.title)

    def plain(self, figure: Figure | None) -> Value | None:
        """The value of the plain twin; None where it was not measured."""
        return _known(figure, self.plain_title)

    def effective_rank(self, layer: str) -> EffectiveRank:
        """Of a layer of the run: from the evaluation, otherwise what the training measured."""
        summary, recipe = self.run.summary, self.run.recipe
        figure = self.figure(Kind.EFFECTIVE_RANK, layer)
        own, plain = self.own(figure), self.plain(figure)
        theirs = summary.twin.branches.get(layer) if summary.twin else None
        images = min(recipe.spectrum_images or summary.data.test_images, summary.data.test_images)
        return EffectiveRank(
            int(own.value) if own else summary.branches[layer].effective_rank,
            int(plain.value) if plain else theirs.effective_rank if theirs else None,
            own.of or images if own else images,
        )


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
    evaluation, title, plain = _read_evaluation(run)
    return RunRecord(
        run=run,
        network=read_info(run.model, branches=run.summary.lowrank),
        sha256=sha256_of(run.model / NETWORK_WEIGHTS),
        evaluation=evaluation,
        title=title,
        plain_title=plain,
        plots=tuple(sorted(p.name for p in run.plots.glob("*") if p.is_file() and p.suffix.lower() in PICTURES)),
    )


def _read_evaluation(run: Run) -> tuple[Evaluation | None, str | None, str | None]:
    """evaluation.json, and the titles of this network and of its plain twin in it."""
    path = run.evaluation_json
    if not path.is_file():
        return None, None, None
    try:
        evaluation = read_evaluation(path)
    except EvaluationError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digest = weights_sha256(load_folder(run.model, lowrank=False).float().state_dict())
    own = next((network.title for network in evaluation.networks if network.weights == digest), None)
    if own is None:
        raise CheckpointError(
            f"{path} is not about the weights in {run.model}: the network was trained again since, or the file is "
            "another run's. Evaluate again with `timm-lowrank evaluate --overwrite`, or delete it to publish without"
        )
    plain = (network.title for network in evaluation.networks if network.title != own and not network.branches)
    return evaluation, own, next(plain, None)


def _known(figure: Figure | None, title: str | None) -> Value | None:
    value = figure.values.get(title) if figure and title else None
    return value if value and value.known else None


def _clean(summary: Summary) -> Value:
    """The accuracy was written down rounded."""
    images = summary.data.test_images
    return Value.share(round(summary.clean_accuracy * images), images)
