"""Results as one self-contained HTML page, as Markdown and as terminal rows. No torch."""

from defquant.report.page import build_report
from defquant.report.plot import plot_curves
from defquant.report.tables import Row, markdown_table, summary, text_table

__all__ = ["Row", "build_report", "markdown_table", "plot_curves", "summary", "text_table"]
