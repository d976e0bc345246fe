"""`evaluate`: networks side by side, into evaluation.json, plots/*.png and report.html."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from ..core.capture import evaluating
from ..core.views import FLATTEN
from ..data import Data, ImageData, StreamedData, load_data, load_images
from ..data.images import balanced_rows, held_rows
from ..data.sources import open_source
from ..environment import device_name, together, versions
from ..errors import EvaluationError, EvaluationWarning, ImageSizesError
from ..evaluation import activations
from ..evaluation.checks import check_before_attack
from ..evaluation.results import DataInfo, Evaluation, Settings, read_evaluation, write_evaluation
from ..files import disk_errors
from ..report import write_plots, write_report
from ..text import one_line
from .foreign import Resizing
from .measurements.base import Context, Measurement, SpectrumImages
from .measurements.classifiers import OtherLabels
from .networks import NO_TWIN, EvaluatedNetwork, infos_of, load_network, load_networks
from .plan import chosen_suites, measurements_of
from .runner import ADVICE, PartialResults, run, settings_of

PACKAGES = ("timm_lowrank", "torch", "timm", "pyautoattack", "scikit-learn")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate and how.

    Args:
        network: a run folder, a checkpoint folder, hf-hub:USER/NAME or a timm name.
        against: the networks beside it; without any the twin in the run folder if there is one, ("none",) nothing.
        suites: of "quick", "paper" and "autoattack".
        measurements: what to measure instead of all that the suites have; their numbers of images stay.
        source: a network that black-box attacks are crafted on, beside `network` alone; it is not measured itself.
        data: where the images are; None is where the run's recipe says.
        limit, train_limit: test images, and training images that classifiers and PCA are fitted on, as many of
            each class as there are; None are those of the suite.
        radius_units: in which PGD and the diagnosis of masking have their radii, "pixel", "normalized" or both; None
            are those of the suites. AutoAttack and all else that has a radius stays in units of the pixel range.
        table_limit: test images of Table 1, whose grid of attacks (units, step sizes, radii) is what takes longest in
            the suite "paper"; None is `limit`.
        spectrum_limit: test images that spectra and effective ranks are taken of; None is twice the width of the widest
            layer, as far as there are so many, at most 2,500 (10,000 in the suite "paper"), at least `limit`.
        radii: in ascending order, of which the smallest that misclassifies nearly all is sought (Table 10); None are
            those of the suite, up to 32/255.
        random_network: whether the layer cushion is measured of a network of the same architecture that was never
            trained, too (paper, Fig. 4c).
        other_labels: a column of other labels, for the transfer of the representation to them.
        seed: of everything random.
        chunk: images in a batch and in a piece of work. AutoAttack's random numbers depend on it.
        output: where evaluation.json, plots/ and report.html go; None is the run folder.
        overwrite: whether a finished evaluation that was another one may be replaced.
        command: how to repeat it, for the report.
        pages: whether plots/ and report.html are made; evaluation.json always is.
    """

    network: str
    against: tuple[str, ...] = ()
    suites: tuple[str, ...] = ("quick",)
    measurements: tuple[Measurement, ...] = ()
    source: str | None = None
    data: str | None = None
    limit: int | None = None
    train_limit: int | None = None
    radius_units: tuple[str, ...] | None = None
    table_limit: int | None = None
    spectrum_limit: int | None = None
    radii: tuple[float, ...] | None = None
    random_network: bool = False
    other_labels: str | None = None
    seed: int = 0
    chunk: int = 100
    output: Path | None = None
    overwrite: bool = False
    command: str | None = None
    pages: bool = True

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        if self.output is not None:
            return self.output
        run = Path(self.network)
        return run if run.is_dir() else Path("evaluations") / self.network.replace("/", "_").replace(":", "_")


