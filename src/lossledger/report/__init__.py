"""The report: what a ledger says, as one HTML file or as text; imports no torch."""

from lossledger.report.html import report
from lossledger.report.numbers import display
from lossledger.report.text import as_markdown, as_text
from lossledger.report.view import Picture, ReportView, build_view

__all__ = ["Picture", "ReportView", "as_markdown", "as_text", "build_view", "display", "report"]
