"""The training runs that are compared: each is done by two processes, and by one with the same global batches."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import timm_lowrank as tlr

Parts = tuple[tuple[int, ...], ...]  # rows of every part of an optimizer step, by process

EVEN: Parts = ((12, 12),)
ACCUMULATED: Parts = ((6, 6), (6, 6))


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One training run. `config` updates `SMALL`, or `TOKENS` for the network of that name."""

    name: str
    config: Mapping[str, object] = dataclasses.field(default_factory=dict)
    parts: Parts = EVEN
    sometimes: Parts | None = None  # the parts of every fourth step instead
    network: str = "layers"
    loop: str = "torch"  # who wraps the model: "torch" (DistributedDataParallel), "accelerate", "fsdp"
    twin_accumulates: bool = False  # the one process too takes part by part, instead of the global batch at once
    overflow_at: int | None = None  # at this step the last process meets images of inf, and the step is skipped
    switched_on_at: int = 0
    steps: int = 22

    def parts_at(self, step: int) -> Parts:
        return self.sometimes if self.sometimes and step % 4 == 3 else self.parts


COMMON = {"reconstruction_weight": 0.5, "head_weight": 0.0, "warmup_updates": 10}
SMALL = {**COMMON, "branches": {"first": 6, "second": {"rank": 4, "norm_weight": 0.01}}}
TOKENS = {
    **COMMON,
    "reconstruction_weight": 0.1,
    "scale": "unit",
    "branches": {"mix": {"rank": 5, "view": "token"}, "head": 3},
}

UNEVEN: Parts = ((7, 5),)
DDP = [
    Scenario("all-rows", {"update_rows": None}, parts=((13, 8),), sometimes=((1, 9),)),
    Scenario("rows-above-batch", {"update_rows": 64, "warmup_updates": 0}),
    Scenario("rows-equal-batch", {"update_rows": 24, "scale": "unit", "warmup_updates": 0}),
    Scenario("rows-below-batch", {"update_rows": 10}, sometimes=UNEVEN),
    Scenario("fewer-rows-than-processes", {"update_rows": 1, "step_size": 0.1}, switched_on_at=7),
    Scenario("fixed", {"step_rule": "fixed", "step_size": 0.01, "update_rows": 10}),
    Scenario("as-printed", {"step_rule": "fixed", "step_size": 0.01, "scale": "paper", "warmup_updates": 0,
                            "reconstruction_weight": 0.001, "update_rows": None}, sometimes=UNEVEN),
    Scenario("nystrom", {"projection": "nystrom", "nystrom_columns": 40, "update_rows": 16}),
    Scenario("dense", {"storage": "dense", "update_rows": 16}),
    Scenario("accumulated", {"update_rows": 10}, parts=ACCUMULATED, sometimes=((7, 5), (2, 3), (1, 4))),
    Scenario("accumulated-unit", {"scale": "unit", "update_rows": None}, parts=ACCUMULATED, sometimes=UNEVEN),
    Scenario("accumulated-no-warm-up", {"warmup_updates": 0}, parts=ACCUMULATED, twin_accumulates=True),
    Scenario("subspace-head", {"update_rows": None, "head_weight": 0.3}, sometimes=UNEVEN),
    Scenario("subspace-head-accumulated", {"update_rows": 24, "head_weight": 0.3}, parts=ACCUMULATED),
    Scenario("tokens", {"update_rows": 10}, network="tokens", parts=((4, 4),), sometimes=((3, 2),)),
    Scenario("tokens-accumulated", {"update_rows": None}, network="tokens", parts=((2, 2), (2, 2))),
    Scenario("accelerate", {"update_rows": 10}, loop="accelerate", parts=ACCUMULATED),
    Scenario("accelerate-uneven", {"update_rows": 10}, loop="accelerate", sometimes=UNEVEN),
]  # fmt: skip
OVERFLOW = Scenario("overflow", {"update_rows": 10}, overflow_at=15)
FSDP = [
    Scenario(
        "fsdp",
        {"update_rows": 10, "head_weight": 0.3},
        loop="fsdp",
        parts=ACCUMULATED,
        sometimes=UNEVEN,
        switched_on_at=3,
    ),
    Scenario("fsdp-tokens", {"update_rows": None}, network="tokens", loop="fsdp", parts=((4, 4),)),
]


