"""What the sweep over timm asks of one network: a training step with "1-LR" and "2-LR", and nothing left of it."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm_sweep_build import BATCH, CLASSES, build, candidates, family
from torch import Tensor, nn

import timm_lowrank as tlr
from timm_lowrank.layers import stage_names

META_ABOVE = 350_000_000  # parameters; larger networks are built on the meta device, without memory for their weights
CROWDED = 100_000_000  # parameters above which the plain network is built anew rather than kept during a step
PRESETS = ("1-LR", "2-LR")

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Failure(Exception):
    """The network did something that a plain network does not do, or the branches did not do what they should."""


def check(name: str, meta_above: int = META_ABOVE, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row of the sweep about one network.

    Args:
        meta_above: parameters above which it is built on the meta device.
        options: further keywords for `timm.create_model`.

    Returns:
        "status": "pass", "fail" or "refused" (the package says clearly that it cannot), "why", "input" (channels,
        height, width), "layers": for each preset {layer: [features, rank]}, "checkpointing": whether it was on,
        "device": "cpu", or "meta" for a network that is too large. A refused network was tried with a branch on
        a named layer instead; "layers" holds it if that passed.
    """
    started = time.perf_counter()
    outline: Any = build(name, None, "meta", options)
    parameters = sum(p.numel() for p in outline.parameters())
    device = "meta" if parameters > meta_above else "cpu"
    row: dict[str, Any] = {"name": name, "family": family(name), "parameters": parameters, "device": device}
    try:
        for network, images, size in candidates(name, outline.pretrained_cfg["input_size"], device, options):
            twin = functools.partial(build, name, size, device, options, filled=False)
            row |= _row(network, images, twin)
            del network
            if row["status"] != "fail" or min(images.shape[2:]) >= 128:
                break  # smaller images than these may be the reason of a failure
    except Exception as problem:
        row |= {"status": "fail", "why": f"the plain network: {describe(problem)}"}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _row(network: nn.Module, images: Tensor, twin: Callable[[], nn.Module]) -> dict[str, Any]:
    row: dict[str, Any] = {"input": list(images.shape[1:]), "status": "pass", "why": ""}
    try:
        return row | examine(network, images, twin, {preset: preset for preset in PRESETS})
    except ValueError as problem:
        if "has no classifier" not in str(problem):
            return row | {"status": "fail", "why": describe(problem)}
        row |= {"status": "refused", "why": describe(problem)}
    except Exception as problem:
        return row | {"status": "fail", "why": describe(problem)}
    try:
        return row | examine(network, images, twin, {"named": {stage_names(network)[-2]: 8}})
    except Exception as problem:
        return row | {"status": "fail", "why": f"with a named layer: {describe(problem)}"}


def describe(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:400]


