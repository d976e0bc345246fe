"""`LowRankModel`: a network with low-rank branches on some of its layers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..errors import CaptureError, LowRankError, LowRankWarning
from .branch import BranchReport, LowRankBranch
from .capture import Recording, Tap, recording
from .config import LowRankConfig
from .distributed import Processes, called_from, in_lockstep, pack_where_sharded, refuse_deepspeed
from .views import valid_patches

FORWARDS_BEFORE_WARNING = 50  # in training, of a loop that leaves out penalty()
STEPS_BEFORE_WARNING = 200  # penalties without an update(): more batches than anybody accumulates
COMPILED_BY_REGIONS = (
    "accelerate compiled the repeated blocks of the model one by one, in a copy of it that the branches do not see: "
    "compile it as a whole, TorchDynamoPlugin(use_regional_compilation=False), or with "
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=false"
)


class BranchDict(nn.ModuleDict):
    """A ModuleDict whose keys are layer names.

    torch forbids dots in them, and names that the dictionary itself has, such as "values": they are stored with "/" in
    the place of dots, and with one more at the end.
    """

    @staticmethod
    def stored(key: str) -> str:
        """The name of a layer as state dicts have it."""
        key = key.replace(".", "/")
        return f"{key}/" if hasattr(BranchDict, key) or key == "training" else key

    def __getitem__(self, key: str) -> LowRankBranch:
        return super().__getitem__(self.stored(key))  # type: ignore[return-value]

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(self.stored(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(self.stored(key))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and super().__contains__(self.stored(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self):  # type: ignore[no-untyped-def, override]
        # Branches know their layer; what is stored cannot tell "a.b" from a module that is called "a/b".
        return [getattr(one, "name", "") or key.rstrip("/").replace("/", ".") for key, one in self._modules.items()]

    def values(self):  # type: ignore[no-untyped-def, override]
        return list(self._modules.values())

    def items(self):  # type: ignore[no-untyped-def, override]
        return list(zip(self.keys(), self._modules.values(), strict=True))


class LowRankModel(nn.Module):
    """A backbone with virtual low-rank branches (paper, Figure 1): its outputs are the backbone's own.

    A training forward records the regularized activations; `penalty` turns them into the branches' loss and
    `update` moves W and b after the optimizer's step. In eval mode, or switched off, the wrapper only calls the
    backbone. Attributes that it does not have are read from, written to and deleted on the backbone, but for those by
    which libraries find the network inside a wrapper (`module`, `_orig_mod`): they would lose the branches. What timm's
    `no_weight_decay` and `group_matcher` say of parameters by name, they say by the names that these have here. State
    dict: the backbone's under "backbone.", unchanged, and the branches' under "branches.".

    Takes the backbone's own mode, train or eval, and leaves that of each of its modules alone.

    Built by `timm_lowrank.wrap`, which finds taps and widths.

    Args:
        backbone: the network; it is neither changed nor copied.
        config: the configuration of the branches.
        taps: where each branch reads its layer.
        widths: number of features of each layer.
        ranks: target rank of each layer.
        classes: how many the labels tell apart, for subspace heads; None where the network does not say. Where the
            backbone says another `num_classes` later, as after `reset_classifier`, new heads begin.
    """

    # Its own, whatever names the backbone has.
    backbone: nn.Module
    branches: BranchDict
    lowrank_config: LowRankConfig
    taps: tuple[Tap, ...]
    classes: int | None
    enabled: bool

    def __init__(
        self,
        backbone: nn.Module,
        config: LowRankConfig,
        taps: Sequence[Tap],
        widths: Mapping[str, int],
        ranks: Mapping[str, int],
        classes: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.lowrank_config = config
        self.taps = tuple(taps)
        self.classes = classes
        self._num_classes = getattr(backbone, "num_classes", None)
        self.enabled = True
        self.attachment: torch.utils.hooks.RemovableHandle | None = None  # of `attach`, which looks after it
        self._recording: Recording | None = None  # of the last forward that is trained on
        self._trial: Recording | None = None  # of one behind it that was made without gradients
        self._usage = UsageCheck()
        self._lockstep: int | None = None  # penalties since the last update, of processes that make each step together
        device = next((p.device for p in backbone.parameters()), None)
        self.branches = BranchDict()
        for tap in self.taps:
            own = config.for_branch(tap.layer, feeds_classifier=tap.feeds_classifier)
            branch = LowRankBranch(widths[tap.layer], ranks[tap.layer], own, device, classes=classes)
            branch.name, branch.view = tap.layer, tap.view
            self.branches[tap.layer] = branch
        self.training = backbone.training  # not train(): that would undo a frozen BatchNorm's eval mode
        self.branches.train(backbone.training)
        self.register_state_dict_post_hook(pack_where_sharded)
        self.register_state_dict_post_hook(_leave_out_where_averaged)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's output, in train and eval mode alike."""
        if isinstance(args, torch.fx.Proxy):  # a tracer passes one instead of the tuple
            raise TypeError("torch.fx cannot trace the branches: trace the plain network, model.unwrap()")
        if not (self.training and self.enabled):
            return self.backbone(*args, **kwargs)
        refuse_deepspeed(self)
        if not isinstance(self.branches, BranchDict):  # in such a copy they are compiled, too
            raise LowRankError(COMPILED_BY_REGIONS)
        with recording(self.backbone, self.taps) as record:
            output = self.backbone(*args, **kwargs)
        record.patches = valid_patches(args, kwargs)
        self.take(record)
        return output

    def take(self, record: Recording) -> None:
        """What the next `penalty` is of: for a loop that records the forward of a larger model around the backbone.

        A forward without gradients, or of a network that is frozen, as a teacher's is, trains nothing: it takes the
        place of no other that waits for its penalty.
        """
        record.lockstep = in_lockstep()
        if not torch.is_grad_enabled() or not (torch.compiler.is_compiling() or self._learns()):
            self._trial = record
            return
        # A count would be compiled in, and compiled anew whenever it changes.
        if not torch.compiler.is_compiling():
            record.forwards += 0 if self._recording is None else self._recording.forwards
            self._usage.count_forward()
        self._recording, self._trial = record, None

    @torch.compiler.disable  # it asks about the state of the loop: each answer would be compiled in, and again
    def penalty(
        self,
        labels: Tensor | None = None,  # (batch,) class numbers, or (batch, classes) shares
    ) -> Tensor:
        """The summed penalty of all branches for the last training forward, a scalar with a graph (Alg. 2, line 8).

        Can be had once per forward, so that no batch counts twice. Of several forwards the last one counts: where each
        is trained on, add `penalty()` behind each. Zero while the branches are switched off. Under `torch.no_grad()` it
        is that of the last forward there, to look at: none that waits to be trained on is used up.

        Args:
            labels: of that batch. Subspace heads need them, and are left out, with a warning, where there are none.

        Raises:
            CaptureError: no training forward since the last call, or a layer's activations could not be recorded.
            LowRankError: in DistributedDataParallel, another process is at an update that this one left out.
            ValueError: labels that do not fit.
        """
        if not self.enabled:
            parameter = next(self.backbone.parameters(), None)
            device = None if parameter is None else parameter.device  # new_zeros() of a sharded one would be sharded
            return torch.zeros((), device=device, dtype=torch.float32)
        learns = torch.is_grad_enabled()
        record = (self._recording or self._trial) if learns else (self._trial or self._recording)
        if record is None:
            raise CaptureError(
                "penalty() needs a forward pass in train mode before each call; it was called without one, or twice "
                "for the same one. Where a criterion is called several times for one forward, as with Mixup, call it "
                "by itself, without LossHook, and add model.penalty(shares of the classes) once"
            )
        self._trial = None
        if learns:
            self._recording = None
            self._usage.count_penalty(record.forwards)
        if record.lockstep:
            self._processes.meet("penalty()", self._lockstep or 0)
            self._lockstep = 1 + (self._lockstep or 0)
        activations = {tap.layer: self._checked(tap, record) for tap in self.taps}
        self.follow_classifier()
        if self.uses_labels:
            self._usage.count_labels(given=labels is not None)
        penalties = []
        for tap in self.taps:
            value = activations[tap.layer]
            valid = tap.view.valid(value, record.patches)
            counts = valid.sum(dim=1) if valid is not None and tap.view.kind == "token" else None
            penalties.append(self.branches[tap.layer].penalty(tap.view.rows(value, valid), labels, counts))
        return functools.reduce(torch.add, penalties)

    @property
    def uses_labels(self) -> bool:
        """Whether a branch has a subspace head, which learns from labels."""
        return any(branch.head is not None for branch in self.branches.values())

    def follow_classifier(self) -> None:
        """New heads where the backbone says another number of classes than when the present ones were made.

        `penalty`, `state_dict` and `load_state_dict` do so; whoever reads or loads the state of `branches` alone calls
        it before. Heads of another classifier than that of the network would make a checkpoint that cannot be loaded.
        """
        if (said := getattr(self.backbone, "num_classes", None)) != self._num_classes:
            self._num_classes, self.classes = said, said or None
            for branch in self.branches.values():
                branch.classify(self.classes)

    def _checked(self, tap: Tap, record: Recording) -> Tensor:
        if tap.layer not in record.values and self._is_compiled_apart(tap):
            raise CaptureError(
                f"layer {tap.layer!r} lies in a part of the network that is compiled by itself, and that was compiled "
                "while the branches were off, so it does not see them: compile the wrapped model, "
                "torch.compile(model), or this part when the branches are on"
            )
        value = record.activation(tap)
        if torch.is_grad_enabled() and self._learns() and not value.requires_grad:
            raise CaptureError(
                f"the activations of layer {tap.layer!r} carry no gradient, so its penalty could not train "
                "anything; is the network in front of it frozen, or checkpointed with use_reentrant=True?"
            )
        return value

    def _learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def _is_compiled_apart(self, tap: Tap) -> bool:
        """Whether the backbone, or a module of it on the way to the tap, was compiled without this wrapper."""
        names = tap.path.split(".")
        around = [self.backbone.get_submodule(".".join(names[:count])) for count in range(len(names) + 1)]
        return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in around)

    @torch.compiler.disable
    def update(self) -> None:
        """The Update Step of every branch (Algorithm 2, lines 11 to 13), from all penalties since the last update.

        Call it after `optimizer.step()`, once per step that really happened, on all processes that train the model
        together. Nothing happens while the branches are switched off.

        Raises:
            RuntimeError: no penalty was computed since the last update.
            CollapseError: a regularized layer died or turned NaN.
            LowRankError: the branches of the processes are not alike, or one of them is not at this update.
        """
        if self.enabled:
            self._usage.done = True
            if self._lockstep is not None:
                self._processes.meet("update()", self._lockstep)
                self._lockstep = 0
            for branch in self.branches.values():
                branch.update()

    def enable(self, on: bool = True) -> LowRankModel:
        """Switch the branches on or off; switched off, the wrapper costs nothing and `penalty` is zero.

        What waits for the next update is dropped when they go off. The paper trains plainly for 50 epochs before it
        switches them on. Returns the model.
        """
        self.enabled = on
        self._recording = self._trial = None
        if not on:
            for branch in self.branches.values():
                branch.forget_batches()
        return self

    def train(self, mode: bool = True) -> LowRankModel:
        """As of any module."""
        if not mode and self.training:
            self._usage.pause(unused=self._recording is not None)
            if self._recording is not None:
                self._recording.forwards = 0  # what was before an evaluation may have been a trial
        return super().train(mode)

    def train_within(self, group: torch.distributed.ProcessGroup) -> LowRankModel:
        """Share W and b with the processes of `group` instead of with all. Returns the model.

        For data-parallel groups that are not the whole world; a group of this process alone shares with none.
        """
        for branch in self.branches.values():
            branch.processes = Processes(group)
        return self

    @property
    def _processes(self) -> Processes:
        return next(iter(self.branches.values())).processes

    @property
    def attached(self) -> bool:
        """Whether an optimizer that still exists calls `update`, see `timm_lowrank.attach`."""
        hooks = None if self.attachment is None else self.attachment.hooks_dict_ref()
        return hooks is not None and self.attachment is not None and self.attachment.id in hooks

    def losses(self) -> dict[str, dict[str, Tensor]]:
        """Per layer the detached parts of its last penalty, see `LowRankBranch.losses`."""
        return {layer: branch.losses() for layer, branch in self.branches.items()}

    def report(self) -> dict[str, BranchReport]:
        """Per layer how far its branch is, in plain numbers, for the log of any loop; see `BranchReport`.

        >>> for layer, one in model.report().items():  # doctest: +SKIP
        ...     print(f"{layer}: {one}")
        layer3: penalty 0.0312, 4.2% of the energy outside W, rank 20 (target 20) after 1,170 updates
        """
        return {layer: branch.report() for layer, branch in self.branches.items()}

    @contextlib.contextmanager
    def capture(self) -> Iterator[dict[str, Any]]:
        """`with model.capture() as activations: model(images)` fills {layer: activations}, also in eval mode."""
        with recording(self.backbone, self.taps) as record:
            yield record.values

    def unwrap(self) -> nn.Module:
        """The backbone itself. Nothing was ever left on it, so there is nothing to undo.

        Warns, once, if the branches were trained and their penalty has never had weight: see `warn_of_no_weight`.
        """
        self.warn_of_no_weight()
        return self.backbone

    def warn_of_no_effect(self, what: str, advice: str) -> None:
        """Warns, once, that the branches have no effect: for a loop that knows more of it than this model."""
        self._usage.warn(what, advice)

    def warn_of_no_weight(self) -> None:
        """Warns, once, if the training of the branches ended before their warm-up: the network was trained plainly."""
        updates = max(branch.updates for branch in self.branches.values())
        if not updates or self.lowrank_config.has_had_weight(updates) or self._usage.no_weight:
            return
        self._usage.no_weight = True
        warnings.warn(
            "the penalty of the branches has had no weight yet: W and b are fitted alone for "
            f"{self.lowrank_config.warmup_updates} updates (warmup_updates) before it rises from zero, and there were "
            f"{updates}. The network is as if trained without branches: lower warmup_updates, or train longer",
            LowRankWarning,
            stacklevel=3,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not built yet, or being unpickled: looking further would never end. And see the class.
            if name in ("backbone", *_INNER):
                raise
            if name == "accepts_loss_kwargs" and not hasattr(self.backbone, name):
                return _takes_keywords(self.backbone)
            value = getattr(self.backbone, name)
            return _RENAMED[name](value) if name in _RENAMED else value

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_backbone(name):
            setattr(self.backbone, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_backbone(name):
            delattr(self.backbone, name)
        else:
            super().__delattr__(name)

    def _is_of_backbone(self, name: str) -> bool:
        """Whether reading the attribute means the backbone's. What starts with an underscore is never written there
        unless it is a module or tensor: libraries keep notes about the module that they were given in such names."""
        backbone = self.__dict__.get("_modules", {}).get("backbone")
        own = name in self.__dict__ or name in LowRankModel.__annotations__ or hasattr(type(self), name)
        if backbone is None or own:
            return False
        registered = any(name in held for held in (backbone._modules, backbone._parameters, backbone._buffers))
        return registered or (not name.startswith("_") and hasattr(backbone, name))

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks for it first."""
        raise TypeError("torch.jit cannot script the branches: script the plain network, model.unwrap()")

    def __getstate__(self) -> dict[str, Any]:
        # Graph tensors can neither be copied nor pickled, and no optimizer steps on a copy. What nn.Module leaves out
        # itself is the compiled call of `model.compile()`: in a copy it would go on calling this model.
        return {**super().__getstate__(), "_recording": None, "_trial": None, "attachment": None}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.follow_classifier()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.follow_classifier()
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> LowRankModel:
        raise RuntimeError(
            "nn.DataParallel would give each replica activations that the branches never see; use "
            "DistributedDataParallel, for example through `accelerate launch`"
        )


def _takes_keywords(network: nn.Module) -> bool:
    """Whether the forward of a network takes any keyword, as that of the wrapper does.

    Where no `accepts_loss_kwargs` says otherwise, transformers.Trainer takes such a model for one that scales its loss
    by the batches that are accumulated, and does not do so itself.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _leave_out_where_averaged(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """A post hook of `LowRankModel.state_dict()`: no branches where timm's EMA asks for it.

    Every version of it averages all that there is, tensor by tensor. An average of matrices of rank r has not rank r,
    and the factor of W grows between two updates, so that its sizes would not even fit.
    """
    if called_from("timm.utils.model_ema"):
        for key in [key for key in state_dict if key.startswith(f"{prefix}branches.")]:
            del state_dict[key]


def _renamed_names(hook: Callable[[], Iterable[str]]) -> Callable[[], set[str]]:
    """A network's `no_weight_decay` with the names, or patterns of them, that its parameters have in the wrapper."""
    return lambda: {_PREFIX + name for name in hook()}


def _renamed_matcher(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A network's `group_matcher` for the names that its parameters have in the wrapper."""

    def group_matcher(coarse: bool = False) -> Any:
        groups = hook(coarse=coarse)
        if callable(groups):
            return lambda name: groups(name.removeprefix(_PREFIX))
        return {group: _renamed_patterns(patterns) for group, patterns in groups.items()}

    return group_matcher


def _renamed_patterns(patterns: Any) -> Any:
    """None, a regular expression that names are matched with from their start, or pairs of one and a suffix."""
    if isinstance(patterns, list | tuple):
        return [(_renamed_patterns(pattern), *suffix) for pattern, *suffix in patterns]
    if patterns is None:
        return None
    unanchored = re.sub(r"(?<![\\\[])\^", "", patterns)  # the start is that of the whole name, and matched in any case
    return f"{re.escape(_PREFIX)}(?:{unanchored})"


_PREFIX = "backbone."
_INNER = "module", "_orig_mod"  # what DistributedDataParallel and torch.compile call the network inside them
_RENAMED: dict[str, Callable[[Any], Any]] = {"no_weight_decay": _renamed_names, "group_matcher": _renamed_matcher}


class UsageCheck:
    """Warns, once and loudly, of a training loop that forgot half of the branch.

    Counts what the loop calls, from switch-on to the first `update`.
    """

    def __init__(self) -> None:
        self.forwards = 0  # in training; those of a compiled network are not seen
        self.penalties = 0
        self.forwards_missed = False  # one penalty followed several forwards
        self.no_weight = False  # training ended before the penalty had weight
        self.labels_missed = False  # penalty() was called without labels where a head needs them
        self.done = False  # the loop was found to be right, or was warned

    def count_forward(self) -> None:
        self.forwards += 1
        if self.forwards >= FORWARDS_BEFORE_WARNING and not self.penalties:
            self.warn(f"{self.forwards} training forwards passed, but penalty() was never called")

    def count_labels(self, given: bool) -> None:
        if not given and not self.labels_missed:
            self.labels_missed = True
            warnings.warn(
                "the subspace heads of the branches have no effect without labels: call model.penalty(labels), or set "
                "head_weight=0",
                LowRankWarning,
                stacklevel=5,
            )

    def count_penalty(self, forwards: int) -> None:
        """A penalty after so many training forwards since the last one."""
        self.penalties += 1
        if forwards > 1 and not self.forwards_missed:
            self.forwards_missed = True
            warnings.warn(
                f"{forwards} training forwards before one penalty(): only the last one's activations count. Where "
                "each is trained on, add model.penalty() to the loss behind each forward; where the others are not, "
                "run them under torch.no_grad() or in eval mode",
                LowRankWarning,
                stacklevel=4,
            )
        if self.penalties >= STEPS_BEFORE_WARNING:
            self.warn(
                f"penalty() was called {self.penalties} times, but update() never, so W and b stay what they were",
                "call model.update() after optimizer.step(), or timm_lowrank.attach(optimizer, model) once",
            )

    def pause(self, unused: bool) -> None:
        """Training ends or is interrupted: where alone the forwards of a compiled network can be noticed.

        Args:
            unused: whether the penalty of the last forward was never asked for.
        """
        if unused and not self.forwards and not self.penalties:
            self.warn("a compiled network was trained, but penalty() was never called")

    def warn(self, what: str, advice: str | None = None) -> None:
        if self.done:
            return
        self.done = True
        advice = advice or (
            "add model.penalty() to the loss, or use timm_lowrank.LossHook(criterion, model) as the criterion. "
            "To train without the branches, model.enable(False)"
        )
        warnings.warn(f"the low-rank branches have no effect: {what}; {advice}", LowRankWarning, stacklevel=5)
