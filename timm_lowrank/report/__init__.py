"""The report of an evaluation: page, plots and terminal table, pure functions of the content of evaluation.json."""

from .content import check_content, headline
from .page import write_report
from .plots import write_plots
from .terminal import text_table

__all__ = ["check_content", "headline", "text_table", "write_plots", "write_report"]
