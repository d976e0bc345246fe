"""BatchNorms in eval mode folded into the convolutions in front of them, while an attack asks a network many times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)  # of these types, not of their subclasses

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


@contextmanager
def folded(
    network: nn.Module,  # in eval mode, its parameters frozen
    image: Tensor,  # (1, channels, height, width), as the network takes it
) -> Iterator[int]:
    """Meanwhile each BatchNorm is part of its convolution, where the network uses them so; yields how many are.

    In eval mode a BatchNorm is an affine function of each channel, and takes up to a fifth of the time of a forward and
    backward. What follows what is read from the graph of one forward, so any network will do. A convolution keeps its
    own output if anything else reads it, if it has hooks or runs more than once; a network of which a part is compiled
    or in DataParallel stays as it is. Parameters, buffers and modules do not change; what the network rounds is rounded
    otherwise. Should its logits change by more than that, or should it not take one image alone, nothing is folded.
    """
    pairs: list[Pair] = []
    foldable = [] if _is_copied(network) else [module for module in network.modules() if _foldable(module)]
    try:
        try:
            if any(type(module) in _NORMS for module in foldable):
                before, pairs = _follow(network, image, foldable)
                for convolution, norm in pairs:
                    _fold(convolution, norm)
                if pairs and not _agree(before, _ask(network, image)):
                    _unfold(pairs)
        except Exception:  # of a network that needs several images: the attack asks for all, and tells what fails
            _unfold(pairs)
        yield len(pairs)
    finally:  # after Ctrl-C in one of the two forwards above, too: a copy that stayed would hide what is trained later
        _unfold(pairs)


def _ask(network: nn.Module, image: Tensor) -> Tensor:
    """Its logits, with a graph. Networks with noise draw the same each time, and later what they would have drawn."""
    devices = [image.device] if image.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        logits: Tensor = network(image.detach().clone().requires_grad_())
        return logits


def _follow(network: nn.Module, image: Tensor, foldable: list[nn.Module]) -> tuple[Tensor, list[Pair]]:
    """The logits of `image`, and each convolution with the BatchNorm that alone reads what it gives."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # input and output

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(module, []).append((inputs[0], output))

    handles = [module.register_forward_hook(note) for module in foldable]
    try:
        logits = _ask(network, image)
    finally:
        for handle in handles:
            handle.remove()
    once = {module: call[0] for module, call in calls.items() if len(call) == 1}
    readers = _readers(logits)
    given = {id(output): (module, output) for module, (_, output) in once.items() if isinstance(module, nn.Conv2d)}
    pairs = []
    for norm, (read, _) in once.items():
        convolution, output = given.get(id(read), (None, read))
        if convolution is not None and isinstance(norm, nn.BatchNorm2d) and readers[output.grad_fn] == 1:
            pairs.append((convolution, norm))
    return logits, pairs


def _foldable(module: nn.Module) -> bool:
    """Whether a convolution or a BatchNorm does what its type says and no more."""
    if type(module) not in (nn.Conv2d, *_NORMS) or "forward" in vars(module):
        return False
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return False
    return isinstance(module, nn.Conv2d) or module.running_mean is not None  # else by the statistics of the batch


def _is_copied(network: nn.Module) -> bool:
    """Whether a part of it is compiled or replicated: copies may keep what they were given."""
    return any(
        hasattr(part, "_orig_mod") or part._compiled_call_impl is not None or isinstance(part, nn.DataParallel)
        for part in network.modules()
    )


def _readers(result: Tensor) -> Counter[torch.autograd.graph.Node | None]:
    """How many operations of the graph of `result` read what each operation gives."""
    readers: Counter[torch.autograd.graph.Node | None] = Counter()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        for source, _ in node.next_functions if node is not None else ():
            if source is not None and not readers[source]:
                waiting.append(source)
            readers[source] += 1
    return readers


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """An attribute `forward` of the instance goes before that of its class."""
    convolution.forward = fuse_conv_bn_eval(convolution, norm).forward  # type: ignore[method-assign]
    norm.forward = partial(_activation, norm)  # type: ignore[method-assign]


def _activation(norm: nn.BatchNorm2d, values: Tensor) -> Tensor:
    """What is left of a BatchNorm: nothing, or what timm has behind it."""
    if not isinstance(norm, BatchNormAct2d):
        return values
    after: Tensor = norm.act(norm.drop(values))
    return after


def _unfold(pairs: list[Pair]) -> None:
    for module in (module for pair in pairs for module in pair):
        vars(module).pop("forward", None)
    pairs.clear()


def _agree(before: Tensor, after: Tensor) -> bool:
    """Whether logits differ by what their type rounds at most."""
    largest = before.abs().amax() * torch.finfo(before.dtype).eps ** 0.5
    return bool((after - before).abs().amax() <= largest)
