"""What was lost and won: measurements of a QAT model, and one HTML page that shows them."""

from qatana.report.data import ReportData
from qatana.report.formats import format_table
from qatana.report.measure import measure
from qatana.report.render import render

__all__ = ["ReportData", "format_table", "measure", "render"]
