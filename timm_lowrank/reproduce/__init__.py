"""The paper's tables, figures and claims beside ours: `timm-lowrank reproduce`.

>>> from timm_lowrank.reproduce import Options, reproduce
>>> reproduce(Options(names=("table-5",), scale="smoke"))  # doctest: +SKIP
"""

from .catalogue import ENTRIES
from .command import Options, fill_page, overview, reproduce
from .reproduction import Reproduction, read_reproduction

__all__ = ["ENTRIES", "Options", "Reproduction", "fill_page", "overview", "read_reproduction", "reproduce"]
