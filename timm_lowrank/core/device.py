"""Devices: what a branch does differently on one of them, and how its tensors get to another."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast is off for `device`: branches compute in their own dtype, whatever the network does."""
    if device.type == "meta":  # which has no autocast: networks that are only looked at, not computed
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a product in bfloat16 pays on `device`: processors that have it. A GPU gains nothing from it here, where
    the products are the smallest part of a step."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # slower than float32 where it is missing
    return device.type == "cpu" and supported is not None and bool(supported())


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. One of "meta", which has no values, becomes zeros, as `module.to_empty()` asks for."""
    return torch.zeros_like(tensor, device=device) if tensor.is_meta and device.type != "meta" else tensor.to(device)
