"""`run`: all units of an evaluation, shared among the processes, through the journal, into findings."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..errors import EvaluationError
from .context import Context
from .journal import Journal, Unit
from .measurements.base import Columns, Findings, Measurement

FAILED = "failed"  # the column of a measurement that could not be made


def header(context: Context, measurements: Sequence[Measurement], data_fingerprint: str) -> dict[str, Any]:
    """What must be the same for an interrupted evaluation to be continued, as JSON gives it back."""
    settings = {
        "format": 1,
        "seed": context.seed,
        "chunk": context.chunk,
        "images": len(context.images),
        "train_images": len(context.train_images),
        "data": data_fingerprint,
        "networks": {title: subject.weights for title, subject in context.subjects.items()},
        "layers": list(context.layers),
        "torch": torch.__version__,
        "measurements": [measurement.settings() for measurement in measurements],
    }
    return dict(json.loads(json.dumps(settings)))


def run(context: Context, measurements: Sequence[Measurement], journal: Journal, state: PartialState) -> Findings:
    """Measures what the journal does not hold yet.

    Every process takes every k-th of the units that are missing; a unit is one measurement of one network on one
    chunk of images, with seeds of its own, so which process takes it changes nothing.

    Returns:
        On the main process the findings; elsewhere empty ones.

    Raises:
        EvaluationError: the journal holds another evaluation.
        RunError: the journal cannot be written.
    """
    if state.is_main_process:
        journal.recover()
    state.wait_for_everyone()
    units = plan_units(context, measurements)
    done = journal.units()
    missing = [unit for unit in units if unit not in done]
    state.wait_for_everyone()  # all have read the same journal before anyone adds to it
    by_key = {measurement.key: measurement for measurement in measurements}
    mine = missing[state.process_index :: state.num_processes]
    fresh: list[tuple[Unit, Columns]] = []
    if state.is_main_process and len(missing) < len(units):
        print(f"continuing: {len(units) - len(missing)} of {len(units)} pieces are there", flush=True)
    bar = tqdm(mine, disable=not state.is_main_process, unit="piece", dynamic_ncols=True)
    for unit in bar:
        key, title, number = unit
        bar.set_description(f"{key}, {title}"[:40].ljust(40))
        columns = _observed(context, by_key[key], title, number)
        journal.append(state.process_index, unit, columns)
        fresh.append((unit, columns))
    # Not through the files: they may lie on the disks of several machines.
    everything = {**done, **dict(gather_object(fresh))} if state.num_processes > 1 else {**done, **dict(fresh)}
    return _findings(context, measurements, units, everything) if state.is_main_process else Findings()


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


def plan_units(context: Context, measurements: Sequence[Measurement]) -> list[Unit]:
    """Every piece of work, network by network, in an order that is the same everywhere."""
    units = []
    for title in context.subjects:
        for measurement in measurements:
            if measurement.unavailable(context, title) is None:
                count = -(-len(context.images) // context.chunk) if measurement.chunked else 1
                units += [(measurement.key, title, number) for number in range(count)]
    return units


def _rows(context: Context, measurement: Measurement, number: int) -> range:
    if not measurement.chunked:
        return range(len(context.images))
    return range(number * context.chunk, min((number + 1) * context.chunk, len(context.images)))


def _observed(context: Context, measurement: Measurement, title: str, number: int) -> Columns:
    try:
        return measurement.observe(context, title, _rows(context, measurement, number))
    except EvaluationError as error:
        return {FAILED: [str(error)]}


def _findings(
    context: Context, measurements: Sequence[Measurement], units: Sequence[Unit], everything: Mapping[Unit, Columns]
) -> Findings:
    """Joins the chunks of every measurement and has it report; what could not be measured becomes a warning."""
    findings = Findings()
    for measurement in measurements:
        observed: dict[str, Columns] = {}
        for unit in units:
            if unit[0] == measurement.key:
                joined = observed.setdefault(unit[1], {})
                for name, values in everything[unit].items():
                    joined.setdefault(name, []).extend(values)
        for title in context.subjects:
            reason = measurement.unavailable(context, title)
            failed = observed.get(title, {}).get(FAILED)
            if failed:
                reason = failed[0]
                del observed[title]
            if reason:
                findings.warnings.append(f"{title}: {measurement.key} was not measured: {reason}")
        if observed:
            measurement.report(context, observed, findings)
    return findings