def evaluate(options: Options, state: PartialState, images: ImageData | None = None) -> Evaluation | None:
    """Evaluates, on all processes of `state` together, and writes the files on the main process.

    Args:
        images: what `options.data` would give, if it has been read already.

    Returns:
        The content of evaluation.json; None on other processes.

    Raises:
        EvaluationError: for a mistake in the options, networks or data, before anything is written.
        TrainingError: data that cannot be read, a disk that cannot be written, another process that has ended; what
            is finished is kept.
    """
    began = time.monotonic()
    for limit in (options.limit, options.train_limit, options.spectrum_limit):
        _require_positive(1 if limit is None else limit)
    suites = chosen_suites(options.suites)
    measurements = list(options.measurements) or measurements_of(
        suites, options.radius_units, options.table_limit, options.radii, options.random_network
    )
    if options.other_labels is not None and not any(isinstance(one, OtherLabels) for one in measurements):
        raise EvaluationError(
            f"the suite {' + '.join(options.suites)} measures nothing with --other-labels: "
            "add --suite paper, or leave it out"
        )
    if options.chunk < 1:
        raise EvaluationError(f"--batch-size must be at least 1, not {options.chunk}")
    if not 0 <= options.seed < 2**63:
        raise EvaluationError(f"--seed must be at least 0 and less than 2**63, not {options.seed}")
    if options.folder.exists() and not (options.folder.is_dir() or options.output is None):
        raise EvaluationError(f"the output {options.folder} is a file: choose a folder with --output")
    source = None if options.source is None else load_network(options.source)
    networks = load_networks(options.network, options.against if source is None else (NO_TWIN,))
    if source is not None:
        source = _told_apart(source, networks)
    limit = max(suite.images for suite in suites) if options.limit is None else options.limit
    train_limit = max(s.train_images for s in suites) if options.train_limit is None else options.train_limit
    layers = _layers([*networks, *([] if source is None else [source])])
    most = max(suite.spectrum_images for suite in suites)

    def spectrum_limit(image_size: Sequence[int]) -> int:
        if options.spectrum_limit is not None:
            return options.spectrum_limit
        return max(limit, min(most, _enough_images(networks, layers, image_size)))

    data = images or images_of(options, networks, train_limit, limit, spectrum_limit)
    context = build_context(
        networks, data, layers, state.device, seed=options.seed, chunk=options.chunk, limit=limit,
        train_limit=train_limit, other_labels=_load_other_labels(options, networks), source=source,
        spectrum_limit=spectrum_limit(data.image_size),
    )  # fmt: skip
    settings = settings_of(context, measurements)
    measured_by = ", ".join([device_name(state.device), *map(" ".join, versions(PACKAGES).items())])
    partial = PartialResults(options.folder / "evaluation.json.partial", settings, measured_by)
    finished = _finished(options, settings)
    if finished is not None:
        if state.is_main_process:
            with contextlib.suppress(EvaluationError):  # another evaluation, which can still go on
                partial.units()
                partial.remove()  # a kill may have come before this
        return finished if state.is_main_process else None
    oddities = _oddities(context)
    with together("evaluation", "the same command continues"):
        results = run(context, measurements, partial, state)
    if results is None:
        return None
    others = [each for each in partial.measured_by() if each != measured_by]
    if others:  # device and versions of the evaluation are those of the last go
        oddities.append(
            "it was interrupted, and some of it was measured under other circumstances than the rest: "
            f"{'; '.join(others)}; then {measured_by}"
        )
    evaluation = Evaluation(
        suite=" + ".join(options.suites),
        command=options.command,
        seed=options.seed,
        chunk=options.chunk,
        confidence=context.confidence,
        device=device_name(state.device),
        processes=state.num_processes,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(PACKAGES),
        seconds=round(time.monotonic() - began, 1),
        data=context.data,
        networks=infos_of(networks),
        figures=tuple(results.figures),
        curves=tuple(results.curves),
        strips=tuple(results.strips),
        verdicts=results.verdicts,
        normalized_verdicts=results.normalized_verdicts,
        warnings=(*oddities, *results.warnings),
        settings=settings,
    )
    with disk_errors(f"could not write to {options.folder}", ADVICE):
        options.folder.mkdir(parents=True, exist_ok=True)
        if options.pages:
            write_plots(evaluation, options.folder / "plots")
            write_report(evaluation, options.folder)
        write_evaluation(evaluation, options.folder / "evaluation.json")
    partial.remove()
    return evaluation


