"""The report of an evaluation: page, plots and terminal table, pure functions of an `Evaluation`."""

from .page import write_report
from .plots import write_plots
from .terminal import text_table

__all__ = ["text_table", "write_plots", "write_report"]