def examine(
    network: nn.Module, images: Tensor, twin: Callable[[], nn.Module], variants: Mapping[str, str | dict[str, int]]
) -> dict[str, Any]:
    """Wrap, train, unwrap and compare, for each of some settings of `LowRankConfig.branches`.

    The last one takes a second step with gradient checkpointing where the network offers it.

    Args:
        twin: builds the same network, whatever its weights.

    Returns:
        "layers": for each setting {layer: [features, rank]}, and "checkpointing".

    Raises:
        Failure: something is not as it should be; or whatever the package itself raises.
    """
    found: dict[str, Any] = {"layers": {}, "checkpointing": False}
    hooks, keys, kind = count_hooks(network), list(network.state_dict()), type(network)
    step = meta_step if images.is_meta else training_step
    plain: nn.Module | None = None
    for label, branches in variants.items():
        # A projection reads numbers: on the meta device there are none.
        config = tlr.LowRankConfig(branches=branches, warmup_updates=0, project_every=100 if images.is_meta else 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*where the branch has (no|little) effect")
            model = tlr.wrap(network, config, example_input=images)
        found["layers"][label] = {layer: [b.num_features, b.rank] for layer, b in model.branches.items()}
        step(model.train(), images)
        if label == list(variants)[-1] and checkpointing(network, True):
            found["checkpointing"] = True
            step(model.train(), images.flip(3).square() - 0.1)  # others: the branches know the first by now
            checkpointing(network, False)
        unwrapped = model.unwrap()
        model.zero_grad(set_to_none=True)
        if unwrapped is not network or type(unwrapped) is not kind or count_hooks(unwrapped) != hooks:
            raise Failure("unwrap() does not give the plain network back: it has another class, or hooks")
        if list(unwrapped.state_dict()) != keys:
            raise Failure("the state dict has other keys after unwrap()")
        if not images.is_meta:
            plain = plain or twin()
            compare(model, plain, images)
        if sum(p.numel() for p in network.parameters()) > CROWDED:
            plain = None
    return found


def training_step(model: tlr.LowRankModel, images: Tensor) -> None:
    """One step as a training loop takes it, and a look at whether every branch took part in it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    updates = {layer: branch.updates for layer, branch in model.branches.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(images)
        penalty = model.penalty()
        front = [p for p in model.backbone.parameters() if p.requires_grad]
        optimizer.zero_grad()
        (supervised(output) + penalty).backward()
    losses = {layer: float(parts["reconstruction"]) for layer, parts in model.losses().items()}
    if not all(0 < value < float("inf") for value in losses.values()):
        raise Failure(f"a branch has no loss, or one that is not finite: {losses}")
    if not float(penalty.detach()) > 0 or not penalty.requires_grad:
        raise Failure("the penalty is zero or carries no gradient")
    if not any(p.grad is not None and bool(p.grad.count_nonzero()) for p in front):
        raise Failure("no parameter of the network got a gradient")
    optimizer.step()
    model.update()
    if any(branch.updates != updates[layer] + 1 for layer, branch in model.branches.items()):
        raise Failure("update() left a branch out")


def meta_step(model: tlr.LowRankModel, images: Tensor) -> None:
    """What can be seen without numbers: every tap fires in training, in the right width, with a gradient."""
    updates = {layer: branch.updates for layer, branch in model.branches.items()}
    output = model(images)
    penalty = model.penalty()
    if not penalty.requires_grad:
        raise Failure("the penalty carries no gradient")
    (supervised(output) + penalty).backward()
    model.update()
    if any(branch.updates != updates[layer] + 1 for layer, branch in model.branches.items()):
        raise Failure("update() left a branch out")


def supervised(output: Any) -> Tensor:
    """Cross-entropy of the logits; a network that gives several tensors is asked for all of them."""
    tensors = list(_tensors(output))
    return torch.stack(
        [
            nn.functional.cross_entropy(value, torch.arange(BATCH, device=value.device))
            if value.dim() == 2 and value.shape == (BATCH, CLASSES)
            else value.float().square().mean()
            for value in tensors
        ]
    ).sum()


def compare(model: tlr.LowRankModel, plain: nn.Module, images: Tensor) -> None:
    """The plain network with the weights of the wrapped one says the same, to the bit, in eval mode."""
    plain.load_state_dict(model.unwrap().state_dict(), strict=True)
    with torch.no_grad():
        outputs = [list(_tensors(network.eval()(images))) for network in (plain, model, model.unwrap())]
    if not outputs[0] or not all(bool(value.isfinite().all()) for value in outputs[0]):
        raise Failure("the output of the plain network is not finite after the step")
    for other in outputs[1:]:
        if len(other) != len(outputs[0]) or not all(map(torch.equal, outputs[0], other)):
            raise Failure("the eval output differs from that of the plain network with the same weights")


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors([output[key] for key in sorted(output)])
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def checkpointing(network: nn.Module, on: bool) -> bool:
    """Switch gradient checkpointing; False where the network does not offer it."""
    switch: Callable[[bool], object] | None = getattr(network, "set_grad_checkpointing", None)
    if switch is None:
        return False
    try:
        switch(on)
    except (AssertionError, NotImplementedError, AttributeError):
        return False
    return True


def count_hooks(network: nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in network.modules() for kind in HOOKS)
