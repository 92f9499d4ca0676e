"""The run's report: one self-contained HTML page."""

from services.report.page import write_report

__all__ = ["write_report"]