def _told_apart(source: EvaluatedNetwork, networks: Sequence[EvaluatedNetwork]) -> EvaluatedNetwork:
    """The source with a title that no network has: figures say by titles what was crafted on what.

    Raises:
        EvaluationError: it is one of the networks, so that the black box would be a white one.
    """
    for network in networks:
        if network.weights == source.weights:
            raise EvaluationError(
                f"{network.path} and {source.path} hold the same weights: a black-box attack needs another network"
            )
    taken = {network.title for network in networks}
    names = (
        source.title,
        f"{source.title} (source)",
        *(f"{source.title} (source {n})" for n in range(2, len(taken) + 2)),
    )
    return dataclasses.replace(source, title=next(name for name in names if name not in taken))


def _layers(networks: Sequence[EvaluatedNetwork]) -> list[str]:
    """The layers of all networks, from the input to the output: a network with one branch may come before its twin,
    which was measured at two, and another may have its branches elsewhere."""
    longest = max(networks, key=lambda network: len(network.layers)).layers
    layers = list(dict.fromkeys(layer for network in networks for layer in network.layers))
    if set(layers) <= set(longest):
        return list(longest) or ["pre_logits"]
    places: dict[str, int] = {}
    for network in networks:
        for place, (name, _) in enumerate(network.model.network.named_modules()):
            places.setdefault(name, place)
    return sorted(layers, key=lambda layer: places.get(layer, len(places)))  # "pre_logits" is no module, and the last


def build_context(
    networks: Sequence[EvaluatedNetwork],
    data: ImageData,
    layers: Sequence[str],
    device: torch.device,
    *,
    seed: int,
    chunk: int,
    limit: int,
    train_limit: int,
    other_labels: tuple[Tensor, Tensor] | None = None,
    source: EvaluatedNetwork | None = None,
    spectrum_limit: int | None = None,
) -> Context:
    """Takes `limit` test and `train_limit` training images, as many of each class as there are.

    And `spectrum_limit` test images for spectra; None are the same as for everything else. `other_labels` are those of
    another column, of all training and test images of `data`.

    Raises:
        EvaluationError: networks and data do not fit each other.
    """
    classes = len(data.class_names)
    for network in [*networks, *([] if source is None else [source])]:
        have = network.classes
        if have not in (None, classes):
            raise EvaluationError(
                f"{network.path} tells {have} classes apart, and {data.name} has {classes}: give its own data"
            )
        channels = len(network.model.mean.flatten())
        if channels != data.image_size[0]:
            raise EvaluationError(
                f"{network.path} takes images of {channels} channels, and those of {data.name} have "
                f"{data.image_size[0]}: give its own data"
            )
        network.model.to(device)
        _require_taken(network, data.image_size)
    test = _balanced(data.test_labels, limit, classes)
    train = _balanced(data.train_labels, train_limit, classes)
    many = test if spectrum_limit is None else _balanced(data.test_labels, spectrum_limit, classes)
    places = torch.full((len(data.test_labels),), -1)
    places[test] = torch.arange(len(test))
    return Context(
        networks={network.title: network for network in networks},
        images=(data.test_images[test].float() / 255).to(device),
        labels=data.test_labels[test].to(device),
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        data=DataInfo(
            source=data.name, split="test", images=len(test), train_images=len(train), image_size=data.image_size,
            class_names=data.class_names, fingerprint=data.fingerprint, origin=data.origin,
        ),
        layers=tuple(layers),
        seed=seed,
        chunk=chunk,
        other_labels=None if other_labels is None else (other_labels[0][train], other_labels[1][test]),
        source=source,
        spectrum=None if len(many) == len(test) else SpectrumImages(
            data.test_images[many], data.test_labels[many], places[many]
        ),
    )  # fmt: skip


