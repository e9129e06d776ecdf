"""Results as one self-contained HTML page, as Markdown, pictures and terminal rows. No torch."""

from defquant.report.measured import Row, plot_curves, plot_ladder, summary
from defquant.report.page import (
    build_report,
    claims_markdown,
    judged_page,
    markdown_table,
    print_claims,
    print_section,
    section_markdown,
    text_matrix,
    text_table,
)
from defquant.report.plot import plot_matrix, section_figure

__all__ = [
    "Row", "build_report", "claims_markdown", "judged_page", "markdown_table", "plot_curves",
    "plot_ladder", "plot_matrix", "print_claims", "print_section", "section_figure",
    "section_markdown", "summary", "text_matrix", "text_table",
]  # fmt: skip
