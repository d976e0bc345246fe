"""Failures on request."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class Fault:
    """What goes wrong with requests of one kind; `hits` counts how often it did."""

    method: str  # "GET", ..., or "*"
    path: str  # a regular expression, searched for in the path
    status: int | None  # answer this instead
    code: str | None  # with this X-Error-Code
    retry_after: int | None  # and this Retry-After, in seconds
    drop_after: int | None  # close the connection after so many bytes of the body, sent or received
    lose_answer: bool  # do what is asked and close the connection without an answer
    corrupt_at: int | None  # flip the byte at this place of the answered file
    delay: float  # wait so many seconds first
    times: int  # for so many requests
    skip: int  # after letting so many pass
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is to fail; each call counts."""
        if self.method not in ("*", method) or not re.search(self.path, path) or self.hits >= self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True

    def corrupt(self, data: bytes) -> bytes:
        """`data` with one byte turned over, its length unchanged."""
        at = self.corrupt_at
        return data if at is None else data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
