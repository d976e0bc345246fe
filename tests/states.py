"""State dicts in tests."""

import torch


def same(one, other):
    """Whether two state dicts have the same names and the same tensors, to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )
