"""`full_precision`: the branches compute in their own dtype, whatever precision the network trains in."""

from __future__ import annotations

import contextlib

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast is off for `device`."""
    if device.type == "meta":  # which has no autocast: networks that are only looked at, not computed
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
