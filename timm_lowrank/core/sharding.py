"""State dicts of models whose parameters are sharded, as FSDP2 does.

`torch.distributed.checkpoint` takes the state of such a model apart by parameters and buffers, and loads a tensor only
into one of the same size. W and b are neither parameters nor buffers, and the factor grows between two saves. So
beside sharded parameters the state of a branch is one piece of bytes, as the extra state of its module. Either form
loads into either kind of model.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "_extra_state"  # the name that torch gives it


def pack(state: Mapping[str, Tensor]) -> bytes:
    """Tensors by name, as bytes."""
    file = io.BytesIO()
    torch.save({name: value.cpu() for name, value in state.items()}, file)
    return file.getvalue()


def unpack_into(state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the extra state of the module at `prefix`, where there is one, by the tensors that it holds."""
    packed = state_dict.pop(prefix + _KEY, None)
    if isinstance(packed, bytes):  # else a placeholder of torch's, which found nothing to put there
        state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        state_dict.update({prefix + name: value for name, value in state.items()})


def pack_where_sharded(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """A post hook of `LowRankModel.state_dict()`: one piece for each branch, if the parameters are sharded."""
    if not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return
    for name, branch in model.get_submodule("branches").named_children():
        own = f"{prefix}branches.{name}."
        for key in [key for key in state_dict if key.startswith(own)]:
            del state_dict[key]
        state_dict[own + _KEY] = branch.get_extra_state()
