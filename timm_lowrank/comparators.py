"""What the low-rank branches are compared with: other ways of making representations or weights small.

Bottle-LR is the paper's own control (Section 3.1), spectral and stable rank normalisation and SNIP are those of its
Table 2, and Matryoshka heads are what one would take today for short embeddings. Each function changes a network in
place and gives it back; it trains as before, and `fold` makes it what timm saves and loads. A recipe names one with
`comparator` and its settings with `comparator_args`.

>>> import timm, timm_lowrank
>>> network = timm_lowrank.comparators.matryoshka(timm.create_model("resnet10_cifar"), sizes=[5, 10, 20])
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import timm
import torch
from timm.models import load_pretrained, register_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from .core.capture import Tap, evaluating, recording
from .core.config import PRE_LOGITS, LowRankConfig
from .core.views import View
from .errors import nearest
from .layers import default_input, tap_on
from .records import decode_fields
from .wrapping import find_taps

__all__ = [
    "COMPARATORS", "Comparator", "NestedLoss", "Start", "bottleneck", "bottlenecked", "comparator_from", "fold",
    "matryoshka", "snip", "spectral_normalize", "stable_rank_normalize",
]  # fmt: skip

APPROACH = 50  # steps of the power method towards the singular vectors of an averaged weight
ARCHITECTURE = "bottlenecked"  # timm's name for a network with bottlenecks
Batches = Iterable[tuple[Tensor, Tensor]]  # normalised images (batch, channels, height, width) and labels (batch,)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a comparator may look at when it is put on a network that has not been trained yet."""

    example_input: Tensor  # a batch as the network takes it
    branches: str | Mapping[str, Any]  # where branches would sit, as `LowRankConfig.branches`
    batches: Callable[[int], Batches]  # the first so many batches of training images of this process
    mean_over_processes: Callable[[Tensor], Tensor] = lambda value: value
    # Whether a checkpoint follows with all weights and buffers, and those of the network until then mean nothing.
    resumed: bool = False


@dataclasses.dataclass(frozen=True)
class Comparator:
    """What a recipe trains in the place of branches, with its settings; the base does nothing.

    `attach` is called before training begins, `extra_loss` in every step, `settle` before an average of the network is
    tested, and `finish` in the end.
    """

    title: ClassVar[str]  # in tables and pictures

    def attach(self, network: nn.Module, start: Start) -> None:
        """Changes a network in place before its training begins.

        Raises:
            ValueError: the network or the settings do not allow it.
        """

    def extra_loss(self, network: nn.Module, labels: Tensor) -> Tensor | None:
        """What joins the cross-entropy of the last forward pass in train mode, a scalar, if anything does."""
        return None

    def settle(self, average: nn.Module) -> None:
        """Makes a moving average of the network, in place, predict as it would in the end."""

    def finish(self, network: nn.Module, batches: Batches) -> dict[str, float]:
        """Folds the trained network, in place.

        Args:
            network: afterwards it is in eval mode.
            batches: of test images.

        Returns:
            What only the trained network shows, by name.
        """
        fold(network)
        return {}


def fold(network: nn.Module) -> nn.Module:
    """Takes away, in place, what training needed and prediction does not: the same logits from timm's own parameters.

    Normalised and pruned weights become plain ones, nested classifiers go. Bottlenecks stay, they predict. Returns the
    network, in eval mode.
    """
    network.eval()  # in train mode a look at a normalised weight moves it
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear | _ConvNd) and parametrize.is_parametrized(module, "weight"):
            # torch takes the weight off the class that it made for this module, which copies of it share.
            module.__class__ = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        if isinstance(module, NestedLinear):
            _replace(network, name, module.whole())
    return network


def unfolded(network: nn.Module) -> list[str]:
    """The layers that `fold` would change, whose parameters have names that timm does not know."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, NestedLinear) or parametrize.is_parametrized(module)
    ]


def _weighted_layers(network: nn.Module) -> dict[str, nn.Linear | _ConvNd]:
    """Convolutions and linear layers by name: those whose weights are normalised or pruned."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | _ConvNd)}


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(network.training)
    setattr(network.get_submodule(parent), name, module)


# ----------------------------------------------------------------------------------------------------------- Bottle-LR


