"""Training through accelerate: accumulation, `attach`, `LossHook`, and checkpoints that other processes go on from."""

from torch import nn

import timm_lowrank as tlr

from . import scenarios

PAUSE = 23  # between two projections, where B holds rows of single updates
RESUMED = scenarios.Scenario("resumed", {"update_rows": 10}, loop="accelerate", steps=50)


def through_accelerate(scenario, model, accelerator, data, *, start=0, stop=None, load=None, save=None):
    """Trains from step `start` to `stop`, after loading and before saving a checkpoint. Returns rows as `training`."""
    accelerator.free_memory()
    rank, world = accelerator.process_index, accelerator.num_processes
    wrapped, optimizer = accelerator.prepare(model, scenarios.optimizer_of(model))
    tlr.attach(optimizer, model)
    criterion = tlr.LossHook(nn.CrossEntropyLoss(), model)
    if load is not None:
        accelerator.load_state(str(load))
    largest = 0
    for step in range(start, scenario.steps if stop is None else stop):
        parts = list(scenarios.batches(scenario, step, *data, rank, world))
        accelerator.gradient_accumulation_steps = len(parts)
        for images, labels, share in parts:
            with accelerator.accumulate(wrapped):
                # backward divides by the number of parts, DDP by that of processes; the shares already say it all.
                accelerator.backward(criterion(wrapped(images), labels) * share * world * len(parts))
                optimizer.step()
                optimizer.zero_grad()
        largest = max(largest, scenarios.rows_of(model))
    if save is not None:
        accelerator.save_state(str(save))
    return largest


def pause(accelerator, data, folder):
    """A run up to `PAUSE` and its checkpoint in `folder`, gone on with to the end; the outcome."""
    model = scenarios.build(RESUMED)
    through_accelerate(RESUMED, model, accelerator, data, stop=PAUSE, save=folder)
    return go_on(accelerator, data, folder, model)


def go_on(accelerator, data, folder, model=None):
    """The outcome of the run that goes on from the checkpoint in `folder`."""
    model = scenarios.build(RESUMED) if model is None else model
    through_accelerate(RESUMED, model, accelerator, data, start=PAUSE, load=folder)
    return scenarios.outcome(model)


def both_ways(folder, accelerator, data):
    """On two processes: a run with a checkpoint in its middle, and the end of a run that one process began."""
    return {
        "whole": uninterrupted(accelerator, data),
        "paused": pause(accelerator, data, folder / "from-two"),
        "taken over": go_on(accelerator, data, folder / "from-one"),
    }


def uninterrupted(accelerator, data):
    model = scenarios.build(RESUMED)
    through_accelerate(RESUMED, model, accelerator, data)
    return scenarios.outcome(model)