def _require_taken(network: EvaluatedNetwork, image_size: Sequence[int]) -> None:
    """Raises EvaluationError if a network, such as a ViT made for another size, does not take images of this one."""
    try:
        with evaluating(network.model):
            network.model(torch.zeros(1, *image_size, device=network.model.mean.device))
    except Exception as error:  # whatever its layers raise
        channels, height, width = image_size
        size = None if network.resizing is None else network.resizing.image_size
        reason = one_line(error).rstrip(".")
        own = "" if size is None else f" By its own files it takes {size} x {size}: evaluate it alone."
        raise EvaluationError(
            f"{network.path} cannot be run on images of {channels} x {height} x {width}: {reason}.{own}"
        ) from error


def _enough_images(networks: Sequence[EvaluatedNetwork], layers: Sequence[str], image_size: Sequence[int]) -> int:
    """Twice as many images as the widest layer has features, so that it is not their number that a rank is bounded by.

    Where an image is several samples of a layer, as many samples. 1 where a layer cannot be read, which its measurement
    says, or the network cannot be run, which `build_context` says.
    """
    views = {layer: view for network in networks for layer, view in network.views.items() if layer in layers}
    needed = 1
    for network in networks:
        device = network.model.mean.device
        try:
            values = activations(network.model, torch.zeros(1, *image_size, device=device), layers, views=views)
        except Exception:  # of the network's own layers, too
            continue
        needed = max([needed, *(-(-2 * width // samples) for samples, width in (one.shape for one in values.values()))])
    return needed


def _require_positive(limit: int) -> None:
    if limit < 1:
        raise EvaluationError(f"--limit, --train-limit and --spectrum-limit must be at least 1, not {limit}")


def _balanced(labels: Tensor, limit: int, classes: int) -> Tensor:
    _require_positive(limit)
    return torch.from_numpy(balanced_rows(labels.numpy(), min(limit, len(labels)), classes))


def images_of(
    options: Options,
    networks: Sequence[EvaluatedNetwork],
    train_limit: int,
    limit: int,
    spectrum_limit: Callable[[Sequence[int]], int] = lambda image_size: 1,
) -> ImageData:
    """The images.

    Of a data set that the recipe streams, `train_limit` training and `limit` test images, or what `spectrum_limit`
    makes of the size of an image if that is more, as many of each class; of others all.

    Raises:
        EvaluationError: nothing says where they are.
        DataError: they cannot be read.
    """
    recipe = next((network.recipe for network in networks if network.recipe), None)
    if recipe is None:
        if options.data is None:
            raise EvaluationError(
                f"{options.network} does not say what it was trained on: give --data, a folder of parquet files or "
                'images, the name of a data set on the Hub, or "digits"'
            )
        data = _resized(options.data, networks)
    else:
        data = load_data(options.data or recipe.data, **recipe.data_options(), progress=True)
    if not isinstance(data, StreamedData):
        return data
    if options.other_labels is not None:
        raise EvaluationError("--other-labels needs images that fit into memory, and these are streamed")
    return data.subset(train_limit, max(limit, spectrum_limit(data.image_size)), progress=True)


def _resized(source: str, networks: Sequence[EvaluatedNetwork]) -> Data:
    """The images of a data set that no recipe speaks of, of the size that the networks take where they say it.

    Where they do not, images of one size stay as they are, and others get the size in timm's `pretrained_cfg`.
    """
    said = next((network.resizing for network in networks if network.resizing), None)
    if said is None:
        try:
            return load_images(source, progress=True)
        except ImageSizesError:
            config = dict(getattr(networks[0].model.network, "pretrained_cfg", None) or {})
            if "input_size" not in config:
                raise
            said = Resizing.of(config["input_size"][1:], config.get("crop_pct", 1.0), networks[0].path)
    return load_data(source, image_size=said.image_size, crop_pct=said.crop_pct, progress=True)


def _load_other_labels(options: Options, networks: Sequence[EvaluatedNetwork]) -> tuple[Tensor, Tensor] | None:
    """The labels of another column, if one is named, of all training and test images that are held in memory: where
    the recipe limits them, those that it takes by its own labels."""
    if options.other_labels is None:
        return None
    recipe = next((network.recipe for network in networks if network.recipe), None)
    arguments = recipe.data_args if recipe else {}
    named = {key: value for key, value in arguments.items() if key in inspect.signature(open_source).parameters}
    source = options.data or recipe.data  # type: ignore[union-attr]
    own = open_source(source, **named, download=True)
    other = open_source(source, **{**named, "label_column": options.other_labels}, download=True)
    train, test = (
        torch.from_numpy(labelled.labels()[held_rows(split, limit, len(own.class_names))])
        for labelled, split, limit in (
            (other.train, own.train, arguments.get("train_limit")),
            (other.test, own.test, arguments.get("test_limit")),
        )
    )
    return train, test


def _oddities(context: Context) -> list[str]:
    """What is odd about networks and images, before hours are spent on them."""
    images, labels = context.chunk_of(range(context.chunk))
    oddities = [
        f"{title} was trained on other images than these (their fingerprints differ)"
        for title, network in context.networks.items()
        if network.data_fingerprint not in (None, context.data.fingerprint)
    ]
    oddities += _other_sizes(context)
    oddities += _other_views(context)
    for title, network in context.networks.items():
        with warnings.catch_warnings():  # they go into the report
            warnings.simplefilter("ignore", EvaluationWarning)
            texts = check_before_attack(network.model, images, labels, classes=len(context.class_names))
        oddities += [f"{title}: {text}" for text in texts]
    return oddities


def _other_sizes(context: Context) -> list[str]:
    """Networks that are given the same images as all others, and name another size or cut."""
    networks = [*context.networks.values(), *([] if context.source is None else [context.source])]
    size = context.data.image_size[-1]
    by_recipe = any(network.recipe for network in context.networks.values())
    made = None if by_recipe else next((one.resizing for one in context.networks.values() if one.resizing), None)
    found = []
    for network in networks:
        said = network.resizing
        if said is None:
            continue
        if said.image_size != size:
            found.append(
                f"{network.title} takes images of {said.image_size} x {said.image_size} pixels by its own files, and "
                f"these have {size}: its figures are not those at its own size; evaluate it alone"
            )
        elif made is not None and said.crop_pct != made.crop_pct:
            found.append(
                f"{network.title} is given crops of {made.crop_pct:g} of the images, and its own files say "
                f"{said.crop_pct:g}: its figures are not those of its own images; evaluate it alone"
            )
    return found


def _other_views(context: Context) -> list[str]:
    """Branches for which a sample of their layer is something else than what the spectra of all networks are of."""
    found = []
    for title, network in context.networks.items():
        for layer in network.branches:
            own, measured = (views.get(layer, FLATTEN).kind for views in (network.views, context.views))
            if own != measured:
                found.append(
                    f"{title} has a branch on {layer} with the view {own!r}, and the spectra of all networks there are "
                    f"in the view {measured!r}: evaluate it alone for its own"
                )
    return found


def _finished(options: Options, settings: Settings) -> Evaluation | None:
    """The evaluation that is there already, if it is the very one that is asked for."""
    path = options.folder / "evaluation.json"
    if not path.exists() or options.overwrite:
        return None
    evaluation = read_evaluation(path)
    there = evaluation.settings
    if there is not None and there.inputs is None:  # of an earlier version
        there = dataclasses.replace(there, inputs=settings.inputs)
    if there == settings:
        print(f"{path} is complete", flush=True)
        return evaluation
    raise EvaluationError(
        f"{path} holds another evaluation (suite {evaluation.suite!r}): replace it with --overwrite, or choose "
        "another folder with --output"
    )