MACHINES = [scenario for scenario in DDP if scenario.name in ("rows-below-batch", "tokens-accumulated")]


class Layers(nn.Module):
    """Three hidden layers of 64, 48 and 32 features for 8 x 8 images; smooth, and without batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU())
        self.second = nn.Sequential(nn.Linear(64, 48), nn.GELU())
        self.third = nn.Sequential(nn.Linear(48, 32), nn.GELU())
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(self.second(self.first(images))))


class Tokens(nn.Module):
    """A small mixer: 16 patches of 2 x 2 pixels, 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 2, 2)
        self.mix = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU())
        self.across = nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.GELU())
        self.classifier = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.mix(self.stem(images).flatten(2).mT)
        tokens = tokens + self.across(tokens.mT).mT
        return self.classifier(self.head(tokens.mean(dim=1)))


def build(scenario: Scenario) -> tlr.LowRankModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Tokens() if scenario.network == "tokens" else Layers()
    settings = {**(TOKENS if scenario.network == "tokens" else SMALL), **scenario.config}
    return tlr.wrap(network, tlr.LowRankConfig(**settings), example_input=torch.zeros(1, 1, 8, 8)).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@functools.cache
def shuffled(step: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(step))


def batches(scenario: Scenario, step: int, images, labels, rank: int, world: int):
    """The parts of this process at this step, each with the share of the global batch that its rows are.

    The global batch is part by part, within a part process by process; one process takes it as one batch.
    """
    parts = scenario.parts_at(step)
    order = shuffled(step, len(images))
    total = sum(sum(part) for part in parts)
    broken = torch.zeros(total, dtype=torch.bool)
    slices, start = [], 0
    for part in parts:
        for process, rows in enumerate(part):
            if process == len(part) - 1 and step == scenario.overflow_at:
                broken[start : start + rows] = True
            if process == rank:
                slices.append(slice(start, start + rows))
            start += rows
    if world == 1:
        slices = _cuts(parts) if scenario.twin_accumulates else [slice(0, total)]
    for rows_of_part in slices:
        chosen = order[:total][rows_of_part]
        pixels = torch.where(broken[rows_of_part, None, None, None], torch.inf, images[chosen])
        yield pixels, labels[chosen], len(chosen) / total


