"""`BranchState`: what a branch keeps, how it moves between devices, and how it is saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from .config import LowRankConfig
from .dense import DenseWeight
from .factored import FactoredWeight
from .moments import Moments
from .processes import Processes, fingerprint
from .sharding import pack, unpack_into
from .views import FLATTEN, VIEWS, View
from .window import Window


class BranchState(nn.Module):
    """W, b and all else that `LowRankBranch` computes with. Arguments and errors are described there.

    Nothing here is a parameter or a buffer: no optimizer steps on it, DistributedDataParallel does not broadcast it,
    and the number of rows of B may change from step to step.
    """

    def __init__(
        self,
        num_features: int,
        rank: int,
        config: LowRankConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not 1 <= rank <= num_features:
            raise ValueError(f"rank {rank} must lie between 1 and the width of the layer, {num_features}")
        self.num_features, self.rank = num_features, rank
        self.config = config = (config or LowRankConfig()).for_branch("")
        self.name = ""
        self.view = FLATTEN  # what the rows are that it is given; W and b belong to that view of the layer
        self.processes = Processes()
        kind = FactoredWeight if config.storage == "factored" else DenseWeight
        place = torch.empty(0, device=device).device
        self.weight: FactoredWeight | DenseWeight = kind(num_features, rank, config, place, dtype)
        self.bias = torch.zeros(num_features, device=place, dtype=dtype)
        self.reference_norm = torch.zeros(
            (), device=place, dtype=dtype
        )  # root mean square of ||a - mean|| at switch-on
        self.updates = 0
        self._started = False  # whether b and the reference norm were taken from the batches of a first update
        self._begun = False  # whether they were taken from the first of these batches, until then
        self._fresh = True  # whether W and b have not moved since they were made or loaded
        self._losses: dict[str, Tensor] = {}
        self._forget_batches()

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, rank={self.rank}, scale={self.config.scale!r}"

    def _forget_batches(self) -> None:
        self._moments = Moments(self.bias)
        self._window = Window(self.config.update_rows, self._seed(1))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W (num_features, num_features): for tests and narrow layers."""
        return self.weight.dense()

    @torch.no_grad()
    def factor(self) -> Tensor:
        """F (num_features, rank or less); after a projection W = F F^T if W is positive semidefinite."""
        return self.weight.factor()

    @torch.no_grad()
    def effective_rank(self, share: float = 0.99) -> int:
        """How many of the eigenvalues of W hold `share` of the sum of their magnitudes; 0 while W is zero."""
        cumulative = self.weight.eigenvalues().abs().cumsum(dim=0)
        return int((cumulative < share * cumulative[-1]).sum()) + 1 if cumulative.numel() else 0

    # ---------------------------------------------------------------------------------------------------- bookkeeping

    def _seed(self, salt: int) -> int:
        """Depends on the configuration, the update and `salt` alone: nothing to save, alike on every process."""
        return ((self.config.seed * 1_000_003 + self.updates) * 1_009 + salt) % 2**63

    def _alike(self) -> dict[str, int]:
        """What must be the same on all processes, by what to call it; W and b themselves where they are fresh."""
        alike = {"their number of updates": self.updates, "the size of their factors": self.weight.size}
        alike |= {"whether they have begun": int(self._started), "when their states were loaded": int(self._fresh)}
        if self._fresh:  # later, reading them would make the host wait for the device
            alike["W or b"] = fingerprint(self.bias, self.reference_norm, *self.weight.state().values())
            configuration = [self.config.to_dict(), dataclasses.asdict(self.view)]
            alike["their configuration"] = zlib.crc32(json.dumps(configuration, sort_keys=True).encode())
        return alike

    # ------------------------------------------------------------------------------------------------------ state

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def, override]
        """Follow the module to another device, never to another dtype: W must not become half precision."""
        device = fn(torch.empty_like(self.bias)).device
        self.weight.to(device)
        self._window.to(device)
        self._moments.to(device)
        for name in ("bias", "reference_norm"):
            setattr(self, name, getattr(self, name).to(device))
        self._losses = {name: value.to(device) for name, value in self._losses.items()}
        return super()._apply(fn, recurse)

    def _state(self) -> dict[str, Tensor]:
        # The view rides along: earlier versions read the first two numbers, and would refuse a tensor of a new name.
        view = [VIEWS.index(self.view.kind), self.view.channel_dim]
        counters = torch.tensor([self.updates, int(self._started), *view])
        own = {"bias": self.bias.clone(), "reference_norm": self.reference_norm.clone(), "counters": counters}
        return {**own, **self.weight.state()}

    def get_extra_state(self) -> bytes:
        """The whole state in one piece, as a model with sharded parameters saves it; see `sharding`."""
        return pack(self._state())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self._state().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = self._state().keys()
        unpack_into(state_dict, prefix)
        missing_keys += [prefix + name for name in names if prefix + name not in state_dict]
        found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        unexpected_keys += [prefix + name for name in found if name not in names]
        if any(prefix + name not in state_dict for name in names):
            return
        try:
            if found["bias"].shape != self.bias.shape:
                raise ValueError(
                    f"a bias of shape {tuple(found['bias'].shape)} does not fit {self.num_features} features"
                )
            self._check_view(*found["counters"][2:].tolist())
            self.weight.load_state(found)
        except ValueError as problem:
            error_msgs.append(f"While loading the low-rank branch {prefix!r}: {problem}")
            return
        self.bias = found["bias"].to(self.bias, copy=True)
        self.reference_norm = found["reference_norm"].to(self.reference_norm, copy=True)
        self.updates, self._started = int(found["counters"][0]), bool(found["counters"][1])
        self._begun, self._fresh = self._started, True
        self._forget_batches()

    def _check_view(self, kind: int = -1, channel_dim: int = 0) -> None:
        """Raises ValueError if W and b were trained on another view of the layer; states from before views say none."""
        if kind < 0:
            return
        saved = View(VIEWS[kind] if kind < len(VIEWS) else "unknown", channel_dim)
        if not saved.agrees(self.view):
            raise ValueError(f"W and b of the view {saved} do not fit a branch of the view {self.view}")