class Bottleneck(nn.Module):
    """A linear layer a -> W a with W = W_l W_l^T, so of rank r at most (paper, Section 3.1: Bottle-LR).

    Args:
        features: q, the features of one sample.
        rank: r <= q, the columns of W_l. They start orthonormal, W as a random projection, and are trained.
        view: what counts as one sample, "flatten" or "token".
    """

    def __init__(self, features: int, rank: int, view: View):
        super().__init__()
        self.view = view
        self.factor = nn.Parameter(torch.empty(features, rank))  # W_l
        nn.init.orthogonal_(self.factor)

    def forward(self, activations: Tensor) -> Tensor:
        """Activations (batch, ...) to the same shape."""
        if self.view.kind == "flatten" or activations.dim() == 2:
            return self._projected(activations.flatten(1)).view(activations.shape)
        channels_last = activations.movedim(self.view.channel_dim, -1)
        return self._projected(channels_last).movedim(-1, self.view.channel_dim)

    def _projected(self, rows: Tensor) -> Tensor:
        return functional.linear(functional.linear(rows, self.factor.T), self.factor)

    def on_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A forward hook."""
        projected: Tensor = self(output)
        return projected

    def on_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook."""
        return (self(args[0]), *args[1:])


def bottleneck(
    network: nn.Module, branches: str | Mapping[str, Any] = "1-LR", *, example_input: Tensor | None = None
) -> nn.Module:
    """Puts Bottle-LR layers where branches would sit, as children `bottlenecks.LAYER` of the network ("/" for dots).

    One before the classifier goes with it: give `num_classes` to `create_model`, and call no `reset_classifier` behind.

    Args:
        network: of timm's, then `save_pretrained` saves it as a `bottlenecked` one; or any other.
        branches: "1-LR", "2-LR" or layer to rank, as `LowRankConfig.branches`.
        example_input: a batch as the network takes it; None is an image of the size in its `pretrained_cfg`.

    Raises:
        ValueError: as `timm_lowrank.wrap`; or a layer whose samples are means, or that gives several tensors.
    """
    if is_bottlenecked(network):
        raise ValueError("the network has bottlenecks already: name all of them in one call")
    images = default_input(network) if example_input is None else example_input
    taps, widths, ranks = find_taps(network, LowRankConfig(branches=branches), images)
    layers = nn.ModuleDict()
    for tap in taps:
        if tap.view.kind == "pool" or tap.item is not None:
            kind = 'the view "pool" of ' if tap.item is None else "one of the tensors of "
            raise ValueError(f"a bottleneck cannot replace {kind}layer {tap.layer!r}: choose another layer")
        layer = Bottleneck(widths[tap.layer], ranks[tap.layer], tap.view).to(next(network.parameters()))
        layers[tap.layer.replace(".", "/")] = layer
    for tap, layer in zip(taps, cast(Iterable[Bottleneck], layers.values()), strict=True):
        module = network.get_submodule(tap.path)
        # A method of the child: a copy of the network has hooks of its own children.
        if tap.takes_input:
            module.register_forward_pre_hook(layer.on_input)
        else:
            module.register_forward_hook(layer.on_output)
    network.add_module("bottlenecks", layers)
    if cfg := getattr(network, "pretrained_cfg", None):
        own = {"network": cfg["architecture"], "bottlenecks": branches, "example_size": list(images.shape[1:])}
        network._model_args = {**getattr(network, "_model_args", {}), **own}  # type: ignore[assignment, arg-type]
        network.pretrained_cfg = network.default_cfg = {**cfg, "architecture": ARCHITECTURE}  # type: ignore[assignment, dict-item]
    return network


