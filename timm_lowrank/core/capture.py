"""Recording the activations of named layers during one forward pass.

Hooks exist only inside a `with` block around that forward and store references, nothing else. That is what makes
them safe: a checkpointed block that runs again in backward finds no hook, arithmetic in a hook would change what
checkpointing saves, and a copy or a pickle of the network never meets one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from .views import FLATTEN, View


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where the activations of one layer are read."""

    layer: str  # the name that the user gave
    path: str  # dotted name of the module that is hooked
    takes_input: bool = False  # the module's first input instead of its output
    view: View = FLATTEN  # what counts as one sample
    item: int | None = None  # which one is meant where the module gives a tuple or list
    feeds_classifier: bool = False  # whether it is the tensor that "pre_logits" names, by whatever name

    @classmethod
    def at(cls, layer: str, path: str, backbone: nn.Module, *, takes_input: bool = False) -> Tap:
        """A tap on `path`, moved into plain `nn.Sequential`s: gradient checkpointing calls their children directly,
        and a hook on the container would never fire.

        Not into a child that has other places, too, as an activation that all layers share: it runs once in each.
        """
        module = backbone.get_submodule(path)
        if type(module) is nn.Sequential:
            places = collections.Counter(id(one) for _, one in backbone.named_modules(remove_duplicate=False))
        while type(module) is nn.Sequential and len(module):
            name = list(module._modules)[0 if takes_input else -1]
            child = module._modules[name]
            if places[id(child)] > places[id(module)]:
                break
            path, module = f"{path}.{name}", child
        return cls(layer, path, takes_input)


@dataclasses.dataclass
class Recording:
    """What one forward pass left behind: per layer the tensor itself, its version then, and how often it was seen."""

    values: dict[str, object] = dataclasses.field(default_factory=dict)
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    lockstep: bool = False  # whether its gradients are averaged over processes that all make this forward
    forwards: int = 1  # this one and those before it whose recordings it replaced
    patches: Tensor | None = None  # which patches of the input are no padding, see `views.valid_patches`

    def store(self, layer: str, value: object) -> None:
        self.values[layer] = value
        self.counts[layer] = self.counts.get(layer, 0) + 1
        # Tensors of inference mode have no version: nothing is trained on them.
        if isinstance(value, Tensor) and not torch.compiler.is_compiling() and not value.is_inference():
            self.versions[layer] = value._version

    def activation(self, tap: Tap) -> Tensor:
        """The recorded activations of one layer, as the network left them, (batch, ...).

        Raises:
            CaptureError: the layer never ran, ran more than once, gave no float tensor, or was overwritten in place.
        """
        name = f"layer {tap.layer!r}"
        if tap.layer not in self.values:
            raise CaptureError(
                f"{name} did not run during the forward pass, so there is nothing to regularize; "
                "choose a layer that every training forward calls"
            )
        value = self.values[tap.layer]
        if self.counts[tap.layer] > 1:
            raise CaptureError(
                f"{name} ran {self.counts[tap.layer]} times in one forward pass; choose a layer that runs once"
            )
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"{name} gives a {type(value).__name__}, not a tensor; choose a layer inside or behind it"
            )
        if not value.is_floating_point() or value.dim() < 2:
            raise CaptureError(
                f"{name} gives a tensor of shape {tuple(value.shape)} and type {value.dtype}; "
                "a branch needs floating point activations (batch, ...)"
            )
        if tap.layer in self.versions and self.versions[tap.layer] != value._version:
            raise CaptureError(
                f"the output of {name} was overwritten in place after it was recorded (an in-place "
                "activation behind it, most likely); choose the layer that overwrites it"
            )
        return value


@contextlib.contextmanager
def recording(backbone: nn.Module, taps: Sequence[Tap]) -> Iterator[Recording]:
    """Record what `taps` see for as long as the block lasts; no hook outlives it, whatever happens inside."""
    record = Recording()
    compiling = torch.compiler.is_compiling()
    placed: list[tuple[nn.Module, str, dict[Any, Any], tuple[str, int]]] = []
    try:
        for tap in taps:
            module = backbone.get_submodule(tap.path)
            kind = "_forward_pre_hooks" if tap.takes_input else "_forward_hooks"
            hooks = getattr(module, kind)
            # The key is new: blocks may be nested, taps share a module.
            number = len(hooks)
            while ("timm_lowrank", number) in hooks:
                number += 1
            key = "timm_lowrank", number
            placed.append((module, kind, hooks, key))
            # Not register_forward_hook: torch.compile cannot trace the handle that it makes, while another dictionary
            # becomes part of one graph together with the network. Else it stays the same one: a network may register
            # hooks in its forward, as those of transformers do, and their handles refer to it.
            if compiling:
                setattr(module, kind, {**hooks, key: _hook(tap, record)})
            else:
                hooks[key] = _hook(tap, record)
        yield record
    finally:
        for module, kind, hooks, key in reversed(placed):
            if compiling:
                setattr(module, kind, hooks)
            else:
                hooks.pop(key, None)


def _hook(tap: Tap, record: Recording) -> Callable[..., None]:
    if tap.takes_input:
        return lambda _, args: record.store(tap.layer, args[0] if args else None)
    return lambda _, args, output: record.store(tap.layer, _item(output, tap.item))


def _item(output: Any, item: int | None) -> object:
    """What a tap means in an output: a tensor as a whole, as some layers give more than that in eval mode alone."""
    return output if item is None or isinstance(output, Tensor) else innermost(output[item])


def innermost(value: object) -> object:
    """The first of a tuple or list, of tuples in it too; anything else as it is."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; every submodule's own mode is restored after it."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # A module with a `train` of its own has more to bring back than the flag: LoRA layers that merge their weights
        # for eval mode would stay merged, and learn nothing. Outer ones first, whose `train` also calls that of inner
        # ones; the flags last, since `train` overrules a BatchNorm that was frozen.
        for child, mode in modes.items():
            if getattr(child.train, "__func__", None) is not nn.Module.train:
                child.train(mode)
        for child, mode in modes.items():
            child.training = mode