def _cuts(parts: Parts) -> list[slice]:
    ends = list(itertools.accumulate(map(sum, parts), initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def training(scenario, model, wrapped, optimizer, data, *, rank=0, world=1, start=0, stop=None, sync=None):
    """Trains by hand: `wrapped` is what is called, around `model`. Returns the largest number of rows in a basis.

    Args:
        sync: called with whether a part is the last of its step, before its backward.
    """
    largest = 0
    for step in range(start, scenario.steps if stop is None else stop):
        model.enable(step >= scenario.switched_on_at)
        parts = list(batches(scenario, step, *data, rank, world))
        for number, (images, labels, share) in enumerate(parts):
            if sync is not None:
                sync(number == len(parts) - 1)
            loss = nn.functional.cross_entropy(wrapped(images), labels) + model.penalty(labels)
            (loss * share * world).backward()  # the mean over the processes becomes the mean over the rows
        if step == scenario.overflow_at:
            optimizer.zero_grad()  # as a gradient scaler does: neither step nor update
            continue
        optimizer.step()
        optimizer.zero_grad()
        model.update()
        largest = max(largest, rows_of(model))
    return largest


def rows_of(model: tlr.LowRankModel) -> int:
    """Rows of the largest factor, None-like 0 where W is dense."""
    return max(getattr(branch.weight, "basis", torch.empty(0)).shape[0] for branch in model.branches.values())


def outcome(model: tlr.LowRankModel) -> dict[str, torch.Tensor]:
    """Everything that must not depend on the number of processes."""
    tensors = {f"backbone.{name}": whole(value.detach()).clone() for name, value in model.backbone.named_parameters()}
    for layer, branch in model.branches.items():
        tensors[f"{layer}: W"] = branch.dense_weight().clone()
        tensors[f"{layer}: b"] = branch.bias.clone()
        tensors[f"{layer}: reference norm"] = branch.reference_norm.clone()
        tensors[f"{layer}: updates"] = torch.tensor(branch.updates)
        if branch.head is not None:
            # As it reads the layer: rounding decides which of two opposite directions is taken, and H's sign with it.
            directions = branch.head.directions @ branch.weight.basis[: branch.weight.kept]
            tensors[f"{layer}: H"] = torch.cat([directions.T @ branch.head.weight[:-1], branch.head.weight[-1:]])
    return tensors


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alone(scenario: Scenario, data) -> dict[str, torch.Tensor]:
    """The outcome of one process with the global batches."""
    model = build(scenario)
    training(scenario, model, model, optimizer_of(model), data)
    return outcome(model)


def distance(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative distance between tensors of the same name, and that name."""
    assert one.keys() == two.keys()
    sizes = {
        name: float((one[name] - two[name]).double().norm() / two[name].double().norm().clamp_min(1e-12))
        for name in two
    }
    name = max(sizes, key=sizes.__getitem__)
    assert all(value == value for value in sizes.values()), "not a number"
    return sizes[name], name


# through accelerate: accumulation, `attach`, `LossHook`, and checkpoints that other processes go on from

PAUSE = 13  # between two projections, where B holds rows of single updates
RESUMED = Scenario("resumed", {"update_rows": 10}, loop="accelerate", steps=24)


def through_accelerate(scenario, model, accelerator, data, *, start=0, stop=None, load=None, save=None):
    """Trains from step `start` to `stop`, after loading and before saving a checkpoint. Returns rows as `training`."""
    accelerator.free_memory()
    rank, world = accelerator.process_index, accelerator.num_processes
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
    tlr.attach(optimizer, model)
    criterion = tlr.LossHook(nn.CrossEntropyLoss(), model)
    if load is not None:
        accelerator.load_state(str(load))
    largest = 0
    for step in range(start, scenario.steps if stop is None else stop):
        parts = list(batches(scenario, step, *data, rank, world))
        accelerator.gradient_accumulation_steps = len(parts)
        for images, labels, share in parts:
            with accelerator.accumulate(wrapped):
                # backward divides by the number of parts, DDP by that of processes; the shares already say it all.
                accelerator.backward(criterion(wrapped(images), labels) * share * world * len(parts))
                optimizer.step()
                optimizer.zero_grad()
        largest = max(largest, rows_of(model))
    if save is not None:
        accelerator.save_state(str(save))
    return largest


def pause(accelerator, data, folder):
    """A run up to `PAUSE` and its checkpoint in `folder`, gone on with to the end; the outcome."""
    model = build(RESUMED)
    through_accelerate(RESUMED, model, accelerator, data, stop=PAUSE, save=folder)
    return go_on(accelerator, data, folder, model)


def go_on(accelerator, data, folder, model=None):
    """The outcome of the run that goes on from the checkpoint in `folder`."""
    model = build(RESUMED) if model is None else model
    through_accelerate(RESUMED, model, accelerator, data, start=PAUSE, load=folder)
    return outcome(model)


def both_ways(folder, accelerator, data):
    """On two processes: a run with a checkpoint in its middle, and the end of a run that one process began."""
    return {
        "whole": uninterrupted(accelerator, data),
        "paused": pause(accelerator, data, folder / "from-two"),
        "taken over": go_on(accelerator, data, folder / "from-one"),
    }


def uninterrupted(accelerator, data):
    model = build(RESUMED)
    through_accelerate(RESUMED, model, accelerator, data)
    return outcome(model)