@register_model
def bottlenecked(
    pretrained: bool = False,
    network: str = "resnet10_cifar",
    bottlenecks: str | Mapping[str, Any] = "1-LR",
    example_size: Sequence[int] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm network with Bottle-LR layers, as an architecture of timm's own: it is saved and loaded like any other.

    Args:
        pretrained: as in `timm.create_model`; without `pretrained_cfg` the weights of `network` alone are meant.
        network: a timm name.
        bottlenecks: as in `bottleneck`.
        example_size: (channels, height, width) that decide the widths of the layers; None is the network's own.
        kwargs: of the network.
    """
    stored = isinstance(pretrained_cfg, dict)  # a checkpoint with bottlenecks
    model = timm.create_model(
        network, pretrained=pretrained and not stored, pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay, cache_dir=cache_dir, **kwargs,
    )  # fmt: skip
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": network}
    images = default_input(model, **kwargs) if example_size is None else torch.zeros(1, *example_size)
    bottleneck(model, bottlenecks, example_input=images)
    if pretrained and stored:
        load_pretrained(
            model, pretrained_cfg=model.pretrained_cfg, num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3), cache_dir=cache_dir,
        )  # fmt: skip
    return model


def is_bottlenecked(network: nn.Module) -> bool:
    """Whether `bottleneck` was called on it, or on what it was loaded from."""
    return isinstance(getattr(network, "bottlenecks", None), nn.ModuleDict)


def architecture_of(network: nn.Module) -> str | None:
    """timm's name of the architecture, without bottlenecks; None if it is not timm's."""
    if is_bottlenecked(network):
        return dict(getattr(network, "_model_args", {})).get("network")
    return dict(getattr(network, "pretrained_cfg", None) or {}).get("architecture")


@dataclasses.dataclass(frozen=True)
class BottleLR(Comparator):
    """See `bottleneck`; without `branches` where the recipe's branches would sit."""

    title = "Bottle-LR"

    branches: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.branches is not None:
            LowRankConfig(branches=self.branches)

    def attach(self, network: nn.Module, start: Start) -> None:
        """Puts them there."""
        wanted = start.branches if self.branches is None else self.branches
        places = wanted if isinstance(wanted, str) else {layer: _place(spec) for layer, spec in wanted.items()}
        bottleneck(network, places, example_input=start.example_input)


def _place(spec: Any) -> Any:
    """Rank and view of a branch, without its weights."""
    return spec if isinstance(spec, int) else {k: spec[k] for k in ("rank", "view", "channel_dim") if k in spec}


# ------------------------------------------------------------------------- spectral and stable rank normalisation


class SpectralNormalized(_SpectralNorm):
    """torch's spectral normalisation, W / sigma_1(W), in the precision of the weight under autocast too."""

    _u: Tensor
    _v: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(weight)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Makes the singular vectors exact."""
        left, _, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        self._u.copy_(left[:, 0])
        self._v.copy_(right[0])

    def approach(self, weight: Tensor) -> None:
        """Brings singular vectors that are about right nearer, at a fraction of what `settle` takes."""
        self._power_method(weight.flatten(1), APPROACH)


class StableRankNormalized(SpectralNormalized):
    """W / sigma_1 with a stable rank ||W||_F^2 / sigma_1^2 of at most r (Sanyal, Torr, Dokania 2020, Algorithm 2).

    With u, v the leading singular vectors, u v^T is kept and the rest scaled down to a norm of sqrt(r - 1) if it has
    more: the nearest matrix of spectral norm 1 and that stable rank which keeps its leading direction.

    u and v are constants for the gradient. Where r is 1 nothing else is left, and they are W v and W^T u, normalised.

    Args:
        weight: W, of any shape; its matrix has a row for each output.
        stable_rank: r >= 1.
        iterations: of the power method, in each forward pass in train mode.
    """

    def __init__(self, weight: Tensor, stable_rank: float, iterations: int):
        super().__init__(weight, iterations)
        self.rest_norm = math.sqrt(stable_rank - 1)

    def forward(self, weight: Tensor) -> Tensor:
        normalized = super().forward(weight)
        with torch.autocast(weight.device.type, enabled=False):
            left, right, matrix = self._u, self._v, weight.flatten(1)
            if not self.rest_norm:  # else the weight would never get a gradient
                left, right = (functional.normalize(one, dim=0) for one in (matrix @ right, matrix.T @ left))
            leading = torch.outer(left, right).view(weight.shape)
            rest = normalized - leading
            norm = rest.square().sum().clamp_min(torch.finfo(rest.dtype).tiny).sqrt()
            return leading + rest * (self.rest_norm / norm).clamp_max(1)


def spectral_normalize(network: nn.Module, *, iterations: int = 1) -> nn.Module:
    """Spectral normalisation of every convolution and linear layer (Miyato et al. 2018).

    What is trained is the weight before the division.

    Args:
        iterations: of the power method, in each forward pass in train mode.

    Raises:
        ValueError: a weight that is zero.
    """
    return _normalize(network, _spectral(iterations))


def stable_rank_normalize(network: nn.Module, share: float = 0.3, *, iterations: int = 1) -> nn.Module:
    """Stable rank normalisation of every convolution and linear layer, SRN-c (Sanyal, Torr, Dokania 2020).

    Args:
        share: c in (0, 1]: the stable rank of an (outputs x inputs) weight is at most c * min(outputs, inputs), and 1
            where that is less; c = 1 is spectral normalisation.
        iterations: as in `spectral_normalize`.

    Raises:
        ValueError: `share` is out of range, or a weight is zero.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be > 0 and <= 1")
    return _normalize(network, _stable_rank(share, iterations))


def _spectral(iterations: int) -> Callable[[Tensor], nn.Module]:
    return lambda weight: SpectralNormalized(weight, iterations)


def _stable_rank(share: float, iterations: int) -> Callable[[Tensor], nn.Module]:
    return lambda weight: StableRankNormalized(weight, max(1.0, share * min(weight.flatten(1).shape)), iterations)


def _normalize(network: nn.Module, normalized: Callable[[Tensor], nn.Module], resumed: bool = False) -> nn.Module:
    layers = _weighted_layers(network)
    zeros = [name for name, layer in layers.items() if not layer.weight.any()]
    if zeros and not resumed:  # the weights of a checkpoint are others
        raise ValueError(f"the weights of {', '.join(zeros)} are all zero and have no norm to be divided by")
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", normalized(layer.weight))
    return network


@dataclasses.dataclass(frozen=True)
class SpectralNorm(Comparator):
    """See `spectral_normalize`."""

    title = "SN"

    iterations: int = 1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be >= 1")

    def attach(self, network: nn.Module, start: Start) -> None:
        """Normalises the weights from now on."""
        _normalize(network, _spectral(self.iterations), start.resumed)

    @torch.no_grad()
    def settle(self, average: nn.Module) -> None:
        """Brings the singular vectors to those of the averaged weights: an average of them is not even of norm 1."""
        for module in average.modules():
            if isinstance(module, parametrize.ParametrizationList):
                cast(SpectralNormalized, module[0]).approach(cast(Tensor, module.original))

    def finish(self, network: nn.Module, batches: Batches) -> dict[str, float]:
        """Brings the singular vectors up to the last step; those of a moving average are not even of norm 1.

        The figures: the largest spectral norm and the largest stable rank as a share of the full, by exact SVDs.
        """
        for module in network.modules():
            if isinstance(module, parametrize.ParametrizationList):
                cast(SpectralNormalized, module[0]).settle(cast(Tensor, module.original))
        weights = [layer.weight.detach().flatten(1).double() for layer in _weighted_layers(fold(network)).values()]
        values = [torch.linalg.svdvals(weight) for weight in weights]
        shares = [float(s.square().sum() / s[0].square()) / len(s) for s in values]
        return {"largest_spectral_norm": max(float(s[0]) for s in values), "largest_stable_rank_share": max(shares)}


@dataclasses.dataclass(frozen=True)
class StableRank(SpectralNorm):
    """See `stable_rank_normalize`."""

    title = "SRN"

    share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be > 0 and <= 1")

    def attach(self, network: nn.Module, start: Start) -> None:
        """Normalises the weights from now on."""
        _normalize(network, _stable_rank(self.share, self.iterations), start.resumed)


# ---------------------------------------------------------------------------------------------------------------- SNIP


class Mask(nn.Module):
    """Keeps some entries of a weight at zero; they get no gradient.

    Args:
        kept: of the shape of the weight, bool.
    """

    kept: Tensor

    def __init__(self, kept: Tensor):
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def snip(network: nn.Module, images: Tensor, labels: Tensor, sparsity: float = 0.7) -> nn.Module:
    """Pruning at initialisation by connection sensitivity, |w dL/dw| (Lee et al. 2019), in one step.

    The weights of all convolutions and linear layers compete in one list; biases and norms stay. The network, running
    statistics included, is otherwise as it was. Norms that start at zero, such as the last of each residual block in
    timm's ResNets, count as one for the sensitivity, as in the SNIP paper: behind a zero no weight would have any.

    Args:
        images, labels: a batch of training images as the network takes them, (batch, channels, height, width), and
            (batch,).
        sparsity: share of these weights that is zero from now on.

    Raises:
        ValueError: `sparsity` is out of range; or a layer would lose all its weights, or gets no finite gradient.
    """
    return _prune(network, _weight_gradients(network, [(images, labels)]), sparsity)


def _prune(network: nn.Module, gradients: Mapping[str, Tensor], sparsity: float) -> nn.Module:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must lie between 0 and 1")
    layers = _weighted_layers(network)
    sensitivity = {
        name: (layer.weight.detach() * gradients[name].to(layer.weight.device)).abs() for name, layer in layers.items()
    }
    masks = _largest(sensitivity, 1 - sparsity)
    if empty := [name for name, kept in masks.items() if not kept.any()]:
        raise ValueError(f"sparsity={sparsity} leaves {', '.join(empty)} without any weight: lower it")
    return _masked(network, masks)


def _masked(network: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    for name, layer in _weighted_layers(network).items():
        parametrize.register_parametrization(layer, "weight", Mask(masks[name]))
    return network


def _weight_gradients(network: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy with respect to the weight of each layer, of a copy in train mode.

    What its dropout draws from torch's generators, the training draws again.
    """
    network = copy.deepcopy(network).train()
    for module in network.modules():  # norms: the only weights of one dimension
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.any():
            nn.init.ones_(weight)
    count, devices = 0, list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        for images, labels in batches:
            network.to(images.device)
            functional.cross_entropy(network(images), labels).backward()
            count += 1
    layers = _weighted_layers(network)
    gradients = {name: grad / count for name, layer in layers.items() if (grad := layer.weight.grad) is not None}
    if bad := [name for name in layers if name not in gradients or not gradients[name].isfinite().all()]:
        raise ValueError(f"the weights of {', '.join(bad)} get no finite gradient from the network at its start")
    return gradients


def _largest(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """For each tensor which entries are among the largest `share` of all of them together."""
    flat = torch.cat([value.flatten() for value in values.values()])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(max(1, round(share * len(flat)))).indices] = True
    parts = kept.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape).clone() for (name, value), part in zip(values.items(), parts, strict=True)}


@dataclasses.dataclass(frozen=True)
class Snip(Comparator):
    """See `snip`; `batches` of training images are what the gradient is the mean of."""

    title = "SNIP"

    sparsity: float = 0.7
    batches: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie between 0 and 1")
        if self.batches < 1:
            raise ValueError(f"batches={self.batches} must be >= 1")

    def attach(self, network: nn.Module, start: Start) -> None:
        """Masks the weights, the same on all processes."""
        if start.resumed:  # the masks are in the checkpoint; of other weights they might not even be possible
            whole = {
                name: torch.ones_like(layer.weight, dtype=torch.bool)
                for name, layer in _weighted_layers(network).items()
            }
            _masked(network, whole)
            return
        gradients = _weight_gradients(network, start.batches(self.batches))
        _prune(network, {name: start.mean_over_processes(one) for name, one in gradients.items()}, self.sparsity)

    def finish(self, network: nn.Module, batches: Batches) -> dict[str, float]:
        """The figure is the share of the weights that is zero."""
        weights = [layer.weight.detach() for layer in _weighted_layers(fold(network)).values()]
        return {"sparsity": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)}


# ---------------------------------------------------------------------------------------------------------- Matryoshka


class NestedLinear(nn.Linear):
    """A classifier with further classifiers on its first few input features.

    It gives its own logits; those of the nested ones, of the last forward pass in train mode, wait for `take`.

    Args:
        classifier: whose parameters it takes over.
        sizes: the features that each nested classifier sees.
    """

    def __init__(self, classifier: nn.Linear, sizes: Iterable[int]):
        super().__init__(classifier.in_features, classifier.out_features, device="meta")
        self.weight, self.bias = classifier.weight, classifier.bias
        device, dtype = self.weight.device, self.weight.dtype
        self.nested = nn.ModuleList(nn.Linear(n, self.out_features, device=device, dtype=dtype) for n in sizes)
        self._waiting: list[Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Features (batch, m) to logits (batch, classes)."""
        if self.training:
            self._waiting = self.nested_logits(features)
        return super().forward(features)

    def nested_logits(self, features: Tensor) -> list[Tensor]:
        """(batch, classes) of each nested classifier."""
        return [head(features[:, : head.in_features]) for head in self.nested]  # type: ignore[misc]

    def take(self) -> list[Tensor]:
        """The nested logits of the last forward pass in train mode, once.

        Raises:
            RuntimeError: there was none since the last call.
        """
        if self._waiting is None:
            raise RuntimeError("the nested classifiers' loss needs a forward pass in train mode before each call")
        waiting, self._waiting = self._waiting, None
        return waiting

    def whole(self) -> nn.Linear:
        """The classifier alone."""
        classifier = nn.Linear(self.in_features, self.out_features, device="meta")
        classifier.weight, classifier.bias = self.weight, self.bias
        return classifier

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None}  # graph tensors can neither be copied nor pickled


def matryoshka(
    network: nn.Module, sizes: Sequence[int] = (5, 10, 20, 50), *, example_input: Tensor | None = None
) -> nn.Module:
    """Nested classifiers on the first few features of the classifier's input (Kusupati et al. 2022).

    `NestedLoss` is the criterion that trains them. The whole classifier alone predicts.

    Args:
        sizes: numbers of features, increasing and below all of them: the whole classifier is the last.
        example_input: needed for a network that is not timm's, to find its classifier.

    Raises:
        ValueError: the sizes do not fit, or the classifier is no `nn.Linear`.
    """
    path = tap_on(network, PRE_LOGITS, example_input).path
    classifier = network.get_submodule(path)
    if type(classifier) is not nn.Linear:
        raise ValueError(f"the classifier {path} is a {type(classifier).__name__}, and nested ones need an nn.Linear")
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)) or sizes[-1] >= classifier.in_features:
        raise ValueError(
            f"sizes={list(sizes)} must be increasing and below the {classifier.in_features} features of the classifier "
            f"{path}, which is the largest head itself"
        )
    _replace(network, path, NestedLinear(classifier, sizes))
    return network


class NestedLoss(nn.Module):
    """A criterion summed over the nested classifiers and the whole one; in eval mode of the whole one alone.

    Args:
        criterion: any callable that gives a scalar loss of (logits, labels).
        network: from `matryoshka`, not a DDP or compiled wrapper around it.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], network: nn.Module):
        super().__init__()
        self.criterion = criterion
        self._network = (network,)  # in a tuple, so that the criterion's parameters do not come to include its

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss, network = self.criterion(logits, labels), self._network[0]
        if not network.training:
            return loss
        _, nested = _nested(network)
        return loss + torch.stack([self.criterion(one, labels) for one in nested.take()]).sum()


@dataclasses.dataclass(frozen=True)
class Matryoshka(Comparator):
    """See `matryoshka`: the loss is the sum of all cross-entropies."""

    title = "Matryoshka"

    sizes: tuple[int, ...] = (5, 10, 20, 50)

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes={list(self.sizes)} must be increasing integers >= 1")

    def attach(self, network: nn.Module, start: Start) -> None:
        """Nests the classifiers."""
        matryoshka(network, self.sizes, example_input=start.example_input)

    def extra_loss(self, network: nn.Module, labels: Tensor) -> Tensor:
        """The cross-entropies of the nested classifiers, summed."""
        _, nested = _nested(network)
        return torch.stack([functional.cross_entropy(logits.float(), labels) for logits in nested.take()]).sum()

    def finish(self, network: nn.Module, batches: Batches) -> dict[str, float]:
        """Leaves the whole classifier. The test accuracies of the nested ones are "accuracy_of_first_5" and so on."""
        path, nested = _nested(network)
        right, count = torch.zeros(len(self.sizes)), 0
        tap = Tap(PRE_LOGITS, path, takes_input=True)
        with evaluating(network):
            for images, labels in batches:
                with recording(network, [tap]) as record:
                    network(images)
                logits = nested.nested_logits(record.activation(tap))
                right += torch.stack([(one.argmax(1) == labels).sum() for one in logits]).cpu()
                count += len(labels)
        fold(network)
        shares = zip(self.sizes, right.tolist(), strict=True)
        return {f"accuracy_of_first_{size}": correct / count for size, correct in shares}


def _nested(network: nn.Module) -> tuple[str, NestedLinear]:
    """The classifier of a network from `matryoshka`, and its name. Raises ValueError for another network."""
    for path, module in network.named_modules():
        if isinstance(module, NestedLinear):
            return path, module
    raise ValueError(f"the {type(network).__name__} has no nested classifiers: give it some with matryoshka(network)")


# ------------------------------------------------------------------------------------------------------------ by name

COMPARATORS: dict[str, type[Comparator]] = {
    "bottleneck": BottleLR,
    "spectral-norm": SpectralNorm,
    "stable-rank": StableRank,
    "snip": Snip,
    "matryoshka": Matryoshka,
}


def comparator_from(name: str, args: Mapping[str, Any]) -> Comparator:
    """A comparator from the values of a recipe.

    >>> comparator_from("snip", {"sparsity": 0.5})
    Snip(sparsity=0.5, batches=1)

    Raises:
        ValueError: there is none of that name, or one of its settings is unknown, of a wrong type or out of range.
    """
    if name not in COMPARATORS:
        raise ValueError(f"comparator={name!r} is not one of {', '.join(COMPARATORS)}")
    kind = COMPARATORS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    problems = [
        f"there is no key comparator_args.{key}. {nearest(str(key), known)}" for key in args if key not in known
    ]
    values = decode_fields(kind, args, problems, "comparator_args")
    if problems:
        raise ValueError("; ".join(problems))
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"comparator_args: {error}") from error
