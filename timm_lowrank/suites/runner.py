"""`run`: all units of an evaluation, shared among the processes, kept on disk as they finish, into results."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import EvaluationError
from ..evaluation.results import Settings
from ..files import disk_errors, write_whole
from .measurements.base import Columns, Context, Measurement, Results
from .measurements.passes import Reading
from .networks import EvaluatedNetwork

MEASURED_BY = "measured by"  # the key of a line of partial results
FAILED = "failed"  # the column of a measurement that could not be made
ADVICE = "Free some space and give the same command again: it goes on with what is there."


class Unit(NamedTuple):
    """One piece of work: a measurement of a network on one chunk of the images."""

    measurement: str  # its key
    title: str  # of the network
    chunk: int  # its number


def settings_of(context: Context, measurements: Sequence[Measurement]) -> Settings:
    """What must be the same for an interrupted evaluation to be continued."""
    return Settings(
        seed=context.seed,
        chunk=context.chunk,
        images=len(context.images),
        train_images=len(context.train_images),
        spectrum_images=len(context.images if context.spectrum is None else context.spectrum.images),
        data=str(context.data.fingerprint),
        networks={title: network.weights for title, network in context.networks.items()}
        | ({} if context.source is None else {f"source {context.source.title}": context.source.weights}),
        layers=context.layers,
        torch=torch.__version__,
        measurements=tuple(map(repr, measurements)),
        inputs={title: _input_of(network) for title, network in context.networks.items()}
        | ({} if context.source is None else {f"source {context.source.title}": _input_of(context.source)}),
        other_labels=None if context.other_labels is None else _digest(context.other_labels),
    )


def _input_of(network: EvaluatedNetwork) -> str:
    """How pixels reach a network, which stands beside its weights, not in them."""
    mean, std = (values.flatten().tolist() for values in (network.model.mean, network.model.std))
    return f"mean {mean}, std {std}, {network.resizing or 'any size'}"


def _digest(labels: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for each in labels:
        digest.update(each.cpu().numpy().tobytes())
    return digest.hexdigest()


def run(
    context: Context, measurements: Sequence[Measurement], partial: PartialResults, state: PartialState
) -> Results | None:
    """Measures what `partial` does not hold yet.

    Every process takes every k-th of the units that are missing; a unit is one measurement of one network on one
    chunk of images, with seeds of its own, so which process takes it changes nothing.

    Returns:
        On the main process the results; None elsewhere.

    Raises:
        EvaluationError: `partial` holds another evaluation.
        RunError: it cannot be written.
    """
    if state.is_main_process:
        partial.recover()
    state.wait_for_everyone()
    units = plan_units(context, measurements)
    done = partial.units()
    missing = [unit for unit in units if unit not in done]
    state.wait_for_everyone()  # all have read the same files before anyone adds to them
    by_key = {measurement.key: measurement for measurement in measurements}
    fresh: list[tuple[Unit, Columns]] = []
    if state.is_main_process and len(missing) < len(units):
        print(f"continuing: {len(units) - len(missing)} of {len(units)} pieces are there", flush=True)
    mine = missing[state.process_index :: state.num_processes]
    context = dataclasses.replace(context, expected=_expected(context, by_key, mine))
    bar = tqdm(mine, disable=not state.is_main_process, unit="piece", dynamic_ncols=True)
    for unit in bar:
        bar.set_description(f"{unit.measurement}, {unit.title}"[:40].ljust(40))
        columns = _observed(context, by_key[unit.measurement], unit)
        partial.append(state.process_index, unit, columns)
        fresh.append((unit, columns))
    # Not through the files: they may lie on the disks of several machines.
    done |= dict(gather_object(fresh) if state.num_processes > 1 else fresh)
    return _joined(context, measurements, units, done) if state.is_main_process else None


def plan_units(context: Context, measurements: Sequence[Measurement]) -> list[Unit]:
    """Every piece of work, network by network, in an order that is the same everywhere."""
    units = []
    for title in context.networks:
        for measurement in measurements:
            if measurement.unavailable(context, title) is None:
                count = _chunks(context) if measurement.chunked else 1
                units += [Unit(measurement.key, title, number) for number in range(count)]
    return units


def _expected(
    context: Context, by_key: Mapping[str, Measurement], units: Sequence[Unit]
) -> dict[tuple[str, int], frozenset[Reading]]:
    """What the units will read off a pass of each network and chunk."""
    found: dict[tuple[str, int], frozenset[Reading]] = {}
    for unit in units:
        measurement = by_key[unit.measurement]
        chunks = [unit.chunk] if measurement.chunked else range(_chunks(context))
        for chunk in chunks:
            found[unit.title, chunk] = found.get((unit.title, chunk), frozenset()) | measurement.readings
    return found


def _chunks(context: Context) -> int:
    return -(-len(context.images) // context.chunk)


def _observed(context: Context, measurement: Measurement, unit: Unit) -> Columns:
    rows = range(len(context.images))
    if measurement.chunked:
        rows = rows[unit.chunk * context.chunk : (unit.chunk + 1) * context.chunk]
    try:
        return measurement.observe(context, unit.title, rows)
    except EvaluationError as error:
        return {FAILED: [str(error)]}


def _joined(
    context: Context, measurements: Sequence[Measurement], units: Sequence[Unit], done: Mapping[Unit, Columns]
) -> Results:
    """Joins the chunks of every measurement and has it report; what could not be measured becomes a warning."""
    results = Results()
    for unit in units:
        joined = results.observed.setdefault(unit.measurement, {}).setdefault(unit.title, {})
        for name, values in done[unit].items():
            joined.setdefault(name, []).extend(values)
    failed = {}  # taken out before anything is reported: reports read what others observed, of all images
    for key, of_networks in results.observed.items():
        for title in [title for title, columns in of_networks.items() if FAILED in columns]:
            failed[key, title] = of_networks.pop(title)[FAILED][0]
    for measurement in measurements:
        observed = dict(results.observed.get(measurement.key, {}))
        for title in context.networks:
            reason = failed.get((measurement.key, title)) or measurement.unavailable(context, title)
            if reason:
                results.warnings.append(f"{title}: {measurement.key} was not measured: {reason}")
        if observed:
            measurement.report(context, observed, results)
    return results


def join_processes() -> PartialState:
    """The group of the processes that `accelerate launch` or torchrun started; one process alone without them.

    Raises:
        EvaluationError: several were started and form no group: each would do all the work, on the same files.
    """
    # Shares of work differ: a process may wait hours for the others, longer than the half hour that is the default.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    # Without being told, accelerate forms no group where there is no accelerator.
    Accelerator(cpu=None if torch.accelerator.is_available() else True, kwargs_handlers=[patience])
    state = PartialState()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > state.num_processes:
        raise EvaluationError(
            f"{launched} processes were launched and form no group of that size but of {state.num_processes}: "
            "launch them with torchrun --nproc_per_node N"
        )
    return state


# ----------------------------------------------------------------------------------------------------- partial results


class PartialResults:
    """The finished units of an evaluation on disk, so that a kill at any moment loses one unit at most.

    A file of JSON lines: first the settings, then one unit a line; process k > 0 has a file of its own. What measured
    them, device and versions, has a line in front of them: it may be another one when the evaluation is continued.

    Args:
        path: evaluation.json.partial.
        settings: compared with those of what an interrupted evaluation left.
        measured_by: device and versions, in words; None writes none down.
    """

    def __init__(self, path: Path, settings: Settings, measured_by: str | None = None) -> None:
        self.path, self._measured_by = path, measured_by
        self._said = measured_by is None
        self._header = json.loads(json.dumps(dataclasses.asdict(settings)))  # as it will be read back: tuples are lists

    def recover(self) -> None:
        """Brings what an interrupted evaluation left into one sound file. For one process, before any reads or writes.

        A line that the kill cut off is dropped, and so is every file of another number of processes.

        Raises:
            EvaluationError: what is there belongs to another evaluation.
            RunError: the disk is full or not writable.
        """
        files = self._files()
        units: dict[Unit, Columns] = {}
        for file in files:
            units |= self._read(file)
        before = [{MEASURED_BY: each} for each in self.measured_by()] if units else []
        rows = [self._header, *before, *([*unit, columns] for unit, columns in units.items())]
        lines = [json.dumps(row) for row in rows]
        with disk_errors(f"could not write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(line + "\n" for line in lines))
            for file in files:
                if file != self.path:
                    file.unlink()

    def units(self) -> dict[Unit, Columns]:
        """Everything that is finished, of all processes on this machine."""
        return {unit: columns for file in self._files() for unit, columns in self._read(file).items()}

    def measured_by(self) -> list[str]:
        """Devices and versions that measured it, in the order in which they are found."""
        rows = [row for file in self._files() for row in _rows(file)]
        return list(
            dict.fromkeys(str(row[MEASURED_BY]) for row in rows if isinstance(row, dict) and MEASURED_BY in row)
        )

    def append(self, process: int, unit: Unit, columns: Columns) -> None:
        """Adds a finished unit and waits until it is on the disk.

        Raises:
            RunError: the disk is full or not writable; the units from before are untouched.
        """
        path = self.path if process == 0 else self.path.with_name(f"{self.path.name}.{process}")
        begin = not path.exists()
        with disk_errors(f"could not write {path}", ADVICE), path.open("a") as file:
            if begin:
                file.write(json.dumps(self._header) + "\n")
            if not self._said:
                file.write(json.dumps({MEASURED_BY: self._measured_by}) + "\n")
                self._said = True
            file.write(json.dumps([*unit, columns]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Takes the files away: the evaluation is complete and written elsewhere."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(self.path.name + "*"))

    def _read(self, file: Path) -> dict[Unit, Columns]:
        parsed = _rows(file)
        if not parsed or not isinstance(parsed[0], dict):
            return {}
        if parsed[0] != self._header:
            keys = [key for key in {**parsed[0], **self._header} if parsed[0].get(key) != self._header.get(key)]
            changes = (f"{key} was {_short(parsed[0].get(key))} and is {_short(self._header.get(key))}" for key in keys)
            raise EvaluationError(
                f"{file} holds another evaluation that was interrupted ({'; '.join(changes)}). "
                "Finish it with its own command, delete the file, or choose another folder with --output."
            )
        return {Unit(*row[:3]): row[3] for row in parsed[1:] if isinstance(row, list) and len(row) == 4}


def _rows(file: Path) -> list[Any]:
    lines = file.read_text(errors="replace").split("\n")[:-1]  # what comes behind the last newline was cut off
    return [value for value in map(_parsed, lines) if value is not None]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
