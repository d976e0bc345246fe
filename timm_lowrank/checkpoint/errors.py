"""What saving, loading and publishing raise."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, fetched or published; the message says why and what to do."""


class CheckpointDamagedError(CheckpointError):
    """A file that was cut off, changed or exchanged since it was written."""


class CheckpointWriteError(CheckpointError, OSError):
    """The disk is full or not writable. What was there before is there still."""
