"""Results as one self-contained HTML page, as Markdown and as terminal rows. No torch."""

from defquant.report.claims import claims_markdown, print_claims
from defquant.report.page import build_report
from defquant.report.plot import plot_curves
from defquant.report.section_markdown import section_markdown
from defquant.report.section_plot import section_figure
from defquant.report.section_text import print_section
from defquant.report.tables import Row, markdown_table, summary, text_table

__all__ = [
    "Row", "build_report", "claims_markdown", "markdown_table", "plot_curves", "print_claims",
    "print_section", "section_figure", "section_markdown", "summary", "text_table",
]  # fmt: skip
